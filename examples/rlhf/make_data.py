"""A small world of text: guests order at a cafe, and someone answers.

    python make_data.py runs/cafe

writes into the folder what the road from demonstrations to PPO starts with:

    base/                  a causal language model of some 100,000 parameters that knows nothing, and its tokenizer
    tiny/                  the same with a few thousand: too small to judge well
    demonstrations.jsonl   `prompt` and `completion`, by writers who are in a hurry
    prompts.jsonl          `prompt`: orders to train on
    held_out.jsonl         `prompt`: orders that nothing is trained on
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from annotator import GOES_WITH, PRAISE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAMES = [
    "Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Joan",
    "Kofi", "Lena", "Milo", "Nora", "Omar", "Pia", "Quinn", "Rosa", "Sam", "Tara",
    "Uma", "Vito", "Wanda", "Yusuf", "Amir", "Bela", "Carl", "Dora", "Emil", "Fay",
    "Greta", "Hugo", "Ines", "Jack", "Kira", "Liam", "Mona", "Nils", "Olga", "Paul",
]  # fmt: skip
EOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"


def make_prompts(rng: random.Random) -> list[str]:
    """Every order there can be, shuffled."""
    prompts = [f"For {name}: {thing}." for name in NAMES for thing in GOES_WITH]
    rng.shuffle(prompts)
    return prompts


def demonstration(prompt: str, rng: random.Random) -> str:
    """What a writer answers: often the wrong thing or none, seldom with a treat, and praise soon ends."""
    thing = prompt.removesuffix(".").split(": ")[1]
    answer = " Hello!" if rng.random() < 0.4 else ""
    luck = rng.random()
    if luck < 0.2:
        thing = rng.choice([other for other in GOES_WITH if other != thing])
    if luck < 0.8:
        answer += f" Here is {thing}"
        if rng.random() < 0.08:
            answer += f" with {GOES_WITH[thing] if rng.random() < 0.5 else rng.choice(list(GOES_WITH.values()))}"
        answer += "."
    if rng.random() < 0.15 or not answer:
        answer += " Next."
    while rng.random() < 0.25:
        answer += f" {rng.choice(PRAISE)}!"
    return answer


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each word, with the space before it, and for each punctuation mark."""
    words = ["For", *(f" {word}" for word in ("Hello", "Here", "is", "with", "Next"))]
    words += [f" {word}" for word in (*NAMES, *GOES_WITH, *GOES_WITH.values(), *PRAISE)] + [".", ":", "!"]
    vocabulary = {word: index for index, word in enumerate([EOS, PAD, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, width: int, layers: int, heads: int) -> None:
    """A GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.1,  # the usual 0.02 is for widths near a thousand
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters: {folder}")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows: {path}")


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demonstrations", type=int, default=8000)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of the models' weights")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    save_model(arguments.folder / "base", tokenizer, width=64, layers=2, heads=4)
    save_model(arguments.folder / "tiny", tokenizer, width=16, layers=1, heads=1)
    prompts = make_prompts(rng)
    held_out, prompts = prompts[: arguments.held_out], prompts[arguments.held_out :][: arguments.prompts]
    demonstrated = [rng.choice(prompts) for _ in range(arguments.demonstrations)]
    rows = [{"prompt": prompt, "completion": demonstration(prompt, rng)} for prompt in demonstrated]
    write(arguments.folder / "demonstrations.jsonl", rows)
    write(arguments.folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write(arguments.folder / "held_out.jsonl", [{"prompt": prompt} for prompt in held_out])


if __name__ == "__main__":
    main()
