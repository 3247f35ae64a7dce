"""The update: epochs × minibatches × microbatches over one batch of trajectories.

The learner sees tensors and an `ActorCritic`. It does not know which world the trajectories come from.
N = episodes, T = steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tether.ppo.advantages import AdvantageConfig, estimate
from tether.ppo.distributed import all_sum, sum_gradients
from tether.ppo.kl import KLConfig, KLController, estimate_kl
from tether.ppo.objective import clipped_surrogate, step_weights, value_loss
from tether.ppo.trajectories import ActorCritic, Context, Evaluation, LastSeen, Trajectories, last_step


@dataclass(frozen=True)
class LearnerConfig:
    """How one batch of trajectories changes the policy and the critic."""

    epochs: int = 4
    """Passes over each batch. 4: Ziegler et al. 2019."""
    minibatches: int = 4
    """Optimizer steps per epoch; the batch is cut into so many parts at random."""
    microbatch_size: int = 8192
    """The most that goes through the model at once, padding included: Σ of what a context gives as `lengths`. Changes
    memory and speed, never the result."""
    learning_rate: float = 1e-5
    """Of the policy, its trunk included."""
    value_learning_rate: float | None = None
    """Of the critic's own parameters. None: the same as the policy's."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates fall from their value to 0 over the iterations of the run."""
    warmup_iterations: int = 0
    """Iterations over which the learning rates rise linearly from 0."""
    value_warmup_iterations: int = 0
    """First iterations in which the critic's own parameters alone are trained: policy and adaptive β stay as they are
    (value pre-training of VC-PPO, Yuan et al. 2025, who take observed returns: `value_lam` 1)."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment (Kingma and Ba 2015)."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment (Kingma and Ba 2015)."""
    adam_epsilon: float = 1e-8
    """Adam's ε. 1e-8: Kingma and Ba 2015; many take 1e-5 (Huang et al. 2022, detail 3)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm. 0: never."""
    clip_low: float = 0.2
    """ε_low: the ratio π/π_old is clipped below 1 − ε_low. 0.2: Schulman et al. 2017."""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped above 1 + ε_high. DAPO (Yu et al. 2025) takes 0.28."""
    dual_clip: float | None = None
    """c > 1 bounds the loss of bad actions by c·|A| (Ye et al. 2020, who take 3). None: off."""
    value_coefficient: float = 0.5
    """Weight of the value loss ½(V − R)²."""
    value_clip: float | None = None
    """Clip V to V_old ± this and take the larger loss. None: off, which Andrychowicz et al. 2021 found better."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["step", "episode"] = "step"
    """step: every step of a minibatch weighs the same. episode: every episode does."""
    target_kl: float | None = None
    """Stop updating on a batch once the approximate KL(π_old‖π) per step of a minibatch exceeds this. None: never."""

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "minibatches": 1, "microbatch_size": 1}
        not_negative = dict.fromkeys(
            ("learning_rate", "warmup_iterations", "value_warmup_iterations", "weight_decay", "max_gradient_norm",
             "clip_low", "clip_high", "value_coefficient", "entropy_coefficient", "adam_beta1", "adam_beta2"), 0
        )  # fmt: skip
        for name, least in (at_least | not_negative).items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        for name in ("adam_epsilon", "value_learning_rate", "value_clip", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("learning_rate", "value_learning_rate"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} is inf, expected a finite number")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number below 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}, expected a number above 1")


