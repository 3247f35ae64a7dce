"""Folders of adapters as peft writes them: read into the model that they belong to, or merged into it.

Of any kind that peft can put into a model and merge. Knows nothing of training, of policies or of reward models.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tether.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY = "default"  # the name of the adapter that is trained
REFERENCE = "reference"  # and of a frozen one beside it
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before each name in the file of weights

HEADS = ("score", "classifier", "classification_head")  # the heads of classifiers, in transformers' names

NOT_ALONE = {
    "alora_invocation_tokens": "act from certain tokens on",
    "arrow_config": "route between several",
    "layer_replication": "repeat layers of the model",
}
"""Settings of peft by which adapters are more than weights beside those of the model, and what they do."""


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters have been put into the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_adapter(parameter: str) -> bool:
    """Whether a model's parameter of this name belongs to adapters, whatever their kind: peft puts their name in it."""
    return not {POLICY, REFERENCE}.isdisjoint(parameter.split("."))


def adapter_weights(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapters called `name`, by their names in the model; layers saved whole are among them."""
    return {key: parameter for key, parameter in model.named_parameters() if name in key.split(".")}


def adapter_settings(folder: str) -> dict[str, Any] | None:
    """What `adapter_config.json` says; None where the folder holds no adapters, or the whole model beside them.

    Raises:
        UserError: the file cannot be read.
    """
    file = Path(folder) / CONFIG_FILE
    if not folder or not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no configuration of adapters ({reason(error)}); copy the folder again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: no configuration of adapters, but a {type(settings).__name__}; copy the folder again")
    return None if Path(folder, "config.json").is_file() else settings


def base_of(folder: str) -> str | None:
    """The folder or hub name of the model that the adapters in `folder` belong to; None where it holds no adapters.

    Raises:
        UserError: its `adapter_config.json` cannot be read or names no model.
    """
    settings = adapter_settings(folder)
    if settings is None:
        return None
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{Path(folder) / CONFIG_FILE}: base_model_name_or_path is {name!r}, expected the folder or hub name of "
            "the model that the adapters belong to"
        )
    return name


def adapts_classifier(folder: str) -> bool:
    """Whether the adapters in `folder` were trained for a classifier, such as a reward model is."""
    settings = adapter_settings(folder)
    if settings is None:
        return False
    task = settings.get("task_type")
    return task == "SEQ_CLS" or (task is None and Path(folder, WEIGHTS_FILE).is_file() and bool(head_labels(folder)))


def head_labels(folder: str) -> int | None:
    """Labels of the classifier's head that was saved with the adapters; None where there is none."""
    heads = [
        (name, shape)
        for name, shape in saved_shapes(folder).items()
        if name.split(".")[0] in HEADS and name.endswith(".weight") and ".lora_" not in name
    ]
    return heads[-1][1][0] if heads else None


def saved_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """The tensors in a folder of adapters, by their names in the model without those of the adapters, and shapes.

    Raises:
        UserError: they cannot be read.
    """
    file = _weights_file(folder)
    try:
        with safe_open(file, "pt") as opened:
            return {n.removeprefix(PREFIX): tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({reason(error)}); copy it again") from error


def _weights_file(folder: str) -> Path:
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"{folder}: the folder has no {WEIGHTS_FILE}; expected adapters saved as safetensors")
    return file


def read_adapters(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Put the adapters of a folder into their base model, which is frozen; they may be trained on.

    Where the vocabulary had been enlarged before they were trained, the model's is too.

    Raises:
        UserError: the folder is damaged, belongs to another model, or holds what is more than weights.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # of peft, for whatever is in the file
        raise UserError(f"{Path(folder) / CONFIG_FILE}: no adapters that peft knows ({reason(error)})") from error
    for name, what in NOT_ALONE.items():
        if getattr(config, name, None):
            raise UserError(
                f"{Path(folder) / CONFIG_FILE}: {name} is set: adapters that {what}, which are not supported; expected "
                "adapters that can be merged into their model"
            )
    config.inference_mode = False
    _resize(model, saved_shapes(folder), folder)
    put_adapters(model, config, folder)
    read_weights(model, folder)
    return model


def _resize(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], folder: str) -> None:
    """Give the model the vocabulary that the adapters were saved with: peft saves resized embeddings whole."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = ((end, _rows(shapes, names.get(id(end)))) for end in both)
    if embeddings[1] in (None, embeddings[0].weight.shape[0]):
        return
    if head[0] is not None and head[0].weight is not embeddings[0].weight and head[1] != embeddings[1]:
        raise UserError(
            f"{folder}: the vocabulary had been enlarged to {embeddings[1]} tokens, but the output head of that size "
            "was not saved with the adapters; save it with them (modules_to_save), or save the enlarged base model and "
            "name it in adapter_config.json"
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is read from the folder next
        model.resize_token_embeddings(embeddings[1], mean_resizing=False)


def _rows(shapes: dict[str, tuple[int, ...]], layer: str | None) -> int | None:
    """Rows of the whole weight that was saved of this layer; None where there is none."""
    whole = re.compile(rf"{re.escape(layer or '?')}(\.token_adapter)?(\.base_layer|\.original_module)?\.weight")
    return next((shape[0] for name, shape in shapes.items() if whole.fullmatch(name)), None)


def read_weights(model: PreTrainedModel, folder: str) -> None:
    """Replace the weights of the model's adapters by those of a folder.

    Raises:
        UserError: they cannot be read, or are not those of this model's adapters.
    """
    from peft import set_peft_model_state_dict

    file = _weights_file(folder)
    try:
        weights = {name.removeprefix(PREFIX): weight for name, weight in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({reason(error)}); copy it again") from error
    _drop_copies(model, weights)
    try:
        found: Any = set_peft_model_state_dict(model, weights, adapter_name=POLICY)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{file}: adapters of another model ({reason(error)})") from error
    own = adapter_weights(model, POLICY)  # a weight that is shared has one name here, and two in a state
    missing = sorted(name for name in found.missing_keys if name in own)
    if missing or found.unexpected_keys:
        name = (missing or sorted(found.unexpected_keys))[0]
        raise UserError(
            f"{file}: adapters of another model: {len(missing)} tensors missing, {len(found.unexpected_keys)} unknown "
            f"({name})"
        )
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not bool(parameter.isfinite().all()):
            raise UserError(f"{file}: the weights hold NaN or infinity: {name}; train the adapters again")


def _drop_copies(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Leave out what peft writes twice: layers saved whole after resizing, and trained rows of a tied output head."""
    for name in [name for name in weights if ".modules_to_save." in name]:
        once = weights.get(name.replace(".modules_to_save.", "."))
        if once is not None and torch.equal(once, weights[name]):
            del weights[name]
    for name, module in model.named_modules():
        if getattr(module, "tied_adapter", None) is not None:
            weights.pop(f"{name}.trainable_tokens_delta", None)


def put_adapters(model: PreTrainedModel, config: Any, folder: str | None = None, name: str = POLICY) -> None:
    """Put adapters into a model, float32 and on its device.

    Raises:
        UserError: peft has none of this configuration for this model; `folder` is named where they come from one.
    """
    from peft.functional import cast_adapter_dtype

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a GPT-2's transposed weights, which peft sees to itself
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # of ranks of experts, which it looks for in the wrong place
            model.add_adapter(config, name)
    except Exception as error:  # of peft, which raises what its many kinds raise
        raise UserError(f"{folder or 'lora'}: no adapters for this model ({reason(error)})") from error
    cast_adapter_dtype(model, name)
    model.eval()
    base = model.__dict__.get("name_or_path") or ""
    config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model again, what the adapters add in the place of each weight, its parameters trainable; in place.

    Embeddings and output head that shared a weight have one each where the adapters made them differ.

    Raises:
        UserError: adapters of this kind cannot be merged, or a merged weight is not finite.
    """
    shared = _take_apart(model)
    done: set[str] = set()
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue  # a wrapper within another, as around the weights of experts: the outer one sees to both
        try:
            if hasattr(module, "unload_and_optionally_merge_module"):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            elif hasattr(module, "base_layer") and hasattr(module, "merge"):
                module.merge(safe_merge=True)
                plain = module.get_base_layer()
            else:
                continue
        except Exception as error:  # of peft, which raises what its many kinds raise
            raise UserError(f"the adapters cannot be merged: {name}: {reason(error)}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
        done.add(name)
    if shared:
        _share(model)
    del model.peft_config
    model._hf_peft_config_loaded = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Embeddings and output head, each as it was before adapters; None for a head that there is not."""
    return _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())


def _plain(layer: Any) -> Any:
    while layer is not None:
        inner = getattr(layer, "original_module", None) or getattr(layer, "base_layer", None)
        if inner is None:
            return layer
        layer = inner
    return None


@torch.no_grad()
def _take_apart(model: PreTrainedModel) -> bool:
    """Give the output head a weight of its own where it shares that of the embeddings; whether it did."""
    embeddings, head = ends(model)
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
    return True


def _share(model: PreTrainedModel) -> None:
    """One weight for both again where they are equal; else the configuration says that each has its own."""
    embeddings, head = ends(model)
    if torch.equal(embeddings.weight, head.weight):
        head.weight = embeddings.weight
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
