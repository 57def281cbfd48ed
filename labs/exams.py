"""One exam, five prompts: more ways to ask, MMLU, answers in words.

The idea: a score belongs to its prompt. The same checkpoint on the same questions differs by whole
percent points between the code of a benchmark's authors, EleutherAI's harness and a paper's own
script, because a space, a line end or one word moves the letters' log-probabilities. So every way
of asking is a row of a table, and the first prompt of a run is printed to the character.

    python eval.py exam --protocol qwen      # also: official, lm_eval, cot, steel
    python eval.py exam --protocol cot       # answers in words: "let us think step by step"
    python eval.py exam --data MMLU          # the layout of hendrycks' data.tar

Try: predict which ids the four letters get under `official` and under `lm_eval` (" A" against "A"),
then read the first lines that a run prints. Answers in words need a rule that finds the letter;
one that guesses where there is none gives points for nothing (a quarter of the questions).

Papers: C-Eval arXiv:2305.08322, CMMLU arXiv:2306.09212, MMLU arXiv:2009.03300, Steel-LLM
arXiv:2502.06635.
"""

import re

import data
import model as modeling
from eval import CATEGORIES, CEVAL, FOUR, Protocol, Sheet, prompt_plan

# ==== read: protocols =============================================================================

MMLU = "The following are multiple choice questions (with answers) about {subject}.\n\n"
MMLU_OFFICIAL = MMLU.replace("{", " {")  # its authors' code writes two spaces before the subject
COT = "让我们一步一步思考，\n"
COT_END = "{explanation}\n所以答案是{answer}。"
QWEN = Protocol("", "问题：{question}" + FOUR, "\n答案：", "{answer}")
STEEL = Protocol("", "以下是一道单选题:\n{question}\n" + FOUR, "\n请给出答案。\n", "",
                 scored="text", tokens=64)
MORE = {
    "official": {
        "mmlu": Protocol(MMLU_OFFICIAL, "{question}" + FOUR, "\nAnswer:", " {answer}")},
    "lm_eval": {
        "mmlu": Protocol(MMLU, "{stripped}" + FOUR, "\nAnswer:", " {answer}", "sum")},
    "qwen": {  # evaluate_ceval.py and its like in Qwen's repository
        "ceval": QWEN, "cmmlu": QWEN,
        "mmlu": Protocol(MMLU, "Question: {question}" + FOUR, "\nAnswer:", " {answer}")},
    "cot": {  # C-Eval's own, with the explanations of its dev split
        "ceval": Protocol(CEVAL, "{question}" + FOUR, "\n答案：", COT + COT_END,
                          scored="text", begin=COT + "1.", tokens=512)},
    "steel": {"ceval": STEEL, "cmmlu": STEEL},  # Steel-LLM's, always in the chat template
}


def add_protocols(protocols: dict) -> None:
    """Add the rows of MORE to eval.py's table."""
    for name, row in MORE.items():
        protocols.setdefault(name, {}).update(row)


# ==== read: answers in words ======================================================================

# How words give an answer; the first pattern that finds letters decides.
LETTER = r"\s*[*“\"]*[（(]?((?<![A-Za-z])[A-D](?:[、和与及或]?[A-D])*(?![A-Za-z]))"
PATTERNS = (
    r"所以答案是(.+?)。",
    r"答案(?:应该|应当)?(?:是|为|选)?(?:选项)?[：:]?" + LETTER,
    r"(?<![不别能])选(?:择|项(?=是|为|[：:]?\s*$))?(?:是|为)?[：:]?" + LETTER
    + r"(?!\s*(?:选?项)?是?(?:不|错))",
    LETTER + r"[）)]?\s*(?:选?项)?(?:是|为)?(?:正确|对的|符合题意)",
    r"[Aa]nswer(?: is)?:?" + LETTER,
    r"^" + LETTER + r"(?:$|[）)。.，,、：:\s*])",
)


