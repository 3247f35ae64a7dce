"""The world of simulators: a policy acts in vector environments, and what happened becomes `Trajectories`.

A row of the batch is one environment, a column one step of all of them. It knows nothing of how trajectories are
learned from, and of the policy only that it acts and evaluates.
N = environments, T = steps of one collection.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.control.acting import ActingPolicy, Actor
from tether.control.environments import Environments, Step
from tether.control.films import Films
from tether.control.infos import whole_success
from tether.control.normalisation import ObservationNormaliser, RewardScaler
from tether.control.policy import StateContext
from tether.control.recording import EVALUATED_AT_ONCE, EpisodeRecorder, NamingPolicy, Rollout
from tether.episode import Episode
from tether.errors import UserError
from tether.ppo import ActorCritic, Evaluation, KLController, LastSeen, Trajectories
from tether.ppo.kl import estimate_kl

RECENT = 100  # finished episodes that the reported means are taken over, as is usual for these environments
POLICY_FILE, STATISTICS_FILE = "policy.safetensors", "observations.safetensors"


class SteppingPolicy(ActorCritic, ActingPolicy, NamingPolicy, Protocol):
    """An `ActorCritic` that can act step by step; `ControlPolicy` is one."""

    def values(self, observations: Tensor) -> Tensor:
        """(n,) values of the states (n, *obs)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its parameters."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take these parameters."""
        ...


