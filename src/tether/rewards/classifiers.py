"""Loading the classifier with one label that a reward model is, with everything checked that scores rely on.

Reads plain Hugging Face folders, and folders of adapters, merged; weights from safetensors only. Knows nothing of texts
or of training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tether.adapter_folders import (
    adapter_settings,
    adapts_classifier,
    base_of,
    has_adapters,
    head_labels,
    merge_adapters,
    read_adapters,
    saved_shapes,
)
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
    is_classifier,
    quiet_outputs,
    without_bars,
)
from tether.rewards.passes import check_company

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PAD = "<|pad|>"  # the pad token of a model that had none of its own
TOKENIZER_FILE = "tokenizer_config.json"
OTHER_HEADS = ("Classification", "Reward", "Value", "Score", "Regression", "QuestionAnswering", "MultipleChoice")
"""In names of classes whose head is neither that of a language model nor one that is read here."""


def load_classifier(
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    new_head_seed: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, in evaluation mode (dropout off), and its tokenizer.

    Args:
        path: folder or hub name; of adapters, a folder.
        dtype: float32, bfloat16 or float16.
        device: see `choose_device`.
        new_head_seed: a model without such a head, such as a causal LM, gets one: normal weights of standard deviation
            1/√(hidden size + 1) drawn from this seed (Stiennon et al. 2020), no bias. None: that is an error.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: the folder, its tokenizer or its weights cannot be used, or are not of such a model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    adapters = path if adapts_classifier(path) else None
    if adapters is None and new_head_seed is None and adapter_settings(path) is not None:
        raise UserError(f"{path}: adapters of a language model; expected a reward model, or adapters of one")
    whole = (base_of(path) or path) if adapters else path
    check_folder(whole, "reward model", "`path`")
    check_weight_files(whole)
    device = choose_device(device)
    check_dtype(dtype)
    own_tokenizer = adapters is None or Path(path, TOKENIZER_FILE).is_file()
    try:
        config = AutoConfig.from_pretrained(whole, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path if own_tokenizer else whole, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(f"{path}: no model and tokenizer could be loaded ({reason(error)})") from error
    classifier = _is_classifier(path, config, adapters, new_head_seed is not None)
    check_tokenizer(tokenizer, path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and not classifier:
        raise UserError(f"{path}: the tokenizer has neither a pad nor an eos token; set one of them")
    try:
        with without_bars(), torch.random.fork_rng(devices=[]):  # the head that is drawn here is drawn again below
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                whole,
                num_labels=1,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        model.to(device)
    except Exception as error:  # of transformers, safetensors and torch
        raise UserError(f"{path}: no reward model could be loaded ({reason(error)})") from error
    missing = set(loading["missing_keys"])
    if adapters is not None:
        missing -= set(saved_shapes(adapters))
        read_adapters(model, adapters)
    if has_adapters(model):  # also those that lay beside the whole model
        merge_adapters(model)
    head = _missing_head(path, model, sorted(missing), not classifier)
    if classifier:
        _check_head(path, model, loading["unexpected_keys"])
    if new_head_seed is not None:
        _draw(model, head, new_head_seed)
    quiet_outputs(model)
    check_finite(model, path, dtype)
    check_vocabulary(model, tokenizer, path)
    _agree_on_padding(model, tokenizer, classifier, path)
    for parameter in model.parameters():  # out of the memory map, aligned as torch does it: scores equal to the bit
        parameter.data = parameter.data.clone()
    check_company(model.eval(), path)
    return model, tokenizer


def _is_classifier(path: str, config: Any, adapters: str | None, new_head: bool) -> bool:
    """Whether the folder has the head of a reward model, which is read; otherwise it is to get a new one.

    Raises:
        UserError: it has no head and is to get none, or one of another kind, which a new one would replace in silence.
    """
    architectures = getattr(config, "architectures", None) or []
    classifier = is_classifier(config)
    labels = config.num_labels if classifier else 1
    if adapters is not None and (saved := head_labels(adapters)) is not None:
        classifier, labels = True, saved
    found = f" ({architectures[0]})" if architectures else ""
    if not classifier and (not new_head or adapters is not None):
        raise UserError(f"{path}: not a reward model{found}; expected one with a head of one label: `tether reward`")
    if not classifier and any(word in name for name in architectures for word in OTHER_HEADS):
        raise UserError(
            f"{path}: a model with a head of another kind{found}, which a new one would replace; expected a language "
            "model, or a reward model of a class ...ForSequenceClassification"
        )
    if labels != 1:
        raise UserError(f"{path}: a classifier of {labels} labels; expected a reward model, which has one")
    return classifier


def _check_head(path: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """A head with more in it than the class computes, such as a bias or layers of its own, would score otherwise."""
    prefix = model.base_model_prefix + "."
    heads = {name.split(".")[0] for name, _ in model.named_parameters() if not name.startswith(prefix)}
    for name in sorted(unexpected):
        if name.split(".")[0] in heads | {"v_head", "value_head", "reward_head"}:
            raise UserError(
                f"{path}: the weights hold {name}, which {type(model).__name__} has no place for: its scores would be "
                "others; expected a reward model of the class that config.json names"
            )


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, classifier: bool, path: str) -> None:
    """Transformers reads the score of a causal model at the last token that is not its configuration's pad.

    A trained reward model keeps the id that it was trained with; one that names none is read at the last token,
    whatever its tokenizer pads with. A new one gets a pad token of its own where padding would be eos: that would hide
    the eos, and it is at a text's end, which looks alike in all, that a score is learned best.
    """
    configs = (model.config, model.config.get_text_config())
    if classifier:
        known = configs[1].pad_token_id
        if known is None or not 0 <= known < model.get_input_embeddings().weight.shape[0]:
            known = None  # -1 stands for none in old folders
        name = None if known is None else tokenizer.convert_ids_to_tokens(known)
        if name is not None:
            tokenizer.pad_token = name
        elif tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.pad_token = None  # which says that no eos is hidden
        if known is not None and known == tokenizer.eos_token_id:
            logger.info("%s: pads with its eos (%s): its score is read at the token before a final one", path, name)
        for part in configs:
            part.pad_token_id = known
        return
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        embeddings = model.get_input_embeddings().weight
        if tokenizer.pad_token_id >= embeddings.shape[0]:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
            with torch.no_grad():  # attention never sees it
                model.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    for part in configs:
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
