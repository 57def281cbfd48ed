"""What eval.py promises: log-probabilities of files, generated answers, a conversation, options.

The reference is transformers in fp32 on tiny random checkpoints (families.py).
"""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    HI,
    NO_EFFECT,
    PAIRS,
    REPO,
    TALK,
    TOLERANCE,
    YO,
    assistant,
    command,
    jsonl,
    read,
    system,
    user,
)
from families import make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import model as modeling
from labs import world


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A function from a family to (folder, transformers model, our tokenizer)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_checkpoint(folder, name)
            made[name] = folder, model, data.ChatTokenizer(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """(folder, transformers model, our tokenizer) where a token is a byte and answers are short."""
    folder = tmp_path_factory.mktemp("letters")
    data.byte_tokenizer(folder)
    tokenizer = data.ChatTokenizer(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        eos_token_id=tokenizer.stop_id, bos_token_id=None)).eval()
    model.save_pretrained(folder)
    return folder, model, tokenizer


@torch.no_grad()
def reference_logprobs(model, ids):
    """ln p of every token but the first, by transformers."""
    logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


@torch.no_grad()
def reference_answer(model, tokenizer, ids, count):
    """The greedy answer of transformers as text."""
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
        max_new_tokens=count, eos_token_id=tokenizer.stop_ids, pad_token_id=0)[0, len(ids):]
    kept = out.tolist()
    return tokenizer.decode(kept[:-1] if kept[-1] in tokenizer.stop_ids else kept)


def run(name, folder, path, *flags):
    """(what is printed, the rows of the output) of a command that succeeds."""
    output = Path(path).with_name("out.jsonl")
    status, out, err = command(
        "eval.py", name, "--model", folder, "--data", path, "--output", output, *flags)
    assert (status, err) == (0, "")
    return out, read(output)


# -------------------------------------------------------------------------------- log-probabilities

MIXED = [{"messages": TALK[1:]}, {"prompt": "What is 12 + 35?", "completion": "It's 47!"},
         {"text": "The quick brown fox jumps over the lazy dog."}, PAIRS["prompt and strings"],
         {"messages": [HI]}, {"prompt": "hi", "completion": "yo", "label": False},
         {"instruction": "举头望明月", "output": "低头思故乡。"}]


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral", "qwen3"])
def test_logprobs_of_a_file_are_those_of_transformers_in_its_order(name, family, tmp_path):
    folder, model, tokenizer = family(name)
    path, values = jsonl(tmp_path / "a.jsonl", *MIXED), []
    out, rows = run("logprobs", folder, path)
    examples, _ = data.load_examples([path], tokenizer, keep_all=True)
    assert [row["token_ids"] for row in rows] == [e.ids.tolist() for e in examples]
    for row, example in zip(rows, examples, strict=True):
        targets = {i for first, end, _ in example.spans for i in range(first, end)}
        assert [x is not None for x in row["logprobs"]] == [
            i in targets for i in range(len(example.ids))]
        reference = [None, *reference_logprobs(model, row["token_ids"])]
        for i in targets:
            assert row["logprobs"][i] == pytest.approx(reference[i], abs=TOLERANCE)
            values.append(row["logprobs"][i])
    loss, perplexity = map(float, re.search(r"loss (\S+) .*perplexity (\S+)", out).groups())
    assert loss == pytest.approx(-sum(values) / len(values), abs=2e-6)
    assert perplexity == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-5)
    assert str(len(values)) in out


def test_perplexity_of_a_broken_checkpoint_is_infinite(checkpoint, tmp_path):
    """e^710 is more than a double can hold."""
    model, path = modeling.load(checkpoint), jsonl(tmp_path / "a.jsonl", {"text": "the sea"})
    model.lm_head.weight.data *= 1e5
    modeling.save(model, tmp_path)
    data.ChatTokenizer(checkpoint).save(tmp_path)
    status, out, err = command("eval.py", "logprobs", "--model", tmp_path, "--data", path)
    assert status == 0 and "perplexity inf" in out, err
    flags = ["--max_perplexity", 1e9, "--model", tmp_path, "--output", tmp_path / "b.jsonl"]
    status, out, err = command("labs/filter.py", path, *flags)
    assert status == 0 and "dropped 1: perplexity" in out, err


