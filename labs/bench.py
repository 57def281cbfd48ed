"""Speed and memory of the training steps against plain transformers loops, on this machine.

    python -m labs.bench            # SFT, DPO, and an exam on a prefix against prompts in full
    python -m labs.bench --only dpo # one of them: sft, dpo, exam
    python -m labs.bench --large    # with a GPU: a 1.1B model at length 2048, share of peak FLOPs

In SFT and DPO two loops, in turn, train the same random model (50M parameters, vocabulary 32,000)
on the same 16 rows a step of ../shared/data/alpaca_zh_demo.json, for DPO 4 pairs a step of
dpo_zh_demo.json, or on random rows of such lengths where those are absent. Theirs is what a
tutorial shows: rows padded to the longest (chosen and rejected together), logits of every position,
the reference run in every step. SFT's speed counts real tokens, padding excluded. Our DPO step
finds the reference's log-probabilities ready; the second line adds the one pass that made them, as
in a run of one epoch. Peak memory is that of a process of its own (CPU) or of the allocator (GPU),
weights, gradients and optimizer included.
"""

import argparse
import copy
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import eval as evaluation
import model as modeling
import train_dpo
import train_sft

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
BATCH, PAIRS, MICRO_TOKENS = 16, 4, 1280
SMALL = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
LARGE = {**SMALL, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
         "num_attention_heads": 32}  # TinyLlama's shape
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "T4": 65e12}  # dense, 16 bit


def rows(vocabulary: int) -> list[data.Example]:
    """The tokenised rows."""
    path, tokenizer = SHARED / "data/alpaca_zh_demo.json", SHARED / "models/minimind-tokenizer"
    if path.exists():
        return data.load_examples([str(path)], data.ChatTokenizer(tokenizer))[0]
    rng, out = random.Random(0), []
    for _ in range(1000):
        prompt = rng.randint(10, 50)
        length = prompt + min(int(rng.lognormvariate(4.6, 0.8)) + 1, 900)
        ids = torch.randint(vocabulary, (length,)).int().numpy()
        out.append(data.Example(ids, ((prompt, length, 1.0),)))
    return out


def new_model(config: dict, device) -> modeling.Llama:
    """A random model, the same every time."""
    model = modeling.Llama(modeling.ModelConfig.from_dict(config))
    model.initialize(0)
    return model.to(device).train()


