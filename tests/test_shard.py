"""Models dealt to several ranks, and jobs that are stopped and started again."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time

import conftest
import families
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401 (here once, not in each forked process)
import transformers
from conftest import assistant, curve, jsonl, train, user, weights, write_pairs

import data
import model as modeling
import train_dpo
import train_sft
from labs import kto, rl

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 11), reason="--shard needs torch 2.11")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny checkpoints, untied and tied, conversations, preferences, an exam."""
    folder, rng = tmp_path_factory.mktemp("shard"), random.Random(0)
    families.make_checkpoint(folder / "qwen2", "qwen2", dtype=torch.bfloat16)
    families.make_checkpoint(folder / "qwen3", "qwen3")
    for name, count in (("rows", 12), ("val", 3)):
        jsonl(folder / f"{name}.jsonl", *(
            {"messages": [user(conftest.some_words(rng, 12)),
                          assistant(conftest.some_words(rng, 3 + i % 20))]} for i in range(count)))
    write_pairs(folder / "pairs.jsonl", 8)
    conftest.write_exam(folder / "exam")
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing them takes longer than these runs."""
    monkeypatch.setattr(train_sft, "draw", lambda *_: None)


BASIC = ["--steps", 4, "--batch_size", 6, "--learning_rate", 1e-3, "--log_every", 1]
NOISE = ["--neftune_alpha", 5, "--dropout", 0, 0.1, "--micro_tokens", 40]


def inputs(work, family="qwen2", file="rows.jsonl"):
    return ["--model", work / family, "--data", work / file]


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def fork(task, ranks=2):
    """Call task() in forked processes that can find each other; their exit statuses."""
    port = free_port()

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port))
        task()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()  # nothing to a process that has ended
    return [process.exitcode for process in processes]


def train2(work, name, *flags, script=train_sft, ranks=2, status=0):
    """What conftest.train does, on ranks that need not import torch anew."""
    log = work / f"{name}.log"

    def run():
        with open(log, "a") as out, contextlib.redirect_stdout(out):
            sys.argv = [script.__file__, "--output_dir", str(work / name), *map(str, flags)]
            with data.one_line_errors():
                script.main()

    assert fork(run, ranks) == [status] * ranks, log.read_text()
    return conftest.steps(work / name), log.read_text()


def die_after(monkeypatch, step):
    """A power cut on all ranks when the run has logged `step`."""
    write = train_sft.Log.write

    def patched(log, record):
        write(log, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(train_sft.Log, "write", patched)


# ------------------------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def reference(work):
    """One rank that holds everything."""
    return train(work, "one", *inputs(work), *BASIC, *NOISE)[0]


def norms(records):
    return [record["grad_norm"] for record in records]


def test_sharded_curve_checkpoint_validation_and_exam_are_those_of_ddp(work):
    flags = [*inputs(work), *BASIC, *NOISE, "--val_data", work / "val.jsonl", "--exam_data",
             work / "exam"]
    (ddp, _), (fsdp, _) = (train2(work, name, *flags, *extra)
                           for name, extra in (("ddp", []), ("fsdp", ["--shard"])))
    assert curve(fsdp) == pytest.approx(curve(ddp), abs=1e-5)
    assert norms(fsdp) == pytest.approx(norms(ddp), rel=1e-4)
    assert fsdp[-1]["val_loss"] == pytest.approx(ddp[-1]["val_loss"], abs=1e-5)
    assert fsdp[-1]["exams"] == ddp[-1]["exams"]

    names = [sorted(p.name for p in (work / name).iterdir()) for name in ("ddp", "fsdp")]
    assert names[0] == names[1]
    a, b = weights(work / "ddp"), weights(work / "fsdp")
    assert all(a[key].dtype == b[key].dtype and a[key].shape == b[key].shape for key in a | b)
    transformers.AutoModelForCausalLM.from_pretrained(work / "fsdp")


def test_sharded_curve_of_a_tied_model_is_that_of_one_rank(work):
    flags = [*inputs(work, "qwen3"), *BASIC, *NOISE]
    one, two = train(work, "tied", *flags)[0], train2(work, "tied2", *flags, "--shard")[0]
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    assert norms(two) == pytest.approx(norms(one), rel=1e-4)


@pytest.mark.parametrize("script,file", [(train_dpo, "pairs.jsonl"), (kto, "pairs.jsonl")])
def test_sharded_preferences_are_those_of_one_rank(work, script, file):
    """With the reference, whose log-probabilities come from a sharded model too."""
    flags = [*inputs(work, file=file), *BASIC, *NOISE, "--steps", 2, "--val_data", work / file]
    one, _ = train(work, script.__name__, *flags, script=script)
    two, _ = train2(work, script.__name__ + "2", *flags, "--shard", script=script)
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4, abs=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("merge", [[], ["--lora_merge"]])
def test_sharded_adapter_beside_a_base_in_bf16_is_that_of_one_rank(work, merge):
    flags = [*inputs(work), *BASIC, *NOISE, "--steps", 2, "--lora_rank", 4, "--lora_dropout", 0.1,
             *merge]
    name = f"lora{len(merge)}"
    one, _ = train(work, name, *flags)
    two, _ = train2(work, name + "x2", *flags, "--shard")
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    a, b = (modeling.load(work / f, torch.float32) for f in (name, name + "x2"))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-2)


def test_sharding_works_with_compiled_layers_and_recomputed_activations(work, monkeypatch):
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # imports what both ranks need
    compile_layers = modeling.Llama.compile_layers
    monkeypatch.setattr(modeling.Llama, "compile_layers",
                        lambda model: compile_layers(model, backend="eager"))
    records, _ = train2(work, "compiled", *inputs(work), *BASIC, "--shard", "--compile",
                        "--checkpoint_activations", "--steps", 1)
    whole, _ = train(work, "not compiled", *inputs(work), *BASIC, "--steps", 1)
    assert curve(records) == pytest.approx(curve(whole), abs=1e-5)
    assert norms(records) == pytest.approx(norms(whole), rel=1e-4)


def test_ranks_with_unequal_numbers_of_passes_do_not_hang(work, reference, monkeypatch):
    """The first rank gets all the work, one example at a time."""
    monkeypatch.setattr(data, "micro_batches", lambda lengths, *_: [
        [[i] for i in range(len(lengths))], []])
    records, _ = train2(work, "unequal", *inputs(work), *BASIC, *NOISE, "--shard",
                        "--val_data", work / "val.jsonl")
    assert curve(records) == pytest.approx(curve(reference), abs=1e-5)


def test_new_turn_end_is_added_to_a_sharded_model(work):
    flags = [*inputs(work), "--steps", 2, "--eot", "<|end|>", "--learning_rate", 1e-3]
    one, _ = train(work, "token", *flags)
    two, _ = train2(work, "token2", *flags, "--shard")
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    assert len(weights(work / "token2")["lm_head.weight"]) % 2  # an odd number of rows


def gradients(model, autocast):
    """Log-probabilities and all gradients of one batch, as one vector each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (60,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = model(ids, [20, 25, 15], torch.arange(1, 60, 4))
    (-logp.mean()).backward()
    grads = [modeling.whole(p.grad).flatten() for p in model.parameters()]
    return logp.detach(), torch.cat(grads)


def load_sharded(folder, dtype=torch.float32, **options):
    dist.init_process_group("gloo")
    return modeling.load(folder, shard=lambda model: train_sft.shard_model(model, dtype), **options)


def leave():
    """As Hardware.leave does."""
    dist.barrier()
    os._exit(0)


def test_bf16_of_a_sharded_model_strays_from_fp32_no_farther_than_autocast(work):
    """The checkpoint is stored in bf16: then the cast of a weight loses nothing, under both."""

    def compare():
        dealt = gradients(load_sharded(work / "qwen2", torch.bfloat16), True)
        plain = gradients(modeling.load(work / "qwen2"), True)
        exact = gradients(modeling.load(work / "qwen2"), False)
        for a, b, c in zip(exact, plain, dealt, strict=True):
            assert 0 < (c - a).norm() <= 1.001 * (b - a).norm()
        leave()

    assert fork(compare) == [0, 0]


def test_fp16_with_its_scaler_follows_fp32_when_sharded(work, reference):
    records, _ = train2(work, "fp16", *inputs(work), *BASIC, *NOISE, "--shard", "--dtype",
                        "fp16")
    assert curve(records) != curve(reference)
    assert curve(records) == pytest.approx(curve(reference), rel=2e-2)


def test_rank_holds_its_rows_of_every_weight_and_together_they_are_the_checkpoint(work):
    """Of an odd number of rows too, which a new token makes."""

    def check():
        stored = weights(work / "qwen2")
        size = len(stored["lm_head.weight"])
        assert size % 2 == 0
        model = load_sharded(work / "qwen2", new_token=(size, 5))
        held = total = 0
        for name, p in model.named_parameters():
            held, total = held + p.to_local().numel(), total + p.numel()
            wanted = stored[name].float()
            if len(p) > size:
                wanted = torch.cat((wanted, wanted[5:6]))
            assert torch.equal(p.full_tensor(), wanted), name
        assert 0.49 * total < held < 0.51 * total
        leave()

    assert fork(check) == [0, 0]


# --------------------------------------------------------------------------------------- long jobs


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_killed_run_resumes_with_another_number_of_ranks(
        work, reference, monkeypatch, before, after):
    """Sharded where there are two. The state is in several files, as that of a large model is."""
    name, flags = f"killed {before}", [*inputs(work), *BASIC, *NOISE, "--save_every", 2]
    monkeypatch.setattr(modeling, "SHARD_BYTES", 200_000)
    with monkeypatch.context() as patch:
        die_after(patch, 3)
        train2(work, name, *flags, *["--shard"] * (before > 1), ranks=before,
               status=-signal.SIGKILL)
    (state,) = train_sft.step_folders(work / name / "state")
    assert state.name == "step-00002" and len(list(state.iterdir())) > 2
    extra = ["--shard"] if after > 1 else []
    records, _ = train2(work, name, "--resume", *extra, ranks=after)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert curve(records) == pytest.approx(curve(reference), abs=1e-5)


def test_state_that_was_not_finished_is_not_resumed_from(work, monkeypatch):
    """The disk is full, or the power gone, in the middle of the second save."""
    flags = [*inputs(work), *BASIC, "--save_every", 1]
    whole, _ = train(work, "whole", *flags)
    write = modeling.write_tensors

    def half(folder, stem, tensors, *rest):
        if stem == "state" and train_sft.step_folders(folder.parent):
            tensors = dict(list(tensors.items())[:9])
            write(folder, stem, tensors, *rest)
            raise modeling.InputError("no space left")
        return write(folder, stem, tensors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "write_tensors", half)
        train(work, "half", *flags, status=2)
    assert {p.name for p in (work / "half/state").iterdir()} == {"step-00001", "new"}
    again, _ = train(work, "half", "--resume")
    assert curve(again) == curve(whole)
    assert {p.name for p in (work / "half/state").iterdir()} == {"step-00004"}


def test_one_command_line_begins_a_run_goes_on_with_it_and_finds_it_complete(work, monkeypatch):
    flags = [*inputs(work), *BASIC, *NOISE, "--resume"]
    with monkeypatch.context() as patch:
        conftest.stop_after(patch, 2)
        train(work, "queue", *flags, status=128 + signal.SIGTERM)
    records, _ = train(work, "queue", *flags)
    assert curve(records) == curve(train(work, "at once", *inputs(work), *BASIC, *NOISE)[0])
    _, text = train(work, "queue", *flags)
    assert "is complete, all 4 steps" in text


def test_steps_of_more_than_five_digits_come_after_the_others(tmp_path):
    for name in ("step-100000", "step-99999", "step-new"):
        (tmp_path / name).mkdir()
    found = [folder.name for folder in train_sft.step_folders(tmp_path)]
    assert found == ["step-99999", "step-100000"]


def test_last_checkpoints_are_kept_and_do_not_change_with_the_current_one(work):
    flags = [*inputs(work), *BASIC, "--save_every", 1, "--schedule", "constant", "--warmup", 0]
    train(work, "kept", *flags, "--keep", 2)
    folders = train_sft.step_folders(work / "kept")
    assert [folder.name for folder in folders] == ["step-00003", "step-00004"]
    train(work, "three", *flags, "--steps", 3)  # the rate is constant: the first three steps
    for folder, wanted in zip(folders, ("three", "kept"), strict=True):
        assert {p.name for p in folder.iterdir()} == {
            p.name for p in (work / "three").iterdir()} - {
            "metrics.jsonl", "run.json", "state"}
        assert all(torch.equal(value, weights(work / wanted)[key])
                   for key, value in weights(folder).items())
    modeling.load(folders[0])
    train(work, "kept", *flags, "--overwrite")  # a new run has none of the old one's
    assert not train_sft.step_folders(work / "kept")


@pytest.mark.parametrize("flags,said", [
    (["--shard"], "here is one; start with torchrun --nproc_per_node=N"),
    (["--keep", "-1"], "--keep must be 0 or more"), (["--keep", "all"], "--keep"),
])
def test_bad_flags_end_with_one_line_and_touch_nothing(work, flags, said):
    _, text = train(work, "bad", *inputs(work), *flags, status=2)
    assert said in text and text.count("\n") == 1 and not (work / "bad").exists()


def test_resume_of_nothing_without_inputs_does_not_begin_the_demo(work):
    _, text = train(work, "typo", "--resume", status=2)
    assert "no run to go on with; with --model and --data one begins" in text
    assert text.count("\n") == 1 and not (work / "typo").exists()


def test_rl_refuses_to_shard(work):
    _, text = train(work, "rl", *inputs(work), "--shard", "--resume", status=2, script=rl)
    assert "--shard" in text and text.count("\n") == 1


def start_agent(work, port, first):
    """torchrun of one of two nodes; the first one holds the store that they meet at."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--max_restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
            f"--rdzv_conf=is_host={int(first)},keep_alive_interval=1", train_sft.__file__,
            "--output_dir", work / "nodes", *inputs(work), *BASIC, *NOISE, "--resume", "--shard",
            "--steps", 30, "--save_every", 1]
    variables = {**conftest.environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(list(map(str, argv)), cwd=work, env=variables,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.skipif("PLAINTUNE_SLOW" not in os.environ, reason="takes a minute; PLAINTUNE_SLOW=1")
def test_node_that_is_killed_and_started_again_joins_and_the_run_goes_on(work):
    """Two agents of torchrun on this machine, each with one rank."""
    port = free_port()
    first, second = start_agent(work, port, True), start_agent(work, port, False)
    while not train_sft.step_folders(work / "nodes/state"):
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout
    for process in [second.pid, *map(int, ranks.split())]:
        os.kill(process, signal.SIGKILL)
    second.wait()
    time.sleep(4)  # the first agent forgets the dead one after three missed signs of life
    second = start_agent(work, port, False)
    assert (first.wait(100), second.wait(100)) == (0, 0)
    assert [r["step"] for r in conftest.steps(work / "nodes")] == list(range(1, 31))
    whole, _ = train(work, "one node", *inputs(work), *BASIC, *NOISE, "--steps", 30)
    assert curve(conftest.steps(work / "nodes")) == pytest.approx(curve(whole), abs=1e-3)
