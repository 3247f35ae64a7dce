"""Text through the other door: a language policy in `ControlWorld`, its world a `TokenEnv`, stepped token by token.

The token world is an environment as any other, and the two roads through the house lead to the same place: whole
episodes of `TokenEnv` by `ControlWorld` are the trajectories that `LanguageWorld` collects, and one update from either
gives the same parameters. Tests hold the roads against each other, which share the model, the draw of one token and
the learner:

| `LanguageWorld` | `ControlWorld` with a `StepwisePolicy` |
|---|---|
| `prompts` × `samples_per_prompt` responses | as many environments, `whole_episodes`, `steps` = `max_new_tokens` |
| `missing_eos_penalty` | the argument of the same name of `TokenEnv` |
| `bootstrap_truncated=True` | a `TokenEnv` as it is: V of a truncated response's last state stands for its future |
| `bootstrap_truncated=False` | a `TokenEnv` in `LimitEnds`: a response that the limit cut off has no future |
| the reference model | a `StepwisePolicy` of it, at the same temperature, as `reference` |

To train on text, take `LimitEnds`: no step starts in the state at the limit, so its V is never learnt, and where it
stands for the future a policy can find it worth more than eos and never end.

What differs: here steps stand alone, so they and not whole responses are shuffled into minibatches, each is an episode
to `aggregation: episode`, and each reads its whole prefix, without a cache. `LanguageWorld` is the fast road for text;
this one is for environments of a user's own that speak in tokens (rewards at every token, tools, several turns). There
is no top-k and no top-p here.

N = environments, T = steps, n = states in all, L = length of an observation, V = the number of the model's logits.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from tether.control.policy import StateContext
from tether.errors import UserError
from tether.language.context import TokenContext, spread
from tether.language.likeliest import likeliest
from tether.language.policy import LanguagePolicy
from tether.language.reading import output_head, plain_layout
from tether.language.sampler import SamplingConfig, draw
from tether.ppo import Evaluation


class StepwisePolicy:
    """`tether.control.world.SteppingPolicy` of a language model: the state is a prefix, the action the next token.

    Args:
        policy: the language model and its critic; their parameters are this policy's.
        observation_space: of the environment, as `TokenEnv` has it: (L,) token ids, then V to the right.
        temperature: of the distribution that is sampled and evaluated.

    Raises:
        UserError: the observations are no token ids of this model.
    """

    def __init__(self, policy: LanguagePolicy, observation_space: spaces.Box, temperature: float = 1.0) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, expected above 0: PPO learns from sampled tokens")
        self.policy = policy
        self.temperature = temperature
        self.pad_id = output_head(policy.model).out_features
        space = observation_space
        if len(space.shape) != 1 or space.dtype.kind not in "iu" or bool((space.high != self.pad_id).any()):
            raise UserError(
                f"observation space {space}: expected token ids (L,) padded on the right with {self.pad_id}, the "
                f"number of the model's logits: make the TokenEnv with vocabulary_size={self.pad_id}"
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.policy.device

    def policy_parameters(self) -> list[nn.Parameter]:
        """Those of the causal LM."""
        return self.policy.policy_parameters()

    def value_parameters(self) -> list[nn.Parameter]:
        """Those of the critic alone."""
        return self.policy.value_parameters()

    def noise(self, steps: int, count: int, generator: torch.Generator) -> Tensor:
        """(steps, count) float64 in [0, 1): what `Sampler` draws of a generator in the same state, on the device."""
        uniforms = torch.rand(steps, count, generator=generator, dtype=torch.float64, device=generator.device)
        return uniforms.to(self.device)

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor | None) -> Tensor:
        """(N,) next tokens of the prefixes (N, L), drawn with `noise` (N,); None: the likeliest."""
        logits = self._logits(observations)
        if noise is None:
            return logits.argmax(dim=-1)
        return draw(logits, noise, SamplingConfig(temperature=self.temperature))[0]

    @torch.no_grad()
    def likeliest(self, observations: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(n, k) the likeliest next tokens of the prefixes (n, L), likeliest first, and their probabilities."""
        scaled = self._logits(observations).float() / self.temperature
        tokens = likeliest(scaled, count)[1]
        return tokens, scaled.softmax(dim=-1).gather(-1, tokens)

    def _logits(self, observations: Tensor) -> Tensor:
        """(n, V) of the token that comes after each of the prefixes (n, L)."""
        context = self._prefixes(observations)
        rows = torch.arange(len(observations), device=self.device)
        with self.policy.precision():
            return self.policy.reader.logits_at(plain_layout(context), (rows, context.starts - 1))[0]

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """(n,) V of the prefixes (n, L)."""
        context = self._prefixes(observations)
        return self.policy.successor_values(context, torch.zeros_like(context.starts))

    def evaluate(self, context: StateContext, actions: Tensor, mask: Tensor) -> Evaluation:
        """Log-probabilities, values and entropies (N, T) of the tokens `actions` (N, T); 0 where `mask` is False.

        Every step is a sequence of its own, the prefix and one response token, and costs a row of L tokens of the
        model's memory: lower the learner's `microbatch_size`, which counts steps, where that is too much.
        """
        flat = self.policy.evaluate(
            self._prefixes(context.observations[:, : mask.shape[1]][mask]),
            actions[mask].unsqueeze(1),
            torch.ones(int(mask.sum()), 1, dtype=torch.bool, device=mask.device),
        )
        return Evaluation(
            log_probs=spread(flat.log_probs, mask),
            values=spread(flat.values, mask),
            entropy=spread(flat.entropy, mask),
        )

    def to_environment(self, actions: Tensor) -> NDArray[Any]:
        """The token ids (N,) int64."""
        return actions.numpy(force=True).astype(np.int64, copy=False)

    def state_dict(self) -> dict[str, Any]:
        """Parameters of the model and its critic; one that stands in two places (tied embeddings) once."""
        tied = self._tied()
        return {name: tensor for name, tensor in self.policy.state_dict().items() if name not in tied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take these parameters.

        Raises:
            ValueError: there are others than the model has; RuntimeError: one has another shape.
        """
        found = self.policy.load_state_dict(state, strict=False)
        wrong = sorted({*found.unexpected_keys, *found.missing_keys} - self._tied())
        if wrong:
            raise ValueError(f"{len(wrong)} parameters are missing or unknown, the first is {wrong[0]}")

    def _tied(self) -> set[str]:
        every = {name for name, _ in self.policy.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self.policy.named_parameters()}

    def _prefixes(self, observations: Tensor) -> TokenContext:
        """Observations (n, L) as sequences whose response is still to come, cut to the longest."""
        known = observations != self.pad_id
        lengths = known.sum(dim=1)
        shortest, longest = torch.stack(lengths.aminmax()).tolist()
        if shortest == 0:
            raise UserError("an observation is padding alone, expected at least one token to continue")
        known = known[:, :longest]
        tokens = observations[:, :longest].masked_fill(~known, 0)  # V is no id that could be looked up
        return TokenContext(tokens, known, lengths, self.temperature)


class LimitEnds(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment in which the limit is an end: truncated steps are terminated ones, and nothing lies beyond.

    Which is how `LanguageWorld` scores a response that was cut off, unless it is told to bootstrap.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """The environment's own, but for that."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated or truncated, False, info
