"""Supervised fine-tuning: a causal LM learns to write the responses it is shown, the step before PPO.

Cross-entropy on response tokens only, eos included. The optimizer's batch is a set of samples; how they are packed into
rows and cut into microbatches changes speed and memory, never the gradient. Knows nothing of rewards.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import ChatTemplate
from tether.config import config_to_dict
from tether.errors import UserError
from tether.language.adapters import LoRAConfig, give_adapters, save_model
from tether.language.cross_entropy import Passes, accumulate_gradients, mean_loss
from tether.language.layers import checkpointed_layers
from tether.language.models import (
    Quantization,
    check_quantization,
    end_token_ids,
    load_tokenizer,
    load_trainable,
    prepare_tokenizer,
)
from tether.language.packing import TokenizedSamples, check_packing
from tether.language.rows import load_rows
from tether.pipeline.opening import aligned, count, describe_device
from tether.pipeline.opening_language import describe_model, describe_tokenizer, has_experts
from tether.pipeline.samples import Row, RowFormat, tokenize_rows
from tether.pipeline.supervised import Batch, Optimizer, Report, SupervisedConfig, longest_text, plan_batches
from tether.positions import settle_positions
from tether.pretrained import check_vocabulary
from tether.random_states import seed_random_states
from tether.runs import Display, Run, recorded

SHOWN = ("loss", "eval_loss", "learning_rate", "gradient_norm", "time/tokens_per_second")
SHOWN_STEPS = 100  # of a long run, about so many steps are shown; all are in metrics.jsonl


@dataclass(frozen=True)
class SFTData:
    """What is fine-tuned, and on what."""

    model: str = ""
    """Folder or hub name of the model to start from."""
    data: str = ""
    """Training rows: file (.jsonl, .json, .csv, also as .gz; .parquet), folder saved by `datasets`, or hub name."""
    split: str = "train"
    """Split of a dataset folder or of a hub dataset."""
    rows: RowFormat = field(default_factory=RowFormat)
    packing: bool = True
    """Let short samples share a row without seeing each other. Faster, with the same gradients."""
    batch_tokens: int | None = None
    """Fill the batch of an optimizer step up to so many tokens instead of `batch_size`; at least one sample."""


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig, SFTData):
    """Supervised fine-tuning of a causal language model."""

    output: str = ""
    """Folder of the run; the trained model is saved in its `policy/`."""
    learning_rate: float = 2e-5
    """Peak learning rate. 2e-5 suits models of some billion parameters (Taori et al. 2023); small ones take more."""
    quantization: Quantization = "none"
    """Keep the weights of a model whose adapters are trained in 4 or 8 bits (QLoRA, Dettmers et al. 2023); needs
    bitsandbytes and CUDA."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}, expected 1 or more")
        if self.eval_data and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction are both set: one says what is held out")
        check_quantization(self.quantization, self.lora)


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
    if show:
        print(f"loading {config.model or 'the model'} …", flush=True)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    config = replace(config, rows=ChatTemplate(tokenizer, config.rows, "rows").settled(config.rows))
    seed_random_states(config.seed)  # new adapters are drawn from them
    model = load_trainable(
        config.model, config.lora, config.dtype, config.device, config.trust_remote_code, config.quantization
    )
    rows = load_rows(config.data, config.split)
    eval_rows = load_rows(config.eval_data, config.eval_split) if config.eval_data else None
    names = (config.model, config.data, config.eval_data or "")
    data = _prepare(model, tokenizer, rows, eval_rows, config, names)
    batches = _plan(data.train, config)
    folder = Path(config.output) / "policy"
    with Run.create(config.output, config_to_dict(config), overwrite=config.overwrite) as run, ExitStack() as stack:
        display = stack.enter_context(Display(len(batches), SHOWN, unit="step")) if show else None
        stack.enter_context(recorded(run.folder, model.device))  # after the display, whose table it shall not hear
        if display is not None:
            display.note("\n".join(_opening(config, model, tokenizer, data, len(batches))))
            if data.held_out is not None:
                display.phase("held-out loss before the first step")

        def log(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            run.log(step, {name: value for name, value in metrics.items() if name != "step"})
            if display is not None and step == 0:
                if "eval_loss" in metrics:
                    display.note(f"held-out loss {metrics['eval_loss']:.3f}")
                display.begin()
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


def _opening(
    config: SFTConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: _Data, steps: int
) -> list[str]:
    """What was loaded, what computes it, and what a step is."""
    counts = _counts(data)
    text = f"{counts['samples']:,.0f} samples, {counts['tokens']:,.0f} tokens, {counts['target_tokens']:,.0f} to learn"
    for name, what in (("eval_samples", "held out"), ("skipped", "skipped as too long"), ("truncated", "cut off")):
        if counts.get(name):
            text += f"; {counts[name]:,.0f} {what}"
    size = count(config.batch_size, "sample")
    if config.batch_tokens is not None:
        size = f"samples of up to {config.batch_tokens:,} tokens together"
    experts = (
        [("experts", "the loss is cross-entropy alone, without a term that balances them")]
        if has_experts(model)
        else []
    )
    return aligned(
        [
            ("device", describe_device(model.parameters(), config.autocast)),
            ("model", f"{describe_model(model, config.model)}; {describe_tokenizer(tokenizer)}"),
            *experts,
            ("data", text),
            ("run", f"{count(steps, 'step')} of {size}, in {config.output}"),
        ]
    )


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
        model: on its device; comes back in evaluation mode, with adapters where `config.lora` has a rank. Dropout is
            off, as in PPO.
        tokenizer: the model's; pads with eos from now on if it has no pad token, and has the chat template of
            `config.rows` where that names one.
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
    if config.lora.rank:
        give_adapters(model, config.lora)
    names = ("the model", "rows", "eval_rows")
    data = _prepare(model, prepare_tokenizer(tokenizer), rows, eval_rows, config, names)
    return _train(model, data, _plan(data.train, config), config, report or (lambda metrics: None))


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (adapters alone where it has any) and tokenizer as a folder that appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # what a classifier ends with is nobody's to generate
    save_model(model, partial, end_token_ids(model, tokenizer) if model.can_generate() else ())
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
    ChatTemplate(tokenizer, config.rows, "rows").keep()  # what was learned with is saved beside the weights
    if config.packing:
        check_packing(model)
    longest = longest_text(model, config.max_tokens)
    tokenized = tokenize_rows(rows, tokenizer, config.rows, longest, config.overlong, names[1])
    train, rows_of, skipped, truncated = tokenized.samples, tokenized.rows, tokenized.skipped, tokenized.truncated
    held_out = None
    if eval_rows is not None:
        evaluated = tokenize_rows(eval_rows, tokenizer, config.rows, longest, config.overlong, names[2])
        held_out = evaluated.samples
        skipped, truncated = skipped + evaluated.skipped, truncated + evaluated.truncated
    elif config.eval_fraction:
        kept = np.unique(rows_of)  # a conversation may have several samples, which stay together
        count = max(1, round(config.eval_fraction * len(kept)))
        if count >= len(kept):
            raise UserError(f"{names[1]}: eval_fraction {config.eval_fraction} leaves none of its {len(kept)} rows")
        order = np.random.default_rng([config.seed, 1]).permutation(len(kept))
        is_held_out = np.isin(rows_of, kept[order[:count]])
        train, held_out = train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))
    sets = [train] if held_out is None else [train, held_out]
    settle_positions([model], max(int(own.lengths.max()) for own in sets))
    return _Data(train, held_out, skipped, truncated)


def _train(
    model: PreTrainedModel, data: _Data, batches: Sequence[Batch], config: SFTConfig, report: Report
) -> FineTuning:
    steps = len(batches)
    optimizer = Optimizer(model, config, steps)
    passes = Passes(config.packing, config.microbatch_tokens, config.autocast)
    loss, eval_loss = math.nan, None
    model.eval()
    first = _counts(data) | {"step": 0.0}
    if data.held_out is not None:
        first["eval_loss"] = mean_loss(model, data.held_out, config.batch_size, passes)
    report(first)
    for step, (epoch, chosen) in enumerate(batches, 1):
        started = time.perf_counter()
        with checkpointed_layers(model) if config.gradient_checkpointing else nullcontext():
            loss = accumulate_gradients(model, data.train, chosen, passes)
        tokens = float(data.train.lengths[chosen].sum())
        metrics = {"step": float(step), "epoch": epoch, "loss": loss} | optimizer.update(step)
        metrics |= {"tokens": tokens, "target_tokens": float(data.train.target_counts[chosen].sum())}
        metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
        if data.held_out is not None and config.evaluates(step, steps):
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
    generator = np.random.default_rng([config.seed, 0])
    return plan_batches(len(samples), config, generator, samples.lengths, config.batch_tokens)
