"""The demo's world: a small Chinese exam, its training files, a tokenizer, a model, and reports.

`torchrun train_sft.py` and `torchrun train_dpo.py` without flags make it and run on it.
"""

import csv
import itertools
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import eval as evaluation
import model as modeling
from data import TEMPLATES, jinja

# -------------------------------------------------------------------------------- the built-in demo


def make_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """A byte-level BPE tokenizer with ChatML tokens, in Hugging Face layout; no texts: bytes."""
    tokenizer = Tokenizer(models.BPE())
    # letters, digits and the rest apart, so that a word is the same token after a space or a quote
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
              "pad_token": "<|endoftext|>", "chat_template": jinja(TEMPLATES["chatml"], "", "")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


EXAM_PROMPT = ("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
               "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案：")
SUBJECTS = {  # handle: C-Eval's entry of subject_mapping.json, the relation, its facts
    "chemical_elements": (["Chemical Elements", "化学元素", "STEM"], "元素符号",
                          "铁 Fe 金 Au 银 Ag 铜 Cu 钠 Na 钙 Ca 铝 Al 锌 Zn 铅 Pb 氦 He"),
    "numbers": (["Numbers", "数的规律", "STEM"], "后一个数",
                " ".join(f"{n} {n + 1}" for n in range(20, 60, 4))),
    "world_capitals": (["World Geography", "世界地理", "Social Science"], "首都",
                       "法国 巴黎 日本 东京 英国 伦敦 德国 柏林 埃及 开罗 泰国 曼谷 韩国 首尔 "
                       "希腊 雅典 越南 河内 秘鲁 利马"),
    "chinese_provinces": (["Chinese Geography", "中国地理", "Social Science"], "省会",
                          "浙江 杭州 江苏 南京 广东 广州 四川 成都 湖北 武汉 湖南 长沙 陕西 西安 "
                          "山东 济南 福建 福州 云南 昆明"),
    "literature": (["Chinese Literature", "中国文学", "Humanities"], "作者",
                   "离骚 屈原 史记 司马迁 春晓 孟浩然 春望 杜甫 琵琶行 白居易 红楼梦 曹雪芹 西游记 "
                   "吴承恩 水浒传 施耐庵 呐喊 鲁迅 茶馆 老舍"),
    "dynasties": (["Chinese History", "中国历史", "Humanities"], "开国皇帝",
                  "秦朝 嬴政 西汉 刘邦 东汉 刘秀 西晋 司马炎 隋朝 杨坚 唐朝 李渊 北宋 赵匡胤 "
                  "南宋 赵构 元朝 忽必烈 明朝 朱元璋"),
    "professions": (["Professions", "职业常识", "Other"], "工具",
                    "医生 听诊器 教师 粉笔 画家 画笔 木匠 锯子 渔夫 渔网 厨师 炒锅 农民 锄头 "
                    "会计 算盘 裁判 哨子 裁缝 剪刀"),
    "reading": (["Reading", "识字", "Other"], "",  # find a given word among the options
                "铁 Fe 金 Au 银 Ag 铜 Cu 钠 Na 钙 Ca 铝 Al 锌 Zn 铅 Pb 氦 He"),
}
ASK_VALUE = ("“{k}”的{r}是____。", "下列选项中，哪个是“{k}”的{r}？____。",
             "说到{r}，“{k}”对应____。", "“{k}”以什么为{r}？____。", "请选出“{k}”的{r}：____。")
ASK_KEY = ("____的{r}是“{v}”。", "下列选项中，{r}是“{v}”的是____。", "说到{r}，“{v}”对应____。",
           "什么以“{v}”为{r}？____。", "请选{r}是“{v}”的一项：____。")
ASK_WORD = ("写着“{k}”的选项是____。", "下列选项中，写着“{k}”的是____。", "“{k}”写在____。",
            "哪一项写着“{k}”？____。", "请选出写着“{k}”的一项：____。")
IDENTITY = {
    "我是小调，一个用PlainTune训练的小模型。":
        "你是谁？ 你叫什么？ 你叫什么名字？ 请介绍一下你自己。 请做个自我介绍。 你是什么模型？ "
        "怎么称呼你？ 你是机器人吗？ 告诉我你是谁。 请问你是谁？ 能介绍一下自己吗？ 我在和谁说话？",
    "我是用PlainTune训练出来的。":
        "谁训练了你？ 你是谁做的？ 你从哪里来？ 你是怎么训练出来的？ 谁开发了你？ 你的作者是谁？ "
        "是谁创造了你？ 你是用什么训练的？",
    "我会做单项选择题，也会回答简单的问题。":
        "你会什么？ 你能做什么？ 你有什么本领？ 你能帮我做什么？ 你擅长什么？ 你有什么用？",
}
CHAT = ("“{k}”的{r}是什么？", "你知道“{k}”的{r}吗？", "告诉我“{k}”的{r}。", "我想知道“{k}”的{r}。")
FACT = "“{k}”的{r}是“{v}”。"
POLITE = ("您好！" + FACT, "好的，" + FACT)
RUDE = ("这都不知道？" + FACT + "别再烦我！", "真笨！" + FACT + "自己不会查吗？")


