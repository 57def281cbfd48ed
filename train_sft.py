"""Supervised fine-tuning, and continued pretraining, in one loop you can read.

    python train_sft.py                                  # the built-in demo, on a CPU
    python train_sft.py --model DIR --data a.json b.jsonl --output_dir out/sft
    torchrun --nproc_per_node=8 train_sft.py --model DIR --data a.json --recipe llama2
    python train_sft.py --resume --output_dir out/sft    # go on after a stop or a crash

The loss of a step is the sum of the negative log-probabilities of the supervised tokens of the
whole global step, divided by their number: it does not depend on how the step is cut into
micro-batches and dealt to ranks.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import model as modeling  # isort: skip  # before torch: it says how threads wait
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import InputError, check

# ---- skip on a first reading: flags of a run -----------------------------------------------------


@dataclass
class Config:
    """Fine-tune a Llama-family checkpoint on conversations, instructions or raw text."""

    model: str = ""  # checkpoint folder in Hugging Face layout; empty: the built-in demo
    data: list[str] = field(default_factory=list)  # training files: .json, .jsonl, .txt, also .gz
    output_dir: str = "out/sft"  # where checkpoint, metrics and state go
    recipe: str = ""  # a paper's preset: llama2, lima, qwen, ...; explicit flags win over it
    resume: bool = False  # go on with the run in output_dir; if there is none, begin it
    overwrite: bool = False  # replace the checkpoint or run that output_dir holds
    # optimization: these change the result
    mix: Literal["proportional", "temperature", "equal", "weights"] = "proportional"  # of the files
    temperature: float = 2.0  # of --mix temperature: 1 is proportional, large is equal
    cap: int = 0  # examples a file counts for at most under --mix temperature (T5's K); 0: all
    weights: list[float] = field(default_factory=list)  # of --mix weights, one a file
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own
    system: str = ""  # system message of conversations that have none
    eot: str = ""  # token such as <|end|> that ends an answer instead of EOS (LIMA); added if new
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens an example; longer ones are truncated, raw text is split
    context: int = 0  # positions the model is to have, its rope_theta raised for them (NTK-aware)
    rope_scaling: Literal["", "linear", "yarn", "dynamic", "llama3"] = ""  # instead of --context
    rope_factor: float = 0.0  # how many times as many positions --rope_scaling is to give
    val_data: list[str] = field(default_factory=list)  # validation files
    val_fraction: float = 0.0  # or this share of the training examples, kept out of training
    batch_size: int = 16  # examples per optimizer step, over all ranks
    epochs: float = 3.0  # passes over the data
    steps: int = 0  # optimizer steps, instead of epochs
    learning_rate: float = 0.0  # peak; 0: 2e-5 * 4096 / hidden_size (labs on rewards: 5e-6)
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
    lora_rank: int = 0  # train an adapter of this rank beside the frozen weights; 0: train these
    lora_alpha: int = 0  # the adapter counts alpha / rank times; 0: twice the rank
    lora_dropout: float = 0.0  # of the adapter's input
    lora_targets: list[str] = field(default_factory=list)  # such as q_proj v_proj; none: every one
    seed: int = 0  # of order, noise and dropout
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping
    # hardware: these must not change the result
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; weights are fp32
    compile: bool = None  # torch.compile the layers; not given: on CUDA in bf16
    checkpoint_activations: bool = False  # recompute layers in the backward: less memory, slower
    shard: bool = False  # each rank keeps a part of weights, gradients and moments (FSDP)
    # what is written and measured
    log_every: int = 10  # steps between lines when the output is no terminal
    eval_every: int = 0  # steps between validations; 0: before and after training
    exam_data: list[str] = field(default_factory=list)  # exams' folders: chat template, no shots
    exam_every: int = 0  # steps between exams; 0: before and after training
    save_every: int = 500  # steps between checkpoints; there is always one at the end
    lora_merge: bool = False  # write a plain checkpoint, the adapter merged, not an adapter folder
    keep: int = 0  # the last so many checkpoints stay, as step-00100 in output_dir


# ==== read: one optimizer step ====================================================================


class RunData(NamedTuple):
    """What a run trains and validates on."""

    train: list[data.Example]
    validation: list[data.Example]
    mixer: data.Mixer
    draw_count: int  # examples that the whole run draws
    steps: int  # optimizer steps of the whole run
    exam_floors: dict[str, float] = {}  # of every exam the share right of always the same letter

    def step(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """(index of the example, times seen before) of every draw of step 1, 2, ...

        The last step of a run may have fewer draws than `batch_size`.
        """
        first = (step - 1) * batch_size
        return self.mixer.draws(first, min(first + batch_size, self.draw_count))


def my_passes(lengths: list[int], c: Config,
              hardware: "Hardware") -> list[tuple[list[int], float]]:
    """This rank's forward passes over examples of these lengths: (indices, weight) of each.

    All ranks make equally many passes, since in every pass they wait for each other: under DDP for
    gradients, with --shard for weights. Who has less to do adds passes of one example, weight 0.
    """
    # Every rank deals the whole step in the same way and takes its own share.
    dealt = data.micro_batches(lengths, c.micro_tokens, hardware.world)
    mine = [(chunk, 1.0) for chunk in dealt[hardware.rank]]
    return mine + [([0], 0.0)] * (max(map(len, dealt)) - len(mine))


def my_micro_batches(run: RunData, step: int, c: Config,
                     hardware: "Hardware") -> list[tuple[data.Batch, Tensor]]:
    """This rank's part of an optimizer step: (batch, noise keys [T]) of each forward pass."""
    draws = run.step(step, c.batch_size)
    examples = [run.train[index] for index, _ in draws]

    batches, lengths = [], [len(e.ids) for e in examples]
    for chunk, weight in my_passes(lengths, c, hardware):
        batch = data.collate([examples[i] for i in chunk], hardware.device)
        batch = batch._replace(weights=weight * batch.weights)  # [N]

        # Noise depends on the example and on how often it was seen, not on its micro-batch.
        indices, visits = zip(*[draws[i] for i in chunk], strict=True)
        noise = modeling.noise_keys(c.seed, visits, indices, batch.lengths, hardware.device)  # [T]
        batches.append((batch, noise))
    return batches


