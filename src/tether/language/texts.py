"""Token ids as text: of a response, and of each of its tokens, so that the second add up to the first.

A response is the middle of a text. Tokenizers of SentencePiece's kind drop the space that a text begins with, so
nothing is decoded alone: it stands behind a token that is cut off again. Knows tokenizers; nothing of models.
N = responses, T = tokens of a response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tether.chat import ChatTemplate
from tether.tokens import encode_plain, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what decoders write for bytes that are no whole character
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of SentencePiece that stands for one byte


class Texts:
    """Decodes responses.

    Hidden from their text are the tokens that begin, end or fill up: bos, eos, pad, sep, cls and mask, the `ends`, what
    the chat template ends an answer with, and special tokens that are stop strings. All others are content, special
    ones such as `<think>` too.

    Args:
        tokenizer: of the policy.
        ends: further token ids that end a response.
        stop: strings that end a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.hidden = _hidden(tokenizer, ends, stop)
        self._before = _anchor(tokenizer)
        self._skipped = len(self._decode([self._before])[0]) if self._before else 0
        self._pieces: dict[int, str] = {}
        self._joint: set[int] = set()  # tokens that may be part of a character

    def responses(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """(N,) the text of each response, hidden tokens left out."""
        return [
            "".join(piece for token, piece in zip(ids, pieces, strict=True) if token not in self.hidden)
            for ids, pieces in zip(responses, self.pieces(responses), strict=True)
        ]

    def pieces(self, responses: Sequence[Sequence[int]]) -> list[list[str]]:
        """(N, T) the text of each token of each response, hidden ones shown.

        A character whose bytes are several tokens belongs to the last of them, the others have none. The texts of a
        response add up to that of all its tokens.
        """
        return [self._split(ids, whole) for ids, whole in zip(responses, self.shown(responses), strict=True)]

    def shown(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """(N,) the text of each response, hidden tokens shown."""
        return [text[self._skipped :] for text in self._decode([[*self._before, *ids] for ids in responses])]

    def of_tokens(self, token_ids: Iterable[int]) -> dict[int, str]:
        """The text of each of these tokens in the middle of a text, at least."""
        new = sorted(set(token_ids) - self._pieces.keys())
        if new:
            for token, piece in zip(new, self.shown([[token] for token in new]), strict=True):
                self._pieces[token] = piece
                name = self.tokenizer.convert_ids_to_tokens(token)
                if HALF in piece or (isinstance(name, str) and BYTE.fullmatch(name)):
                    self._joint.add(token)
        return self._pieces

    def tails(self, responses: Sequence[Sequence[int]], count: int) -> list[str]:
        """(N,) the text of at least the last `count` tokens of each response, hidden ones shown."""
        tails = []
        for ids in responses:
            start = max(0, len(ids) - count)
            self.of_tokens(ids[max(0, start - 1) :])
            while start and {ids[start], ids[start - 1]} <= self._joint:  # never begin within a character
                start -= 1
                self.of_tokens(ids[max(0, start - 1) : start])
            tails.append(ids[start:])
        return self.shown(tails)

    def _split(self, ids: Sequence[int], whole: str) -> list[str]:
        """The text of each token, which add up to `whole`."""
        alone = self.of_tokens(ids)
        pieces = [alone[token] for token in ids]
        if not self._joint.isdisjoint(ids):
            start = 0
            while start < len(ids):
                end = start
                while end < len(ids) and ids[end] in self._joint:
                    end += 1
                if end > start + 1:
                    run = ids[start:end]
                    pieces[start:end] = self._shares(run, self.shown([run])[0])
                start = max(end, start + 1)
        return pieces if "".join(pieces) == whole else self._shares(ids, whole)

    def _shares(self, ids: Sequence[int], whole: str) -> list[str]:
        """What each token adds to the text of those before it; for tokens whose texts depend on each other."""
        ends, end = [], 0
        for text in self.shown([ids[:count] for count in range(1, len(ids))]):
            end = max(end, shared_length(text, whole))
            ends.append(end)
        ends.append(len(whole))
        return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        # clean_up_tokenization_spaces would take spaces out that were sampled
        lists = [list(ids) for ids in token_ids]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return list(self.tokenizer.batch_decode(lists, **options)) if lists else []


def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A token of plain text that others can stand behind; none where there is none."""
    special = set(tokenizer.all_special_ids)
    for text in ("a", "x", "0", "1"):
        (ids,) = encode_plain(tokenizer, [text])
        if ids and not special & set(ids) and tokenizer.decode(ids) == text:
            return ids
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([token])) if token not in special else ""
        if text.strip() and HALF not in text:
            return [token]
    return []


def _hidden(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], stop: Sequence[str]) -> frozenset[int]:
    roles = ("bos", "eos", "pad", "sep", "cls", "mask")
    known = [getattr(tokenizer, f"{role}_token_id", None) for role in roles]
    hidden = {int(token) for token in known if token is not None}
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    hidden |= {token for token, content in special.items() if content in stop}
    return frozenset(hidden | set(ends) | (special.keys() & _turn_ends(tokenizer)))


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What the chat template writes after an answer."""
    chat = ChatTemplate(tokenizer)
    after = "" if chat.missing else chat.after_answer()
    return set(encode_plain(tokenizer, [after])[0]) if after else set()
