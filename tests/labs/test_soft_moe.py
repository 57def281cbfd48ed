"""labs/soft_moe.py: Steel-LLM's layer against its definition, and what it does to prefixes."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import command
from families import make_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

import model as modeling
from labs import soft_moe

KEYS = {"FFN_type": "softmoe_v3", "mlp_type": "senet", "n_experts": 3, "slots_per_expert": 2,
        "mlp_div_ratio": 4}
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def steel(tmp_path_factory):
    """(folder, model) of a random checkpoint with Steel-LLM's layer."""
    folder = tmp_path_factory.mktemp("steel")
    make_checkpoint(folder, "qwen2")
    config = modeling.read_json(folder / "config.json")
    model = soft_moe.SoftLlama(modeling.read_config({**config, **KEYS}))
    model.initialize(0)
    for layer in model.model.layers:
        nn.init.constant_(layer.mlp.scale, 5.0)
    modeling.save(model, folder)
    return folder, model.eval()


def states_of(model, texts, **how):
    ids = torch.tensor([i for text in texts for i in text])
    with torch.no_grad():
        return model.hidden(ids, list(map(len, texts)), **how)


def vector_layer():
    layer = soft_moe.SoftMoE({"hidden_size": 4, "intermediate_size": 4, "mlp_div_ratio": 4,
                              "n_experts": 2})
    layer.phi.data = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, -1]]).T[:, :, None]
    layer.scale.data.fill_(2)
    layer.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    for expert, factor in zip(layer.experts, (1, -2), strict=True):
        expert.weight.data = factor * torch.eye(4)
    return layer


def test_a_later_token_moves_what_an_earlier_one_gets():
    layer, tokens = vector_layer(), torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 4]])
    layer.lengths = [3]
    first = layer(tokens)[0]
    assert first.tolist() == pytest.approx([.365419, -.141895, .113859, .151812], abs=1e-6)
    tokens[2] = torch.tensor([5.0, 0, 0, 0])
    assert (layer(tokens)[0] - first).abs().max().item() == pytest.approx(.200602, abs=1e-6)
    layer.lengths = [1]
    assert layer(tokens[:1])[0].tolist() == pytest.approx([.413289, 0, 0, 0], abs=1e-6)


def test_an_expert_is_gated_twice():
    """silu(gate_down u) * down u of u = silu(gate_up h) * up h, in matrices."""
    torch.manual_seed(0)
    expert, h = soft_moe.Expert(4, 6), torch.randn(3, 4)
    w = {name: half.weight for name, half in expert.named_children()}

    def silu(x):
        return x / (1 + (-x).exp())

    u = silu(h @ w["gate_up_proj"].T) * (h @ w["up_proj"].T)
    expected = silu(u @ w["gate_down_proj"].T) * (u @ w["down_proj"].T)
    assert torch.allclose(expert(h), expected, atol=1e-6)


class PaddedSoftMoE(nn.Module):
    """Algorithm 1 of arXiv:2308.00951 as written, on [batch, tokens, D]."""

    def __init__(self, ours):
        super().__init__()
        self.ours = ours

    def forward(self, x):
        phi = self.ours.scale * F.normalize(self.ours.phi, dim=0)
        x = F.normalize(x, dim=-1)
        logits = torch.einsum("bmd,dnp->bmnp", x, phi)
        slots = torch.einsum("bmd,bmnp->bnpd", x, logits.softmax(1))
        made = torch.stack([f(slots[:, i]) for i, f in enumerate(self.ours.experts)], 1)
        combine = logits.flatten(2).softmax(2).view_as(logits)
        return torch.einsum("bnpd,bmnp->bmd", made, combine)


def test_states_are_those_of_qwen2_with_the_papers_layer_as_mlp(steel, tmp_path):
    folder, model = steel
    make_checkpoint(tmp_path, "qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    named = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    theirs.load_state_dict(named, strict=False)
    for layer, ours in zip(theirs.model.layers, model.model.layers, strict=True):
        layer.mlp = PaddedSoftMoE(ours.mlp)
    ours = states_of(model, TEXTS)[0].split(list(map(len, TEXTS)))
    for text, states in zip(TEXTS, ours, strict=True):
        with torch.no_grad():
            wanted = theirs.model(torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(states, wanted, atol=1e-4, rtol=1e-4)


def test_a_continued_prefix_is_read_again_and_kept_keys_would_be_wrong(steel):
    _, model = steel
    whole = states_of(model, TEXTS)[0].split(list(map(len, TEXTS)))
    for exact in (True, False):
        model.exact = exact
        _, prefix = states_of(model, [text[:2] for text in TEXTS[:2]], keep_kv=True)
        rests = [TEXTS[0][2:], TEXTS[1][2:], TEXTS[2][2:]]
        found, _ = states_of(model, rests, prefix=prefix.select([0, 1, 0]))
        wanted = torch.cat([states[2:] for states in whole])
        assert ((found - wanted).abs().max() < 1e-5) == exact
    model.exact = True


def test_generation_is_that_of_texts_read_anew_at_every_step(steel):
    _, model = steel
    found = modeling.generate(model, TEXTS, 8, stop_ids=[])
    for text, new in zip(TEXTS, found, strict=True):
        for k, token in enumerate(new):
            states, _ = states_of(model, [[*text, *new[:k]]])
            assert model.next_logits(states[-1:]).argmax() == token


def test_such_layers_are_not_compiled(steel):
    _, model = steel
    model.compile_layers()  # an ordinary model's layers have compiled parts of their own then
    assert not any({"before", "after"} & vars(layer).keys() for layer in model.model.layers)


def test_the_core_loads_saves_and_examines_such_a_checkpoint(steel, tmp_path, monkeypatch):
    folder, model = steel
    monkeypatch.setattr(modeling, "Llama", soft_moe.SoftLlama)
    again = modeling.load(folder)
    assert all(torch.equal(p, dict(again.named_parameters())[name])
               for name, p in model.named_parameters())
    assert "model.layers.0.mlp.experts.2.gate_down_proj.weight" in model.state_dict()
    (tmp_path / "a.jsonl").write_text('{"text": "moon on the river"}\n')
    status, out, err = command("labs/soft_moe.py", "logprobs", "--model", folder, "--data",
                               tmp_path / "a.jsonl")
    assert status == 0 and "perplexity" in out, err


def test_an_ordinary_checkpoint_is_sent_to_eval(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "Llama", soft_moe.SoftLlama)  # brought back after the command
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    status, _, err = command("labs/soft_moe.py", "logprobs", "--model", checkpoint, "--data",
                             tmp_path / "a.jsonl")
    assert status == 2 and "[None, None], not softmoe_v3" in err and err.count("\n") == 1
