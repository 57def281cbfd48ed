"""Learning from rewards: weights, gradients and rollouts against independent computations."""

import json
import shutil
import signal
import subprocess
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from conftest import curve, environment, jsonl, launcher, perturbed, train, weights

import data
import model as modeling
import train_sft
from labs import rl
from labs.rewards import load_prompts

HARDWARE = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
DRAW = modeling.Sampling(temperature=1.0)
REWARDS = [[1.0, 0.0, 0.0, 1.0, 0.5]]
ASK = [{"prompt": text, "response": "a"} for text in ("a b", "the sea", "光", "moon on the river")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    families.make_checkpoint(folder / "base", "smollm2")
    # A random model hardly ever ends: here every third token ends an answer.
    stops = list(range(0, data.ChatTokenizer(folder / "base").vocab_size, 3))
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    perturbed(folder / "base", folder / "other")
    jsonl(folder / "ask.jsonl", *ASK)
    (folder / "reward.py").write_text(
        "def vowels(messages, answer, reference):\n    return sum(x in 'aeiou' for x in answer)\n"
        "def short(messages, answer, reference):\n    return -len(answer)\n")
    return folder


def flags(work, **more):
    given = {"model": work / "base", "data": work / "ask.jsonl", "batch_size": 2, "samples": 4,
             "steps": 4, "max_new_tokens": 6, "learning_rate": 1e-3, "log_every": 1,
             "reward": f"{work / 'reward.py'}:vowels", **more}
    out = []
    for name, value in given.items():
        out += [f"--{name}", value]
    return out


def config(work, **more):
    return train_sft.resolve_config(rl.Config, [str(x) for x in flags(work, **more)], {}, dict)


# -------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("kind,expected", [
    ("rloo", [0.625, -0.625, -0.625, 0.625, 0.0]), ("dr_grpo", [0.5, -0.5, -0.5, 0.5, 0.0]),
    ("grpo", [0.999800, -0.999800, -0.999800, 0.999800, 0.0])])
def test_advantage_compares_an_answer_to_its_rivals(kind, expected):
    found = rl.advantages(torch.tensor(REWARDS), kind)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_rloo_is_the_reward_less_the_mean_of_the_other_answers():
    rewards = torch.rand(3, 5)
    for row, found in zip(rewards.tolist(), rl.advantages(rewards, "rloo").tolist(), strict=True):
        for i, value in enumerate(found):
            others = row[:i] + row[i + 1 :]
            assert value == pytest.approx(row[i] - sum(others) / 4, abs=1e-6)


def test_equal_rewards_teach_nothing_and_grpo_does_not_blow_up_their_kl():
    """With KL in the reward before the division by std, A would be +-1 for a KL of 0.001."""
    k1 = torch.tensor([[0.001, -0.001, 0.0, 0.0]])
    for kind in ("rloo", "grpo", "dr_grpo"):
        c = SimpleNamespace(advantage=kind, kl=0.1)
        assert rl.answer_weights(torch.ones(1, 4), 0 * k1, c).abs().max() == 0
        assert rl.answer_weights(torch.ones(1, 4), k1, c).abs().max() < 2e-4


def test_equal_rewards_teach_nothing_however_large_they_are(work):
    """In fp32 the mean of seven times 100.3 is off by 8e-6, and GRPO's 1e-4 makes that 0.07."""
    c = config(work, max_new_tokens=1)
    run, tokenizer, policy, _ = prepared(work, c)
    tokenizer.stop_ids = range(tokenizer.vocab_size)  # every answer ends, and gets the reward
    _, rewards = rl.sample(policy, run.train[:1], 7, 0, DRAW, c, tokenizer, lambda *_: 100.3,
                           HARDWARE)
    for kind in ("rloo", "grpo", "dr_grpo"):
        assert rl.advantages(rewards, kind).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_advantages_equal_those_of_trl(work, tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "base" / "tokenizer.json"))
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.25, 1.0]
    trainer_class, config_class = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig),
                                   "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}[kind]
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(work / "base"), lambda completions, **_: rewards,
        args=config_class(str(tmp_path), max_steps=1, per_device_train_batch_size=8, beta=0.0,
                          num_generations=4, max_completion_length=3, report_to=[], use_cpu=True,
                          bf16=False, save_strategy="no", disable_tqdm=True),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "the sea"] * 2}),
        processing_class=tokenizer)
    trainer.train()
    ours = rl.advantages(torch.tensor(rewards).view(-1, 4), kind).flatten().tolist()
    assert list(trainer._logs["advantages"]) == pytest.approx(ours, abs=1e-6)


