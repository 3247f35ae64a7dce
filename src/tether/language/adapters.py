"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha / rank)·B A x, A and B alone trained.

A model with adapters stays the transformers model that it was, by the adapters that peft puts into it; folders of
adapters are those that peft reads and writes. It knows nothing of how a base model is loaded.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tether.adapter_folders import (
    CONFIG_FILE,
    POLICY,
    PREFIX,
    REFERENCE,
    WEIGHTS_FILE,
    adapter_weights,
    base_of,
    ends,
    has_adapters,
    is_adapter,
    merge_adapters,
    put_adapters,
    read_adapters,
    read_weights,
)
from tether.errors import UserError
from tether.pretrained import restore_outputs, without_bars

__all__ = [
    "POLICY",
    "REFERENCE",
    "LoRAConfig",
    "adapter_weights",
    "base_of",
    "copy_adapters",
    "describe_adapters",
    "give_adapters",
    "has_adapters",
    "in_reference",
    "is_adapter",
    "merge_adapters",
    "read_adapters",
    "read_weights",
    "save_model",
    "using",
]


@dataclass(frozen=True)
class LoRAConfig:
    """Training of low-rank adapters beside the weights, which stay as they are (LoRA, Hu et al. 2021)."""

    rank: int = 0
    """Rank of each adapter. 0: no adapters, all of the model is trained."""
    alpha: float = 32.0
    """The adapters' output is multiplied by alpha / rank. 32: Schulman et al. 2025, "LoRA Without Regret". Learning
    rates are some ten times those of full training."""
    target_modules: tuple[str, ...] = ()
    """Ends of the names of the layers that get one, such as q_proj v_proj. Empty: every linear layer but the output
    head (Dettmers et al. 2023)."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, expected 1 or more, or 0 for none")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, expected a number above 0")
        if self.target_modules and not self.rank:
            raise ValueError("target_modules is set, but rank is 0, so that there are no adapters; set rank")


def give_adapters(model: PreTrainedModel, config: LoRAConfig, folder: str | None = None) -> PreTrainedModel:
    """Give a model adapters to be trained, and freeze its own weights.

    New ones change nothing yet: B is 0, A drawn from torch's global generator. They are float32 whatever the precision
    of the model.

    Args:
        model: a plain model.
        config: their rank, and more of new ones.
        folder: holds adapters of this model that are trained on, with their own `alpha` and layers. None: new ones.

    Raises:
        UserError: the model has adapters already, or no layer of the names in `target_modules`; those of the folder
            cannot be read, or have another rank.
    """
    from peft import LoraConfig

    if has_adapters(model):
        raise UserError("lora.rank is set, but the model has adapters already; expected one without")
    if folder is not None:
        _check_read(read_adapters(model, folder), config, folder)
        return model
    _check_targets(model, config.target_modules)
    targets = list(config.target_modules) or "all-linear"
    alpha: Any = config.alpha  # declared as int by peft, which only divides it
    routers = None if config.target_modules else _routers(model) or None
    put_adapters(
        model,
        LoraConfig(
            r=config.rank, lora_alpha=alpha, target_modules=targets, exclude_modules=routers, task_type="CAUSAL_LM"
        ),
    )
    _check_tied(model, "lora.target_modules")
    return model


def _routers(model: PreTrainedModel) -> list[str]:
    """Names of linear layers that compute more than a product, such as the routers of some mixtures of experts."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and type(layer).forward is not nn.Linear.forward
        and type(layer).__module__.startswith("transformers.models.")
    ]


def _check_read(model: PreTrainedModel, config: LoRAConfig, folder: str) -> None:
    """Adapters that are trained on must have a twin in the reference, and must be all that is trained."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    merge = (
        f"merge them: `tether export --model {folder} --output FOLDER`, and give FOLDER adapters of its own, or train "
        "on without lora.rank"
    )
    theirs = model.peft_config[POLICY]
    kind = getattr(theirs.peft_type, "value", theirs.peft_type)
    if kind != "LORA":
        raise UserError(f"{folder}: adapters of kind {kind}, expected LORA; {merge}")
    if theirs.r != config.rank:
        raise UserError(f"lora.rank is {config.rank}, but the adapters in {folder} have rank {theirs.r}")
    for name, layer in model.named_modules():
        if getattr(layer, "lora_bias", {}).get(POLICY) and getattr(layer.base_layer, "bias", None) is None:
            raise UserError(f"{folder}: lora_bias is set, but {name} has no bias, so that they could never be merged")
    own = adapter_weights(model, POLICY)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in own:
            raise UserError(
                f"{folder}: besides adapters, {name} of the model itself was trained (bias: {theirs.bias}), which the "
                f"reference would share; {merge}"
            )
    if isinstance(model.get_output_embeddings(), AuxiliaryTrainingWrapper):
        raise UserError(f"{folder}: the adapters hold an output head of their own; {merge}")
    _check_tied(model, folder)


def _check_tied(model: PreTrainedModel, place: str) -> None:
    """Raises UserError where a low-rank adapter is on one of two layers that share their weight."""
    embeddings, head = ends(model)
    adapted = any(hasattr(end, "base_layer") for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    if adapted and head is not None and head.weight is embeddings.weight:
        raise UserError(
            f"{place}: adapters on the embeddings or the output head of a model that shares one weight between them; "
            "leave those layers out"
        )


def copy_adapters(model: PreTrainedModel) -> None:
    """A frozen twin, called `REFERENCE`, of the adapters that are trained, layers saved whole included."""
    config = copy.deepcopy(model.peft_config[POLICY])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others, such as those of PiSSA, would take from the weights beside them
    put_adapters(model, config, name=REFERENCE)
    _choose(model, POLICY)
    parameters = dict(model.named_parameters())
    for name, weight in adapter_weights(model, POLICY).items():
        parameters[in_reference(name)].data.copy_(weight)


def in_reference(parameter: str) -> str:
    """The name of the same weight in the twin."""
    return ".".join(REFERENCE if part == POLICY else part for part in parameter.split("."))


@contextmanager
def using(model: PreTrainedModel, adapter: str | None) -> Iterator[PreTrainedModel]:
    """Within this context the model computes with the adapters of this name; None: as its base, to the bit."""
    if adapter is None:
        _enable(model, False)
    else:
        _choose(model, adapter)
    try:
        yield model
    finally:
        if adapter is None:
            _enable(model, True)
        else:
            _choose(model, POLICY)


def _parts(model: PreTrainedModel) -> list[Any]:
    """Every module of peft; transformers' own switches pass over layers that are saved whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _enable(model: PreTrainedModel, on: bool) -> None:
    for part in _parts(model):
        part.enable_adapters(enabled=on)


