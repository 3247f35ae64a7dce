"""`tether reward`: a reward model learns from comparisons which of two responses people prefer.

Bradley–Terry: the probability that a response is preferred is σ of the difference of the scores. How a batch is cut
into microbatches changes speed and memory, never the gradient. Knows nothing of policies or of PPO.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import config_to_dict
from tether.errors import UserError
from tether.language.cross_entropy import checkpointed_layers
from tether.language.preferences import Preference, Preferences, PreferencesConfig, load_preferences
from tether.ppo.learner import schedule_factor
from tether.rewards.models import (
    MEMBER,
    Combine,
    Normalisation,
    context_of,
    encode,
    load_classifier,
    passes,
    score_all,
    score_tokens,
)
from tether.runs import Display, Run

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 2048  # a context of 128k tokens is no reason to try texts of 128k tokens
BINS = 10  # of the reliability curve, over confidences from 0.5 to 1
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution

MODEL_FOLDER = "model"
EVALUATION_FILE = "evaluation.json"

SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "learning_rate", "gradient_norm")
SHOWN_STEPS = 100  # of a long run, about so many steps are shown; all are in metrics.jsonl

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class RewardModelConfig:
    """Training of a reward model on comparisons."""

    model: str = ""
    """Folder or hub name to start from: a causal language model, which gets a new head, or a reward model."""
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    output: str = ""
    """Folder of the run; the trained reward model is saved in its `model/`."""
    overwrite: bool = False
    """Replace a run that is already in `output`."""
    eval_data: str | None = None
    """Held-out comparisons, in the same form as `preferences.path`."""
    eval_split: str = "train"
    """Split of `eval_data` where that is a dataset folder or a hub dataset."""
    eval_fraction: float = 0.1
    """Share of the comparisons held out where there is no `eval_data`; a prompt's comparisons stay together."""
    eval_every: int = 0
    """Optimizer steps between held-out losses. 0: only before the first step and after the last, as always."""
    members: int = 1
    """Models in the ensemble; they differ in the order of the data and in the weights of a new head."""
    combine: Literal["mean", "min", "mean-std"] = "mean"
    """Score of an ensemble in the evaluation: mean, min, or mean less `k` standard deviations (Coste et al. 2023)."""
    k: float = 1.0
    """Standard deviations that `mean-std` takes off."""
    centring: float = 0.0
    """Coefficient of (r_chosen + r_rejected)², which keeps scores around 0 (Eisenstein et al. 2023)."""
    normalisation_samples: int = 2000
    """Responses, of the held-out ones where there are some, on which scores are given mean 0 and deviation 1."""
    max_tokens: int | None = None
    """Longest prompt with response, in tokens. None: the model's context, at most 2048."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """What happens to a longer one: stop with an error, leave the pair out, or cut off the prompt's beginning."""
    epochs: int = 1
    """Passes over the comparisons. More than one overfits quickly (Ouyang et al. 2022)."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, going round the data as often as that takes. None: `epochs` decides."""
    batch_size: int = 64
    """Comparisons per optimizer step."""
    microbatch_tokens: int = 8192
    """Tokens (padding included) that go through the model at once. Changes memory and speed, never the result."""
    learning_rate: float = 1e-5
    """Peak learning rate. 1e-5 suits models of some billion parameters (Ouyang et al. 2022); small ones take more."""
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
    """Of the order of the comparisons, of what is held out, and of new heads."""

    def __post_init__(self) -> None:
        whole = ("members", "epochs", "max_steps", "batch_size", "microbatch_tokens", "max_tokens")
        for name in whole:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        numbers = ("k", "centring", "learning_rate", "warmup_steps", "weight_decay", "max_gradient_norm", "eval_every")
        for name in numbers:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number of 0 or more")
        if self.normalisation_samples < 2:
            raise ValueError(f"normalisation_samples is {self.normalisation_samples}, expected 2 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon is {self.adam_epsilon}, expected a number above 0")
        if self.autocast and self.dtype != "float32":
            raise ValueError("autocast is on and dtype bfloat16: weights are cast already, set one of the two")


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Comparisons whose predicted probability of the likelier response is in [low, high), the last bin closed.

    Attributes:
        count: how many.
        confidence: the mean of that probability, NaN where there are none.
        accuracy: the share in which the likelier response was the chosen one.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """How well scores agree with comparisons. Ties count in the loss and the correlation alone.

    Attributes:
        pairs: comparisons in which one was preferred.
        ties: the others.
        loss: mean of −log σ(r_chosen − r_rejected), in nats, ties by halves; margins and centring left out.
        accuracy: share of pairs in which the chosen response has the higher score; equal scores count half.
        interval: its 95 % interval by Wilson (1927).
        margin: mean of r_chosen − r_rejected over the pairs.
        calibration_error: Σ (bin's share)·|its accuracy − its confidence| (Guo et al. 2017, equation 3).
        reliability: the curve's bins.
        length_correlation: Pearson's between scores and lengths of responses in tokens.
        longer_by_model: share of pairs, of different lengths, in which the longer response has the higher score.
        longer_by_people: share in which it is the chosen one.
    """

    pairs: int
    ties: int
    loss: float
    accuracy: float
    interval: tuple[float, float]
    margin: float
    calibration_error: float
    reliability: tuple[Bin, ...]
    length_correlation: float
    longer_by_model: float
    longer_by_people: float


