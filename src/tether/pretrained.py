"""What is checked of any pretrained model, whatever its head: its folder, its weights, its tokenizer, its context.

Weights are read from safetensors only: those of pickles can run code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from tether.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUIET = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""What a model's configuration may ask of each forward pass, as it has to be where logits alone are read."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Transformers draws no bars of its own for as long as this lasts: what is loaded is ours to say."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_dtype(dtype: str) -> None:
    """Raises UserError where the precision is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


def check_folder(path: str, what: str = "model", flag: str = "--model") -> None:
    """A local folder must hold a readable config.json; anything else must look like a hub name.

    Raises:
        UserError: it does not. Where there is no path at all, the message asks for `what` by `flag`.
    """
    if not path:
        raise UserError(f"no {what} was given; name a folder or a hub name with {flag}")
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file() and (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{path}: a folder of adapters; expected a whole model: `tether export --model {path} --output FOLDER` "
                "merges them into their base"
            )
        if not file.is_file():
            raise UserError(f"{path}: the folder has no config.json; expected a model saved with save_pretrained")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: not valid JSON ({reason(error)})") from error
        if not isinstance(config, dict):
            raise UserError(f"{file}: holds a {type(config).__name__}, expected an object")
    elif folder.exists():
        raise UserError(f"{path}: a file; expected a model folder or a hub name like owner/model")
    elif path.startswith(("/", ".", "~")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"{path}: no such folder; expected a model folder or a hub name like owner/model")


def check_weight_files(path: str) -> None:
    """A local folder must hold safetensors that are whole.

    Raises:
        UserError: it holds none, or a damaged one.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{path}: the weights are a pickle ({pickles[0]}), which can run code when it is read; expected "
                "model.safetensors: save the model again with a current transformers"
            )
        raise UserError(f"{path}: the folder has no model.safetensors; expected a model saved with save_pretrained")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or cut short ({reason(error)}); copy or download it again") from error


def check_finite(model: PreTrainedModel, path: str, dtype: str) -> None:
    """Raises UserError where a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{path}: the weights hold NaN or infinity: {name}, read as {dtype}; train the model again")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raises UserError where the tokenizer has no word, which is what transformers makes of no file at all."""
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise UserError(f"{path}: the folder has no tokenizer; save one beside the model")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError where the tokenizer knows ids that the model has no embedding for."""
    rows = embedding_rows(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has token ids up to {largest}, but the model embeds only {rows}; "
            "use the tokenizer that the model was trained with, or resize_token_embeddings"
        )


def is_classifier(config: Any) -> bool:
    """Whether a model's configuration is of one that gives a text labels or a score, as a reward model does."""
    architectures = getattr(config, "architectures", None) or []
    mapped = getattr(config, "auto_map", None) or {}
    own_code = "AutoModelForSequenceClassification" in mapped and "AutoModelForCausalLM" not in mapped
    return own_code or any("SequenceClassification" in name for name in architectures)


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for, those to spare for no token of the tokenizer among them."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model has positions for, or None where the configuration names none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length - _positions_of_padding(model)
    return None


def _positions_of_padding(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from behind the one that their padding has."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def quiet_outputs(model: PreTrainedModel) -> None:
    """Have the model return logits alone, by name; what its configuration asked for is kept for `restore_outputs`.

    A router's logits, for one, come with a balancing loss that no pass here reads, and that fails on packed rows.
    """
    asked: dict[str, dict[str, Any]] = model.__dict__.setdefault("asked_outputs", {})
    parts = {"": model.config} | {
        name: part for name in getattr(model.config, "sub_configs", {}) if (part := getattr(model.config, name, None))
    }
    for place, config in parts.items():
        for name, value in QUIET.items():
            found = getattr(config, name, value)
            if found is not None and found != value:
                asked.setdefault(place, {})[name] = found
                setattr(config, name, value)


def restore_outputs(model: PreTrainedModel, folder: str | Path) -> None:
    """Write what `quiet_outputs` switched off into the config.json that the model was saved with."""
    asked: dict[str, dict[str, Any]] = model.__dict__.get("asked_outputs", {})
    file = Path(folder) / "config.json"
    if not asked or not file.is_file():  # of adapters there is none
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    for place, values in asked.items():
        (config.setdefault(place, {}) if place else config).update(values)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
