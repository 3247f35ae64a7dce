"""Rotary positions whose frequencies depend on the longest sequence of a pass: one set of them for a whole run.

Long-rope models (Phi-3 and later) have a set for short sequences and one for long ones, dynamic NTK scaling one for
each length. transformers chooses anew in every pass, by the longest row: a key that is cached under one set is then
compared with queries of another, and a long row changes what its neighbours are read as.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_STILL = "default"  # a kind that transformers does not compute anew


def settle_positions(models: Iterable[nn.Module], longest: int) -> None:
    """Let models read every sequence with the frequencies that transformers takes for one of `longest` tokens.

    Called again with more tokens, it settles on those; with fewer, it changes nothing. Models whose frequencies are
    fixed are left alone, and so is what `save_pretrained` writes.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for model in models:
        switched = None
        for module in _rotary(model):
            settled: int | None = module.__dict__.get("settled_for")
            if settled is not None and settled >= longest:
                continue
            for layer, kind in _moving_kinds(module).items():
                prefix = "" if layer is None else f"{layer}_"
                device = getattr(module, f"{prefix}inv_freq").device
                options = {} if layer is None else {"layer_type": layer}
                frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=longest, **options)
                setattr(module, f"{prefix}inv_freq", frequencies)
                setattr(module, f"{prefix}attention_scaling", scaling)
                parameters = _parameters(module, layer)
                edge = _edge(module, layer)
                _settle_scales(module, parameters, longest > edge)
                if longest > edge and (settled or 0) <= edge:
                    switched = (kind, edge)
            _still(module, longest)
        if switched is not None:
            kind, edge = switched
            logger.info(
                "positions: sequences may have %s tokens, more than the original context of %s: all are read with the "
                "%s frequencies for long ones, short ones too",
                f"{longest:,}",
                f"{edge:,}",
                kind,
            )


def frequency_edge(model: nn.Module) -> int | None:
    """The length beyond which a model reads with other frequencies; None where it has one set, or has been settled."""
    edges = [
        _edge(module, layer)
        for module in _rotary(model)
        if "settled_for" not in module.__dict__
        for layer in _moving_kinds(module)
    ]
    return min(edges, default=None)


def _rotary(model: nn.Module) -> Iterator[Any]:
    """The modules that turn positions into angles by frequencies that depend on length."""
    for module in model.modules():
        if hasattr(module, "rope_type") and _moving_kinds(module):
            yield module


def _moving_kinds(module: Any) -> dict[str | None, str]:
    """Kind of each set that depends on length, by the type of layer that it is for; None: for all layers."""
    kinds = module.__dict__.get("kinds_before", module.rope_type)
    named = kinds if isinstance(kinds, dict) else {None: kinds}
    return {layer: kind for layer, kind in named.items() if kind == "longrope" or "dynamic" in str(kind)}


def _parameters(module: Any, layer: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = module.config.rope_parameters
    return parameters if layer is None else parameters[layer]


def _edge(module: Any, layer: str | None) -> int:
    own = _parameters(module, layer).get("original_max_position_embeddings")
    if own is None or "dynamic" in _moving_kinds(module)[layer]:
        own = module.config.max_position_embeddings
    return int(own)


def _settle_scales(module: Any, parameters: dict[str, Any], long: bool) -> None:
    """PhiMoE multiplies its angles by a factor that it looks up in its configuration by the length of the pass."""
    if "long_mscale" not in parameters:
        return
    original: Any = module.__dict__.setdefault("config_before", module.config)
    scale = original.rope_parameters["long_mscale" if long else "short_mscale"]
    module.config = copy.deepcopy(original)
    module.config.rope_parameters = {**original.rope_parameters, "long_mscale": scale, "short_mscale": scale}


def _still(module: Any, longest: int) -> None:
    """Have transformers leave the frequencies as they are."""
    kinds = module.__dict__.setdefault("kinds_before", module.rope_type)
    module.rope_type = dict.fromkeys(kinds, _STILL) if isinstance(kinds, dict) else _STILL
    module.settled_for = longest