def extract(text: str) -> str | None:
    """The letter that an answer in words gives; None, never a guess, if it gives none or several.

    The authors' codes go on to the first letter anywhere, the most similar option, or a random one.
    """
    for pattern in PATTERNS:
        found = re.search(pattern, text)
        words = re.findall("(?<![A-Za-z])[A-D]+(?![A-Za-z])", found[1]) if found else []
        if letters := set("".join(words)):
            return letters.pop() if len(letters) == 1 else None
    return None


def after_reasoning(text: str) -> str | None:
    """What an answer says after its reasoning; None if it ends while it is still reasoning."""
    _, closed, answer = text.rpartition("</think>")
    return None if "<think>" in text and not closed else answer


def answer_in_words(model, tokenizer: data.ChatTokenizer, prompts: list[list[int]], p: Protocol,
                    micro_tokens: int) -> list[dict]:
    """Greedy answers to prompts, and the letter that each of them gives after its reasoning."""
    found = [None] * len(prompts)
    # A chunk is what fits one forward pass when its answers are as long as they may be.
    for chunk in data.micro_batches([len(ids) + p.tokens for ids in prompts], micro_tokens)[0]:
        answers = modeling.generate(model, [prompts[k] for k in chunk], p.tokens,
                                    stop_ids=tokenizer.stop_ids)
        for k, ids in zip(chunk, answers, strict=True):
            text = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
            # R1's prompt opens the block of reasoning.
            opened = "<think>" if tokenizer.decode(prompts[k]).rstrip().endswith("<think>") else ""
            answer = after_reasoning(opened + text)
            found[k] = {"prediction": None, "text": text, "unfinished": answer is None}
            if answer is None:
                continue

            # A shot ends with a blank line; then a base model makes up the next question.
            if p.begin:
                answer = answer.split("\n\n")[0]
            found[k]["prediction"] = extract(answer)
    return found


# ==== read: checkpoints that reason ===============================================================


def thinks(model, tokenizer: data.ChatTokenizer, sheets: list[Sheet]) -> bool:
    """Does a checkpoint reason before it answers? Most of eight first questions decide.

    It does if its greedy answer opens a block of reasoning and does not close it at once, as
    checkpoints do that learned answers without reasoning.
    """
    if "</think>" not in tokenizer.source:
        return False

    # Asked in words, so that its prompt ends where reasoning would begin.
    prompts = []
    for sheet in sheets[:8]:
        words = sheet.protocol._replace(scored="text")
        plan, _ = prompt_plan(tokenizer, sheet.subject, sheet.subject.questions[0], 0, words, True)
        prompts.append(plan)
    encoded = [ids.tolist() for ids, _ in tokenizer.encode(prompts)]
    answers = modeling.generate(model, encoded, 24, stop_ids=tokenizer.stop_ids)

    # The block may be opened by the prompt already.
    count = 0
    for plan, ids in zip(prompts, answers, strict=True):
        text = plan.text.rstrip()[-len("<think>") :] + tokenizer.decode(ids).lstrip()
        _, opened, thought = text.partition("<think>")
        count += bool(opened) and not thought.lstrip().startswith("</think>")
    return 2 * count > len(answers)


# ---- skip on a first reading: subjects -----------------------------------------------------------

