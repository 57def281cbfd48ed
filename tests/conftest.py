"""What all tests share: one thread (the same sums in every process), rows, running scripts."""

import contextlib
import functools
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import make_checkpoint
from family_tokenizers import write_tokenizer
from safetensors.torch import load_file

import data
import model as modeling
import train_sft

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The claims are about a CPU, where sums repeat bit for bit: a GPU is for the tests that name it.
modeling.best_device = lambda local=0: torch.device("cpu")


def pytest_configure(config):
    """Hide a GPU from the tests and from what they start, unless `pytest -k cuda` asks for it."""
    if config.option.keyword != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it first looks for a GPU


REPO = Path(data.__file__).resolve().parent
SHARED = REPO.parent / "shared"
# Two orders of summation in fp32; 1e-4 nats is what the project promises for real checkpoints.
TOLERANCE = 1e-4
NO_EFFECT = 1e-5  # of how the work is cut into forward passes
WORDS = "the river runs to sea people walked on moon 床前 明月 光 你好 中国 谢谢 a b c".split()


@pytest.fixture(autouse=True)
def signals():
    """Undo the handlers of a training run: processes forked later would inherit them."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A ChatML tokenizer whose tokens are bytes: lengths can be counted by hand."""
    folder = tmp_path_factory.mktemp("letters")
    data.byte_tokenizer(folder)
    return data.ChatTokenizer(folder)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function from the name of a tokenizer of family_tokenizers.py to its folder."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp(name)
        write_tokenizer(folder, name)
        return folder

    return write


@pytest.fixture(scope="session")
def chat(folder_of):
    """A function from (tokenizer, template) to its ChatTokenizer."""
    return functools.cache(lambda name, form="": data.ChatTokenizer(folder_of(name), form))


def render(tokenizer, messages, tools=None, **options):
    """(ids, spans) of one conversation, of several examples the last."""
    ids, spans = tokenizer.encode(tokenizer.conversation(messages, tools, **options))[-1]
    return ids.tolist(), spans


# -------------------------------------------------------------------------------------------- rows


def system(text):
    return {"role": "system", "content": text}


def user(text, **extra):
    return {"role": "user", "content": text, **extra}


def assistant(text, **extra):
    return {"role": "assistant", "content": text, **extra}