# ------------------------------------------------------------------------------- the gradient


def example(prompt, answer):
    ids = np.array(prompt + answer, dtype=np.int32)
    return data.Example(ids, ((len(prompt), len(ids), 1.0),))


def exact_setting(kl):
    """A model of 5 tokens, all its answers of at most 2 tokens to a prompt, and their rewards.

    Token 0 ends an answer. There are 1 + 4 * 5 of them, and they are all there are.
    """
    source = {"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    model = modeling.Llama(modeling.read_config(source))
    model.initialize(0)
    other = modeling.Llama(modeling.read_config(source))
    other.initialize(1)
    answers = [[0]] + [[a, b] for a in range(1, 5) for b in range(5)]
    rewards = torch.rand(len(answers), generator=torch.Generator().manual_seed(0))
    examples = [example([3, 1], ids) for ids in answers]
    c = SimpleNamespace(advantage="rloo", kl=kl, micro_tokens=64, batch_size=0, seed=0,
                        neftune_alpha=0.0)
    return model, other, examples, rewards, c


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_expected_gradient_over_all_answers_is_the_exact_policy_gradient(kl):
    """Every pair of answers (n = 2) with its probability: RLOO's mean is grad (E R - kl KL)."""
    model, other, examples, rewards, c = exact_setting(kl)
    p = rl.sum_logprobs(model, examples, c, HARDWARE)
    k1 = p - rl.sum_logprobs(other, examples, c, HARDWARE)
    assert p.exp().sum().item() == pytest.approx(1, abs=1e-6)

    weighted, scaler = [], HARDWARE.make_scaler()
    for i, first in enumerate(examples):
        for j, second in enumerate(examples):
            pair = [i, j]
            a = rl.answer_weights(rewards[None, pair], k1[None, pair], c)[0] * p[pair].sum().exp()
            for e, weight in zip((first, second), a.tolist(), strict=True):
                (start, end, _), = e.spans
                weighted.append(e._replace(spans=((start, end, weight),)))
    step = SimpleNamespace(train=weighted, step=lambda *_: [(k, 0) for k in range(len(weighted))])
    train_sft.backward_step(model, step, 1, c, HARDWARE, scaler, 2.0)  # the mean of a pair
    found = gradients(model)

    model.zero_grad()
    batch = data.collate(examples)
    logp = model(batch.ids, batch.lengths, batch.targets).split([e.targets for e in examples])
    logp = torch.stack([part.sum() for part in logp])
    reference = (p - k1).detach()
    goal = (logp.exp() * (rewards - kl * (logp - reference))).sum()  # E R - kl KL(p || ref)
    (-goal).backward()
    for name, value in gradients(model).items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def test_k1_weighs_every_answer_by_how_much_likelier_it_is_than_under_the_reference():
    """With p = (.5, .3, .2), ref = (.2, .3, .5) its mean is KL(p || ref) = 0.274887."""
    p, ref = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    c = SimpleNamespace(advantage="dr_grpo", kl=0.1)
    k1 = (p / ref).log()
    found = rl.answer_weights(torch.zeros(1, 3), k1, c)  # -kl (k1 - its mean): here that is 0
    assert found[0].tolist() == pytest.approx([-0.0916291, 0.0, 0.0916291], abs=1e-6)
    assert (p * -found / c.kl).sum().item() == pytest.approx(0.274887, abs=1e-6)


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo"])
def test_gradient_of_a_step_equals_that_of_a_plain_transformers_loop(work, kind, kl):
    """The KL is measured to another model than the one that is trained."""
    from transformers import AutoModelForCausalLM

    c = config(work, advantage=kind, temperature=0.7, micro_tokens=40, kl=kl)
    run, tokenizer, policy, _ = prepared(work, c)
    reference = modeling.load(work / "other")
    rl.temper(reference, c.temperature)

    def reward(messages, answer, expected, where):
        return float(len(answer) % 3)

    prompts = [run.train[i] for i, _ in run.step(1, 2)]
    drawn, rewards = rl.sample(policy, prompts, 4, 0, DRAW, c, tokenizer, reward, HARDWARE)
    _, metrics = rl.policy_step(policy, run, 1, c, HARDWARE, HARDWARE.make_scaler(), policy,
                                reference, tokenizer, reward)

    theirs, other = (AutoModelForCausalLM.from_pretrained(work / name).float()
                     for name in ("base", "other"))
    theirs.model.embed_tokens.padding_idx = None  # a sampled pad is a token like any other

    def logprob(model, e):
        ids, start = torch.tensor([e.ids.tolist()]), e.spans[0][0]
        logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        return logp[start - 1 :].gather(1, ids[0, start:, None]).sum()

    with torch.no_grad():
        k1 = torch.stack([logprob(theirs, e) - logprob(other, e) for e in drawn]).view(-1, 4)
    A, penalty = (x - x.mean(1, keepdim=True) for x in (rewards, kl * k1))
    A = {"rloo": (A - penalty) * 4 / 3, "dr_grpo": A - penalty,
         "grpo": A / (rewards.std(1, keepdim=True) + 1e-4) - penalty}[kind]
    assert A.any() and k1.std() > 0.01
    assert metrics["kl"] == pytest.approx(k1.mean().item(), abs=1e-5)  # nats per answer
    N = 8 * c.max_new_tokens if kind == "dr_grpo" else sum(e.targets for e in drawn)
    for e, weight in zip(drawn, A.flatten().tolist(), strict=True):
        (-weight * logprob(theirs, e) / N).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, value in gradients(policy).items():
        assert (value - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def prepared(work, c):
    """(run, tokenizer, policy, reference) as `main` makes them."""
    tokenizer = data.ChatTokenizer(work / "base")
    run, _ = train_sft.prepare_data(c, lambda f: load_prompts(f, tokenizer, c, True, 8), True)
    models = [modeling.load(work / "base") for _ in range(2)]
    for model in models:
        rl.temper(model, c.temperature)
    return run, tokenizer, *models


def test_ratio_of_every_token_is_exactly_1_in_the_step_that_trains_on_it(work, monkeypatch):
    """So PPO's clipped objective has the same gradient, and there is nothing to clip."""
    c = config(work, temperature=1.3, micro_tokens=50)
    run, tokenizer, policy, reference = prepared(work, c)
    scored = {"trained": [], policy: [], reference: []}

    def spy(model, name):
        def call(*arguments, **options):
            scored[name].append(model(*arguments, **options))
            return scored[name][-1]
        return call

    real = rl.sum_logprobs
    monkeypatch.setattr(rl, "sum_logprobs", lambda model, *rest: real(spy(model, model), *rest))
    rl.policy_step(spy(policy, "trained"), run, 1, c, HARDWARE, HARDWARE.make_scaler(), policy,
                   reference, tokenizer, lambda *_: 0.5)
    trained, sampled, other = (torch.cat(parts) for parts in scored.values())
    assert len(scored["trained"]) > 1 and len(trained) > 8
    assert ((trained - sampled).exp() == 1).all()
    assert torch.equal(sampled, other)  # nothing is trained yet


def test_flat_is_the_share_of_prompts_whose_answers_score_alike(work, monkeypatch):
    c = config(work)
    run, tokenizer, policy, reference = prepared(work, c)
    real, rewards = rl.sample, torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.5]])
    monkeypatch.setattr(rl, "sample", lambda *given: (real(*given)[0], rewards))
    _, metrics = rl.policy_step(policy, run, 1, c, HARDWARE, HARDWARE.make_scaler(), policy,
                                reference, tokenizer, lambda *_: 0.0)
    assert metrics["flat"] == 0.5 and metrics["reward"] == 5.5 / 8


