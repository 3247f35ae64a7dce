"""Networks and distributions for control: a perceptron or a CNN as π(a|s) and V(s).

It knows tensors and the spaces of one environment; it knows nothing of rewards, of episodes or of how environments
are stepped. The three distributions are written out, as a handful of tensor operations each, since they run at
every step of an environment; tests compare them with `torch.distributions`.

N = environments, T = steps, n = states in all, F = features of a trunk, A = size of a vector action.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from tether.errors import UserError
from tether.ppo import Evaluation

_CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""(channels, kernel, stride) of each layer of Mnih et al. 2015."""
_IMAGE_FEATURES = 512
"""Units of the linear layer that follows them there."""
_SMALLEST_IMAGE = 36
"""Height and width at which the last convolution still has one output."""
_HIDDEN_GAIN, _POLICY_GAIN, _VALUE_GAIN = math.sqrt(2.0), 0.01, 1.0
"""Of the orthogonal initialisation (Huang et al. 2022, detail 2)."""


@dataclass(frozen=True, repr=False)
class StateContext:
    """The states that a policy acted in, as it saw them.

    Attributes:
        observations: (N, T, *obs), normalised float32 or uint8 images.
    """

    observations: Tensor

    def __repr__(self) -> str:
        return f"StateContext({' × '.join(map(str, self.observations.shape))} numbers)"

    @property
    def lengths(self) -> Tensor:
        """(N,) T each: every step costs the same, also one that the mask leaves out."""
        count, steps = self.observations.shape[:2]
        return torch.full((count,), steps, device=self.observations.device)

    def select(self, rows: Tensor) -> StateContext:
        """The states of these rows."""
        return StateContext(self.observations[rows])

    def steps(self, mask: Tensor) -> StateContext:
        """The n steps at which `mask` (N, T) is True, as n rows of one step each, in the order of `x[mask]`."""
        if bool(mask.all()):
            return StateContext(self.observations.flatten(0, 1).unsqueeze(1))  # no copy
        return StateContext(self.observations[mask].unsqueeze(1))


@dataclass(frozen=True)
class NetworkConfig:
    """The networks of policy and critic."""

    hidden: tuple[int, ...] = (64, 64)
    """Units of each hidden layer, for vector observations. Images go through the CNN of Mnih et al. 2015 instead."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Of the hidden layers. The CNN always has relu."""
    shared: bool = False
    """One trunk for policy and critic instead of one each. The CNN is always shared."""
    log_std: float = 0.0
    """Initial log standard deviation of continuous actions; learned, the same in all states. 0: Huang et al. 2022."""

    def __post_init__(self) -> None:
        for units in self.hidden:
            if units < 1:
                raise ValueError(f"hidden has a layer of {units} units, expected at least 1")
        if self.activation not in ("tanh", "relu"):
            raise ValueError(f"activation is {self.activation!r}, expected 'tanh' or 'relu'")
        if not math.isfinite(self.log_std):
            raise ValueError(f"log_std is {self.log_std}, expected a finite number")