def evaluate_scores(
    chosen: Sequence[float] | Tensor,
    rejected: Sequence[float] | Tensor,
    ties: Sequence[bool] | None = None,
    chosen_lengths: Sequence[int] | None = None,
    rejected_lengths: Sequence[int] | None = None,
) -> Evaluation:
    """Compare scores with what was preferred.

    Args:
        chosen: (n,) scores of the chosen responses, on the scale whose differences go through σ.
        rejected: (n,) of the rejected ones.
        ties: (n,) whether neither was preferred. None: never.
        chosen_lengths: (n,) tokens of the responses. None: nothing is said of lengths.
        rejected_lengths: (n,).
    """
    higher, lower = torch.as_tensor(chosen).double(), torch.as_tensor(rejected).double()
    tied = torch.zeros(len(higher), dtype=torch.bool) if ties is None else torch.tensor(list(ties), dtype=torch.bool)
    losses = preference_loss(higher, lower, torch.zeros_like(higher), tied)
    gaps = (higher - lower)[~tied].numpy()
    right = (gaps > 0) + 0.5 * (gaps == 0)
    accuracy = _mean(right)
    error, bins = calibration(gaps)
    correlation = by_model = by_people = math.nan
    if chosen_lengths is not None and rejected_lengths is not None:
        lengths = np.array([*chosen_lengths, *rejected_lengths], dtype=np.float64)
        correlation = _correlation(torch.cat([higher, lower]).numpy(), lengths)
        longer = np.sign(np.array(chosen_lengths) - np.array(rejected_lengths))[~tied.numpy()]
        unequal = longer != 0
        by_people = _mean(longer[unequal] > 0)
        by_model = _mean(np.where(longer[unequal] > 0, right[unequal], 1 - right[unequal]))
    return Evaluation(
        pairs=len(gaps),
        ties=int(tied.sum()),
        loss=_mean(losses.numpy()),
        accuracy=accuracy,
        interval=wilson(float(right.sum()), len(gaps)),
        margin=_mean(gaps),
        calibration_error=error,
        reliability=bins,
        length_correlation=correlation,
        longer_by_model=by_model,
        longer_by_people=by_people,
    )


def calibration(gaps: np.ndarray, count: int = BINS) -> tuple[float, tuple[Bin, ...]]:
    """Expected calibration error and reliability curve of differences r_chosen − r_rejected, in `count` bins.

    The model says that the response with the higher score is preferred with probability σ(|difference|).
    """
    confidences = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0) + 0.5 * (gaps == 0)
    edges = np.linspace(0.5, 1.0, count + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="right") - 1, 0, count - 1)
    bins, error = [], 0.0
    for place in range(count):
        inside = places == place
        confidence, accuracy = _mean(confidences[inside]), _mean(right[inside])
        bins.append(Bin(float(edges[place]), float(edges[place + 1]), int(inside.sum()), confidence, accuracy))
        if inside.any():
            error += float(inside.mean()) * abs(accuracy - confidence)
    return (error if len(gaps) else math.nan), tuple(bins)


def wilson(successes: float, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); (0, 1) where there is nothing to go by."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


# ---- what is learned -------------------------------------------------------------------------------------------------


