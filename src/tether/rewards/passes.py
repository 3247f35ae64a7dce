"""From texts to raw scores: tokens as a reward model reads them, cut into passes that change speed and no score.

Knows a classifier and its tokenizer; nothing of normalisation, files or training.
N = texts, B = texts of a pass, L = tokens of its longest text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tether.chat import ChatTemplate, Conversation
from tether.errors import RewardError, UserError, reason
from tether.positions import frequency_edge
from tether.pretrained import context_length
from tether.rewards.verifiers import Text, text_of
from tether.tokens import encode_plain, tokenize_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt with its completion, as a reward model reads them.

    Text is tokenized as one, with the special tokens that the tokenizer adds by habit (each once), and ended by eos
    where padding is another token, where the score is read (padding with eos would hide it). Messages
    go through the chat template, with what a `Conversation` has for it beside them, and stay as it ends them.

    Args:
        tokenizer: the reward model's.
        prompts: (N,) texts, or lists of messages.
        completions: (N,) of the same kinds; a text after messages is a message of the assistant.
        names: (N,) what messages call them. None: `completion 0` and so on.

    Raises:
        RewardError: the chat template is missing or refuses the messages, or a text has no token.
    """
    names = names or [f"completion {index}" for index in range(len(completions))]
    texts, chats, chat = [], [], ChatTemplate(tokenizer)
    for prompt, completion, name in zip(prompts, completions, names, strict=True):
        chats.append(not isinstance(prompt, str))
        if isinstance(prompt, str):
            texts.append(prompt + text_of(completion))
        else:
            texts.append(_rendered(chat, prompt, completion, name))
    ids: list[list[int]] = [[] for _ in texts]
    for rendered in (False, True):
        chosen = [index for index, is_chat in enumerate(chats) if is_chat is rendered]
        if chosen:
            of = [texts[index] for index in chosen]
            encoded = (
                encode_plain(tokenizer, of) if rendered else tokenize_whole(tokenizer, of, [names[i] for i in chosen])
            )
            for index, found in zip(chosen, encoded, strict=True):
                ids[index] = found
    eos = tokenizer.eos_token_id
    for index, found in enumerate(ids):
        if not chats[index] and eos is not None and eos != tokenizer.pad_token_id and found[-1:] != [eos]:
            found.append(eos)
        if not found:
            raise RewardError(f"{names[index]}: the tokenizer makes no token of {texts[index]!r:.40}")
    return ids


def shortened(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], most: int) -> list[int]:
    """The end of a text that is longer than `most` tokens, behind the special tokens that it begins with.

    An encoder such as BERT reads its score at the first of them.
    """
    if len(token_ids) <= most:
        return list(token_ids)
    added = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    pairs = zip(added["input_ids"], added["special_tokens_mask"], strict=True)
    before = takewhile(lambda pair: pair[1], pairs)
    opening = {tokenizer.bos_token_id, tokenizer.cls_token_id, *(index for index, _ in before)}
    kept = 0
    while kept < most and token_ids[kept] in opening:
        kept += 1
    return [*token_ids[:kept], *token_ids[len(token_ids) - (most - kept) :]]


def _rendered(chat: ChatTemplate, prompt: Text, completion: Text, where: str) -> str:
    if chat.missing:
        raise RewardError(
            f"{where} is of chat messages, but the tokenizer of the reward model "
            f"{chat.tokenizer.name_or_path} has no chat template: train it from a model that has one"
        )
    assert not isinstance(prompt, str)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    try:
        return chat.render(Conversation([*prompt, *answer], getattr(prompt, "variables", None)), where)
    except UserError as error:
        raise RewardError(str(error)) from error


