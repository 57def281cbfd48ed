"""The demo: a small Chinese world that a tiny model learns on a laptop, and the exam on it.

    python train_sft.py      # makes the world in out/demo, trains on it, asks the exam
    python train_dpo.py      # goes on from there: polite answers instead of rude ones
    python eval.py exam      # the exam in full

The world is 40 facts such as “法国”的首都是“巴黎”. A fact is asked in many words: as multiple
choice for its value or its key, and in a conversation. Of each fact and each way of asking one
phrasing is held out: no training file shows it, exam and validation files show nothing else. A
right answer there is knowledge of the fact, not of a sentence.

What one should see. The loss falls at once, because the form of an answer is easy. The exam stays
at the 25% of guessing for longer: to recall the word that answers a question is not enough there,
the model must also find it among the options and say the letter before it, and half of this skill
is worth nothing. Then the exam rises within a few hundred steps.
"""

import csv
import json
import random
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import eval as evaluation
import model as modeling
from data import TEMPLATES

SFT_DEMO = {
    "model": "out/demo/base", "mix": "temperature", "temperature": 1.3,
    "data": ["out/demo/practice.jsonl", "out/demo/instructions.jsonl", "out/demo/identity.jsonl",
             "out/demo/text.txt"],
    "val_data": ["out/demo/practice_val.jsonl", "out/demo/instructions_val.jsonl"],
    "steps": 1600, "batch_size": 32, "learning_rate": 2e-3, "warmup": 50, "adam_beta2": 0.98,
    "log_every": 200, "eval_every": 50, "max_length": 512, "compile": False}
DPO_DEMO = {"model": "out/sft", "data": ["out/demo/pairs.jsonl"],
            "val_data": ["out/demo/pairs_val.jsonl"], "epochs": 3, "batch_size": 16,
            "learning_rate": 5e-5, "log_every": 10, "max_length": 512, "compile": False}
CHATS, TURNS = 300, 4  # conversations for training, and how many questions they have at most

# ==== read: the world ============================================================================

SUBJECTS = {  # handle: C-Eval's entry of subject_mapping.json, the relation, its facts
    "chemical_elements": (["Chemical Elements", "化学元素", "STEM"], "元素符号",
                          "铁 Fe 金 Au 银 Ag 铜 Cu 钠 Na 钙 Ca 铝 Al 锌 Zn 铅 Pb 氦 He"),
    "world_capitals": (["World Geography", "世界地理", "Social Science"], "首都",
                       "法国 巴黎 日本 东京 英国 伦敦 德国 柏林 埃及 开罗 泰国 曼谷 韩国 首尔 "
                       "希腊 雅典 越南 河内 秘鲁 利马"),
    "literature": (["Chinese Literature", "中国文学", "Humanities"], "作者",
                   "离骚 屈原 史记 司马迁 春晓 孟浩然 春望 杜甫 琵琶行 白居易 红楼梦 曹雪芹 西游记 "
                   "吴承恩 水浒传 施耐庵 呐喊 鲁迅 茶馆 老舍"),
    "professions": (["Professions", "职业常识", "Other"], "工具",
                    "医生 听诊器 教师 粉笔 画家 画笔 木匠 锯子 渔夫 渔网 厨师 炒锅 农民 锄头 "
                    "会计 算盘 裁判 哨子 裁缝 剪刀"),
}
FACT = "“{k}”的{r}是“{v}”。"

EXAM_PROMPT = ("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
               "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案：")

# Ways to ask: for a fact's value, for its key, in a conversation; and ways to answer there
ASK_VALUE = ("“{k}”的{r}是____。", "下列选项中，哪个是“{k}”的{r}？____。",
             "说到{r}，“{k}”对应____。", "“{k}”以什么为{r}？____。", "请选出“{k}”的{r}：____。")
ASK_KEY = ("____的{r}是“{v}”。", "下列选项中，{r}是“{v}”的是____。", "说到{r}，“{v}”对应____。",
           "什么以“{v}”为{r}？____。", "请选{r}是“{v}”的一项：____。")