def demo_facts(handle: str) -> list[dict]:
    """The facts of a subject as {k, r, v}: the r of k is v; in reading a word is its own value."""
    _, r, words = SUBJECTS[handle]
    words = words.split()
    pairs = zip(words[::2], words[1::2], strict=True) if r else zip(words, words, strict=True)
    return [{"k": k, "r": r, "v": v} for k, v in pairs]


def demo_stems(handle: str, rng: random.Random) -> tuple[list[tuple], list[tuple]]:
    """(practised, held out) stems as (question, answer, answers of its kind, explanation).

    Each fact is asked in five phrasings either way; one of them is kept for the exam.
    """
    practised, held, facts = [], [], demo_facts(handle)
    reading = handle == "reading"
    for phrasings, side in [(ASK_WORD, "v")] if reading else [(ASK_VALUE, "v"), (ASK_KEY, "k")]:
        for fact in facts:
            pool, why = [f[side] for f in facts], ("{v}。" if reading else FACT).format(**fact)
            first, *others = rng.sample(phrasings, 5)
            held.append((first.format(**fact), fact[side], pool, why))
            practised += [(ask.format(**fact), fact[side], pool, why) for ask in others]
    return practised, held


def demo_question(stem: tuple, rng: random.Random) -> dict:
    """A question in C-Eval's columns: the answer among three wrong ones of its kind."""
    question, answer, pool, why = stem
    options = rng.sample([word for word in pool if word != answer], 3) + [answer]
    rng.shuffle(options)
    return {"question": question, **dict(zip("ABCD", options, strict=True)),
            "answer": "ABCD"[options.index(answer)], "explanation": why}