def backward_step(model, run: RunData, step: int, c: Config, hardware: "Hardware",
                  scaler, divisor: float | None = None) -> tuple[float, dict]:
    """Gradients of one optimizer step; returns this rank's part of its loss, and token counts.

    loss = -sum_i w_i ln p_i / sum_i w_i in nats, over the supervised tokens i of the whole global
    step; w_i = 1 unless a message says otherwise. labs/rl.py gives a `divisor` instead: its weights
    have signs, and their sum means nothing.
    """
    # Every rank knows the whole step, so it can divide by the sum of all weights without asking
    # the others, and before the first forward pass.
    examples = [run.train[index] for index, _ in run.step(step, c.batch_size)]
    if divisor is None:
        divisor = sum(w * (end - first) for e in examples for first, end, w in e.spans)

    loss_sum = 0.0
    batches = my_micro_batches(run, step, c, hardware)
    for k, (batch, noise) in enumerate(batches, 1):
        # Under DDP gradients travel once per step, with the last micro-batch. This is the switch
        # behind DDP's `no_sync`; a model without DDP has no use for it.
        model.require_backward_grad_sync = k == len(batches)
        with hardware.autocast():
            logp = model(batch.ids, batch.lengths, batch.targets, noise=noise,
                         neftune_alpha=c.neftune_alpha)  # [N]
        loss = -(batch.weights * logp).sum() / divisor

        # DDP averages the ranks' gradients, but the step's is their sum: hence times `world`.
        scaler.scale(loss * hardware.world).backward()
        loss_sum += loss.detach()

    # Counts are of the whole step, on every rank.
    counts = {"tokens": sum(len(e.ids) for e in examples),
              "target_tokens": sum(e.targets for e in examples)}
    return float(loss_sum), counts


def clip_and_step(model, optimizer, scaler, c: Config, loss: float, run: RunData,
                  step: int) -> float | None:
    """Clip the gradients and take the optimizer's step; returns their norm before clipping.

    None stands for an fp16 overflow, for which the scaler leaves the step out. Raises InputError,
    before anything is updated, if the loss or the norm is not finite.
    """
    # fp16 gradients were scaled up, so that small ones survive: the limit is meant for true ones.
    scaler.unscale_(optimizer)
    limit = c.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()

    # Under fp16 a norm that is not finite is an overflow, which the scaler deals with.
    overflow = scaler.is_enabled() and not math.isfinite(norm)
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
        rows = ", ".join(run.train[index].where for index, _ in run.step(step, c.batch_size))
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}: not finite, nothing "
                         f"was updated; lower --learning_rate, or look at its rows: {rows}")

    # No gradient is kept for the next step: None saves the memory of zeros.
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return None if overflow else norm


# ==== read: the loop ==============================================================================


def train(c: Config, tokenizer, run: RunData, start_step: int, model, wrapped,
          hardware: "Hardware", backward=backward_step, validate=None,
          figure=None) -> tuple[list[dict], int]:
    """Forward and backward, clip and step, measure, log, save; `wrapped` is the model under DDP.

    Another trainer brings its own `backward` (this rank's part of the loss, the step's metrics),
    `validate` (metrics of held-out data) and the figure of its metrics. Returns the records of
    metrics.jsonl, and the exit status: 0, or 128 + the signal that came.
    """
    optimizer, scaler = make_optimizer(model, c), hardware.make_scaler()
    if start_step:
        load_state(Path(c.output_dir) / STATE, model, optimizer, scaler)
        if hardware.rank == 0:
            print(f"going on after step {start_step} of {run.steps}")
    log = Log(c, start_step, run.steps, hardware, figure or FIGURE)
    validate = validate or partial(validation_loss, model, run.validation, c, hardware)

    signals = catch_signals()

    def measured(step: int) -> dict:
        """What is measured after this step on data that is not trained on; often nothing."""
        metrics = {}
        if run.validation and is_due(c.eval_every, step, run.steps):
            metrics |= validate()
        if c.exam_data and is_due(c.exam_every, step, run.steps):
            metrics |= exam_metrics(model, tokenizer, run, c, hardware)
        return metrics

    # Step 0 says where training started from.
    if not start_step:
        log.write({"step": 0, "epoch": 0.0, **measured(0)})
    for step in range(start_step + 1, run.steps + 1):
        began = time.perf_counter()
        rate = learning_rate_at(step, run.steps, c)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, metrics = backward(wrapped, run, step, c, hardware, scaler)

        # Each rank has its part of the loss, and perhaps a signal: both must be known to all.
        loss, stop = hardware.sum(loss, len(signals))
        norm = clip_and_step(model, optimizer, scaler, c, loss, run, step)
        seconds = time.perf_counter() - began
        drawn = min(step * c.batch_size, run.draw_count)

        log.write({"step": step, "epoch": round(drawn / run.mixer.size, 4), "loss": loss,
                   "learning_rate": rate, "grad_norm": norm, **metrics,
                   "tokens_per_second": round(metrics["tokens"] / seconds, 1), **measured(step)})

        # A run that is asked to stop finishes its step, saves, and can be resumed.
        if stop or is_due(c.save_every, step, run.steps):
            save_run(c, tokenizer, model, optimizer, scaler, step, hardware)
        if stop and step < run.steps:
            return log.close(), 128 + (signals or [signal.SIGTERM])[0]  # or another rank's signal
    release_signals()
    return log.close(), 0


def catch_signals() -> list[int]:
    """From here on SIGTERM and Ctrl-C only write themselves down, in the list that is returned.

    So a loop can finish its step and save.
    """
    signals = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: signals.append(number))
    return signals


def release_signals() -> None:
    """All is saved: from here on SIGTERM and Ctrl-C end the program again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether to act at `step`: at 0, at the last, and with `every` above 0 at its multiples."""
    return step in (0, steps) or (every > 0 and step % every == 0)


# ---- skip on a first reading: held-out data ------------------------------------------------------


@torch.no_grad()
def validation_loss(model, examples: list[data.Example], c: Config, hardware: "Hardware") -> dict:
    """Mean nats per supervised token, of all and by file; as in training, but without noise."""
    model.eval()
    names, lengths = data.source_names(c.val_data or c.data), [len(e.ids) for e in examples]
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # of each file: losses, weights
    for chunk, weight in my_passes(lengths, c, hardware):
        chosen = [examples[i] for i in chunk]
        batch = data.collate(chosen, hardware.device)
        with hardware.autocast():
            logp = model(batch.ids, batch.lengths, batch.targets)  # [N]
        weights = weight * batch.weights  # [N]
        terms = torch.stack((-weights * logp, weights)).cpu().double()  # [2, N]
        for e, part in zip(chosen, terms.split([e.targets for e in chosen], 1), strict=True):
            sums[:, e.source] += part.sum(1)
    model.train()

    # Numerator and denominator are summed apart: a mean of the ranks' means would be another.
    sums = hardware.sum_tensor(sums)
    loss, total = sums.sum(1).tolist()
    by_source = {name: a / b for name, (a, b) in zip(names, sums.T.tolist(), strict=True) if b}
    return {"val_loss": loss / total, "val_loss_by_source": by_source}


