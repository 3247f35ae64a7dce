"""Splits comparisons of people by their prompts into what each step of the road reads.

Run as `python prepare.py PATH --output data`. PATH is whatever `tether reward --preferences.path` reads: pairs with
`chosen` and `rejected`, with or without `prompt`. A conversation is held out, or goes to the first or to the second
reward model, with all of its comparisons, whichever of its turns they are about. Long conversations lose their first
turns, so that a small model has room for the answer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tether.errors import UserError
from tether.language.preferences import ASSISTANT, Preference, PreferencesConfig, load_preferences

HUMAN = "\n\nHuman:"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the comparisons and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="file, folder or hub name of the comparisons")
    parser.add_argument("--split", default="train", help="split of a dataset folder or of a hub dataset")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for the files")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the conversations that no model reads")
    parser.add_argument("--max-characters", type=int, default=500, help="longest prompt; its first turns are dropped")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args(arguments)
    if not 0 < options.held_out < 1:
        parser.error(f"--held-out is {options.held_out}, expected a share between 0 and 1")
    if options.max_characters < 1:
        parser.error(f"--max-characters is {options.max_characters}, expected 1 or more")
    try:
        pairs = load_preferences(PreferencesConfig(path=options.path, split=options.split)).pairs
    except UserError as error:
        sys.exit(f"error: {error}")
    if any(not isinstance(pair.prompt, str) for pair in pairs):
        sys.exit(f"error: {options.path}: the comparisons are chat messages, expected text")
    first, second, held_out = split(pairs, options.held_out, options.seed)
    if not (first and second and held_out):
        sys.exit(f"error: {options.path}: {len(pairs)} comparisons do not fill three parts: give more")
    options.output.mkdir(parents=True, exist_ok=True)
    most = options.max_characters
    # Of different conversations, too, the last turn may be the same, such as "Go on."
    read = {shortened(str(pair.prompt), most) for pair in (*first, *second)}
    held_out = [pair for pair in held_out if shortened(str(pair.prompt), most) not in read]
    for name, part in (("first", first), ("second", second), ("held-out", held_out)):
        write(options.output / f"pairs-{name}.jsonl", [as_row(pair, most) for pair in part])
    learned = [*first, *second]
    write(options.output / "dialogues.jsonl", [{"text": text} for pair in learned for text in texts(pair, most)])
    rows = [as_row(pair, most) for pair in learned]
    write(options.output / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    write(options.output / "prompts.jsonl", unique_prompts(learned, most))
    write(options.output / "prompts-held-out.jsonl", unique_prompts(held_out, most))


def split(
    pairs: Sequence[Preference], held_out: float, seed: int
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """The comparisons of the first and of the second reward model, half of the conversations each, and the rest."""
    conversations = sorted({conversation(pair) for pair in pairs})
    random.Random(seed).shuffle(conversations)
    count = round(held_out * len(conversations))
    half = count + (len(conversations) - count) // 2
    place = {name: number for number, name in enumerate(conversations)}
    parts: tuple[list[Preference], list[Preference], list[Preference]] = ([], [], [])
    for pair in pairs:
        number = place[conversation(pair)]
        parts[2 if number < count else 0 if number < half else 1].append(pair)
    return parts


def conversation(pair: Preference) -> str:
    """How the conversation begins: of one conversation there may be several comparisons, at different turns."""
    return str(pair.prompt).split(ASSISTANT)[0].strip().lower()


def shortened(prompt: str, most: int) -> str:
    """The prompt from the first turn of the human on from which it has at most `most` characters, or its last turn."""
    starts = [place for place in range(len(prompt)) if prompt.startswith(HUMAN, place)]
    fitting = [place for place in starts if len(prompt) - place <= most]
    return prompt[(fitting or starts[-1:] or [0])[0] :]


def as_row(pair: Preference, most: int) -> dict[str, Any]:
    """What the reward models read."""
    return {"prompt": shortened(str(pair.prompt), most), "chosen": pair.chosen, "rejected": pair.rejected}


def texts(pair: Preference, most: int) -> Iterable[str]:
    """What a model learns to speak from: every turn once, in pieces that end with a turn of the assistant.

    Both answers are here, so that nothing in it says which of them was preferred.
    """
    prompt = str(pair.prompt)
    while len(prompt) > len(last := shortened(prompt, most)):
        earlier = prompt[: -len(last)]
        yield shortened(earlier, most)
        prompt = earlier
    end = shortened(str(pair.prompt), most)
    yield end + str(pair.chosen)
    yield end[max(0, end.rfind(HUMAN)) :] + str(pair.rejected)


def unique_prompts(pairs: Sequence[Preference], most: int) -> list[dict[str, Any]]:
    """Every prompt once."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(shortened(str(pair.prompt), most) for pair in pairs)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL and say so."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
