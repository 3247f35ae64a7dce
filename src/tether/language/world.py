"""The world of text: prompts → responses → scores → `Trajectories`.

The state is the prompt and the tokens so far, the action is the next token, and the world does nothing but append it;
so a whole batch of episodes is collected by sampling. It knows nothing of how trajectories are learned from.
N = episodes, T = response tokens of the longest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.chat import said
from tether.episode import Episode
from tether.errors import RewardError, UserError
from tether.language.adapters import save_model
from tether.language.context import TokenContext
from tether.language.divergence import compare
from tether.language.diversity import distinct_share, repeated_ngrams
from tether.language.draws import Draw, join_draws, telling_groups
from tether.language.first_ratio import hold_to_first_ratio
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Messages, Prompt
from tether.language.reference import Reference
from tether.language.sampler import NotANumberError, Sampler, Samples
from tether.memory import PeakMemory
from tether.positions import settle_positions
from tether.ppo import KLController, LastSeen, Trajectories
from tether.ppo.advantages import scale_and_clip
from tether.ppo.kl import estimate_kl, penalised_rewards
from tether.ppo.trajectories import last_step
from tether.rewards import Rewards, Scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectConfig:
    """What one iteration collects, and how a score becomes rewards."""

    prompts: int = 32
    """Prompts per iteration."""
    samples_per_prompt: int = 1
    """Responses to each prompt; the group baselines need at least 2."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that the length limit cut off."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which `overlong_penalty` grows in a straight line, from nothing. 0: no such
    penalty (L_cache of DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13; L_max is `max_new_tokens`)."""
    overlong_penalty: float = 0.0
    """Subtracted from the score of a response as long as the limit. DAPO takes 1, for scores of 1 and −1."""
    score_scale: float = 1.0
    """Scores are multiplied by this before they become rewards."""
    score_clip: float | None = None
    """Scores, after scaling, are clipped to ± this."""
    bootstrap_truncated: bool = False
    """Take V of the state after the last token as the future of a truncated response, instead of 0."""
    filter_prompts: bool = False
    """Train on prompts whose responses differ in their scores: draw further prompts in place of the others ("dynamic
    sampling" of DAPO). Needs at least 2 responses to each."""
    kl_responses: int = 64
    """Responses of each iteration, spread evenly over it, at whose states KL(π‖π_ref) is summed over the whole
    vocabulary, for the metric `kl`. It costs about as much as the reference does, and memory for a state per token."""
    max_draws: int = 10
    """With `filter_prompts`: how often to draw for one batch; if prompts are still missing then, ones whose responses
    all score alike fill it."""

    def __post_init__(self) -> None:
        for name in ("prompts", "samples_per_prompt", "kl_responses", "max_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("missing_eos_penalty", "overlong_penalty", "score_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number")
        if self.score_clip is not None and not self.score_clip > 0:
            raise ValueError(f"score_clip is {self.score_clip}, expected a number above 0, or none")
        if self.overlong_buffer < 0:
            raise ValueError(f"overlong_buffer is {self.overlong_buffer}, expected 0 or more tokens")
        if bool(self.overlong_buffer) != bool(self.overlong_penalty):
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer} and overlong_penalty {self.overlong_penalty}: "
                "expected both or neither"
            )
        if self.filter_prompts and self.samples_per_prompt < 2:
            raise ValueError(
                "filter_prompts compares responses to the same prompt; "
                f"samples_per_prompt is {self.samples_per_prompt}, expected at least 2"
            )


@dataclass(frozen=True)
class _Batch:
    """What the last `collect` saw, for people and metrics."""

    prompts: list[Prompt]
    samples: Samples
    scores: Scores
    clock: _Clock
    drawn: Draw  # with what filtering left out
    draws: int
    gold: Scores | None


