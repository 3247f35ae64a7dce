"""Loading a causal language model and its tokenizer from a folder or hub name, with everything PPO relies on checked.

Weights are read from safetensors only; code that comes with a model is never run unless asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tether.adapter_folders import adapts_classifier
from tether.chat import ChatTemplate
from tether.devices import choose_device
from tether.errors import UserError, reason
from tether.language.adapters import LoRAConfig, base_of, give_adapters, has_adapters, merge_adapters, read_adapters
from tether.pretrained import (
    DTYPES,
    check_dtype,
    check_finite,
    check_folder,
    check_tokenizer,
    check_weight_files,
    is_classifier,
    quiet_outputs,
    without_bars,
)
from tether.tokens import encode_plain

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
Quantization = Literal["none", "4bit", "8bit"]


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with an eos token and something to pad with.

    A tokenizer without a pad token pads with eos, which is safe here: padding is known by position, never by id.

    Raises:
        UserError: there is no such folder, no tokenizer in it, or it has no eos token.
    """
    whole = base_of(path) or path
    check_folder(whole)
    _check_config(whole, trust_remote_code)
    source = path if whole == path or Path(path, TOKENIZER_FILE).is_file() else whole
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(f"{path}: no tokenizer could be loaded ({reason(error)}); save one beside the model") from error
    check_tokenizer(tokenizer, path)
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
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
) -> PreTrainedModel:
    """A causal LM in evaluation mode (dropout off), every parameter in memory of its own.

    Of a folder of adapters, it is their base model with them merged into it.

    Raises:
        UserError: no such folder, an unreadable configuration, missing or broken weights, an unknown device.
    """
    base = _base_of(path)
    if base is not None:
        try:
            model = load_causal_lm(base, dtype, device, trust_remote_code, quantization)
        except UserError as error:
            raise UserError(f"{path}: adapters, whose base model cannot be loaded: {error}") from error
        merge_adapters(read_adapters(model, path))
        if (Path(path) / GENERATION_FILE).is_file():  # it says at which tokens the adapters were trained to end
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model
    check_folder(path)
    _check_config(path, trust_remote_code)
    check_weight_files(path)
    device = choose_device(device)
    check_dtype(dtype)
    quantized = _quantized(quantization, dtype, device)
    try:
        with without_bars():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, by name
                trust_remote_code=trust_remote_code,
                **quantized,
            )
    except Exception as error:  # transformers and safetensors raise whatever their parsers raise
        raise UserError(f"{path}: no causal language model could be loaded ({reason(error)})") from error
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
    model.unread_tensors = sorted(loading["unexpected_keys"])  # a plain attribute, for `tether.pipeline.checks`
    quiet_outputs(model)
    check_finite(model, path, dtype)
    if has_adapters(model):  # they lay beside the whole model
        merge_adapters(model)
    return model.eval() if quantization != "none" else prepare_model(model, device)


def load_trainable(
    path: str,
    lora: LoRAConfig,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
) -> PreTrainedModel:
    """`load_causal_lm`, all of which is trained; where `lora` has a rank, adapters alone.

    Those of a folder of adapters are trained on then, instead of being merged; otherwise they are new.

    Raises:
        UserError: as `load_causal_lm` and `give_adapters`.
    """
    if not lora.rank:
        return load_causal_lm(path, dtype, device, trust_remote_code, quantization)
    base = _base_of(path)
    model = load_causal_lm(base or path, dtype, device, trust_remote_code, quantization)
    return give_adapters(model, lora, None if base is None else path)


def _base_of(path: str) -> str | None:
    base = base_of(path)
    if base is not None and adapts_classifier(path):
        raise UserError(f"{path}: adapters of a classifier, such as a reward model; expected those of a language model")
    return base


def check_quantization(quantization: Quantization, lora: LoRAConfig) -> None:
    """Raises ValueError where weights that cannot be trained are to be, since there are no adapters."""
    if quantization != "none" and not lora.rank:
        raise ValueError(f"quantization is {quantization}, in which adapters alone can be trained; set lora.rank")


def prepare_model(model: PreTrainedModel, device: str = "cpu") -> PreTrainedModel:
    """Dropout off, on `device` (see `choose_device`), parameters copied out of any memory map.

    The copy gives every parameter the alignment of torch's allocator, so that a model that was saved and loaded
    computes bit for bit what it computed before.
    """
    model.to(choose_device(device))
    quiet_outputs(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.eval()
    return model


def _quantized(kind: Quantization, dtype: str, device: str) -> dict[str, Any]:
    """Further arguments of `from_pretrained` that have bitsandbytes quantize the linear layers while they are read."""
    if kind == "none":
        return {}
    if torch.device(device).type != "cuda":
        raise UserError(f"quantization is {kind}, which needs a CUDA device; found device {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization is {kind}, which needs bitsandbytes; install it: pip install bitsandbytes")
    four = kind == "4bit"
    # NF4 with its constants quantized again: Dettmers et al. 2023, QLoRA, section 3
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors such as the parameters of a model, bit for bit."""
    digest = hashlib.sha256()
    for parameter in tensors:
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's eos, and those of the generation config that are known to end something.

    That is, to the tokenizer as special, or to its chat template as what comes after an answer. A default id of a model
    class (2 for Llama) must not end responses of another tokenizer.
    """
    ends = {int(tokenizer.eos_token_id)}
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    chat = ChatTemplate(tokenizer)
    if after := "" if chat.missing else chat.after_answer().lstrip():
        special |= set(encode_plain(tokenizer, [after])[0][:1])
    for token_id in named if isinstance(named, list | tuple) else [named]:
        if token_id is not None and int(token_id) in special:
            ends.add(int(token_id))
    return tuple(
        sorted(ends - {i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id) if i != tokenizer.eos_token_id})
    )


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
                f"{path}: no such folder, and no model of this name could be loaded from the hub ({reason(error)})"
            ) from error
        raise UserError(f"{path}/config.json: no model that transformers knows ({reason(error)})") from error
    architectures = getattr(config, "architectures", None) or []
    if is_classifier(config):
        kind = architectures[0] if architectures else type(config).__name__
        raise UserError(f"{path}: a classifier, such as a reward model ({kind}); expected a language model")
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not custom and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{path}: a model of type {config.model_type!r}; expected a causal language model")
