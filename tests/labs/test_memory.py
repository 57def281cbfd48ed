"""The estimate of memory: its formula against what autograd keeps, and what a user sees of it."""

import subprocess
import sys

import pytest
import torch
from conftest import REPO, asked, command, environment, jsonl, train
from families import make_checkpoint
from torch.autograd.graph import saved_tensors_hooks

import model as modeling
from labs import memory

LENGTHS, ANSWER = [100, 60, 60], 20  # of the examples, of their supervised ends


def bytes_kept(model, dtype):
    """Bytes of what autograd keeps of a forward pass, each storage once, but for the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # holds it, so that its place is not used again
        return tensor

    ids = torch.randint(model.config.vocab_size, (sum(LENGTHS),))
    ends = torch.tensor(LENGTHS).cumsum(0)
    targets = (ends[:, None] - torch.arange(ANSWER, 0, -1)).flatten()  # [N]
    noise = modeling.noise_keys(0, [0] * 3, [0, 1, 2], LENGTHS)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(ids, LENGTHS, targets, noise=noise)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="norms of older versions keep more")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"dropout": [0.1]}, {"lora_rank": 4},
                                   {"lora_rank": 4, "lora_dropout": 0.1}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_formula_counts_what_autograd_keeps(family, flags, dtype):
    c = memory.Config(**flags)
    config = modeling.read_config({
        "model_type": family, "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16})
    model = modeling.Llama(config)
    if c.lora_rank:
        modeling.add_adapter(model, {
            "r": 4, "lora_alpha": 8, "target_modules": modeling.PROJECTIONS,
            "lora_dropout": c.lora_dropout})
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
    model.set_dropout(c.dropout[0], c.dropout[0])
    N = ANSWER * len(LENGTHS)
    work = memory.Work(sum(LENGTHS), N, 1, 1, dtype, torch.device("cpu"))
    found = memory.terms(config, c, work)
    logits = 0 if c.lora_rank else dtype.itemsize * N * 1000  # the softmax is gone by then
    wanted = found["activations"][0] + found["copies"][0] + logits
    assert bytes_kept(model.train(), dtype) == pytest.approx(wanted, rel=0.03)


def test_recomputed_layers_keep_their_inputs_alone():
    config = modeling.read_config({
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176,
        "num_hidden_layers": 6, "num_attention_heads": 8})
    model = modeling.Llama(config).train()
    model.checkpoint_activations = True
    T, N = sum(LENGTHS), ANSWER * len(LENGTHS)
    head = N * 4 * 1000 + N * (2 * 4 + 4) * 64  # residuals, and the states around the head
    assert bytes_kept(model, torch.float32) == pytest.approx(6 * T * 4 * 64 + head, rel=0.03)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_both_trainers_say_what_they_will_take_and_how_long(script, tmp_path):
    import train_dpo
    import train_sft

    make_checkpoint(tmp_path / "base", "qwen2")
    row = asked("q", "a") if script == "sft" else {"prompt": "q", "chosen": "a", "rejected": "b"}
    _, text = train(tmp_path, "out", "--model", tmp_path / "base", "--data",
                    jsonl(tmp_path / "a.jsonl", row), "--steps", 4, "--log_every", 1,
                    script={"sft": train_sft, "dpo": train_dpo}[script])
    lines = text.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("memory per device"))
    assert "passes per step: 1, of at most T" in lines[first + 1] and "N " in lines[first + 1]
    assert lines[first + 2].split()[0] == "process"  # so small a model takes nothing else
    assert "weights " not in text and max(map(len, lines[first : first + 3])) <= 80
    assert first < next(k for k, line in enumerate(lines) if line.startswith("step 1/4"))
    assert "left ?" in text and "left 00:0" in next(x for x in lines if x.startswith("step 3/4"))


@pytest.mark.skipif(torch.version.cuda is not None,
                    reason="a CUDA build maps more libraries while it runs than the limit allows")
def test_out_of_memory_ends_with_one_line_that_names_the_flag(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    rows = jsonl(tmp_path / "a.jsonl", *(asked("q " * 900, "a " * 900) for _ in range(64)))
    # What training imports later is imported before the limit: it is about tensors.
    limit = ("import resource, sys; sys.argv = sys.argv[1:]\n"
             "import train_sft, data, torch._dynamo\n"
             "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
             "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
             "with data.one_line_errors(): train_sft.main()")
    done = subprocess.run(
        [sys.executable, "-c", limit, "train_sft.py", "--model", tmp_path / "base", "--data", rows,
         "--output_dir", tmp_path / "out", "--batch_size", "64", "--micro_tokens", "900000",
         "--steps", "1"], capture_output=True, text=True, cwd=REPO, env=environment())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "out of memory: lower --micro_tokens" in done.stderr


def test_a_run_prints_the_large_terms_and_the_command_all(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    status, out, _ = command("labs/memory.py", "--model", tmp_path / "base")
    names = [line.split()[0] for line in out.splitlines()[2:]]
    assert status == 0 and names == ["weights", "gradients", "moments", "copies", "activations",
                                     "logits", "head", "process"]
    assert max(map(len, out.splitlines())) <= 80 and out.count("GiB") == 9


def test_table_grows_with_the_model_and_shrinks_with_every_way_to_save():
    status, out, _ = command("labs/memory.py")
    table = [[int(x) for x in line.split()[1:]] for line in out.splitlines()[1:]]
    assert status == 0 and len(table) == len(memory.SHAPES)
    for plain, *ways in table:
        assert all(way < plain for way in ways)
    assert command("labs/memory.py", "--devices", 0)[0] == 2
