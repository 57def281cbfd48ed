"""Look at a checkpoint: exams, log-probabilities of a file, sampled answers, a conversation.

    python eval.py exam --model DIR... --data DIR --output_dir out/ceval   # C-Eval, CMMLU, MMLU
    torchrun --nproc_per_node=8 eval.py exam --model DIR --data DIR --protocol lm_eval
    python eval.py logprobs --model DIR --data FILE --output FILE.jsonl    # loss and perplexity
    python eval.py generate --model DIR --data FILE --output FILE.jsonl --n 4 --temperature 0.8
    python eval.py chat --model DIR

Without --model a command takes the checkpoint the SFT demo leaves (out/sft), `exam` that of
train_dpo.py if it is there (out/dpo); without --data `exam` takes the demo's exam.
"""

import csv
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model as modeling
from model import InputError, check

# ------------------------------------------------------------------------------------------- config


@dataclass
class Common:
    """What every command that loads a model takes."""

    model: str = "out/sft"  # checkpoint folder in Hugging Face layout
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised


@dataclass
class Logprobs(Common):
    """Write ln p of every supervised token of some files; print their mean loss and perplexity."""

    data: list[str] = field(default_factory=list)  # files of any training format
    output: str = ""  # .jsonl: token_ids and logprobs of every example, in order; empty: none
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens of an example; longer ones are truncated, raw text is split


@dataclass
class Exam(Common):
    """Score checkpoints on the multiple-choice questions of C-Eval, CMMLU or MMLU."""

    model: list[str] = field(default_factory=list)  # checkpoints; empty: the demo's last
    data: str = ""  # folder of CSV files; empty: the demo's exam, --chat --shots 0
    benchmark: Literal["", "ceval", "cmmlu", "mmlu"] = ""  # layout of the files; empty: recognised
    split: Literal["", "val", "test"] = ""  # empty: val of C-Eval, test of the others
    subjects: list[str] = field(default_factory=list)  # some of them; empty: all
    shots: int = -1  # solved questions of dev before each one, 0 to 5; -1: 5, with steel 0
    protocol: Literal["official", "lm_eval", "qwen", "cot", "steel"] = "official"  # PROTOCOLS
    subject_names: Literal["zh", "handle"] = "zh"  # in C-Eval's header; its code writes the handle
    chat: bool = False  # ask in the checkpoint's chat template, shots as earlier turns
    output_dir: str = "out/exam"  # results.json, predictions.jsonl, accuracy.png


@dataclass
class Sampling(Common):
    """How answers are drawn."""

    max_new_tokens: int = 512  # stop after this many tokens
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample among the likeliest tokens that reach this probability together
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 0  # of the sampling
    system: str = ""  # system message put before every conversation

    def how(self) -> modeling.Sampling:
        """What `model.generate` takes of it."""
        names = modeling.Sampling.__dataclass_fields__
        return modeling.Sampling(**{name: getattr(self, name) for name in names})


@dataclass
class Generate(Sampling):
    """Answer every row of some files: prompts, or conversations whose last answer is left out."""

    data: list[str] = field(default_factory=list)  # files of prompts or conversations
    output: str = ""  # .jsonl: one object per sample, with messages, reference and finish
    n: int = 1  # samples per row


@dataclass
class Chat(Sampling):
    """Talk to a checkpoint: /reset forgets the conversation, /quit (or Ctrl-D) ends it."""


def check_values(c) -> None:
    """Raise InputError for values that make no sense."""
    for name in ("micro_tokens", "max_new_tokens", "n", "top_p", "repetition_penalty"):
        check(getattr(c, name, 1) > 0, f"--{name} must be above 0, not {getattr(c, name, 1)}")
    for name in ("temperature", "top_k"):
        check(getattr(c, name, 0) >= 0, f"--{name} must not be negative, is {getattr(c, name, 0)}")
    check(getattr(c, "max_length", 2) >= 2, "--max_length must be at least 2")
    check(getattr(c, "data", None) != [], "--data FILE... is missing")
    check(getattr(c, "top_p", 1) <= 1, "--top_p must be at most 1")
    check(getattr(c, "temperature", 0) < math.inf, "--temperature must be a number")
    output = Path(getattr(c, "output", ""))
    lost = output.parent.exists() and not output.parent.is_dir()
    check(not output.name or not (output.is_dir() or lost),
         f"--output {output} cannot be written: it is a folder, or lies in a file")
    if isinstance(c, Generate):
        check(c.output, "--output FILE.jsonl is missing")
        check(c.n == 1 or c.temperature > 0,
             "--n above 1 needs --temperature above 0: greedy samples are all alike")


def open_model(c: Common, tokenizer: data.ChatTokenizer) -> modeling.Llama:
    """The tokenizer's checkpoint in its evaluation precision, on the device at hand."""
    device = modeling.best_device(int(os.environ.get("LOCAL_RANK", 0)))
    model = modeling.load(tokenizer.folder, modeling.best_dtype(c.dtype, device), device)
    tokenizer.check_size(model.config.vocab_size)
    return model


