"""Speed and memory of the training steps and the exam against bare loops, on this machine.

    python -m labs.bench                    # SFT, DPO and the exam, each beside other loops
    python -m labs.bench --only dpo         # one of them: sft, dpo, exam
    python -m labs.bench --dtype bf16       # the products of all loops in 16 bit
    python -m labs.bench --large            # 1.1B parameters at length 2048, eager and compiled
    python -m labs.bench --gpu              # the first ten minutes on a new GPU, as one command
    python -m labs.bench --tiny --steps 1   # a toy model, only to try the commands

In SFT and DPO three loops, in turn, train the same random model (50M parameters, vocabulary 32,000)
on the same rows: 16 of ../shared/data/alpaca_zh_demo.json per step, for DPO 4 pairs of
dpo_zh_demo.json, or random rows of such lengths where those files are absent.

    ours    the project's own step
    bare    what a careful engineer writes around transformers' Llama in an evening: rows end to end
            with one attention call per example, a prompt encoded once for both answers, the LM head
            at supervised positions only, the reference's log-probabilities ready
    padded  what a tutorial shows: rows padded to the longest (chosen and rejected together), logits
            of every position, the reference run in every step

SFT's speed counts real tokens, padding excluded. Peak memory is that of a process of its own (CPU)
or of the allocator (GPU), weights, gradients and optimizer included. What one should see: ours
ahead of bare by little, of padded by much; the memory of ours the smallest.
"""

import argparse
import copy
import os
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
TINY = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 6400}
DTYPE = "fp32"  # of matrix products: fp32 or bf16, see --dtype
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
    model = modeling.Llama(modeling.read_config(config))
    model.initialize(0)
    return model.to(device).train()


