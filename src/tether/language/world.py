"""The world of text: prompts → responses → scores → `Trajectories`.

The state is the prompt and the tokens so far, the action is the next token, and the world does nothing but append it;
so a whole batch of episodes is collected by sampling. It knows nothing of how trajectories are learned from.
N = episodes, T = response tokens of the longest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.episode import Episode
from tether.errors import RewardError, UserError
from tether.language.policy import LanguagePolicy, TokenContext, reference_log_probs
from tether.language.prompts import Prompt
from tether.language.sampler import Sampler, Samples
from tether.ppo import KLController, Trajectories
from tether.ppo.advantages import scale_and_clip
from tether.ppo.kl import estimate_kl, penalised_rewards
from tether.ppo.trajectories import last_step
from tether.rewards import Rewards, Scores


@dataclass(frozen=True)
class CollectConfig:
    """What one iteration collects, and how a score becomes rewards."""

    prompts: int = 32
    """Prompts per iteration."""
    samples_per_prompt: int = 1
    """Responses to each prompt; the group baselines need at least 2."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that the length limit cut off."""
    score_scale: float = 1.0
    """Scores are multiplied by this before they become rewards."""
    score_clip: float | None = None
    """Scores, after scaling, are clipped to ± this."""
    bootstrap_truncated: bool = False
    """Take V of the state after the last token as the future of a truncated response, instead of 0."""

    def __post_init__(self) -> None:
        for name in ("prompts", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("missing_eos_penalty", "score_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number")
        if self.score_clip is not None and not self.score_clip > 0:
            raise ValueError(f"score_clip is {self.score_clip}, expected a number above 0, or none")


@dataclass(frozen=True)
class _Batch:
    """What the last `collect` saw, for people and metrics."""

    prompts: list[Prompt]
    samples: Samples
    scores: Scores
    seconds: dict[str, float]


class LanguageWorld:
    """Collects trajectories of a language policy.

    Args:
        policy: the policy that is trained; the sampler draws from it.
        reference: the frozen model that the KL is measured against.
        sampler: draws responses.
        prompts: where episodes start; they are visited in an order shuffled anew in each pass.
        rewards: scores responses.
        kl: holds β; the penalty is part of the reward unless its configuration places it in the loss.
        config: see `CollectConfig`.
        seed: of the order of prompts.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        reference: PreTrainedModel,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        kl: KLController,
        config: CollectConfig | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts to collect from")
        if sampler.config.temperature == 0:
            raise ValueError("temperature is 0: PPO learns from sampled tokens, set a temperature above 0")
        self.policy = policy
        self.reference = reference.requires_grad_(False).eval()
        self.sampler = sampler
        self.prompts = prompts
        self.rewards = rewards
        self.kl = kl
        self.config = config or CollectConfig()
        self.generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []  # prompts still to be visited in this pass
        self._batch: _Batch | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The sampler's, which is the policy's."""
        return self.sampler.tokenizer

    def collect(self) -> Trajectories:
        """One batch of episodes: `prompts` × `samples_per_prompt` responses, scored and compared to the reference.

        Raises:
            RewardError: a reward function failed; the sampled responses are attached as `error.responses`.
        """
        clock = _Clock()
        repeats = self.config.samples_per_prompt
        chosen = [self.prompts[i] for i in self._next_prompts() for _ in range(repeats)]
        samples = self.sampler.sample([p.token_ids for p in chosen])
        clock.lap("sampling")
        scores = self._score(chosen, samples)
        clock.lap("scoring")
        trajectories = self._trajectories(chosen, samples, torch.tensor(scores.total, dtype=torch.float32))
        clock.lap("reference")
        self._batch = _Batch(chosen, samples, scores, clock.seconds)
        return trajectories

    def _next_prompts(self) -> list[int]:
        indices: list[int] = []
        while len(indices) < self.config.prompts:
            if not self._queue:
                self._queue = torch.randperm(len(self.prompts), generator=self.generator).tolist()
            wanted = self.config.prompts - len(indices)
            indices += self._queue[:wanted]
            self._queue = self._queue[wanted:]
        return indices

    def _score(self, prompts: list[Prompt], samples: Samples) -> Scores:
        columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in prompts[0].columns}
        completions = [as_completion(p, text) for p, text in zip(prompts, samples.texts, strict=True)]
        try:
            return self.rewards([p.source for p in prompts], completions, samples.response_ids, columns)
        except RewardError as error:
            error.responses = [  # type: ignore[attr-defined]
                {"prompt": p.text, "response": t} for p, t in zip(prompts, samples.texts, strict=True)
            ]
            raise

    def _trajectories(self, prompts: list[Prompt], samples: Samples, scores: Tensor) -> Trajectories:
        device = self.policy.device
        config, mask = self.config, samples.mask.to(device)
        context = TokenContext.from_ids(
            [p.token_ids for p in prompts],
            samples.response_ids,
            self.sampler.config.temperature,
            None if samples.support is None else samples.support.to(device),
            device,
        )
        actions = torch.zeros(mask.shape, dtype=torch.long)
        for row, ids in zip(actions, samples.response_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        actions = actions.to(device)
        log_probs, values = samples.log_probs.to(device), samples.values.to(device)
        reference = reference_log_probs(self.reference, context, actions, mask)
        shaped = scale_and_clip(scores, config.score_scale, config.score_clip)
        shaped = (shaped - config.missing_eos_penalty * ~samples.terminated).to(device)
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
            groups=groups,
        )

    def metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """Of the batch that `collect` returned last: scores, KL to the reference, lengths, and seconds by phase."""
        batch = self._last_batch(trajectories)
        total = torch.tensor(batch.scores.total, dtype=torch.float64)
        mask, lengths = trajectories.mask, trajectories.mask.sum(dim=1).double()
        assert trajectories.reference_log_probs is not None
        kl = {
            name: (estimate_kl(trajectories.log_probs, trajectories.reference_log_probs, name) * mask)
            .sum(dim=1)
            .double()
            for name in ("k1", "k3")
        }
        tokens = float(lengths.sum())
        metrics = {
            "score": float(total.mean()),
            "score_std": float(total.std(correction=0)),
            "reward": float((trajectories.rewards * mask).sum(dim=1).mean()),
            "kl": float(kl["k3"].mean()),
            "kl_per_token": float(kl["k3"].sum()) / tokens,
            "kl_k1": float(kl["k1"].mean()),
            "response_length": float(lengths.mean()),
            "response_length_max": float(lengths.max()),
            "eos_share": float(batch.samples.terminated.double().mean()),
        }
        if len(batch.scores.parts) > 1:
            for name, part in batch.scores.parts.items():
                metrics[f"score/{name}"] = sum(part) / len(part)
        metrics["tokens"] = tokens
        metrics |= {f"time/{phase}": seconds for phase, seconds in batch.seconds.items()}
        metrics["time/tokens_per_second_sampled"] = tokens / batch.seconds["sampling"]
        return metrics

    def episodes(self, trajectories: Trajectories, advantages: Tensor, returns: Tensor) -> list[Episode]:
        """The batch that `collect` returned last as episodes for people and for storage."""
        batch = self._last_batch(trajectories)
        assert trajectories.reference_log_probs is not None
        names = ("log_probs", "values", "rewards", "reference_log_probs")
        columns = {name: getattr(trajectories, name).tolist() for name in names}
        columns |= {"advantages": advantages.tolist(), "returns": returns.tolist()}
        ids = [i for response in batch.samples.response_ids for i in response]
        pieces = iter(self.tokenizer.batch_decode([[i] for i in ids]))
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
                    actions=[next(pieces) for _ in range(length)],
                    action_ids=response_ids,
                    **{name: values[row][:length] for name, values in columns.items()},
                    details={
                        "group": row // self.config.samples_per_prompt,
                        "row": prompt.row,
                        "scores": {name: part[row] for name, part in batch.scores.parts.items()},
                    },
                )
            )
        return episodes

    def _last_batch(self, trajectories: Trajectories) -> _Batch:
        if self._batch is None or len(self._batch.prompts) != len(trajectories):
            raise ValueError("these trajectories are not the batch that was collected last")
        return self._batch

    def save_policy(self, folder: Path) -> None:
        """`policy/`, a plain Hugging Face folder with its tokenizer, and the critic beside it."""
        self.policy.model.save_pretrained(folder / "policy")
        self.tokenizer.save_pretrained(folder / "policy")
        critic = {n: p.detach().cpu().contiguous() for n, p in self.policy.named_parameters() if n.startswith("value_")}
        save_file(critic, folder / "critic.safetensors")

    def load_critic(self, folder: Path) -> None:
        """The critic that `save_policy` wrote. Raises UserError where it is of another shape."""
        critic = load_file(folder / "critic.safetensors", device=str(self.policy.device))
        own = {n: p for n, p in self.policy.named_parameters() if n.startswith("value_")}
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.generator.set_state(state["generator"])
        self.sampler.generator.set_state(state["sampler"])
        self._queue = state["queue"].tolist()


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A response in the form of its prompt: text, or a list with one assistant message."""
    return text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]


class _Clock:
    """Seconds of each phase, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
