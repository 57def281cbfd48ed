"""Soft mixture of experts, as Steel-LLM has it: a layer that looks ahead, and what that costs.

Idea. A token need not choose an expert: every expert reads `slots`, averages of all tokens, and
every token takes an average of what the slots became (arXiv:2308.00951, algorithm 1). With the
tokens' directions x^ = x / |x| and the slots' phi^ = scale phi / |phi|:

    logits = x^ phi^                     [L, S] of an example of L tokens and S slots
    slots  = softmax over the tokens(logits)^T x^        what each slot reads
    y      = softmax over the slots(logits) expert(slots)    what each token takes

Steel-LLM (arXiv:2502.06635) puts this in place of Qwen2's MLP; its slots read the x^, the paper's
the x (our numbers agree with its code to 1e-6 of their size). But a slot reads *all* tokens: in
training also the answer whose loss is measured, in use none such. Kept keys and values are wrong
too: as a text grows, its old tokens' states change. So here a prefix keeps its tokens, read anew.

    python -m labs.soft_moe                               # the lesson, on the demo; or eval.py's
    python -m labs.soft_moe exam --model steel-llm --data ceval --protocol steel     # commands,
    python -m labs.soft_moe train --model steel-llm --data a.jsonl --output_dir out/steel  # or SFT

What you should see: nats per supervised token of 100 held-out questions after 200 steps; mean and
standard deviation of five seeds. The command runs seed 0; another, such as 3, is
`python -c "from labs import soft_moe; soft_moe.lesson(3)"`.

    layer                 loss as trained     honest loss
    MLP                    0.362 +- 0.006  0.362 +- 0.006
    soft MoE, scale 1      0.378 +- 0.013  0.378 +- 0.013
    soft MoE, scale 10     0.149 +- 0.142  0.897 +- 0.386

Seen: with scale 10 four seeds of five learn to read their answer. Not seen: that at scale 1, where
training begins, the leak shows (a slot is nearly the text's mean), or kept keys do harm (one answer
of 100 changes). Cannot be seen: what the layer is worth in a model of Steel-LLM's size.

Exercise. Which sum would make the layer causal, and what would it cost?
    Solution: slots of the tokens up to t for token t; each expert then runs once per token.
"""

import operator
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import eval as evaluation
import model as modeling
import train_sft
from model import Llama, ModelConfig, Prefix, check

# ==== read: the layer =============================================================================