def _choose(model: PreTrainedModel, adapter: str) -> None:
    for part in _parts(model):
        part.set_adapter(adapter)


def describe_adapters(model: PreTrainedModel) -> str:
    """Which layers have adapters, which matrices have none, and how much of the model these are."""
    adapted: dict[str, None] = {}  # ends of names, in the model's order
    covered: set[int] = set()  # parameters, by identity
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        weight = getattr(module, "parameter_name", "weight")
        layer: Any = module.get_base_layer()
        covered.add(id(getattr(layer, weight)))
        place = name.replace(".base_layer", "").removesuffix(".token_adapter")
        adapted[place.rpartition(".")[2] if weight == "weight" else f"{place.rpartition('.')[2]}.{weight}"] = None
    whole = [name for name, module in model.named_modules() if name.endswith(f"modules_to_save.{POLICY}")]
    text = f"rank {model.peft_config[POLICY].r} on {', '.join(adapted)}"
    if whole:
        text += "; trained whole: " + ", ".join(dict.fromkeys(name.split(".")[-3] for name in whole))
    outside = {id(end.weight) for end in ends(model) if end is not None}
    matrices = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not is_adapter(name) and not name.endswith("bias") and id(parameter) not in outside
    ]
    without = [(name, parameter) for name, parameter in matrices if id(parameter) not in covered]
    if not without:
        return text
    size = sum(parameter.numel() for _, parameter in without) / sum(parameter.numel() for _, parameter in matrices)
    names = dict.fromkeys(".".join(name.removesuffix(".weight").split(".")[-2:]) for name, _ in without)
    return f"{text}; none on {', '.join(names)}, {size:.0%} of the weights of the layers"


def save_model(model: PreTrainedModel, folder: Path, end_ids: Sequence[int] = ()) -> None:
    """A plain Hugging Face folder; of a model with adapters, a folder of the trained adapters alone.

    Args:
        model: its config.json says of outputs what it said when it was brought.
        folder: is made.
        end_ids: of the tokens that end a response; generation_config.json says so to whoever generates with the folder.
            Empty: it says what the model says.
    """
    if not has_adapters(model):
        with without_bars():
            model.save_pretrained(folder)
        restore_outputs(model, folder)
    else:
        _save_adapters(model, folder)
    if end_ids:
        # in the file, as transformers refuses to save a changed one for settings that it let pass unchanged
        file = folder / "generation_config.json"
        generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        generation["eos_token_id"] = list(end_ids) if len(end_ids) > 1 else end_ids[0]
        file.write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_adapters(model: PreTrainedModel, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    # Not by the model: transformers finds no name for a layer that peft saves twice, whole and as the vocabulary's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that embeddings are saved along
        found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=POLICY)
    kept: dict[int, str] = {}  # one name for each place in memory: that of the embeddings, which come first
    for name in sorted(found, key=lambda name: ".modules_to_save." in name):
        kept.setdefault(found[name].data_ptr(), name)
    weights = {PREFIX + name: found[name].detach().cpu().contiguous() for name in sorted(kept.values())}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    model.peft_config[POLICY].save_pretrained(str(folder))
    # peft keeps names of layers in sets, whose order differs from one process to the next
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Each must be the end of some layer's name: of several, peft would pass over one that is not."""
    names = dict(model.named_modules())
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            linear = {name.rpartition(".")[2] for name, layer in names.items() if isinstance(layer, nn.Linear | Conv1D)}
            raise UserError(
                f"lora.target_modules: the name of no layer ends in {target}; those of the linear layers end in "
                f"{', '.join(sorted(linear))}"
            )
