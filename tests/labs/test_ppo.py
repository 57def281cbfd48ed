"""The reward model and PPO, against plain computations and transformers."""

import json
import signal
from collections import Counter
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import PLAIN, REPO, interrupt, jsonl, perturbed, read, train, weights, write_pairs
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import data
import model as modeling
import train_dpo
import train_sft
from labs import ppo, reward_model

HARDWARE = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
REWARDS, VALUES = torch.tensor([-0.02, 0.01, 1.0]), torch.tensor([0.5, 0.6, 0.7])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A checkpoint, one a little different, pairs, and a reward model learnt from them."""
    folder = tmp_path_factory.mktemp("ppo")
    families.make_checkpoint(folder / "base", "smollm2")
    # A random model hardly ever ends: here every third token ends an answer.
    stops = list(range(0, data.ChatTokenizer(folder / "base").vocab_size, 3))
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    perturbed(folder / "base", folder / "other")
    write_pairs(folder / "pairs.jsonl", 12)
    train(folder, "reward", *inputs(folder), "--steps", 6, "--learning_rate", 3e-3,
          script=reward_model)
    return folder


def inputs(work):
    return ["--model", work / "base", "--data", work / "pairs.jsonl", "--log_every", 1]


def flags(work, **more):
    given = {"reward_model": work / "reward", "batch_size": 6, "steps": 4, "passes": 3,
             "max_new_tokens": 6, "learning_rate": 1e-3, "save_every": 2, **more}
    out = inputs(work)
    for name, value in given.items():
        out += [f"--{name}", value]
    return out


def setting(work, **more):
    """(models, the first pairs, config, tokenizer) as `main` makes them; the policy has moved."""
    c = train_sft.resolve_config(ppo.Config, [str(x) for x in flags(work, **more)], {}, dict)
    tokenizer = data.ChatTokenizer(c.model)
    pairs, _ = reward_model.load_pairs(c.data, tokenizer, c, True)
    critic, reward = (reward_model.load_scalar(work / "reward", "cpu") for _ in range(2))
    models = ppo.Models(modeling.load(work / "other"), critic, reward, modeling.load(work / "base"))
    return models, pairs[:6], c, tokenizer


def drawn(work, **more):
    """(models, config, answers, what PPO learns from them)."""
    models, pairs, c, tokenizer = setting(work, **more)
    answers = ppo.draw(models, pairs, 0, c, tokenizer.stop_ids, HARDWARE)
    return models, c, answers, ppo.lessons(answers, c)


# -------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("gamma,lam,expected", [
    (1.0, 0.95, [0.45525, 0.395, 0.3]), (1.0, 1.0, [0.49, 0.41, 0.3]),
    (0.99, 0.95, [0.436234, 0.38515, 0.3])])
def test_advantages_have_their_published_values(gamma, lam, expected):
    assert ppo.gae(REWARDS, VALUES, gamma, lam).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_advantage_is_the_discounted_sum_of_all_later_surprises(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 9)
    later = [*values.tolist()[1:], 0.0]
    surprise = [r + gamma * v - old for r, v, old in zip(rewards.tolist(), later, values.tolist(),
                                                         strict=True)]
    for t, found in enumerate(ppo.gae(rewards, values, gamma, lam).tolist()):
        plain = sum((gamma * lam) ** k * d for k, d in enumerate(surprise[t:]))
        assert found == pytest.approx(plain, abs=1e-5)


def test_clipped_loss_and_its_gradient_have_their_published_values():
    """The first token has moved far the right way and the last the wrong way: 0 and whole."""
    new = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    old, a = torch.tensor([-1.2, -1.5, -0.5, -3.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = ppo.clipped_loss(new, old, a, 0.2)
    loss.mean().backward()
    assert loss.tolist() == pytest.approx([-1.2, -0.606531, 1.0, 1.648721], abs=1e-6)
    assert new.grad.tolist() == pytest.approx([0.0, -0.151633, 0.25, 0.412180], abs=1e-6)


def test_dpo_loss_without_a_reference_is_bradley_terry():
    margin = torch.tensor([1.2 - 0.4], requires_grad=True)
    loss = train_dpo.sigmoid_loss(margin, reward_model.Config.beta)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.371101, abs=1e-6)
    assert margin.grad.item() == pytest.approx(-0.310026, abs=1e-6)


# ---------------------------------------------------------------------------- the reward model


def classifier(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).float().eval()


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "llama3"])
def test_reward_model_gives_equal_scores_as_a_sequence_classifier_of_transformers(tmp_path, family):
    """In one padded batch. SmolLM2 pads with the token that ends an answer, which would hide it."""
    from transformers import AutoTokenizer

    families.make_checkpoint(tmp_path / "base", family, style="old")
    # The file of old checkpoints names the special tokens once more.
    path = tmp_path / "base" / "tokenizer_config.json"
    end = json.loads(path.read_text())["eos_token"]
    (path.parent / "special_tokens_map.json").write_text(json.dumps({"pad_token": end}))
    write_pairs(tmp_path / "pairs.jsonl", 8)
    train(tmp_path, "reward", *inputs(tmp_path), "--steps", 2, "--learning_rate", 1e-2,
          script=reward_model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    examples, _ = data.load_examples([str(tmp_path / "pairs.jsonl")],
                                     data.ChatTokenizer(tmp_path / "reward"), "last", keep_all=True)
    ids = [{"input_ids": e.ids[: e.spans[-1][1]].tolist()} for e in examples]
    padded = tokenizer.pad(ids, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        theirs = classifier(tmp_path / "reward")(**padded).logits[:, 0]
        ours = train_dpo.all_logprobs(
            reward_model.load_scalar(tmp_path / "reward", "cpu"),
            train_dpo.load_preferences([str(tmp_path / "pairs.jsonl")], data.ChatTokenizer(
                tmp_path / "base"), 512)[0], train_dpo.Config(), HARDWARE).flatten()
    assert ours.std() > 0.01 and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family,pad", [
    ("llama3", "<|end_of_text|>"), ("llama3_1", "<|finetune_right_pad_id|>"),
    ("smollm2", "<|endoftext|>"), ("qwen3", "<|endoftext|>")])
def test_pad_of_a_reward_model_stands_in_no_text(tmp_path, family, pad):
    """TRL's get_reward, for one, takes the first pad for the end of a text: BOS would be one."""
    families.make_checkpoint(tmp_path, family)
    tokenizer = data.ChatTokenizer(tmp_path)
    model = reward_model.load_scalar(tmp_path, "cpu", new_head=True)
    assert reward_model.describe_classifier(model, tokenizer) == pad
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = data.to_examples([data.Row("", talk)], 0, Counter(), tokenizer)
    number = model.config.source["pad_token_id"]
    assert number == tokenizer.tokenizer.token_to_id(pad) and number not in example.ids


