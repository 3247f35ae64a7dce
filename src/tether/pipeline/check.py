"""`tether check`: what a run of `tether ppo` would stumble over, in a minute and before it.

Loads what the run would load, draws a few responses, and shows what the reward gets. Nothing is trained, no file is
written.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from tether.devices import check_compiler, choose_device
from tether.episode import short_repr
from tether.errors import UserError, reason
from tether.language.first_ratio import hold_to_first_ratio
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.sampler import Sampler, Samples
from tether.language.world import as_completion, score_samples
from tether.pipeline.checks import Finding, cheap_findings
from tether.pipeline.generate import sample_prompts
from tether.pipeline.opening import aligned, describe_device
from tether.pipeline.ppo import (
    Parts,
    PPOConfig,
    assemble,
    check_rewards,
    load_base,
    load_own_tokenizer,
    load_rewards,
    read_prompts,
)
from tether.pretrained import check_vocabulary
from tether.random_states import seed_random_states
from tether.rewards import Rewards, Scores
from tether.runs import refuse_run

T = TypeVar("T")

PROMPTS = 5  # that responses are drawn to, spread over the data set
RESPONSES = 8  # to each
MOST_TOKENS = 256  # of each
MOST_SHOWN = 60  # tokens of a text that is shown token by token


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        findings: one for each thing that was looked at, in order.
        shown: what the reward got for the first response, line by line; empty where it did not come to that.
    """

    findings: tuple[Finding, ...]
    shown: tuple[str, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What a run would stumble over."""
        return tuple(finding for finding in self.findings if finding.state == "problem")

    def __repr__(self) -> str:
        return f"Checked({len(self.findings)} findings, {len(self.problems)} problems)"


def check(config: PPOConfig, parts: Parts | None = None, show: bool = True) -> Checked:
    """Look at everything that a run of this configuration needs, and go on after a problem as far as that is possible.

    Args:
        config: of the run; its `output` is not made, and nothing in it is touched.
        parts: pieces already in memory, as for `train_ppo`. A model is copied, and left as it is.
        show: print it.
    """
    parts = parts or Parts()
    if parts.model is not None:
        parts = replace(parts, model=copy.deepcopy(parts.model))
    with _no_bytecode():
        looking = _Looking(replace(config, device=choose_device(config.device)), parts)
        looking.everything()
    checked = Checked(tuple(looking.findings), tuple(looking.shown))
    if show:
        lines = aligned([(f"{found.state:<8} {found.about}", found.text) for found in checked.findings])
        print("\n".join([*lines, *(["", *checked.shown] if checked.shown else [])]))
        count = len(checked.problems)
        print("\nnothing is in the way of tether ppo" if not count else f"\n{count} problem{'s' * (count > 1)}")
    return checked


class _Looking:
    """Step after step; each notes what it found, and leaves pieces for the next."""

    def __init__(self, config: PPOConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts
        self.findings: list[Finding] = []
        self.shown: list[str] = []

    def everything(self) -> None:
        config, parts = self.config, self.parts
        seed_random_states(config.seed)
        if not config.overwrite:
            self._passes("output", partial(refuse_run, Path(config.output)))
        if config.compile:
            self._passes("compiler", partial(check_compiler, config.device))
        scorers = self._try("reward", lambda: load_rewards(config, parts))
        tokenizer = self._try("tokenizer", lambda: load_own_tokenizer(config, parts))
        base = self._try("weights", lambda: load_base(config, parts))
        if base is not None:
            self._note("dtype", describe_device(base.parameters(), bool(config.autocast)))
        if tokenizer is None or base is None:
            self._skip("prompts", "first ratio", "scores")
            return
        fits = self._passes("vocabulary", partial(check_vocabulary, base, tokenizer, config.model or "model"))
        if fits:
            rows = base.get_input_embeddings().weight.shape[0]
            self._note("vocabulary", f"{len(tokenizer):,} tokens, and the model embeds {rows:,}")
        task = None if scorers is None else scorers[0]
        prompts = self._try("prompts", lambda: read_prompts(config, parts, task, tokenizer, base))
        if prompts is None:
            self._skip("first ratio", "scores")
            return
        self.findings += cheap_findings(config, tokenizer, base, prompts)
        if scorers is not None:
            _, rewards, gold = scorers
            if self._passes("reward", partial(check_rewards, config, prompts, rewards, gold)):
                held_out = "" if gold is None else f"; held out: {', '.join(gold.functions)}"
                self._note("reward", f"{', '.join(rewards.functions)}{held_out}; it gets the columns it asks for")
        if not fits:
            self._skip("first ratio", "scores")
            return
        # a stand-in where there is no reward: the policy is looked at all the same
        pair = (Rewards(config.reward, _zeros), None) if scorers is None else scorers[1:]
        built = self._try("policy", lambda: assemble(config, parts, base, tokenizer, prompts, pair))
        if built is None:
            self._skip("first ratio", "scores")
            return
        self._responses(built[0].policy, built[0].sampler, prompts, None if scorers is None else scorers[1:])

    def _responses(
        self,
        policy: LanguagePolicy,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        scorers: tuple[Rewards, Rewards | None] | None,
    ) -> None:
        """Draw, compare with the learner, score."""
        few = [prompts[i * len(prompts) // PROMPTS] for i in range(PROMPTS)] if len(prompts) > PROMPTS else [*prompts]
        asked = [prompt for prompt in few for _ in range(RESPONSES)]
        short = replace(sampler.config, max_new_tokens=min(sampler.config.max_new_tokens, MOST_TOKENS))
        drawer = Sampler(policy, sampler.tokenizer, short, self.config.seed)
        samples = self._try("first ratio", lambda: sample_prompts(drawer, asked))
        if samples is None:
            self._skip("scores")
            return
        self._passes("first ratio", partial(self._ratio, policy, drawer, asked, samples))
        if scorers is None:
            self._skip("scores")
            return
        for section, rewards in zip(("scores", "gold"), scorers, strict=True):
            if rewards is None:
                continue
            scores = self._try(section, partial(score_samples, rewards, asked, samples))
            if section == "scores":
                self.shown = _shown(sampler, asked[0], samples, scores)
            if scores is not None:
                self.findings.append(_spread(section, scores))

    def _ratio(self, policy: LanguagePolicy, sampler: Sampler, prompts: Sequence[Prompt], samples: Samples) -> None:
        context, actions = sampler.read_by_learner([prompt.token_ids for prompt in prompts], samples)
        found = hold_to_first_ratio(sampler, prompts, samples, context, actions)
        tokens, ended = int(samples.mask.sum()), int(samples.terminated.sum())
        agree = f"sampler and learner agree within {found.gap:.1e} (at most {found.limit:g} in {policy.numbers})"
        size = f"{tokens:,} tokens of {len(samples.texts)} responses, {ended} of which ended by themselves"
        self._note("first ratio", f"{found.rounded(policy) if found.rounding else agree}; {size}")

    def _passes(self, about: str, step: Callable[[], None]) -> bool:
        """Whether a step finds no problem; one is noted."""
        before = len(self.problems)
        self._try(about, step)
        return len(self.problems) == before

    @property
    def problems(self) -> list[Finding]:
        """Those found so far."""
        return [finding for finding in self.findings if finding.state == "problem"]

    def _try(self, about: str, step: Callable[[], T]) -> T | None:
        """What a step returns; None where it finds a problem, which is noted."""
        try:
            return step()
        except (UserError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
            said = str(error) if isinstance(error, UserError | FloatingPointError) else reason(error)
            self.findings.append(Finding(about, "problem", " ".join(said.split())))
            return None

    def _note(self, about: str, text: str) -> None:
        self.findings.append(Finding(about, "ok", text))

    def _skip(self, *names: str) -> None:
        self.findings += [Finding(name, "skipped", "not looked at: mend what stands above first") for name in names]


def _spread(about: str, scores: Scores) -> Finding:
    low, high = min(scores.total), max(scores.total)
    number = len(scores.total)
    if low == high:
        return Finding(
            about,
            "problem",
            f"all {number} responses score {low:g}: a constant reward teaches nothing; look at what it got below, "
            "grade it, or begin with prompts or a model for which some responses are right",
        )
    mean = sum(scores.total) / number
    return Finding(about, "ok", f"{number} responses score from {low:g} to {high:g}, {mean:.3g} on average")


def _shown(sampler: Sampler, prompt: Prompt, samples: Samples, scores: Scores | None) -> list[str]:
    """The first prompt and its first response, as the reward got them and token by token."""
    tokenizer = sampler.tokenizer
    said = "no score" if scores is None else f"{scores.total[0]:g}"
    if scores is not None and len(scores.parts) > 1:
        said += f" ({', '.join(f'{name} {part[0]:g}' for name, part in scores.parts.items())})"
    columns = ", ".join(f"{name}={short_repr(value)}" for name, value in prompt.columns.items())
    ids = samples.response_ids[0]
    return [
        f"what the reward gets, of the first of {len(samples.texts)} responses ({prompt.place}):",
        *aligned(
            [
                ("  prompt", repr(prompt.source)),
                ("  completion", repr(as_completion(prompt, samples.texts[0]))),
                ("  columns", columns),
                ("  prompt's tokens", _tokens(tokenizer, prompt.token_ids)),
                ("  completion's tokens", _tokens(tokenizer, ids)),
                ("  score", said),
            ]
        ),
    ]


def _tokens(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Number and name of each in the vocabulary, which tells spaces and bytes apart where text would not."""
    names = tokenizer.convert_ids_to_tokens(list(token_ids[:MOST_SHOWN]))
    more = f" … {len(token_ids) - MOST_SHOWN} more" if len(token_ids) > MOST_SHOWN else ""
    return " ".join(f"{i}:{name}" for i, name in zip(token_ids, names, strict=False)) + more


def _zeros(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """A reward's file is imported without leaving a __pycache__ beside it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


__all__ = ["Checked", "check"]