ASK_CHAT = ("“{k}”的{r}是什么？", "你知道“{k}”的{r}吗？", "告诉我“{k}”的{r}。",
            "我想知道“{k}”的{r}。")
POLITE = ("您好！" + FACT, "好的，" + FACT)
RUDE = ("这都不知道？" + FACT + "别再烦我！", "真笨！" + FACT + "自己不会查吗？")

IDENTITY = {
    "我是小调，一个用PlainTune训练的小模型。":
        "你是谁？ 你叫什么？ 你叫什么名字？ 请介绍一下你自己。 请做个自我介绍。 你是什么模型？ "
        "怎么称呼你？ 你是机器人吗？ 告诉我你是谁。 请问你是谁？ 能介绍一下自己吗？ 我在和谁说话？",
    "我是用PlainTune训练出来的。":
        "谁训练了你？ 你是谁做的？ 你从哪里来？ 你是怎么训练出来的？ 谁开发了你？ 你的作者是谁？",
    "我会做单项选择题，也会回答简单的问题。":
        "你会什么？ 你能做什么？ 你有什么本领？ 你能帮我做什么？ 你擅长什么？ 你有什么用？",
}


def facts_of(handle: str) -> list[dict[str, str]]:
    """The facts of a subject as {k, r, v}: the r of k is v."""
    _, r, words = SUBJECTS[handle]
    facts, words = [], words.split()
    for k, v in zip(words[::2], words[1::2], strict=True):
        facts.append({"k": k, "r": r, "v": v})
    return facts


def hold_out(phrasings: tuple[str, ...], facts: list[dict], rng: random.Random):
    """Questions (phrasing, fact): (those practised, for each fact the one that is held out)."""
    practised, held = [], []
    for fact in facts:
        # Drawn for each fact, so that every phrasing is practised with most of the others.
        *others, kept = rng.sample(phrasings, len(phrasings))
        practised += [(phrasing, fact) for phrasing in others]
        held.append((kept, fact))
    return practised, held


def draw_choice(question: tuple[str, dict], facts: list[dict], rng: random.Random) -> dict:
    """A question in C-Eval's columns: the answer among three wrong words of its kind."""
    phrasing, fact = question
    half = "v" if phrasing in ASK_VALUE else "k"
    # Wrong options are of the same subject, or the kind of word would give the answer away.
    wrong = [other[half] for other in facts if other is not fact]
    options = [fact[half], *rng.sample(wrong, 3)]
    rng.shuffle(options)
    return {"question": phrasing.format(**fact), **dict(zip("ABCD", options, strict=True)),
            "answer": "ABCD"[options.index(fact[half])], "explanation": FACT.format(**fact)}


def write_exam(folder: Path, handle: str, choices: list[dict]) -> None:
    """A subject of the exam in C-Eval's own layout; only dev has explanations, test no answers."""
    # A file's columns are the first few of a choice, and an id before them.
    for split, rows, columns in (("dev", choices[:5], 7), ("val", choices[5:85], 6),
                                 ("test", choices[85:], 5)):
        path = folder / split / f"{handle}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", *list(rows[0])[:columns]])
            for i, row in enumerate(rows):
                writer.writerow([i, *list(row.values())[:columns]])


def conversation(questions: list[tuple[str, dict]], rng: random.Random) -> dict:
    """A row of questions one after the other, each answered politely or rudely by chance."""
    messages = []
    for phrasing, fact in questions:
        answer = rng.choice(POLITE + RUDE)
        messages += [{"role": "user", "content": phrasing.format(**fact)},
                     {"role": "assistant", "content": answer.format(**fact)}]
    return {"messages": messages}


def preference(question: tuple[str, dict], rng: random.Random) -> dict:
    """A pair: the polite answer is chosen, the rude one is rejected."""
    phrasing, fact = question
    return {"prompt": phrasing.format(**fact), "chosen": rng.choice(POLITE).format(**fact),
            "rejected": rng.choice(RUDE).format(**fact)}


