"""`tether export`: a policy, or a reward model, as one plain Hugging Face folder, adapters merged into their base.

Knows folders and models; nothing of runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from tether.adapter_folders import adapts_classifier
from tether.errors import UserError
from tether.language.adapters import base_of
from tether.language.models import load_causal_lm, load_tokenizer
from tether.pipeline.sft import save_policy
from tether.pretrained import DTYPES, check_folder, check_vocabulary, is_classifier
from tether.rewards.classifiers import load_classifier
from tether.rewards.normalisation import Normalisation


@dataclass(frozen=True)
class ExportConfig:
    """A policy, or a reward model, as one plain Hugging Face folder."""

    model: str = ""
    """Folder or hub name of the policy, such as the `policy/` of a checkpoint, or of a reward model; of adapters, or of
    a whole model."""
    output: str = ""
    """Folder that is written: the weights as safetensors, the configuration and the tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights that are written; adapters are merged in float32 before. None: the base model's."""
    overwrite: bool = False
    """Replace a folder that is already there."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""


def export(config: ExportConfig) -> Path:
    """Write the folder and return it.

    Raises:
        UserError: there is no such policy, or the folder cannot be written.
    """
    if not config.output:
        raise UserError("no output given: name the folder to write with --output")
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{config.output}: a file, expected a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise UserError(f"{config.output}: the folder is already there; name another, or set --overwrite")
    if config.model and folder.resolve() in (
        Path(path).resolve() for path in (config.model, base_of(config.model) or "")
    ):
        raise UserError(f"{config.output}: the model that is to be exported lies there; name another folder")
    model, tokenizer = _load(config)
    base = base_of(config.model) or config.model
    own = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code).dtype
    dtype = DTYPES["float32"] if own is None else own
    model.to(dtype if config.dtype is None else DTYPES[config.dtype])
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"dtype is {config.dtype}, in which {name} overflows; expected float32 or bfloat16")
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_policy(model, tokenizer, folder)
    normalisation = Normalisation.load(Path(config.model))
    if normalisation is not None:
        normalisation.save(folder)
    return folder


def _load(config: ExportConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy, or the reward model, in float32, and its tokenizer."""
    if _is_reward_model(config):
        return load_classifier(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    model = load_causal_lm(config.model, trust_remote_code=config.trust_remote_code)
    check_vocabulary(model, tokenizer, config.model)
    return model, tokenizer


def _is_reward_model(config: ExportConfig) -> bool:
    if base_of(config.model) is not None:
        return adapts_classifier(config.model)
    check_folder(config.model)
    try:
        return is_classifier(AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code))
    except Exception:  # noqa: BLE001 - whatever is wrong with it, loading it as a policy says so
        return False