class Expert(nn.Module):
    """silu(gate_down u) * down u of u = silu(gate_up h) * up h: Steel-LLM's two gated halves."""

    def __init__(self, D: int, hidden: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.gate_down_proj = nn.Linear(hidden, D, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        u = F.silu(self.gate_up_proj(h)) * self.up_proj(h)
        return F.silu(self.gate_down_proj(u)) * self.down_proj(u)


class SoftMoE(nn.Module):
    """Soft MoE over flat tokens [T, D]; `lengths` says which tokens are of one example."""

    def __init__(self, config: dict):
        super().__init__()
        D, experts, self.lengths = config["hidden_size"], config["n_experts"], []
        hidden = config["intermediate_size"] // config["mlp_div_ratio"]
        self.phi = nn.Parameter(torch.zeros(D, experts, config.get("slots_per_expert", 1)))
        self.scale = nn.Parameter(torch.ones(1))
        self.experts = nn.ModuleList(Expert(D, hidden) for _ in range(experts))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D]; the noise of LoRA's dropout is for others, experts have no adapters."""
        x = F.normalize(x, dim=1)  # [T, D]
        phi = self.scale * F.normalize(self.phi, dim=0)  # [D, experts, slots of each]
        logits = (x @ phi.flatten(1).to(x.dtype)).float()  # [T, S]
        combine = logits.softmax(1).to(x.dtype)  # [T, S]

        # What the slots of each example read.
        slots = []
        for score, token in zip(logits.split(self.lengths), x.split(self.lengths), strict=True):
            dispatch = score.softmax(0).to(x.dtype)  # [L, S]
            slots.append(dispatch.T @ token)  # [S, D]

        # Every expert has some slots in every example.
        mine = torch.stack(slots).chunk(len(self.experts), 1)  # [B, slots of each, D] an expert
        made = torch.cat([expert(h) for expert, h in zip(self.experts, mine, strict=True)], 1)

        # What the tokens take from them.
        parts = zip(combine.split(self.lengths), made, strict=True)
        return torch.cat([weight @ of_example for weight, of_example in parts])  # [T, D]


class SoftLlama(Llama):
    """A Llama whose MLPs are SoftMoE. Whoever continues a prefix reads its tokens again.

    With `exact` False a prefix is keys and values, as in a causal model: faster, and wrong.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        kind = [config.source.get("FFN_type"), config.source.get("mlp_type")]
        check(kind == ["softmoe_v3", "senet"], f"FFN_type and mlp_type of config.json are {kind}, "
              "not softmoe_v3 and senet; eval.py and train_sft.py take ordinary checkpoints")
        self.exact = True
        for layer in self.model.layers:
            layer.mlp = SoftMoE(config.source)

    def compile_layers(self, **_) -> None:
        """Nothing: a layer here reads the lengths, and would compile anew for each of them."""

    def hidden(self, ids, lengths, prefix=None, keep_kv=False, noise=None, neftune_alpha=0.0,
               full_lengths=None, wanted=None, parents=None):
        """`Llama.hidden`; what it keeps of tokens, for those that continue them, is their ids."""
        whole, sizes, before, own = ids, lengths, None, ids.split(lengths)
        if prefix is not None and self.exact:
            before = self.kept_ids(prefix, ids)
        elif parents:
            before = [ids[:0] if row is None else own[row] for row in parents]
        if before is not None:
            texts = list(map(torch.cat, zip(before, own, strict=True)))
            whole, sizes = torch.cat(texts), list(map(len, texts))
            prefix, noise = None, None  # the noise is of the new tokens alone
        for layer in self.model.layers:
            layer.mlp.lengths = sizes

        # All tokens pass the last layer too: each is read by the others.
        states, kept = super().hidden(whole, sizes, prefix, keep_kv and not self.exact, noise,
                                      neftune_alpha, full_lengths)
        if whole is not ids:
            parts = zip(states.split(sizes), lengths, strict=True)
            states = torch.cat([part[-n:] for part, n in parts])  # [T, D]
        if keep_kv and self.exact:
            row = ids[:, None, None]  # [T, 1, 1], in the place of keys [T, K, Dh]
            kept = Prefix([(row, row)], list(lengths))
        return (states if wanted is None else states.index_select(0, wanted)), kept

    def kept_ids(self, prefix, new: Tensor) -> list[Tensor]:
        """The ids that stand before each example."""
        stored, _ = prefix.layers[0]
        if isinstance(prefix, modeling.Cache):
            # One new token per row: it joins the row, as a key would.
            for row, n, token in zip(stored, prefix.lengths, new, strict=True):
                row[n] = token
            return [row[:n, 0, 0] for row, n in zip(stored, prefix.lengths, strict=True)]
        parts = stored[:, 0, 0].split(prefix.lengths)
        return [parts[row] for row in prefix.rows or range(len(parts))]

    def initialize(self, seed: int) -> None:
        """Random weights of a new model, the experts' large enough for inputs of length 1."""
        # As small as usual, two gates in a row would multiply to nothing: |y| near 1e-10.
        super().initialize(seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.model.layers:
            nn.init.normal_(layer.mlp.phi, generator=generator)
            for expert in layer.mlp.experts:
                for name, half in expert.named_children():
                    std = half.in_features**-0.5 if "down" in name else 1.0
                    nn.init.normal_(half.weight, std=std, generator=generator)


# ---- skip on a first reading: the lesson on the demo ---------------------------------------------

ROWS, VALIDATION = "out/demo/practice.jsonl", "out/demo/practice_val.jsonl"
ARMS = {"MLP": 0, "soft MoE, scale 1": 1.0, "soft MoE, scale 10": 10.0}


@torch.no_grad()
def honest_loss(model: Llama, examples: list[data.Example]) -> float:
    """Nats per supervised token, each predicted from the tokens before it and nothing else."""
    losses = []
    for e in examples:
        for first, end, _ in e.spans:
            # The example up to each of its supervised tokens: texts of their own.
            texts = data.collate([data.Example(e.ids[:t], ()) for t in range(first, end)])
            last = torch.tensor(texts.lengths).cumsum(0) - 1
            states, _ = model.hidden(texts.ids, texts.lengths, wanted=last)
            logp = model.next_logits(states).log_softmax(-1)  # [tokens of the span, V]
            losses.append(-logp[range(end - first), e.ids[first:end].tolist()])
    return torch.cat(losses).mean().item()


def make_base(folder: Path, scale: float, seed: int) -> None:
    """The demo's untrained model, its MLPs replaced by Steel-LLM's layer; scale 0: as it is."""
    config = dict(modeling.load_config("out/demo/base").source)
    if scale:
        config |= {"architectures": ["SteelForCausalLM"], "model_type": "qwen2", "n_experts": 6,
                   "FFN_type": "softmoe_v3", "mlp_type": "senet", "mlp_div_ratio": 4}
    model = modeling.Llama(modeling.read_config(config))
    model.initialize(seed)
    for layer in model.model.layers if scale else []:
        nn.init.constant_(layer.mlp.scale, scale)
    modeling.save(model, folder)
    data.ChatTokenizer("out/demo/base").save(folder)


def lesson(seed: int = 0, steps: int = 200) -> None:
    """Train the same model with three kinds of layers, and ask what their losses are worth."""
    check(Path(ROWS).exists(), f"{ROWS} is missing; `python train_sft.py` makes the demo")
    table = [("layer", "loss as trained", "honest loss", "answers changed by kept keys")]
    for name, scale in ARMS.items():
        modeling.Llama = SoftLlama if scale else Llama
        folder = Path(f"out/soft_moe/{scale:g}")
        make_base(folder / "base", scale, seed)
        sys.argv[1:] = (f"--model {folder}/base --data {ROWS} --output_dir {folder} --overwrite "
                        f"--steps {steps} --batch_size 32 --learning_rate 2e-3 --warmup 50 "
                        f"--adam_beta2 0.98 --log_every 100 --seed {seed}").split()
        try:
            train_sft.main()
        except SystemExit as end:  # a run ends by leaving; only a stopped one ends all
            if end.code:
                raise

        # The validation loss as a trainer reports it, then what it would be in use.
        model, tokenizer = modeling.load(folder), data.ChatTokenizer(folder)
        examples = data.load_examples([VALIDATION], tokenizer)[0][:100]
        logps = dict(evaluation.example_logprobs(model, examples, 8192))
        trained, honest = -torch.cat(list(logps.values())).mean(), honest_loss(model, examples)

        # Greedy answers to the same questions, with prefixes read again and as keys and values.
        prompts, answers = [e.ids[: e.spans[0][0]].tolist() for e in examples], []
        for model.exact in (True, False):
            answers.append(modeling.generate(model, prompts, 24, stop_ids=tokenizer.stop_ids))
        changed = sum(map(operator.ne, *answers)) / len(prompts)
        table.append((name, f"{trained:.4f}", f"{honest:.4f}", changed))
    data.print_table(table)


def main() -> None:
    """The lesson, or eval.py's commands and train_sft.py for checkpoints with this layer."""
    if len(sys.argv) == 1:
        return lesson()

    # The core builds its model by this name: whatever it loads from now on has Steel-LLM's layer.
    modeling.Llama = SoftLlama
    if sys.argv[1] != "train":
        return data.run_command(evaluation.COMMANDS, __doc__)
    del sys.argv[1]
    train_sft.main()


if __name__ == "__main__":
    with data.one_line_errors():
        main()