def test_loss_of_a_file_weighs_its_messages_as_training_does(letters, tmp_path):
    talk = [HI, assistant("b c", weight=0.25), HI, assistant("the sea")]
    path = jsonl(tmp_path / "a.jsonl", {"messages": talk})
    out, (row,) = run("logprobs", letters[0], path)
    (example,), _ = data.load_examples([path], letters[2])
    sums = [(w * sum(row["logprobs"][a:b]), w * (b - a)) for a, b, w in example.spans]
    total, weight = map(sum, zip(*sums, strict=True))
    assert float(re.search(r"loss (\S+)", out)[1]) == pytest.approx(-total / weight, abs=2e-6)


def test_logprobs_mean_by_train_on_and_max_length_what_training_means(letters, tmp_path):
    folder, _, tokenizer = letters
    path = jsonl(tmp_path / "a.jsonl", {"messages": TALK}, {"text": "once upon a time " * 9})
    for train_on, max_length in (("all", 2048), ("last", 2048), ("all", 60), ("last", 60)):
        _, rows = run("logprobs", folder, path, "--train_on", train_on, "--max_length", max_length)
        examples, _ = data.load_examples([path], tokenizer, train_on, max_length)
        assert [row["token_ids"] for row in rows] == [e.ids.tolist() for e in examples]
        assert [sum(x is not None for x in row["logprobs"]) for row in rows] == [
            e.targets for e in examples]


