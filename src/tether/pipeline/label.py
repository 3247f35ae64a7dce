"""`tether label`: pairs of answers for people to compare, and what they said as a file that `tether reward` reads.

Knows policies, the sampler, an ensemble of reward models and the store of labels; nothing of the page.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from tether.config import config_to_dict
from tether.errors import UserError
from tether.language.prompts import Prompt, PromptsConfig, load_prompts
from tether.language.sampler import Sampler, SamplingConfig
from tether.pipeline.generate import Response, check_output, load_sampler, open_rows, sample_responses, write_row
from tether.pipeline.opening import count
from tether.pipeline.progress import Tally
from tether.pretrained import context_length
from tether.rewards.models import RewardModel
from tether.runs.labels import LABELS_SUFFIX, LabelSet, NewPair, count_answers, create_labels
from tether.uncertainty import share

logger = logging.getLogger("tether")

ROUNDS = 8  # of drawing anew where two answers are the same
POOL = 4  # pairs drawn for each that an ensemble keeps


@dataclass(frozen=True)
class LabelConfig:
    """Pairs of answers for people to compare."""

    policy: str = ""
    """Folder or hub name of the policy, such as the `policy/` of a checkpoint."""
    against: str | None = None
    """Folder or hub name of the policy that it is compared with. None: both answers are of the first."""
    pairs: int = 100
    """Pairs in the set. Prompts are taken in a random order, all of them before one comes again."""
    output: str = ""
    """File for the pairs and their labels, `NAME.labels.db`; with `export` that for the preferences, `NAME.jsonl`."""
    export: str | None = None
    """A set of pairs that were judged: write its preferences to `output`, and sample nothing."""
    judge: str | None = None
    """Folder of an ensemble of reward models: of `pool` pairs those are kept on whose preference its members disagree
    most. None: all pairs are kept."""
    pool: int | None = None
    """Pairs that are sampled for the ensemble to choose from. None: 4 times `pairs`."""
    open: bool = True
    """Open the page when the pairs are there."""
    port: int = 8555
    """Port of the page; 0 takes any free one."""
    overwrite: bool = False
    """Replace a file that is already there; a set that holds answers is never replaced."""
    seed: int = 0
    """Of the sampler, and of the order of prompts."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models' parameters."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}, expected 1 or more")
        if self.pool is not None and self.judge is None:
            raise ValueError("pool is what an ensemble chooses from: name one by judge")
        if self.pool is not None and self.pool < self.pairs:
            raise ValueError(f"pool is {self.pool}, expected pairs ({self.pairs}) or more")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^62")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")


def label(config: LabelConfig) -> Path:
    """Sample the pairs and write them to `output`, or export what was said of them; returns the file.

    Raises:
        UserError: names the folder, file, row or field that cannot be used.
    """
    if config.export is not None:
        return _export(config, Path(config.export))
    file = _new_set(config)
    pairs = sample_pairs(config)
    about = {"name": file.name.removesuffix(LABELS_SUFFIX), "settings": config_to_dict(config)}
    create_labels(file, about, pairs)
    Console(highlight=False, soft_wrap=True).print(f"{len(pairs)} pairs: {file}", markup=False)
    return file


def sample_pairs(config: LabelConfig) -> list[NewPair]:
    """Pairs of different answers, as many as there shall be; fewer, with a warning, where answers are mostly alike."""
    if not config.policy:
        raise UserError("no policy given: name a folder with a model by --policy")
    if not config.prompts.path:
        raise UserError("no prompts given: name a file by --prompts.path")
    judge = None if config.judge is None else _ensemble(config, config.judge)
    samplers = [_sampler(config, config.policy, config.seed)]
    if config.against is not None:
        samplers.append(_sampler(config, config.against, config.seed + 1))
    wanted = config.pairs if judge is None else config.pool or POOL * config.pairs
    logger.info("sampling %s of up to %s", count(wanted, "pair"), count(config.sampling.max_new_tokens, "token"))
    tally = Tally(wanted, "pairs")
    pairs: list[NewPair] = []
    prompts = _prompts(config, samplers)
    for _ in range(ROUNDS):
        drawn = _answers(samplers, list(itertools.islice(prompts, wanted - len(pairs))))
        for pair in drawn:
            if pair.a != pair.b:
                pairs.append(pair)
                tally.update(len(pairs))
        if len(pairs) == wanted:
            break
    if not pairs:
        raise UserError("the two answers to every prompt are the same: raise --sampling.temperature, or name --against")
    if len(pairs) < wanted:
        logger.warning("only %d of %d pairs: most answers to a prompt are the same", len(pairs), wanted)
    return pairs if judge is None else most_disputed(judge, pairs, config.pairs)


