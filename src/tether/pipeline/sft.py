"""Supervised fine-tuning: a causal LM learns to write the responses it is shown, the step before PPO.

Cross-entropy on response tokens only, eos included. The optimizer's batch is a set of samples; how they are packed into
rows and cut into microbatches changes speed and memory, never the gradient. Knows nothing of rewards.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import config_to_dict
from tether.errors import UserError
from tether.language.cross_entropy import Passes, accumulate_gradients, checkpointed_layers, mean_loss
from tether.language.models import check_vocabulary, context_length, load_causal_lm, load_tokenizer, prepare_tokenizer
from tether.language.packing import TokenizedSamples, check_packing
from tether.language.rows import load_rows
from tether.pipeline.samples import Row, RowFormat, tokenize_rows
from tether.ppo.learner import schedule_factor
from tether.runs import Display, Run

DEFAULT_MAX_TOKENS = 2048  # a context of 128k tokens is no reason to try rows of 128k tokens

SHOWN = ("loss", "eval_loss", "learning_rate", "gradient_norm", "time/tokens_per_second")
SHOWN_STEPS = 100  # of a long run, about so many steps are shown; all are in metrics.jsonl

Report = Callable[[dict[str, float]], None]
Batch = tuple[float, np.ndarray]  # passes over the data once it is done, and the indices of its samples


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a causal language model."""

    model: str = ""
    """Folder or hub name of the model to start from."""
    data: str = ""
    """Training rows: file (.jsonl, .json, .csv, also as .gz; .parquet), folder saved by `datasets`, or hub name."""
    split: str = "train"
    """Split of a dataset folder or of a hub dataset."""
    output: str = ""
    """Folder of the run; the trained model is saved in its `policy/`."""
    overwrite: bool = False
    """Replace a run that is already in `output`."""
    eval_data: str | None = None
    """Held-out rows, in the same form as `data`."""
    eval_split: str = "train"
    """Split of `eval_data` where that is a dataset folder or a hub dataset."""
    eval_fraction: float = 0.0
    """Share of `data` that is held out instead, drawn at random by `seed`."""
    eval_every: int = 0
    """Optimizer steps between held-out losses. 0: only before the first step and after the last, as always."""
    rows: RowFormat = field(default_factory=RowFormat)
    max_tokens: int | None = None
    """Longest sample in tokens, eos included. None: the model's context, at most 2048."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """What happens to a longer sample: stop with an error, leave it out, or cut off its end; how many is reported."""
    packing: bool = True
    """Let short samples share a row without seeing each other. Faster, with the same gradients."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, going round the data as often as that takes. None: `epochs` decides."""
    batch_size: int = 32
    """Samples per optimizer step."""
    batch_tokens: int | None = None
    """Fill the batch of an optimizer step up to so many tokens instead; at least one sample."""
    microbatch_tokens: int = 8192
    """Tokens (padding included) that go through the model at once. Changes memory and speed, never the result."""
    learning_rate: float = 2e-5
    """Peak learning rate. 2e-5 suits models of some billion parameters (Taori et al. 2023); small ones take more."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls from its peak to 0 over the steps of the run."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment (Kingma and Ba 2015)."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment (Kingma and Ba 2015)."""
    adam_epsilon: float = 1e-8
    """Adam's ε (Kingma and Ba 2015)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, on weight matrices; never on biases, gains of norms or other vectors."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm. 0: never."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights, their gradients and Adam's moments. The loss is float32 always."""
    autocast: bool = False
    """Compute matrix products in bfloat16 while the weights stay float32."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    seed: int = 0
    """Of the order of the samples and of what is held out."""

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "max_steps", "batch_size", "batch_tokens", "microbatch_tokens", "max_tokens")
        for name in at_least_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_gradient_norm", "eval_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        if self.learning_rate == math.inf:
            raise ValueError("learning_rate is inf, expected a finite number")
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon is {self.adam_epsilon}, expected a number above 0")
        if self.autocast and self.dtype != "float32":
            raise ValueError("autocast is on and dtype bfloat16: weights are cast already, set one of the two")
        if self.eval_data and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction are both set: one says what is held out")


@dataclass(frozen=True)
class FineTuning:
    """What came of it: optimizer steps, and the loss of the last batch and of what is held out, in nats per token."""

    steps: int
    loss: float
    eval_loss: float | None


@dataclass(frozen=True)
class _Data:
    """What is learned from and what is held out, and how many rows were too long."""

    train: TokenizedSamples
    held_out: TokenizedSamples | None
    skipped: int
    truncated: int


def sft(config: SFTConfig, report: Report | None = None, show: bool = False) -> Path:
    """Fine-tune the model of a folder on a file and save it; returns the folder of the trained model.

    The run's folder gets `config.yaml`, `metrics.jsonl` and `policy/` (weights as safetensors, and the tokenizer).
    Ctrl-C and a diverged step save the model as it stands before the exception goes on up.

    Args:
        config: see `SFTConfig`.
        report: see `fine_tune`.
        show: print progress.

    Raises:
        UserError: names the file, row or field that cannot be used.
        FloatingPointError: the training diverged.
    """
    if not config.output:
        raise UserError("no output given: name the folder of the run with --output")
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    model = load_causal_lm(config.model, config.dtype, config.device, config.trust_remote_code)
    rows = load_rows(config.data, config.split)
    eval_rows = load_rows(config.eval_data, config.eval_split) if config.eval_data else None
    names = (config.model, config.data, config.eval_data or "")
    data = _prepare(model, tokenizer, rows, eval_rows, config, names)
    batches = _plan(data.train, config)
    folder = Path(config.output) / "policy"
    with Run.create(config.output, config_to_dict(config), overwrite=config.overwrite) as run, ExitStack() as stack:
        display = stack.enter_context(Display(len(batches), SHOWN, unit="step")) if show else None

        def log(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            run.log(step, {name: value for name, value in metrics.items() if name != "step"})
            if display is not None and step == 0:
                display.note(_describe(metrics))
            elif display is not None and (step == len(batches) or step % max(1, len(batches) // SHOWN_STEPS) == 0):
                display.update(step, metrics)
            if report is not None:
                report(metrics)

        try:
            _train(model, data, batches, config, log)
        except (KeyboardInterrupt, FloatingPointError):
            save_policy(model, tokenizer, folder)
            raise
        save_policy(model, tokenizer, folder)
    return folder


def _describe(counts: dict[str, float]) -> str:
    text = f"{counts['samples']:,.0f} samples, {counts['tokens']:,.0f} tokens, {counts['target_tokens']:,.0f} to learn"
    for name, what in (("eval_samples", "held out"), ("skipped", "skipped as too long"), ("truncated", "cut off")):
        if counts.get(name):
            text += f"; {counts[name]:,.0f} {what}"
    return text + (f"; held-out loss {counts['eval_loss']:.3f}" if "eval_loss" in counts else "")


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: SFTConfig | None = None,
    report: Report | None = None,
    eval_rows: Sequence[Row] | None = None,
) -> FineTuning:
    """Fine-tune a model in memory, in place, on rows in memory; the fields of `config` that name files are not read.

    Args:
        model: on its device; comes back in evaluation mode. Dropout is off, as in PPO.
        tokenizer: the model's; pads with eos from now on if it has no pad token.
        rows: dicts with `prompt` and `completion`, `messages`, or `text`.
        config: see `SFTConfig`.
        report: called before the first step (step 0: counts of the data, held-out loss) and after each step with its
            metrics: step, epoch, loss, learning_rate, gradient_norm, tokens, target_tokens,
            time/tokens_per_second, and eval_loss where it was taken. Losses are in nats per target token.
        eval_rows: held-out rows; they go before `config.eval_fraction`.

    Raises:
        UserError: names the row or field that cannot be used.
        FloatingPointError: a gradient is not finite; the parameters are those before the bad step.
    """
    config = config or SFTConfig()
    names = ("the model", "rows", "eval_rows")
    data = _prepare(model, prepare_tokenizer(tokenizer), rows, eval_rows, config, names)
    return _train(model, data, _plan(data.train, config), config, report or (lambda metrics: None))


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a plain Hugging Face folder, which appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    eval_rows: Sequence[Row] | None,
    config: SFTConfig,
    names: tuple[str, str, str],
) -> _Data:
    """Everything that can be wrong with what the user brought is found here, before the run has a folder."""
    check_vocabulary(model, tokenizer, names[0])
    if config.packing:
        check_packing(model)
    longest = _longest_sample(model, config)
    tokenized = tokenize_rows(rows, tokenizer, config.rows, longest, config.overlong, names[1])
    train, skipped, truncated = tokenized.samples, tokenized.skipped, tokenized.truncated
    held_out = None
    if eval_rows is not None:
        evaluated = tokenize_rows(eval_rows, tokenizer, config.rows, longest, config.overlong, names[2])
        held_out = evaluated.samples
        skipped, truncated = skipped + evaluated.skipped, truncated + evaluated.truncated
    elif config.eval_fraction:
        count = max(1, round(config.eval_fraction * len(train)))
        if count >= len(train):
            raise UserError(f"{names[1]}: eval_fraction {config.eval_fraction} leaves none of its {len(train)} rows")
        order = np.random.default_rng([config.seed, 1]).permutation(len(train))
        train, held_out = train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))
    return _Data(train, held_out, skipped, truncated)


def _longest_sample(model: PreTrainedModel, config: SFTConfig) -> int:
    context = context_length(model)
    if config.max_tokens is None:
        return min(context or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    if context is not None and config.max_tokens > context:
        raise UserError(f"max_tokens is {config.max_tokens}, expected at most the model's context of {context}")
    return config.max_tokens


def _train(
    model: PreTrainedModel, data: _Data, batches: Sequence[Batch], config: SFTConfig, report: Report
) -> FineTuning:
    steps = len(batches)
    optimizer = _optimizer(model, config)
    passes = Passes(config.packing, config.microbatch_tokens, config.autocast)
    loss, eval_loss = math.nan, None
    model.eval()
    first = _counts(data) | {"step": 0.0}
    if data.held_out is not None:
        first["eval_loss"] = mean_loss(model, data.held_out, config.batch_size, passes)
    report(first)
    for step, (epoch, chosen) in enumerate(batches, 1):
        started = time.perf_counter()
        rate = config.learning_rate * schedule_factor(step - 1, steps, config.warmup_steps, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with checkpointed_layers(model) if config.gradient_checkpointing else nullcontext():
            loss = accumulate_gradients(model, data.train, chosen, passes)
        norm = _update(model, optimizer, config, step)
        tokens = float(data.train.lengths[chosen].sum())
        metrics = {"step": float(step), "epoch": epoch, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        metrics |= {"tokens": tokens, "target_tokens": float(data.train.target_counts[chosen].sum())}
        metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
        due = step == steps or (config.eval_every > 0 and step % config.eval_every == 0)
        if due and data.held_out is not None:
            eval_loss = mean_loss(model, data.held_out, config.batch_size, passes)
            metrics["eval_loss"] = eval_loss
        report(metrics)
    return FineTuning(steps, loss, eval_loss)


def _counts(data: _Data) -> dict[str, float]:
    counts = {"samples": len(data.train), "tokens": data.train.starts[-1], "target_tokens": data.train.is_target.sum()}
    counts |= {"skipped": data.skipped, "truncated": data.truncated}
    if data.held_out is not None:
        counts["eval_samples"] = len(data.held_out)
    return {name: float(count) for name, count in counts.items()}


def _plan(samples: TokenizedSamples, config: SFTConfig) -> list[Batch]:
    """Every batch of the run."""
    generator = np.random.default_rng([config.seed, 0])
    batches: list[Batch] = []
    epoch = 0
    while config.max_steps is not None or epoch < config.epochs:
        order = generator.permutation(len(samples))
        used = np.cumsum(samples.lengths[order])
        start = 0
        while start < len(order):
            end = start + config.batch_size
            if config.batch_tokens is not None:
                before = used[start - 1] if start else 0
                end = max(start + 1, int(np.searchsorted(used, before + config.batch_tokens, side="right")))
            batches.append((epoch + min(end, len(order)) / len(order), order[start:end]))
            if len(batches) == config.max_steps:
                return batches
            start = end
        epoch += 1
    return batches


def _optimizer(model: PreTrainedModel, config: SFTConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def _update(model: PreTrainedModel, optimizer: torch.optim.AdamW, config: SFTConfig, step: int) -> float:
    """Clip the gradients and move the parameters; returns the gradients' norm before clipping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(trained, config.max_gradient_norm or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm} at step {step}: lower learning_rate")
    optimizer.step()
    return norm