class Ours:
    """Flat micro-batches sorted by length, LM head at supervised positions only."""

    def __init__(self, config: dict, device):
        self.device, self.model = device, new_model(config, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, examples: list[data.Example]) -> float:
        """One optimizer step; returns the loss."""
        total, count = 0.0, sum(e.targets for e in examples)
        for chunk in data.micro_batches([len(e.ids) for e in examples], MICRO_TOKENS)[0]:
            batch = data.collate([examples[i] for i in chunk], self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logp = self.model(batch.ids, batch.lengths, batch.targets, equal_weights=True)
                loss = -logp.sum() / count
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Theirs:
    """transformers' model on padded rows with labels."""

    def __init__(self, config: dict, device):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = device
        settings = {k: v for k, v in config.items() if k != "model_type"}
        self.model = LlamaForCausalLM(LlamaConfig(**settings)).to(device).train()
        self.model.load_state_dict(new_model(config, device).state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, examples: list[data.Example]) -> float:
        """One optimizer step; returns the loss."""
        length = max(len(e.ids) for e in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, e in enumerate(examples):
            ids[i, : len(e.ids)] = torch.from_numpy(e.ids)
            mask[i, : len(e.ids)] = 1
            for first, end, _ in e.spans:
                labels[i, first:end] = ids[i, first:end]
        ids, labels, mask = (t.to(self.device) for t in (ids, labels, mask))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def synchronized() -> float:
    """The time, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Peak memory so far in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process used before exec
        kib = next(line.split()[1] for line in status.open() if line.startswith("VmHWM"))
        return int(kib) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS: bytes


def pairs(vocabulary: int) -> list[train_dpo.Preference]:
    """Tokenised preference pairs."""
    path, tokenizer = SHARED / "data/dpo_zh_demo.json", SHARED / "models/minimind-tokenizer"
    if path.exists():
        chat = data.ChatTokenizer(tokenizer)
        return train_dpo.load_preferences([str(path)], chat, 2048)[0]
    rng, out = random.Random(0), []
    for _ in range(300):
        lengths = [min(int(rng.lognormvariate(4.8, 0.8)) + 2, 900) for _ in range(3)]
        prompt, *answers = (torch.randint(vocabulary, (n,)).int().numpy() for n in lengths)
        out.append(train_dpo.Preference(prompt, tuple((a, ((1, len(a), 1.0),)) for a in answers)))
    return out


class OursDPO:
    """The prompt once, both answers after it; the reference's part is done before, model gone."""

    def __init__(self, config: dict, device):
        self.device, self.model = device, new_model(config, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.config = train_dpo.Config(micro_tokens=MICRO_TOKENS, beta=0.1)
        self.hardware = train_sft.Hardware(0, 1, torch.device(device), torch.bfloat16 if
                                           device == "cuda" else torch.float32)

    def reference(self, items: list[train_dpo.Preference]) -> torch.Tensor:
        """What the training script computes once for all epochs."""
        return train_dpo.all_logprobs(self.model, items, self.config, self.hardware)

    def step(self, items: list[train_dpo.Preference], reference: torch.Tensor) -> float:
        """One optimizer step; returns the loss."""
        run = train_sft.RunData(items, [], InOrder, len(items), 1)
        scaler = torch.amp.GradScaler(self.device, enabled=False)
        metrics = train_dpo.backward_step(self.model, self.model, run, reference, 1, self.config,
                                          self.hardware, scaler)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics["loss"]


class InOrder:
    """A mixer that draws the items as they come."""

    @staticmethod
    def draws(first: int, end: int) -> list[tuple[int, int]]:
        return [(i, 0) for i in range(first, end)]


class TheirsDPO(Theirs):
    """Chosen and rejected rows in one padded batch, under policy and live reference."""

    def __init__(self, config: dict, device):
        super().__init__(config, device)
        self.frozen = copy.deepcopy(self.model).eval().requires_grad_(False)

    def reference(self, items) -> None:
        """Nothing: it is computed in every step."""

    def logprobs(self, model, ids, mask, answers) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]  # [2B, L - 1, V]
        logp = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (logp * answers[:, 1:]).sum(1)

    def step(self, items: list[train_dpo.Preference], reference=None) -> float:
        """One optimizer step; returns the loss."""
        rows = [(p, *p.answers[side]) for side in (0, 1) for p in items]
        length = max(len(p.prompt) + len(ids) for p, ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (p, answer, spans) in enumerate(rows):
            first = len(p.prompt)
            ids[i, :first] = torch.from_numpy(p.prompt)
            ids[i, first : first + len(answer)] = torch.from_numpy(answer)
            mask[i, : first + len(answer)] = 1
            for a, b, _ in spans:
                answers[i, first + a : first + b] = 1
        ids, mask, answers = (t.to(self.device) for t in (ids, mask, answers))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            policy = self.logprobs(self.model, ids, mask, answers)
            with torch.no_grad():
                before = self.logprobs(self.frozen, ids, mask, answers)
        chosen, rejected = (policy - before).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


LOOPS = {"sft": {"ours": Ours, "theirs": Theirs}, "dpo": {"ours": OursDPO, "theirs": TheirsDPO}}


def compare_sft(steps: int, device: str) -> None:
    """Real tokens per second of both SFT loops."""
    examples = rows(SMALL["vocab_size"])
    ours, theirs = Ours(SMALL, device), Theirs(SMALL, device)
    speeds = {"ours": [], "theirs": []}
    for step in range(steps + 1):
        some = examples[step * BATCH : (step + 1) * BATCH]
        losses = []
        for name, loop in (("ours", ours), ("theirs", theirs)):
            began = synchronized()
            losses.append(loop.step(some))
            if step:  # the first step warms up
                speeds[name].append(sum(len(e.ids) for e in some) / (synchronized() - began))
        assert abs(losses[0] - losses[1]) < (0.05 if device == "cuda" else 1e-3), losses
    report("sft", f"SFT, 50M parameters, {BATCH} rows a step, {steps} steps in turn",
           {"real tokens per second": speeds}, device)


def compare_dpo(steps: int, device: str) -> None:
    """Pairs per second of both DPO loops; theirs runs its reference in every step."""
    items = pairs(SMALL["vocab_size"])[: (steps + 1) * PAIRS]
    ours, theirs = OursDPO(SMALL, device), TheirsDPO(SMALL, device)
    reference, speeds = ours.reference(items), {"ours": [], "theirs": []}
    once = {"ours": [], "theirs": []}
    for step in range(steps + 1):
        chosen = slice(step * PAIRS, (step + 1) * PAIRS)
        losses, seconds = [], []
        for loop in (ours, theirs):
            began = synchronized()
            losses.append(loop.step(items[chosen], reference[chosen]))
            seconds.append(synchronized() - began)
        began = synchronized()
        ours.reference(items[chosen])
        extra = synchronized() - began
        if step:  # the first step warms up
            speeds["ours"].append(PAIRS / seconds[0])
            once["ours"].append(PAIRS / (seconds[0] + extra))
            speeds["theirs"].append(PAIRS / seconds[1])
            once["theirs"].append(PAIRS / seconds[1])
        assert abs(losses[0] - losses[1]) < (0.05 if device == "cuda" else 1e-3), losses
    report("dpo", f"DPO, 50M parameters, {PAIRS} pairs a step, {steps} steps in turn",
           {"pairs per second": speeds, "with one reference pass": once}, device)


def report(task: str, title: str, rows: dict[str, dict], device: str) -> None:
    """Medians and pairwise ratios of each row; the peak memory of each loop in a new process."""
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{title}, {device}{threads}")
    print(f"{'':24}{'ours':>10}{'theirs':>10}{'ratio':>8}{'lowest':>8}{'highest':>8}")
    for unit, speeds in rows.items():
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["theirs"], strict=True)]
        fast, slow = (statistics.median(speeds[name]) for name in ("ours", "theirs"))
        print(f"{unit:24}{fast:10.2f}{slow:10.2f}{statistics.median(ratios):8.2f}"
              f"{min(ratios):8.2f}{max(ratios):8.2f}", flush=True)
    memory = []
    for name in ("ours", "theirs"):
        argv = [sys.executable, __file__, "--memory", f"{task} {name}"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        memory.append(float(done.stdout))
    print(f"{'peak memory, GiB':24}{memory[0]:10.2f}{memory[1]:10.2f}{memory[0] / memory[1]:8.2f}")


def measure_memory(which: str, device: str) -> None:
    """Print the peak memory of a few steps of one loop."""
    task, name = which.split()
    loop = LOOPS[task][name](SMALL, device)
    if task == "sft":
        examples = rows(SMALL["vocab_size"])
        for step in range(4):
            loop.step(examples[step * BATCH : (step + 1) * BATCH])
    else:
        items = pairs(SMALL["vocab_size"])[: 4 * PAIRS]
        reference = loop.reference(items)
        for step in range(4):
            chosen = slice(step * PAIRS, (step + 1) * PAIRS)
            loop.step(items[chosen], None if reference is None else reference[chosen])
    print(peak_gib())


def large() -> None:
    """1.1B parameters, 8 rows of 2048 tokens a step, on a GPU.

    MFU = (6 N + 6 n_layers * D * L) * tokens per second / peak FLOPs: 6 N for the N weights in
    matrix products, forward and backward, and 12 n_layers * D * L / 2 for causal attention.
    """
    if not torch.cuda.is_available():
        sys.exit("--large needs a GPU")
    ours, length = Ours(LARGE, "cuda"), 2048
    ids = torch.randint(LARGE["vocab_size"], (8, length)).int().numpy()
    examples = [data.Example(row, ((1, length, 1.0),)) for row in ids]
    ours.step(examples)
    seconds = []
    for _ in range(8):
        began = synchronized()
        ours.step(examples)
        seconds.append(synchronized() - began)
    speed = 8 * length / statistics.median(seconds)
    weights = sum(p.numel() for p in ours.model.parameters()) - LARGE["vocab_size"] * 2048
    flops = 6 * weights + 6 * LARGE["num_hidden_layers"] * LARGE["hidden_size"] * length
    card = torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK_FLOPS.items() if name in card), None)
    share = f"{flops * speed / peak:.1%}" if peak else "? (peak FLOPs of this card unknown)"
    print(f"1.1B parameters, length {length}, {card}: {speed:.0f} tokens/s, MFU {share}, peak "
          f"{peak_gib():.1f} GiB")


