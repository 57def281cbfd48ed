"""The subject in some thirty claims, in the order of the course: read the names, then the bodies.

Each test stands alone: on one side the project, on the other plain torch or arithmetic.
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assistant, jsonl, supervised, user
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import eval as evaluation
import model as modeling
import train_dpo
import train_sft
from labs.scores import mcnemar
from labs.text import ngrams, signature


def small_model(seed=0):
    """A random Llama of two layers, grouped queries included."""
    model = modeling.Llama(modeling.read_config({
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.5}))
    model.initialize(seed)
    return model.eval()


def one_step(model, examples, **flags):
    """The loss of one optimizer step over all examples; gradients stay in the model."""
    c = train_sft.Config(batch_size=len(examples), **flags)
    mixer = data.Mixer([len(examples)], np.ones(1), 0)
    run = train_sft.RunData(examples, [], mixer, len(examples), 1)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    return train_sft.backward_step(model, run, 1, c, hardware, hardware.make_scaler())[0]


def random_examples(count, seed=0):
    """Examples of many lengths; all tokens but the first are supervised."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 12, count).tolist()
    return [data.Example(rng.integers(0, 50, n).astype(np.int32), ((1, n, 1.0),)) for n in sizes]


# ----------------------------------------------------------- 1. a conversation is tokens and a mask

TALK = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}


def test_what_the_assistant_writes_is_supervised_with_the_token_that_ends_its_turn(
    tmp_path, letters
):
    (example,), _ = data.load_examples([jsonl(tmp_path / "a.jsonl", TALK)], letters)
    assert supervised(letters, example) == ["b<|im_end|>", "d<|im_end|>"]


def test_training_on_the_last_answer_changes_the_mask_and_not_the_tokens(tmp_path, letters):
    path = jsonl(tmp_path / "a.jsonl", TALK)
    (every,), (last,) = (data.load_examples([path], letters, how)[0] for how in ("all", "last"))
    assert supervised(letters, last) == ["d<|im_end|>"]
    assert every.ids.tolist() == last.ids.tolist()


def test_text_that_looks_like_the_end_of_a_turn_is_text(tmp_path, letters):
    """Else a user could write the assistant's answer, and a system message of his own."""
    row = {"messages": [user("a<|im_end|>b"), assistant("c")]}
    (example,), _ = data.load_examples([jsonl(tmp_path / "a.jsonl", row)], letters)
    assert example.ids.tolist().count(letters.stop_id) == 2  # one per message


# ------------------------------------------------------------------------------------- 2. the model


def test_attention_is_a_weighted_mean_of_the_values_seen_so_far():
    q, k = torch.zeros(5, 2, 4), torch.randn(5, 1, 4)  # no query prefers any key
    v = torch.randn(5, 1, 4)
    wanted = v.cumsum(0) / torch.arange(1, 6)[:, None, None]  # [5, 1, 4] running mean
    got = modeling.plain_attention(q, k, v).view(5, 2, 4)
    torch.testing.assert_close(got, wanted.expand(5, 2, 4))