@pytest.mark.parametrize("rows", [0, 64])
def test_checkpoint_whose_only_special_token_ends_answers_is_refused(tmp_path, rows):
    """Also where the model has a row of weights to spare for the token of ChatTokenizer."""
    vocabulary = {chr(k): k for k in range(256)}
    vocabulary["<|im_end|>"] = 256
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|im_end|>", "chat_template": data.TEMPLATES["plain"]}))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=257 + rows))
    chat = data.ChatTokenizer(tmp_path)
    assert chat.stop_ids == [256] and chat.border_id == 257
    with pytest.raises(modeling.InputError, match="no added token is left to pad with"):
        reward_model.describe_classifier(model, chat)


def test_three_steps_of_the_reward_model_equal_a_plain_transformers_loop(work, tmp_path):
    from transformers import AutoModelForSequenceClassification

    records, _ = train(tmp_path, "out", *inputs(work), *PLAIN, "--batch_size", 12,
                       script=reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(work / "base", num_labels=1).float()
    # SmolLM2's pad ends an answer: transformers would read r, and pass gradients, before it.
    model.config.pad_token_id = model.model.embed_tokens.padding_idx = None
    torch.nn.init.zeros_(model.score.weight)
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    examples, _ = data.load_examples([str(work / "pairs.jsonl")], data.ChatTokenizer(work / "base"),
                                     "last", keep_all=True)
    for record in records:
        r = [model(torch.tensor([e.ids[: e.spans[-1][1]].tolist()])).logits[0, 0] for e in examples]
        loss = -torch.nn.functional.logsigmoid(torch.stack(r[::2]) - torch.stack(r[1::2])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-6)  # ln 2: the head is 0


def test_dropout_is_in_the_layers_of_a_reward_model(work):
    given = [*inputs(work), "--steps", 2, "--learning_rate", 1e-2]
    plain, _ = train(work, "plain_r", *given, script=reward_model)
    again, _ = train(work, "again_r", *given, "--checkpoint_activations", script=reward_model)
    noisy, _ = train(work, "noisy_r", *given, "--dropout", 0.5, script=reward_model)
    assert [r["grad_norm"] for r in again] == [r["grad_norm"] for r in plain]
    assert noisy[0]["grad_norm"] != plain[0]["grad_norm"]  # under zeros the first loss is ln 2


def test_killed_reward_model_resumes_bitwise(work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    given = [*inputs(work), "--steps", 4, "--batch_size", 5, "--learning_rate", 3e-3]
    whole, _ = train(work, "whole_r", *given, script=reward_model)
    interrupt(work, "killed_r", *given, "--save_every", 2, at="step 3/", script=reward_model)
    assert (work / "killed_r" / train_sft.STATE).exists()
    records, _ = train(work, "killed_r", "--resume", script=reward_model)
    names = ("step", "loss", "reward_accuracy", "grad_norm", "learning_rate")
    assert [[r[k] for k in names] for r in records] == [[r[k] for k in names] for r in whole]
    found = weights(work / "killed_r")
    assert all(torch.equal(value, found[name]) for name, value in weights(work / "whole_r").items())
    for name in ("config.json", "tokenizer_config.json"):
        one, two = (json.loads((work / f / name).read_text()) for f in ("whole_r", "killed_r"))
        assert one == two and "pad_token" in str(one)


def test_order_is_the_share_of_pairs_whose_chosen_answer_is_likelier(work, monkeypatch, capsys):
    models, pairs, c, tokenizer = setting(work)
    run, logp = SimpleNamespace(validation=pairs[:4]), [[-1, -2], [-9, -8], [-3, -7], [-4, -5]]
    monkeypatch.setattr(train_dpo, "all_logprobs", lambda *_: torch.tensor(logp, dtype=torch.float))
    reward_model.compare([str(work / "base")], models.reward, run, c, tokenizer, HARDWARE)
    names, row = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert row[names.index("order") - 1] == "75.0%"  # "held out" are two words


def test_unfinished_answer_counts_as_the_worst_that_has_ended(work):
    models, pairs, c, tokenizer = setting(work, max_new_tokens=2)
    answers = reward_model.sample(models.policy, pairs * 4, 0, 0, c, tokenizer.stop_ids, HARDWARE)
    found = reward_model.rewards_of(models.reward, answers, c, tokenizer.stop_ids, HARDWARE)
    theirs, ended = classifier(work / "reward"), []
    for e, r in zip(answers, found.tolist(), strict=True):
        if int(e.ids[-1]) in tokenizer.stop_ids:
            with torch.no_grad():
                ended.append(theirs(torch.tensor([e.ids.tolist()])).logits.item())
            assert r == pytest.approx(ended[-1], abs=1e-5)
    unfinished = [r for e, r in zip(answers, found.tolist(), strict=True)
                  if int(e.ids[-1]) not in tokenizer.stop_ids]
    assert unfinished and ended and unfinished == pytest.approx([min(ended)] * len(unfinished),
                                                                abs=1e-5)


# ----------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("micro_tokens", [60, 10**6])
def test_ratio_is_exactly_1_in_the_first_pass(work, micro_tokens):
    models, c, answers, _ = drawn(work, micro_tokens=micro_tokens)
    new = [models.policy(b.ids, b.lengths, b.targets) for b in answers.batches]
    assert len(new) > 1 or micro_tokens > 60
    assert ((torch.cat(new) - answers.old).exp() == 1).all()


def test_gradient_of_the_second_pass_equals_that_of_a_plain_loop(work):
    """Answer by answer in transformers, each token by the definitions, after the policy moved."""
    from transformers import AutoModelForCausalLM

    models, c, answers, taught = drawn(work, kl=0.3, gae_lambda=0.8, micro_tokens=80, clip=0.1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(work / n) for n in ("other", "base"))
    critic, reward = classifier(work / "reward"), classifier(work / "reward")
    for model in (policy, critic):  # a sampled pad is a token like any other
        model.model.embed_tokens.padding_idx = None
    rows, n = [], 0
    for b in answers.batches:
        for ids in b.ids.split(b.lengths):
            count = answers.counts[n]
            n += 1
            with torch.no_grad():
                old, ref = (logprobs(m, ids, count) for m in (policy, reference))
                values = critic.score(critic.model(ids[None])[0])[0, -count - 1 : -1, 0]
                r = reward(ids[None]).logits[0, 0]
            a, behind = [], 0.0
            for t in reversed(range(count)):
                gain = -0.3 * (old[t] - ref[t]) + (answers.rewards[n - 1] if t == count - 1 else 0)
                later = values[t + 1] if t < count - 1 else 0.0
                behind = gain + later - values[t] + 0.8 * behind
                a.insert(0, behind)
            rows.append((ids, count, old, values, torch.stack(a), r))
    assert any(answers.rewards[i] == pytest.approx(row[5].item(), abs=1e-5)
               for i, row in enumerate(rows))

    # One small move of the policy, the same for both, so that ratios differ and some are clipped.
    for model in (models.policy, policy):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, p in sorted(model.named_parameters()):
                p += 0.001 * torch.randn(p.shape, generator=generator)
    losses = ppo.ppo_pass(models, answers, taught, c, HARDWARE, HARDWARE.make_scaler())
    every = torch.cat([row[4] for row in rows])
    total = 0.0
    for ids, count, old, values, a, _ in rows:
        ratio = (logprobs(policy, ids, count) - old).exp()
        scaled = (a - every.mean()) / every.std()
        value = critic.score(critic.model(ids[None])[0])[0, -count - 1 : -1, 0]
        for t in range(count):
            clipped = ratio[t].clamp(0.9, 1.1) * scaled[t]
            error = (value[t] - values[t] - a[t]) ** 2 / 2
            total = total - torch.min(ratio[t] * scaled[t], clipped) + 0.1 * error
    (total / len(every)).backward()
    assert 0 < losses["clipped"] < 1
    for mine, theirs in ((models.policy, policy), (models.critic, critic)):
        wanted = dict(theirs.named_parameters())
        for name, p in mine.named_parameters():
            assert (p.grad - wanted[name].grad).norm() < 1e-4 * wanted[name].grad.norm(), name


def logprobs(model, ids, count):
    """ln p of the last `count` tokens."""
    logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, ids[1:, None])[-count:, 0]


def test_advantages_have_mean_0_and_deviation_1_and_returns_are_not_scaled(work):
    _, c, answers, (a, returns) = drawn(work)
    assert a.mean().item() == pytest.approx(0, abs=1e-5) and a.std().item() == pytest.approx(1)
    last = torch.tensor(answers.counts).cumsum(0) - 1
    expected = answers.rewards - c.kl * answers.k1[last]
    assert torch.allclose(returns[last], expected, atol=1e-5)


def test_one_token_alone_teaches_the_critic_and_no_policy(work):
    models, pairs, c, tokenizer = setting(work, max_new_tokens=1)
    answers = ppo.draw(models, pairs[:1], 0, c, tokenizer.stop_ids, HARDWARE)
    a, returns = ppo.lessons(answers, c)
    assert a.tolist() == [0.0]
    assert returns.tolist() == pytest.approx((answers.rewards - c.kl * answers.k1).tolist())


def test_training_raises_the_reward_and_shows_it_beside_others(work):
    """Of 64 answers to one prompt: over several prompts luck would be larger."""
    records, said = train(work, "more", *flags(
        work, data=jsonl(work / "one.jsonl", read(work / "pairs.jsonl")[1]), steps=10, passes=2,
        batch_size=64, learning_rate=3e-3, kl=0, max_new_tokens=4, beside=work / "other",
        val_data=work / "pairs.jsonl"), script=ppo)
    rewards = [r["reward"] for r in records]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5) and records[-1]["kl"] > 0.01
    table = said[said.index("held out") :].splitlines()
    assert len(table) == 4 and table[1].split()[4] == "0.00" and str(work / "other") in table[3]


