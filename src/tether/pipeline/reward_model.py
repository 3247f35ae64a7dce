"""`tether reward`: a reward model, or an ensemble, is trained on comparisons, evaluated on others, and saved.

Knows nothing of policies or of PPO.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import ChatTemplate
from tether.config import config_to_dict
from tether.errors import UserError
from tether.language.layers import checkpointed_layers
from tether.language.preferences import Preference, Preferences, PreferencesConfig, load_preferences
from tether.pipeline.agreement import Evaluation, evaluate_scores, mean
from tether.pipeline.comparisons import TokenizedPairs, accumulate_gradients, score_pairs, tokenize_pairs
from tether.pipeline.opening import aligned, count, describe_device
from tether.pipeline.opening_language import describe_model, describe_tokenizer
from tether.pipeline.supervised import Batch, Optimizer, Report, SupervisedConfig, longest_text, plan_batches
from tether.pretrained import restore_outputs, without_bars
from tether.rewards.classifiers import load_classifier
from tether.rewards.models import MEMBER
from tether.rewards.normalisation import Combine, Normalisation
from tether.rewards.passes import score_all
from tether.runs import Display, Run, recorded
from tether.uncertainty import percent, rounded, with_error

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
EVALUATION_FILE = "evaluation.json"

SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "learning_rate", "gradient_norm")
SHOWN_STEPS = 100  # of a long run, about so many steps are shown; all are in metrics.jsonl


@dataclass(frozen=True)
class RewardModelData:
    """What becomes a reward model, and of what."""

    model: str = ""
    """Folder or hub name to start from: a causal language model, which gets a new head, or a reward model."""
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    members: int = 1
    """Models in the ensemble; they differ in the order of the data and in the weights of a new head."""
    combine: Combine = "mean"
    """Score of an ensemble in the evaluation: mean, min, or mean less `k` standard deviations (Coste et al. 2023)."""
    k: float = 1.0
    """Standard deviations that `mean-std` takes off."""
    centring: float = 0.0
    """Coefficient of (r_chosen + r_rejected)², which keeps scores around 0 (Eisenstein et al. 2023)."""
    normalisation_samples: int = 2000
    """Responses, of the held-out ones where there are some, on which scores are given mean 0 and deviation 1."""


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig, RewardModelData):
    """Training of a reward model on comparisons."""

    output: str = ""
    """Folder of the run; the trained reward model is saved in its `model/`."""
    eval_fraction: float = 0.1
    """Share of the comparisons held out where there is no `eval_data`; a prompt's comparisons stay together."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """What happens to a longer one: stop with an error, leave the pair out, or cut off the prompt's beginning."""
    epochs: int = 1
    """Passes over the comparisons. More than one overfits quickly (Ouyang et al. 2022)."""
    batch_size: int = 64
    """Comparisons per optimizer step."""
    learning_rate: float = 1e-5
    """Peak learning rate. 1e-5 suits models of some billion parameters (Ouyang et al. 2022); small ones take more."""
    seed: int = 0
    """Of the order of the comparisons, of what is held out, and of new heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 1:
            raise ValueError(f"members is {self.members}, expected 1 or more")
        for name in ("k", "centring"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number of 0 or more")
        if self.normalisation_samples < 2:
            raise ValueError(f"normalisation_samples is {self.normalisation_samples}, expected 2 or more")


@dataclass(frozen=True)
class RewardTraining:
    """What came of it.

    Attributes:
        folder: the reward model, a Hugging Face folder, or one with `member-0`, `member-1`, ….
        evaluation: on the held-out comparisons, of the ensemble where there are several members; None where nothing is
            held out.
        members: of each member.
        normalisation: of the scores.
    """

    folder: Path
    evaluation: Evaluation | None
    members: tuple[Evaluation, ...]
    normalisation: Normalisation


@dataclass(frozen=True)
class _Data:
    """What is learned from, what is held out and what scores are normalised on."""

    train: TokenizedPairs
    held_out: TokenizedPairs | None
    reference: list[list[int]]
    source: str
    left_out: dict[str, list[int]]


def train_reward_model(config: RewardModelConfig, report: Report | None = None, show: bool = False) -> RewardTraining:
    """Train a reward model, or an ensemble, and save it.

    The run's folder gets `config.yaml`, `metrics.jsonl`, `evaluation.json` and `model/`: weights as safetensors,
    tokenizer and `score_normalisation.json`; of an ensemble in `model/member-0`, `model/member-1`, …. Ctrl-C saves the
    model as it stands, with the members before it, before the exception goes on up.

    Args:
        config: see `RewardModelConfig`.
        report: called before the first step of each member (step 0) and after each step with its metrics.
        show: print progress and the evaluation.

    Raises:
        UserError: names the file, row or field that cannot be used.
        FloatingPointError: the training diverged.
    """
    if not config.output:
        raise UserError("no output given: name the folder of the run with --output")
    if not config.model:
        raise UserError("no model given: name a folder or a hub name with --model")
    if show:
        print(f"loading {config.model} …", flush=True)
    model, tokenizer = _load(config, 0)
    chat = ChatTemplate(tokenizer, config.preferences, "preferences")
    chat.keep()  # it is read in the same way wherever the reward model is asked
    config = dataclasses.replace(config, preferences=chat.settled(config.preferences))
    data = _prepare(model, tokenizer, config)
    orders = [np.random.default_rng([config.seed, 0, member]) for member in range(config.members)]
    plans = [plan_batches(len(data.train), config, order) for order in orders]
    total = sum(map(len, plans))
    folder = Path(config.output) / MODEL_FOLDER
    with Run.create(config.output, config_to_dict(config), overwrite=config.overwrite) as run, ExitStack() as stack:
        display = stack.enter_context(Display(total, SHOWN, unit="step")) if show else None
        stack.enter_context(recorded(run.folder, model.device))  # after the display, whose table it shall not hear
        if display is not None:
            display.note("\n".join(_opening(config, model, tokenizer, data, total)))
            if data.held_out is not None:
                display.phase("held-out comparisons before the first step")
        # What an earlier run left; `--overwrite` has been checked.
        for old in (folder, _partial(folder)):
            shutil.rmtree(old, ignore_errors=True)
        (folder.parent / EVALUATION_FILE).unlink(missing_ok=True)
        done = _Members(folder, tokenizer, data, config)
        for member, plan in enumerate(plans):
            if member:
                del model
                model, _ = _load(config, member)
            first = member * (len(plan) + 1)

            def log(metrics: dict[str, float], first: int = first, member: int = member, last: int = len(plan)) -> None:
                step = int(metrics["step"])
                run.log(first + step, metrics | {"member": float(member)})
                if display is not None and not step and not member:
                    display.begin()
                if display is not None and step and (step == last or step % max(1, total // SHOWN_STEPS) == 0):
                    display.update(member * last + step, metrics)
                if report is not None:
                    report(metrics | {"member": float(member)})

            try:
                _train(model, data, plan, config, log)
            except KeyboardInterrupt:
                done.add(model)
                done.finish()
                raise
            done.add(model)
        trained = done.finish()
    if show:
        Console(highlight=False).print(_table(trained, config))
    return trained


class _Members:
    """The members that are trained, on the disk, and their scores."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, data: _Data, config: RewardModelConfig
    ) -> None:
        self.folder, self.tokenizer, self.data, self.config = folder, tokenizer, data, config
        self.reference: list[Tensor] = []  # (N,) each
        self.held_out: list[Tensor] = []  # (2, n) each

    def add(self, model: PreTrainedModel) -> None:
        """Save a member with its normalisation."""
        scores = score_all(model, self.data.reference, self.config.microbatch_tokens)
        normalisation = Normalisation.of(scores[None], self.data.source)
        model.config.score_normalisation = {"mean": normalisation.means[0], "std": normalisation.stds[0]}
        place = _partial(self.folder)
        if self.config.members > 1:
            place = place / MEMBER.format(len(self.reference))
        with without_bars():
            model.save_pretrained(place)
        restore_outputs(model, place)
        self.tokenizer.save_pretrained(place)
        normalisation.save(place)
        self.reference.append(scores)
        if self.data.held_out is not None:
            self.held_out.append(score_pairs(model, self.data.held_out, self.config.microbatch_tokens))

    def finish(self) -> RewardTraining:
        """Normalise the ensemble, evaluate, and give the folder its name."""
        place = _partial(self.folder)
        normalisation = Normalisation.of(torch.stack(self.reference), self.data.source)
        normalisation.save(place)
        pairs = self.data.held_out
        members: tuple[Evaluation, ...] = ()
        overall = None
        results: dict[str, Any] = {}
        if pairs is not None:
            members = tuple(_evaluate(scores, pairs) for scores in self.held_out)
            overall = members[0]
            if len(members) > 1:
                overall = _evaluate(self._combined(normalisation), pairs)
                results["members"] = [dataclasses.asdict(member) for member in members]
                results["combine"] = self.config.combine
            results = {"held_out": dataclasses.asdict(overall)} | results
        results |= {"rows_left_out": self.data.left_out, "normalisation": dataclasses.asdict(normalisation)}
        text = json.dumps(_without_nan(results), indent=2, allow_nan=False)
        (self.folder.parent / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")
        place.rename(self.folder)
        return RewardTraining(self.folder, overall, members, normalisation)

    def _combined(self, normalisation: Normalisation) -> Tensor:
        """Scores (2, n) of the ensemble, brought back to the scale on which differences go through σ."""
        how: Combine = self.config.combine
        raw = torch.stack(self.held_out)  # (K, 2, n)
        combined = normalisation.combine(raw.flatten(1), how, self.config.k).reshape(raw.shape[1:])
        # By the mean of the members' slopes: a combination of normalised scores has lost them.
        spread = normalisation.mean[1] if normalisation.mean[1] > 0 else 1.0
        return combined * math.sqrt(spread) * float(np.mean(normalisation.stds))


def _partial(folder: Path) -> Path:
    """Where a folder is written before it appears whole."""
    return folder.with_name(folder.name + ".partial")


def _load(config: RewardModelConfig, member: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    head = int(np.random.SeedSequence([config.seed, member]).generate_state(1)[0])
    return load_classifier(config.model, config.dtype, config.device, head, config.trust_remote_code)


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RewardModelConfig) -> _Data:
    """Everything that can be wrong with what the user brought is found here, before the run has a folder."""
    longest = longest_text(model, config.max_tokens)
    source = config.preferences
    loaded = load_preferences(source, tokenizer)
    train, held_out, origin = loaded.pairs, list[Preference](), source.path
    left_out = _left_out(loaded)
    if config.eval_data:
        other = dataclasses.replace(source, path=config.eval_data, split=config.eval_split)
        evaluated = load_preferences(other, tokenizer)
        held_out, origin = evaluated.pairs, config.eval_data
        left_out |= {f"eval_{name}": rows for name, rows in _left_out(evaluated).items()}
        known = {pair.key for pair in train}
        shared = sum(pair.key in known for pair in held_out)
        if shared:
            logger.warning("%s: %d of %d held-out prompts are in %s too", origin, shared, len(held_out), source.path)
    elif config.eval_fraction:
        train, held_out = split_by_prompt(loaded.pairs, config.eval_fraction, config.seed, source.path)
    tokenized = tokenize_pairs(train, tokenizer, longest, config.overlong, source.path)
    evaluation = tokenize_pairs(held_out, tokenizer, longest, config.overlong, origin) if held_out else None
    basis = evaluation or tokenized
    reference = [*basis.chosen, *basis.rejected]
    if len(reference) > config.normalisation_samples:
        drawn = np.random.default_rng([config.seed, 2]).permutation(len(reference))[: config.normalisation_samples]
        reference = [reference[i] for i in np.sort(drawn)]
    name = "held-out responses" if evaluation is not None else "training responses"
    return _Data(tokenized, evaluation, reference, name, left_out)


def _left_out(loaded: Preferences) -> dict[str, list[int]]:
    found = {"duplicates": loaded.duplicates, "empty": loaded.empty, "identical": loaded.identical}
    return {name: list(rows) for name, rows in found.items() if rows}


def split_by_prompt(
    pairs: Sequence[Preference], fraction: float, seed: int, origin: str = "preferences"
) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out comparisons; all of one prompt are on the same side.

    Prompts are drawn at random until at least `fraction` of the comparisons is held out.

    Raises:
        UserError: that would leave nothing to learn from.
    """
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.key, []).append(index)
    keys = list(groups)
    wanted = max(1, round(fraction * len(pairs)))
    held: set[int] = set()
    for place in np.random.default_rng([seed, 1]).permutation(len(keys)):
        if len(held) >= wanted:
            break
        held.update(groups[keys[place]])
    if len(held) == len(pairs):
        raise UserError(
            f"{origin}: eval_fraction {fraction} leaves nothing to learn: the {len(pairs)} comparisons are of "
            f"{len(keys)} prompts, which are not divided: set eval_fraction to 0, or name eval_data"
        )
    return (
        [pair for index, pair in enumerate(pairs) if index not in held],
        [pair for index, pair in enumerate(pairs) if index in held],
    )


def _train(
    model: PreTrainedModel,
    data: _Data,
    batches: Sequence[Batch],
    config: RewardModelConfig,
    log: Report,
) -> None:
    optimizer = Optimizer(model, config, len(batches))
    first = {"step": 0.0, "pairs": float(len(data.train)), "skipped": float(data.train.skipped)}
    log(first | {"truncated": float(data.train.truncated)} | _held_out_metrics(model, data, config))
    for step, (epoch, chosen) in enumerate(batches, 1):
        started = time.perf_counter()
        indices = [int(index) for index in chosen]
        with checkpointed_layers(model) if config.gradient_checkpointing else nullcontext():
            loss, scores = accumulate_gradients(
                model, data.train, indices, config.microbatch_tokens, config.centring, config.autocast
            )
        moved = optimizer.update(step)
        tokens = sum(len(data.train.chosen[i]) + len(data.train.rejected[i]) for i in indices)
        gaps = (scores[0] - scores[1])[~data.train.ties[indices]].numpy()
        metrics = {"step": float(step), "epoch": epoch, "loss": loss, "accuracy": mean((gaps > 0) + 0.5 * (gaps == 0))}
        metrics |= {"margin": mean(gaps), "score_mean": float(scores.mean()), "tokens": float(tokens)}
        metrics |= moved
        metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
        if config.evaluates(step, len(batches)):
            metrics |= _held_out_metrics(model, data, config)
        log(metrics)


def _held_out_metrics(model: PreTrainedModel, data: _Data, config: RewardModelConfig) -> dict[str, float]:
    if data.held_out is None:
        return {}
    found = _evaluate(score_pairs(model, data.held_out, config.microbatch_tokens), data.held_out)
    metrics = {"loss": found.loss, "accuracy": found.accuracy, "margin": found.margin}
    metrics |= {"calibration_error": found.calibration_error, "length_correlation": found.length_correlation}
    metrics |= {"accuracy_low": found.interval[0], "accuracy_high": found.interval[1], "pairs": float(found.pairs)}
    return {f"eval_{name}": value for name, value in metrics.items()}


def _evaluate(scores: Tensor, pairs: TokenizedPairs) -> Evaluation:
    return evaluate_scores(scores[0], scores[1], pairs.ties.tolist(), pairs.chosen_lengths, pairs.rejected_lengths)


# ---- what people see -------------------------------------------------------------------------------------------------


def _opening(
    config: RewardModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: _Data, steps: int
) -> list[str]:
    """What was loaded, what computes it, and what a step is."""
    text = f"{len(data.train):,} comparisons"
    if data.held_out is not None:
        text += f"; {len(data.held_out):,} held out"
    for number, what in ((data.train.skipped, "skipped as too long"), (data.train.truncated, "cut off")):
        if number:
            text += f"; {number:,} {what}"
    members = f" for {config.members} members" if config.members > 1 else ""
    return aligned(
        [
            ("device", describe_device(model.parameters(), config.autocast)),
            ("model", f"{describe_model(model, config.model)}; {describe_tokenizer(tokenizer)}"),
            ("data", text),
            ("run", f"{count(steps, 'step')} of {count(config.batch_size, 'comparison')}{members}, in {config.output}"),
        ]
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(trained: RewardTraining, config: RewardModelConfig) -> Table | str:
    if trained.evaluation is None:
        return "nothing was held out: no evaluation"
    table = Table(title="held-out comparisons", title_justify="left", caption_justify="left", box=None, pad_edge=False)
    table.caption = "ECE: expected calibration error; length: correlation of score with length"
    for name in ("", "pairs", "accuracy (95 %)", "margin", "ECE", "length"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold", header_style="dim")
    rows = {"reward model": trained.evaluation}
    if len(trained.members) > 1:
        rows = {config.combine: trained.evaluation}
        rows |= {MEMBER.format(number): member for number, member in enumerate(trained.members)}
    for name, found in rows.items():
        error = 1 / math.sqrt(max(1, found.pairs))  # at least about that of a calibration error or a correlation
        table.add_row(
            name,
            f"{found.pairs:,}",
            percent(found.accuracy, found.interval),
            with_error(found.margin, found.margin_error),
            rounded(found.calibration_error, error),
            rounded(found.length_correlation, error),
        )
    return table