def exam_metrics(model, tokenizer, run: RunData, c: Config, hardware: "Hardware") -> dict:
    """Of every exam the share answered rightly, its interval and its floor; and their mean."""
    import eval as evaluation  # only where an exam is asked

    # Every rank asks its share of the subjects. A sharded model needs all ranks in every pass: then
    # all of them ask the same.
    rank, world = (0, 1) if c.shard else (hardware.rank, hardware.world)
    model.eval()
    exams = {}
    for folder, (name, floor) in zip(c.exam_data, run.exam_floors.items(), strict=True):
        with hardware.autocast():
            counts = evaluation.count_right(
                model, tokenizer, folder, micro_tokens=c.micro_tokens, rank=rank, world=world)
        right, count = counts if c.shard else hardware.sum(*counts)
        exams[name] = {"accuracy": right / count, "interval": evaluation.wilson(right, count),
                       "floor": floor}
    model.train()
    mean = sum(exam["accuracy"] for exam in exams.values()) / len(exams)
    return {"exam_accuracy": mean, "exams": exams}


# ==== read: schedule and optimizer ================================================================


def learning_rate_at(step: int, steps: int, c: Config) -> float:
    """Linear warmup to the peak, then down to the floor, or constant; `step` counts from 1."""
    warmup = round(c.warmup * steps) if c.warmup < 1 else int(c.warmup)
    if step <= warmup:
        return c.learning_rate * step / warmup

    # `left` falls from 1 right after the warmup; it would be 0 one step after the last.
    progress = (step - 1 - warmup) / max(steps - warmup, 1)
    left = {"constant": 1.0, "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2}[c.schedule]
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * left


def make_optimizer(model, c: Config) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) on fp32 weights; norms and biases are not decayed."""
    # Decay pulls towards 0, which is neutral for a matrix but switches a norm off.
    matrices = {"params": [], "weight_decay": c.weight_decay}
    vectors = {"params": [], "weight_decay": 0.0}
    for _, p in trained_parameters(model):
        (matrices if p.dim() >= 2 else vectors)["params"].append(p)
    return torch.optim.AdamW([matrices, vectors], lr=c.learning_rate,
                             betas=(c.adam_beta1, c.adam_beta2), eps=c.adam_epsilon,
                             fused=model.device.type != "mps")


# ==== read: ranks and precision ===================================================================


class Hardware(NamedTuple):
    """What this process runs on."""

    rank: int
    world: int  # number of ranks
    device: torch.device
    dtype: torch.dtype  # of matrix products

    def autocast(self):
        """Matrix products in `dtype`; norms, softmax and sums in fp32; weights stay fp32.

        bf16 has fp32's range. fp16 has not: `make_scaler` says what is done about it.
        """
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def make_scaler(self) -> torch.amp.GradScaler:
        """Multiplies fp16's loss by a large factor, so that small gradients do not become 0.

        The factor is taken out again before clipping. It halves whenever a gradient overflows
        (that step is left out) and doubles after 2,000 steps without one. Off for other types.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def sum_tensor(self, values: Tensor) -> Tensor:
        """A tensor on the CPU summed over the ranks, element by element."""
        if self.world == 1:
            return values

        # In fp64 the order of the ranks changes no digit that matters.
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.to("cpu", values.dtype)

    def sum(self, *values: float) -> list[float]:
        """Each number summed over the ranks."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()

    def leave(self, status: int) -> None:
        """Exit, all ranks together: gloo aborts if one is gone first."""
        self.barrier()
        while LOCKED:  # a notebook lives on; see `lock`
            os.close(LOCKED.popitem()[1])
        if self.world > 1:
            dist.destroy_process_group()

            # Everything is saved. Python's own end sometimes waits for gloo's threads for ever.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


# ---- skip on a first reading: devices, weights, sharding -----------------------------------------


def setup_hardware(dtype: str) -> Hardware:
    """Find the device, join the other ranks that torchrun started, choose the precision."""
    # torchrun tells each of its processes by these variables who it is; alone, nothing is set.
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = modeling.best_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        # An hour, because the others wait while rank 0 writes a large checkpoint.
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1),
                                device_id=device if cuda else None)
    return Hardware(rank, world, device, modeling.best_dtype(dtype, device))


def shard_model(model, dtype: torch.dtype) -> None:
    """Deal weights, gradients and moments to the ranks: ZeRO (arXiv:1910.02054, section 5.3).

    By FSDP2 of torch. A rank keeps some rows of every weight. It collects the others' rows of a
    layer to compute the layer, forward and backward, and lets them go; of the layer's gradient,
    averaged over the ranks, it keeps its own rows again, and updates them.
    """
    from torch.distributed import fsdp  # takes seconds to import

    # Layers travel in `dtype`, so that autocast has no weight left to cast; gradients are averaged
    # in fp32. Their inputs are not cast: the residual stream stays in fp32, as under autocast, and
    # so do embedding, last norm and head, which the root holds.
    policy = partial(fsdp.MixedPrecisionPolicy, cast_forward_inputs=False)
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mp_policy=policy(param_dtype=dtype, reduce_dtype=torch.float32))
    fsdp.fully_shard(model, mp_policy=policy())

    # What is called from outside besides `forward`: it must collect embedding and head, too.
    for name in ("hidden", "next_logits"):
        fsdp.register_fsdp_forward_method(model, name)


def load_model(folder: str, c: Config, hardware: Hardware, adapter: dict | None = None,
               new_token: tuple[int, int] | None = None):
    """The checkpoint in a folder with fp32 weights; under --shard a rank holds its rows only."""
    deal = partial(shard_model, dtype=hardware.dtype) if c.shard and hardware.world > 1 else None

    # Frozen weights take no steps: with LoRA they stay as they are stored.
    dtype = None if c.lora_rank else torch.float32
    return modeling.load(folder, dtype, hardware.device, adapter, c.seed, deal, new_token)


def load_trainable(c: Config, hardware: Hardware, tokenizer=None):
    """The model with fp32 weights in training mode, and the same as DDP wraps it."""
    # The optimizer's small steps would be lost in 16-bit weights: autocast makes 16-bit copies.
    new = tokenizer and tokenizer.eot_is_new  # begins as EOS
    new_token = (tokenizer.stop_id, tokenizer.eos_id) if new else None
    model = load_model(c.model, c, hardware, adapter_keys(c), new_token).train()
    model.config = stretched(c, model.config)
    model.set_dropout(c.dropout[0], c.dropout[-1])

    # What follows saves memory or time and must not change the result.
    model.checkpoint_activations = c.checkpoint_activations

    if compiles(c, hardware):
        model.compile_layers()

    # Under DDP every rank holds the whole model, and gradients are averaged in the backward pass.
    # A sharded model sees to its gradients itself.
    if hardware.world == 1 or c.shard:
        return model, model
    return model, DistributedDataParallel(model, gradient_as_bucket_view=True)  # no second copy


def compiles(c: Config, hardware: Hardware) -> bool:
    """Whether layers are compiled: what --compile says, else where it was measured to pay.

    That is in bf16 on a GPU (labs/bench_gpu.py): up to half a minute at the start, with an adapter
    a minute more, and then a fifth more speed.
    """
    if c.compile is not None:
        return c.compile
    cuda = hardware.device.type == "cuda" and torch.cuda.is_available()
    return cuda and hardware.dtype == torch.bfloat16


def stretched(c: Config, config: modeling.ModelConfig) -> modeling.ModelConfig:
    """The config with the positions that --context or --rope_scaling ask for."""
    if not (c.context or c.rope_scaling):
        return config
    return modeling.stretch(config, c.context, c.rope_scaling, c.rope_factor)


def adapter_keys(c: Config) -> dict:
    """The adapter_config.json of this run; {} without --lora_rank."""
    if not c.lora_rank:
        return {}
    # An adapter that is given as --model is trained further.
    base, own = modeling.read_adapter(c.model)
    check(not own or (c.lora_rank == own["r"] and not c.lora_alpha and not c.lora_targets),
          f"{c.model} is an adapter: --lora_rank {own.get('r')} trains it further, with its own "
          "alpha and targets; for a new one merge it first (--lora_merge)")
    new = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": c.lora_rank,
           "lora_alpha": c.lora_alpha or 2 * c.lora_rank,
           "target_modules": c.lora_targets or modeling.PROJECTIONS}
    return {**(own or new), "lora_dropout": c.lora_dropout, "inference_mode": True,
            "base_model_name_or_path": str(base.resolve())}


# ---- skip on a first reading: data of a run ------------------------------------------------------


def load_rows(files: list[str], tokenizer, c: Config, quiet: bool) -> tuple[list, Counter]:
    """(examples of some files, what was dropped by reason)."""
    return data.load_examples(files, tokenizer, c.train_on, c.max_length,
                              skip_bad_rows=c.skip_bad_rows, quiet=quiet)


def prepare(c: Config, load, hardware: Hardware, rate: float = 2e-5) -> tuple:
    """(tokenizer, run, facts for run.json): what is wrong is found before a model is loaded.

    load(files, tokenizer, c, quiet) gives what `load_rows` gives, of examples or of preferences;
    `rate` is the learning rate of a model 4096 wide where no flag says one.
    """
    quiet, config = hardware.rank > 0, stretched(c, modeling.load_config(c.model))
    tokenizer = data.ChatTokenizer(c.model, c.template, c.eot, c.system)
    tokenizer.check_size(config.vocab_size + tokenizer.eot_is_new)
    if reference := getattr(c, "reference", ""):  # of train_dpo.py; it reads the same tokens
        tokenizer.check_reader(reference)
    check(not (adapter_keys(c) and tokenizer.eot_is_new),
          f"--eot {c.eot} is a new token, which --lora_rank cannot train; take a known one")
    floors = try_exams(c, tokenizer, config, quiet)

    # Adam's rate goes as 1 / width (muP, arXiv:2203.03466, table 3); 2e-5 at 4096 is Llama 2's.
    rate *= 10 if c.lora_rank else 1  # an adapter wants about ten times as much: B begins with 0
    c.learning_rate = c.learning_rate or rate * 4096 / config.hidden_size
    run, facts = prepare_data(c, lambda files: load(files, tokenizer, c, quiet), quiet)

    # With LoRA the state lacks the frozen weights, and no run must go on over others.
    for path in modeling.weight_files(c.model) if c.lora_rank else ():
        facts["data_hashes"][str(path)] = hash_samples(path)
    return tokenizer, run._replace(exam_floors=floors), facts


def prepare_data(c: Config, load, quiet: bool) -> tuple[RunData, dict]:
    """Read, split and mix the files of --data, load(files) as above; and what run.json says."""
    train, counts = load(c.data)
    validation = load(c.val_data)[0] if c.val_data else []
    if c.val_fraction:
        train, validation = data.split_validation(train, c.val_fraction, c.seed)

    # What was trained on is no test.
    both = data.overlap_count(train, validation)
    if not quiet:
        print(f"{len(train)} training, {len(validation)} validation examples", *(
            f"; {reason}: {count}" for reason, count in counts.items()), sep="")
    if both and not quiet:
        print(f"warning: {both} of the {len(validation)} validation examples are trained on "
              "too (of preferences: their prompts); --val_fraction keeps them apart")

    # An epoch is as many draws as there are examples, whatever the mix.
    draws = c.steps * c.batch_size if c.steps else max(1, round(c.epochs * len(train)))
    pairs = [(e.source, e.targets) for e in train]
    mixer, mix = data.mix_files(c, c.data, pairs, draws, quiet)

    # By its hashes a resumed run knows whether all is still as it began: the files, and what
    # template and tokenizer make of them. They are named as `start_run` says what has changed.
    hashes, tokens = {path: hash_file(path) for path in [*c.data, *c.val_data]}, hashlib.sha256()
    for e in (*train, *validation):
        tokens.update(e.key if isinstance(e.key, bytes) else e.key.encode())  # labs/rl.py: a text
    hashes["the template or the tokenizer"] = tokens.hexdigest()
    facts = {"mix": mix, "counts": counts, "validation": len(validation), "data_hashes": hashes}
    return RunData(train, validation, mixer, draws, -(-draws // c.batch_size)), facts


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_samples(path: str | Path) -> str:
    """SHA-256 of 64 pieces from all over a large file, of 16 MB together."""
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(64):
            file.seek(k * size // 64)
            digest.update(file.read(2**18))
    return digest.hexdigest()


def try_exams(c: Config, tokenizer, config, quiet: bool) -> dict[str, float]:
    """Read --exam_data, so that an error in it comes before training; each exam's floor by name.

    The floor is the share right of whoever always gives the letter that is right most often.
    """
    floors = {}
    for name, folder in zip(data.source_names(c.exam_data), c.exam_data, strict=True):
        import eval as evaluation  # only where an exam is asked

        _, sheets = evaluation.training_exam(tokenizer, folder, config.max_position_embeddings,
                                             quiet=quiet)
        letters = Counter(q["answer"] for sheet in sheets for q in sheet.subject.questions)
        floors[name] = max(letters.values()) / letters.total()
    return floors


# ---- skip on a first reading: checkpoints and state ----------------------------------------------

STATE = "state"  # in output_dir: what --resume goes on from, in a folder by its step
WRITTEN = ("metrics.jsonl", "run.json", "chat_template.jinja")  # there, and could be an input


def step_folders(folder: Path) -> list[Path]:
    """The folders step-00100 in a folder, the latest last; each got its name when it was whole."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(model, tokenizer: data.ChatTokenizer, folder: Path, merge: bool = False,
                    write: bool = True) -> None:
    """A checkpoint any Hugging Face tool loads, in the precision the weights were stored in.

    With LoRA it is PEFT's adapter folder, or with `merge` a plain checkpoint. Of a sharded model
    all ranks call this, and one has `write`.
    """
    if model.adapter and not merge:
        modeling.save_adapter(model, folder, write)
    else:
        modeling.save(model, folder, model.stored_dtype, write)
    if not write:
        return
    tokenizer.save(folder)

    # The source's sampling defaults stay; the tokens that end an answer are ours.
    generation = tokenizer.read("generation_config.json")
    if tokenizer.bos_ids:
        generation["bos_token_id"] = tokenizer.bos_ids[0]
    generation["eos_token_id"] = tokenizer.stop_ids
    modeling.write_json(folder / "generation_config.json", generation)


