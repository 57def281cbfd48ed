"""What all tests share: one thread (the same sums in every process), rows, running scripts."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train_sft

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    return [*start, script.__file__, "--output_dir", str(work / name), *map(str, flags)]


def train(work, name, *flags, ranks=1, status=0, script=train_sft):
    """Run it, in this process unless it has several ranks; returns its metrics and its output."""
    if ranks > 1:
        done = subprocess.run(launcher(work, name, *flags, ranks=ranks, script=script),
                              capture_output=True, text=True, cwd=work)
        code, text = done.returncode, done.stdout + done.stderr
    else:
        code, text = run_here(launcher(work, name, *flags, script=script)[1:], script)
    assert code == status, text
    path = work / name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return records, text


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