def score_tokens(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], autocast: bool = False) -> Tensor:
    """Raw scores (B,) of one pass, float32, each as the model gives it alone; with gradients where they are on.

    Padded on the right. Where the model's configuration names no pad, the filling is an id that ends none of the texts,
    since transformers reads the score of a causal model at the last token that is not the pad. Where the model reads
    short texts with other frequencies than long ones, each kind has a pass of its own.
    """
    if model.config.is_encoder_decoder and len(token_ids) > 1:  # which refuse texts that differ in their count of eos
        return torch.cat([score_tokens(model, [ids], autocast) for ids in token_ids])
    edge = frequency_edge(model)
    long = [edge is not None and len(ids) > edge for ids in token_ids]
    if any(long) and not all(long):
        order = sorted(range(len(long)), key=long.__getitem__)
        parts = [[token_ids[i] for i in order if long[i] is kind] for kind in (False, True)]
        scores = torch.cat([score_tokens(model, part, autocast) for part in parts])
        return scores[torch.tensor(order, device=scores.device).argsort()]
    named = model.config.get_text_config().pad_token_id
    last = {ids[-1] for ids in token_ids}
    pad = next(index for index in range(len(last) + 1) if index not in last) if named is None else named
    longest = max(map(len, token_ids))
    inputs = torch.full((len(token_ids), longest), pad, dtype=torch.long)  # (B, L)
    attended = torch.zeros((len(token_ids), longest), dtype=torch.long)
    for row, ids in enumerate(token_ids):
        inputs[row, : len(ids)] = torch.tensor(ids)
        attended[row, : len(ids)] = 1
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = model.device
    with _padded_with(model, pad), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(input_ids=inputs.to(device), attention_mask=attended.to(device), **options)
    if output.logits.numel() != len(token_ids):
        found = tuple(output.logits.shape)
        raise UserError(f"{type(model).__name__}: scores of shape {found}, expected one for each text")
    return output.logits.reshape(-1).float()


@contextmanager
def _padded_with(model: PreTrainedModel, pad: int) -> Iterator[None]:
    configs = (model.config, model.config.get_text_config())
    before = [config.pad_token_id for config in configs]
    for config in configs:
        config.pad_token_id = pad
    try:
        yield
    finally:
        for config, named in zip(configs, before, strict=True):
            config.pad_token_id = named


@torch.inference_mode()
def check_company(model: PreTrainedModel, path: str) -> None:
    """Ask the model whether a text's score depends on longer ones beside it, which pad it on the right.

    Those of XLNet and FNet do, among others: they read the last column, or mix padding into the text.

    Raises:
        UserError: it does, or the model reads no texts.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = 0 if vocabulary < 32 else 16  # beyond the special tokens, where there is room
    room = context_length(model) or 9
    sizes = [min(size, room) for size in (3, 4, 5, 6, 7, 9)]  # so many that not all scores are near 0
    texts = [[first + (7 * i + 3 * size) % (vocabulary - first) for i in range(size)] for size in sizes]
    if model.config.is_encoder_decoder and isinstance(model.config.eos_token_id, int):  # the score is read there
        texts = [[*ids[:-1], model.config.eos_token_id] for ids in texts]
    try:
        alone = torch.cat([score_tokens(model, [ids]) for ids in texts])
        together = score_tokens(model, texts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of whatever model this is
        raise UserError(f"{path}: {type(model).__name__} cannot score a text ({reason(error)})") from error
    off = float((alone - together).abs().max()) / (float(alone.abs().max()) + 1e-12)
    if not off <= (1e-3 if model.dtype == torch.float32 else 0.1):  # rounding may move them, by no more than this
        raise UserError(
            f"{path}: the scores of {type(model).__name__} depend on the texts beside them (by {off:.1e} of their "
            "size): it does not keep padding apart; expected a reward model that does"
        )


def passes(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in passes of about equal lengths, each of at most `most_tokens` tokens, padding included, or one text."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    chosen: list[int] = []
    for index in order:
        if chosen and (len(chosen) + 1) * lengths[index] > most_tokens:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


@torch.inference_mode()
def score_all(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], most_tokens: int = 8192) -> Tensor:
    """Raw scores (N,) on the CPU, in the order of `token_ids`, `most_tokens` tokens at a time."""
    scores = torch.zeros(len(token_ids))
    for chosen in passes([len(ids) for ids in token_ids], most_tokens):
        scores[torch.tensor(chosen)] = score_tokens(model, [token_ids[index] for index in chosen]).cpu()
    return scores