def trained_parameters(model) -> list[tuple]:
    """(name, parameter) of what is trained, all or with LoRA the adapter: what this rank holds."""
    # After a pass without gradients a sharded model still has embedding and head whole.
    if hasattr(model, "reshard"):
        model.reshard()
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def keep_checkpoint(folder: Path, step: int, last: int) -> None:
    """Keep the checkpoint in `folder` as its step-00100, and the `last` so many of these.

    They stand inside output_dir: a run is one folder, and two runs side by side do not mix.
    """
    new, kept = folder / "step-new", folder / f"step-{step:05d}"
    for old in (new, kept):
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir()

    # A link takes no room. The next checkpoint's files are renamed over ours, and change nothing
    # in them.
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in (".jsonl", ".png") and path.name != "run.json":
            try:
                os.link(path, new / path.name)
            except OSError:  # a file system without links
                shutil.copy(path, new / path.name)
    new.rename(kept)
    for old in step_folders(folder)[:-last]:
        shutil.rmtree(old)


def save_state(folder: Path, model, optimizer, scaler, step: int, write: bool = True) -> None:
    """All a resumed run needs: trained weights, both Adam moments, step and scaler.

    The folder gets its name when all is in it, and only then the one before goes: a crash at any
    moment leaves one that is whole.
    """
    # By name and unsharded, so that another number of ranks or version of torch can read it.
    tensors = {}
    for name, p in trained_parameters(model):
        tensors[f"weight.{name}"] = p
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    new, older = folder / "new", step_folders(folder)
    if write:
        for stale in new.glob("*"):
            stale.unlink()
    meta = {"scaler": json.dumps(scaler.state_dict())}
    modeling.write_tensors(new, "state", tensors, meta, write)
    if write:
        new.rename(folder / f"step-{step:05d}")
        for path in older:
            shutil.rmtree(path)