EXAM = {**SMALL, "vocab_size": 6400, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
        "tie_word_embeddings": True}  # 2.0M parameters


@torch.no_grad()
def score_in_full(model, prompts: list[list[int]], options: list[tuple]) -> torch.Tensor:
    """What `score_options` gives for options of one token, every prompt encoded whole."""
    scores = torch.empty(len(prompts), len(options))
    for chunk in data.micro_batches([len(p) for p in prompts], 8192)[0]:
        lengths = [len(prompts[i]) for i in chunk]
        ids = torch.tensor([t for i in chunk for t in prompts[i]], device=model.device)  # [T]
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1  # [B]
        logp = model.next_logits(model.hidden(ids, lengths)[0][last]).log_softmax(-1)  # [B, V]
        scores[chunk] = logp[:, [o for (o,) in options]].cpu()
    return scores


def exam(_: int, device: str) -> None:
    """The val split of C-Eval with a random model, on a prefix and in full."""
    folder, source = SHARED / "data/ceval", SHARED / "models/minimind-tokenizer"
    if not folder.exists():
        print(f"the exam's comparison needs C-Eval in {folder}")
        return
    model, began = new_model(EXAM, device).eval(), synchronized()
    c = evaluation.resolve_exam(evaluation.Exam(data=str(folder), shots=5))
    tokenizer, subjects = data.ChatTokenizer(source), evaluation.read_exam(c)
    sheets = [evaluation.make_sheet(tokenizer, s, c, 2048) for s in subjects]
    encoding = synchronized() - began
    loops = {"on a prefix": lambda *a: evaluation.score_options(*a, 8192), "in full": score_in_full}
    seconds, scores = {name: [] for name in loops}, {name: [] for name in loops}
    for turn in range(4):  # both in turn, subject by subject; the first turn warms up
        for name in loops:
            seconds[name].append(0.0)
        for sheet in sheets:
            for name, score in loops.items():
                began = synchronized()
                found = score(model, sheet.prompts, sheet.options)
                seconds[name][turn] += synchronized() - began
                scores[name] += [] if turn else [found]
    ours, full = (torch.cat(scores[name]) for name in loops)
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"C-Eval val, 5 shots, {len(ours)} questions, 2.0M parameters, {device}{threads}; "
          f"reading and encoding {encoding:.1f} s")
    for name, values in seconds.items():
        value = statistics.median(values[1:])
        print(f"{name:24}{value:8.1f} s{1e3 * value / len(ours):10.2f} ms a question")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)][1:]
    print(f"{statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}), "
          f"{(ours.argmax(1) == full.argmax(1)).sum()} of {len(ours)} predictions agree, largest "
          f"difference {(ours - full).abs().max():.1e} nats")


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", choices=[*LOOPS, "exam"], help="one comparison instead of all")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.memory:
        measure_memory(flags.memory, device)
    elif flags.large:
        large()
    else:
        for task, compare in (("sft", compare_sft), ("dpo", compare_dpo), ("exam", exam)):
            if flags.only in (None, task):
                compare(flags.steps, device)


if __name__ == "__main__":
    main()