class ControlPolicy(nn.Module):
    """`tether.ppo.ActorCritic` over the observations and actions of a simulator.

    Observations with three dimensions are images, channels first, and go through a CNN; all others are flattened
    and go through a perceptron. uint8 images are divided by their upper bound, as are components of uint8 vectors that
    range from 0 to 255; all other numbers are taken as they are.

    Weights are orthogonal with gain √2 (hidden), 0.01 (policy head) and 1 (value head), biases 0: Huang et al. 2022,
    "The 37 implementation details of PPO", detail 2.

    Args:
        observation_space: of one environment.
        action_space: of one environment: Discrete, MultiDiscrete or a Box of floats.
        config: see `NetworkConfig`.
        seed: of the initial weights; torch's global random state is neither read nor changed.

    Raises:
        UserError: images are too small for the CNN; the action space is of another kind.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Space[Any],
        config: NetworkConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = config or NetworkConfig()
        shape = observation_space.shape
        generator = torch.Generator().manual_seed(seed)
        images = len(shape) == 3
        self.shared = images or config.shared
        scale = _scale_of(observation_space)
        self.trunk = _Convolutions(shape, scale, generator) if images else _Perceptron(shape, scale, config, generator)
        self.head = _head(action_space, self.trunk.features, config, generator)
        self.value_trunk = None if self.shared else _Perceptron(shape, scale, config, generator)
        self.value_head = _linear(self.trunk.features, 1, _VALUE_GAIN, generator)

    @property
    def device(self) -> torch.device:
        """Where the parameters are. Observations, actions and noise are expected there too."""
        return self.value_head.weight.device

    def policy_parameters(self) -> list[nn.Parameter]:
        """Those of the policy's head and of its trunk, which the critic may share."""
        return [*self.trunk.parameters(), *self.head.parameters()]

    def value_parameters(self) -> list[nn.Parameter]:
        """The value head's, and those of the critic's own trunk where it has one."""
        trunk = [] if self.value_trunk is None else list(self.value_trunk.parameters())
        return [*trunk, *self.value_head.parameters()]

    def noise(self, steps: int, count: int, generator: torch.Generator) -> Tensor:
        """(steps, count, …) the randomness of a rollout, drawn at once; `act` takes one step's (count, …).

        Standard Gumbel for discrete actions, one per choice: argmax(logits + noise) is an exact draw from
        softmax(logits). Standard normal for continuous ones. On the policy's device, whatever the generator's.
        """
        return self.head.noise((steps, count), generator).to(self.device)

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor | None) -> Tensor:
        """Actions in the states `observations` (N, *obs): (N,) int64, or (N, A) int64 or float32.

        Args:
            observations: (N, *obs).
            noise: (N, …), one step of what `noise` gave; None: the most probable action.
        """
        return self.head.draw(self.trunk(observations), noise)

    @torch.no_grad()
    def likeliest(self, observations: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        """The likeliest actions in the states (n, *obs), likeliest first: (n, k) or (n, k, A), and their probabilities.

        k is `count`, or all actions there are; (n, k) probabilities. None for continuous actions.
        """
        return self.head.likeliest(self.trunk(observations), count)

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """(n,) V of the states (n, *obs), without a gradient; `evaluate` gives values that have one."""
        return self._values(observations, self.trunk(observations) if self.shared else None)

    def evaluate(self, context: StateContext, actions: Tensor, mask: Tensor) -> Evaluation:
        """Log-probabilities, values and entropies (N, T) of `actions` (N, T) or (N, T, A); 0 where `mask` is False.

        Observations may have more steps than the mask: those beyond it are left out. What stands at steps that the
        mask leaves out is never read, so it may be anything.
        """
        states = context.observations[:, : mask.shape[1]]
        whole = bool(mask.all())  # then nothing needs to be picked out, which would cost as much as the networks do
        states, actions = (states.flatten(0, 1), actions.flatten(0, 1)) if whole else (states[mask], actions[mask])
        features = self.trunk(states)
        log_probs, entropy = self.head.evaluate(features, actions)
        values = self._values(states, features)
        if whole:
            return Evaluation(log_probs.reshape(mask.shape), values.reshape(mask.shape), entropy.reshape(mask.shape))
        return Evaluation(_spread(log_probs, mask), _spread(values, mask), _spread(entropy, mask))

    def to_environment(self, actions: Tensor) -> NDArray[Any]:
        """What the environments understand by raw actions (N,) or (N, A): (N, *act) of the action space's dtype.

        Discrete actions are counted from the space's start. Continuous ones are raw, so that their probability is
        that of the Gaussian: [−1, 1] is mapped to [low, high] and clipped there in dimensions with both bounds;
        without them they are taken as they are, clipped at the one bound where there is one.
        """
        return self.head.to_environment(actions.numpy(force=True))

    def _values(self, states: Tensor, features: Tensor | None) -> Tensor:
        """(n,) values of `states`; `features` are what the policy's trunk makes of them, where it is shared."""
        if self.value_trunk is not None:
            features = self.value_trunk(states)
        assert features is not None
        return self.value_head(features).squeeze(-1)


class _Perceptron(nn.Module):
    """Linear layers, each with its activation: (n, …) observations of any shape → (n, F)."""

    def __init__(
        self, shape: tuple[int, ...], scale: Tensor, config: NetworkConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale, persistent=False)
        self.inputs = math.prod(shape)
        sizes = (self.inputs, *config.hidden)
        self.features = sizes[-1]
        self.layers = nn.ModuleList(
            _linear(before, after, _HIDDEN_GAIN, generator) for before, after in pairwise(sizes)
        )
        self.activation = torch.tanh_ if config.activation == "tanh" else torch.relu_

    def forward(self, observations: Tensor) -> Tensor:
        x = _as_input(observations, self.scale)
        if x.dim() != 2:
            x = x.reshape(-1, self.inputs)
        layer: Any
        for layer in self.layers:
            # the function instead of the module: each call of a module costs as much as a small layer itself
            x = self.activation(F.linear(x, layer.weight, layer.bias))
        return x


class _Convolutions(nn.Module):
    """The CNN of Mnih et al. 2015 (Methods, "Model architecture"): (n, C, H, W) images → (n, 512)."""

    def __init__(self, shape: tuple[int, ...], scale: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale, persistent=False)
        channels, *size = shape
        if min(size) < _SMALLEST_IMAGE:
            raise UserError(
                f"observations are images of shape {shape} (channels, height, width), expected at least "
                f"{_SMALLEST_IMAGE} × {_SMALLEST_IMAGE} pixels for the convolutions: enlarge them with "
                "gymnasium.wrappers.ResizeObservation or make them vectors with FlattenObservation"
            )
        layers: list[nn.Module] = []
        for after, kernel, stride in _CONVOLUTIONS:
            layer = nn.utils.skip_init(nn.Conv2d, channels, after, kernel, stride)
            layers += [_initialise(layer, _HIDDEN_GAIN, generator), nn.ReLU(inplace=True)]
            channels, size = after, [(length - kernel) // stride + 1 for length in size]
        self.features = _IMAGE_FEATURES
        linear = _linear(channels * size[0] * size[1], _IMAGE_FEATURES, _HIDDEN_GAIN, generator)
        self.layers = nn.Sequential(*layers, nn.Flatten(), linear, nn.ReLU(inplace=True))

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(_as_input(observations, self.scale))


class _CategoricalHead(nn.Module):
    """One choice of n: π(a|s) = softmax(logits)."""

    def __init__(self, space: spaces.Discrete, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.choices, self.start, self.dtype = int(space.n), int(space.start), space.dtype
        self.linear = _linear(features, self.choices, _POLICY_GAIN, generator)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _gumbel((*shape, self.choices), generator)

    def draw(self, features: Tensor, noise: Tensor | None) -> Tensor:
        logits = F.linear(features, self.linear.weight, self.linear.bias)
        return (logits if noise is None else logits.add_(noise)).argmax(-1)

    def evaluate(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return _categorical(F.linear(features, self.linear.weight, self.linear.bias), actions)

    def likeliest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        logits = F.linear(features, self.linear.weight, self.linear.bias)
        probabilities, actions = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        return actions[:, :count], probabilities[:, :count]

    def to_environment(self, actions: NDArray[Any]) -> NDArray[Any]:
        return (actions + self.start if self.start else actions).astype(self.dtype, copy=False)


class _MultiCategoricalHead(nn.Module):
    """A independent choices, each with its own number of alternatives: one linear layer, split."""

    def __init__(self, space: spaces.MultiDiscrete, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.choices: list[int] = space.nvec.ravel().tolist()
        self.shape, self.start, self.dtype = space.shape, np.asarray(space.start), space.dtype
        self.linear = _linear(features, sum(self.choices), _POLICY_GAIN, generator)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _gumbel((*shape, sum(self.choices)), generator)

    def draw(self, features: Tensor, noise: Tensor | None) -> Tensor:
        logits = F.linear(features, self.linear.weight, self.linear.bias)
        logits = logits if noise is None else logits.add_(noise)
        return torch.stack([part.argmax(-1) for part in logits.split(self.choices, -1)], -1)

    def evaluate(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(features, self.linear.weight, self.linear.bias).split(self.choices, -1)
        parts = [_categorical(part, action) for part, action in zip(logits, actions.unbind(-1), strict=True)]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)

    def likeliest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        logits = F.linear(features, self.linear.weight, self.linear.bias)
        actions, joint = logits.new_zeros(len(logits), 1, 0, dtype=torch.long), logits.new_ones(len(logits), 1)
        for part in logits.split(self.choices, -1):  # the k likeliest so far with the k likeliest of the next: exact
            alone, choices = part.softmax(-1).sort(dim=-1, descending=True, stable=True)
            alone, choices = alone[:, :count], choices[:, :count]
            pairs = (joint[:, :, None] * alone[:, None, :]).flatten(1).sort(dim=-1, descending=True, stable=True)
            joint, places = pairs.values[:, :count], pairs.indices[:, :count]
            before, chosen = places // choices.shape[1], choices.gather(1, places % choices.shape[1])
            kept = actions.gather(1, before[:, :, None].expand(-1, -1, actions.shape[2]))
            actions = torch.cat([kept, chosen[:, :, None]], dim=-1)
        return actions, joint

    def to_environment(self, actions: NDArray[Any]) -> NDArray[Any]:
        return (actions.reshape(-1, *self.shape) + self.start).astype(self.dtype, copy=False)


class _GaussianHead(nn.Module):
    """A independent normals: the mean is linear in the features, the log standard deviation the same in all states."""

    def __init__(self, space: spaces.Box, features: int, config: NetworkConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.dtype, size = space.shape, space.dtype, math.prod(space.shape)
        self.linear = _linear(features, size, _POLICY_GAIN, generator)
        self.log_std = nn.Parameter(torch.full((size,), config.log_std))
        self.low, self.high = space.low, space.high
        with np.errstate(over="ignore", invalid="ignore"):
            width = self.high - self.low
            # an infinite width: a bound is missing, or both are the largest floats, which means the same
            bounded = np.isfinite(width)
            self.centre = np.where(bounded, self.low + width / 2, 0).astype(self.dtype)
            self.scale = np.where(bounded, width / 2, 1).astype(self.dtype)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn((*shape, len(self.log_std)), generator=generator, device=generator.device)

    def draw(self, features: Tensor, noise: Tensor | None) -> Tensor:
        mean = F.linear(features, self.linear.weight, self.linear.bias)
        return mean if noise is None else torch.addcmul(mean, noise, self.log_std.exp())

    def evaluate(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.linear(features, self.linear.weight, self.linear.bias)
        log_scale = self.log_std.sum() + 0.5 * len(self.log_std) * math.log(2 * math.pi)
        distance = (actions - mean) * torch.exp(-self.log_std)
        log_probs = -0.5 * distance.square().sum(-1) - log_scale
        return log_probs, (log_scale + 0.5 * len(self.log_std)).expand(len(mean))

    def likeliest(self, features: Tensor, count: int) -> None:
        """Each single action has probability 0."""

    def to_environment(self, actions: NDArray[Any]) -> NDArray[Any]:
        scaled: NDArray[Any] = actions.reshape(-1, *self.shape) * self.scale
        scaled += self.centre
        np.maximum(scaled, self.low, out=scaled)
        return np.minimum(scaled, self.high, out=scaled).astype(self.dtype, copy=False)


def _head(
    space: spaces.Space[Any], features: int, config: NetworkConfig, generator: torch.Generator
) -> _CategoricalHead | _MultiCategoricalHead | _GaussianHead:
    """The distribution over the actions of `space`."""
    if isinstance(space, spaces.Discrete):
        return _CategoricalHead(space, features, generator)
    if isinstance(space, spaces.MultiDiscrete):
        return _MultiCategoricalHead(space, features, generator)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and space.shape != (0,):
        return _GaussianHead(space, features, config, generator)
    raise UserError(f"the action space is {space}, expected Discrete, MultiDiscrete or a Box of floats")


def _categorical(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-probability of `actions` (n,) and entropy of softmax(logits), logits (n, choices)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel numbers: −log of standard exponential ones.

    Drawn in float64: the coarse steps of a float32 near 0 would cut off the tail, and rare actions with it.
    """
    exponential = torch.empty(shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    return exponential.log_().neg_().float()


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    return _initialise(nn.utils.skip_init(nn.Linear, inputs, outputs), gain, generator)


def _initialise(layer: Any, gain: float, generator: torch.Generator) -> Any:
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _scale_of(space: spaces.Box) -> Tensor:
    """What uint8 observations of this space are multiplied by, for all alike or shaped like one.

    Images by the inverse of their upper bound, so that they end at 1: 255 as a rule, 1 of a mask. Of a vector the
    components that are bytes (0 to 255), such as a memory's; a board, a one-hot vector or a count is what it says.
    """
    if space.dtype != np.uint8:
        return torch.ones(())
    high = space.high.astype(np.float32)
    if len(space.shape) == 3:
        return torch.tensor(1.0 / max(1.0, float(high.max())))
    scale = torch.from_numpy(np.where((space.low == 0) & (high == 255), np.float32(1 / 255), np.float32(1)))
    return scale.flatten()[0] if bool((scale == scale.flatten()[0]).all()) else scale


def _as_input(observations: Tensor, scale: Tensor) -> Tensor:
    """Observations as float32, uint8 ones scaled."""
    if observations.dtype == torch.float32:
        return observations
    if observations.dtype == torch.uint8:
        return observations.float().mul_(scale)
    return observations.float()


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) with `values` (n,) where the mask is True, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