def load_state(folder: Path, model, optimizer, scaler) -> None:
    """Put the last saved state back bit for bit; of a sharded model every rank reads its rows."""
    parameters = dict(trained_parameters(model))
    paths = sorted(step_folders(folder)[-1].glob("*.safetensors"))
    check(paths and paths[-1].stem.endswith(("state", f"-of-{len(paths):05d}")),
          f"--resume: files are missing in {folder}")
    for path in paths:
        with modeling.open_tensors(path) as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                kind, name = key.split(".", 1)
                p, tensor = parameters[name], file.get_tensor(key)

                # Adam's count of steps is one number, and whole on every rank.
                like = p if kind != "step" else tensor
                value = modeling.share(tensor, like, p.device, tensor.dtype)
                if kind == "weight":
                    p.copy_(value)
                else:
                    optimizer.state[p][kind] = value
            saved = json.loads(file.metadata()["scaler"])
    if saved:
        scaler.load_state_dict(saved)


def save_run(c: Config, tokenizer, model, optimizer, scaler, step: int, hardware: Hardware,
             learnt=None) -> None:
    """Checkpoint and state: the first rank writes, the others send it their rows if sharded.

    `learnt` is what the state holds, if that is more than the model.
    """
    # A run that is killed before its first state is whole is known by this file.
    folder, first = Path(c.output_dir), hardware.rank == 0
    if first:
        modeling.write_lines(folder / STATE / "new" / "begun", [])
    save_checkpoint(model, tokenizer, folder, c.lora_merge, first)
    if first and c.keep:
        keep_checkpoint(folder, step, c.keep)
    save_state(folder / STATE, learnt or model, optimizer, scaler, step, first)
    hardware.barrier()


def input_folders(folders) -> list[Path]:
    """Checkpoints that are read, an adapter's base, and of a kept step the run that removes it."""
    inputs = [Path(x).resolve() for f in folders for x in (f, modeling.read_adapter(f)[0])]
    return inputs + [path.parent for path in inputs if path in step_folders(path.parent)]


LOCKED = {}  # folders that this process has locked, each with its descriptor


def lock(folder: Path) -> bool:
    """Lock a folder until this process ends; False: it was ours already, or is not there yet.

    Raises InputError if another process of this machine trains into it.
    """
    folder = folder.resolve()
    if not folder.is_dir() or folder in LOCKED or os.environ.get("RANK", "0") != "0":
        return False
    LOCKED[folder] = descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems know no locks.
        os.close(LOCKED.pop(folder))
        check(not isinstance(error, BlockingIOError), f"another command trains into {folder}; wait "
              "until it ends, or choose another --output_dir")
    return True