def size(model: torch.nn.Module) -> str:
    """Its parameters in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


class Ours:
    """Flat micro-batches sorted by length, LM head at supervised positions only."""

    compiled = False

    def __init__(self, config: dict, device):
        self.device, self.model = device, new_model(config, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if self.compiled:
            self.model.compile_layers()

    def step(self, examples: list[data.Example]) -> float:
        """One optimizer step; returns the loss."""
        total, count = 0.0, sum(e.targets for e in examples)
        for chunk in data.micro_batches([len(e.ids) for e in examples], MICRO_TOKENS)[0]:
            batch = data.collate([examples[i] for i in chunk], self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=DTYPE == "bf16"):
                logp = self.model(batch.ids, batch.lengths, batch.targets)
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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

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
        with torch.autocast(self.device, torch.bfloat16, enabled=DTYPE == "bf16"):
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
        self.hardware = train_sft.Hardware(0, 1, torch.device(device),
                                           torch.bfloat16 if DTYPE == "bf16" else torch.float32)

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

    def padded(self, items: list[train_dpo.Preference]) -> list[torch.Tensor]:
        """ids, what is no padding, what an answer is: [2B, L] each, all chosen before rejected."""
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
        return [t.to(self.device) for t in (ids, mask, answers)]

    def step(self, items: list[train_dpo.Preference], reference=None) -> float:
        """One optimizer step; returns the loss."""
        ids, mask, answers = self.padded(items)
        with torch.autocast(self.device, torch.bfloat16, enabled=DTYPE == "bf16"):
            policy = self.logprobs(self.model, ids, mask, answers)
            with torch.no_grad():
                before = self.logprobs(self.frozen, ids, mask, answers)
        chosen, rejected = (policy - before).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def attend_spans(module, q, k, v, mask, scaling=None, spans=(), **_):
    """One attention call per example of a row: spans are (slice of its prefix or None, its own)."""
    out = []
    for before, own in spans:
        seen = [t[:, :, own] for t in (k, v)]
        mask, length = None, own.stop - own.start
        if before is not None:
            seen = [torch.cat((t[:, :, before], x), 2) for t, x in zip((k, v), seen, strict=True)]
            size = seen[0].shape[2]
            mask = torch.ones(length, size, dtype=torch.bool, device=q.device).tril(size - length)
        out.append(torch.nn.functional.scaled_dot_product_attention(
            q[:, :, own], *seen, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2), None


class Bare:
    """transformers' model on examples end to end, the LM head where a token is wanted."""

    def __init__(self, config: dict, device):
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("spans", attend_spans)
        AttentionMaskInterface.register("spans", lambda *_, **__: None)
        self.device = device
        settings = {k: v for k, v in config.items() if k != "model_type"}
        settings["attn_implementation"] = "spans"
        self.model = LlamaForCausalLM(LlamaConfig(**settings)).to(device).train()
        self.model.load_state_dict(new_model(config, device).state_dict(), strict=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def states(self, ids: list, positions: list, spans: list) -> torch.Tensor:
        """Last hidden states [T, D]."""
        ids, positions = (torch.tensor([x], device=self.device) for x in (ids, positions))
        return self.model.model(input_ids=ids, position_ids=positions, use_cache=False,
                                spans=spans).last_hidden_state[0]

    def logprobs(self, states, at: list, targets: list) -> torch.Tensor:
        """ln p of the targets [N] from the states before them."""
        logits = self.model.lm_head(states[at]).float()  # [N, V]
        targets = torch.tensor(targets, device=self.device)
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def step(self, examples: list[data.Example]) -> float:
        """One optimizer step of SFT; returns the loss."""
        total, count = 0.0, sum(e.targets for e in examples)
        for chunk in data.micro_batches([len(e.ids) for e in examples], MICRO_TOKENS)[0]:
            ids, positions, spans, at = [], [], [], []
            for e in (examples[i] for i in chunk):
                start = len(ids)
                ids += e.ids.tolist()
                positions += range(len(e.ids))
                spans.append((None, slice(start, len(ids))))
                at += [start + t - 1 for first, end, _ in e.spans for t in range(first, end)]
            with torch.autocast(self.device, torch.bfloat16, enabled=DTYPE == "bf16"):
                states = self.states(ids, positions, spans)
                loss = -self.logprobs(states, at, [ids[t + 1] for t in at]).sum() / count
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class BareDPO(Bare):
    """Prompt and chosen answer as one example, the rejected one after the same prompt."""

    def answers(self, items) -> torch.Tensor:
        """The sums of ln p of both answers of each pair: [B, 2]."""
        ids, positions, spans, at, targets, sizes = [], [], [], [], [], []
        for p in items:
            start, prompt = len(ids), p.prompt.tolist()
            ids, positions = ids + prompt, positions + list(range(len(prompt)))
            for side, (answer, marks) in enumerate(p.answers):
                base = len(ids)
                ids += answer.tolist()
                positions += range(len(prompt), len(prompt) + len(answer))
                before = slice(start, start + len(prompt)) if side and prompt else None
                spans.append((before, slice(base if side else start, len(ids))))
                own = [base + t for first, end, _ in marks for t in range(first, end)]
                at, targets = at + [t - 1 for t in own], targets + [ids[t] for t in own]
                sizes.append(len(own))
        with torch.autocast(self.device, torch.bfloat16, enabled=DTYPE == "bf16"):
            logp = self.logprobs(self.states(ids, positions, spans), at, targets)
        return torch.stack([x.sum() for x in logp.split(sizes)]).view(-1, 2)

    @torch.no_grad()
    def reference(self, items) -> torch.Tensor:
        """Computed once, as ours."""
        return torch.cat([self.answers([p]).cpu() for p in items])

    def step(self, items: list[train_dpo.Preference], reference: torch.Tensor) -> float:
        """One optimizer step; returns the loss."""
        total = 0.0
        for chunk in data.micro_batches([p.tokens for p in items], MICRO_TOKENS)[0]:
            ratio = self.answers([items[i] for i in chunk]) - reference[chunk].to(self.device)
            margin = ratio[:, 0] - ratio[:, 1]  # [B]
            loss = -torch.nn.functional.logsigmoid(0.1 * margin).sum() / len(items)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


LOOPS = {"sft": {"ours": Ours, "bare": Bare, "padded": Theirs},
         "dpo": {"ours": OursDPO, "bare": BareDPO, "padded": TheirsDPO}}


def batches(task: str, count: int):
    """(batches of rows, what is counted of a batch) of a comparison."""
    if task == "dpo":
        items = pairs(SMALL["vocab_size"])[: count * PAIRS]
        return [items[i : i + PAIRS] for i in range(0, len(items), PAIRS)], len
    examples = rows(SMALL["vocab_size"])[: count * BATCH]
    work = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return work, lambda some: sum(len(e.ids) for e in some)


def compare(task: str, steps: int, device: str) -> None:
    """Speed of the loops of a task, in turn; the first step warms up."""
    work, measure = batches(task, steps + 1)
    loops = {name: make(SMALL, device) for name, make in LOOPS[task].items()}
    known = {name: loop.reference(sum(work, [])) if task == "dpo" else None
             for name, loop in loops.items()}
    speeds = {name: [] for name in loops}
    for step, some in enumerate(work):
        losses = []
        for name, loop in loops.items():
            part = () if task == "sft" else (
                None if known[name] is None else known[name][step * PAIRS : (step + 1) * PAIRS],)
            began = synchronized()
            losses.append(loop.step(some, *part))
            if step:
                speeds[name].append(measure(some) / (synchronized() - began))
        assert max(losses) - min(losses) < (0.05 if DTYPE == "bf16" else 1e-3), losses
    unit = "real tokens per second" if task == "sft" else "pairs per second"
    report(task, unit, speeds, device)


def report(task: str, unit: str, speeds: dict[str, list], device: str) -> None:
    """Medians, ours divided by each, and the peak memory of each loop in a new process."""
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    steps = len(speeds["ours"])
    print(f"{task}, {size(new_model(SMALL, 'cpu'))} parameters, {steps} steps in turn, {DTYPE}, "
          f"{device}{threads}")
    print(f"{'':10}{unit:>24}{'ours is times':>15}{'(lowest, highest)':>20}{'peak GiB':>10}")
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(speeds["ours"], values, strict=True)]
        argv = [sys.executable, "-m", "labs.bench", "--memory", f"{task} {name}", "--dtype", DTYPE,
                *(["--tiny"] if SMALL is TINY else [])]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"{name:10}{statistics.median(values):24.2f}{statistics.median(ratios):15.2f}"
              f"{spread:>20}{float(done.stdout):10.2f}", flush=True)