def preference_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, ties: Tensor, centring: float = 0.0) -> Tensor:
    """Loss (n,) of each comparison, in nats.

    −log σ(r_c − r_r − m) with the margin m (Bradley and Terry 1952; margins: Touvron et al. 2023, equation 2); of ties
    −½ log σ(d) − ½ log σ(−d) with d = r_c − r_r; and centring·(r_c + r_r)² (Eisenstein et al. 2023).

    Args:
        chosen: (n,) scores r_c.
        rejected: (n,) scores r_r.
        margins: (n,) 0 or more; not used in ties.
        ties: (n,) bool.
        centring: coefficient.
    """
    difference = chosen - rejected
    won = -logsigmoid(difference - margins)
    tied = -0.5 * logsigmoid(difference) - 0.5 * logsigmoid(-difference)
    return torch.where(ties, tied, won) + centring * (chosen + rejected) ** 2


@dataclass(frozen=True)
class TokenizedPairs:
    """n comparisons in tokens, each response with its prompt, and what became of those that were too long.

    Attributes:
        chosen: (n,) lists of token ids.
        rejected: (n,).
        chosen_lengths: (n,) tokens of the response alone.
        rejected_lengths: (n,).
        margins: (n,) float32.
        ties: (n,) bool.
    """

    chosen: list[list[int]]
    rejected: list[list[int]]
    chosen_lengths: list[int]
    rejected_lengths: list[int]
    margins: Tensor
    ties: Tensor
    skipped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def lengths(self, chosen: Sequence[int] | None = None) -> list[int]:
        """Tokens of the longer side of each pair."""
        indices = range(len(self)) if chosen is None else chosen
        return [max(len(self.chosen[i]), len(self.rejected[i])) for i in indices]


