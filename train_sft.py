"""Supervised fine-tuning, and continued pretraining, in one loop you can read.

    torchrun train_sft.py                                # the built-in demo, two minutes on a CPU
    torchrun train_sft.py --model DIR --data a.json b.jsonl --output_dir out/sft
    torchrun --nproc_per_node=8 train_sft.py --model DIR --data a.json --recipe llama2
    torchrun train_sft.py --resume --output_dir out/sft  # go on after a stop or a crash

The loss of a step is the sum of the negative log-probabilities of the supervised tokens of the
whole global step, divided by their number: it does not depend on how the step is cut into
micro-batches and dealt to ranks.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import model as modeling
from model import InputError, check

# ------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Fine-tune a Llama-family checkpoint on conversations, instructions or raw text."""

    model: str = ""  # checkpoint folder in Hugging Face layout; empty: the built-in demo
    data: list[str] = field(default_factory=list)  # training files: .json, .jsonl, .txt, also .gz
    output_dir: str = "out/sft"  # where checkpoint, metrics and state go
    recipe: str = ""  # a paper's preset: llama2, lima, qwen, ...; explicit flags win over it
    resume: bool = False  # go on from output_dir with the flags of its run.json
    # optimization: these change the result
    mix: Literal["proportional", "temperature", "equal", "weights"] = "proportional"  # of the files
    temperature: float = 2.0  # of --mix temperature: 1 is proportional, large is equal
    cap: int = 0  # examples a file counts for at most under --mix temperature (T5's K); 0: all
    weights: list[float] = field(default_factory=list)  # of --mix weights, one a file
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised
    eot: str = ""  # token such as <|end|> that ends an answer instead of EOS (LIMA); added if new
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens an example; longer ones are truncated, raw text is split
    val_data: list[str] = field(default_factory=list)  # validation files
    val_fraction: float = 0.0  # or this share of the training examples, kept out of training
    batch_size: int = 16  # examples per optimizer step, over all ranks
    epochs: float = 3.0  # passes over the data
    steps: int = 0  # optimizer steps, instead of epochs
    learning_rate: float = 0.0  # peak; 0: 2e-5 * 4096 / hidden_size
    min_learning_rate: float = 0.0  # floor of cosine and linear
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    warmup: float = 0.03  # below 1 a fraction of the steps, else steps
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.95  # decay of the mean of squared gradients
    adam_epsilon: float = 1e-8  # added to the root of the latter
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0  # clip the global norm of the gradient; 0: do not
    dropout: list[float] = field(default_factory=lambda: [0.0])  # residual; two: bottom, top layer
    neftune_alpha: float = 0.0  # noise on embeddings, +- alpha / sqrt(length * hidden_size)
    seed: int = 0  # of order, noise and dropout
    # hardware: these must not change the result
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; weights are fp32
    compile: bool = False  # torch.compile the layers: slow first steps, then faster on a GPU
    checkpoint_activations: bool = False  # recompute layers in the backward: less memory, slower
    log_every: int = 10  # steps between lines when the output is no terminal
    eval_every: int = 0  # steps between validations; 0: before and after training
    exam_data: str = ""  # an exam's folder (eval.py exam), asked in the chat template, no shots
    exam_every: int = 0  # steps between exams; 0: after training
    save_every: int = 500  # steps between checkpoints; there is always one at the end
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping


HARDWARE = {"output_dir", "resume", "micro_tokens", "dtype", "compile", "checkpoint_activations",
            "log_every", "eval_every", "exam_data", "exam_every", "save_every"}

