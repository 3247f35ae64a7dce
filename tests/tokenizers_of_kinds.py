"""Small tokenizers of the kinds that people bring, made on the spot: how they mark spaces, bytes, beginnings and ends.

Each is trained on a few lines, so that its words are real merges. None has the vocabulary of the model that it is named
after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "What is 12 + 7? 19",
    "What is 3 + 9? 12",
    "the quick brown fox jumps over the lazy dog .",
    "user assistant system answer : think",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level(
    specials: list[str], plain: tuple[str, ...] = (), bos: str = "", **names: Any
) -> PreTrainedTokenizerFast:
    """BPE over bytes; `bos` is put before every text, `plain` are added tokens that are not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken(text, normalized=False) for text in plain])
    if bos:
        token = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, token)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def sentence_piece(
    prefix: str = "normalizer", fallback: bool = True, bos: bool = True, specials: tuple[str, ...] = (), **names: Any
) -> PreTrainedTokenizerFast:
    """BPE over characters with ▁ for spaces.

    Args:
        prefix: who puts a space before a text: the `normalizer` (Llama 2), a Metaspace at the `first` piece (Mistral)
            or at `always` each (legacy), or `never` (Gemma).
        fallback: characters without a token are written byte by byte; else they are <unk>.
        bos: <s> is put before every text.
        specials: further special tokens.
        names: further arguments of the tokenizer.
    """
    head = ["<unk>", "<s>", "</s>", *specials]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)] if fallback else []
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    parts: list[Any] = [decoders.ByteFallback(), decoders.Fuse()] if fallback else [decoders.Fuse()]
    if prefix in ("first", "always"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    else:
        start = [normalizers.Prepend("▁")] if prefix == "normalizer" else []
        backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    ends = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *parts, *ends])
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*head, *bytes_], max_token_length=5, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    state = json.loads(backend.to_str())  # bytes are plain vocabulary, not special tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in head]
    backend = Tokenizer.from_str(json.dumps(state))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def unigram() -> PreTrainedTokenizerFast:
    """Pieces with probabilities, eos after every text and no bos, as T5 has them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _with(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


END, START, TEXT_END = "<|im_end|>", "<|im_start|>", "<|endoftext|>"

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    # eos = bos, no pad, no chat
    "gpt2": lambda: byte_level([TEXT_END], bos_token=TEXT_END, eos_token=TEXT_END),
    # eos ends a turn, pad is another token, thinking in added tokens that are not special
    "qwen": lambda: _with(
        byte_level([TEXT_END, START, END], ("<think>", "</think>"), eos_token=END, pad_token=TEXT_END), CHATML
    ),
    # bos before every text, special tokens that are content
    "llama3": lambda: _with(
        byte_level(
            ["<|bos|>", TEXT_END, START, END, "<think>", "</think>"],
            bos="<|bos|>",
            bos_token="<|bos|>",
            eos_token=TEXT_END,
            clean_up_tokenization_spaces=True,
        ),
        "{{ bos_token }}" + CHATML,
    ),
    # eos = pad, bos begins a turn
    "smollm": lambda: _with(byte_level([TEXT_END, START, END], bos_token=START, eos_token=END, pad_token=END), CHATML),
    "llama2": lambda: _with(sentence_piece(), INST),
    "llama2 without bos": lambda: sentence_piece(bos=False),
    "llama2 padded with unk": lambda: sentence_piece(pad_token="<unk>"),
    "mistral": lambda: _with(sentence_piece("first"), INST),
    "mistral of old": lambda: _with(sentence_piece("always"), INST),
    "sentence piece without bytes": lambda: sentence_piece(fallback=False),
    "gemma": lambda: _with(
        sentence_piece("never", specials=("<pad>", "<start_of_turn>", "<end_of_turn>"), pad_token="<pad>"), TURNS
    ),
    "thinking in special tokens": lambda: _with(
        sentence_piece(specials=("<think>", "</think>", "<answer>", "</answer>")), INST
    ),
    "t5": unigram,
}
