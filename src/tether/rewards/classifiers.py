"""Loading the classifier with one label that a reward model is, with everything checked that scores rely on.

Reads plain Hugging Face folders, weights from safetensors only. Knows nothing of texts or of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tether.devices import choose_device
from tether.errors import UserError, reason
from tether.pretrained import (
    DTYPES,
    check_dtype,
    check_finite,
    check_folder,
    check_tokenizer,
    check_vocabulary,
    check_weight_files,
    quiet_outputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD = "<|pad|>"  # the pad token of a model that had none of its own


def load_classifier(
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    new_head_seed: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, in evaluation mode (dropout off), and its tokenizer.

    Args:
        path: folder or hub name.
        dtype: float32, bfloat16 or float16.
        device: see `choose_device`.
        new_head_seed: a model without such a head, such as a causal LM, gets one: normal weights of standard deviation
            1/√(hidden size + 1) drawn from this seed (Stiennon et al. 2020), no bias. None: that is an error.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: the folder, its tokenizer or its weights cannot be used, or are not of such a model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    check_folder(path, "reward model", "`path`")
    check_weight_files(path)
    device = choose_device(device)
    check_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(f"{path}: no model and tokenizer could be loaded ({reason(error)})") from error
    architectures = getattr(config, "architectures", None) or []
    classifier = any("SequenceClassification" in name for name in architectures)
    if new_head_seed is None and not classifier:
        found = f" ({architectures[0]})" if architectures else ""
        raise UserError(f"{path}: not a reward model{found}; expected one with a head of one label: `tether reward`")
    if classifier and config.num_labels != 1:
        raise UserError(f"{path}: a classifier of {config.num_labels} labels; expected a reward model, which has one")
    check_tokenizer(tokenizer, path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has neither a pad nor an eos token; set one of them")
    try:
        with torch.random.fork_rng(devices=[]):  # the head that is drawn here is drawn again below
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        model.to(device)
    except Exception as error:  # of transformers, safetensors and torch
        raise UserError(f"{path}: no reward model could be loaded ({reason(error)})") from error
    head = _missing_head(path, model, loading["missing_keys"], not classifier)
    if new_head_seed is not None:
        _draw(model, head, new_head_seed)
    quiet_outputs(model)
    check_finite(model, path, dtype)
    check_vocabulary(model, tokenizer, path)
    _agree_on_padding(model, tokenizer, classifier)
    for parameter in model.parameters():  # out of the memory map, aligned as torch does it: scores equal to the bit
        parameter.data = parameter.data.clone()
    return model.eval(), tokenizer


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, classifier: bool) -> None:
    """The score is read at the last token that is not padding, by the id in the model's configuration.

    A trained reward model keeps the id that it was trained with. A new one gets a pad token of its own where padding
    would be eos: that would hide the eos, and it is at a text's end, which looks alike in all, that a score is learned
    best.
    """
    known = model.config.get_text_config().pad_token_id
    if classifier:
        name = None if known is None else tokenizer.convert_ids_to_tokens(known)
        tokenizer.pad_token = name or tokenizer.pad_token or tokenizer.eos_token
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        embeddings = model.get_input_embeddings().weight
        if tokenizer.pad_token_id >= embeddings.shape[0]:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
            with torch.no_grad():  # attention never sees it
                model.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id


def _missing_head(path: str, model: PreTrainedModel, missing: Sequence[str], new_head: bool) -> list[str]:
    """Parameters of a head that is to be new; all others must have been read."""
    prefix = model.base_model_prefix + "."
    trunk = sorted(name for name in missing if name.startswith(prefix))
    head = sorted(name for name in missing if not name.startswith(prefix))
    if trunk or (head and not new_head):
        name = (trunk or head)[0]
        raise UserError(
            f"{path}: the weights do not fit config.json: {len(missing)} tensors missing ({name}); save the model again"
        )
    return head


@torch.no_grad()
def _draw(model: PreTrainedModel, names: Sequence[str], seed: int) -> None:
    """New weights for a head."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in names:
        weight = parameters[name]
        if weight.ndim < 2:
            weight.zero_()
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1] + 1))