@dataclass(frozen=True)
class ControlCollectConfig:
    """What one iteration collects."""

    steps: int = 128
    """Steps of each environment per iteration."""
    whole_episodes: bool = False
    """Collect one episode from each environment, reset before it, of at most `steps` steps, instead of `steps` steps
    of whatever episodes come."""
    normalise_observations: bool = False
    """Shift and scale observations to mean 0 and variance 1 by running statistics."""
    normalise_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    record: int = 1
    """Of how many of the environments the episodes are stored."""
    alternatives: int = 5
    """So many of the likeliest actions of each step are stored with an episode, where actions are discrete. 0: none."""
    film_every: int = 0
    """Film the first stored episode that ends after every so many steps: it is played again and rendered. 0: none."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        for name in ("record", "alternatives", "film_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")


@dataclass(frozen=True)
class _Moment:
    """One step of all environments."""

    seen: Tensor  # (N, *obs), as the policy saw it
    shown: NDArray[Any]  # (recorded, *obs), as the environments gave it
    action: Tensor
    reward: NDArray[Any]  # (N,), as the policy is to learn from it
    step: Step
    valid: NDArray[np.bool_]  # (N,) a step of an episode that is collected
    seeds: NDArray[np.int64] | None  # (N,) of the episodes that the step is of


class ControlWorld:
    """Collects trajectories of a policy in simulators.

    Rewards are the environments' own (scaled where asked for), less β·k1 against a reference policy where there is
    one. A time limit truncates: the value of the state that it cut off at stands for the future, and so it does for
    episodes that go on in the next collection.

    Args:
        policy: the policy that is trained.
        environments: where it acts.
        config: see `ControlCollectConfig`.
        gamma: the discount γ; rewards are scaled by discounted returns.
        seed: of the actions.
        reference: a frozen policy that the KL is measured against.
        kl: holds β; needed with a reference.
        fewest: steps that a batch must have, such as one for each minibatch.
        films: makes films of episodes, as often as the configuration says. None: there are none.
    """

    def __init__(
        self,
        policy: SteppingPolicy,
        environments: Environments,
        config: ControlCollectConfig | None = None,
        gamma: float = 0.99,
        seed: int = 0,
        reference: ActorCritic | None = None,
        kl: KLController | None = None,
        fewest: int = 1,
        films: Films | None = None,
    ) -> None:
        if (reference is None) != (kl is None):
            raise ValueError("reference and kl belong together: give both or neither")
        self.policy = policy
        self.environments = environments
        self.config = config or ControlCollectConfig()
        self.reference = reference
        self.kl = kl
        self.fewest = fewest
        recorded = min(self.config.record, environments.count)
        self.recorder = EpisodeRecorder(policy, recorded, self.config.alternatives, films, self.config.film_every)
        self.generator = torch.Generator().manual_seed(seed)
        shape = environments.observation_space.shape
        self.normaliser = ObservationNormaliser(shape) if self.config.normalise_observations else None
        self.actor = Actor(policy, self.normaliser)
        self.scaler = RewardScaler(environments.count, gamma) if self.config.normalise_rewards else None
        self.steps = 0
        self._raw: NDArray[Any] = np.empty(0)  # the state that each environment is in
        self._seen: Tensor | None = None  # the same as the policy sees it; None before the first reset
        self._returns = np.zeros(environments.count)
        self._lengths = np.zeros(environments.count, dtype=np.int64)
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RECENT)  # return, length, success (or nan)
        self._tells = False  # the environments have spoken of success
        self._rollout: Rollout | None = None

    def collect(self) -> Trajectories:
        """`steps` steps of every environment, or one whole episode of each.

        Raises:
            UserError: an environment failed or gave what it must not; there are too few steps.
        """
        started = time.perf_counter()
        moments = list(self._act())
        taken = torch.stack([m.action for m in moments], dim=1)
        context = StateContext(torch.stack([m.seen for m in moments], dim=1).to(self.policy.device))
        mask = np.stack([m.valid for m in moments])
        if mask.sum() < self.fewest:
            raise UserError(
                f"the iteration has {mask.sum()} steps, expected at least {self.fewest} (one for each minibatch): "
                "raise collect.steps or environments.count, or lower learner.minibatches"
            )
        terminated = np.stack([m.step.terminated for m in moments]) & mask
        ended = terminated | (np.stack([m.step.truncated for m in moments]) & mask)
        # an episode that goes on is cut off at its last step here
        last = len(mask) - 1 - mask[::-1].argmax(axis=0)
        columns = np.flatnonzero(mask.any(axis=0) & ~ended[last, np.arange(mask.shape[1])])
        truncated = ended & ~terminated
        truncated[last[columns], columns] = True
        rollout = Rollout(
            rewards=np.stack([m.step.rewards for m in moments]),
            terminated=terminated,
            ended=terminated | truncated if self.config.whole_episodes else ended,
            mask=mask,
            success=_stack_success(moments),
            shown=np.stack([m.shown for m in moments]),
            seeds=None if moments[0].seeds is None else np.stack([m.seeds for m in moments if m.seeds is not None]),
            alternatives=self.recorder.likeliest(context.observations[: self.recorder.count]),
            seconds=0.0,
        )
        valid = self._row_wise(mask)
        now = _evaluate(self.policy, context, taken, valid)
        rewards = self._row_wise(np.stack([m.reward for m in moments]).astype(np.float32))
        reference = None
        if self.reference is not None and self.kl is not None:
            reference = _evaluate(self.reference, context, taken, valid).log_probs
            if self.kl.config.placement == "reward":
                rewards = rewards - self.kl.beta * estimate_kl(now.log_probs, reference, "k1")
        self._count(rollout)
        self._rollout = replace(rollout, seconds=time.perf_counter() - started)
        return Trajectories(
            actions=taken,
            log_probs=now.log_probs,
            values=now.values,
            rewards=rewards.masked_fill(~valid, 0.0),
            mask=valid,
            terminated=self._row_wise(terminated),
            truncated=self._row_wise(truncated),
            bootstrap_values=self._row_wise(self._bootstrap_values(moments, truncated)),
            context=context,
            reference_log_probs=reference,
            markov=True,
        )

    def _act(self) -> Iterator[_Moment]:
        """Let the policy act, from where the environments stand."""
        count, limit, whole = self.environments.count, self.config.steps, self.config.whole_episodes
        running = np.ones(count, dtype=bool)  # whole episodes: the one that is collected has not ended
        if self._seen is None or whole:
            self._observe(self.environments.reset(), running)
        noise = self.policy.noise(limit, count, self.generator)
        for t in range(limit):
            seen, shown, seeds = self._seen, self._raw[: self.recorder.count], self.environments.seeds
            assert seen is not None
            action, done = self.actor.act(seen, noise[t])
            step = self.environments.step(done)
            ended = step.terminated | step.truncated
            if whole and t == limit - 1:
                ended = np.ones_like(ended)  # the next collection begins other episodes
            valid = step.valid & running
            reward = step.rewards if self.scaler is None else self.scaler(step.rewards, ended, valid)
            if whole:
                running = running & ~ended
            self._observe(step.observations, running)
            yield _Moment(seen, shown, action, reward, step, valid, seeds)
            if not running.any():
                return

    def _observe(self, observations: NDArray[Any], running: NDArray[np.bool_]) -> None:
        """The state that each environment is in now, as it is and as the policy sees it.

        The arrays are kept as they are: `Environments` gives new ones at every step.
        """
        self._raw = observations
        self._seen = self.actor.see(observations, running)

    def _bootstrap_values(self, moments: list[_Moment], truncated: NDArray[np.bool_]) -> NDArray[np.float32]:
        """(T, N): V of the state that each truncated step led to, 0 elsewhere."""
        bootstrap = np.zeros(truncated.shape, dtype=np.float32)
        places = np.argwhere(truncated)
        if len(places):
            states = self.actor.see(np.stack([moments[t].step.successors[n] for t, n in places]))
            values = self.policy.values(states.to(self.policy.device))
            bootstrap[truncated] = values.numpy(force=True)
        return bootstrap

    def _row_wise(self, steps: NDArray[Any]) -> Tensor:
        """(T, N) as the environments go → (N, T) as trajectories lie."""
        return torch.from_numpy(np.ascontiguousarray(steps.T)).to(self.policy.device)

    def _count(self, rollout: Rollout) -> None:
        """Add up returns and lengths of episodes, which may have begun in an earlier collection."""
        begin = np.zeros(self.environments.count, dtype=np.int64)
        if self.config.whole_episodes:
            self._returns[:], self._lengths[:] = 0, 0
        for t, n in np.argwhere(rollout.ended):
            part = slice(begin[n], t + 1)
            self._returns[n] += rollout.rewards[part, n] @ rollout.mask[part, n]
            self._lengths[n] += rollout.mask[part, n].sum()
            success = math.nan if rollout.success is None else float(rollout.success[t, n])
            self._tells |= not math.isnan(success)
            self._recent.append((float(self._returns[n]), int(self._lengths[n]), success))
            self._returns[n], self._lengths[n], begin[n] = 0, 0, t + 1
        rest = rollout.mask & (np.arange(len(rollout.mask))[:, None] >= begin)
        self._returns += (rollout.rewards * rest).sum(axis=0)
        self._lengths += rest.sum(axis=0)
        self.steps += int(rollout.mask.sum())

    def metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """Of the batch that `collect` returned last, and means over the 100 episodes that ended last."""
        rollout = self._last_rollout(trajectories)
        metrics: dict[str, float] = {}
        if self._recent:
            returns, lengths, success = np.array(self._recent).T
            metrics |= {"score": float(returns.mean()), "score_std": float(returns.std())}
            metrics["episode_length"] = float(lengths.mean())
            if self._tells:
                metrics["success"] = float(np.mean(whole_success(success.tolist())))
        mask = trajectories.mask
        metrics["reward"] = float(trajectories.rewards[mask].mean())
        if trajectories.reference_log_probs is not None:
            k1 = estimate_kl(trajectories.log_probs, trajectories.reference_log_probs, "k1")
            metrics["kl_k1"] = float(k1[mask].sum() / (trajectories.terminated | trajectories.truncated).sum())
        metrics |= {"episodes": float(rollout.ended.sum()), "steps": float(self.steps)}
        return metrics | {"time/collecting": rollout.seconds, "time/steps_per_second_collected": _rate(rollout)}

    def episodes(
        self, trajectories: Trajectories, advantages: Tensor, returns: Tensor, last_seen: LastSeen | None = None
    ) -> list[Episode]:
        """Episodes of the recorded environments that ended in the batch that `collect` returned last, as wholes.

        To be called once for each batch: what an unfinished episode has so far is kept until it ends.
        """
        rollout = self._last_rollout(trajectories)
        numbers = {name: getattr(trajectories, name) for name in ("log_probs", "values", "rewards")}
        numbers |= {"advantages": advantages, "returns": returns}
        if trajectories.reference_log_probs is not None:
            numbers["reference_log_probs"] = trajectories.reference_log_probs
        if last_seen is not None:
            numbers |= {"new_log_probs": last_seen.log_probs, "entropies": last_seen.entropy}
            numbers["clipped"] = last_seen.clipped
        if self.config.whole_episodes:
            self.recorder.begin_anew()
        return self.recorder.finished(rollout, trajectories.actions, numbers, self.steps)

    def _last_rollout(self, trajectories: Trajectories) -> Rollout:
        if self._rollout is None or self._rollout.mask.T.shape != tuple(trajectories.mask.shape):
            raise ValueError("these trajectories are not the batch that was collected last")
        return self._rollout

    def save_policy(self, folder: Path) -> None:
        """`policy/`: the parameters, and the statistics by which observations are normalised."""
        folder = folder / "policy"
        folder.mkdir()
        parameters = {name: tensor.detach().cpu().contiguous() for name, tensor in self.policy.state_dict().items()}
        save_file(parameters, folder / POLICY_FILE)
        if self.normaliser is not None:
            state = self.normaliser.state_dict()
            save_file({name: torch.as_tensor(value) for name, value in state.items()}, folder / STATISTICS_FILE)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters: random state, environments, statistics, and what episodes have so far."""
        parts = {"environments": self.environments, "normaliser": self.normaliser, "scaler": self.scaler}
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return state | {
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "recent": list(self._recent),
            "tells": self._tells,
            **self.recorder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: the state is of a world with other normalisation, or with another number of environments.
        """
        for name, part in (("normaliser", self.normaliser), ("scaler", self.scaler)):
            if (part is None) == (name in state):
                field = {"normaliser": "normalise_observations", "scaler": "normalise_rewards"}[name]
                raise UserError(
                    f"collect.{field} is {str(part is not None).lower()}, but the run began with "
                    f"{str(name in state).lower()}: go on with that, or start another run"
                )
        if self.normaliser is not None:
            self.normaliser.load_state_dict(state["normaliser"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.steps = int(state["steps"])
        self._returns, self._lengths = state["returns"].numpy().copy(), state["lengths"].numpy().copy()
        self._recent = deque(((r, n, s) for r, n, s in state["recent"]), maxlen=RECENT)
        self._tells = bool(state.get("tells", any(not math.isnan(s) for _, _, s in self._recent)))
        self.recorder.load_state_dict(state)
        if not self.environments.load_state_dict(state["environments"]):  # new episodes have begun
            self._returns[:], self._lengths[:] = 0, 0
            self.recorder.begin_anew()
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"] | {"returns": torch.from_numpy(self._returns.copy())})
        self._seen = None
        if self.environments.observations is not None:
            self._raw = self.environments.observations
            self._seen = self.actor.see(self._raw)


def load_policy(folder: Path, policy: SteppingPolicy, normaliser: ObservationNormaliser | None) -> None:
    """What `save_policy` wrote into `folder`/policy.

    Raises:
        UserError: the files are missing, or of a policy of another shape.
    """
    file = folder / "policy" / POLICY_FILE
    try:
        policy.load_state_dict(load_file(file))
        if normaliser is not None:
            file = folder / "policy" / STATISTICS_FILE
            normaliser.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{file}: holds another policy than the configuration describes: {reason}") from error


@torch.no_grad()
def _evaluate(policy: ActorCritic, context: StateContext, actions: Tensor, mask: Tensor) -> Evaluation:
    """`policy.evaluate` of any number of states, some thousand at a time; rows keep their order."""
    rows = max(1, EVALUATED_AT_ONCE // mask.shape[1])
    parts = [
        policy.evaluate(StateContext(context.observations[i : i + rows]), actions[i : i + rows], mask[i : i + rows])
        for i in range(0, len(mask), rows)
    ]
    return Evaluation(
        log_probs=torch.cat([part.log_probs for part in parts]),
        values=torch.cat([part.values for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
    )


def _stack_success(moments: list[_Moment]) -> NDArray[Any] | None:
    """(T, N), NaN where an environment said nothing; None where none ever did."""
    said = [m.step.success for m in moments]
    if all(s is None for s in said):
        return None
    return np.stack([np.full(len(moments[0].valid), np.nan) if s is None else s for s in said])


def _rate(rollout: Rollout) -> float:
    return float(rollout.mask.sum()) / max(rollout.seconds, 1e-9)


__all__ = ["ControlCollectConfig", "ControlWorld", "SteppingPolicy", "load_policy"]