def test_pass_rates_are_of_greedy_answers_of_samples_and_of_the_best_of_them(monkeypatch):
    found = {0.0: torch.tensor([[1.0], [0.0]]),
             1.0: torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]])}
    asked = []

    def sample(policy, prompts, n, first, how, *rest):
        asked.append((prompts, n, how))
        return [], found[how.temperature]

    monkeypatch.setattr(rl, "sample", sample)
    c, run = SimpleNamespace(samples=4, seed=3), SimpleNamespace(validation=["p", "q"])
    rates = rl.pass_rates(None, run, c, None, None, HARDWARE)
    assert rates == {"greedy": 0.5, "pass@1": 1.5 / 8, "pass@4": 0.75}
    assert [(prompts, n) for prompts, n, _ in asked] == [(["p", "q"], 1), (["p", "q"], 4)]
    assert asked[1][2].seed != c.seed  # training draws with that one


def test_tokens_are_drawn_from_the_policy_that_is_scored(work):
    """At temperature 0.2: shares of 4,000 first tokens against the probabilities that are trained.

    A wrong temperature would move the likeliest token's share by more than 0.1.
    """
    c = config(work, temperature=0.2, max_new_tokens=1, micro_tokens=10**6)
    run, tokenizer, policy, _ = prepared(work, c)
    prompt = run.train[0]
    drawn, _ = rl.sample(policy, [prompt], 4000, 0, DRAW, c, tokenizer, lambda *_: 0.0, HARDWARE)
    last = [int(e.ids[-1]) for e in drawn]
    top = max(set(last), key=last.count)
    share = last.count(top) / 4000
    p = rl.sum_logprobs(policy, [example(prompt.ids, [top])], c, HARDWARE).exp().item()
    assert 0.05 < p < 0.95 and share == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