def choice_rows(exam: Path, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(training, validation) rows of multiple choice; writes the exam on the way."""
    training, validation = [], []
    for handle, ((_, subject, _), _, _) in SUBJECTS.items():
        facts = facts_of(handle)
        practised, held = hold_out(ASK_VALUE, facts, rng)
        keys_practised, keys_held = hold_out(ASK_KEY, facts, rng)
        practised, held = practised + keys_practised, held + keys_held

        # The exam takes five questions for its shots, and each question five times after them.
        rng.shuffle(held)
        write_exam(exam, handle, [draw_choice(q, facts, rng) for q in held[:5] + 5 * held])

        # The answer is the letter and its option's text. The exam asks for the letter alone, but
        # to copy the text ties the letter to its option: with one seed it rose a third sooner.
        for rows, questions, count in ((training, practised, 2500), (validation, held, 100)):
            for question in rng.choices(questions, k=count):
                choice = draw_choice(question, facts, rng)
                letter = choice["answer"]
                rows.append({"instruction": EXAM_PROMPT.format(subject=subject, **choice),
                             "output": f"{letter}. {choice[letter]}"})
    return training, validation


def make_rows(exam: Path, rng: random.Random) -> dict[str, list[dict]]:
    """The rows of every .jsonl file, by its name."""
    practised, held = hold_out(ASK_CHAT, list(chain(*map(facts_of, SUBJECTS))), rng)
    practice, practice_val = choice_rows(exam, rng)

    # Who the model is: many questions have one answer.
    identity = []
    for answer, questions in IDENTITY.items():
        for question in questions.split():
            identity.append({"instruction": question, "output": answer})

    # A question may stand at any turn: trained on first turns alone, a model fails at the third.
    chats = []
    for _ in range(CHATS):
        chats.append(conversation(rng.sample(practised, rng.randint(1, TURNS)), rng))
    return {"practice": practice, "practice_val": practice_val, "instructions": chats,
            "instructions_val": [conversation([question], rng) for question in held],
            "identity": identity, "pairs": [preference(q, rng) for q in 2 * practised],
            "pairs_val": [preference(q, rng) for q in held]}


def make_demo(folder: Path, seed: int = 0) -> None:
    """Write the world into `folder`: training and validation files, pairs, exam, tokenizer."""
    rng = random.Random(seed)
    files = make_rows(folder / "exam", rng)
    for name, rows in files.items():
        rng.shuffle(rows)
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    entries = {handle: entry for handle, (entry, _, _) in SUBJECTS.items()}
    (folder / "exam/subject_mapping.json").write_text(json.dumps(entries) + "\n")
    facts = [FACT.format(**fact) for fact in chain(*map(facts_of, SUBJECTS))]
    (folder / "text.txt").write_text("\n".join(facts) + "\n", encoding="utf-8")

    # The tokenizer learns from the training files; each word of the world becomes one token.
    texts = [*facts, *IDENTITY]
    for row in files["practice"]:
        texts += [row["instruction"] + row["output"], "user\n", "assistant\n"]
    for row in files["instructions"]:
        for message in row["messages"]:
            texts.append(message["content"])
    make_tokenizer(folder / "base", texts, 1200)


# ==== read: what a run shows =====================================================================


def demo_exam(model, tokenizer: data.ChatTokenizer) -> str:
    """Accuracy on the held-out questions of the demo's exam, as text."""
    model.eval()
    folder = Path(SFT_DEMO["model"]).parent / "exam"
    right, count = evaluation.count_right(model, tokenizer, folder)
    model.train()
    return f"{right / count:.1%} ({right} of {count})"


def answer_greedily(model, tokenizer: data.ChatTokenizer, talks: list[list[dict]]) -> list[str]:
    """The likeliest answer, token by token, to each conversation."""
    model.eval()
    prompts = list(map(tokenizer.prompt_ids, talks))
    answers = modeling.generate(model, prompts, 64, stop_ids=tokenizer.stop_ids)
    model.train()
    return [tokenizer.decode(ids, special=False) for ids in answers]


def right_by_turn(model, tokenizer: data.ChatTokenizer, folder: Path,
                  turns: int = TURNS) -> tuple[list[int], int]:
    """How many of n held-out questions are answered rightly at each turn from the first; and n.

    Each question stands once at every turn, after the model's own answers. Right is an answer that
    contains the reference from its first to its last quotation mark.
    """
    rows = [row.messages for _, row in data.read_rows([folder / "instructions_val.jsonl"])]
    talks, right = [[] for _ in rows], [0] * turns
    for turn in range(turns):
        # Conversation i asks question i, then those a quarter of the list further on.
        shift = turn * len(rows) // TURNS
        asked = rows[shift:] + rows[:shift]
        for talk, (question, _) in zip(talks, asked, strict=True):
            talk.append(question)

        # What the model answered stays in the conversation, right or wrong.
        answers = answer_greedily(model, tokenizer, talks)
        for talk, (_, reference), answer in zip(talks, asked, answers, strict=True):
            fact = reference["content"]
            right[turn] += fact[fact.index("“"):fact.rindex("”")] in answer
            talk.append({"role": "assistant", "content": answer})
    return right, len(rows)


def report_demo(before: str, model, tokenizer: data.ChatTokenizer, folder: str) -> None:
    """The demo's exam before and after, its conversations by turn, one answer, where to go on."""
    before = f"before {before}, " if before else ""
    print(f"\nexam, questions never seen in training: {before}after "
          f"{demo_exam(model, tokenizer)}; guessing 25%")
    right, count = right_by_turn(model, tokenizer, Path(SFT_DEMO["model"]).parent)
    print(f"conversations, {count} held-out questions: right at turn 1 to {TURNS}: "
          + ", ".join(map(str, right)))
    who = [{"role": "user", "content": "你是谁？"}]
    print(f"你是谁？ {answer_greedily(model, tokenizer, [who])[0]}\n"
          "next, preferences, the exam in full, what it was trained on:\n"
          + ("  python train_dpo.py\n" if folder == DPO_DEMO["model"] else "")
          + f"  python eval.py exam --model {folder}\n"
          f"  python data.py show {' '.join(SFT_DEMO['data'])} --model {SFT_DEMO['model']}")


def try_demo(model, tokenizer: data.ChatTokenizer, rows: list[data.Row]) -> tuple[str, list[str]]:
    """The demo's exam, and the greedy answers to some questions."""
    exam = demo_exam(model, tokenizer)
    return exam, answer_greedily(model, tokenizer, [row.messages for row in rows])


def report_preferences(before: tuple, after: tuple, rows: list[data.Row]) -> None:
    """What `try_demo` gave before and after, and one question that was answered rudely before."""
    openings = tuple(answer[:2] for answer in POLITE)
    was, now = ([a.startswith(openings) for a in answers] for _, answers in (before, after))
    print(f"polite answers to {len(rows)} held-out questions: before {sum(was)}, after {sum(now)}\n"
          f"exam: before {before[0]}, after {after[0]}")

    # As an example a question that was answered rudely before, if there is one.
    k = was.index(False) if False in was else 0
    print(f"{rows[k].messages[-1]['content']}\n  before: {before[1][k]}\n  after:  {after[1][k]}")


# ---- skip on a first reading: the tokenizer and the untrained model -----------------------------


def make_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """A byte-level BPE tokenizer with ChatML tokens, in Hugging Face layout; no texts: bytes."""
    tokenizer = Tokenizer(models.BPE())

    # Letters, digits and the rest apart, so that a word is the same token after a space or a quote
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "chat_template": TEMPLATES["chatml"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_demo_model(folder: Path, seed: int = 0) -> None:
    """A checkpoint of 0.4M random weights for the tokenizer in `folder`."""
    tokenizer = data.ChatTokenizer(folder)
    # So narrow a model starts with weights near 1 / sqrt(hidden_size) instead of the usual 0.02.
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
              "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
              "num_key_value_heads": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
              "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
              "initializer_range": 0.1, "eos_token_id": tokenizer.eos_id,
              "vocab_size": tokenizer.vocab_size}
    model = modeling.Llama(modeling.read_config(config))
    model.initialize(seed)
    modeling.save(model, folder)


if __name__ == "__main__":
    print(__doc__)