# C-Eval's, for folders without its subject_mapping.json: handle and name, a paragraph per category.
CEVAL_SUBJECTS = """
computer_network 计算机网络 operating_system 操作系统 computer_architecture 计算机组成
college_programming 大学编程 college_physics 大学物理 college_chemistry 大学化学
advanced_mathematics 高等数学 probability_and_statistics 概率统计 discrete_mathematics 离散数学
electrical_engineer 注册电气工程师 metrology_engineer 注册计量师 high_school_mathematics 高中数学
high_school_physics 高中物理 high_school_chemistry 高中化学 high_school_biology 高中生物
middle_school_mathematics 初中数学 middle_school_biology 初中生物 middle_school_physics 初中物理
middle_school_chemistry 初中化学 veterinary_medicine 兽医学

college_economics 大学经济学 business_administration 工商管理 marxism 马克思主义基本原理
mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论 education_science 教育学
teacher_qualification 教师资格 high_school_politics 高中政治 high_school_geography 高中地理
middle_school_politics 初中政治 middle_school_geography 初中地理

modern_chinese_history 近代史纲要 ideological_and_moral_cultivation 思想道德修养与法律基础
logic 逻辑学 law 法学 chinese_language_and_literature 中国语言文学 art_studies 艺术学
professional_tour_guide 导游资格 legal_professional 法律职业资格 high_school_chinese 高中语文
high_school_history 高中历史 middle_school_history 初中历史

civil_servant 公务员 sports_science 体育学 plant_protection 植物保护 basic_medicine 基础医学
clinical_medicine 临床医学 urban_and_rural_planner 注册城乡规划师 accountant 注册会计师
fire_engineer 注册消防工程师 environmental_impact_assessment_engineer 环境影响评价工程师
tax_accountant 税务师 physician 医师资格
"""
# CMMLU's.
CMMLU_SUBJECTS = """
anatomy 解剖学 astronomy 天文学 college_actuarial_science 大学精算学
college_engineering_hydrology 大学工程水文学 college_mathematics 大学数学
college_medical_statistics 大学医学统计 computer_science 计算机科学 conceptual_physics 概念物理学
electrical_engineering 电气工程 elementary_mathematics 初等数学 genetics 遗传学
high_school_biology 高中生物 high_school_chemistry 高中化学 high_school_mathematics 高中数学
high_school_physics 高中物理学 machine_learning 机器学习 virology 病毒学

ancient_chinese 古汉语 business_ethics 商业伦理 chinese_civil_service_exam 中国公务员考试
chinese_food_culture 中国饮食文化 chinese_foreign_policy 中国外交政策
chinese_teacher_qualification 中国教师资格 college_education 大学教育学 economics 经济学
education 教育学 elementary_chinese 小学语文 ethnology 民族学 high_school_geography 高中地理
high_school_politics 高中政治 journalism 新闻学 management 管理学 marketing 市场营销
modern_chinese 现代汉语 professional_accounting 专业会计 professional_psychology 专业心理学
public_relations 公共关系 security_study 安全研究 sociology 社会学

arts 艺术学 chinese_history 中国历史 chinese_literature 中国文学 college_law 大学法律
global_facts 全球事实 international_law 国际法学 jurisprudence 法理学 logical 逻辑学
marxist_theory 马克思主义理论 philosophy 哲学 professional_law 专业法学 world_history 世界历史
world_religions 世界宗教

agronomy 农学 chinese_driving_rule 中国驾驶规则 clinical_knowledge 临床知识
college_medicine 大学医学 computer_security 计算机安全 construction_project_management 建设工程管理
elementary_commonsense 小学常识 elementary_information_and_technology 小学信息技术
food_science 食品科学 human_sexuality 人类性行为 legal_and_moral_basis 法律与道德基础
nutrition 营养学 professional_medicine 专业医学 sports_science 体育学
traditional_chinese_medicine 中医中药
"""
# MMLU's; a header writes their names with spaces.
MMLU_SUBJECTS = """
abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
college_mathematics college_physics computer_security conceptual_physics electrical_engineering
elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
high_school_mathematics high_school_physics high_school_statistics machine_learning

econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
high_school_microeconomics high_school_psychology human_sexuality professional_psychology
public_relations security_studies sociology us_foreign_policy

formal_logic high_school_european_history high_school_us_history high_school_world_history
international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
prehistory professional_law world_religions

business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology
"""
SUBJECTS = {"ceval": CEVAL_SUBJECTS, "cmmlu": CMMLU_SUBJECTS, "mmlu": MMLU_SUBJECTS}


def named_subjects(benchmark: str) -> dict[str, tuple[str, str]]:
    """{handle: (name in the header, category)} of a benchmark."""
    table = {}
    for category, paragraph in zip(CATEGORIES, SUBJECTS[benchmark].split("\n\n"), strict=True):
        words = paragraph.split()
        handles, names = words[::2], words[1::2]
        # MMLU's names are its handles.
        if benchmark == "mmlu":
            handles, names = words, [word.replace("_", " ") for word in words]
        for handle, name in zip(handles, names, strict=True):
            table[handle] = name, category
    return table


if __name__ == "__main__":
    print(__doc__)