HI, YO, NO = user("hi"), assistant("yo"), assistant("no")
PAIRS = {
    "prompt and strings": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    "prompt and messages": {"prompt": "hi", "chosen": YO, "rejected": NO},
    "prompt as messages": {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
    "prompt repeated in both": {"prompt": "hi", "chosen": [HI, YO], "rejected": [HI, NO]},
    "instruction": {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "no"},
    "conversations": {"conversations": [{"from": "human", "value": "hi"}],
                      "chosen": {"from": "gpt", "value": "yo"},
                      "rejected": {"from": "gpt", "value": "no"}},
    "whole conversations": {"chosen": [HI, YO], "rejected": [HI, NO]},
}
TALK = [system("You are helpful."), user("What is 12 + 35?"), assistant("It's 47!"),
        user("谢谢你的帮助！"), assistant("很高兴为你服务。\n\n  Bye.")]


def jsonl(path, *rows):
    """Write rows as JSON lines and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def supervised(tokenizer, example):
    """The text of every span of (ids, spans, ...)."""
    ids, spans = example[:2]
    return [tokenizer.decode(ids[first:end]) for first, end, _ in spans]


# -------------------------------------------------------------------------------- running scripts


def command(script, *arguments, stdin=""):
    """(exit status, stdout, stderr) of a script, run in this process to save the imports."""
    argv, source = sys.argv, sys.stdin
    sys.argv, sys.stdin = [str(REPO / script), *map(str, arguments)], io.StringIO(stdin)
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv, sys.stdin = argv, source
    return status, out.getvalue(), err.getvalue()


def launcher(work, name, *flags, ranks=1, script=train_sft):
    """The command line of a small run into work/name; `script` is the module to run."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
                  "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    run = ["-m", script.__name__] if script.__name__.startswith("labs.") else [script.__file__]
    return [*start, *run, "--output_dir", str(work / name), *map(str, flags)]


def environment():
    """The variables of a run in another process, which finds the project from any folder."""
    return {**os.environ, "PYTHONPATH": str(REPO)}


def train(work, name, *flags, ranks=1, status=0, script=train_sft):
    """Run it, in this process unless it has several ranks; returns its steps and its output."""
    if ranks > 1:
        done = subprocess.run(launcher(work, name, *flags, ranks=ranks, script=script),
                              capture_output=True, text=True, cwd=work, env=environment())
        code, text = done.returncode, done.stdout + done.stderr
    else:
        argv = [script.__file__, "--output_dir", str(work / name), *map(str, flags)]
        code, text = run_here(argv, script)
    assert code == status, text
    return steps(work / name), text


def interrupt(work, name, *flags, at, number=signal.SIGKILL, delay=0.0, script=train_sft):
    """Start a run in a process of its own and send it a signal once it has printed `at`."""
    process = subprocess.Popen(launcher(work, name, *flags, script=script), cwd=work, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith(at):
            time.sleep(delay)
            process.send_signal(number)
            break
    return process.stdout.read(), process.wait()


def steps(folder):
    """The records of metrics.jsonl, without what was measured before the first step."""
    path = folder / "metrics.jsonl"
    return [r for r in read(path) if r["step"] > 0] if path.exists() else []


def run_here(argv, script=train_sft):
    """(exit status, output) of a script's main."""
    before, handlers = sys.argv, [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    out, sys.argv = io.StringIO(), argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            with data.one_line_errors():
                script.main()
    except SystemExit as stop:
        return stop.code, out.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers:
            signal.signal(number, handler)


def curve(records):
    return [record["loss"] for record in records]


def weights(folder):
    return load_file(folder / "model.safetensors")


# --------------------------------------------------------------- preferences, and a plain DPO loop


def some_words(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, n)))


def write_pairs(path, count, seed=0):
    """Pairs whose prompts and answers are of very different lengths, some with several turns."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        history = [user(some_words(rng, 5)), assistant(some_words(rng, 5))] if i % 3 == 0 else []
        question = user(f"{i} {some_words(rng, 2 + 7 * i % 25)}")
        rows.append({"prompt": [*history, question], "chosen": some_words(rng, 3 + i % 12) + " yes",
                     "rejected": some_words(rng, 12) + " no"})
    return jsonl(path, *rows)


def perturbed(source, target):
    """Write a copy of a checkpoint whose weights are a little different."""
    shutil.copytree(source, target)
    generator, model = torch.Generator().manual_seed(1), modeling.load(source)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    modeling.save(model, target)


def assert_same_run(one, two):
    """Metrics, but for the speed, and weights of two output folders are equal bit for bit."""
    lines = [[r | {"tokens_per_second": 0} for r in read(f / "metrics.jsonl")] for f in (one, two)]
    assert lines[0] == lines[1]
    found = weights(two)
    assert all(torch.equal(value, found[name]) for name, value in weights(one).items())


def stop_after(monkeypatch, step):
    """SIGTERM reaches this process when the run logs `step`."""
    write = train_sft.Log.write

    def patched(log, record):
        write(log, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_sft.Log, "write", patched)


def padded_logprobs(model, rows):
    """(sums of ln p, tokens) [len(rows)] of (ids, first, end) by one pass over a padded batch."""
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, first, end) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, first:end] = ids[i, first:end]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return -nll.sum(1), (labels != -100).sum(1)


def whole_rows(path, folder):
    """(ids, first, end) of every answer of a file after its prompt, the last turn supervised."""
    tokenizer = data.ChatTokenizer(folder)
    examples, _ = data.load_examples([str(path)], tokenizer, "last", keep_all=True)
    return [(e.ids.tolist(), *e.spans[0][:2]) for e in examples]


PLAIN = ["--steps", 3, "--learning_rate", 1e-3, "--weight_decay", 0.1, "--schedule", "constant",
         "--warmup", 0, "--max_grad_norm", 1, "--micro_tokens", 150]


def compare_with_plain_loop(records, theirs, frozen, rows, loss_of, ours):
    """Train a transformers model beside a live reference and compare it with a run of ours.

    loss_of(policy, reference, tokens) [rows] each -> loss, and metrics that the run must show.
    """
    theirs.train()
    # SmolLM2 pads with the token that ends a turn; transformers then drops that row's gradient
    theirs.model.embed_tokens.padding_idx = None
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for record in records:
        with torch.no_grad():
            r, _ = padded_logprobs(frozen, rows)
        p, n = padded_logprobs(theirs, rows)
        loss, metrics = loss_of(p, r, n)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-8)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for name, value in metrics.items():
            assert record[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-4), name
        optimizer.step()
        optimizer.zero_grad()
    wanted = dict(theirs.named_parameters())
    for name, p in modeling.load(ours).named_parameters():
        # Adam scales each gradient by its own size: where it is near rounding, a part of a step
        # (1e-3) may differ; a key's bias shifts all scores alike, its gradient is only rounding
        off = (p - wanted[name]).abs()
        if "k_proj.bias" not in name:
            assert off.mean() < 1e-6 and off.max() < 4e-4, name


def trl_loss(kind, rows, policy, reference, folder, **flags):
    """The loss that TRL's trainer of this kind (DPO, KTO) computes for some rows at once."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), beta=0.2, max_length=None, report_to=[], use_cpu=True, bf16=False,
        per_device_train_batch_size=len(rows), **flags)
    trainer = getattr(trl, f"{kind}Trainer")(
        load(policy), load(reference), args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(reference))
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.eval(), batch).item()


# -------------------------------------------------------------------------------------------- labs

CHARACTERS = [chr(0x4E00 + k) for k in range(2000)]


def sentence(rng, size):
    """Random Chinese characters."""
    return "".join(rng.choice(CHARACTERS) for _ in range(size))


def asked(question, answer, **extra):
    """A row of one question and its answer."""
    return {"messages": [user(question), assistant(answer)], **extra}


def run_lab(name, files, *flags, output=None):
    """(rows written, stdout) of a lab that must succeed."""
    output = Path(output or Path(files[0]).with_name(f"{name}.out.jsonl"))
    status, out, err = command(f"labs/{name}.py", *files, "--output", output, *flags)
    assert (status, err) == (0, ""), err
    return read(output), out


def write_exam(folder):
    """Twenty random questions in C-Eval's layout; returns (question, options) of each."""
    rng, rows = random.Random(7), []
    (folder / "val").mkdir(parents=True)
    (folder / "test").mkdir()
    for split, answer in (("val", ",B"), ("test", "")):
        lines = ["id,question,A,B,C,D" + (",answer" if answer else "")]
        for k in range(10):
            text, options = sentence(rng, 30), [sentence(rng, 4) for _ in range(4)]
            lines.append(",".join([str(k), f'"{text}，\r\n____。"', *options]) + answer)
            rows.append((text, options))
        (folder / split / f"law_{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    return rows


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2 checkpoint."""
    folder = tmp_path_factory.mktemp("qwen")
    make_checkpoint(folder, "qwen2")
    return folder
