"""From texts to raw scores: tokens as a reward model reads them, cut into passes that change speed and no score.

Knows a classifier and its tokenizer; nothing of normalisation, files or training.
N = texts, B = texts of a pass, L = tokens of its longest text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tether.errors import RewardError, reason
from tether.positions import frequency_edge
from tether.rewards.verifiers import Text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt with its completion, as a reward model reads them.

    Text is tokenized as one, with the special tokens that the tokenizer adds by habit, and ended by eos where padding
    is another token, where the score is read (padding with eos would hide it). Messages
    go through the chat template and stay as it ends them.

    Args:
        tokenizer: the reward model's.
        prompts: (N,) texts, or lists of messages.
        completions: (N,) of the same kinds; a text after messages is a message of the assistant.
        names: (N,) what messages call them. None: `completion 0` and so on.

    Raises:
        RewardError: the chat template is missing or refuses the messages, or a text has no token.
    """
    names = names or [f"completion {index}" for index in range(len(completions))]
    texts, chats = [], []
    for prompt, completion, name in zip(prompts, completions, names, strict=True):
        chats.append(not isinstance(prompt, str))
        if isinstance(prompt, str):
            texts.append(prompt + text_of(completion))
        else:
            texts.append(_rendered(tokenizer, prompt, completion, name))
    ids: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        chosen = [index for index, is_chat in enumerate(chats) if is_chat is chat]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not chat, verbose=False)["input_ids"]
            for index, found in zip(chosen, encoded, strict=True):
                ids[index] = list(found)
    eos = tokenizer.eos_token_id
    for index, found in enumerate(ids):
        if not chats[index] and eos is not None and eos != tokenizer.pad_token_id and found[-1:] != [eos]:
            found.append(eos)
        if not found:
            raise RewardError(f"{names[index]}: the tokenizer makes no token of {texts[index]!r:.40}")
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, where: str) -> str:
    if not tokenizer.chat_template:
        raise RewardError(
            f"{where} is of chat messages, but the tokenizer of the reward model "
            f"{tokenizer.name_or_path} has no chat template: train it from a model that has one"
        )
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    try:
        return str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
    except Exception as error:  # a template is a program of its author's: it may raise anything
        raise RewardError(f"{where}: the chat template refuses the messages: {reason(error)}") from error


def score_tokens(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], autocast: bool = False) -> Tensor:
    """Raw scores (B,) of one pass, float32; padded on the right, with gradients where they are on.

    Where the model reads short texts with other frequencies than long ones, each kind has a pass of its own.
    """
    edge = frequency_edge(model)
    long = [edge is not None and len(ids) > edge for ids in token_ids]
    if any(long) and not all(long):
        order = sorted(range(len(long)), key=long.__getitem__)
        parts = [[token_ids[i] for i in order if long[i] is kind] for kind in (False, True)]
        scores = torch.cat([score_tokens(model, part, autocast) for part in parts])
        return scores[torch.tensor(order, device=scores.device).argsort()]
    pad = model.config.get_text_config().pad_token_id
    longest = max(map(len, token_ids))
    inputs = torch.full((len(token_ids), longest), pad, dtype=torch.long)  # (B, L)
    attended = torch.zeros((len(token_ids), longest), dtype=torch.long)
    for row, ids in enumerate(token_ids):
        inputs[row, : len(ids)] = torch.tensor(ids)
        attended[row, : len(ids)] = 1
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(input_ids=inputs.to(device), attention_mask=attended.to(device), **options)
    return output.logits[:, 0].float()


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
