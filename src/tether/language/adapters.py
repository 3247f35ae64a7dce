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

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tether.errors import UserError, reason
from tether.pretrained import restore_outputs

POLICY = "default"  # the name of the adapter that is trained
REFERENCE = "reference"  # and of a frozen one beside it
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


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
        rank = getattr(read_adapters(model, folder).peft_config[POLICY], "r", None)
        if rank != config.rank:
            found = "are of another kind" if rank is None else f"have rank {rank}"
            raise UserError(f"lora.rank is {config.rank}, but the adapters in {folder} {found}")
        return model
    _check_targets(model, config.target_modules)
    targets = list(config.target_modules) or "all-linear"
    alpha: Any = config.alpha  # declared as int by peft, which only divides it
    _add(model, LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
    return model


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters have been put into the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def base_of(folder: str) -> str | None:
    """The folder or hub name of the model that the adapters in `folder` belong to; None where it holds no adapters.

    Raises:
        UserError: its `adapter_config.json` cannot be read or names no model.
    """
    file = Path(folder) / CONFIG_FILE
    if not folder or not file.is_file():
        return None
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no configuration of adapters ({reason(error)}); copy the folder again") from error
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{file}: base_model_name_or_path is {name!r}, expected the folder or hub name of the model that the "
            "adapters belong to"
        )
    if Path(folder, "config.json").is_file():  # adapters beside the whole model that they belong to
        return None
    return name


def read_adapters(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Put the adapters of a folder into their base model, which is frozen; they may be trained on.

    Raises:
        UserError: the folder is damaged, or belongs to another model.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # of peft, for whatever is in the file
        raise UserError(f"{Path(folder) / CONFIG_FILE}: no adapters that peft knows ({reason(error)})") from error
    config.inference_mode = False
    _add(model, config, folder)
    read_weights(model, folder)
    return model


def read_weights(model: PreTrainedModel, folder: str) -> None:
    """Replace the weights of the model's adapters by those of a folder.

    Raises:
        UserError: they cannot be read, or are not those of this model's adapters.
    """
    from peft import set_peft_model_state_dict

    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"{folder}: the folder has no {WEIGHTS_FILE}; expected adapters saved as safetensors")
    try:
        weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({reason(error)}); copy it again") from error
    try:
        found: Any = set_peft_model_state_dict(model, weights, adapter_name=POLICY)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{file}: adapters of another model ({reason(error)})") from error
    missing = sorted(name for name in found.missing_keys if f".{POLICY}" in name)
    if missing or found.unexpected_keys:
        name = (missing or sorted(found.unexpected_keys))[0]
        raise UserError(
            f"{file}: adapters of another model: {len(missing)} tensors missing, {len(found.unexpected_keys)} unknown "
            f"({name})"
        )
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not bool(parameter.isfinite().all()):
            raise UserError(f"{file}: the weights hold NaN or infinity: {name}; train the adapters again")


def copy_adapters(model: PreTrainedModel) -> None:
    """A frozen twin, called `REFERENCE`, of the adapters that are trained."""
    _add(model, copy.deepcopy(model.peft_config[POLICY]), name=REFERENCE)
    model.set_adapter(POLICY)
    parameters = dict(model.named_parameters())
    for name, weight in adapter_weights(model, POLICY).items():
        parameters[name.replace(f".{POLICY}", f".{REFERENCE}")].data.copy_(weight)


def adapter_weights(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapters called `name`, by their names in the model."""
    return {key: parameter for key, parameter in model.named_parameters() if is_adapter(key) and f".{name}" in key}


def is_adapter(parameter: str) -> bool:
    """Whether a model's parameter of this name belongs to adapters."""
    return ".lora_" in parameter


@contextmanager
def using(model: PreTrainedModel, adapter: str | None) -> Iterator[PreTrainedModel]:
    """Within this context the model computes with the adapters of this name; None: as its base, to the bit."""
    if adapter is None:
        model.disable_adapters()
    else:
        model.set_adapter(adapter)
    try:
        yield model
    finally:
        if adapter is None:
            model.enable_adapters()
        else:
            model.set_adapter(POLICY)


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model again, W + (alpha / rank)·B A in the place of each W, its parameters trainable; in place.

    Raises:
        UserError: a merged weight is not finite.
    """
    for name, module in list(model.named_modules()):
        try:
            if hasattr(module, "unload_and_optionally_merge_module"):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            elif hasattr(module, "base_layer") and hasattr(module, "merge"):
                module.merge(safe_merge=True)
                plain = module.get_base_layer()
            else:
                continue
        except ValueError as error:
            raise UserError(f"the adapters cannot be merged: {name}: {reason(error)}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    del model.peft_config
    model._hf_peft_config_loaded = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def save_model(model: PreTrainedModel, folder: Path, end_ids: Sequence[int] = ()) -> None:
    """A plain Hugging Face folder; of a model with adapters, a folder of the trained adapters alone.

    Args:
        model: its config.json says of outputs what it said when it was brought.
        folder: is made.
        end_ids: of the tokens that end a response; generation_config.json says so to whoever generates with the folder.
            Empty: it says what the model says.
    """
    model.save_pretrained(folder)
    restore_outputs(model, folder)
    if end_ids:
        # in the file, as transformers refuses to save a changed one for settings that it let pass unchanged
        file = folder / "generation_config.json"
        generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        generation["eos_token_id"] = list(end_ids) if len(end_ids) > 1 else end_ids[0]
        file.write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not has_adapters(model):
        return
    # peft keeps names of layers in sets, whose order differs from one process to the next
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
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


def _add(model: PreTrainedModel, config: Any, folder: str | None = None, name: str = POLICY) -> None:
    """Put adapters into a model, float32 and on its device."""
    from peft.functional import cast_adapter_dtype

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a GPT-2's transposed weights, which peft sees to itself
            model.add_adapter(config, name)
    except (ValueError, ImportError) as error:
        raise UserError(f"{folder or 'lora'}: no adapters for this model ({reason(error)})") from error
    ends_of_model = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends_of_model):
        raise UserError(
            f"{folder or 'lora.target_modules'}: adapters on the embeddings or the output head of a model that shares "
            "one weight between them, into which they could not be merged; leave those layers out"
        )
    cast_adapter_dtype(model, name)
    model.eval()
    base = model.__dict__.get("name_or_path") or ""
    config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