def measure_memory(which: str, device: str) -> None:
    """Print the peak memory of a few steps of one loop."""
    task, name = which.split()
    loop = LOOPS[task][name](SMALL, device)
    for some in batches(task, 4)[0]:
        loop.step(some, *([loop.reference(some)] if task == "dpo" else []))
    print(peak_gib())


def large(device: str, steps: int = 8) -> None:
    """1.1B parameters, 8 rows of 2048 tokens per step, eager and compiled.

    MFU = (6 N + 6 n_layers * D * L) * tokens per second / peak FLOPs: 6 N for the N weights in
    matrix products, forward and backward, and 12 n_layers * D * L / 2 for causal attention.
    """
    length, card = 2048, torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK_FLOPS.items() if name in card), None)
    ids = torch.randint(LARGE["vocab_size"], (8, length)).int().numpy()
    examples = [data.Example(row, ((1, length, 1.0),)) for row in ids]
    print(f"MFU = (6 N + 6 n_layers D L) tokens/s / peak; 1.1B parameters, L = {length}, {card}")
    for compiled in (False, True):
        torch.cuda.reset_peak_memory_stats()
        ours = Ours(LARGE, device)
        if compiled:
            ours.model.compile_layers()
        for _ in range(2):  # warm up and compile
            ours.step(examples)
        seconds = []
        for _ in range(steps):
            began = synchronized()
            ours.step(examples)
            seconds.append(synchronized() - began)

        speed = 8 * length / statistics.median(seconds)
        weights = sum(p.numel() for p in ours.model.parameters()) - LARGE["vocab_size"] * 2048
        flops = 6 * weights + 6 * LARGE["num_hidden_layers"] * LARGE["hidden_size"] * length
        share = f"{flops * speed / peak:.1%}" if peak else "? (peak FLOPs of this card unknown)"
        print(f"{'compiled' if compiled else 'eager':10}{speed:9.0f} tokens/s   MFU {share}   peak "
              f"{peak_gib():.1f} GiB", flush=True)
        del ours
        torch.cuda.empty_cache()


def first_minutes() -> None:
    """What one wants to know of a new GPU in ten minutes: tests, waits, kernels, speed, graphs."""
    began = time.perf_counter()

    def run(title: str, *command: str, **environment: str) -> None:
        left = 590 - (time.perf_counter() - began)
        print(f"--- {title}: {' '.join(command)}", flush=True)
        try:
            done = subprocess.run([sys.executable, *command], env={**os.environ, **environment},
                                  capture_output=True, text=True, timeout=max(left, 1))
        except subprocess.TimeoutExpired:
            print("no time left")
            return
        lines = [x for x in (done.stdout + done.stderr).splitlines() if x.strip()]
        print("\n".join(lines[-25:]), flush=True)

    run("tests that need CUDA", "-m", "pytest", "-q", "-k", "cuda", "tests/test_model.py")
    run("speed of 1.1B", "-m", "labs.bench", "--large")
    run("waits, kernels, attention of a step", "-m", "labs.bench", "--profile")
    run("recompilations over ragged steps", "-m", "labs.bench", "--only", "sft", "--dtype", "bf16",
        "--compile", TORCH_LOGS="recompiles")
    run("DPO", "-m", "labs.bench", "--only", "dpo", "--dtype", "bf16")