# What each paper publishes; what it does not keeps the default. All AdamW.
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95}
RECIPES = {
    # Llama 2 (arXiv:2307.09288, section 3.1): 27,540 rows, loss on answers only
    "llama2": {**ADAM, "learning_rate": 2e-5, "schedule": "cosine", "weight_decay": 0.1,
               "batch_size": 64, "max_length": 4096, "epochs": 2},
    # LIMA (arXiv:2305.11206, section 3): batch 64 for its smaller models; dropout 0 at the bottom
    # layer to 0.3 at the top
    "lima": {**ADAM, "learning_rate": 1e-5, "min_learning_rate": 1e-6, "schedule": "linear",
             "warmup": 0, "weight_decay": 0.1, "batch_size": 32, "max_length": 2048, "epochs": 15,
             "dropout": [0.0, 0.3]},
    # Qwen (arXiv:2309.16609, section 3.1)
    "qwen": {**ADAM, "learning_rate": 2e-6, "warmup": 1430, "adam_epsilon": 1e-8,
             "weight_decay": 0.1, "batch_size": 128, "max_length": 2048, "steps": 4000,
             "dropout": [0.1], "max_grad_norm": 1.0},
    # DeepSeek LLM (arXiv:2401.02954, section 4): rate and epochs only
    "deepseek-7b": {"learning_rate": 1e-5, "epochs": 4},
    "deepseek-67b": {"learning_rate": 5e-6, "epochs": 2},
    # Yi (arXiv:2403.04652, section 3.2): NEFTune 5 for the 6B model, 45 for the 34B one
    "yi-6b": {"learning_rate": 1e-5, "schedule": "constant", "adam_beta1": 0.9,
              "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.1, "batch_size": 64,
              "max_length": 4096, "steps": 300, "max_grad_norm": 1.0, "neftune_alpha": 5.0},
    # Steel-LLM (arXiv:2502.06635)
    "steel-llm": {"learning_rate": 2e-5, "schedule": "cosine", "weight_decay": 0.0,
                  "batch_size": 64, "max_length": 2048, "epochs": 3},
}
RECIPES["yi-34b"] = {**RECIPES["yi-6b"], "neftune_alpha": 45.0}


def resolve_config(cls, argv: list[str], recipes: dict, demo):
    """Defaults, then demo()'s values or the resumed run's, then the recipe's, then the flags."""
    given = data.parse_flags(cls, argv)
    base, recipe = {}, given.get("recipe", "")
    if given.get("resume"):
        path = Path(given.get("output_dir", cls.output_dir)) / "run.json"
        if not path.is_file():
            raise InputError(f"--resume: {path} does not exist, so there is no run to go on with")
        base = json.loads(path.read_text(encoding="utf-8"))["config"]
        check(set(base) == {f.name for f in fields(cls)},
             f"--resume: the run in {path} is of another script, or of another version of this one")
        for name in given:
            if name not in HARDWARE and base[name] != given[name]:
                raise InputError(f"--resume: --{name} was {base[name]!r}, not {given[name]!r}; "
                                "flags that change the result stay as they were")
    elif not given.get("model") and not given.get("data"):
        base = demo()
        if "val_fraction" in given:  # instead of the demo's own validation
            base = {**base, "val_data": []}
    if recipe not in ("", *recipes):
        raise InputError(f"unknown recipe {recipe!r}; known are {', '.join(recipes)}")
    if "steps" in given and "epochs" in given:
        raise InputError("--steps and --epochs exclude each other; give one")
    preset = {**base, **recipes.get(recipe, {})}
    if "epochs" in given or ("epochs" in recipes.get(recipe, {}) and "steps" not in given):
        preset["steps"] = 0
    config = cls(**{**preset, **given})
    check_config(config)
    return config


def check_config(c) -> None:
    """Raise InputError for values and combinations that make no sense."""
    check(c.model, "--data needs --model DIR, a checkpoint (no flag at all runs the demo)")
    check(c.data, "--model needs --data FILE..., what to train on (no flag runs the demo)")
    for name in ("batch_size", "micro_tokens", "log_every", "epochs"):
        check(getattr(c, name) > 0, f"--{name} must be above 0, not {getattr(c, name)}")
    for name in ("steps", "warmup", "weight_decay", "max_grad_norm", "neftune_alpha", "eval_every",
                 "exam_every", "save_every", "learning_rate", "min_learning_rate", "cap", "seed"):
        value = getattr(c, name)
        check(0 <= value < math.inf, f"--{name} must be 0 or more, is {value}")
    for name in ("adam_beta1", "adam_beta2", "val_fraction"):
        check(0 <= getattr(c, name) < 1, f"--{name} must be in [0, 1), not {getattr(c, name)}")
    check(c.max_length >= 2, f"--max_length must be at least 2, not {c.max_length}")
    check(c.min_learning_rate <= (c.learning_rate or math.inf),
         "--min_learning_rate is above --learning_rate")
    check(len(c.dropout) < 3 and all(0 <= p < 1 for p in c.dropout),
         f"--dropout takes one or two rates in [0, 1), not {c.dropout}")
    check(not (c.val_data and c.val_fraction), "--val_data and --val_fraction: give one of them")
    data.check_mix(c, c.data)
    check(c.exam_data or not c.exam_every, "--exam_every needs --exam_data DIR")


