"""The road on human pairs: how they are split, what is compared, and every command of its page at a small scale."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tether.cli import main
from tether.language.models import load_causal_lm, load_tokenizer
from tether.pipeline.evaluate import estimate, estimate_share
from tether.uncertainty import wilson

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples/hh"
PAGE = ROOT / "docs/hh.md"


def script(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name))


PREPARE, MAKE_MODEL, WIN_RATE = script("prepare"), script("make_model"), script("win_rate")


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def pairs_file(folder: Path, conversations: int = 40) -> Path:
    """Every conversation is compared at its first answer and at its second."""
    rows = []
    for i in range(conversations):
        asked = f"What is {i} plus one?"
        kind, rude = f"It is {i + 1}, friend.", "Who cares?"
        rows.append({"chosen": dialogue(asked, kind), "rejected": dialogue(asked, rude)})
        turns = (asked, kind, "Thank you!")
        rows.append({"chosen": dialogue(*turns, "You are welcome."), "rejected": dialogue(*turns, "Go away.")})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# How pairs are split ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    PREPARE.main([str(pairs_file(tmp_path)), "--output", str(tmp_path / "data"), "--held-out", "0.25"])
    return tmp_path / "data"


def questions(text: str) -> set[str]:
    return set(re.findall(r"What is (\d+) plus", text))


def test_a_conversation_is_in_one_part_with_all_of_its_comparisons(data: Path) -> None:
    parts = [rows_of(data / f"pairs-{name}.jsonl") for name in ("first", "second", "held-out")]
    assert [len(rows) for rows in parts] == [30, 30, 20]
    asked = [questions(json.dumps(rows)) for rows in parts]
    assert [len(names) for names in asked] == [15, 15, 10]
    assert len(set().union(*asked)) == 40


def test_what_is_held_out_is_in_no_file_that_is_learned_from(data: Path) -> None:
    held_out = questions((data / "pairs-held-out.jsonl").read_text())
    assert questions((data / "prompts-held-out.jsonl").read_text()) == held_out
    for name in ("dialogues", "answers", "prompts", "pairs-first", "pairs-second"):
        read = questions((data / f"{name}.jsonl").read_text())
        assert read, name
        assert not read & held_out, name


def test_a_last_turn_that_is_read_elsewhere_is_not_held_out(tmp_path: Path) -> None:
    turns = [(f"What is {i} plus one?", f"It is {i + 1}.", "Go on.") for i in range(40)]
    rows = [{"chosen": dialogue(*t, "Then comes the next."), "rejected": dialogue(*t, "No.")} for t in turns]
    moon = dialogue("How old is the moon?")
    rows.append({"chosen": moon + "\n\nAssistant: Old.", "rejected": moon + "\n\nAssistant: Who cares?"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PREPARE.main([str(path), "--output", str(tmp_path / "data"), "--max-characters", "30", "--held-out", "0.9"])
    held_out = rows_of(tmp_path / "data/pairs-held-out.jsonl")
    assert {row["prompt"] for row in held_out} == {moon + "\n\nAssistant:"}


def test_only_what_was_preferred_is_an_answer_to_imitate(data: Path) -> None:
    answers = rows_of(data / "answers.jsonl")
    assert len(answers) == 60
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in answers)
    assert {row["completion"] for row in answers if "Thank you" in row["prompt"]} == {" You are welcome."}
    assert not any(re.search("cares|away", row["completion"]) for row in answers)


def test_the_dialogues_hold_both_answers(data: Path) -> None:
    texts = [row["text"] for row in rows_of(data / "dialogues.jsonl")]
    assert sum("You are welcome." in text for text in texts) == sum("Go away." in text for text in texts) == 30


def test_a_long_prompt_keeps_its_last_turns() -> None:
    prompt = dialogue("a" * 30, "b" * 30, "c" * 30) + "\n\nAssistant:"
    last = dialogue("c" * 30) + "\n\nAssistant:"
    assert PREPARE.shortened(prompt, 1000) == prompt
    assert PREPARE.shortened(prompt, len(prompt) - 1) == last
    assert PREPARE.shortened(prompt, 5) == last  # one turn stays, however long
    assert PREPARE.shortened("SUBREDDIT: r/tea\n\nTL;DR:", 5) == "SUBREDDIT: r/tea\n\nTL;DR:"


def test_the_turns_that_a_prompt_lost_are_dialogues_of_their_own() -> None:
    turns = [f"{letter * 30}" for letter in "abcde"]
    pair = SimpleNamespace(prompt=dialogue(*turns) + "\n\nAssistant:", chosen=" good", rejected=" bad")
    pieces = list(PREPARE.texts(pair, 120))
    assert sorted(pieces) == [
        dialogue("a" * 30, "b" * 30),
        dialogue("c" * 30, "d" * 30),
        dialogue("e" * 30) + "\n\nAssistant: bad",
        dialogue("e" * 30) + "\n\nAssistant: good",
    ]


def test_the_same_seed_gives_the_same_split_and_another_one_another(tmp_path: Path) -> None:
    path = str(pairs_file(tmp_path))
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        PREPARE.main([path, "--output", str(tmp_path / name), "--seed", seed])
    first, again, other = ((tmp_path / name / "pairs-first.jsonl").read_text() for name in "abc")
    assert first == again != other


def test_comparisons_of_posts_and_summaries_are_split_by_the_post(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"SUBREDDIT: r/tea\n\nPOST: tea {i // 2}\n\nTL;DR:", "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i in range(40)
    ]
    path = tmp_path / "tldr.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PREPARE.main([str(path), "--output", str(tmp_path / "data"), "--held-out", "0.5"])
    parts = [rows_of(tmp_path / f"data/pairs-{name}.jsonl") for name in ("first", "second", "held-out")]
    assert [len(part) for part in parts] == [10, 10, 20]
    posts = [{row["prompt"] for row in part} for part in parts]
    assert not posts[0] & posts[1]
    assert not (posts[0] | posts[1]) & posts[2]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "no such file"),
        ([{"chosen": "a", "rejected": "b"}], "there is no prompt"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "1 comparisons do not fill three parts"),
        ([{"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"}], "chat messages"),
    ],
)
def test_pairs_that_cannot_be_split_end_in_one_line(
    tmp_path: Path, rows: list[dict[str, object]] | None, said: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as ended:
        PREPARE.main([str(path), "--output", str(tmp_path / "data")])
    message = str(ended.value)
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--width", "100"], "--width is 100, expected a multiple of 64"),
        (["--vocabulary", "100"], "--vocabulary is 100, expected at least 258"),
        (["--layers", "0"], "--layers is 0, expected 1 or more"),
    ],
)
def test_a_model_of_impossible_size_is_refused(
    data: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        MAKE_MODEL.main([str(data / "dialogues.jsonl"), *flags])
    assert said in capsys.readouterr().err


def test_the_model_is_made_from_its_seed_and_its_tokenizer_writes_every_text(data: Path, tmp_path: Path) -> None:
    small = ["--vocabulary", "300", "--layers", "1", "--width", "64"]
    loaded = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        MAKE_MODEL.main([str(data / "dialogues.jsonl"), "--output", str(tmp_path / name), "--seed", seed, *small])
        loaded.append(load_causal_lm(str(tmp_path / name)))
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in loaded)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    text = "\n\nHuman: naïve ’quotes’ 你好\n\nAssistant:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


# What is compared ---------------------------------------------------------------------------------------------------


def test_the_win_rate_is_that_of_all_pairs_of_responses_to_a_prompt() -> None:
    found = WIN_RATE.compare({"p": [1.0, 3.0], "q": [0.0]}, {"p": [2.0, 1.0], "q": [1.0]})
    wins, gains = [(0 + 0.5 + 1 + 1) / 4, 0.0], [0.5, -1.0]
    assert found.wins == estimate_share(wins, 2)
    assert found.wins.mean == sum(wins) / 2
    assert found.gain == estimate(gains)
    assert found.gain.mean == sum(gains) / 2
    assert found.prompts == 2


def test_the_win_rate_of_the_same_responses_is_a_half() -> None:
    scores = {f"p{i}": [float(i % 3)] for i in range(30)}
    found = WIN_RATE.compare(scores, scores)
    assert (found.wins.mean, found.gain.mean) == (0.5, 0.0)
    assert found.wins.interval == pytest.approx(wilson(15, 30))  # 30 ties are no proof of a half


def test_the_win_rate_refuses_files_of_different_prompts_and_without_scores(tmp_path: Path) -> None:
    for name, row in (("a", {"prompt": "p", "score": 1}), ("b", {"prompt": "q", "score": 1}), ("c", {"prompt": "p"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    with pytest.raises(SystemExit, match="2 prompts are in one file alone"):
        WIN_RATE.main([a, b])
    with pytest.raises(SystemExit, match=r"c.jsonl, row 1: expected `prompt` and a number in `score`"):
        WIN_RATE.main([a, c])


# The page -----------------------------------------------------------------------------------------------------------

SMALLER = {
    "tether sft": "--max-steps 2",
    "tether reward": "--max-steps 2",
    "tether ppo": "--iterations 1 --collect.prompts 4 --sampling.max-new-tokens 4 --frontier.prompts 2"
    " --frontier.samples 2",
    "tether generate": "--sampling.max-new-tokens 4",
    "examples/hh/make_model.py": "--vocabulary 300 --layers 1 --width 64",
}


def commands_of(page: Path) -> list[str]:
    """Those of the road, which begins with the preparation of `pairs.jsonl`; other data sets come after it."""
    text = page.read_text(encoding="utf-8").split("## The same for TL;DR")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("tether ", "python "))]


def test_the_commands_of_the_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = commands_of(PAGE)
    assert {line.split()[1] for line in lines} >= {"sft", "reward", "ppo", "report", "generate", "score"}
    for line in lines:
        added = next((flags for start, flags in SMALLER.items() if start in line), "")
        program, *words = shlex.split(f"{line} {added}", comments=True)
        if program == "tether":
            words = [re.sub(r"iteration-\d+", "iteration-000001", word) for word in words]
            assert main(words) == 0, line
        else:
            script(Path(words[0]).stem).main(words[1:])
    said = capsys.readouterr().out
    assert re.search(r"win rate \d+% \(\d+ to \d+%\) on \d+ prompts", said)
