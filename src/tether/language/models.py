"""Loading a causal language model and its tokenizer from a folder or hub name, with everything PPO relies on checked.

Weights are read from safetensors only; code that comes with a model is never run unless asked for.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with an eos token and something to pad with.

    A tokenizer without a pad token pads with eos, which is safe here: padding is known by position, never by id.

    Raises:
        UserError: there is no such folder, no tokenizer in it, or it has no eos token.
    """
    _check_folder(path, needs="config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(
            f"{path}: no tokenizer could be loaded ({_first_line(error)}); save one beside the model"
        ) from error
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
        UserError: no such folder, an unreadable configuration, missing or broken weights.
    """
    _check_folder(path, needs="config.json")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # transformers and safetensors raise whatever their parsers raise
        raise UserError(f"{path}: no causal language model could be loaded ({_first_line(error)})") from error
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"])
    if missing or mismatched:
        raise UserError(
            f"{path}: the weights do not fit the configuration: {len(missing)} tensors missing"
            f"{' (' + missing[0] + ', …)' if missing else ''}, {len(mismatched)} of another shape"
            f"{' (' + mismatched[0] + ', …)' if mismatched else ''}; save the model again with save_pretrained"
        )
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


def _check_folder(path: str, needs: str) -> None:
    """A local folder must hold `needs`; anything else must look like a hub name."""
    if not path:
        raise UserError("no model was given; name a folder or a hub name with --model")
    folder = Path(path)
    if folder.is_dir():
        if not (folder / needs).is_file():
            raise UserError(f"{path}: the folder has no {needs}; expected a model saved with save_pretrained")
        try:
            json.loads((folder / needs).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}/{needs}: not valid JSON ({_first_line(error)})") from error
    elif folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such folder; expected a model folder or a hub name like owner/model")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