class Learner:
    """PPO's update of a policy and its critic.

    Args:
        policy: an `ActorCritic`.
        config: see `LearnerConfig`.
        advantage: how rewards become advantages.
        kl: the holder of β; it is told the KL of each batch.
        iterations: length of the run, which the learning-rate schedule spans.
        seed: of the order of minibatches.

    Attributes:
        iteration: updates done so far.
        updating: the parameters are those of neither one iteration nor the next, since an update was broken off.
        last_seen: of each step of the last batch, see `LastSeen`.
    """

    def __init__(
        self,
        policy: ActorCritic,
        config: LearnerConfig | None = None,
        advantage: AdvantageConfig | None = None,
        kl: KLController | None = None,
        iterations: int = 1,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.config = config or LearnerConfig()
        self.advantage = advantage or AdvantageConfig()
        self.kl = kl or KLController(KLConfig(beta=0.0))
        self.iterations = iterations
        self.iteration = 0
        self.updating = False
        self.last_seen: LastSeen | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self._policy_parameters = [p for p in policy.policy_parameters() if p.requires_grad]
        self._value_parameters = [p for p in policy.value_parameters() if p.requires_grad]
        self._parameters = self._policy_parameters + self._value_parameters
        # of one rate, all are one group: each group costs as much time as a small network's forward pass
        one_rate = self.config.value_learning_rate is None
        parts = [self._parameters] if one_rate else [self._policy_parameters, self._value_parameters]
        groups = [{"params": part, "is_critic": part is self._value_parameters} for part in parts if part]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.config.learning_rate,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_epsilon,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def credit(self, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
        """Advantages and returns of a batch, both (N, T)."""
        return estimate(trajectories, self.advantage)

    def update(self, trajectories: Trajectories, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """One iteration of PPO on a batch; returns its metrics.

        Where steps stand alone (`Trajectories.markov`) they are what is shuffled into minibatches, else episodes are.

        Raises:
            FloatingPointError: a gradient is not finite; the parameters are those before the bad step.
        """
        config = self.config
        kl = self._kl_per_episode(trajectories)
        batch = _Batch.of(trajectories, advantages, returns)
        rows = len(batch.mask)
        if rows < config.minibatches:
            what = "steps" if trajectories.markov else "episodes"
            raise ValueError(f"{rows} {what} cannot be cut into {config.minibatches} minibatches; lower minibatches")
        self.updating = True
        rates = self._set_learning_rates()
        total, seen = _Sums(), _Seen()
        stopped = False
        for _ in range(config.epochs):
            if config.target_kl is None:
                seen = _Seen()  # this epoch will see every step again
            order = torch.randperm(rows, generator=self.generator)
            for chosen in order.tensor_split(config.minibatches):
                sums = self._accumulate_gradients(batch, chosen, seen)
                if config.target_kl is not None and sums["approx_kl"] > config.target_kl:
                    stopped = True
                    break
                sums["gradient_norm"] = self._step()
                total.add(sums)
            if stopped:
                break
        for parameter in self._parameters:
            parameter.grad = None  # their memory is the world's while it collects
        policy_moved = not self._warming_value_up
        self.iteration += 1
        self.updating = False
        self.last_seen = seen.last(batch, trajectories)
        metrics = total.means() | rates | {"optimizer_steps": float(total.count), "stopped_early": float(stopped)}
        if self.advantage.uses_critic:
            metrics["explained_variance"] = explained_variance(trajectories.values, returns, trajectories.mask)
        if kl is not None:
            metrics["beta"] = self.kl.beta
            if policy_moved:  # a β that follows the KL of a policy that stands still would drift away
                self.kl.update(*kl)
        return metrics

    def _accumulate_gradients(self, batch: _Batch, rows: Tensor, seen: _Seen) -> dict[str, float]:
        """Gradients of one minibatch, microbatch by microbatch: the cut does not change them."""
        for parameter in self._parameters:
            parameter.grad = None
        weights = step_weights(batch.mask[rows], self.config.aggregation)
        names: list[str] = []
        sums: Tensor | float = 0.0
        for part in self._microbatches(batch.context.lengths[rows]):
            micro = batch.select(rows[part])
            losses, evaluation = self._losses(micro)
            seen.add(rows[part], evaluation, losses["clip_fraction"])
            weight = weights[part, : micro.mask.shape[1]]
            losses["loss"].backward(weight)  # the gradient of Σ weight · loss
            with torch.no_grad():
                names = list(losses)
                # what the mask leaves out is replaced, not multiplied by 0: 0 · nan would still be nan
                valid = torch.stack(list(losses.values())).masked_fill(~micro.mask, 0.0)
                sums = sums + (valid * weight).sum(dim=(1, 2))
        assert isinstance(sums, Tensor)
        sum_gradients(self._parameters)
        return dict(zip(names, all_sum(sums).tolist(), strict=True))

    def _losses(self, micro: _Batch) -> tuple[dict[str, Tensor], Evaluation]:
        """Every step's loss and what is reported beside it, each (n, t); `loss` carries the gradient.

        Returns what they were computed from, too.
        """
        config = self.config
        evaluation = self.policy.evaluate(micro.context, micro.actions, micro.mask)
        policy_loss, was_clipped = clipped_surrogate(
            evaluation.log_probs, micro.log_probs, micro.advantages, config.clip_low, config.clip_high, config.dual_clip
        )
        loss = policy_loss
        if config.entropy_coefficient != 0:
            loss = loss - config.entropy_coefficient * evaluation.entropy
        with torch.no_grad():
            reported = {
                "policy_loss": policy_loss,
                "entropy": evaluation.entropy,
                # KL(π_old‖π) by k3, the actions being π_old's (Schulman 2020)
                "approx_kl": estimate_kl(micro.log_probs, evaluation.log_probs, "k3"),
                "clip_fraction": was_clipped.to(policy_loss.dtype),
            }
        if self.kl.config.placement == "loss" and micro.reference_log_probs is not None:
            kl_loss = estimate_kl(evaluation.log_probs, micro.reference_log_probs, self.kl.config.loss_estimator)
            loss = loss + self.kl.beta * kl_loss
            reported["kl_loss"] = kl_loss
        if self.advantage.uses_critic:
            critic_loss = value_loss(evaluation.values, micro.values, micro.returns, config.value_clip)
            loss = config.value_coefficient * critic_loss + (0.0 if self._warming_value_up else loss)
            reported["value_loss"] = critic_loss
        return {"loss": loss} | reported, evaluation

    def _microbatches(self, lengths: Tensor) -> Iterator[Tensor | slice]:
        """Indices into `lengths` (n,), in parts of at most `microbatch_size` with padding, longest first if several."""
        if len(lengths) * int(lengths.max()) <= self.config.microbatch_size:
            yield slice(None)
            return
        order = torch.argsort(lengths, descending=True, stable=True)
        start = 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            rows = max(1, self.config.microbatch_size // longest)
            yield order[start : start + rows]
            start += rows

    def _step(self) -> float:
        """Clip the gradients and move the parameters; returns the gradients' norm before clipping."""
        if self._warming_value_up:
            for parameter in self._policy_parameters:
                parameter.grad = None
        limit = self.config.max_gradient_norm or math.inf
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        if norm > limit:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, total)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} in iteration {self.iteration + 1}: "
                "lower the learning rate or look for extreme rewards in the last episodes"
            )
        self.optimizer.step()
        return norm

    @property
    def _warming_value_up(self) -> bool:
        return self.advantage.uses_critic and self.iteration < self.config.value_warmup_iterations

    def _set_learning_rates(self) -> dict[str, float]:
        factor = schedule_factor(self.iteration, self.iterations, self.config.warmup_iterations, self.config.schedule)
        value_rate = self.config.value_learning_rate
        rates = {"learning_rate": self.config.learning_rate * factor}
        rates["value_learning_rate"] = rates["learning_rate"] if value_rate is None else value_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rates["value_learning_rate" if group["is_critic"] else "learning_rate"]
        return rates

    def _kl_per_episode(self, trajectories: Trajectories) -> tuple[float, int] | None:
        """KL(π‖π_ref) in nats per episode, by k1, and how many episodes ended; None without a reference."""
        if trajectories.reference_log_probs is None:
            return None
        k1 = estimate_kl(trajectories.log_probs, trajectories.reference_log_probs, "k1")[trajectories.mask].sum()
        ends = (trajectories.terminated | trajectories.truncated).sum()
        total, episodes = all_sum(torch.stack([k1, ends.to(k1.dtype)])).tolist()
        return total / max(episodes, 1.0), int(episodes)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters of the policy: optimizer moments, random state, β, iteration."""
        moments = {str(index): state for index, state in self.optimizer.state_dict()["state"].items()}
        return {
            "iteration": self.iteration,
            "generator": self.generator.get_state(),
            "optimizer": moments,
            "kl": self.kl.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` as if there had been no interruption."""
        self.iteration = int(state["iteration"])
        self.generator.set_state(state["generator"])
        moments = {int(index): moment for index, moment in state["optimizer"].items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.kl.load_state_dict(state["kl"])


@dataclass(frozen=True)
class _Batch:
    """What an update reads of a batch; (N, T) each, rows being episodes or, where steps stand alone, single steps."""

    context: Context
    actions: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    reference_log_probs: Tensor | None

    @classmethod
    def of(cls, trajectories: Trajectories, advantages: Tensor, returns: Tensor) -> _Batch:
        mask, context = trajectories.mask, trajectories.context
        numbers = (trajectories.log_probs, trajectories.values, advantages, returns, trajectories.reference_log_probs)
        whole = cls(context, trajectories.actions, mask, *numbers)
        if not trajectories.markov:
            return whole
        alone = {name: tensor[mask].unsqueeze(1) for name, tensor in whole._tensors()}
        return replace(whole, context=context.steps(mask), **alone)

    def select(self, rows: Tensor) -> _Batch:
        """These rows, cut to the longest among them."""
        taken = {name: tensor[rows] for name, tensor in self._tensors()}
        steps = self.mask.shape[1]
        if steps > 1 and (last := int(last_step(taken["mask"]).max()) + 1) < steps:
            taken = {name: tensor[:, :last] for name, tensor in taken.items()}
        return replace(self, context=self.context.select(rows), **taken)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


class _Seen:
    """What policy, critic and clipping said in the evaluations of an update, one after the other."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def add(self, rows: Tensor, evaluation: Evaluation, clipped: Tensor) -> None:
        numbers = (evaluation.log_probs.detach(), evaluation.values.detach(), evaluation.entropy.detach())
        self.parts.append((rows, (*numbers, clipped)))

    def last(self, batch: _Batch, trajectories: Trajectories) -> LastSeen:
        """The last word on every step, (N, T) as the trajectories lie; NaN where there is none."""
        told = [torch.full_like(batch.values, math.nan) for _ in range(4)]
        for rows, numbers in self.parts:
            for whole, part in zip(told, numbers, strict=True):
                whole[rows, : part.shape[1]] = part.to(whole.dtype)
        if trajectories.markov:  # a row of the batch is a step of the mask
            nowhere = torch.full_like(trajectories.values, math.nan)
            told = [nowhere.masked_scatter(trajectories.mask, steps) for steps in told]
        else:
            told = [whole.masked_fill(~trajectories.mask, math.nan) for whole in told]
        log_probs, values, entropy, clipped = told
        return LastSeen(log_probs, values, entropy, clipped == 1)  # never seen: never clipped


class _Sums:
    """Running sums of metrics over minibatches."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}

    def add(self, metrics: dict[str, float]) -> None:
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / self.count for name, value in self.sums.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over valid steps on all ranks: 1 is a perfect critic, 0 no better than a constant."""

    def variance(x: Tensor) -> Tensor:
        count, total = all_sum(torch.stack([mask.sum().to(x.dtype), x[mask].sum()]))
        return all_sum((x[mask] - total / count).square().sum()) / count

    spread = variance(returns)
    return float(1.0 - variance(returns - values) / spread) if float(spread) > 0 else math.nan


def schedule_factor(iteration: int, iterations: int, warmup: int, schedule: str) -> float:
    """Factor on the learning rate in iteration 0, 1, …: rises over `warmup`, then falls to 0 at `iterations`."""
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    progress = (iteration - warmup) / max(1, iterations - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