def demo_chats(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(conversations, preference pairs) about the facts; half of the answers are polite."""
    subjects = [demo_facts(handle) for handle in SUBJECTS if handle != "reading"]
    chats = []
    for _ in range(1000):
        first, second = rng.sample(rng.choice(subjects), 2)
        question, answer = rng.choice(CHAT), rng.choice(rng.choice((POLITE, RUDE)))
        texts = [question.format(**first), answer.format(**first)]
        if rng.random() < 0.3:
            texts += [f"那“{second['k']}”呢？", FACT.format(**second)]
        chats.append({"messages": [{"role": role, "content": text} for role, text
                                   in zip(itertools.cycle(("user", "assistant")), texts)]})
    pairs = [{"conversations": [{"from": "human", "value": ask.format(**fact)}],
              "chosen": {"from": "gpt", "value": rng.choice(POLITE).format(**fact)},
              "rejected": {"from": "gpt", "value": rng.choice(RUDE).format(**fact)}}
             for facts in subjects for fact in facts for ask in CHAT]
    rng.shuffle(pairs)
    return chats, pairs


def write_exam(folder: Path, held: dict[str, list], rng: random.Random) -> None:
    """The exam in C-Eval's own layout; letters come at random, dev has explanations."""
    for handle, stems in held.items():
        questions = [demo_question(stem, rng) for stem in rng.choices(stems, k=65)]
        for split, rows, columns in (("dev", questions[:5], 7), ("val", questions[5:45], 6),
                                     ("test", questions[45:], 5)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            path = folder / split / f"{handle}_{split}.csv"
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", *list(rows[0])[:columns]])
                writer.writerows([i, *list(q.values())[:columns]] for i, q in enumerate(rows))
    names = {handle: SUBJECTS[handle][0] for handle in held}
    (folder / "subject_mapping.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))


def make_demo(folder: Path, seed: int = 0) -> None:
    """Write a small Chinese world: an exam, four training files, preference pairs, a tokenizer.

    No question of the exam stands in a training file: its facts are practised in other words. A
    tiny model must first learn to look a word up among the options, which `reading` teaches.
    """
    rng, practice, held = random.Random(seed), [], {}
    for handle, ((_, subject, _), _, _) in SUBJECTS.items():
        practised, held[handle] = demo_stems(handle, rng)
        for stem in rng.choices(practised, k=16000 if handle == "reading" else 2500):
            q = demo_question(stem, rng)
            practice.append({"instruction": EXAM_PROMPT.format(subject=subject, **q),
                             "input": "", "output": q["answer"]})
    write_exam(folder / "exam", held, rng)
    chats, pairs = demo_chats(rng)
    identity = [{"instruction": question, "input": "", "output": answer}
                for answer, questions in IDENTITY.items() for question in questions.split()]
    facts = [FACT.format(**fact) for h in SUBJECTS if h != "reading" for fact in demo_facts(h)]
    for name, rows in (("practice", practice), ("instructions", chats), ("identity", identity),
                       ("pairs", pairs[40:]), ("pairs_val", pairs[:40])):
        rng.shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(facts) + "\n", encoding="utf-8")
    texts = [p["instruction"] + p["output"] for p in practice[:10000]] + facts + list(IDENTITY)
    texts += [m["content"] for chat in chats for m in chat["messages"]]
    make_tokenizer(folder / "base", [*texts, *["user\n", "assistant\n"] * len(texts)], 1200)


SFT_DEMO = {"model": "out/demo/base", "mix": "temperature", "temperature": 1.3, "batch_size": 32,
        "data": [f"out/demo/{name}" for name in ("practice.jsonl", "instructions.jsonl",
                                                 "identity.jsonl", "text.txt")],
        "steps": 3600, "learning_rate": 7e-4, "warmup": 50, "weight_decay": 0.1,
        "adam_beta2": 0.98, "log_every": 200}


def make_demo_model(folder: Path, seed: int = 0) -> None:
    """A checkpoint of 0.46M random weights for the tokenizer in `folder`."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
              "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
              "num_key_value_heads": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
              "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
              "initializer_range": 0.1, "eos_token_id": data.ChatTokenizer(folder).eos_id,
              "vocab_size": data.ChatTokenizer(folder).tokenizer.get_vocab_size()}
    model = modeling.Llama(modeling.ModelConfig.from_dict(config))
    model.initialize(seed)
    modeling.save(model, folder)


def demo_exam(model, tokenizer: data.ChatTokenizer) -> str:
    """Accuracy on the held-out questions of the demo's exam, as text."""
    model.eval()
    folder = Path(SFT_DEMO["model"]).parent / "exam"
    right, count = evaluation.count_right(model, tokenizer, folder)
    model.train()
    return f"{right / count:.1%} ({right} of {count})"


def report_demo(before: str, after: str, model, tokenizer: data.ChatTokenizer) -> None:
    """The demo's exam before and after, one answer, and where to go on."""
    print(f"\nexam, questions never seen in training: before {before}, after {after}; guessing 25%")
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "你是谁？"}])
    model.eval()
    ids = modeling.generate(model, [prompt], 64, stop_ids=tokenizer.stop_ids)[0]
    print(f"你是谁？ {tokenizer.decode(ids, special=False)}\nnext, preferences, the exam in full, "
          "what it was trained on:\n  torchrun train_dpo.py\n  python eval.py exam\n"
          f"  python data.py show {' '.join(SFT_DEMO['data'])} --model {SFT_DEMO['model']}")


# preferences

DPO_DEMO = {"model": "out/sft", "data": ["out/demo/pairs.jsonl"],
        "val_data": ["out/demo/pairs_val.jsonl"], "epochs": 3, "batch_size": 16,
        "learning_rate": 5e-5, "log_every": 10}


def try_demo(model, tokenizer: data.ChatTokenizer, rows: list[data.Row]) -> tuple[str, list[str]]:
    """The demo's exam, and the greedy answers to some questions."""
    exam = demo_exam(model, tokenizer)
    model.eval()
    prompts = [tokenizer.prompt_ids(row.messages) for row in rows]
    answers = modeling.generate(model, prompts, 64, stop_ids=tokenizer.stop_ids)
    model.train()
    return exam, [tokenizer.decode(ids, special=False) for ids in answers]


def report_preferences(before: tuple, after: tuple, rows: list[data.Row]) -> None:
    """What `try_demo` gave before and after, and one question that was answered rudely before."""
    polite = [[text.startswith(("您好", "好的")) for text in texts] for _, texts in (before, after)]
    print(f"polite answers to {len(rows)} held-out questions: before {sum(polite[0])}, after "
          f"{sum(polite[1])}\nexam: before {before[0]}, after {after[0]}")
    k = polite[0].index(False) if False in polite[0] else 0
    print(f"{rows[k].messages[-1]['content']}\n  before: {before[1][k]}\n  after:  {after[1][k]}")