# --------------------------------------------------------------------------- schedule and optimizer


def learning_rate_at(step: int, steps: int, c) -> float:
    """Linear warmup to the peak, then down to the floor, or constant; `step` counts from 0."""
    warmup = round(c.warmup * steps) if c.warmup < 1 else int(c.warmup)
    if step < warmup:
        return c.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    left = {"constant": 1.0, "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2}[c.schedule]
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * left


def make_optimizer(model, c) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) on fp32 weights; norms and biases are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.adam_beta1, c.adam_beta2),
                             eps=c.adam_epsilon, fused=model.device.type != "mps")


def set_learning_rate(optimizer, step: int, steps: int, c) -> float:
    """Give the optimizer the rate of `step`, which counts from 1."""
    rate = learning_rate_at(step - 1, steps, c)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_and_step(model, optimizer, scaler, c, loss: float, run, step: int) -> float | None:
    """Clip the gradients and take the optimizer's step; returns their norm before clipping.

    None stands for an fp16 overflow, for which the scaler leaves the step out. Raises InputError,
    before anything is updated, if loss or norm is not finite.
    """
    scaler.unscale_(optimizer)  # fp16 gradients were scaled up, so that small ones survive
    limit = c.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        rows = ", ".join(run.train[i].where for i, _ in run.step(step - 1, c.batch_size))
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}: not finite, nothing "
                        f"was updated; lower --learning_rate, or look at its rows: {rows}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm if math.isfinite(norm) else None


# ------------------------------------------------------------------------------ ranks and precision


class Hardware(NamedTuple):
    """What this process runs on."""

    rank: int
    world: int  # number of ranks
    device: torch.device
    dtype: torch.dtype  # of matrix products

    def autocast(self):
        """Matrix products in `dtype`; norms, softmax and sums in fp32; weights stay fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the other ranks, all at once: gloo aborts where one is gone before the rest."""
        self.barrier()
        if self.world > 1:
            dist.destroy_process_group()


def setup_hardware(dtype: str) -> Hardware:
    """Find the device, join the other ranks that torchrun started, choose the precision."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = modeling.best_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Hardware(rank, world, device, modeling.best_dtype(dtype, device))


def watch_signals() -> list[int]:
    """A list that SIGTERM and Ctrl-C add themselves to, so that the loop can finish its step."""
    received = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: received.append(number))
    return received


def load_trainable(c, hardware: Hardware, tokenizer=None):
    """The model with fp32 weights in training mode, and the same wrapped for several ranks."""
    model = modeling.load(c.model, torch.float32, hardware.device).train()
    if tokenizer and tokenizer.eot_is_new:  # begins as EOS
        modeling.add_token(model, tokenizer.stop_id, tokenizer.eos_id)
    model.set_dropout(c.dropout[0], c.dropout[-1])
    model.checkpoint_activations = c.checkpoint_activations
    if c.compile:
        model.compile_layers()
    return model, DistributedDataParallel(model) if hardware.world > 1 else model


# ---------------------------------------------------------------------------- checkpoints and state


def save_checkpoint(model, tokenizer: data.ChatTokenizer, folder: Path) -> None:
    """A checkpoint any Hugging Face tool loads, in the precision the weights were stored in."""
    modeling.save(model, folder, model.stored_dtype)
    tokenizer.save(folder)
    generation = {"bos_token_id": tokenizer.bos_ids[0]} if tokenizer.bos_ids else {}
    generation["eos_token_id"] = tokenizer.stop_ids
    modeling.write_json(folder / "generation_config.json", generation)


def save_state(path: Path, model, optimizer, scaler, step: int) -> None:
    """All a resumed run needs in one file: fp32 weights, both Adam moments, step and scaler."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    tensors = {key: value.to("cpu").contiguous() for key, value in tensors.items()}
    meta = {"step": str(step), "scaler": json.dumps(scaler.state_dict())}
    modeling.write_atomic(path, lambda temporary: save_file(tensors, temporary, meta))


