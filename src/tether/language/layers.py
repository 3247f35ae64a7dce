"""How the layers of a transformers model run while it learns; what they compute stays the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"  # of torch.compile


@contextmanager
def checkpointed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within this context layers compute their activations again in the backward pass instead of keeping them.

    transformers does this in training mode only, which turns dropout on; here the model stays in evaluation mode.
    """
    layers = _layers(model)
    forward = {
        layer: functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        for layer in layers
    }
    with _replaced(forward):
        yield


class LearningLayers:
    """How the layers of a model run where gradients are wanted.

    Args:
        model: whose layers.
        checkpointing: they compute their activations again in the backward pass instead of keeping them.
        compiled: they run through `torch.compile`, each compiled by itself: far sooner done than the whole.
    """

    def __init__(self, model: PreTrainedModel, checkpointing: bool, compiled: bool) -> None:
        self.model, self.checkpointing, self.compiled = model, checkpointing, compiled
        self._compiled: dict[nn.Module, Callable[..., Any]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LearningLayers:
        return LearningLayers(copy.deepcopy(self.model, memo), self.checkpointing, self.compiled)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context they run so, unless gradients are off."""
        with ExitStack() as stack:
            if torch.is_grad_enabled():
                if self.compiled:
                    stack.enter_context(_replaced(self._compile()))
                if self.checkpointing:
                    stack.enter_context(checkpointed_layers(self.model))
            yield

    def _compile(self) -> dict[nn.Module, Callable[..., Any]]:
        if self._compiled is None:
            self._compiled = {
                layer: torch.compile(layer.forward, dynamic=True, backend=BACKEND) for layer in _layers(self.model)
            }
        return self._compiled


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _replaced(forward: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within this context these modules run these functions instead of their own forward pass."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forward}
    for module, function in forward.items():
        module.forward = function
    try:
        yield
    finally:
        for module, function in before.items():
            del module.forward  # uncovers the method of the class
            if function is not None:
                module.forward = function
