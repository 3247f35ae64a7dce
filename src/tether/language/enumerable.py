"""A world of text so small that every response can be listed: J(π), J*, π* and every prefix's value are exact numbers.

The objective is J(π) = E_π[r(x, y)] − β·KL(π‖π_ref), averaged over the prompts. Its optimum is known in closed form,
π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) with J* = β·log E_ref[exp(r/β)] (Rafailov et al. 2023, eq. 4; Korbak et al. 2022),
so this world says how much of the possible gain a trained policy has got and how wrong its critic is. It knows
nothing of models or training: a policy is a function from prefixes to next-token log-probabilities.

P = prompts, V = vocabulary size, T = max_new_tokens, R = responses, n = (V − 1)ᵗ prefixes of t tokens without eos.
All results are float64 on the CPU. A per-prefix quantity is a list over t = 0 … T−1 of tensors (P, n) or (P, n, V):
the n prefixes of a level stand in lexicographic order, so the children of prefix i are the rows
i·(V − 1) … (i + 1)·(V − 1) − 1 of the next level and a reshape moves between levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tether.errors import RewardError, UserError

Levels = list[Tensor]
"""One tensor per prefix length, (P, n) or (P, n, V)."""

MAX_RESPONSES = 4_000_000
"""Above this many responses (over all prompts) the tables outgrow a laptop's memory."""

LOG_PROB_TOLERANCE = 1e-3
"""How far probabilities may sum from 1: float32 and bfloat16 softmaxes pass, unnormalised logits do not."""


@dataclass(frozen=True)
class Optimum:
    """The best policy of the world for a reference policy, and the two ends of the scale that J(π) is read on.

    Attributes:
        objective: (P,), J* = β·log E_ref[exp(r/β)] of each prompt.
        reference_objective: (P,), J(π_ref) = E_ref[r] of each prompt.
        log_probs: levels (P, n, V), π*(a|s).
        values: levels (P, n), V*(s): score to come minus β·KL of the tokens to come, under π*.
        q_values: levels (P, n, V), r + V*(s'): what follows the token, without the KL term of the token itself.
        reference_log_probs: levels (P, n, V), π_ref(a|s).
    """

    objective: Tensor
    reference_objective: Tensor
    log_probs: Levels
    values: Levels
    q_values: Levels
    reference_log_probs: Levels


@dataclass(frozen=True)
class ExactEvaluation:
    """Everything there is to know of one policy in this world.

    Attributes:
        objective: (P,), J(π) of each prompt, summed over its responses.
        score: (P,), E_π[r].
        kl_to_reference: (P,), KL(π‖π_ref) over responses.
        kl_to_optimum: (P,), KL(π‖π*) over responses; J* − J(π) = β·KL(π‖π*).
        gap_closed: (J(π) − J(π_ref)) / (J* − J(π_ref)), prompts averaged; nan where there is no gap to close.
        log_probs: levels (P, n, V), π(a|s), normalised.
        response_log_probs: (P, R), π(y|x), in the order of `EnumerableWorld.responses`.
        reach: levels (P, n), probability that the policy comes by this prefix.
        values: levels (P, n), V^π(s): what PPO's critic learns with γ = 1 and the KL term in the reward. The terms of
            this token and of those after it are inside, those of past tokens are not.
        q_values: levels (P, n, V), reward of the token (its KL term included) + V^π(s').
        advantages: levels (P, n, V), Q^π − V^π; zero on average under π. Without meaning (infinite
            or nan) for tokens that π never draws.
    """

    objective: Tensor
    score: Tensor
    kl_to_reference: Tensor
    kl_to_optimum: Tensor
    gap_closed: float
    log_probs: Levels
    response_log_probs: Tensor
    reach: Levels
    values: Levels
    q_values: Levels
    advantages: Levels


@dataclass(frozen=True)
class CriticError:
    """Mean absolute difference between a critic and the exact values.

    Attributes:
        uniform: over all prefixes of all prompts, each counted once.
        visited: prefixes weighted by how often the policy comes by them.
    """

    uniform: float
    visited: float