def test_every_step_draws_with_numbers_of_its_own(work, monkeypatch):
    real, numbers = ppo.draw, []
    monkeypatch.setattr(ppo, "draw", lambda models, pairs, first, *rest: (
        numbers.append((len(pairs), first)), real(models, pairs, first, *rest))[1])
    train(work, "numbers", *flags(work, steps=3, passes=1), script=ppo)
    assert numbers == [(6, 0), (6, 6), (6, 12)]


def test_killed_run_resumes_bitwise(work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    whole, _ = train(work, "whole", *flags(work), script=ppo)
    interrupt(work, "killed", *flags(work), at="step 3/", number=signal.SIGKILL, script=ppo)
    records, _ = train(work, "killed", "--resume", script=ppo)
    names = ("loss", "critic_loss", "reward", "kl", "clipped", "grad_norm")
    assert [[r[k] for k in names] for r in records] == [[r[k] for k in names] for r in whole]
    for name, value in weights(work / "whole").items():
        assert torch.equal(value, weights(work / "killed")[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_asked_to_stop_saves_its_step_says_so_and_goes_on_bitwise(work, monkeypatch,
                                                                              number):
    """The signal comes in the middle of the first step, after its answers were drawn."""
    given = flags(work, save_every=0, val_data=work / "pairs.jsonl", steps=2)
    whole, _ = train(work, f"whole{number}", *given, script=ppo)
    real = ppo.lessons

    def interrupted(answers, c):
        signal.raise_signal(number)
        return real(answers, c)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "lessons", interrupted)
        records, said = train(work, f"asked{number}", *given, status=128 + number, script=ppo)
    assert len(records) == 1 and "stopped after step 1 of 2; all is saved, go on with" in said
    assert "held out" not in said and (work / f"asked{number}" / "model.safetensors").exists()
    records, _ = train(work, f"asked{number}", "--resume", script=ppo)
    assert [r["loss"] for r in records] == [r["loss"] for r in whole]
    for name, value in weights(work / f"whole{number}").items():
        assert torch.equal(value, weights(work / f"asked{number}")[name]), name


@pytest.mark.parametrize("more,words", [
    ({"passes": 0}, "--passes must"), ({"gae_lambda": 1.5}, "--gae_lambda"), ({"kl": -1}, "--kl"),
    ({"neftune_alpha": 5}, "--neftune_alpha"), ({"dropout": 0.1}, "--dropout"),
    ({"reward_model": "base"}, "weight score.weight is missing"),
    ({"reward_model": "nowhere"}, "there is no folder"),
    ({"beside": "base"}, "--beside needs --val_data"), ({"output_dir": "reward"}, "is the input"),
    ({"max_new_tokens": 0}, "--max_new_tokens"), ({"lora_rank": 2}, "--lora_rank"),
    ({"eval_every": 2}, "--eval_every")])
def test_what_ppo_cannot_use_is_refused_in_one_line(work, more, words):
    for name in ("reward_model", "beside", "output_dir"):
        if name in more:
            more = {**more, name: work / more[name]}
    _, said = train(work, "bad", *flags(work, **more), status=2, script=ppo)
    assert words in said and said.count("\n") == 1 + said.count("training, ") * 3
    assert not (work / "bad").exists()


@pytest.mark.parametrize("more,words", [
    (["--nll_weight", 1], "for policies"), (["--compile"], "for policies"),
    (["--exam_data", "x"], "for policies"), (["--loss", "ipo"], "--loss"),
    (["--label_smoothing", 0.6], "--label_smoothing")])
def test_what_a_reward_model_cannot_use_is_refused_in_one_line(work, more, words):
    _, said = train(work, "bad", *inputs(work), *more, status=2, script=reward_model)
    assert words in said and said.count("\n") == 1 and not (work / "bad").exists()


def test_classifier_of_another_size_is_named(work, tmp_path):
    (tmp_path / "two").mkdir()
    for path in (work / "reward").glob("*.json"):
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    stored = load_file(work / "reward" / "model.safetensors")
    stored["score.weight"] = stored["score.weight"].repeat(2, 1)
    save_file(stored, tmp_path / "two" / "model.safetensors")
    with pytest.raises(modeling.InputError, match="score.weight is missing, or not of shape"):
        reward_model.load_scalar(tmp_path / "two", "cpu")


def test_reward_model_begins_with_an_adapter_merged_into_its_base(work, tmp_path):
    train(tmp_path, "adapter", *inputs(work), "--lora_rank", 2, "--learning_rate", 1e-2,
          "--steps", 2, script=train_dpo)
    found = reward_model.load_scalar(tmp_path / "adapter", "cpu", new_head=True).state_dict()
    merged, base = (modeling.load(f).state_dict() for f in (tmp_path / "adapter", work / "base"))
    assert all(torch.equal(value, found[name]) for name, value in merged.items())
    assert any(not torch.equal(value, found[name]) for name, value in base.items())
