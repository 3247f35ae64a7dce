"""`tether eval`: how well a policy does on prompts with a reward: mean score and pass@k, with their uncertainty.

Uncertainty is that of the prompts: several responses to one prompt are not independent, so each prompt counts once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tether.config import config_to_dict
from tether.errors import RewardError, UserError
from tether.language.prompts import PromptsConfig, load_prompts, prompts_from_rows
from tether.language.sampler import SamplingConfig
from tether.language.world import as_completion
from tether.pipeline.generate import (
    Response,
    check_output,
    load_sampler,
    open_rows,
    sample_responses,
    tell_size,
    write_row,
)
from tether.pipeline.opening import count
from tether.pretrained import context_length
from tether.rewards import Rewards, RewardsConfig, Scores
from tether.rewards.tasks import ProblemsConfig, Task
from tether.uncertainty import NORMAL_95, percent, rounded, wilson, with_error


@dataclass(frozen=True)
class EvalConfig:
    """Mean score and pass@k of a policy on prompts with a reward."""

    model: str = ""
    """Folder or hub name of the policy, such as the `policy/` of a checkpoint."""
    task: str = ""
    """Prompts and verifier in one: `reasoning_gym:NAME`. Held-out problems are those of another `problems.seed` than
    training had. Takes the place of `prompts.path`."""
    samples: int = 1
    """Responses to each prompt. pass@k needs at least k, and is the more exact the more there are."""
    k: tuple[int, ...] = ()
    """The k of pass@k, at most `samples` each. None given: 1, 2, 4, … up to `samples`."""
    threshold: float = 0.0
    """A response is correct if its score is above this."""
    output: str | None = None
    """JSON file for the result, the result of each prompt and the configuration."""
    responses: str | None = None
    """JSONL file for every response with its score."""
    overwrite: bool = False
    """Replace files that are already there."""
    seed: int = 0
    """Of the sampler."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's parameters."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: RewardsConfig = field(default_factory=RewardsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}, expected 1 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        if self.task and self.prompts.path:
            raise ValueError("task and prompts.path are both set, but a task brings its own prompts: drop one")
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise ValueError(f"k holds {k}, expected 1 to samples ({self.samples}): raise samples or lower k")
        if self.sampling.temperature == 0 and self.samples > 1:
            raise ValueError(f"sampling.temperature is 0, so all {self.samples} samples are the same: set samples to 1")
        if self.output is not None and self.output == self.responses:
            raise ValueError(f"output and responses are both {self.output}: name two files")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}, expected a finite number")


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        standard_error: s/√n; None where fewer than two prompts have a value.
        interval: 95 % confidence interval. Of a share that of Wilson (1927); otherwise the normal approximation, which
            is rough below some 30 prompts. None where the values do not tell: a single one, or all alike.
    """

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        score: of a response.
        parts: of each reward function by name, before its weight, where there are several.
        pass_at: for each k, the probability that the best of k responses is correct.
        terminated: share of responses that ended by themselves.
        response_tokens: length, eos included.
        per_prompt: for each prompt its row, mean score and number of correct responses.
    """

    prompts: int
    samples: int
    score: Estimate
    parts: dict[str, Estimate]
    pass_at: dict[int, Estimate]
    terminated: Estimate
    response_tokens: Estimate
    per_prompt: list[dict[str, Any]] = field(repr=False)


def evaluate(config: EvalConfig, show: bool = True) -> EvalResult:
    """Sample, score and sum up; prints a table unless `show` is False.

    Raises:
        UserError: names the folder, file, row or field that cannot be used.
        RewardError: a reward function failed; what was sampled is in `config.responses`, null for missing scores.
    """
    task = Task(config.task, config.problems) if config.task else None
    rewards = Rewards(config.reward, first=task)
    if task is None and not config.prompts.path:
        raise UserError("no prompts given: name a file with --prompts.path, or a task with --task")
    for path in (config.output, config.responses):
        if path is not None:
            check_output(path, config.overwrite)
    sampler = load_sampler(
        config.model, config.sampling, config.seed, config.device, config.dtype, config.trust_remote_code
    )
    room = (context_length(sampler.policy.model), config.sampling.max_new_tokens)
    if task is not None:
        prompts = prompts_from_rows(task.rows, config.prompts, sampler.tokenizer, *room)
    else:
        prompts = load_prompts(config.prompts, sampler.tokenizer, *room)
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
    places = [f"{config.prompts.path or config.task}, row {prompt.row}" for prompt in prompts]
    rewards.check(columns, [prompt.source for prompt in prompts], places)
    console = Console(highlight=False)
    tally = tell_size(len(prompts), config.samples, config.sampling)
    bar_wanted = show and console.is_terminal
    with Progress(console=console, transient=True, disable=not bar_wanted) as progress:
        bar = progress.add_task("prompts", total=len(prompts))
        groups: list[tuple[list[Response], Scores]] = []
        with open_rows(config.responses, config.overwrite) as file:
            for responses in sample_responses(sampler, prompts, config.samples):
                try:
                    scores = score_responses(rewards, responses)
                except RewardError:
                    if file is not None:
                        for response in responses:
                            write_row(file, response.as_row() | {"score": None})
                    raise
                groups.append((responses, scores))
                if file is not None:
                    for response, score in zip(responses, scores.total, strict=True):
                        write_row(file, response.as_row() | {"score": score})
                done = sum(len(own) for own, _ in groups) // config.samples
                progress.update(bar, completed=done)
                if not bar_wanted:
                    tally.update(done)
    result = summarise(groups, config)
    if config.output is not None:
        _write(config, result)
    if show:
        size = f"{count(result.prompts, 'prompt')} × {count(config.samples, 'response')}"
        about = f"{size}; ± standard error over prompts; correct: score above {config.threshold:g}"
        console.print(config.model, about, sep="\n", markup=False, soft_wrap=True)
        console.print(_table(result))
    return result


