"""A causal language model as a policy: its softmax is π(a|s), a scalar head on its hidden state is V(s).

It knows tokens and probabilities; it knows nothing of text, prompts or rewards.
N = episodes, T = response tokens of the longest, L = tokens of the longest sequence, n = response tokens in all,
H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.ppo import Evaluation


@dataclass(frozen=True)
class TokenContext:
    """The sequences in which responses stand, and how their tokens were drawn.

    Attributes:
        tokens: (N, L) token ids, prompt and response, padded on either side.
        attention_mask: (N, L) bool, False at padding.
        starts: (N,) column of each response's first token.
        temperature: of the distribution that was sampled.
        support: (N, T) number of tokens that top-k and top-p left to draw from, or None where all were.
    """

    tokens: Tensor
    attention_mask: Tensor
    starts: Tensor
    temperature: float = 1.0
    support: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each sequence, padding excluded."""
        return self.attention_mask.sum(dim=1)

    def select(self, rows: Tensor) -> TokenContext:
        """These rows, without the columns in which all of them are padded."""
        mask = self.attention_mask[rows]
        used = mask.any(dim=0).nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return replace(
            self,
            tokens=self.tokens[rows, first:last],
            attention_mask=mask[:, first:last],
            starts=self.starts[rows] - first,
            support=None if self.support is None else self.support[rows],
        )

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        temperature: float = 1.0,
        support: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenContext:
        """Sequences set flush left: prompt, response, padding. Padding holds id 0, which nothing ever reads."""
        sequences = [torch.tensor([*p, *r], dtype=torch.long) for p, r in zip(prompts, responses, strict=True)]
        lengths = torch.tensor([len(s) for s in sequences])
        tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        starts = torch.tensor([len(p) for p in prompts])
        return cls(tokens.to(device), mask.to(device), starts.to(device), temperature, support)


@dataclass(frozen=True)
class Critic:
    """Values to start from: V(s) = weight · h(s) + bias, where h is the last hidden state of `trunk`.

    Attributes:
        trunk: a transformers model without a head, over the policy's tokens.
        weight: (H,) float32.
        bias: a number.
    """

    trunk: PreTrainedModel
    weight: Tensor
    bias: float