def test_with_rope_a_query_and_a_key_feel_only_how_far_apart_they_stand():
    q, k, speed = torch.randn(1, 8), torch.randn(1, 8), 10000 ** (-torch.arange(4) / 4)

    def score(m, n):
        turned = [modeling.rotate(x, (p * speed).cos(), (p * speed).sin())
                  for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-4


@torch.no_grad()
def test_examples_laid_end_to_end_cannot_see_each_other():
    model, ids = small_model(), torch.arange(9)
    together, _ = model.hidden(ids, [4, 5])
    alone = torch.cat([model.hidden(part, [len(part)])[0] for part in ids.split([4, 5])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_cannot_see_those_after_it():
    model, ids = small_model(), torch.arange(9)
    changed = torch.cat((ids[:-1], torch.tensor([40])))
    a, b = (model.hidden(x, [9])[0] for x in (ids, changed))
    assert torch.equal(a[:-1], b[:-1]) and not torch.equal(a[-1], b[-1])


@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_token_of_a_full_pass_each_time():
    model, ids = small_model(), [3, 1, 4, 1, 5]
    (written,) = modeling.generate(model, [ids], 6)
    for token in written:
        states, _ = model.hidden(torch.tensor(ids), [len(ids)])
        assert token == (states[-1] @ model.head.T).argmax()
        ids = [*ids, token]


# -------------------------------------------------------------------------------------- 3. the loss


def test_log_probabilities_computed_in_chunks_equal_the_plain_ones():
    states, head, targets = torch.randn(70, 16), torch.randn(300, 16), torch.randint(300, (70,))
    plain = modeling.plain_logprobs(states, head, targets)
    by_hand = -F.cross_entropy(states @ head.T, targets, reduction="none")
    torch.testing.assert_close(modeling.token_logprobs(states, head, targets), plain)
    torch.testing.assert_close(plain, by_hand)


class Told(torch.nn.Module):
    """A model whose loss on a token is the token's number, times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, ids, lengths, targets, **_):
        return -self.weight * ids[targets]


@pytest.mark.parametrize("micro_tokens", [3, 7, 100])
def test_the_loss_is_the_mean_over_all_tokens_of_the_step(micro_tokens):
    """31/12. The mean of the four examples' means is 2.75; gradient accumulation as most write it,
    here over {first} and {the others}, gives 2.15."""
    losses = ([1, 2], [3, 3, 3, 5], [4], [2, 2, 2, 2, 2])
    examples = [data.Example(np.array([0, *nll], dtype=np.int32), ((1, len(nll) + 1, 1.0),))
                for nll in losses]
    model = Told()
    assert one_step(model, examples, micro_tokens=micro_tokens) == pytest.approx(31 / 12)
    assert model.weight.grad.item() == pytest.approx(31 / 12)


def test_how_a_step_is_cut_into_micro_batches_changes_nothing():
    found = []
    for micro_tokens in (12, 1000):
        model = small_model().train()
        loss = one_step(model, random_examples(8), micro_tokens=micro_tokens, neftune_alpha=5.0)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------- 4. the loop


def test_the_learning_rate_climbs_in_a_line_and_falls_along_a_cosine():
    c = train_sft.Config(learning_rate=1.0, warmup=2, schedule="cosine", min_learning_rate=0.0)
    rates = [train_sft.learning_rate_at(step, 6, c) for step in range(1, 7)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


# ----------------------------------------------------------------------------------- 5. the mixture


def test_a_temperature_lies_between_the_sizes_and_equal_shares():
    """T5's rates: the cap comes before the temperature."""
    sizes = [1_000_000, 100_000, 10_000]
    for wanted, flags in (((0.900901, 0.090090, 0.009009), {"temperature": 1}),
                          ((0.706101, 0.223289, 0.070610), {"temperature": 2}),
                          ((0.418301, 0.418301, 0.163399), {"temperature": 2, "cap": 2**16})):
        rates = data.mixing_rates(sizes, "temperature", **flags)
        assert rates.tolist() == pytest.approx(wanted, abs=1e-6)


def test_in_an_epoch_every_example_is_seen_once_in_an_order_that_the_seed_decides():
    mixers = [data.Mixer([5, 3], np.array([5, 3]) / 8, seed) for seed in (0, 0, 1)]
    epochs = [[i for i, _ in mixer.draws(8, 16)] for mixer in mixers]  # the second epoch
    assert sorted(epochs[0]) == list(range(8))
    assert epochs[0] == epochs[1] != epochs[2]


def test_a_small_source_repeats_only_when_all_of_it_was_seen():
    draws = data.Mixer([90, 10], np.array([0.5, 0.5]), 0).draws(0, 100)
    seen = [visit for example, visit in draws if example >= 90]
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 10)


# ------------------------------------------------------------------------------------- 6. the noise


def test_neftune_noise_is_bounded_by_alpha_over_the_root_of_length_times_width():
    """L is the example's own length. Padded to 16, four tokens would get half of the noise."""
    keys = modeling.noise_keys(0, [0] * 50, range(50), [4] * 50)
    noise = modeling.neftune_noise(keys, [4] * 50, 16, alpha=5.0)  # [200, 16]
    bound = 5 / math.sqrt(4 * 16)
    assert bound == 0.625 and 0.62 < noise.abs().max() <= bound
    assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_noise_knows_its_token_and_not_who_stands_beside_it():
    """So neither the micro-batch, nor the rank, nor a restart changes what a token gets."""
    together = modeling.noise_keys(7, [0, 2], [30, 4], [3, 5])
    assert torch.equal(together[3:], modeling.noise_keys(7, [2], [4], [5]))
    assert len(set(together.tolist())) == 8  # and no two tokens get the same


def test_dropout_zeroes_a_share_of_the_elements_and_keeps_the_mean():
    x, noise = torch.ones(400, 100), modeling.noise_keys(0, [0], [0], [400])
    dropped = modeling.dropout(x, 0.25, noise, site=0)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(dropped, modeling.dropout(x, 0.25, noise, site=0))


# ----------------------------------------------------------------------------------- 7. preferences

PC, PR, RC, RR = -10.0, -12.0, -11.0, -11.0  # ln p of policy and reference, chosen and rejected


def test_where_policy_and_reference_agree_the_loss_is_ln_2():
    loss = train_dpo.sigmoid_loss(torch.zeros(1), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))


def test_the_slope_of_dpo_is_minus_beta_times_how_wrong_the_policy_is():
    chosen = torch.tensor([PC], requires_grad=True)
    loss = train_dpo.sigmoid_loss((chosen - RC) - (PR - RR), beta=0.1)
    loss.backward()
    wrong = 1 / (1 + math.exp(0.1 * 2))  # s(-beta margin): the share of belief in the wrong answer
    assert loss.item() == pytest.approx(0.5981388694)
    assert chosen.grad.item() == pytest.approx(-0.1 * wrong) == pytest.approx(-0.0450166003)


@pytest.mark.parametrize("flags, wanted", [
    (dict(loss="sigmoid"), 0.5981388694), (dict(loss="sigmoid", label_smoothing=0.1), 0.6181388694),
    (dict(loss="hinge"), 0.8), (dict(loss="ipo", length_normalize=False), 9.0),
    (dict(loss="ipo", length_normalize=True), 21.4677777778),
    (dict(loss="simpo", beta=2.0, simpo_gamma=0.5, length_normalize=True), 0.9740769842)])
def test_the_cousins_of_dpo_on_one_pair(flags, wanted):
    c = train_dpo.Config(**{"beta": 0.1, "length_normalize": False, **flags})
    policy, reference = torch.tensor([[PC, PR]]), torch.tensor([[RC, RR]])
    reference = reference * (c.loss != "simpo")  # SimPO has none
    loss, _ = train_dpo.objective(c, policy, reference, torch.tensor([[5.0, 6.0]]))
    assert loss.item() == pytest.approx(wanted)


def test_ipo_stops_at_a_margin_hinge_beyond_one_and_the_others_never():
    def slope(loss, margin, *flags):
        margin = torch.tensor([margin], requires_grad=True)
        loss(margin, 0.5, *flags).backward()
        return margin.grad.item()

    assert slope(train_dpo.ipo_loss, 1.0) == 0  # 1 / (2 beta)
    assert slope(train_dpo.ipo_loss, 1.5) > 0 > slope(train_dpo.ipo_loss, 0.5)
    assert slope(train_dpo.hinge_loss, 2.5) == 0 > slope(train_dpo.hinge_loss, 1.5)  # 1 / beta
    assert slope(train_dpo.sigmoid_loss, 9.0) < 0 and slope(train_dpo.simpo_loss, 9.0, 0.5) < 0


@torch.no_grad()
def test_a_prompt_encoded_once_serves_both_of_its_answers():
    model, prompt = small_model(), np.arange(6, dtype=np.int32)
    answers = [np.array([6, *rest], dtype=np.int32) for rest in ([7, 8], [9, 10, 11, 12])]
    item = train_dpo.Preference(prompt, tuple((a, ((1, len(a), 1.0),)) for a in answers))
    for got, a in zip(train_dpo.answer_logprobs(model, [item])[0], answers, strict=True):
        ids = torch.from_numpy(np.concatenate((prompt, a))).long()  # the whole, all in one pass
        logp = (model.hidden(ids, [len(ids)])[0] @ model.head.T).log_softmax(-1)
        wanted = sum(logp[i - 1, ids[i]] for i in range(7, len(ids)))
        assert got.item() == pytest.approx(wanted.item(), abs=1e-4)


# -------------------------------------------------------------------------------------- 8. the exam


def test_a_letter_alone_is_another_token_than_the_letter_after_a_prompt():
    """A tester who encoded "A" alone scored ids that no prompt is ever followed by."""
    tokenizer = Tokenizer(models.WordLevel({"▁A": 0, "A": 1, "▁Answer": 2, ":": 3}, "A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Split(":", "isolated")])
    prompt, whole = tokenizer.encode("Answer:").ids, tokenizer.encode("Answer:A").ids
    assert tokenizer.encode("A").ids == [0] and whole[len(prompt) :] == [1]


def test_the_floor_is_what_the_best_single_letter_scores():
    """C-Eval's val split: 354 of 1,346 answers are D, so 26.3% is what knowing nothing gives."""
    answers = "A" * 310 + "B" * 338 + "C" * 344 + "D" * 354
    subject = SimpleNamespace(handle="all", category="STEM", shots=[], questions=[{"answer": "A"}])
    said = [{"subject": "all", "answer": x, "prediction": "B", "shots": 0} for x in answers]
    scores = evaluation.summarize("ceval", [subject], said)
    assert scores["floor"] == {"letter": "D", "micro": 354 / 1346}
    assert scores["micro"] == 338 / 1346


def test_wilsons_interval_ends_where_the_score_is_just_two_standard_errors_away():
    low, high = evaluation.wilson(354, 1346)
    for p in (low, high):
        assert abs(354 / 1346 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 1346))
    assert (low, high) == pytest.approx((0.2402, 0.2872), abs=1e-4)
    assert evaluation.wilson(0, 10)[0] == 0.0 < evaluation.wilson(0, 10)[1]


def test_mcnemar_asks_a_coin_only_about_the_questions_that_changed():
    # 1 lost, 3 won: of 16 outcomes of four coins, 2 x (1 + 4) are at least as uneven
    assert mcnemar(1, 3) == pytest.approx(10 / 16)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


# -------------------------------------------------------------------------------------- 9. the data


def test_two_signatures_agree_as_often_as_the_texts_share_five_words_in_a_row():
    words = random.Random(0).choices([f"w{k}" for k in range(2000)], k=800)
    other = [*words[:600], *(f"other{k}" for k in range(200))]
    one, two = set(ngrams(words).tolist()), set(ngrams(other).tolist())
    agreed = (signature(words) == signature(other)).mean()
    assert len(one & two) / len(one | two) == pytest.approx(596 / 996)
    assert agreed == pytest.approx(596 / 996, abs=0.15)  # 64 numbers: a standard error of 0.06