def profile_steps(device: str) -> None:
    """Where a step waits for the device, and which kernels take its time."""
    from torch.profiler import ProfilerActivity, profile

    for task in ("sft", "dpo"):
        loop = LOOPS[task]["ours"](SMALL, device)
        first, second = batches(task, 2)[0]
        known = [[loop.reference(some)] if task == "dpo" else [] for some in (first, second)]
        loop.step(first, *known[0])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        activities = [ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as recorded:
            loop.step(second, *known[1])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(f"{task}:\n{recorded.key_averages().table(sort_by=order, row_limit=12)}")


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


class BareExam(Bare):
    """A row of the shots followed by questions, each of which continues the shots."""

    @torch.no_grad()
    def score(self, _, prompts: list[list[int]], options: list[tuple]) -> torch.Tensor:
        """What `score_options` gives for options of one token."""
        shared = min(data.common_prefix(prompts), min(map(len, prompts)) - 1)
        ids, positions = prompts[0][:shared], list(range(shared))
        spans, at = [(None, slice(0, shared))] if shared else [], []
        for prompt in prompts:
            start = len(ids)
            ids, positions = ids + prompt[shared:], positions + list(range(shared, len(prompt)))
            spans.append((slice(0, shared) if shared else None, slice(start, len(ids))))
            at.append(len(ids) - 1)
        logits = self.model.lm_head(self.states(ids, positions, spans)[at])  # [B, V]
        return logits.log_softmax(-1)[:, [o for (o,) in options]].cpu()


def exam(steps: int, device: str) -> None:
    """The val split of C-Eval with random models: on a prefix, in a bare loop, in full."""
    folder, source = SHARED / "data/ceval", SHARED / "models/minimind-tokenizer"
    if not folder.exists():
        print(f"the exam's comparison needs C-Eval in {folder}")
        return
    c = evaluation.resolve_exam(evaluation.Exam(data=str(folder), shots=5))
    tokenizer, subjects = data.ChatTokenizer(source), evaluation.read_exam(c)
    sheets = [evaluation.make_sheet(tokenizer, s, c, 2048) for s in subjects]
    larger = {**SMALL, "num_hidden_layers": 8}
    for config, some in ((EXAM, sheets), (larger, sheets[::6])):
        model, bare = new_model(config, device).eval(), BareExam(config, device)
        bare.model.eval()
        loops = {"ours": lambda *a: evaluation.score_options(*a, 8192), "bare": bare.score,
                 "in full": score_in_full}
        seconds, scores = time_exam(loops, model, some, min(steps, 2))

        asked = len(scores["ours"])
        print(f"exam, 5 shots, {asked} questions, {size(model)} parameters, fp32, {device}, "
              f"{torch.get_num_threads()} threads")
        for name, values in seconds.items():
            ratio = sum(values) / sum(seconds["ours"])
            apart = (scores["ours"] - scores[name]).abs().max()
            print(f"{name:10}{1e3 * sum(values) / asked:8.2f} ms per question; ours is {ratio:.2f} "
                  f"times as fast; largest difference {apart:.1e} nats", flush=True)


def time_exam(loops: dict, model, sheets: list, turns: int) -> tuple[dict, dict]:
    """The seconds and the scores of each loop, in turn and subject by subject."""
    seconds, scores = {name: [] for name in loops}, {name: [] for name in loops}
    for turn in range(1 + turns):
        for sheet in sheets if turn else sheets[:1]:  # the first turn warms up
            for name, score in loops.items():
                began = synchronized()
                found = score(model, sheet.prompts, sheet.options)
                if turn:
                    seconds[name].append(synchronized() - began)
                    scores[name].append(found)
    return seconds, {name: torch.cat(found) for name, found in scores.items()}


def main(argv: list[str] | None = None) -> None:
    """Read the flags."""
    global DTYPE, SMALL, EXAM
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--large", action="store_true", help="1.1B parameters, needs a GPU")
    parser.add_argument("--gpu", action="store_true", help="what to run first on a new GPU")
    parser.add_argument("--profile", action="store_true", help="waits and kernels of a step")
    parser.add_argument("--compile", action="store_true", help="compile our layers")
    parser.add_argument("--only", choices=[*LOOPS, "exam"], help="one comparison instead of all")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the commands")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    DTYPE = flags.dtype or ("bf16" if device == "cuda" else "fp32")
    Ours.compiled = flags.compile
    if flags.tiny:
        SMALL = EXAM = TINY
    if (flags.large or flags.gpu) and device != "cuda":
        sys.exit("there is no CUDA device here: --large and --gpu need one")

    if flags.gpu:
        first_minutes()
    elif flags.large:
        large(device)
    elif flags.profile:
        profile_steps(device)
    elif flags.memory:
        measure_memory(flags.memory, device)
    else:
        for task in ("sft", "dpo", "exam"):
            if flags.only in (None, task):
                exam(flags.steps, device) if task == "exam" else compare(task, flags.steps, device)


if __name__ == "__main__":
    main()