# -------------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def example_logprobs(model, examples: list[data.Example], micro_tokens: int):
    """Yield (index, ln p of its supervised tokens, in nats) for every example, short ones first."""
    chunks = data.micro_batches([len(e.ids) for e in examples], micro_tokens)[0]
    hidden = not sys.stderr.isatty()
    for chunk in tqdm(chunks, desc="log-probabilities", unit=" batches", disable=hidden):
        batch = data.collate([examples[i] for i in chunk], model.device)
        logp = model(batch.ids, batch.lengths, batch.targets).cpu()  # [N]
        yield from zip(chunk, logp.split([examples[i].targets for i in chunk]), strict=True)


def logprobs_command(c: Logprobs) -> None:
    """`eval.py logprobs`."""
    check_values(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    examples, counts = data.load_examples(c.data, tokenizer, c.train_on, c.max_length, quiet=False,
                                          keep_all=True)
    model = open_model(c, tokenizer)
    results = [[None] * len(e.ids) for e in examples]
    total = weights = 0.0
    for i, logp in example_logprobs(model, examples, c.micro_tokens):
        values = iter(logp.tolist())
        for first, end, weight in examples[i].spans:
            results[i][first:end] = part = [next(values) for _ in range(first, end)]
            total, weights = total - weight * sum(part), weights + weight * len(part)
    if c.output:
        modeling.write_lines(Path(c.output), (
            json.dumps({"token_ids": e.ids.tolist(), "logprobs": r}) + "\n"
            for e, r in zip(examples, results, strict=True)))
    counts["supervised tokens"] = sum(e.targets for e in examples)
    print(f"{len(examples)} examples", *(f"{n} {what}" for what, n in counts.items()), sep=", ")
    loss = total / weights if weights else math.nan
    print(f"loss {loss:.6f} nats per supervised token, perplexity {math.exp(loss):.4f}")


# ----------------------------------------------------------------------------------------- generate


def to_prompt(row: data.Row, system: str) -> tuple[list[dict], str | None]:
    """The messages to answer, and the answer that the row itself holds, if any."""
    messages = [{"role": m["role"], "content": m["content"]} for m in row.messages]
    reference = None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    if system:
        rest = [m for m in messages if m["role"] != "system"]
        messages = [{"role": "system", "content": system}, *rest]
    if row.text is None and (not messages or messages[-1]["role"] != "user"):
        raise InputError(f"{row.where}: expected a conversation in which the user asks last")
    return messages, reference


def generate_command(c: Generate) -> None:
    """`eval.py generate`."""
    check_values(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    rows = [row for _, row in data.read_rows(c.data, parse=partial(data.parse_row, ask=True))]
    asked = [to_prompt(row, c.system) for row in rows]
    plans = [tokenizer.text_pieces(row.text)[:-1] if row.text is not None
             else tokenizer.pieces(messages, ask=True)
             for row, (messages, _) in zip(rows, asked, strict=True)]
    prompts = [ids.tolist() for ids, _ in tokenizer.encode(plans)]
    if not all(prompts):
        raise InputError(f"{rows[prompts.index([])].where}: expected some text to go on from")
    model = open_model(c, tokenizer)
    # sample k belongs to row k // n; what is drawn for it depends on k, not on its batch
    lengths = [len(p) + c.max_new_tokens for p in prompts for _ in range(c.n)]
    answers = [None] * len(lengths)
    chunks = data.micro_batches(lengths, c.micro_tokens)[0]
    for chunk in tqdm(chunks, desc="generate", unit=" batches", disable=not sys.stderr.isatty()):
        out = modeling.generate(model, [prompts[k // c.n] for k in chunk], c.max_new_tokens,
                                stop_ids=tokenizer.stop_ids, sampling=c.how(), samples=chunk)
        for k, ids in zip(chunk, out, strict=True):
            stopped = bool(ids) and ids[-1] in tokenizer.stop_ids
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            answers[k] = {"row": k // c.n, "sample": k % c.n,
                          "finish": "stop" if stopped else "length"}
            messages, reference = asked[k // c.n]
            if rows[k // c.n].text is not None:
                answers[k]["text"] = rows[k // c.n].text + text
            else:
                answers[k]["messages"] = [*messages, {"role": "assistant", "content": text}]
                answers[k]["reference"] = reference
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    modeling.write_lines(Path(c.output), lines)
    stopped = sum(answer["finish"] == "stop" for answer in answers)
    print(f"{len(answers)} samples of {len(rows)} rows in {c.output}; {stopped} ended themselves")


# --------------------------------------------------------------------------------------------- chat


def stream_answer(model, tokenizer: data.ChatTokenizer, messages: list[dict], c: Sampling, write):
    """Generate one answer, calling write(text) as it grows; half of a UTF-8 character waits."""
    ids, shown = [], ""
    steps = modeling.generate_steps(model, [tokenizer.prompt_ids(messages)], c.max_new_tokens,
                                    stop_ids=tokenizer.stop_ids, sampling=c.how())
    for (token,) in steps:
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # else the rest of the character is still to come
            write(text[len(shown) :])
            shown = text
    text = tokenizer.decode(ids)
    write(text[len(shown) :])
    return text


def chat_command(c: Chat) -> None:
    """`eval.py chat`."""
    check_values(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    model = open_model(c, tokenizer)
    start = [{"role": "system", "content": c.system}] if c.system else []
    messages = list(start)
    print(f"{c.model}, template {tokenizer.template.name}; /reset forgets, /quit ends")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = "/quit"
        if question == "/quit":
            print()
            return
        if question == "/reset":
            messages = list(start)
            print("forgotten")
        elif question.startswith("/"):
            print(f"unknown command {question}; /reset forgets, /quit ends")
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                answer = stream_answer(model, tokenizer, messages, c,
                                       lambda text: print(text, end="", flush=True))
                messages.append({"role": "assistant", "content": answer})
            except KeyboardInterrupt:  # ends this answer, not the conversation
                messages.pop()
            print()


# -------------------------------------------------------------------------------- exams: their text

LETTERS = "ABCD"
CATEGORIES = ("STEM", "Social Science", "Humanities", "Other")
HARD = ("advanced_mathematics discrete_mathematics probability_and_statistics college_chemistry "
        "college_physics high_school_mathematics high_school_chemistry high_school_physics").split()
# Subjects of a benchmark, a paragraph a category; CMMLU's with the name that its header takes.
SUBJECTS = {"cmmlu": """
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
""", "mmlu": """
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
"""}


class Protocol(NamedTuple):
    """How a benchmark is asked; {stripped} is the question without outer white space.

        prompt = header + shots + question + ending + begin
        shot   = question + ending + answer + two line ends
    """

    header: str
    question: str
    ending: str
    answer: str  # {answer} is a letter; filled in with A, B, C, D it gives what options score
    scored: Literal["next token", "sum", "text"] = "next token"  # argmax of ln p, or words
    begin: str = ""  # of the answer, given away except in a chat template
    tokens: int = 0  # of an answer in words


FOUR = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
CEVAL = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
CEVAL_LM_EVAL = "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n"
CMMLU = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
MMLU = "The following are multiple choice questions (with answers) about {subject}.\n\n"
COT = "让我们一步一步思考，\n"
COT_END = "{explanation}\n所以答案是{answer}。"
QWEN = Protocol("", "问题：{question}" + FOUR, "\n答案：", "{answer}")
STEEL = Protocol("", "以下是一道单选题:\n{question}\n" + FOUR, "\n请给出答案。\n", "",
                 scored="text", tokens=64)
PROTOCOLS = {
    "official": {  # code of the benchmarks' authors; MMLU's writes two spaces before the subject
        "ceval": Protocol(CEVAL, "{question}" + FOUR, "\n答案：", "{answer}"),
        "cmmlu": Protocol(CMMLU, "题目：{question}" + FOUR, "\n答案是：", "{answer}"),
        "mmlu": Protocol(MMLU.replace("{", " {"), "{question}" + FOUR, "\nAnswer:", " {answer}")},
    "lm_eval": {  # EleutherAI's harness; it would move a space at a prompt's end to the options
        "ceval": Protocol(CEVAL_LM_EVAL, "{stripped}" + FOUR, "\n答案：", " {answer}", "sum"),
        "cmmlu": Protocol(CMMLU, "{stripped}" + FOUR, "\n答案：", " {answer}", "sum"),
        "mmlu": Protocol(MMLU, "{stripped}" + FOUR, "\nAnswer:", " {answer}", "sum")},
    "qwen": {  # evaluate_ceval.py and its like in Qwen's repository
        "ceval": QWEN, "cmmlu": QWEN,
        "mmlu": Protocol(MMLU, "Question: {question}" + FOUR, "\nAnswer:", " {answer}")},
    "cot": {  # C-Eval's own, with the explanations of its dev split
        "ceval": Protocol(CEVAL, "{question}" + FOUR, "\n答案：", COT + COT_END,
                          scored="text", begin=COT + "1.", tokens=512)},
    "steel": {"ceval": STEEL, "cmmlu": STEEL},  # Steel-LLM's, always in the chat template
}

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


# ------------------------------------------------------------------------------- exams: their files


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of every question of an exam's file, in C-Eval's column names.

    MMLU's files have no line of names. Line ends within a cell stay: prompts have them.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = [cells for cells in csv.reader(file) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    names = ["question", *"ABCD", "answer"]
    if table and {"question", "Question"} & set(table[0]):
        usual = {"": "id", "Question": "question", "Answer": "answer"}  # CMMLU's
        names = [usual.get(name, name) for name in table.pop(0)]
    for number, cells in enumerate(table, 1):
        where = f"{path} row {number}"
        check(len(cells) == len(names), f"{where}: expected {len(names)} cells, found {len(cells)}")
        yield where, dict(zip(names, cells, strict=True))


class Subject(NamedTuple):
    """The part of an exam that shares a header and shots."""

    handle: str
    name: str  # in the header
    category: str
    shots: list[dict]
    questions: list[dict]


def subject_table(c: Exam) -> dict[str, tuple[str, str]]:
    """{handle: (name in the header, category)} of a benchmark; C-Eval brings its own table."""
    if c.benchmark == "ceval":
        path = Path(c.data) / "subject_mapping.json"
        check(path.exists(), f"{path} is missing; it lies in C-Eval's repository, beside its code")
        table = modeling.read_json(path)
        for handle, entry in table.items():
            if not (isinstance(entry, list) and len(entry) == 3 and entry[2] in CATEGORIES):
                raise InputError(f"{path}: expected names and one of {', '.join(CATEGORIES)} for "
                                f"{handle}, found {entry}")
        zh = c.subject_names == "zh"
        return {h: (entry[1] if zh else h, entry[2]) for h, entry in table.items()}
    table = {}
    for category, words in zip(CATEGORIES, SUBJECTS[c.benchmark].split("\n\n"), strict=True):
        handles, names = words.split(), [word.replace("_", " ") for word in words.split()]
        if c.benchmark == "cmmlu":
            handles, names = handles[::2], names[1::2]
        table |= {h: (name, category) for h, name in zip(handles, names, strict=True)}
    return table


def read_questions(path: Path, columns: tuple) -> list[dict]:
    """The rows of a CSV file; `columns` must be filled, an `answer` may be missing as a whole."""
    rows, seen = [], {}
    for n, (where, cells) in enumerate(read_csv(path), 1):
        row = {"id": str(n - 1), **cells}
        if missing := [name for name in columns if name not in cells]:
            raise InputError(f"{path}: column {', '.join(missing)} missing, found "
                            f"{', '.join(cells)}")
        if empty := [name for name in (*columns, "answer") if not row.get(name, "x").strip()]:
            raise InputError(f"{where}: column {', '.join(empty)} is empty")
        check(row.get("answer", "A") in tuple(LETTERS),
             f"{where}: expected an answer A to D, found {row.get('answer')!r}")
        check(seen.setdefault(row["id"], n) == n,
             f"{where}: id {row['id']} is that of row {seen[row['id']]} too")
        rows.append({**row, "stripped": row["question"].strip()})
    check(rows, f"{path} holds no question")
    return rows


def resolve_exam(c: Exam) -> Exam:
    """Fill in what was left open; InputError for what makes no sense."""
    check_values(c)
    if not c.data:
        c = replace(c, data="out/demo/exam", chat=True,
                    shots=max(c.shots, 0))
    folder, output, known = Path(c.data), Path(c.output_dir), PROTOCOLS[c.protocol]
    last = "out/dpo" if Path("out/dpo/config.json").exists() else "out/sft"
    steel, layout = c.protocol == "steel", "cmmlu"
    if any((folder / name).exists() for name in ("subject_mapping.json", "dev/accountant_dev.csv")):
        layout = "ceval"
    elif any(folder.glob("test/*_test.csv")):
        layout = "mmlu"
    most = 0 if steel else 5
    c = replace(c, model=c.model or [last], benchmark=c.benchmark or layout,
                shots=most if c.shots == -1 else c.shots, chat=c.chat or steel)
    c = replace(c, split=c.split or ("val" if c.benchmark == "ceval" else "test"))
    check(folder.is_dir(), f"{folder} is no folder of an exam (the demo makes its own)")
    check(c.benchmark in known, f"--protocol {c.protocol} is for {', '.join(known)} only")
    check(0 <= c.shots <= most, f"--shots {c.shots}: with --protocol {c.protocol} at most {most}")
    check(c.benchmark == "ceval" or c.subject_names == "zh",
         "--subject_names is for C-Eval, whose table has both names")
    check(len(set(map(short_name, c.model))) == len(c.model),
         "--model names one twice, or two that differ in leading dots and slashes only")
    check(not any(p.exists() and not p.is_dir() for p in (output, *output.parents)),
         f"--output_dir {output} cannot be written: it is a file, or lies in one")
    return c


def read_exam(c: Exam) -> list[Subject]:
    """The subjects of a resolved Exam, with its shots.

    C-Eval's table says which files must be there; of the others any subjects are an exam.
    """
    table = subject_table(c)

    def path(split: str, handle: str) -> Path:
        ending = "" if c.benchmark == "cmmlu" else f"_{split}"
        return Path(c.data) / split / f"{handle}{ending}.csv"

    there = [h for h in table if c.benchmark == "ceval" or path(c.split, h).exists()]
    check(there, f"{Path(c.data) / c.split} has no file of {c.benchmark}, such as "
         f"{path(c.split, next(iter(table), 'SUBJECT')).name}")
    if unknown := [h for h in c.subjects if h not in table]:
        raise InputError(f"{', '.join(unknown)}: no subject of {c.benchmark}; it has "
                        f"{', '.join(table)}")
    columns = ("question", *LETTERS) if c.benchmark == "mmlu" else ("id", "question", *LETTERS)
    solved = (*columns, "answer", *(["explanation"] if c.protocol == "cot" else []))
    subjects = []
    for h in dict.fromkeys(c.subjects or there):
        shots = read_questions(path("dev", h), solved)[: c.shots] if c.shots else []
        if len(shots) < c.shots:
            raise InputError(f"{path('dev', h)}: {len(shots)} rows are too few for {c.shots} shots")
        questions = read_questions(path(c.split, h), columns)
        subjects.append(Subject(h, *table[h], shots, questions))
    if len({"answer" in q for s in subjects for q in s.questions}) > 1:
        raise InputError(f"{Path(c.data) / c.split}: some files have a column answer, some do not")
    return subjects


# ----------------------------------------------------------------------------- exams: their prompts


class Sheet(NamedTuple):
    """A subject in a checkpoint's tokens; prompts and shots are None where nothing fits."""

    subject: Subject
    prompts: list  # ids of each question's prompt
    shots: list  # how many of the shots are in it
    options: list[tuple]  # ids of A, B, C, D after a prompt; none where the answer is words
    first: str  # the first prompt as text


def prompt_pieces(tokenizer: data.ChatTokenizer, subject: Subject, question: dict, shots: int,
                  p: Protocol, chat: bool) -> list[tuple]:
    """A question after the last `shots` shots, as pieces for `tokenizer.encode`.

    In a chat template each shot is a turn, as in C-Eval's code for chat models.
    """
    solved = subject.shots[len(subject.shots) - shots :]
    asked = [(p.question + p.ending).format(**row) for row in (*solved, question)]
    asked[0] = p.header.format(subject=subject.name) + asked[0]
    answers = [p.answer.format(**row) for row in solved]
    if not chat:
        text = "".join(f"{q}{a}\n\n" for q, a in zip(asked, answers, strict=False))
        return [*((i, None) for i in tokenizer.bos_ids), (text + asked[-1] + p.begin, None)]
    messages = [{"role": "user", "content": asked[0]}]
    for answer, q in zip(answers, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer.strip()},
                     {"role": "user", "content": q}]
    return tokenizer.pieces(messages, ask=True)


def option_ids(tokenizer: data.ChatTokenizer, prompt: list[tuple], p: Protocol,
               chat: bool) -> list[tuple]:
    """The ids of the four options after a prompt: encode(p + c)[len(encode(p)):].

    Alone a letter may get a BOS or a space, and options with one id would make every answer A.
    """
    form = tokenizer.template.answer.rstrip().replace("{}", "{answer}") if chat else p.answer
    texts = [form.format(answer=letter) for letter in LETTERS]
    encoded = tokenizer.encode([[*prompt, (text, 1.0)] for text in texts])
    options = [tuple(ids[spans[0][0] :].tolist()) if spans else () for ids, spans in encoded]
    options = [ids[:1] for ids in options] if p.scored == "next token" else options
    if len(set(options)) < 4 or not all(options):
        raise InputError(f"{tokenizer.folder}: after a prompt {texts} have the ids {options}: "
                        "not four different options"
                        + (" (--protocol lm_eval takes several tokens)" if not chat else ""))
    return options


def make_sheet(tokenizer: data.ChatTokenizer, subject: Subject, c: Exam, context: int) -> Sheet:
    """Encode every prompt whole; one longer than the context loses whole shots, oldest first."""
    p, count = PROTOCOLS[c.protocol][c.benchmark], len(subject.questions)
    prompts, shots, options, first = [None] * count, [None] * count, [], ""
    for left in range(c.shots, -1, -1):
        waiting = [i for i in range(count) if prompts[i] is None]
        if not waiting:
            break
        plans = [prompt_pieces(tokenizer, subject, subject.questions[i], left, p, c.chat)
                 for i in waiting]
        if not p.tokens and not options:
            options = option_ids(tokenizer, plans[0], p, c.chat)
        room = context - (p.tokens or max(map(len, options)) - 1)
        for i, plan, (ids, _) in zip(waiting, plans, tokenizer.encode(plans), strict=True):
            if i == 0:
                first = "".join(x if isinstance(x, str) else tokenizer.decode([x]) for x, _ in plan)
            if len(ids) <= room:
                prompts[i], shots[i] = ids.tolist(), left
    return Sheet(subject, prompts, shots, options, first)


def characters_lost(tokenizer: data.ChatTokenizer, subjects: list[Subject]) -> float:
    """Share of the questions' characters that the tokenizer drops or has no token for."""
    count = Counter("".join(row[column] for s in subjects for row in (*s.shots, *s.questions)
                            for column in ("question", *LETTERS)))
    lost, unknown = 0, tokenizer.special("unk_token")
    for character in filter(str.strip, count):
        ids = tokenizer.tokenizer.encode(character, add_special_tokens=False).ids
        text = tokenizer.decode(ids, special=False).strip()
        lost += count[character] * (text in ("", unknown) or "\ufffd" in text)
    return lost / count.total()


# ----------------------------------------------------------------------------- exams: their answers


@torch.no_grad()
def score_options(model, prompts: list[list[int]], options: list[tuple], micro_tokens: int):
    """ln p(option | prompt) of every option after every prompt, in nats: [prompts, options].

    ln p(o_1 .. o_m | prompt) = sum_j ln p(o_j | prompt, o_1 .. o_(j-1)). What all prompts begin
    with (an exam's header and shots) is encoded once; every prompt runs on top of that prefix, and
    only the positions that predict an option meet the LM head.
    """
    shared = min(data.common_prefix(prompts), min(len(p) for p in prompts) - 1)
    device, prefix = model.device, None
    if shared:
        ids = torch.tensor(prompts[0][:shared], device=device)
        _, prefix = model.hidden(ids, [shared], keep_kv=True)
    heads = sorted({tuple(o[:-1]) for o in options})  # () alone if every option is one token
    asked = [(i, head) for i in range(len(prompts)) for head in heads]
    rest = [[*prompts[i][shared:], *head] for i, head in asked]
    scores = torch.zeros(len(prompts), len(options))
    # each row gets a copy of the prefix, so its tokens count; a CPU is faster if copies are few
    limit = min(micro_tokens, 4096) if device.type == "cpu" else micro_tokens
    for chunk in data.micro_batches([shared + len(r) for r in rest], limit)[0]:
        lengths = [len(rest[s]) for s in chunk]
        ids = torch.tensor([t for s in chunk for t in rest[s]], device=device)  # [T]
        same = torch.zeros(len(chunk), dtype=torch.long, device=device)  # all continue prefix 0
        states, _ = model.hidden(ids, lengths, prefix and prefix.select(same))  # [T, D]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        wanted = [(asked[s][0], k, end - len(o) + j, o[j])
                  for s, end in zip(chunk, ends, strict=True) for k, o in enumerate(options)
                  if tuple(o[:-1]) == asked[s][1] for j in range(len(o))]
        row, column, place, target = torch.tensor(wanted, device=device).T  # [N] each
        place, which = place.unique(return_inverse=True)  # the four options share their positions
        logp = model.next_logits(states[place]).log_softmax(-1)[which, target]  # [N]
        scores.index_put_((row.cpu(), column.cpu()), logp.cpu(), accumulate=True)
    return scores


def answer_sheet(model, tokenizer: data.ChatTokenizer, sheet: Sheet, p: Protocol,
                 micro_tokens: int) -> list[dict]:
    """The lines of predictions.jsonl of a subject; questions with the same shots go together."""
    out = [{"subject": sheet.subject.handle, "id": q["id"], "answer": q.get("answer"),
            "prediction": None, "logprobs": None, "shots": shots}
           for q, shots in zip(sheet.subject.questions, sheet.shots, strict=True)]
    for shots in set(sheet.shots) - {None}:
        rows = [i for i, kept in enumerate(sheet.shots) if kept == shots]
        prompts = [sheet.prompts[i] for i in rows]
        lengths = [len(ids) + p.tokens for ids in prompts]
        for chunk in data.micro_batches(lengths, micro_tokens)[0] if p.tokens else []:
            answers = modeling.generate(model, [prompts[k] for k in chunk], p.tokens,
                                        stop_ids=tokenizer.stop_ids)
            for k, ids in zip(chunk, answers, strict=True):
                text = tokenizer.decode(ids, special=False)
                # a shot ends with a blank line; after it a base model makes up the next question
                answer = text.split("\n\n")[0] if p.begin else text
                out[rows[k]] |= {"prediction": extract(answer), "text": text}
        if not p.tokens:
            scores = score_options(model, prompts, sheet.options, micro_tokens).tolist()
            for i, logp in zip(rows, scores, strict=True):
                if all(map(math.isfinite, logp)):  # else the checkpoint itself is broken
                    out[i]["prediction"] = LETTERS[logp.index(max(logp))]
                    out[i]["logprobs"] = dict(zip(LETTERS, logp, strict=True))
    return out


def training_exam(tokenizer: data.ChatTokenizer, folder: str | Path, context: int,
                  split: str = "", quiet: bool = True) -> tuple[Protocol, list[Sheet]]:
    """How an exam is asked during training: in the chat template, without shots."""
    c = resolve_exam(Exam(data=str(folder), split=split, shots=0, chat=True))
    sheets = [make_sheet(tokenizer, subject, c, context) for subject in read_exam(c)]
    if "answer" not in sheets[0].subject.questions[0]:
        raise InputError(f"{folder}: split {c.split} has no column answer")
    lost = characters_lost(tokenizer, [sheet.subject for sheet in sheets])
    long = sum(ids is None for sheet in sheets for ids in sheet.prompts)
    if not quiet and (lost or long):
        print(f"exam: {lost:.1%} of its characters are lost by the tokenizer, {long} questions do "
              "not fit")
    return PROTOCOLS[c.protocol][c.benchmark], sheets


def exam_accuracy(model, tokenizer: data.ChatTokenizer, folder: str | Path, split: str = "",
                  micro_tokens: int = 8192, rank: int = 0, world: int = 1) -> tuple[int, int]:
    """(right, questions) of a training_exam; of several ranks each asks its share of subjects."""
    context = model.config.max_position_embeddings
    p, sheets = training_exam(tokenizer, folder, context, split)
    answers = [a for sheet in sheets[rank::world]
               for a in answer_sheet(model, tokenizer, sheet, p, micro_tokens)]
    return sum(a["prediction"] == a["answer"] for a in answers), len(answers)


# ------------------------------------------------------------------------------ exams: their scores


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): the p with |right/n - p| <= z sqrt(p (1-p) / n)."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)  # rounding aside they never leave [0, 1]


def mcnemar(lost: int, won: int) -> float:
    """p-value of two scores on the same questions being alike (McNemar 1947), two-sided.

    Of the n questions that one of the two alone has right, each side's share is binomial with 1/2:
    exact for n < 25, else chi-square with one degree of freedom and continuity correction.
    """
    n = lost + won
    if n < 25:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n)
    return math.erfc(math.sqrt(max(abs(lost - won) - 1, 0) ** 2 / n / 2))


def summarize(benchmark: str, subjects: list[Subject], answers: list[dict]) -> dict:
    """What results.json says of a checkpoint's answers; null where the split has no labels.

    micro is the share of questions answered rightly, macro the mean of the subjects' shares.
    """
    labelled, right = "answer" in subjects[0].questions[0], {s.handle: [] for s in subjects}
    for a in answers:
        right[a["subject"]].append(a["prediction"] == a["answer"])

    def mean(values) -> float | None:
        return sum(values) / len(values) if labelled else None

    def averages(handles: list[str]) -> dict:
        return {"subjects": len(handles), "questions": sum(len(right[h]) for h in handles),
                "correct": sum(sum(right[h]) for h in handles) if labelled else None,
                "macro": mean([mean(right[h]) for h in handles]),
                "micro": mean([x for h in handles for x in right[h]])}

    groups = {name: [s.handle for s in subjects if s.category == name] for name in CATEGORIES}
    groups["C-Eval Hard"] = [h for h in right if h in HARD and benchmark == "ceval"]
    every, n = averages(list(right)), len(answers)
    letters = Counter(a["prediction"] for a in answers)
    best, times = Counter(a["answer"] for a in answers).most_common(1)[0]
    return {
        **every, "interval": wilson(every["correct"], n) if labelled else None,
        "floor": {"letter": best, "micro": times / n} if labelled else None,
        "letters": {x: letters[x] / n for x in LETTERS}, "invalid": letters[None] / n,
        "shortened": sum(a["shots"] not in (None, len(subjects[0].shots)) for a in answers),
        "too_long": sum(a["shots"] is None for a in answers),
        "categories": {name: averages(handles) for name, handles in groups.items() if handles},
        "subjects": {s.handle: {"category": s.category, "questions": len(right[s.handle]),
                                "accuracy": mean(right[s.handle])} for s in subjects}}


# ------------------------------------------------------------------------------ exams: their report


def short_name(folder: str) -> str:
    """A checkpoint's name in tables and as a folder of results."""
    return str(Path(folder)).strip("./").replace("/", "-") or "model"


def print_table(results: list[dict], comparisons: list[dict]) -> None:
    """A line a subject, a column a checkpoint; shares in percent."""
    first, names = results[0], [short_name(r["model"]) for r in results]
    table = [("accuracy in %", "questions", *names)]

    def percent(*shares, digits: int = 2) -> str:
        return " / ".join("-" if x is None else f"{100 * x:.{digits}f}" for x in shares)

    for handle, row in first["subjects"].items():
        table.append((handle, row["questions"],
                      *(percent(r["subjects"][handle]["accuracy"]) for r in results)))
    for name, row in {**first["categories"], "all": first}.items():
        rows = [r["categories"].get(name, r) for r in results]
        table.append((f"{name}: macro / micro", row["questions"],
                      *(percent(row["macro"], row["micro"]) for row in rows)))
    lines = {"answered A / B / C / D": lambda r: percent(*r["letters"].values(), digits=0),
             "invalid": lambda r: percent(r["invalid"]), "seconds": lambda r: f"{r['seconds']:.1f}"}
    if first["floor"]:
        lines = {"95% interval of micro, low / high": lambda r: percent(*r["interval"]),
                 f"floor of micro: always {first['floor']['letter']}":
                     lambda r: percent(r["floor"]["micro"]), **lines}
    table += [(label, "", *map(cell, results)) for label, cell in lines.items()]
    data.print_table(table)
    for name, r in zip(names, results, strict=True):
        if r["shortened"] or r["too_long"]:
            print(f"{name}: {r['shortened']} prompts longer than the context lost shots; "
                  f"{r['too_long']} questions do not fit even alone and count as wrong")
        if r["characters_lost"]:
            print(f"{name}: the tokenizer loses {r['characters_lost']:.1%} of the characters of "
                  "the questions; the score means nothing")
    for row in comparisons:
        print(f"{row['first']} -> {row['second']}: {row['lost']} questions lost, {row['won']} won; "
              f"McNemar p = {row['p']:.2g}, "
              + ("a difference" if row["p"] < 0.05 else "which may be noise"))


def draw_exam(path: Path, results: list[dict]) -> None:
    """Bars by subject; of one run's checkpoints, whose names end in their steps, a curve."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [short_name(r["model"]) for r in results]
    handles, floor = list(results[0]["subjects"]), 100 * results[0]["floor"]["micro"]
    ends = [re.fullmatch(r"(.*(?:step|checkpoint)\D?)(\d+)", name) for name in names]
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    if len(names) > 1 and all(ends) and len({end[1] for end in ends}) == 1:
        points = sorted((int(end[2]), 100 * r["micro"], *(100 * x for x in r["interval"]))
                        for end, r in zip(ends, results, strict=True))
        steps, micro, low, high = zip(*points, strict=True)
        axes.plot(steps, micro, marker=".")
        axes.fill_between(steps, low, high, alpha=0.2)
        axes.set(xlabel="step", ylabel="accuracy in %, with its 95% interval")
        axes.axhline(floor, color="gray", linestyle="--")
    else:
        figure.set_figheight(2 + 0.2 * len(handles))
        for k, (name, r) in enumerate(zip(names, results, strict=True)):
            axes.barh([i + 0.8 * k / len(names) for i in range(len(handles))],
                      [100 * r["subjects"][h]["accuracy"] for h in handles],
                      0.8 / len(names), align="edge", label=name)
        axes.set_yticks([i + 0.4 for i in range(len(handles))], handles, fontsize=7)
        axes.set_xlabel("accuracy in %")
        axes.axvline(floor, color="gray", linestyle="--", label="floor")
        figure.legend(loc="outside lower center", ncols=3)
        axes.invert_yaxis()
    modeling.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def start_exam(c: Exam, subjects: list[Subject], sheets: list[list[Sheet]]) -> None:
    """Say exactly what is asked."""
    count = sum(len(s.questions) for s in subjects)
    print(f"{c.benchmark} {c.split}: {count} questions in {len(subjects)} of its "
          f"{len(subject_table(c))} subjects; protocol {c.protocol}, {c.shots} shots"
          + (", in the chat template" if c.chat else ""))
    shown = {}  # first prompt and options: the checkpoints that get them
    for name, (first, *_) in zip(c.model, sheets, strict=True):
        options = f", options {[list(ids) for ids in first.options]}" if first.options else ""
        shown.setdefault((first.first, options), []).append(name)
    for (prompt, options), names in shown.items():
        print(f"first prompt of {', '.join(names)}{options}:")
        print(prompt.replace("\r", "\\r").replace("\n", "\\n\n"), flush=True)


def finish_exam(c: Exam, results: list[dict], answers: list[list[dict]]) -> None:
    """Print and write what was found; several checkpoints get a folder each."""
    labelled, output, comparisons = results[0]["floor"] is not None, Path(c.output_dir), []
    for r, lines in zip(results, answers, strict=True):
        folder = output / short_name(r["model"]) if len(results) > 1 else output
        modeling.write_json(folder / "results.json", r)
        modeling.write_lines(folder / "predictions.jsonl",
                             (json.dumps(a, ensure_ascii=False) + "\n" for a in lines))
        if not labelled:  # the form that C-Eval's site takes
            form = {h: {a["id"]: a["prediction"] or "" for a in lines if a["subject"] == h}
                    for h in r["subjects"]}
            modeling.write_json(folder / "submission.json", form)
    for i in range(1, len(results) if labelled else 0):
        right = [[a["prediction"] == a["answer"] for a in answers[k]] for k in (i - 1, i)]
        pairs = Counter(zip(*right, strict=True))  # (right before, right after)
        lost, won = pairs[True, False], pairs[False, True]
        comparisons.append({"first": short_name(c.model[i - 1]), "second": short_name(c.model[i]),
                            "lost": lost, "won": won, "p": mcnemar(lost, won)})
    print_table(results, comparisons)
    for stale in ("accuracy.png", "comparison.json", *(["submission.json"] if labelled else [])):
        (output / stale).unlink(missing_ok=True)  # of an earlier exam
    if comparisons:
        modeling.write_json(output / "comparison.json", {"mcnemar": comparisons})
    if labelled:
        draw_exam(output / "accuracy.png", results)
    else:
        print("the split has no labels: no accuracy, but a submission.json")
    print(f"results in {output}")


def score_checkpoint(c: Exam, tokenizer: data.ChatTokenizer, sheets: list[Sheet], rank: int,
                     world: int) -> tuple[list[dict], dict]:
    """(answers in order, what results.json says); every rank answers some of the subjects."""
    model, began = open_model(c, tokenizer), time.perf_counter()
    p, subjects = PROTOCOLS[c.protocol][c.benchmark], [sheet.subject for sheet in sheets]
    mine = tqdm(sheets[rank::world], desc=str(tokenizer.folder), unit=" subjects",
                disable=rank > 0 or not sys.stderr.isatty())
    parts = [[answer_sheet(model, tokenizer, sheet, p, c.micro_tokens) for sheet in mine]]
    if world > 1:  # only the answers travel
        found, parts = parts[0], [None] * world
        dist.all_gather_object(parts, found)
    answers = [a for i in range(len(sheets)) for a in parts[i % world][i // world]]
    asked = {name: getattr(c, name) for name in (
        "data", "benchmark", "split", "protocol", "shots", "chat", "subject_names")}
    return answers, {**asked, "dtype": str(model.head.dtype).removeprefix("torch."),
                     "seconds": time.perf_counter() - began,
                     "characters_lost": characters_lost(tokenizer, subjects),
                     **summarize(c.benchmark, subjects, answers)}


def exam_command(c: Exam) -> None:
    """`eval.py exam`."""
    c = resolve_exam(c)
    subjects, sheets = read_exam(c), []
    tokenizers = [data.ChatTokenizer(folder, c.template) for folder in c.model]
    for tokenizer in tokenizers:
        config = modeling.load_config(tokenizer.folder)
        tokenizer.check_size(config.vocab_size)
        sheets.append([make_sheet(tokenizer, subject, c, config.max_position_embeddings)
                       for subject in subjects])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        start_exam(c, subjects, sheets)
    if world > 1:
        dist.init_process_group("gloo")
    scored = [score_checkpoint(c, tokenizer, mine, rank, world)
              for tokenizer, mine in zip(tokenizers, sheets, strict=True)]
    if rank == 0:
        finish_exam(c, [{"model": name, **result} for name, (_, result)
                        in zip(c.model, scored, strict=True)], [answers for answers, _ in scored])
    if world > 1:
        dist.barrier()  # gloo aborts where one rank is gone before the rest
        dist.destroy_process_group()


COMMANDS = {"exam": (Exam, exam_command, ""), "logprobs": (Logprobs, logprobs_command, ""),
            "generate": (Generate, generate_command, ""), "chat": (Chat, chat_command, "")}

if __name__ == "__main__":
    with data.one_line_errors():
        data.run_command(COMMANDS, __doc__)