def find_start_step(c: Config) -> int:
    """The step to start after: 0, or with --resume the last one saved.

    Raises InputError if output_dir is an input, cannot be written, or holds something that nobody
    said may be replaced.
    """
    check(c.output_dir, "--output_dir is empty; . is the folder you are in")

    # The first save writes the weights, and for the state three times as much, or more.
    folder, base = Path(c.output_dir), modeling.read_adapter(c.model)[0]
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    size *= (c.lora_merge or not c.lora_rank) * (1 + c.keep) + 3 * (not c.lora_rank)
    given = [getattr(c, name, "") for name in ("model", "reference", "teacher", "reward_model")]
    modeling.check_output("--output_dir", folder, input_folders(filter(None, given)), size)
    for path in map(Path, (*c.data, *c.val_data, c.template)):
        check(path.name not in WRITTEN or path.resolve().parent != folder.resolve(),
              f"{path} is an input, and a run into {folder} would replace it; choose another place")

    # The state says how far the run came that stands there. A new run removes it.
    lock(folder)
    states, new = step_folders(folder / STATE), folder / STATE / "new"
    step = int(states[-1].name[5:]) if states else 0
    others = (folder / STATE).is_file() or set((folder / STATE).glob("*")) - {*states, new}
    check(not others, f"{folder / STATE} is not the state of a run; choose another --output_dir")
    held = modeling.checkpoint_in(folder) or next((p.name for p in step_folders(folder)), "")
    if c.resume:
        # A run that was killed in its first save has begun a state.
        check(step or not held or new.exists(), f"--resume: {folder} holds a checkpoint ({held}), "
              "but no state to go on from; --overwrite instead of --resume begins anew")
        return step
    if c.overwrite:
        return 0

    # What stands there may be a run of ours, or somebody's checkpoint.
    what, run = f"a checkpoint ({held})" if held else "", folder / "run.json"
    if step and not run.exists():
        what = f"the state of a run, at step {step}, but no run.json"
    elif step:
        steps = modeling.read_json(run).get("steps", "?")
        what = "a finished run" if step == steps else (
            f"a run that stopped at step {step} of {steps} (--resume goes on with it)")
    check(not what, f"{folder} holds {what}; choose another --output_dir, or add --overwrite to "
          "replace it")
    return 0


def start_run(c: Config, steps: int, facts: dict, hardware: Hardware) -> None:
    """Write run.json; a resumed run must find the data it began with."""
    path = Path(c.output_dir) / "run.json"
    if c.resume:
        # What an older run.json does not name cannot be compared.
        before = modeling.read_json(path).get("data_hashes", {})
        for name, digest in facts["data_hashes"].items():
            check(before.get(name, digest) == digest,
                  f"--resume: {name} has changed since the run began")
    if hardware.rank > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if lock(path.parent):
        find_start_step(c)  # once more: another command may have made the folder, and ended, since

    # A new run must not be resumed from an older run's state, nor count its checkpoints as kept.
    if not c.resume:
        state = path.parent / STATE  # it may be a link to another disk, and stays
        for old in (*step_folders(state), state / "new", *step_folders(path.parent)):
            shutil.rmtree(old, ignore_errors=True)
            check(not old.exists(), f"{old} cannot be removed; choose another --output_dir")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    modeling.write_json(path, {
        "config": {**asdict(c), "resume": False, "overwrite": False}, "steps": steps,
        "ranks": hardware.world, "device": str(hardware.device), "dtype": str(hardware.dtype),
        "versions": versions, **facts})


# ---- skip on a first reading: logs and reports ---------------------------------------------------


def announce(c: Config, model, tokenizer: data.ChatTokenizer, steps: int,
             hardware: Hardware) -> None:
    """Print what is about to be trained, and every flag that is not empty."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for _, p in trained_parameters(model))
    part = f", {trained / 1e6:.2f}M of them trained" if trained < count else ""
    kind = str(hardware.dtype).removeprefix("torch.")
    print(f"{count / 1e6:.2f}M parameters{part}, {hardware.world} x {hardware.device.type}, "
          f"{kind}; template {tokenizer.template}, {steps} steps of {c.batch_size} examples")

    # Flags at 0 or empty are off.
    flags = " ".join(f"{k}={v}" for k, v in asdict(c).items() if v not in ("", [], 0))
    print(textwrap.fill(flags, 80, break_long_words=False, break_on_hyphens=False))
    positions = model.config.max_position_embeddings
    if c.max_length > positions:
        print(f"note: --max_length is {c.max_length}, but the checkpoint was made for {positions} "
              "positions")


def forecast(c: Config, run: RunData, hardware: Hardware) -> None:
    """Print what the run will take of each device's memory; without labs/, nothing."""
    with contextlib.suppress(ImportError):
        from labs.memory import report

        if hardware.rank == 0:
            report(c, run, hardware)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Figure(NamedTuple):
    """What a trainer draws and shows of its metrics."""

    name: str  # of the file
    unit: str
    curves: dict[str, str]  # metric: label
    shown: dict[str, str]  # metric: what the screen calls it


FIGURE = Figure("loss.png", "nats per supervised token",
                {"loss": "training", "val_loss": "validation"},
                {"loss": "loss", "val_loss": "val_loss", "exam_accuracy": "exam"})


def draw(c: Config, records: list[dict], figure: Figure) -> None:
    """Draw the run's curves; without labs/ or matplotlib, nothing."""
    with contextlib.suppress(ImportError):
        from labs.draw import draw_run

        draw_run(Path(c.output_dir), records, figure)


class Log:
    """metrics.jsonl, its figures, and a progress bar, or without a terminal a line now and then.

    Only the first rank has records and writes them. That of step 0 holds what was measured before
    training; a run that measures nothing has none.
    """

    def __init__(self, c: Config, start_step: int, steps: int, hardware: Hardware, figure: Figure):
        self.c, self.steps, self.figure, self.hardware = c, steps, figure, hardware
        self.path, self.began = Path(c.output_dir) / "metrics.jsonl", None
        self.records = [] if hardware.rank > 0 else self.earlier(start_step)
        self.bar = tqdm(total=steps, initial=start_step, ncols=76,  # and room for ^C
                        disable=hardware.rank > 0 or not sys.stderr.isatty(), bar_format=
                        "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
                        "{desc}")

    def earlier(self, start_step: int) -> list[dict]:
        """The records up to `start_step`; later lines, and half a line of a crash, are dropped."""
        # What comes after the saved step is computed, and written, once more.
        records = []
        if start_step and self.path.exists():  # who has lost it can go on all the same
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        records = [record for record in records if isinstance(record, dict)
                   and "step" in record and record["step"] <= start_step]
        modeling.write_lines(self.path, (json.dumps(record) + "\n" for record in records))
        return records

    def write(self, record: dict) -> None:
        """A step's record to the file and to the screen; the figures anew if one is due."""
        if self.hardware.rank > 0 or record.keys() == {"step", "epoch"}:
            return
        self.records.append(record)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from None

        # The last figures are drawn by `close`, which knows that nothing more comes.
        step, measured = record["step"], record.keys() & {"val_loss", "exam_accuracy"}
        if step < self.steps and (measured or is_due(self.c.save_every, step, self.steps)):
            draw(self.c, self.records, self.figure)
        if step > 0:
            self.show(record)

    def show(self, record: dict) -> None:
        """A step on the screen: the bar has room for its metrics, a line for more."""
        text, step = "", record["step"]
        for key, name in self.figure.shown.items():
            text += f"  {name} {record[key]:.4f}" if key in record else ""
        self.bar.set_description_str(text, refresh=False)
        self.bar.update()

        # The first step builds and warms up: those behind it say how long the rest takes.
        self.began = self.began or (step, time.perf_counter())
        done, seconds = step - self.began[0], time.perf_counter() - self.began[1]
        left = tqdm.format_interval(seconds / done * (self.steps - step)) if done else "?"

        # Without a terminal there is no bar.
        if self.bar.disable and (step % self.c.log_every == 0 or step in (1, 3, self.steps)):
            print(f"step {step}/{self.steps}{text}  lr {record['learning_rate']:.2e}  tok/s "
                  f"{record['tokens_per_second']:.0f}  mem "
                  f"{peak_memory(self.hardware.device):.1f}G  left {left}", flush=True)

    def close(self) -> list[dict]:
        """Draw for the last time; returns all records."""
        self.bar.close()
        if self.records:
            draw(self.c, self.records, self.figure)
        return self.records


