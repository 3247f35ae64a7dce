"""Loading a causal language model and its tokenizer from a folder or hub name, with everything PPO relies on checked.

Weights are read from safetensors only; code that comes with a model is never run unless asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with an eos token and something to pad with.

    A tokenizer without a pad token pads with eos, which is safe here: padding is known by position, never by id.

    Raises:
        UserError: there is no such folder, no tokenizer in it, or it has no eos token.
    """
    _check_folder(path)
    _check_config(path, trust_remote_code)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(
            f"{path}: no tokenizer could be loaded ({_one_line(error)}); save one beside the model"
        ) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):  # what transformers makes of no file at all
        raise UserError(f"{path}: the folder has no tokenizer; save one beside the model")
    return prepare_tokenizer(tokenizer, path)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Check for eos, and pad with eos where there is no pad token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no eos token, so no response could ever end; "
            'set one, e.g. "eos_token": "</s>" in tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        log.info("%s: the tokenizer has no pad token; padding with eos (%s)", name, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM in evaluation mode (dropout off), every parameter in memory of its own.

    Raises:
        UserError: no such folder, an unreadable configuration, missing or broken weights, an unknown device.
    """
    _check_folder(path)
    _check_config(path, trust_remote_code)
    _check_weight_files(path)
    _check_device(device)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # transformers and safetensors raise whatever their parsers raise
        raise UserError(f"{path}: no causal language model could be loaded ({_one_line(error)})") from error
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(loading["mismatched_keys"])  # (name, shape in the file, shape of the configuration)
    if missing or mismatched:
        found = [f"{len(missing)} tensors missing ({missing[0]})"] if missing else []
        if mismatched:
            name, found_shape, expected_shape = mismatched[0]
            shapes = f"{name}: {tuple(found_shape)}, expected {tuple(expected_shape)}"
            found.append(f"{len(mismatched)} tensors of another shape ({shapes})")
        raise UserError(
            f"{path}: the weights do not fit config.json: {', '.join(found)}; save the model again with save_pretrained"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{path}: the weights hold NaN or infinity: {name}, read as {dtype}; train the model again")
    return prepare_model(model, device)


def prepare_model(model: PreTrainedModel, device: str = "cpu") -> PreTrainedModel:
    """Dropout off, on `device`, parameters copied out of any memory map.

    The copy gives every parameter the alignment of torch's allocator, so that a model that was saved and loaded
    computes bit for bit what it computed before.
    """
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.eval()
    return model


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's parameters, bit for bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError where the tokenizer knows ids that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has token ids up to {largest}, but the model embeds only {rows}; "
            "use the tokenizer that the model was trained with, or resize_token_embeddings"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model has positions for, or None where the configuration names none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's eos, and those of the generation config that it knows as special.

    The second condition keeps a default id of a model class (2 for Llama) from ending responses of another tokenizer.
    """
    ends = {int(tokenizer.eos_token_id)}
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token_id in named if isinstance(named, list | tuple) else [named]:
        if token_id is not None and int(token_id) in special:
            ends.add(int(token_id))
    return tuple(
        sorted(ends - {i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id) if i != tokenizer.eos_token_id})
    )


def _check_folder(path: str) -> None:
    """A local folder must hold a readable config.json; anything else must look like a hub name."""
    if not path:
        raise UserError("no model was given; name a folder or a hub name with --model")
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{path}: the folder has no config.json; expected a model saved with save_pretrained")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: not valid JSON ({_one_line(error)})") from error
        if not isinstance(config, dict):
            raise UserError(f"{file}: holds a {type(config).__name__}, expected an object")
    elif folder.exists():
        raise UserError(f"{path}: a file; expected a model folder or a hub name like owner/model")
    elif path.startswith(("/", ".", "~")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"{path}: no such folder; expected a model folder or a hub name like owner/model")


def _check_config(path: str, trust_remote_code: bool) -> None:
    """The architecture must be one that transformers knows, and that writes text."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: the model needs Python code that comes with it, which is not run unless asked for; "
                "read that code, and add --trust-remote-code if you trust it"
            ) from error
        if not Path(path).is_dir():
            raise UserError(
                f"{path}: no such folder, and no model of this name could be loaded from the hub ({_one_line(error)})"
            ) from error
        raise UserError(f"{path}/config.json: no model that transformers knows ({_one_line(error)})") from error
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not custom and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{path}: a model of type {config.model_type!r}; expected a causal language model")


def _check_weight_files(path: str) -> None:
    """A local folder must hold safetensors that are whole: those of pickles are never read."""
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
            raise UserError(f"{file}: damaged or cut short ({_one_line(error)}); copy or download it again") from error


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last: meta, which holds no numbers
        raise UserError(f"device is {device!r}, which torch cannot use here ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
