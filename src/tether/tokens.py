"""Text to tokens, as a language model or a reward model reads it: one bos, no eos that nobody wrote.

Knows tokenizers; nothing of chat templates, models or files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BEFORE = ("\n", ":", ".", "0", "a", "x", "(", "|")
"""What a text can be tokenized behind; the first that stays a token of its own serves."""

_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()


def tokenize_whole(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of whole texts, with the special tokens that the tokenizer adds by habit, each once.

    Text that a chat template has rendered often begins with bos, and may end with eos: where the tokenizer would add
    the same tokens once more, it does not.

    Args:
        tokenizer: whose habit it is.
        texts: (N,) texts.
        places: (N,) where each is from, for the one warning that a text begins with bos already.
    """
    whole, plain = encode_plain(tokenizer, texts, special_tokens=True), encode_plain(tokenizer, texts)
    for index, (ids, own) in enumerate(zip(whole, plain, strict=True)):
        added = len(ids) - len(own)
        if added <= 0:
            continue
        first = next((start for start in range(added, -1, -1) if ids[start : start + len(own)] == own), None)
        if first is None:  # the tokenizer changes the text itself: nothing can be told apart
            continue
        before, after = ids[:first], ids[first + len(own) :]
        if before and own[: len(before)] == before:
            _warn(tokenizer, before, texts[index] if places is None else places[index])
            before = []
        if after and own[-len(after) :] == after:
            after = []
        whole[index] = before + own + after
    return whole


def tokenize_text(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of texts to be continued: as `tokenize_whole`, less an eos that the tokenizer appends.

    An eos that is written in the text itself stays.
    """
    # questions that come again and again are tokenized once
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    distinct = list(dict.fromkeys(texts))
    named = None if places is None else [places[first[text]] for text in distinct]
    encoded = tokenize_whole(tokenizer, distinct, named)
    eos = tokenizer.eos_token_id
    ending = [index for index, ids in enumerate(encoded) if _trailing(ids, eos)]
    if ending:
        plain = encode_plain(tokenizer, [distinct[index] for index in ending])
        for index, without in zip(ending, plain, strict=True):
            while _trailing(encoded[index], eos) > _trailing(without, eos):
                encoded[index].pop()
    token_ids = dict(zip(distinct, encoded, strict=True))
    return [list(token_ids[text]) for text in texts]


def tokenize_behind(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that stand behind others, without special tokens.

    Tokenizers of SentencePiece's kind begin every text with a space, which is not there in the middle of one.
    """
    found = encode_plain(tokenizer, texts)
    for mark in BEFORE:
        (alone,) = encode_plain(tokenizer, [mark])
        behind = encode_plain(tokenizer, [mark + text for text in texts])
        if alone and all(ids[: len(alone)] == alone for ids in behind):
            return [ids[len(alone) :] for ids in behind]
    return found


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many entries two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def encode_plain(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of texts as the tokenizer gives them."""
    # verbose=False: no warning about length, as lengths are checked against the model's context elsewhere.
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, **options)
    return [list(ids) for ids in encoded["input_ids"]]


def _trailing(ids: Sequence[int], token_id: int | None) -> int:
    """How many times `token_id` stands at the end of `ids`."""
    count = 0
    while count < len(ids) and ids[-1 - count] == token_id:
        count += 1
    return count


def _warn(tokenizer: PreTrainedTokenizerBase, before: list[int], place: str) -> None:
    if tokenizer in _warned:
        return
    _warned.add(tokenizer)
    mark = "".join(tokenizer.convert_ids_to_tokens(before))
    logger.warning(
        "%s: the text begins with %s, which the tokenizer adds too, as if a chat template had rendered it: it is read "
        "once",
        place if len(place) <= 80 else place[:77] + "...",
        mark,
    )