def test_logprobs_of_several_files_and_of_none_supervised(letters, tmp_path):
    folder, _, tokenizer = letters
    one = jsonl(tmp_path / "one.jsonl", {"text": "one"})
    two = jsonl(tmp_path / "two.jsonl", {"messages": [HI]}, {"text": "two"})
    command("eval.py", "logprobs", "--model", folder, "--data", two, one, "--output",
            tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    shown = [tokenizer.decode(row["token_ids"], special=False) for row in rows]
    assert ["two" in shown[1], "one" in shown[2]] == [True, True]
    assert set(rows[0]["logprobs"]) == {None}


def test_logprobs_and_answers_do_not_depend_on_micro_tokens(family, tmp_path):
    folder = family("qwen2_window")[0]
    path, found, answers = jsonl(tmp_path / "a.jsonl", *MIXED), [], []
    for micro_tokens in (1, 60, 8192):
        _, rows = run("logprobs", folder, path, "--micro_tokens", micro_tokens)
        found.append([x or 0.0 for row in rows for x in row["logprobs"]])
        _, rows = run("generate", folder, path, "--micro_tokens", micro_tokens, "--temperature", 1,
                      "--n", 2, "--max_new_tokens", 4)
        answers.append(rows)
    assert found[0] == pytest.approx(found[2], abs=NO_EFFECT)
    assert found[1] == pytest.approx(found[2], abs=NO_EFFECT)
    assert answers[0] == answers[1] == answers[2]


# ----------------------------------------------------------------------------------------- generate

ASKED = [{"prompt": "Who are you?"}, {"messages": [*TALK]}, {"messages": TALK[:2]},
         {"prompt": [system("Be brief."), user("谢谢")]}, PAIRS["prompt and strings"],
         {"prompt": "hi", "completion": "yo", "label": True},
         {"instruction": "add", "input": "1 2", "output": "3"}]
REFERENCES = [None, TALK[-1]["content"], None, None, "yo", "yo", "3"]


@pytest.mark.parametrize("name", ["llama2", "llama3_1", "qwen2_window"])
def test_greedy_answers_are_those_of_transformers(name, family, tmp_path):
    folder, model, tokenizer = family(name)
    text = "The quick brown"
    path = jsonl(tmp_path / "a.jsonl", *ASKED, {"text": text})
    _, rows = run("generate", folder, path, "--max_new_tokens", 7)
    assert [(row["row"], row["sample"]) for row in rows] == [(i, 0) for i in range(8)]
    assert [row["reference"] for row in rows[:7]] == REFERENCES
    sources = data.read_rows([path], parse=partial(data.parse_row, ask=True))
    for row, (_, source) in zip(rows, sources, strict=False):
        if source.text is None:
            prompt = source.messages
            prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
            assert row["messages"][:-1] == prompt
            ids = tokenizer.prompt_ids(prompt)
            answer = reference_answer(model, tokenizer, ids, 7)
            assert row["messages"][-1] == assistant(answer)
    ids = tokenizer.encode([tokenizer.text(text, end=False)])[0][0].tolist()
    assert rows[7]["text"] == text + reference_answer(model, tokenizer, ids, 7)
    assert {row["finish"] for row in rows} <= {"stop", "length"}


NEARLY_UNIFORM = ["--temperature", 9, "--max_new_tokens", 40]


def sample(letters, tmp_path, *flags, rows=ASKED):
    """The output of `generate` at a temperature where tokens are nearly uniform."""
    path = jsonl(tmp_path / "asked.jsonl", *rows)
    return run("generate", letters[0], path, *NEARLY_UNIFORM, *flags)[1]


def test_n_samples_of_each_row_differ_and_end_by_themselves_or_at_the_limit(letters, tmp_path):
    rows = sample(letters, tmp_path, "--n", 8)
    assert [(row["row"], row["sample"]) for row in rows] == [
        (i, k) for i in range(len(ASKED)) for k in range(8)]
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows)
    assert Counter(row["finish"] for row in rows).keys() == {"stop", "length"}
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert "<|im_end|>" not in answer  # the token that ended it is no part of it
        if "\ufffd" not in answer and row["finish"] == "length":
            assert letters[2].encode([[(answer, 1.0)]])[0][0].size <= 40


def test_repetition_is_the_share_of_5_grams_that_stood_there_before():
    assert evaluation.repetition([1, 2, 3, 4]) == 0.0  # no 5-gram
    assert evaluation.repetition(list(range(30))) == 0.0
    assert evaluation.repetition([7] * 14) == 0.9  # ten 5-grams, one of them new


def test_generate_says_how_its_answers_ended_and_how_they_repeat(letters, tmp_path):
    path = jsonl(tmp_path / "asked.jsonl", *ASKED)
    printed, rows = run("generate", letters[0], path, *NEARLY_UNIFORM)
    ended = sum(row["finish"] == "stop" for row in rows) / len(rows)
    tokens = sum(row["tokens"] for row in rows) / len(rows)
    assert f"{ended:.1%} ended themselves, {tokens:.1f} tokens and 0.0% repetition" in printed
    assert all(row["tokens"] <= 40 for row in rows)


def test_sampling_repeats_with_its_seed_and_changes_with_another(letters, tmp_path):
    first, again = (sample(letters, tmp_path, "--n", 2, "--seed", 5) for _ in range(2))
    assert first == again
    assert first != sample(letters, tmp_path, "--n", 2, "--seed", 6)


def test_generated_rows_are_training_rows_again(letters, tmp_path):
    rows = sample(letters, tmp_path, "--n", 2, rows=[*ASKED, {"text": "once"}])
    again = [row for _, row in data.read_rows([tmp_path / "out.jsonl"])]
    assert [row.messages for row in again] == [row.get("messages", []) for row in rows]
    assert [row.text for row in again] == [row.get("text") for row in rows]
    examples, _ = data.load_examples([str(tmp_path / "out.jsonl")], letters[2])
    assert len(examples) == len(rows)