class EnumerableWorld:
    """All responses to a few prompts over a small vocabulary, with their rewards.

    A response ends with eos (terminated) or at T tokens (truncated); both are scored by `reward`.

    Attributes:
        responses: (R, T) int, token ids of every response, −1 after its end. The same for all prompts.
        response_lengths: (R,) int, eos included.
        terminated: (R,) bool, ends with eos.
        rewards: (P, R), r(x, y).
        prefixes: list over t of (n, t) int, the response tokens of every state of that level.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        vocabulary_size: int,
        eos_token_id: int,
        max_new_tokens: int,
        reward: Callable[[int, Sequence[int]], float],
        beta: float,
    ) -> None:
        """List the world's responses and score each once.

        Args:
            prompts: token ids of each prompt; all prompts count the same.
            vocabulary_size: V, eos included: every response is made of the ids 0 … V−1.
            eos_token_id: the token that ends a response.
            max_new_tokens: T, eos included.
            reward: gives the prompt's index and the response's token ids a finite score.
            beta: weight of the KL penalty, positive.

        Raises:
            UserError: an argument is out of its range, or the world is too large to enumerate.
            RewardError: a score is not a finite number.
        """
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.vocabulary_size = vocabulary_size
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.beta = beta
        self._check()
        self._continuations = torch.tensor([token for token in range(vocabulary_size) if token != eos_token_id])
        self.prefixes = self._list_prefixes()
        self.responses, self.response_lengths = self._list_responses()
        last = self.responses.gather(1, self.response_lengths[:, None] - 1).squeeze(1)
        self.terminated = last == eos_token_id
        self.rewards = self._score(reward)

    # ---- what a policy or a critic says of every prefix -------------------------------------------------------------

    @torch.no_grad()
    def tabulate(self, function: Callable[[Tensor], Tensor], batch_size: int = 4096) -> Levels:
        """What `function` says of every prefix: a tensor (B, L) of token ids, prompt included, to (B,) or (B, V).

        Prompts of the same length share a batch; no padding is ever in it. Ids are on the CPU.
        """
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            by_length.setdefault(len(prompt), []).append(index)
        order = torch.tensor([index for indices in by_length.values() for index in indices])
        levels = []
        for prefixes in self.prefixes:
            parts = []
            for indices in by_length.values():
                heads = torch.tensor([self.prompts[index] for index in indices], dtype=torch.long)  # (p, L)
                tokens = torch.cat(
                    [heads.repeat_interleave(len(prefixes), dim=0), prefixes.repeat(len(indices), 1)], dim=1
                )
                out = torch.cat([function(batch).detach().cpu().double() for batch in torch.split(tokens, batch_size)])
                parts.append(out.reshape(len(indices), len(prefixes), *out.shape[1:]))
            levels.append(torch.cat(parts)[order.argsort()])
        return levels

    def tabulate_log_probs(self, log_probs: Callable[[Tensor], Tensor], batch_size: int = 4096) -> Levels:
        """The policy at every prefix: `log_probs` maps token ids (B, L) to next-token log-probabilities (B, V).

        They are normalised again in float64, so that what is exact in the algebra is exact in the numbers.

        Raises:
            UserError: the function does not return log-probabilities of this world's V tokens.
        """
        levels = self.tabulate(log_probs, batch_size)
        for length, level in enumerate(levels):
            if level.dim() != 3 or level.shape[-1] != self.vocabulary_size:
                raise UserError(
                    f"log_probs: found shape (B, {', '.join(map(str, level.shape[2:]))}) for prefixes of {length} "
                    f"tokens, expected (B, {self.vocabulary_size})"
                )
            total = level.logsumexp(dim=-1)
            if not bool((total.abs() <= LOG_PROB_TOLERANCE).all()):
                worst = float(total.flatten()[total.abs().nan_to_num(torch.inf).argmax()].exp())
                raise UserError(
                    f"log_probs: found probabilities that sum to {worst:.4g} after {length} tokens, expected 1; "
                    "apply log_softmax"
                )
        return [level - level.logsumexp(dim=-1, keepdim=True) for level in levels]

    def prefix_index(self, tokens: Tensor) -> Tensor:
        """(N,) int: where these response prefixes (N, t), free of eos, stand in level t."""
        rank = torch.full((self.vocabulary_size,), -1, dtype=torch.long)
        rank[self._continuations] = torch.arange(self.vocabulary_size - 1)
        index = torch.zeros(len(tokens), dtype=torch.long)
        for digit in rank[tokens].unbind(dim=1):
            if bool((digit < 0).any()):
                raise ValueError("a prefix contains eos: it is a whole response, not a state")
            index = index * (self.vocabulary_size - 1) + digit
        return index

    # ---- the exact numbers ------------------------------------------------------------------------------------------

    def optimum(self, reference_log_probs: Levels) -> Optimum:
        """π*, V* and J* for this reference policy, by the soft Bellman equation from the last level to the first.

        V*(s) = β·log Σ_a π_ref(a|s)·exp(Q*(s, a)/β) and π*(a|s) = π_ref(a|s)·exp((Q*(s, a) − V*(s))/β), where
        Q*(s, a) is the score if the token ends the response, else V* of the longer prefix.
        """
        values: Levels = []
        q_values: Levels = []
        log_probs: Levels = []
        for length in reversed(range(self.max_new_tokens)):
            reference = reference_log_probs[length]
            future = self._after(length, values[0] if values else None)
            exponents = reference + future / self.beta
            normaliser = exponents.logsumexp(dim=-1)
            values.insert(0, self.beta * normaliser)
            q_values.insert(0, future)
            log_probs.insert(0, exponents - normaliser[..., None])
        probabilities = self.response_log_probs(reference_log_probs).exp()
        return Optimum(
            objective=values[0][:, 0],
            reference_objective=(probabilities * self.rewards).sum(dim=1),
            log_probs=log_probs,
            values=values,
            q_values=q_values,
            reference_log_probs=reference_log_probs,
        )

    def evaluate(self, log_probs: Levels, optimum: Optimum) -> ExactEvaluation:
        """The exact numbers of the policy with these next-token log-probabilities (of `tabulate_log_probs`)."""
        policy = self.response_log_probs(log_probs)
        score = _expectation(policy, self.rewards)
        kl_to_reference = _expectation(policy, policy - self.response_log_probs(optimum.reference_log_probs))
        kl_to_optimum = _expectation(policy, policy - self.response_log_probs(optimum.log_probs))
        objective = score - self.beta * kl_to_reference
        start = float(optimum.reference_objective.mean())
        gap = float(optimum.objective.mean()) - start
        values, q_values = self._policy_values(log_probs, optimum.reference_log_probs)
        return ExactEvaluation(
            objective=objective,
            score=score,
            kl_to_reference=kl_to_reference,
            kl_to_optimum=kl_to_optimum,
            gap_closed=(float(objective.mean()) - start) / gap if gap > 0 else math.nan,
            log_probs=log_probs,
            response_log_probs=policy,
            reach=[level.exp() for level in self._reach_log_probs(log_probs)],
            values=values,
            q_values=q_values,
            advantages=[q - value[..., None] for q, value in zip(q_values, values, strict=True)],
        )

    def critic_error(self, critic: Levels, evaluation: ExactEvaluation) -> CriticError:
        """How far a critic, tabulated as levels (P, n), is from the exact V^π of an evaluated policy."""
        error = torch.cat([(c - v).abs() for c, v in zip(critic, evaluation.values, strict=True)], dim=1)
        reach = torch.cat(evaluation.reach, dim=1)
        return CriticError(uniform=float(error.mean()), visited=float((error * reach).sum() / reach.sum()))

    def response_log_probs(self, log_probs: Levels) -> Tensor:
        """(P, R): log π(y|x) of every response, in the order of `responses`."""
        joint = [
            reach[..., None] + level for reach, level in zip(self._reach_log_probs(log_probs), log_probs, strict=True)
        ]
        ended = [level[..., self.eos_token_id] for level in joint[:-1]]
        return torch.cat([*ended, joint[-1].flatten(start_dim=1)], dim=1)

    # ---- how it is done ---------------------------------------------------------------------------------------------

    def _reach_log_probs(self, log_probs: Levels) -> Levels:
        levels = [log_probs[0].new_zeros(len(self.prompts), 1)]
        for level in log_probs[:-1]:
            step = levels[-1][..., None] + level[..., self._continuations]
            levels.append(step.flatten(start_dim=1))
        return levels

    def _after(self, length: int, next_values: Tensor | None) -> Tensor:
        """(P, n, V): what follows each token at prefixes of this length: the score at an end, else V of the child."""
        prompts, prefixes = len(self.prompts), len(self.prefixes[length])
        start = sum(len(level) for level in self.prefixes[:length])
        if next_values is None:
            return self.rewards[:, start:].reshape(prompts, prefixes, self.vocabulary_size)
        after = self.rewards.new_empty(prompts, prefixes, self.vocabulary_size)
        after[..., self.eos_token_id] = self.rewards[:, start : start + prefixes]
        after[..., self._continuations] = next_values.reshape(prompts, prefixes, self.vocabulary_size - 1)
        return after

    def _policy_values(self, log_probs: Levels, reference_log_probs: Levels) -> tuple[Levels, Levels]:
        values: Levels = []
        q_values: Levels = []
        for length in reversed(range(self.max_new_tokens)):
            penalty = self.beta * (log_probs[length] - reference_log_probs[length])
            q_values.insert(0, self._after(length, values[0] if values else None) - penalty)
            values.insert(0, _expectation(log_probs[length], q_values[0]))
        return values, q_values

    def _list_prefixes(self) -> list[Tensor]:
        levels = [torch.zeros(1, 0, dtype=torch.long)]
        for _ in range(self.max_new_tokens - 1):
            parents = levels[-1].repeat_interleave(len(self._continuations), dim=0)
            tokens = self._continuations.repeat(len(levels[-1]))
            levels.append(torch.cat([parents, tokens[:, None]], dim=1))
        return levels

    def _list_responses(self) -> tuple[Tensor, Tensor]:
        blocks = [
            torch.cat([level, torch.full((len(level), 1), self.eos_token_id)], dim=1) for level in self.prefixes[:-1]
        ]
        last = self.prefixes[-1].repeat_interleave(self.vocabulary_size, dim=0)
        any_token = torch.arange(self.vocabulary_size).repeat(len(self.prefixes[-1]))
        blocks.append(torch.cat([last, any_token[:, None]], dim=1))
        lengths = torch.cat([torch.full((len(block),), block.shape[1]) for block in blocks])
        padded = [torch.nn.functional.pad(b, (0, self.max_new_tokens - b.shape[1]), value=-1) for b in blocks]
        return torch.cat(padded), lengths

    def _score(self, reward: Callable[[int, Sequence[int]], float]) -> Tensor:
        responses = [
            row[:length] for row, length in zip(self.responses.tolist(), self.response_lengths.tolist(), strict=True)
        ]
        scores = torch.empty(len(self.prompts), len(responses), dtype=torch.float64)
        for prompt in range(len(self.prompts)):
            found = [reward(prompt, response) for response in responses]
            for response, score in zip(responses, found, strict=True):
                if not isinstance(score, int | float | np.integer | np.floating) or not math.isfinite(score):
                    raise RewardError(
                        f"reward of prompt {prompt}, response {response}: found {score!r}, expected one finite number"
                    )
            scores[prompt] = torch.tensor([float(score) for score in found], dtype=torch.float64)
        return scores

    def _check(self) -> None:
        size = self.vocabulary_size
        if size < 2:
            raise UserError(f"vocabulary_size: found {size}, expected 2 or more")
        if not 0 <= self.eos_token_id < size:
            raise UserError(f"eos_token_id: found {self.eos_token_id}, expected 0 to {size - 1}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: found {self.max_new_tokens}, expected 1 or more")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"beta: found {self.beta}, expected a positive number")
        if not self.prompts or not all(self.prompts):
            raise UserError("prompts: found none or an empty one, expected at least one, each with a token or more")
        responses = sum((size - 1) ** t for t in range(self.max_new_tokens)) + (size - 1) ** self.max_new_tokens
        if responses * len(self.prompts) > MAX_RESPONSES:
            raise UserError(
                f"world: found {responses * len(self.prompts):,} responses, expected at most {MAX_RESPONSES:,}; "
                "lower max_new_tokens, vocabulary_size or the number of prompts"
            )


def _expectation(log_probs: Tensor, quantity: Tensor) -> Tensor:
    """Σ p·q over the last dimension, with 0·∞ = 0: what has no probability adds nothing."""
    return torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * quantity).sum(dim=-1)