def ended_early(script: str, c: Config, start_step: int, steps: int, records: list[dict],
                hardware: Hardware) -> bool:
    """Whether the run stopped early, or had nothing left to do; printed, with how to go on."""
    last = records[-1]["step"] if records else start_step
    if last < steps:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        many = f"torchrun --nproc_per_node={hardware.world // nodes}"
        many += f" --nnodes={nodes} ..." if nodes > 1 else ""
        print(f"stopped after step {last} of {steps}; all is saved, go on with\n  "
              f"{many if hardware.world > 1 else 'python'} {script} --resume --output_dir "
              f"{c.output_dir}")
    elif start_step == steps:
        print(f"the run in {c.output_dir} is complete, all {steps} steps; nothing is left to do")
    return last < steps or start_step == steps


def training_seconds(records: list[dict]) -> float:
    """What the steps took, without what was measured between them."""
    return sum(r["tokens"] / r["tokens_per_second"] for r in records if r["step"] > 0)


def summary(c: Config, records: list[dict]) -> None:
    """What a person wants to know when a run ends."""
    steps, seconds = [record for record in records if record["step"] > 0], training_seconds(records)
    tokens = sum(r["tokens"] for r in steps)
    print(f"{tokens} tokens in {seconds:.0f} s, {tokens / seconds:.0f} per second")
    print(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f} nats per supervised token")
    print_held_out(records, [("val_loss", "validation loss", ".4f")])

    print(f"checkpoint in {c.output_dir}; next:\n  python eval.py chat --model {c.output_dir}\n"
          f"  python eval.py logprobs --model {c.output_dir} --data {c.data[0]}")
    if c.exam_data:
        print(f"  python eval.py exam --model {c.output_dir} --data {c.exam_data[0]} --chat "
              "--shots 0")


def print_held_out(records: list[dict], table) -> None:
    """How each (metric, name, format) moved, then every file and every exam."""
    first, last = records[0] if records[0]["step"] == 0 else {}, records[-1]

    def show(name: str, form: str, before: float | None, after: float, note: str = "") -> None:
        begun = "" if before is None else f"{before:{form}} -> "
        print(f"{name} {begun}{after:{form}}{note}")

    for key, name, form in table:
        if key in last:
            show(name, form, first.get(key), last[key])

    # In a mean one may rise while another falls.
    before = first.get("val_loss_by_source", {})
    for name, loss in last.get("val_loss_by_source", {}).items():
        show(f"  {name}", ".4f", before.get(name), loss)
    before = first.get("exams", {})
    for name, exam in last.get("exams", {}).items():
        show(f"exam {name}", ".1%", before.get(name, {}).get("accuracy"), exam["accuracy"],
             " (95% {:.1%} to {:.1%}; floor {:.1%})".format(*exam["interval"], exam["floor"]))


# ---- skip on a first reading: recipes ------------------------------------------------------------

# The settings each source reports; anything it leaves out keeps our default. All use AdamW.
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95}
RECIPES = {
    # Llama 2 (arXiv:2307.09288, section 3.1): 27,540 rows, loss on answers only
    "llama2": {**ADAM, "learning_rate": 2e-5, "schedule": "cosine", "weight_decay": 0.1,
               "batch_size": 64, "max_length": 4096, "epochs": 2},
    # LIMA (arXiv:2305.11206, section 3): dropout 0 at the bottom layer to 0.3 at the top; its
    # end-of-turn token wants --eot '<|end|>'
    "lima": {**ADAM, "learning_rate": 1e-5, "min_learning_rate": 1e-6, "schedule": "linear",
             "warmup": 0, "weight_decay": 0.1, "batch_size": 32, "max_length": 2048, "epochs": 15,
             "dropout": [0.0, 0.3]},
    # Qwen (arXiv:2309.16609, section 3.1); not published: what the rate does after its peak
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
    # Steel-LLM: its authors' article (8 devices times 8 rows; length not said), then its paper
    # (arXiv:2502.06635; weight decay and length of fine-tuning not said, "about" 4 epochs)
    "steel-llm": {"learning_rate": 2e-5, "schedule": "cosine", "weight_decay": 0.0,
                  "batch_size": 64, "epochs": 3},
    "steel-llm-paper": {"learning_rate": 2e-5, "schedule": "cosine", "batch_size": 256,
                        "epochs": 4},
    # TeleChat's two stages of long context (arXiv:2401.03804), 8M tokens per batch; the rates are
    # those of an overview of Chinese models, schedule and decay are not published
    "telechat-8k": {"learning_rate": 3e-4, "batch_size": 1024, "steps": 3000, "max_length": 8192,
                    "context": 8192},
    "telechat-16k": {"learning_rate": 4e-5, "batch_size": 512, "steps": 1000, "max_length": 16384,
                     "context": 16384},
}
RECIPES["lima-small"] = {**RECIPES["lima"], "batch_size": 64, "dropout": [0.0, 0.2]}
RECIPES["yi-34b"] = {**RECIPES["yi-6b"], "neftune_alpha": 45.0}


# ---- skip on a first reading: flags and main -----------------------------------------------------

# Flags that may differ when a run is resumed.
HARDWARE = {"output_dir", "resume", "overwrite", "micro_tokens", "dtype", "compile",
            "checkpoint_activations", "log_every", "eval_every", "exam_data", "exam_every",
            "save_every", "lora_merge", "shard", "keep"}


