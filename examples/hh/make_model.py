"""Makes a small language model that knows nothing yet, and a tokenizer trained on the texts that it will read.

Run as `python make_model.py data/dialogues.jsonl --output model`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tether.errors import UserError
from tether.language.rows import load_rows

EOS, PAD = "</s>", "<pad>"  # two: a reward model reads the score at eos, which padding with eos would hide


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both and save them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="rows with a column `text`")
    parser.add_argument("--output", type=Path, default=Path("model"), help="folder for the model and its tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192, help="of the hidden states; a multiple of 64")
    parser.add_argument("--context", type=int, default=256, help="longest text in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args(arguments)
    if options.width < 64 or options.width % 64:
        parser.error(f"--width is {options.width}, expected a multiple of 64")
    if options.vocabulary < 258:
        parser.error(f"--vocabulary is {options.vocabulary}, expected at least 258: every byte, and two special tokens")
    for name in ("layers", "context"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    try:
        rows = load_rows(options.path, "train")
    except UserError as error:
        sys.exit(f"error: {error}")
    if "text" not in rows[0]:
        sys.exit(f"error: {options.path}: no column `text`, expected the file `dialogues.jsonl` that prepare.py wrote")
    tokenizer = make_tokenizer([row["text"] for row in rows], options.vocabulary)
    disable_progress_bar()
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be written in it, and what is frequent is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


if __name__ == "__main__":
    main()