def load_state(path: Path, model, optimizer, scaler) -> None:
    """Put a saved state back bit for bit."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}").to(p.device)
                                  for key in ("step", "exp_avg", "exp_avg_sq")}
        if saved := json.loads(file.metadata()["scaler"]):
            scaler.load_state_dict(saved)


def start_training(c, start_step: int, steps: int, model, hardware: Hardware) -> tuple:
    """(optimizer, fp16 scaler, signals received, log), as they were if the run is resumed."""
    optimizer = make_optimizer(model, c)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    if start_step:
        load_state(Path(c.output_dir) / "state" / "state.safetensors", model, optimizer, scaler)
    return optimizer, scaler, watch_signals(), Log(c, start_step, steps, hardware)


def save_run(c, tokenizer, model, optimizer, scaler, step: int, hardware: Hardware) -> None:
    """Checkpoint and state, written by the first rank while the others wait."""
    folder = Path(c.output_dir)
    if hardware.rank == 0:
        save_checkpoint(model, tokenizer, folder)
        save_state(folder / "state" / "state.safetensors", model, optimizer, scaler, step)
    hardware.barrier()


def find_start_step(c) -> int:
    """The step to start from, 0 unless resumed; an unfinished run is not silently overwritten."""
    folder = Path(c.output_dir)
    path, step = folder / "state" / "state.safetensors", 0
    if path.exists():
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
    if c.resume:
        return step
    if step and step < (steps := modeling.read_json(folder / "run.json")["steps"]):
        raise InputError(f"{folder} holds a run that stopped at step {step} of {steps}; add "
                        f"--resume to go on, or choose another --output_dir, or delete it")
    return 0


def start_run(c, steps: int, facts: dict, hardware: Hardware) -> None:
    """Write run.json; a resumed run must find the data it began with."""
    path = Path(c.output_dir) / "run.json"
    if c.resume:
        before = modeling.read_json(path)["data_hashes"]
        for name in facts["data_hashes"]:
            if before.get(name) != facts["data_hashes"][name]:
                raise InputError(f"--resume: {name} has changed since the run began")
    if hardware.rank == 0:
        if not c.resume:  # the state of an earlier run is none of this one's
            (path.parent / "state" / "state.safetensors").unlink(missing_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        modeling.write_json(path, {
            "config": {**asdict(c), "resume": False}, "steps": steps, "ranks": hardware.world,
            "device": str(hardware.device), "dtype": str(hardware.dtype), "versions": versions,
            **facts})


def announce(c, model, tokenizer: data.ChatTokenizer, steps: int, hardware: Hardware) -> None:
    """Print what is about to be trained, and every flag that is not empty."""
    count, config = sum(p.numel() for p in model.parameters()), model.config
    kind = str(hardware.dtype).removeprefix("torch.")
    print(f"{count / 1e6:.2f}M parameters, {hardware.world} x {hardware.device.type}, {kind}; "
          f"template {tokenizer.template.name}, {steps} steps of {c.batch_size} examples")
    print(*(f"{k}={v}" for k, v in asdict(c).items() if v not in ("", [], 0)))
    if c.max_length > config.max_position_embeddings:
        print(f"note: the checkpoint was made for {config.max_position_embeddings} positions")


# --------------------------------------------------------------------------------- logs and figures


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Log:
    """metrics.jsonl, and a progress bar, or where there is no terminal a line now and then."""

    def __init__(self, c, start_step: int, steps: int, hardware: Hardware):
        self.path, self.every = Path(c.output_dir) / "metrics.jsonl", c.log_every
        self.steps, self.device, self.main = steps, hardware.device, hardware.rank == 0
        self.records = self.earlier(start_step) if self.main else []
        self.bar = tqdm(total=steps, initial=start_step, unit=" steps", dynamic_ncols=True,
                        disable=not self.main or not sys.stderr.isatty())

    def earlier(self, start_step: int) -> list[dict]:
        """The records up to `start_step`; later lines, and half a line of a crash, are dropped."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if start_step else []
        records = []
        for line in lines[:start_step]:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        modeling.write_lines(self.path, (json.dumps(r) + "\n" for r in records))
        return records

    def write(self, record: dict, shown: dict) -> None:
        """One step's record to the file, and `shown` (name: text) to the screen."""
        if not self.main:
            return
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = {**shown, "lr": f"{record['learning_rate']:.2e}",
                 "tok/s": f"{record['tokens_per_second']:.0f}",
                 "mem": f"{peak_memory(self.device):.1f}G"}
        self.bar.set_postfix(shown)
        self.bar.update()
        step = record["step"]
        if self.bar.disable and (step % self.every == 0 or step in (1, self.steps)):
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {step}/{self.steps}  {text}", flush=True)