def test_functions_that_a_row_offers_stay_in_what_is_generated_for_it():
    row = {"messages": [HI], "tools": [{"type": "function", "function": {"name": "f"}}]}
    asked, plan = evaluation.ask_row(
        data.parse_row("here", row, ask=True), SimpleNamespace(prompt=lambda *given: given), "")
    assert asked == {**row, "reference": None} and plan == (row["messages"], row["tools"])


def test_system_flag_gives_a_system_message_to_conversations_that_have_none(letters, tmp_path):
    folder, model, tokenizer = letters
    path, own = jsonl(tmp_path / "a.jsonl", *ASKED), [system("Be brief."), TALK[0]]
    for row in run("generate", folder, path, "--system", "Sing.", "--max_new_tokens", 5)[1]:
        first, *others = row["messages"]
        assert first in own if row["row"] in (1, 2, 3) else first == system("Sing.")
        assert "system" not in [m["role"] for m in others]
        ids = tokenizer.prompt_ids(row["messages"][:-1])
        assert row["messages"][-1]["content"] == reference_answer(model, tokenizer, ids, 5)


def test_template_flag_changes_the_prompt(letters, tmp_path):
    folder, model, _ = letters
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi"})
    _, (row,) = run("generate", folder, path, "--template", "plain", "--max_new_tokens", 5)
    tokenizer = data.ChatTokenizer(folder, "plain")
    answer = reference_answer(model, tokenizer, tokenizer.prompt_ids([HI]), 5)
    assert row["messages"] == [HI, assistant(answer)]