def test_answers_depend_on_their_number_not_on_their_batch(work):
    c = config(work, micro_tokens=10**6)
    run, tokenizer, policy, _ = prepared(work, c)
    rest = DRAW, c, tokenizer, lambda *_: 0.0, HARDWARE
    whole, _ = rl.sample(policy, run.train, 2, 16, *rest)
    c.micro_tokens = 1
    parts, _ = rl.sample(policy, run.train[3:], 2, 22, *rest)
    assert [e.ids.tolist() for e in parts] == [e.ids.tolist() for e in whole[6:]]
    assert len({e.ids.tobytes() for e in whole}) > 4


def test_unfinished_answer_gets_reward_0_and_no_forced_end(work):
    c = config(work, max_new_tokens=2)
    run, tokenizer, policy, _ = prepared(work, c)
    drawn, rewards = rl.sample(policy, run.train[:1], 64, 0, DRAW, c, tokenizer, lambda *_: 5.0,
                               HARDWARE)
    ended = [e.ids[-1] in tokenizer.stop_ids for e in drawn]
    assert rewards[0].tolist() == [5.0 if end else 0.0 for end in ended]
    assert True in ended and False in ended
    assert {e.targets for e in drawn if e.ids[-1] not in tokenizer.stop_ids} == {2}


# -------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(work):
    return train(work, "whole", *flags(work), script=rl)


def test_training_raises_the_reward_and_logs_what_happens(work):
    records, said = train(work, "more", *flags(
        work, steps=25, batch_size=4, samples=8, learning_rate=3e-3, log_every=20), "--val_data",
        work / "ask.jsonl", script=rl)
    first = sum(r["reward"] for r in records[:5])
    assert sum(r["reward"] for r in records[-5:]) > first + 1
    assert {"reward", "kl", "length", "ended", "flat", "grad_norm"} <= records[0].keys()
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5) and records[-1]["kl"] > 0.01
    assert "pass@8" in said and "greedy" in said


def test_policy_and_reference_have_the_same_temperature(work, whole):
    """Without it in one of them the KL would not begin at 0; without both nothing would differ."""
    records, _ = train(work, "cold", *flags(work, temperature=0.7, steps=1), script=rl)
    assert records[0]["kl"] == 0 and whole[0][0]["kl"] == 0
    names = ("reward", "length", "loss")
    assert [records[0][k] for k in names] != [whole[0][0][k] for k in names]


def test_every_step_draws_with_numbers_of_its_own(work, monkeypatch):
    real, numbers = rl.sample, []
    monkeypatch.setattr(rl, "sample", lambda policy, prompts, n, first, *rest: (
        numbers.append((len(prompts), n, first)), real(policy, prompts, n, first, *rest))[1])
    train(work, "numbers", *flags(work, steps=3), script=rl)
    assert numbers == [(2, 4, 0), (2, 4, 8), (2, 4, 16)]