def draw_figure(path: Path, records: list[dict], curves: dict[str, str], unit: str) -> None:
    """Metrics over steps and the learning rate below them; without matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for key, label in curves.items():
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            marker = "." if len(points) < 50 else ""
            top.plot(*zip(*points, strict=True), label=label, marker=marker)
    bottom.plot([r["step"] for r in records], [r["learning_rate"] for r in records], "tab:gray")
    top.set_ylabel(unit)
    top.legend()
    bottom.set(ylabel="learning rate", xlabel="step")
    modeling.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


# ----------------------------------------------------------------------------------- data of a run


class RunData(NamedTuple):
    """What a run trains and validates on."""

    train: list[data.Example]
    validation: list[data.Example]
    mixer: data.Mixer
    draws: int  # examples of the whole run
    steps: int

    def step(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """(example, visit) of optimizer step `step`, from 0; the run's last step may be short."""
        return self.mixer.draws(step * batch_size, min((step + 1) * batch_size, self.draws))


def prepare_data(c, load, quiet: bool) -> tuple[RunData, dict]:
    """Read, tokenise, split and mix the files of --data; and what run.json says of it.

    load(files) gives examples, or preferences, and what was dropped by reason.
    """
    train, counts = load(c.data)
    validation = load(c.val_data)[0] if c.val_data else []
    if c.val_fraction:
        train, validation = data.split_validation(train, c.val_fraction, c.seed)
    if not quiet:
        print(f"{len(train)} training, {len(validation)} validation examples", *(
            f"; {reason}: {count}" for reason, count in counts.items()), sep="")
    draws = c.steps * c.batch_size if c.steps else max(1, round(c.epochs * len(train)))
    pairs = [(e.source, e.targets) for e in train]
    mixer, mix = data.mix_files(c, c.data, pairs, draws, quiet)
    hashes = {}
    for path in [*c.data, *c.val_data]:
        with open(path, "rb") as file:
            hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"mix": mix, "counts": counts, "validation": len(validation), "data_hashes": hashes}
    return RunData(train, validation, mixer, draws, -(-draws // c.batch_size)), facts


# ------------------------------------------------------------------------------------- the SFT step


def backward_step(model, run: RunData, step: int, c: Config, hardware: Hardware, scaler):
    """Gradients of one optimizer step; returns this rank's share of the loss, and the counts.

    loss = -sum_i w_i ln p_i / sum_i w_i over the supervised tokens i of the global step, w_i = 1
    unless a message says otherwise. Every rank knows the whole step, so the denominator needs no
    communication. DDP averages gradients over the ranks, hence the factor `world`.
    """
    draws = run.step(step, c.batch_size)
    examples = [run.train[i] for i, _ in draws]
    lengths = [len(e.ids) for e in examples]
    total = sum(weight * (end - first) for e in examples for first, end, weight in e.spans)
    mine = data.micro_batches(lengths, c.micro_tokens, hardware.world)[hardware.rank]
    share = 1.0 if mine else 0.0  # fewer examples than ranks: take part in DDP's sum with nothing
    loss_sum = 0.0
    for k, chunk in enumerate(mine or [[0]], 1):
        batch = data.collate([examples[i] for i in chunk], hardware.device)
        visits, indices = [draws[i][1] for i in chunk], [draws[i][0] for i in chunk]
        noise = modeling.noise_keys(c.seed, visits, indices, batch.lengths, hardware.device)
        synchronize = hardware.world == 1 or k >= len(mine)  # gradients travel once a step
        with contextlib.nullcontext() if synchronize else model.no_sync():
            with hardware.autocast():
                logp = model(batch.ids, batch.lengths, batch.targets, noise=noise,
                             neftune_alpha=c.neftune_alpha, equal_weights=True)  # [N]
            loss = -(batch.weights * logp).sum() / total * share
            scaler.scale(loss * hardware.world).backward()
        loss_sum += loss.detach()
    targets = sum(e.targets for e in examples)
    return float(loss_sum), {"tokens": sum(lengths), "target_tokens": targets}


@torch.no_grad()
def validation_loss(model, examples: list[data.Example], c: Config, hardware: Hardware) -> float:
    """Mean nats per supervised token, as in training but without noise and dropout."""
    model.eval()
    loss = weight = 0.0
    lengths = [len(e.ids) for e in examples]
    for chunk in data.micro_batches(lengths, c.micro_tokens, hardware.world)[hardware.rank]:
        batch = data.collate([examples[i] for i in chunk], hardware.device)
        with hardware.autocast():
            logp = model(batch.ids, batch.lengths, batch.targets)  # [N]
        loss -= (batch.weights * logp).sum().item()
        weight += batch.weights.sum().item()
    model.train()
    loss, weight = hardware.sum(loss, weight)
    return loss / weight


def exam_accuracy(model, tokenizer, c: Config, hardware: Hardware) -> float:
    """Share of the questions of --exam_data answered rightly; each rank asks some subjects."""
    import eval as evaluation

    model.eval()
    with hardware.autocast():
        right, count = evaluation.count_right(
            model, tokenizer, c.exam_data, micro_tokens=c.micro_tokens, rank=hardware.rank,
            world=hardware.world)
    model.train()
    right, count = hardware.sum(right, count)
    return right / count


def train(c: Config, tokenizer, run: RunData, start_step: int, model, wrapped, hardware: Hardware):
    """The loop: forward and backward, clip, step, log, save. Returns the log and a few facts."""
    optimizer, scaler, signals, log = start_training(c, start_step, run.steps, model, hardware)
    facts = {"seconds": 0.0, "tokens": 0, "stopped": 0}
    if run.validation and not start_step:
        facts["val_before"] = validation_loss(model, run.validation, c, hardware)
    for step in range(start_step + 1, run.steps + 1):
        began = time.perf_counter()
        rate = set_learning_rate(optimizer, step, run.steps, c)
        loss, counts = backward_step(wrapped, run, step - 1, c, hardware, scaler)
        loss, stop = hardware.sum(loss, len(signals))
        norm = clip_and_step(model, optimizer, scaler, c, loss, run, step)
        seconds = time.perf_counter() - began
        facts["seconds"] += seconds
        facts["tokens"] += counts["tokens"]
        epoch = min(step * c.batch_size, run.draws) / run.mixer.size
        record = {"step": step, "epoch": round(epoch, 4), "loss": loss, "learning_rate": rate,
                  "grad_norm": norm, **counts}
        record["tokens_per_second"] = round(counts["tokens"] / seconds, 1)
        done = step == run.steps
        if run.validation and (done or (c.eval_every and step % c.eval_every == 0)):
            record["val_loss"] = validation_loss(model, run.validation, c, hardware)
        if c.exam_data and (done or (c.exam_every and step % c.exam_every == 0)):
            record["exam_accuracy"] = exam_accuracy(model, tokenizer, c, hardware)
        log.write(record, {k: f"{record[k]:.4f}" for k in ("loss", "val_loss", "exam_accuracy")
                           if k in record})
        if done or stop or (c.save_every and step % c.save_every == 0):
            save_run(c, tokenizer, model, optimizer, scaler, step, hardware)
        if stop and not done:
            facts["stopped"] = 128 + (signals or [signal.SIGTERM])[0]
            break
    log.bar.close()
    return log.records, facts


# --------------------------------------------------------------------------------------------- main


def report_early_end(script: str, folder: Path, records: list, facts: dict, steps: int) -> bool:
    """Whether the run stopped early, or had nothing left to do; printed, with how to go on."""
    if facts["stopped"]:
        print(f"stopped after step {records[-1]['step']} of {steps}; all is saved, go on with\n"
              f"  torchrun {script} --resume --output_dir {folder}")
    elif not facts["seconds"]:
        print(f"the run in {folder} is complete, all {steps} steps; nothing is left to do")
    return bool(facts["stopped"]) or not facts["seconds"]


def summary(c: Config, records: list[dict], facts: dict, steps: int) -> None:
    """What a person wants to know when a run ends."""
    folder = Path(c.output_dir)
    curves = {"loss": "training", "val_loss": "validation"}
    draw_figure(folder / "loss.png", records, curves, "nats per supervised token")
    if report_early_end("train_sft.py", folder, records, facts, steps):
        return
    speed = facts["tokens"] / facts["seconds"]
    print(f"{facts['tokens']} tokens in {facts['seconds']:.0f} s, {speed:.0f} a second")
    print(f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f} nats per supervised token")
    if "val_loss" in records[-1]:
        before = f"{facts['val_before']:.4f} -> " if "val_before" in facts else ""
        print(f"validation loss {before}{records[-1]['val_loss']:.4f}")
    if "exam_accuracy" in records[-1]:
        print(f"exam accuracy {records[-1]['exam_accuracy']:.1%}; more with\n  python eval.py exam "
              f"--model {folder} --data {c.exam_data} --chat --shots 0")
        draw_figure(folder / "exam.png", records, {"exam_accuracy": "exam"}, "share right")
    print(f"checkpoint in {folder}; next:\n  python eval.py chat --model {folder}\n"
          f"  python eval.py logprobs --model {folder} --data {c.data[0]}")


def import_world():
    """labs/world.py, which holds the built-in demo; nothing else in this file needs labs/."""
    try:
        import labs.world
    except ImportError:
        raise InputError("the built-in demo lies in labs/world.py, which is missing; "
                         "give --model DIR and --data FILE...") from None
    return labs.world


def main() -> None:
    """Read the flags, prepare, train, report."""
    c = resolve_config(Config, sys.argv[1:], RECIPES, lambda: import_world().SFT_DEMO)
    start_step, hardware = find_start_step(c), setup_hardware(c.dtype)
    world = import_world() if c.model == "out/demo/base" else None
    if world:
        if hardware.rank == 0:
            world.make_demo(Path(c.model).parent)
            world.make_demo_model(Path(c.model))
        hardware.barrier()
    tokenizer = data.ChatTokenizer(c.model, c.template, c.eot)
    # Adam's rate goes as 1 / width (muP, arXiv:2203.03466, table 3); 2e-5 at 4096 is Llama 2's
    config = modeling.load_config(c.model)
    c.learning_rate = c.learning_rate or 2e-5 * 4096 / config.hidden_size
    tokenizer.check_size(config.vocab_size + tokenizer.eot_is_new)
    quiet = hardware.rank > 0
    if c.exam_data:  # an error in it should come now
        import eval as evaluation

        evaluation.training_exam(tokenizer, c.exam_data, config.max_position_embeddings,
                                 quiet=quiet)
    run, facts = prepare_data(c, lambda files: data.load_examples(
        files, tokenizer, c.train_on, c.max_length, skip_bad_rows=c.skip_bad_rows,
        quiet=quiet), quiet)
    model, wrapped = load_trainable(c, hardware, tokenizer)
    start_run(c, run.steps, facts, hardware)
    if hardware.rank == 0:
        announce(c, model, tokenizer, run.steps, hardware)
        before = world.demo_exam(model, tokenizer) if world and not start_step else "?"
    records, facts = train(c, tokenizer, run, start_step, model, wrapped, hardware)
    if hardware.rank == 0:
        summary(c, records, facts, run.steps)
        if world and not facts["stopped"]:
            world.report_demo(before, world.demo_exam(model, tokenizer), model, tokenizer)
    hardware.leave()
    sys.exit(facts["stopped"])


if __name__ == "__main__":
    with data.one_line_errors():
        main()
