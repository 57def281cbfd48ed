"""Distillation: divergences, their gradients, and runs against independent computations."""

import json
import math
import signal
import subprocess

import families
import pytest
import torch
from conftest import assistant, curve, environment, jsonl, launcher, train, user, weights
from transformers import AutoModelForCausalLM

import data
import model as modeling
import train_sft
from labs import distill

HARDWARE = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5]])
ROWS = [{"prompt": "the sea", "response": text} for text in ("river runs", "moon on people", "光")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    families.make_checkpoint(folder / "teacher", "smollm2")
    families.make_checkpoint(folder / "student", "smollm2", seed=1)
    jsonl(folder / "rows.jsonl", *ROWS)
    jsonl(folder / "weighted.jsonl", *[
        {"messages": [user(row["prompt"]), assistant(row["response"], weight=weight)]}
        for row, weight in zip(ROWS, (0.5, 1.0, 0.25), strict=True)])
    return folder


def flags(work, **more):
    given = {"model": work / "student", "teacher": work / "teacher", "data": work / "rows.jsonl",
             "batch_size": 2, "steps": 4, "learning_rate": 1e-3, "log_every": 1, **more}
    out = []
    for name, value in given.items():
        out += [f"--{name}", value]
    return out


def prepared(work, **more):
    """(config, run, student, teacher)."""
    argv = [str(x) for x in flags(work, **more)]
    c = train_sft.resolve_config(distill.Config, argv, {}, dict)
    tokenizer = data.ChatTokenizer(work / "student")
    run, _ = train_sft.prepare_data(c, lambda f: data.load_examples(f, tokenizer), True)
    return c, run, modeling.load(work / "student"), modeling.load(work / "teacher")


@pytest.mark.parametrize("kind,beta,expected", [
    ("forward", 0.5, 0.558130), ("reverse", 0.5, 0.508287), ("jsd", 0.1, 0.048652),
    ("jsd", 0.5, 0.126088), ("jsd", 0.9, 0.045279)])
def test_divergence_of_three_tokens_by_hand(kind, beta, expected):
    found = distill.divergence(STUDENT, TEACHER, kind, beta).item()
    assert found == pytest.approx(expected, abs=1e-6)


def test_t_squared_keeps_the_gradient_t_times_q_less_p():
    student = STUDENT.clone().requires_grad_()
    loss = 4 * distill.divergence(student, TEACHER, "forward", temperature=2.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.595871, abs=1e-6)
    expected = 2 * ((STUDENT / 2).softmax(-1) - (TEACHER / 2).softmax(-1))
    assert torch.allclose(student.grad, expected, atol=1e-6)
    assert student.grad[0].tolist() == pytest.approx([-0.504410, 0.224066, 0.280344], abs=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergence_is_0_between_equals_and_positive_elsewhere(kind):
    assert distill.divergence(TEACHER, TEACHER + 5, kind).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(0))
    assert (distill.divergence(*logits, kind) > 0).all()


@pytest.mark.parametrize("kind,beta", [("forward", 0), ("reverse", 1), ("jsd", 0.3)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_trls_generalized_jsd_loss(kind, beta, temperature):
    pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(1))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum")
    ours = distill.divergence(student, teacher, kind, beta or 0.5, temperature).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("more", [
    {}, {"divergence": "reverse", "temperature": 2.0}, {"divergence": "jsd", "alpha": 0.3},
    {"data": "weighted.jsonl", "alpha": 0.5}, {"own": 1.0, "max_new_tokens": 5}])
def test_gradient_of_a_step_equals_that_of_a_plain_transformers_loop(work, more, monkeypatch):
    monkeypatch.setattr(distill, "LOGIT_ELEMENTS", 2500)  # a few positions at a time
    if "data" in more:
        more = {**more, "data": work / more["data"]}
    c, run, student, teacher = prepared(work, micro_tokens=30, **more)
    examples = {i: run.train[i] for i, _ in run.step(1, c.batch_size)}
    own = distill.own_answers(student, examples, 1, c, HARDWARE, [])
    assert len(own) == (len(examples) if c.own else 0)
    distill.distill_step(student, run, 1, c, HARDWARE, HARDWARE.make_scaler(), teacher, [])

    mine, theirs = (AutoModelForCausalLM.from_pretrained(work / name).float()
                    for name in ("student", "teacher"))
    mine.model.embed_tokens.padding_idx = None
    examples = [own.get(i, e) for i, e in examples.items()]
    T, total = c.temperature, 0.0
    for e in examples:
        (start, end, weight), = e.spans
        total += weight * (end - start)
    assert "data" not in more or len({e.spans[0][2] for e in examples}) == 2
    for e in examples:
        ids = torch.tensor([e.ids.tolist()])
        (start, end, weight), = e.spans
        q, p = (model(ids).logits[0, start - 1 : end - 1] for model in (mine, theirs))
        hard = -q.log_softmax(-1).gather(1, ids[0, start:end, None]).sum()
        p, q = (p / T).softmax(-1).detach(), (q / T).softmax(-1)
        m = (p + q) / 2
        soft = {"forward": p * (p / q).log(), "reverse": q * (q / p).log(),
                "jsd": (p * (p / m).log() + q * (q / m).log()) / 2}[c.divergence].sum()
        (weight * (c.alpha * hard + (1 - c.alpha) * T**2 * soft) / total).backward()
    expected = {name: p.grad for name, p in mine.named_parameters()}
    for name, p in student.named_parameters():
        assert (p.grad - expected[name]).norm() < 2e-5 * expected[name].norm(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_never_more_logits_at_once_than_a_chunk_has(work, monkeypatch):
    """In the forward pass, and in the backward pass, which computes every chunk again."""
    c, run, student, teacher = prepared(work)
    V, rows, real = len(student.head), [], distill.chunk_loss
    monkeypatch.setattr(distill, "LOGIT_ELEMENTS", 3 * V)

    def spy(mine, *rest):
        rows.append(len(mine))
        return real(mine, *rest)

    monkeypatch.setattr(distill, "chunk_loss", spy)
    _, counts = distill.distill_step(student, run, 1, c, HARDWARE, HARDWARE.make_scaler(), teacher,
                                     [])
    assert max(rows) == 3 and sum(rows) == 2 * counts["target_tokens"]


def test_own_answers_are_the_students_and_their_every_token_is_supervised(work):
    c, run, student, _ = prepared(work, own=1.0, max_new_tokens=5)
    examples = dict(enumerate(run.train))
    own = distill.own_answers(student, examples, 1, c, HARDWARE, [])
    assert own.keys() == examples.keys()
    again = distill.own_answers(student, examples, 1, c, HARDWARE, [])
    other = distill.own_answers(student, examples, 2, c, HARDWARE, [])
    for i, e in own.items():
        start = examples[i].spans[0][0]
        assert e.ids[:start].tolist() == examples[i].ids[:start].tolist()
        assert e.spans == ((start, start + 5, 1.0),) and len(e.ids) == start + 5
        assert e.ids.tolist() == again[i].ids.tolist()
    assert any(other[i].ids.tolist() != own[i].ids.tolist() for i in own)


def test_share_of_own_answers_is_that_of_the_flag(work):
    c, run, student, _ = prepared(work, own=0.5, max_new_tokens=1)
    examples = dict(enumerate(run.train))
    count = sum(len(distill.own_answers(student, examples, s, c, HARDWARE, [])) for s in range(100))
    assert abs(count - 150) < 4 * math.sqrt(300 * 0.25)


@pytest.fixture(scope="module")
def whole(work):
    return train(work, "whole", *flags(work, own=0.5, max_new_tokens=4), script=distill)


def test_student_comes_nearer_to_its_teacher(work):
    records, said = train(work, "nearer", *flags(work, steps=30, batch_size=3), script=distill)
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert "checkpoint in" in said


def test_killed_run_resumes_bitwise(work, whole):
    process = subprocess.Popen(
        launcher(work, "killed", *flags(work, own=0.5, max_new_tokens=4, save_every=1),
                 script=distill), cwd=work, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    records, _ = train(work, "killed", "--resume", script=distill)
    assert curve(records) == curve(whole[0])
    for name, value in weights(work / "whole").items():
        assert torch.equal(value, weights(work / "killed")[name]), name


def test_demo_student_has_half_the_width(work, tmp_path):
    distill.make_student(tmp_path / "half", work / "teacher")
    half, full = (modeling.load_config(f) for f in (tmp_path / "half", work / "teacher"))
    assert half.hidden_size * 2 == full.hidden_size and half.head_dim == full.head_dim
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").config.hidden_size == 32


@pytest.mark.parametrize("more,words", [
    ({"beta": 1.0}, "--beta must lie between"), ({"beta": 0.4}, "--beta is for --divergence jsd"),
    ({"alpha": 2}, "--alpha must be in [0, 1]"),
    ({"own": 1.5}, "--own must be in [0, 1]"), ({"neftune_alpha": 5}, "--neftune_alpha"),
    ({"lora_rank": 2, "lora_dropout": 0.5}, "--lora_dropout"),
    ({"own": 0.5, "alpha": 0.1}, "--alpha or --own"),
    ({"max_new_tokens": 0}, "--max_new_tokens"), ({"teacher": "nowhere"}, "nowhere")])
def test_bad_flags_end_with_one_line(work, more, words):
    _, said = train(work, "bad", *flags(work, **more), status=2, script=distill)
    assert words in said and said.count("\n") == 1


def test_teacher_of_other_tokens_is_refused(work, tmp_path):
    families.make_checkpoint(tmp_path / "other", "llama3")
    _, said = train(work, "bad", *flags(work, teacher=tmp_path / "other"), status=2, script=distill)
    assert "have different tokens" in said
    config = json.loads((work / "teacher" / "config.json").read_text())
    assert config["vocab_size"] == modeling.load_config(work / "student").vocab_size


def test_student_may_be_an_adapter_beside_a_base_in_bf16(work, tmp_path):
    families.make_checkpoint(tmp_path / "base", "smollm2", seed=1, dtype=torch.bfloat16)
    (lora, _), (whole, _) = (
        train(tmp_path, f"out{rank}", *flags(work, model=tmp_path / "base", lora_rank=rank),
              script=distill) for rank in (2, 0))
    assert curve(lora)[0] == pytest.approx(curve(whole)[0], abs=1e-4)  # B begins with 0
    assert curve(lora)[1:] != curve(whole)[1:]