class LanguageWorld:
    """Collects trajectories of a language policy.

    Args:
        policy: the policy that is trained; the sampler draws from it.
        reference: what the KL is measured against; it is told of every iteration of the policy.
        sampler: draws responses.
        prompts: where episodes start; they are visited in an order shuffled anew in each pass.
        rewards: scores responses.
        gold: scores them too, for people to compare; never trained on. None: nothing does.
        kl: holds β; the penalty is part of the reward unless its configuration places it in the loss.
        config: see `CollectConfig`.
        seed: of the order of prompts.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        reference: Reference,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        kl: KLController,
        config: CollectConfig | None = None,
        seed: int = 0,
        gold: Rewards | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts to collect from")
        if sampler.config.temperature == 0:
            raise ValueError("temperature is 0: PPO learns from sampled tokens, set a temperature above 0")
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampler.config.max_new_tokens
        settle_positions([*policy.models(), reference.reader.model], longest)
        config = config or CollectConfig()
        if config.overlong_buffer > sampler.config.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {config.overlong_buffer}, "
                f"expected at most max_new_tokens, {sampler.config.max_new_tokens}"
            )
        self.policy = policy
        self.reference = reference
        self.sampler = sampler
        self.prompts = prompts
        self.rewards = rewards
        self.gold = gold
        self.kl = kl
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []  # prompts still to be visited in this pass
        self._batch: _Batch | None = None
        self._follow_due = False  # the policy may have learned since the reference was told last
        self._has_learned = False  # the policy may have, since the first batch was collected
        self._first_length: float | None = None  # mean response length of the first batch

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The sampler's, which is the policy's."""
        return self.sampler.tokenizer

    def collect(self) -> Trajectories:
        """One batch of episodes: `prompts` × `samples_per_prompt` responses, scored and compared to the reference.

        Raises:
            RewardError: a reward function failed; all that was sampled for this batch is attached as `error.responses`.
        """
        if self._follow_due:
            self.reference.follow(self.policy)
            self._follow_due = False
        clock = _Clock(self.policy.device)
        config, size = self.config, self.config.samples_per_prompt
        draws = [self._draw(config.prompts, [], clock)]
        if config.filter_prompts:
            missing = sum(draws[0].alike(size))
            while missing and len(draws) < config.max_draws:
                draws.append(self._draw(missing, draws, clock))
                missing = sum(draws[-1].alike(size))
        drawn = join_draws(draws)
        kept = telling_groups(drawn, size, config.prompts) if config.filter_prompts else drawn
        gold = None
        if self.gold is not None:
            gold = self._score(self.gold, kept.prompts, kept.samples, [])
            clock.lap("gold")
        trajectories = self._trajectories(
            kept.prompts, kept.samples, torch.tensor(kept.scores.total, dtype=torch.float32)
        )
        clock.lap("reference")
        self._batch = _Batch(kept.prompts, kept.samples, kept.scores, clock, drawn, len(draws), gold)
        self._follow_due = self._has_learned = True
        return trajectories

    def _fault(self, message: str) -> Exception:
        """What is wrong with the model as it was brought, or as it has become."""
        if not self._has_learned:
            return UserError(message)
        return FloatingPointError(f"{message}; the run has diverged: lower learner.learning_rate")

    def _check_first_ratio(
        self, prompts: list[Prompt], samples: Samples, context: TokenContext, actions: Tensor
    ) -> None:
        """UserError where the learner reads the first batch otherwise than the sampler drew it."""
        found = hold_to_first_ratio(self.sampler, prompts, samples, context, actions)
        if found.rounding:
            logger.info("the first ratio: %s", found.rounded(self.policy))

    def _draw(self, prompts: int, before: list[Draw], clock: _Clock) -> Draw:
        """Scored responses to the next `prompts` prompts; `before` was drawn for the same batch."""
        chosen = [self.prompts[i] for i in self._next_prompts(prompts) for _ in range(self.config.samples_per_prompt)]
        try:
            samples = self.sampler.sample([p.token_ids for p in chosen], True)  # with alternatives
        except NotANumberError as error:
            raise self._fault(f"{chosen[error.index].place}: {error}") from error
        clock.lap("sampling")
        scores = self._score(self.rewards, chosen, samples, before)
        clock.lap("scoring")
        return Draw(chosen, samples, scores)

    def begin_pass(self) -> None:
        """Leave what is left of this pass over the prompts, and shuffle them anew."""
        self._queue = []

    def _next_prompts(self, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            if not self._queue:
                self._queue = torch.randperm(len(self.prompts), generator=self.generator).tolist()
            wanted = count - len(indices)
            indices += self._queue[:wanted]
            self._queue = self._queue[wanted:]
        return indices

    def _score(self, rewards: Rewards, prompts: list[Prompt], samples: Samples, before: list[Draw]) -> Scores:
        try:
            return score_samples(rewards, prompts, samples)
        except RewardError as error:
            error.responses = [  # type: ignore[attr-defined]
                {"prompt": p.text, "response": t, "score": s}
                for draw in before
                for p, t, s in zip(draw.prompts, draw.samples.texts, draw.scores.total, strict=True)
            ] + [{"prompt": p.text, "response": t} for p, t in zip(prompts, samples.texts, strict=True)]
            raise

    def _trajectories(self, prompts: list[Prompt], samples: Samples, scores: Tensor) -> Trajectories:
        device = self.policy.device
        config, mask = self.config, samples.mask.to(device)
        context, actions = self.sampler.read_by_learner([p.token_ids for p in prompts], samples)
        log_probs, values = samples.log_probs.to(device), samples.values.to(device)
        compared = torch.arange(count := min(config.kl_responses, len(mask)), device=device) * len(mask) // count
        with self.policy.precision():
            reference, kl = compare(self.policy.reader, self.reference, context, actions, mask, compared)
        if bool((broken := (reference.isnan() & mask).any(dim=1)).any()):
            where = prompts[int(broken.nonzero()[0])].place
            raise UserError(
                f"{where}: the log-probabilities of the reference are NaN: look at its weights, or take dtype float32"
            )
        if bool(kl[compared][mask[compared]].isnan().any()):
            raise self._fault(f"the KL to the reference is NaN in {self.policy.numbers}: take dtype float32")
        if not self._has_learned:
            self._check_first_ratio(prompts, samples, context, actions)
        shaped = scale_and_clip(scores, config.score_scale, config.score_clip)
        shaped = shaped - config.missing_eos_penalty * ~samples.terminated
        if config.overlong_buffer:
            shaped = shaped - config.overlong_penalty * self._overlong(samples)
        shaped = shaped.to(device)
        beta = self.kl.beta if self.kl.config.placement == "reward" else 0.0
        at_end = torch.arange(mask.shape[1], device=device) == last_step(mask)[:, None]
        terminated = at_end & samples.terminated.to(device)[:, None]
        truncated = at_end & ~terminated
        bootstrap = torch.zeros_like(values)
        if config.bootstrap_truncated:
            successor = self.policy.successor_values(context, mask.sum(dim=1))
            bootstrap = truncated * successor[:, None]
        groups = torch.arange(len(prompts), device=device) // config.samples_per_prompt
        return Trajectories(
            actions=actions,
            log_probs=log_probs,
            values=values,
            rewards=penalised_rewards(shaped, log_probs, reference, mask, beta),
            mask=mask,
            terminated=terminated,
            truncated=truncated,
            bootstrap_values=bootstrap,
            context=context,
            reference_log_probs=reference,
            kl_to_reference=kl,
            groups=groups,
        )

    def _overlong(self, samples: Samples) -> Tensor:
        """(N,) how much of the buffer before the length limit each response fills: 0 up to it, 1 at the limit."""
        buffer = self.config.overlong_buffer
        beyond = samples.mask.sum(dim=1) - (self.sampler.config.max_new_tokens - buffer)
        return beyond.clamp(min=0) / buffer

    def metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """Of the batch that `collect` returned last: scores, KL to the reference, lengths, variety, seconds, MiB."""
        batch = self._last_batch(trajectories)
        total = torch.tensor(batch.scores.total, dtype=torch.float64)
        mask, lengths = trajectories.mask, trajectories.mask.sum(dim=1).double()
        assert trajectories.reference_log_probs is not None
        assert trajectories.groups is not None
        k1 = (estimate_kl(trajectories.log_probs, trajectories.reference_log_probs, "k1") * mask).sum(dim=1).double()
        tokens = float(lengths.sum())
        metrics = {
            "score": float(total.mean()),
            "score_std": float(total.std(correction=0)),
            "reward": float((trajectories.rewards * mask).sum(dim=1).mean()),
            **_kl_metrics(trajectories),
            **_mean("kl_k1", k1, trajectories.groups),
            "response_length": float(lengths.mean()),
            "response_length_max": float(lengths.max()),
            "eos_share": float(batch.samples.terminated.double().mean()),
        }
        if self._first_length is None:
            self._first_length = metrics["response_length"]
        metrics |= {
            "length_ratio": metrics["response_length"] / self._first_length,
            "sampled_entropy": -float((trajectories.log_probs * mask).sum()) / tokens,
            "distinct_responses": distinct_share([tuple(ids) for ids in batch.samples.response_ids]),
            "repeated_ngrams": repeated_ngrams(batch.samples.response_ids),
        }
        if batch.gold is not None:
            gold = torch.tensor(batch.gold.total, dtype=torch.float64)
            metrics |= {"gold": float(gold.mean()), "gold_std": float(gold.std(correction=0))}
        for kind, scores in (("score", batch.scores), ("gold", batch.gold)):
            if scores is not None and len(scores.parts) > 1:
                metrics |= {f"{kind}/{name}": sum(part) / len(part) for name, part in scores.parts.items()}
        metrics |= {"tokens": tokens, "episodes": float(len(lengths))}
        metrics |= self._filtering(batch)
        metrics |= {f"time/{phase}": seconds for phase, seconds in batch.clock.seconds.items()}
        metrics["time/tokens_per_second_sampled"] = batch.drawn.tokens / batch.clock.seconds["sampling"]
        return metrics | {f"memory/{phase}": peak for phase, peak in batch.clock.peaks.items()}

    def _filtering(self, batch: _Batch) -> dict[str, float]:
        """What was drawn and left out; empty unless prompts are filtered."""
        if not self.config.filter_prompts:
            return {}
        alike = batch.drawn.alike(self.config.samples_per_prompt)
        return {
            "filtered_share": sum(alike) / len(alike),
            "signal_share": (len(alike) - sum(alike)) / self.config.prompts,
            "draws": float(batch.draws),
            "score_drawn": sum(batch.drawn.scores.total) / len(batch.drawn.scores.total),
        }

    def episodes(
        self, trajectories: Trajectories, advantages: Tensor, returns: Tensor, last_seen: LastSeen | None = None
    ) -> list[Episode]:
        """The batch that `collect` returned last as episodes for people and for storage."""
        batch = self._last_batch(trajectories)
        assert trajectories.reference_log_probs is not None
        names = ("log_probs", "values", "rewards", "reference_log_probs")
        columns = {name: getattr(trajectories, name).tolist() for name in names}
        columns |= {"advantages": advantages.tolist(), "returns": returns.tolist()}
        if last_seen is not None:
            columns |= {"new_log_probs": last_seen.log_probs.tolist(), "entropies": last_seen.entropy.tolist()}
            columns["clipped"] = last_seen.clipped.tolist()
        pieces = self.sampler.texts.pieces(batch.samples.response_ids)
        if batch.samples.likeliest is not None:
            columns["alternatives"] = self._alternatives(batch.samples, pieces)
        episodes = []
        for row, (prompt, response_ids) in enumerate(zip(batch.prompts, batch.samples.response_ids, strict=True)):
            length = len(response_ids)
            terminated = bool(batch.samples.terminated[row])
            episodes.append(
                Episode(
                    prompt=prompt.text,
                    response=batch.samples.texts[row],
                    score=batch.scores.total[row],
                    terminated=terminated,
                    truncated=not terminated,
                    actions=pieces[row],
                    action_ids=response_ids,
                    **{name: values[row][:length] for name, values in columns.items()},
                    details={
                        "group": row // self.config.samples_per_prompt,
                        "row": prompt.row,
                        "scores": {name: part[row] for name, part in batch.scores.parts.items()},
                        **({} if batch.gold is None else {"gold": batch.gold.total[row]}),
                        **({} if isinstance(prompt.source, str) else {"messages": turns_of(prompt.source)}),
                    },
                )
            )
        return episodes

    def _alternatives(self, samples: Samples, pieces: list[list[str]]) -> list[list[list[tuple[str, float]]]]:
        """(text, probability) of the likeliest tokens, for each response and step; the drawn one as in `pieces`."""
        assert samples.likeliest is not None
        assert samples.likeliest_probabilities is not None
        ids, numbers = samples.likeliest.tolist(), samples.likeliest_probabilities.tolist()
        texts = self.sampler.texts.of_tokens(samples.likeliest.unique().tolist())
        return [
            [
                [(piece if i == drawn else texts[i], p) for i, p in zip(step_ids, step_numbers, strict=True) if p > 0]
                for step_ids, step_numbers, drawn, piece in zip(row_ids, row_numbers, response, own, strict=False)
            ]
            for row_ids, row_numbers, response, own in zip(ids, numbers, samples.response_ids, pieces, strict=True)
        ]

    def _last_batch(self, trajectories: Trajectories) -> _Batch:
        if self._batch is None or len(self._batch.prompts) != len(trajectories):
            raise ValueError("these trajectories are not the batch that was collected last")
        return self._batch

    def save_policy(self, folder: Path) -> None:
        """`policy/`, a Hugging Face folder (of adapters alone where it has any), its tokenizer, and the critic."""
        save_model(self.policy.model, folder / "policy", self.sampler.end_ids.tolist())
        self.tokenizer.save_pretrained(folder / "policy")
        critic = {name: p.detach().cpu().contiguous() for name, p in self.policy.critic_parameters().items()}
        save_file(critic, folder / "critic.safetensors")

    def load_critic(self, folder: Path) -> None:
        """The critic that `save_policy` wrote. Raises UserError where it is of another shape."""
        critic = load_file(folder / "critic.safetensors", device=str(self.policy.device))
        own = self.policy.critic_parameters()
        if critic.keys() != own.keys() or any(critic[n].shape != own[n].shape for n in own):
            raise UserError(
                f"{folder}/critic.safetensors: holds another critic ({len(critic)} tensors, expected {len(own)}); "
                "was separate_value_trunk changed?"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(critic[name])

    def state_dict(self) -> dict[str, Any]:
        """Random states and the place in the pass over the prompts. The policy is saved by `save_policy`."""
        return {
            "generator": self.generator.get_state(),
            "sampler": self.sampler.generator.get_state(),
            "queue": torch.tensor(self._queue, dtype=torch.long),
            "follow_due": self._follow_due,
            "reference": self.reference.state_dict(),
            "first_length": self._first_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.generator.set_state(state["generator"])
        self.sampler.generator.set_state(state["sampler"])
        self._queue = state["queue"].tolist()
        self._follow_due = state["follow_due"]
        self._has_learned = True
        self.reference.load_state_dict(state["reference"])
        self._first_length = state["first_length"]


def _kl_metrics(trajectories: Trajectories) -> dict[str, float]:
    """KL(π‖π_ref) per response, over the whole vocabulary at the states it visited, with its standard error."""
    assert trajectories.kl_to_reference is not None
    assert trajectories.groups is not None
    nats = trajectories.kl_to_reference.masked_fill(~trajectories.mask, 0.0).sum(dim=1).double()
    measured = ~nats.isnan()
    tokens = int(trajectories.mask[measured].sum())
    per_token = {"kl_per_token": float(nats[measured].sum()) / tokens}
    return _mean("kl", nats[measured], trajectories.groups[measured]) | per_token


def _mean(name: str, values: Tensor, groups: Tensor) -> dict[str, float]:
    """Mean of `values` (n,) and its standard error s/√m over m groups (n,), within which values depend on each other.

    Without a second group there is no error.
    """
    mean = {name: float(values.mean())}
    _, place, sizes = groups.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return mean
    means = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add_(0, place, values) / sizes
    return mean | {f"{name}_error": float(means.std()) / math.sqrt(len(sizes))}


def score_samples(rewards: Rewards, prompts: Sequence[Prompt], samples: Samples) -> Scores:
    """The scores of responses, one to each of these prompts."""
    columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in prompts[0].columns}
    completions = [as_completion(p, text) for p, text in zip(prompts, samples.texts, strict=True)]
    return rewards([p.source for p in prompts], completions, samples.response_ids, columns)


def turns_of(messages: Messages) -> Messages:
    """Who says what in each message, without what else its data set says of it."""
    return [{"role": message["role"], "content": said(message)} for message in messages]


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A response in the form of its prompt: text, or a list with one assistant message."""
    return text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]


class _Clock:
    """Seconds of each phase, by name, and the most memory held in it, MiB, where the system tells."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._memory = PeakMemory(device)
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now, peak = time.perf_counter(), self._memory.lap()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        if peak is not None:
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
        self._last = now