def score_responses(rewards: Rewards, responses: Sequence[Response]) -> Scores:
    """The scores of responses, each reward called as it is in training."""
    names = responses[0].prompt.columns
    return rewards(
        [response.prompt.source for response in responses],
        [as_completion(response.prompt, response.text) for response in responses],
        [response.token_ids for response in responses],
        {name: [response.prompt.columns[name] for response in responses] for name in names},
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k responses is correct, given `correct` of `samples`.

    1 − C(n − c, k) / C(n, k) (Chen et al. 2021, equation 1); binomials are exact integers.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values, one per prompt."""
    mean = math.fsum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return Estimate(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    error = math.sqrt(variance / len(values))
    return Estimate(mean, error, (mean - NORMAL_95 * error, mean + NORMAL_95 * error) if error else None)


def estimate_share(values: Sequence[float], samples: int) -> Estimate:
    """The same of values between 0 and 1, each from `samples` responses to a prompt, with an interval that stays there.

    Wilson's interval, with the number of independent responses that would have the same variance (Korn and Graubard
    1998): as many as prompts where each is all right or all wrong, more where prompts are alike, at most all responses.
    """
    found, n = estimate(values), len(values)
    variance = math.fsum((value - found.mean) ** 2 for value in values) / n
    largest = found.mean * (1 - found.mean)  # the variance where each prompt is all right or all wrong
    effective = min(n * samples, n * largest / variance) if variance else n * samples if largest else n
    return replace(found, interval=wilson(effective * found.mean, effective))


def summarise(groups: Sequence[tuple[list[Response], Scores]], config: EvalConfig) -> EvalResult:
    """Responses come prompt by prompt, `config.samples` to each."""
    n = config.samples
    responses = [response for group, _ in groups for response in group]
    by_prompt = _chunks([score for _, scores in groups for score in scores.total], n)
    correct = [sum(score > config.threshold for score in scores) for scores in by_prompt]
    names = list(groups[0][1].parts)
    parts = {}
    for name in names if len(names) > 1 else []:
        chunks = _chunks([score for _, scores in groups for score in scores.parts[name]], n)
        applying = [[score for score in chunk if not math.isnan(score)] for chunk in chunks]
        parts[name] = estimate([_mean(chunk) for chunk in applying if chunk])
    ks = config.k or tuple(2**i for i in range(n.bit_length()) if 2**i <= n)
    per_prompt = [
        {"row": responses[i * n].prompt.row, "score": _mean(scores), "correct": correct[i]}
        for i, scores in enumerate(by_prompt)
    ]
    return EvalResult(
        prompts=len(by_prompt),
        samples=n,
        score=estimate([_mean(scores) for scores in by_prompt]),
        parts=parts,
        pass_at={k: estimate_share([pass_at_k(n, c, k) for c in correct], n) for k in ks},
        terminated=estimate_share([_mean(ended) for ended in _chunks([r.terminated for r in responses], n)], n),
        response_tokens=estimate([_mean(own) for own in _chunks([len(r.token_ids) for r in responses], n)]),
        per_prompt=per_prompt,
    )


def _chunks(values: Sequence[float], size: int) -> list[list[float]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _write(config: EvalConfig, result: EvalResult) -> None:
    assert config.output is not None
    data = {"result": asdict(result), "config": config_to_dict(config)}
    try:
        Path(config.output).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{config.output}: cannot be written: {error.strerror}") from error


def _table(result: EvalResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "mean", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right", header_style="dim", overflow="fold")
    for name, value in ({"score": result.score} | {f"  {name}": part for name, part in result.parts.items()}).items():
        interval = "-" if value.interval is None else _between(value.interval, value.standard_error)
        table.add_row(name, with_error(value.mean, value.standard_error), interval)
    for name, value in ({f"pass@{k}": v for k, v in result.pass_at.items()} | {"ended": result.terminated}).items():
        assert value.interval is not None  # a share always has one
        shown, _, interval = percent(value.mean, value.interval).partition(" ")
        table.add_row(name, shown, interval.strip("()"))
    table.add_row("tokens", with_error(result.response_tokens.mean, result.response_tokens.standard_error), "")
    return table


def _between(interval: tuple[float, float], error: float | None) -> str:
    return f"{rounded(interval[0], error)} to {rounded(interval[1], error)}"