def test_killed_run_resumes_bitwise(work, whole):
    process = subprocess.Popen(launcher(work, "killed", *flags(work, save_every=1), script=rl),
                               cwd=work, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    records, _ = train(work, "killed", "--resume", script=rl)
    names = ("loss", "reward", "kl", "length")
    assert [[r[k] for k in names] for r in records] == [[r[k] for k in names] for r in whole[0]]
    for name, value in weights(work / "whole").items():
        assert torch.equal(value, weights(work / "killed")[name]), name


def test_two_ranks_equal_one(work, whole):
    records, _ = train(work, "ranks", *flags(work), ranks=2, script=rl)
    assert [r["reward"] for r in records] == [r["reward"] for r in whole[0]]
    assert [r["length"] for r in records] == [r["length"] for r in whole[0]]
    assert curve(records) == pytest.approx(curve(whole[0]), abs=1e-4)


@pytest.mark.parametrize("more,words", [
    ({"top_p": 0.9}, "--neftune_alpha: they train another policy"), ({"top_k": 5}, "--top_k"),
    ({"samples": 1}, "--samples must"),
    ({"kl": -1}, "--kl"), ({"reward": "best"}, "exam, match or FILE.py:function"),
    ({"reward": "nowhere.py:f"}, "nowhere.py:f"), ({"neftune_alpha": 5}, "--neftune_alpha"),
    ({"temperature": 0.0}, "--temperature"), ({"max_length": 8}, "--max_length 8"),
    ({"lora_rank": 2, "lora_dropout": 0.5}, "--lora_dropout"),
    ({"max_new_tokens": 0}, "--max_new_tokens")])
def test_bad_flags_end_with_one_line(work, more, words):
    _, said = train(work, "bad", *flags(work, **more), status=2, script=rl)
    assert words in said and said.count("\n") == 1


def test_missing_function_and_raw_text_are_named(work, tmp_path):
    _, said = train(tmp_path, "bad", *flags(work, reward=f"{work / 'reward.py'}:tall"), status=2,
                    script=rl)
    assert "has no function 'tall'" in said
    path = jsonl(tmp_path / "raw.jsonl", {"text": "the sea"})
    _, said = train(tmp_path, "bad", *flags(work, data=path), status=2, script=rl)
    assert "raw.jsonl line 1: raw text asks nothing" in said


@pytest.mark.parametrize("reward,row", [
    ("match", {"prompt": "a"}), ("final", {"prompt": "a"}), ("exam", {"prompt": "a"}),
    ("match", {"prompt": "a", "response": " "}), ("exam", {"prompt": "a", "response": "yes"})])
def test_row_that_its_reward_cannot_compare_with_is_refused_before_training(work, tmp_path, reward,
                                                                            row):
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": "b", "response": "B"}, row)
    _, said = train(tmp_path, "bad", *flags(work, data=path, reward=reward), status=2, script=rl)
    assert f"--reward {reward}, {path} line 2: the row has no reference" in said
    assert said.count("\n") == 1 and not (tmp_path / "bad").exists()


def test_reward_that_fails_is_told_with_the_row_by_whichever_rank_has_it(work, tmp_path):
    (tmp_path / "bad.py").write_text(
        "import os\ndef f(*_):\n    return 1 / (os.environ['RANK'] != '1')\n")
    _, said = train(tmp_path, "bad", *flags(work, reward=f"{tmp_path / 'bad.py'}:f"), ranks=2,
                    status=1, script=rl)
    (line,) = [line for line in said.splitlines() if "ZeroDivisionError" in line]
    assert line.startswith(f"rl.py: --reward {tmp_path / 'bad.py'}:f, {work / 'ask.jsonl'} line ")


def test_rewards_that_count_are_printed_as_numbers_and_shares_in_percent(work, tmp_path):
    (tmp_path / "r.py").write_text("def many(*_):\n    return 161\ndef one(*_):\n    return 1\n")
    for name, cell in (("many", "161.000"), ("one", "100.0%")):
        _, said = train(tmp_path, name, *flags(
            work, reward=f"{tmp_path / 'r.py'}:{name}", steps=1, max_new_tokens=40),
            "--val_data", work / "ask.jsonl", script=rl)
        assert said.splitlines()[-1].split() == ["pass@4", cell, cell]


def test_chosen_answer_of_a_pair_is_the_reference(work, tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "yes", "rejected": "no"})
    c = config(work, data=path)
    prompts, _ = load_prompts([path], data.ChatTokenizer(work / "base"), c, True, 8)
    assert [p.reference for p in prompts] == ["yes"]
    assert json.dumps(prompts[0].messages) == '[{"role": "user", "content": "a"}]'


def test_tools_of_a_row_stand_in_its_prompt(work, tmp_path):
    """As `eval.py generate` asks the same row: without them nothing could be called."""
    shutil.copytree(work / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools[0].function.name }}{% endif %}" + data.TEMPLATES["chatml"])
    row = {"prompt": "a", "response": "b", "tools": [{"name": "weather"}]}
    path, tokenizer = jsonl(tmp_path / "rows.jsonl", row), data.ChatTokenizer(tmp_path / "base")
    ((prompt,), _) = load_prompts([path], tokenizer, config(work, data=path), True, 8)
    assert tokenizer.decode(prompt.ids).startswith("weather<|im_start|>user")
