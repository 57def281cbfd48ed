"""Small exams and tiny checkpoints that take them, for the tests of exams."""

import csv
import json
import shutil

import torch
from conftest import command, read
from transformers import LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import model as modeling

MAPPING = {"accountant": ["Accountant", "注册会计师", "Other"],
           "law": ["Law", "法学", "Humanities"], "logic": ["Logic", "逻辑学", "Humanities"],
           "high_school_physics": ["High School Physics", "高中物理", "STEM"]}
SIZES = {"accountant": 7, "law": 3, "logic": 5, "high_school_physics": 4}


def rows(handle, split, count):
    """Questions of different lengths; answers go A, C, D, A, C, D, A, ..."""
    return [{"id": str(i), "question": f" {handle} {split} 第{i}题" + "长" * i + "____。",
             **{x: f"{x}{i}选" for x in "ABCD"}, "answer": "ACD"[i % 3],
             "explanation": f"1. 因为{i}。\r\n2. 所以。"} for i in range(count)]


def write_csv(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table)


def write_ceval(folder):
    """An exam in C-Eval's layout; a Path."""
    for handle, size in SIZES.items():
        for split, count, names in (("dev", 5, 8), ("val", size, 7), ("test", 2, 6)):
            table = rows(handle, split, count)
            write_csv(folder / split / f"{handle}_{split}.csv",
                      [list(table[0])[:names], *(list(r.values())[:names] for r in table)])
    (folder / "subject_mapping.json").write_text(json.dumps(MAPPING), encoding="utf-8")
    return folder


def write_cmmlu(folder, handles=("agronomy", "arts")):
    for handle in handles:
        for split, count in (("dev", 5), ("test", 6)):
            body = [list(r.values())[:7] for r in rows(handle, split, count)]
            write_csv(folder / split / f"{handle}.csv",
                      [["", "Question", *"ABCD", "Answer"], *body])
    return folder


def write_mmlu(folder, handles=("abstract_algebra", "us_foreign_policy")):
    for handle in handles:
        for split, count in (("dev", 5), ("test", 6)):
            write_csv(folder / split / f"{handle}_{split}.csv",
                      [list(r.values())[1:7] for r in rows(handle, split, count)])
    return folder


def make_model(folder, seed=0, positions=4096):
    """A random checkpoint whose tokens are bytes."""
    data.byte_tokenizer(folder)
    tokenizer = data.ChatTokenizer(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=positions, eos_token_id=tokenizer.stop_id, bos_token_id=None,
    )).eval().save_pretrained(folder)
    return folder


def make_constant(folder, source, letter):
    """A checkpoint with the tokenizer of `source` that says `letter` whatever it is asked.

    Every embedding is all ones and the blocks add nothing, so that the last state is all ones; of
    the LM head only the letter's row is not 0.
    """
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    tokenizer = data.ChatTokenizer(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=4096,
        eos_token_id=tokenizer.stop_id, bos_token_id=None))
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
    (token,) = tokenizer.tokenizer.encode(letter, add_special_tokens=False).ids
    model.lm_head.weight.data[token] = 1.0
    model.save_pretrained(folder)
    return folder


def exam(output, *flags):
    """(results, predictions, printed) of a run that succeeds; of several checkpoints None twice."""
    status, out, err = command("eval.py", "exam", "--output_dir", output, *flags)
    assert (status, err) == (0, ""), err
    if (output / "results.json").exists():
        return modeling.read_json(output / "results.json"), read(output / "predictions.jsonl"), out
    return None, None, out


def asked(folder, **flags):
    """(Exam, its subjects, Protocol) of flags."""
    c = evaluation.resolve_exam(evaluation.Exam(data=str(folder), **flags))
    return c, evaluation.read_exam(c), evaluation.PROTOCOLS[c.protocol][c.benchmark]


def text_of(plan, tokenizer):
    return tokenizer.decode(plan.start) + plan.text


def first_prompt(tokenizer, folder, index=0, **flags):
    """The prompt of a subject's last question as text."""
    c, subjects, p = asked(folder, **flags)
    plan, _ = evaluation.prompt_plan(tokenizer, subjects[index], subjects[index].questions[-1],
                                     c.shots, p, c.chat)
    return text_of(plan, tokenizer)