class LanguagePolicy(nn.Module):
    """`tether.ppo.ActorCritic` over a transformers causal LM.

    Args:
        model: any transformers causal LM; evaluation mode is set, so that dropout is off.
        separate_value_trunk: give the critic a copy of the trunk instead of a head on the policy's. What is frozen in
            the model, as under adapters, the two share.
        critic: the critic to start from, trunk and head, instead.
    """

    def __init__(
        self, model: PreTrainedModel, separate_value_trunk: bool = False, critic: Critic | None = None
    ) -> None:
        super().__init__()
        self.model = model
        head = output_head(model)
        self.value_trunk = None if critic is None else critic.trunk
        if critic is None and separate_value_trunk:
            frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
            self.value_trunk = copy.deepcopy(model.base_model, frozen)
        size = head.in_features if critic is None else len(critic.weight)
        # float32 whatever the trunk's precision; zero, so that the first value of every state is 0
        self.value_head = nn.Linear(size, 1, device=head.weight.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if critic is not None:
            with torch.no_grad():
                self.value_head.weight.copy_(critic.weight[None])
                self.value_head.bias.fill_(critic.bias)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.value_head.weight.device

    def policy_parameters(self) -> list[nn.Parameter]:
        """Those of the causal LM, which the critic may share."""
        return list(self.model.parameters())

    def value_parameters(self) -> list[nn.Parameter]:
        """The value head's, and those of the critic's own trunk where it has one."""
        trunk = [] if self.value_trunk is None else list(self.value_trunk.parameters())
        return trunk + list(self.value_head.parameters())

    def critic_parameters(self, trained: bool = True) -> dict[str, nn.Parameter]:
        """What is trained of the critic alone, or else what is frozen of it, by name."""
        own = {name: parameter for name, parameter in self.named_parameters() if name.startswith("value_")}
        return {name: parameter for name, parameter in own.items() if parameter.requires_grad == trained}

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Stays in evaluation mode: dropout would make the ratio of new to old probabilities noise."""
        super().train(False)
        return self

    def evaluate(self, context: TokenContext, actions: Tensor, mask: Tensor) -> Evaluation:
        """Log-probabilities, values and entropies (N, T) of `actions` (N, T); logits exist at response tokens only."""
        rows, steps = mask.nonzero(as_tuple=True)
        before = context.starts[rows] + steps - 1  # the hidden state that predicts a token is one to its left
        logits, hidden = logits_at(self.model, context, rows, before)
        if self.value_trunk is not None:
            hidden = self._trunk_states(context)[rows, before]
        support = None if context.support is None else context.support[rows, steps]
        log_probs, entropy = action_log_probs(logits, actions[rows, steps], context.temperature, support)
        return Evaluation(
            log_probs=_spread(log_probs, mask),
            values=_spread(self.values_of(hidden), mask),
            entropy=_spread(entropy, mask),
        )

    def values_of(self, hidden: Tensor) -> Tensor:
        """(…,) values of hidden states (…, H), in float32."""
        return self.value_head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def successor_values(self, context: TokenContext, lengths: Tensor) -> Tensor:
        """(N,) values of the states that follow the last response token; `lengths` (N,) counts response tokens."""
        rows = torch.arange(len(lengths), device=self.device)
        columns = context.starts + lengths - 1
        if self.value_trunk is not None:
            return self.values_of(self._trunk_states(context)[rows, columns])
        return self.values_of(logits_at(self.model, context, rows, columns)[1])

    def _trunk_states(self, context: TokenContext) -> Tensor:
        assert self.value_trunk is not None
        return self.value_trunk(**model_inputs(context), use_cache=False).last_hidden_state  # (N, L, H)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into logits. Raises TypeError where it is no linear layer."""
    head: Any = model.get_output_embeddings()
    if not isinstance(getattr(head, "base_layer", head), nn.Linear):  # the first where it has an adapter
        raise TypeError(f"{type(model).__name__} has no linear output layer, expected a causal language model")
    return head


def model_inputs(context: TokenContext) -> dict[str, Tensor]:
    """Keyword arguments of a transformers forward pass.

    Padding on the right alone needs no mask, for no token sees what stands to its right; attention is fastest then.
    """
    mask = context.attention_mask
    inputs = {"input_ids": context.tokens}
    if not bool(mask[:, 0].all()):
        inputs["attention_mask"] = mask.long()
        inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def logits_at(model: PreTrainedModel, context: TokenContext, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and the hidden states (n, H) they come from, at the given places of a full forward pass."""
    with _head_reads(model, lambda hidden: hidden[rows, columns]) as seen:
        logits = model(**model_inputs(context), use_cache=False).logits
    return logits, seen[0]


@contextmanager
def _head_reads(model: PreTrainedModel, choose: Any) -> Iterator[list[Tensor]]:
    """Within this context the output layer of `model` reads only the hidden states (N, L, H) that `choose` returns.

    They are put into the list that is yielded. Whatever the model does to its logits afterwards (scaling, capping)
    is done to the chosen ones, so that this holds for every architecture.
    """
    seen: list[Tensor] = []

    def replace_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(choose(arguments[0]))
        return (seen[0],)

    handle = output_head(model).register_forward_pre_hook(replace_input)
    try:
        yield seen
    finally:
        handle.remove()


def decode_step(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Logits (N, V) and hidden states (N, H) of the last column, and the cache, grown by the columns of `inputs`."""
    with _head_reads(model, lambda hidden: hidden[:, -1]) as seen:
        output = model(**inputs, use_cache=True)
    return output.logits, seen[0], output.past_key_values


def action_log_probs(
    logits: Tensor, actions: Tensor, temperature: float, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each action (n,) and entropy (n,) of softmax(logits / temperature), in float32.

    With `support` (n,) only so many of the likeliest tokens share the probability, the action always being one of them:
    the distribution that top-k and top-p left at sampling time, which keeps the action possible while π moves.
    """
    scaled = logits.float() / temperature
    if support is not None:
        scaled = keep_likeliest(scaled, support, actions)
    log_probs = torch.log_softmax(scaled, dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy


def keep_likeliest(logits: Tensor, support: Tensor, actions: Tensor | None = None) -> Tensor:
    """(n, V) logits, −inf but for the `support` (n,) largest of each row and for `actions` (n,) where given."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    )
    kept = rank < support[:, None]
    if actions is not None:
        # an action that has fallen out takes the place of the last: no jump where two tokens change places, be it by
        # learning or by rounding alone
        missing = ~kept.gather(-1, actions[:, None])
        kept = kept & ~(missing & (rank == support[:, None] - 1))
        kept = kept.scatter(-1, actions[:, None], True)
    return logits.masked_fill(~kept, -torch.inf)


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(n,) values of the valid steps, in row order, laid out as (N, T) with 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