def tokenize_pairs(
    pairs: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    overlong: Literal["error", "skip", "truncate"] = "error",
    origin: str = "preferences",
) -> TokenizedPairs:
    """Tokenize comparisons as a reward model reads them.

    Raises:
        UserError: a pair is too long, its messages cannot be rendered, or none is left.
    """
    names = [f"{origin}, row {pair.row}" for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    both = [
        encode(tokenizer, prompts, [pair.chosen for pair in pairs], names),
        encode(tokenizer, prompts, [pair.rejected for pair in pairs], names),
    ]
    kept, skipped, truncated = [], 0, 0
    for index, name in enumerate(names):
        longest = max(len(side[index]) for side in both)
        if longest > max_tokens and overlong == "error":
            raise UserError(
                f"{name}: {longest} tokens, expected at most {max_tokens} (`max_tokens`): raise it, or set `overlong` "
                "to skip or truncate"
            )
        if longest > max_tokens and overlong == "skip":
            skipped += 1
            continue
        if longest > max_tokens:
            truncated += 1
            for side in both:
                side[index] = side[index][-max_tokens:]
        kept.append(index)
    if not kept:
        raise UserError(f"{origin}: all {skipped} comparisons are longer than {max_tokens} tokens: raise `max_tokens`")
    return TokenizedPairs(
        [both[0][i] for i in kept],
        [both[1][i] for i in kept],
        _response_lengths([pairs[i].chosen for i in kept], tokenizer),
        _response_lengths([pairs[i].rejected for i in kept], tokenizer),
        torch.tensor([pairs[i].margin for i in kept], dtype=torch.float32),
        torch.tensor([pairs[i].tie for i in kept], dtype=torch.bool),
        skipped,
        truncated,
    )


def _response_lengths(responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = [r if isinstance(r, str) else "\n".join(message["content"] for message in r) for r in responses]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def accumulate_gradients(
    model: PreTrainedModel, pairs: TokenizedPairs, chosen: Sequence[int], config: RewardModelConfig
) -> tuple[float, Tensor]:
    """Leave the gradient of the mean loss of the chosen pairs in `.grad`.

    Both responses of a pair go through the model in the same pass; pairs of about equal lengths share one.

    Returns:
        The loss in nats per pair, and the scores (2, n) of the chosen and the rejected responses.
    """
    model.zero_grad(set_to_none=True)
    total = 0.0
    scores = torch.zeros(2, len(chosen))
    for places in passes(pairs.lengths(chosen), config.microbatch_tokens // 2):
        indices = [int(chosen[place]) for place in places]
        ids = [pairs.chosen[i] for i in indices] + [pairs.rejected[i] for i in indices]
        both = score_tokens(model, ids, config.autocast).reshape(2, len(indices))
        margins, ties = pairs.margins[indices].to(both.device), pairs.ties[indices].to(both.device)
        loss = preference_loss(both[0], both[1], margins, ties, config.centring).sum() / len(chosen)
        loss.backward()
        total += float(loss.detach())
        scores[:, torch.tensor(places)] = both.detach().cpu()
    return total, scores


def score_pairs(model: PreTrainedModel, pairs: TokenizedPairs, microbatch_tokens: int) -> Tensor:
    """Raw scores (2, n) of the chosen and the rejected responses."""
    return score_all(model, [*pairs.chosen, *pairs.rejected], microbatch_tokens).reshape(2, len(pairs))


# ---- the run ---------------------------------------------------------------------------------------------------------


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
    model, tokenizer = _load(config, 0)
    data = _prepare(model, tokenizer, config)
    plans = [_plan(len(data.train), config, member) for member in range(config.members)]
    total = sum(map(len, plans))
    folder = Path(config.output) / MODEL_FOLDER
    with Run.create(config.output, config_to_dict(config), overwrite=config.overwrite) as run, ExitStack() as stack:
        display = stack.enter_context(Display(total, SHOWN, unit="step")) if show else None
        if display is not None:
            display.note(_describe(data))
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
        model.save_pretrained(place)
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
    context = context_of(model)
    longest = config.max_tokens or min(context or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    if context is not None and longest > context:
        raise UserError(f"max_tokens is {longest}, expected at most the model's context of {context}")
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


def _plan(count: int, config: RewardModelConfig, member: int) -> list[tuple[float, np.ndarray]]:
    """Every batch of a member's run: passes over the data once it is done, and the indices of its pairs."""
    generator = np.random.default_rng([config.seed, 0, member])
    batches: list[tuple[float, np.ndarray]] = []
    epoch = 0
    while config.max_steps is not None or epoch < config.epochs:
        order = generator.permutation(count)
        for start in range(0, count, config.batch_size):
            end = min(start + config.batch_size, count)
            batches.append((epoch + end / count, order[start:end]))
            if len(batches) == config.max_steps:
                return batches
        epoch += 1
    return batches


def _train(
    model: PreTrainedModel,
    data: _Data,
    batches: Sequence[tuple[float, np.ndarray]],
    config: RewardModelConfig,
    log: Report,
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    first = {"step": 0.0, "pairs": float(len(data.train)), "skipped": float(data.train.skipped)}
    log(first | {"truncated": float(data.train.truncated)} | _held_out_metrics(model, data, config))
    for step, (epoch, chosen) in enumerate(batches, 1):
        started = time.perf_counter()
        factor = schedule_factor(step - 1, len(batches), config.warmup_steps, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        indices = [int(index) for index in chosen]
        with checkpointed_layers(model) if config.gradient_checkpointing else nullcontext():
            loss, scores = accumulate_gradients(model, data.train, indices, config)
        norm = float(nn.utils.clip_grad_norm_(trained, config.max_gradient_norm or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} at step {step}: lower learning_rate")
        optimizer.step()
        tokens = sum(len(data.train.chosen[i]) + len(data.train.rejected[i]) for i in indices)
        gaps = (scores[0] - scores[1])[~data.train.ties[indices]].numpy()
        metrics = {"step": float(step), "epoch": epoch, "loss": loss, "accuracy": _mean((gaps > 0) + 0.5 * (gaps == 0))}
        metrics |= {"margin": _mean(gaps), "score_mean": float(scores.mean()), "tokens": float(tokens)}
        metrics |= {"learning_rate": config.learning_rate * factor, "gradient_norm": norm}
        metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
        if step == len(batches) or (config.eval_every > 0 and step % config.eval_every == 0):
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


def _describe(data: _Data) -> str:
    text = f"{len(data.train):,} comparisons"
    if data.held_out is not None:
        text += f"; {len(data.held_out):,} held out"
    for count, what in ((data.train.skipped, "skipped as too long"), (data.train.truncated, "cut off")):
        if count:
            text += f"; {count:,} {what}"
    return text


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
    table = Table(title="held-out comparisons", title_justify="left", caption_justify="left")
    table.caption = "ECE: expected calibration error; length: correlation of score with length"
    for name in ("", "pairs", "accuracy", "95 % interval", "margin", "ECE", "length"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rows = {"reward model": trained.evaluation}
    if len(trained.members) > 1:
        rows = {config.combine: trained.evaluation}
        rows |= {MEMBER.format(number): member for number, member in enumerate(trained.members)}
    for name, found in rows.items():
        interval = f"{found.interval[0]:.3f} to {found.interval[1]:.3f}"
        numbers = (f"{found.margin:.3f}", f"{found.calibration_error:.3f}", f"{found.length_correlation:+.3f}")
        table.add_row(name, str(found.pairs), f"{found.accuracy:.3f}", interval, *numbers)
    return table