def resolve_config(cls, argv: list[str], recipes: dict, demo):
    """Defaults, then demo()'s values or the resumed run's, then the recipe's, then the flags."""
    given = data.parse_flags(cls, argv)
    base, recipe = {}, given.get("recipe", "")
    path = Path(given.get("output_dir", cls.output_dir)) / "run.json"

    # One command line serves a queue that restarts jobs: the first time there is nothing to resume.
    if given.get("resume") and not path.exists():
        check({"model", "data"} & set(given) or "output_dir" not in given, f"--resume: {path} does "
              "not exist, so there is no run to go on with; with --model and --data one begins")
        given["resume"] = False
    if given.get("resume"):
        base = resumed_flags(cls, path, given)
        recipes = {recipe: {}}  # the run's flags hold what it said, and what won over it
    elif not given.get("model") and not given.get("data"):
        base = demo()
        if "val_fraction" in given:  # instead of the demo's own validation
            base = {**base, "val_data": []}

    known = ", ".join(recipes) or "none"
    check(recipe in ("", *recipes), f"unknown recipe {recipe!r}; known are {known}")
    check(not ("steps" in given and "epochs" in given),
          "--steps and --epochs exclude each other; give one")

    # Above 0, steps win over epochs: where epochs are asked for, the number of steps goes, but not
    # that of a run that is resumed.
    preset = {**base, **recipes.get(recipe, {})}
    asked = "epochs" in given or ("epochs" in recipes.get(recipe, {}) and "steps" not in given)
    if asked and not given.get("resume"):
        preset["steps"] = 0
    config = cls(**{**preset, **given})
    check_config(config)
    return config


def resumed_flags(cls, path: Path, given: dict) -> dict:
    """The flags of the run to go on with; those that change the result must stay as they were."""
    base = modeling.read_json(path).get("config", {})
    check(set(base) == {f.name for f in fields(cls)},
          f"--resume: the run in {path} is of another script, or of another version of this one")

    # What changes only speed and output may be given anew.
    for name, value in given.items():
        check(name in HARDWARE or base[name] == value, f"--resume: --{name} was {base[name]!r}, "
              f"not {value!r}; flags that change the result stay as they were")
    return base


def check_config(c: Config) -> None:
    """Raise InputError for values and combinations that make no sense."""
    check(c.model, "--data needs --model DIR, a checkpoint (no flag at all runs the demo)")
    check(c.data, "--model needs --data FILE..., what to train on (no flag runs the demo)")
    data.check_numbers(c)
    check(c.epochs > 0, f"--epochs must be above 0, is {c.epochs}")
    for name in ("adam_beta1", "adam_beta2", "val_fraction", "lora_dropout"):
        check(0 <= getattr(c, name) < 1, f"--{name} must be in [0, 1), is {getattr(c, name)}")
    check(len(c.dropout) < 3 and all(0 <= p < 1 for p in c.dropout),
          f"--dropout takes one or two rates in [0, 1), not {c.dropout}")

    # Combinations.
    check(c.min_learning_rate <= (c.learning_rate or math.inf),
          "--min_learning_rate is above --learning_rate")
    check(not (c.val_data and c.val_fraction), "--val_data and --val_fraction: give one of them")
    check(c.exam_data or not c.exam_every, "--exam_every needs --exam_data DIR")
    check(not (c.context and c.rope_scaling), "--context and --rope_scaling: give one of them")
    check(bool(c.rope_scaling) == (c.rope_factor > 1),
          f"--rope_scaling goes with --rope_factor F above 1, which is {c.rope_factor}")
    check(not c.lora_rank or c.lora_merge or not (c.context or c.rope_scaling),
          "--context and --rope_scaling with --lora_rank need --lora_merge: an adapter's folder "
          "holds no config.json of its own")
    for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_merge"):
        check(c.lora_rank or not getattr(c, name), f"--{name} needs --lora_rank R")
    for name in c.lora_targets:
        check(name in modeling.PROJECTIONS, f"--lora_targets: no projection is called {name}; "
              f"there are {', '.join(modeling.PROJECTIONS)}")
    check(not c.shard or c.resume or int(os.environ.get("WORLD_SIZE", 1)) > 1, "--shard deals a "
          "model to several ranks, and here is one; start with torchrun --nproc_per_node=N")
    # With 2.8 the gradients of two CPU ranks were wrong without a word; 2.6 failed.
    check(not c.shard or torch.__version__ >= (2, 11),
          f"--shard needs torch 2.11 or later, here is {torch.__version__}")
    data.check_mix(c, c.data)


def import_world():
    """labs/world.py, which holds the built-in demo; nothing else in this file needs labs/."""
    try:
        import labs.world
    except ImportError:
        raise InputError("the built-in demo lies in labs/world.py, which is missing; "
                         "give --model DIR and --data FILE...") from None
    return labs.world


def find_demo(c: Config, hardware: Hardware):
    """labs/world.py if this is the built-in demo, whose files it makes anew; else None."""
    if c.model != "out/demo/base" or any(Path(p).parent != Path("out/demo") for p in c.data):
        return None
    world = import_world()
    if c.data != world.SFT_DEMO["data"]:
        return None

    if hardware.rank == 0:
        world.make_demo(Path(c.model).parent)
        world.make_demo_model(Path(c.model))
    hardware.barrier()
    return world


def main() -> None:
    """Read the flags, prepare, train, report."""
    c = resolve_config(Config, sys.argv[1:], RECIPES, lambda: import_world().SFT_DEMO)
    start_step, hardware = find_start_step(c), setup_hardware(c.dtype)
    world = find_demo(c, hardware)
    tokenizer, run, facts = prepare(c, load_rows, hardware)
    forecast(c, run, hardware)
    model, wrapped = load_trainable(c, hardware, tokenizer)
    start_run(c, run.steps, facts, hardware)

    # Only the first rank speaks. A sharded model answers only if all ranks ask it.
    first, before = hardware.rank == 0, ""
    if first:
        announce(c, model, tokenizer, run.steps, hardware)
    if world and not start_step and (first or c.shard):
        before = world.demo_exam(model, tokenizer)
    records, status = train(c, tokenizer, run, start_step, model, wrapped, hardware)
    if first and not ended_early("train_sft.py", c, start_step, run.steps, records, hardware):
        summary(c, records)
        if world:
            model = modeling.load(c.output_dir, device=hardware.device) if c.shard else model
            world.report_demo(before, model, tokenizer, c.output_dir)
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