def test_stopped_generation_goes_on_where_it_was(letters, tmp_path, monkeypatch):
    """Ctrl-C after three of eight samples; the same command gives what it gives in one go."""
    flags, rows = ["--n", 2, "--micro_tokens", 1], ASKED[:4]
    wanted = sample(letters, tmp_path, *flags, rows=rows)
    (tmp_path / "out.jsonl").unlink()
    generate, calls = modeling.generate, []

    def interrupted(*arguments, **how):
        calls.append(how["samples"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments, **how)

    monkeypatch.setattr(modeling, "generate", interrupted)
    status, out, _ = command(
        "eval.py", "generate", "--model", letters[0], "--data", tmp_path / "asked.jsonl",
        "--output", tmp_path / "out.jsonl", *NEARLY_UNIFORM, *flags)
    assert status == 130 and "stopped after 3 of 8" in out
    assert not (tmp_path / "out.jsonl").exists()
    (part,) = tmp_path.glob(".out.jsonl.*.partial")
    with open(part, "ab") as file:
        file.write('{"half of a line, and of a 字'.encode()[:-1])
    assert sample(letters, tmp_path, *flags, rows=rows) == wanted
    assert list(map(list, calls[4:])) == [[3], [4], [5], [6], [7]]
    assert not part.exists()


def test_samples_that_two_commands_wrote_at_once_are_not_kept(letters, tmp_path, monkeypatch):
    """Each wrote every sample; a third goes on behind what stands there in order."""
    wanted = sample(letters, tmp_path, "--n", 2, rows=ASKED[:2])
    c = evaluation.Generate(n=2, model="m", output=str(tmp_path / "out.jsonl"))
    monkeypatch.setattr(modeling, "weight_files", lambda _: [])
    path, _ = evaluation.partial_output(c, [])
    lines = [json.dumps(row) + "\n" for row in wanted]
    for text, kept in (([*lines, *lines], 4), ([lines[0], *lines], 1), ([lines[0], "5\n"], 1),
                       ([lines[1]], 0), ([lines[0], lines[1][:-1]], 1)):
        path.write_text("".join(text), encoding="utf-8")
        assert evaluation.partial_output(c, []) == (path, kept)
        assert path.read_text(encoding="utf-8") == "".join(lines[:kept])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(modeling.InputError, match="not with torchrun"):
        evaluation.generate_command(evaluation.Generate(data=["x"], output=str(tmp_path / "x")))


def test_answers_of_other_weights_are_not_gone_on_with(letters, tmp_path):
    folder = shutil.copytree(letters[0], tmp_path / "model")
    c = evaluation.Generate(model=str(folder), output=str(tmp_path / "out.jsonl"))
    path, _ = evaluation.partial_output(c, [[1]])
    path.write_text('{"row": 0, "sample": 0}\n', encoding="utf-8")
    assert evaluation.partial_output(c, [[1]]) == (path, 1)
    os.utime(folder / "model.safetensors", (1, 1))
    assert evaluation.partial_output(c, [[1]])[1] == 0


def test_answers_end_with_the_turn_even_where_generation_config_does_not_say_so(letters, tmp_path):
    folder = shutil.copytree(letters[0], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    path = jsonl(tmp_path / "asked.jsonl", {"prompt": "hi"})
    _, rows = run("generate", folder, path, *NEARLY_UNIFORM, "--n", 32)
    assert not any("<|im_end|>" in row["messages"][-1]["content"] for row in rows)


def test_prompts_beyond_the_context_are_said(letters, tmp_path):
    path = jsonl(tmp_path / "asked.jsonl", {"prompt": "hi"}, {"prompt": "x" * 3000})
    out, _ = run("generate", letters[0], path, "--max_new_tokens", 1)
    assert "answers beyond 2048 are unreliable" in out
    _, out, _ = command("eval.py", "chat", "--model", letters[0], "--max_new_tokens", 2,
                        stdin="hi\n" + "x" * 2100 + "\n")
    assert out.count("answers beyond 2048 are unreliable") == 1


def test_from_python_generate_stops_at_the_checkpoints_own_ids_and_takes_a_temperature(letters):
    """generation_config.json names what ends an answer, as it does for transformers."""
    folder, reference, tokenizer = letters
    model = modeling.load(folder)
    assert model.stop_ids == (tokenizer.stop_id,)
    prompt = tokenizer.prompt_ids([HI])
    # at this temperature tokens are nearly uniform: some answers stop
    answers = modeling.generate(model, [prompt] * 9, 300, temperature=9.0)
    for ids in answers:
        assert tokenizer.stop_id not in ids[:-1]
        assert len(ids) == 300 or ids[-1] == tokenizer.stop_id
    assert min(map(len, answers)) < 300


# --------------------------------------------------------------------------------------------- chat


def test_chat_keeps_the_history_until_reset_and_ends_with_quit(letters):
    folder, model, tokenizer = letters
    first = reference_answer(model, tokenizer, tokenizer.prompt_ids([HI]), 6)
    talk = [HI, assistant(first), user("and you")]
    second = reference_answer(model, tokenizer, tokenizer.prompt_ids(talk), 6)
    done = subprocess.run(
        [sys.executable, REPO / "eval.py", "chat", "--model", folder, "--max_new_tokens", "6"],
        input=b"hi\n\n/nonsense\n\xc4\xe3\nand you\n/reset\nhi\n/quit\nhi\n",  # and GBK
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, timeout=120,
        check=False)
    out = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    shown = [f"> {answer}\n" for answer in (first, second, first)]
    position = 0
    for text in shown:
        position = out.index(text, position) + len(text)
    assert out.count(shown[0]) == 2  # none after /quit
    assert "/nonsense" in out[: out.index(shown[1])]
    assert "that is not UTF-8" in out[: out.index(shown[1])]


def test_chat_ends_at_the_end_of_its_input_and_begins_with_the_system_flag(letters):
    folder, model, tokenizer = letters
    status, out, err = command("eval.py", "chat", "--model", folder, "--max_new_tokens", 6,
                               "--system", "Sing.", stdin="hi\n")
    ids = tokenizer.prompt_ids([system("Sing."), HI])
    assert f"> {reference_answer(model, tokenizer, ids, 6)}\n" in out
    assert (status, err) == (0, "")


def test_chat_samples_as_its_flags_say(letters):
    outs = [command("eval.py", "chat", "--model", letters[0], "--max_new_tokens", 6,
                    "--temperature", 9, "--seed", seed, stdin="hi\n")[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def stream(letters, monkeypatch, tokens):
    """What stream_answer shows, piece by piece, and returns if the model gives these tokens."""
    monkeypatch.setattr(modeling, "generate_steps", lambda *_, **__: ([t] for t in tokens))
    shown = []
    monkeypatch.setattr("builtins.print", lambda text, **_: shown.append(text))
    text = evaluation.stream_answer(None, letters[2], [1], evaluation.Chat())
    assert "".join(shown) == text
    return [piece for piece in shown if piece], text


def test_chat_shows_a_character_when_all_its_bytes_are_there(letters, monkeypatch):
    ids = letters[2].tokenizer.encode("é中🙂x").ids
    assert len(ids) == 2 + 3 + 4 + 1
    stop = letters[2].stop_id
    assert stream(letters, monkeypatch, [*ids, stop, *ids]) == (list("é中🙂x"), "é中🙂x")
    pieces, text = stream(letters, monkeypatch, ids[:4])  # cut off within the second character
    assert pieces[0] == "é"
    assert text.startswith("é\ufffd")


# ------------------------------------------------------------------------------ options of an exam

QUESTIONS = {
    "a common beginning": [[5, 6, 7, 8, 9, i, i + 1] for i in range(10, 15)],
    "different lengths": [[5, 6, 7, *range(20, 20 + n)] for n in (1, 9, 3, 30)],
    "nothing in common": [[7, 8, 9], [8, 9], [9, 9, 9, 9]],
    "one": [[5, 6, 7]],
    "one the beginning of another": [[5, 6], [5, 6, 7], [5, 6, 7, 8]],
    "all alike": [[5, 6, 7]] * 3,
    "one token": [[5], [6]],
}
OPTIONS = [(40,), (41,), (42,), (43,)], [(40, 41), (40, 42), (43,), (44, 45, 46)]


@pytest.mark.parametrize("micro_tokens", [1, 16, 8192])
@pytest.mark.parametrize("name", ["llama2", "qwen2_window"])
def test_options_after_a_shared_prefix_score_as_after_every_full_prompt(
        name, micro_tokens, family):
    """An option of several tokens scores as their sum; the options may differ in length."""
    folder, reference, _ = family(name)
    model = modeling.load(folder)
    for prompts, options in itertools.product(QUESTIONS.values(), OPTIONS):
        scores = evaluation.score_options(model, prompts, options, micro_tokens)
        expected = [[sum(reference_logprobs(reference, [*prompt, *option])[-len(option):])
                     for option in options] for prompt in prompts]
        assert scores.shape == (len(prompts), 4)
        assert torch.allclose(scores, torch.tensor(expected), rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------- bad input

BAD = {
    "no command": ([], "logprobs"),
    "unknown command": (["logprob"], "logprobs"),
    "unknown flag": (["chat", "--modle", "x"], "--model"),
    "no file": (["logprobs"], "--data"),
    "no output": (["generate", "--data", "GOOD"], "--output"),
    "samples of greedy": (["generate", "--data", "GOOD", "--output", "OUT", "--n", "2"],
                          "--temperature"),
    "micro_tokens": (["logprobs", "--data", "GOOD", "--micro_tokens", "0"], "--micro_tokens"),
    "max_length": (["logprobs", "--data", "GOOD", "--max_length", "1"], "--max_length"),
    "max_new_tokens": (["chat", "--max_new_tokens", "0"], "--max_new_tokens"),
    "temperature": (["chat", "--temperature", "-1"], "--temperature"),
    "top_p": (["chat", "--top_p", "0"], "--top_p"),
    "top_k": (["chat", "--top_k", "-1"], "--top_k"),
    "dtype": (["chat", "--dtype", "fp8"], "bf16"),
    "no model": (["chat", "--model", "nowhere"], "nowhere"),
    "template": (["chat", "--model", "MODEL", "--template", "chatlm"], "chatml"),
    "template without its tokens": (["chat", "--model", "MODEL", "--template", "llama3"], "eot_id"),
    "missing file": (["logprobs", "--model", "MODEL", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "bad row": (["logprobs", "--model", "MODEL", "--data", "BAD", "--output", "OUT"], "line 2"),
    "bad row to answer": (["generate", "--model", "MODEL", "--data", "BAD", "--output", "OUT"],
                          "line 2"),
    "nobody asks": (["generate", "--model", "MODEL", "--data", "SILENT", "--output", "OUT"],
                    "line 1"),
    "nothing to continue": (["generate", "--model", "MODEL", "--data", "EMPTY", "--output", "OUT"],
                            "line 1"),
    "output is a folder": (["logprobs", "--model", "MODEL", "--data", "GOOD", "--output", "DIR"],
                           "DIR"),
    "output below a file": (["generate", "--model", "MODEL", "--data", "GOOD", "--output",
                             "GOOD/x.jsonl", "--max_new_tokens", "2"], "good.jsonl"),
    "output is the data": (["generate", "--model", "MODEL", "--data", "GOOD", "--output", "GOOD"],
                           "is the input"),
    "logprobs over the data": (["logprobs", "--model", "MODEL", "--data", "GOOD", "--output",
                                "GOOD"], "is the input"),
    "no weights": (["chat", "--model", "BARE"], "config.json"),
    "generate over the model": (["generate", "--model", "MODEL", "--data", "GOOD", "--output",
                                 "MODEL/tokenizer.json"], "is the input"),
    "logprobs into a pipe": (["logprobs", "--model", "MODEL", "--data", "GOOD", "--output", "PIPE"],
                             "it is a device or a pipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_status_2_and_leaves_the_output_alone(
        name, letters, tmp_path):
    arguments, said = BAD[name]
    output = tmp_path / "out.jsonl"
    output.write_text("old", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    data.byte_tokenizer(tmp_path / "bare")
    places = {"GOOD": jsonl(tmp_path / "good.jsonl", {"prompt": "q", "completion": "a"}),
              "BAD": jsonl(tmp_path / "bad.jsonl", {"text": "one"}, {"text": 1}),
              "SILENT": jsonl(tmp_path / "silent.jsonl", {"messages": [YO]}),
              "EMPTY": jsonl(tmp_path / "empty.jsonl", {"text": ""}),
              "MODEL": str(letters[0]), "BARE": str(tmp_path / "bare"), "OUT": str(output),
              "DIR": str(tmp_path / "folder")}
    os.mkfifo(tmp_path / "pipe")
    places["PIPE"] = str(tmp_path / "pipe")
    places["MODEL/tokenizer.json"] = f"{letters[0]}/tokenizer.json"
    places["GOOD/x.jsonl"] = places["GOOD"] + "/x.jsonl"
    status, _, err = command("eval.py", *(places.get(a, a) for a in arguments))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("eval.py: ")
    assert places.get(said, said) in err
    assert output.read_text(encoding="utf-8") == "old"


def test_tokenizer_with_ids_the_model_has_no_embedding_for_is_refused(letters, tmp_path):
    folder = tmp_path / "model"
    letters[1].save_pretrained(folder)
    world.make_tokenizer(folder, ["aaaa bbbb aaaa bbbb"] * 9, 300)
    path = jsonl(tmp_path / "a.jsonl", {"text": "aaaa bbbb"})
    status, _, err = command("eval.py", "logprobs", "--model", folder, "--data", path)
    assert (status, err.count("\n")) == (2, 1)
    assert "vocab_size" in err
