"""A causal language model as a policy: its softmax is π(a|s), a scalar head on its hidden state is V(s).

It knows tokens and probabilities; it knows nothing of text, prompts or rewards.
N = episodes, T = response tokens of the longest, n = response tokens in all, H = hidden size.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.language.context import TokenContext, spread
from tether.language.layers import LearningLayers
from tether.language.norms import use_fast_norms
from tether.language.products import bfloat16_products, use_fast_products
from tether.language.reading import Layout, Reader, output_head, plain_layout
from tether.ppo import Evaluation


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
        autocast: multiply matrices in bfloat16. Parameters, logits, log-probabilities and values stay float32.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        compiled: run the layers through `torch.compile` in `evaluate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        separate_value_trunk: bool = False,
        critic: Critic | None = None,
        autocast: bool = False,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
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
        self.reader = Reader(model, checkpointing, compiled)
        if self.value_trunk is not None:
            use_fast_products(self.value_trunk)
            use_fast_norms(self.value_trunk)
            self._trunk_layers = LearningLayers(self.value_trunk, checkpointing, compiled)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.value_head.weight.device

    def models(self) -> list[PreTrainedModel]:
        """The causal LM, and the critic's own trunk where it has one."""
        return [self.model] if self.value_trunk is None else [self.model, self.value_trunk]

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

    @property
    def exact(self) -> bool:
        """Whether weights and products are float32."""
        return not self.autocast and all(p.dtype == torch.float32 for p in self.model.parameters())

    @property
    def numbers(self) -> str:
        """What the model computes in, as messages call it."""
        coarse = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.dtype != torch.float32}
        products = " with matrix products in bfloat16" if self.autocast else ""
        return f"{' and '.join(sorted(coarse)) or 'float32'}{products}"

    def precision(self) -> AbstractContextManager[None]:
        """The context in which matrices are multiplied as the policy multiplies them."""
        return bfloat16_products(self.device, self.autocast)

    def evaluate(self, context: TokenContext, actions: Tensor, mask: Tensor) -> Evaluation:
        """Log-probabilities, values and entropies (N, T) of `actions` (N, T)."""
        layout = self.reader.layout(context)
        with self.precision():
            reading = self.reader.read(context, actions, mask, layout)
            hidden = reading.hidden
            if self.value_trunk is not None:
                rows, steps = mask.nonzero(as_tuple=True)
                own = self._critics_layout(context, layout)
                hidden = self._trunk_states(own)[own.before(context, rows, steps)]
        return Evaluation(
            log_probs=spread(reading.log_probs, mask),
            values=spread(self.values_of(hidden), mask),
            entropy=spread(reading.entropy, mask),
        )

    def values_of(self, hidden: Tensor) -> Tensor:
        """(…,) values of hidden states (…, H), in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def successor_values(self, context: TokenContext, lengths: Tensor) -> Tensor:
        """(N,) values of the states that follow the last response token; `lengths` (N,) counts response tokens."""
        rows = torch.arange(len(lengths), device=self.device)
        layout = self.reader.layout(context)
        with self.precision():
            if self.value_trunk is None:
                hidden = self.reader.hidden_at(layout, layout.before(context, rows, lengths))
            else:
                own = self._critics_layout(context, layout)
                hidden = self._trunk_states(own)[own.before(context, rows, lengths)]
        return self.values_of(hidden)

    def _critics_layout(self, context: TokenContext, layout: Layout) -> Layout:
        """The policy's where the critic's trunk is of the same kind, of which alone it is known whether it packs."""
        return layout if type(self.value_trunk) is type(self.model.base_model) else plain_layout(context)

    def _trunk_states(self, layout: Layout) -> Tensor:
        assert self.value_trunk is not None
        with self._trunk_layers.in_use():
            return self.value_trunk(**layout.inputs, use_cache=False).last_hidden_state  # rows, columns, H