def most_disputed(judge: RewardModel, pairs: Sequence[NewPair], count: int) -> list[NewPair]:
    """The pairs on which an ensemble disagrees most, the most disputed first.

    Disagreement is the standard deviation over members of σ(r(a) − r(b)), what each predicts as the probability that
    a is preferred (Christiano et al. 2017, section 2.2.4).
    """
    prompts = [pair.prompt for pair in pairs] * 2
    names = [f"pair {index}" for index in range(1, len(pairs) + 1)] * 2
    scores = judge.raw(prompts, [*(pair.a for pair in pairs), *(pair.b for pair in pairs)], names)  # (K, 2n)
    first, second = scores.double().chunk(2, dim=1)
    spread = torch.sigmoid(first - second).std(dim=0, correction=0).tolist()
    order = sorted(range(len(pairs)), key=lambda index: (-spread[index], index))[:count]
    return [replace(pairs[i], disagreement=spread[i]) for i in order]


def _answers(samplers: Sequence[Sampler], chosen: Sequence[Sequence[Prompt]]) -> Iterator[NewPair]:
    """One pair for each prompt; a prompt is given once per sampler, in its own tokens."""
    if len(samplers) == 1:
        for group in sample_responses(samplers[0], [prompts[0] for prompts in chosen], 2):
            for a, b in zip(group[::2], group[1::2], strict=True):
                yield _pair(a, b)
        return
    sides = [
        itertools.chain.from_iterable(sample_responses(sampler, [prompts[side] for prompts in chosen], 1))
        for side, sampler in enumerate(samplers)
    ]
    for a, b in zip(*sides, strict=True):
        yield _pair(a, b)


def _pair(a: Response, b: Response) -> NewPair:
    prompt = a.prompt
    return NewPair(prompt.source, a.text, b.text, text=None if isinstance(prompt.source, str) else prompt.text)


def _prompts(config: LabelConfig, samplers: Sequence[Sampler]) -> Iterator[list[Prompt]]:
    """Rows that every policy can read, in a random order, without end."""
    by_row: list[dict[int, Prompt]] = []
    for sampler in samplers:
        room = context_length(sampler.policy.model), config.sampling.max_new_tokens
        by_row.append({prompt.row: prompt for prompt in load_prompts(config.prompts, sampler.tokenizer, *room)})
    rows = sorted(set.intersection(*(set(prompts) for prompts in by_row)))
    if not rows:
        raise UserError(f"{config.prompts.path}: no prompt is short enough for both policies")
    if any(getattr(by_row[0][row].source, "variables", None) for row in rows):
        logger.warning(
            "%s: the policies read tools or variables beside the messages, which the preferences will not hold: join "
            "them to the exported rows before `tether reward`",
            config.prompts.path,
        )
    random.Random(config.seed).shuffle(rows)
    return ([prompts[row] for prompts in by_row] for row in itertools.cycle(rows))


def _sampler(config: LabelConfig, model: str, seed: int) -> Sampler:
    return load_sampler(model, config.sampling, seed, config.device, config.dtype, config.trust_remote_code)


def _ensemble(config: LabelConfig, path: str) -> RewardModel:
    judge = RewardModel(
        path, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code, normalise=False
    )
    if len(judge.members) < 2:
        raise UserError(
            f"judge {path}: one model, which cannot disagree with itself; expected several: tether reward --members 4"
        )
    return judge


def _new_set(config: LabelConfig) -> Path:
    """Where the set goes, asked before anything is computed."""
    if not config.output.endswith(LABELS_SUFFIX):
        raise UserError(f"output: found {config.output!r}, expected a file NAME{LABELS_SUFFIX}")
    file = Path(config.output)
    check_output(config.output, config.overwrite)
    if file.exists():
        with LabelSet(file, writable=True) as labels:  # reading alone would leave SQLite's own files behind
            count = len(labels.answers())
        if count:
            raise UserError(f"{file}: holds {count} answers, which nothing brings back: move it away, or name another")
    return file


def _export(config: LabelConfig, file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"export: {file}: no such file, expected one that `tether label` wrote")
    if not config.output.endswith(".jsonl"):
        raise UserError(f"output: found {config.output!r}, expected a file NAME.jsonl")
    with LabelSet(file, writable=True) as labels:
        answers = labels.answers()
        rows = list(labels.preferences())
        if not rows:
            raise UserError(f"{file}: no preference among {len(answers)} answers; answer some in: tether studio RUNS")
        with open_rows(config.output, config.overwrite) as stream:
            assert stream is not None  # there is an output
            for row in rows:
                write_row(stream, row)
        _tell(labels.about, count_answers(answers), len(rows), config.output)
    return Path(config.output)


def _tell(about: dict[str, Any], counts: dict[str, int], rows: int, output: str) -> None:
    settings = about.get("settings")
    policies = settings if isinstance(settings, dict) else {}
    first, second = policies.get("policy"), policies.get("against") or "the same, drawn again"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"A, {first}: preferred {counts['a']} times", markup=False)
    console.print(f"B, {second}: preferred {counts['b']} times; {counts['tie']} ties", markup=False)
    if decided := counts["a"] + counts["b"]:
        console.print(f"A is preferred in {share(counts['a'], decided)} of the pairs without a tie", markup=False)
    console.print(f"left out: {counts['both_bad']} where both are bad, {counts['skip']} skipped", markup=False)
    console.print(f"{rows} preferences: {output}", markup=False)
