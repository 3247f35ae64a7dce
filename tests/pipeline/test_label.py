"""Pairs for people: from policies, by an ensemble's disagreement, and back out as preferences."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models import make_model, make_tokenizer

from tether.cli import main
from tether.errors import UserError
from tether.language.preferences import PreferencesConfig, load_preferences
from tether.language.prompts import PromptsConfig
from tether.language.sampler import SamplingConfig
from tether.pipeline.label import LabelConfig, label, most_disputed, sample_pairs
from tether.rewards.classifiers import load_classifier
from tether.rewards.models import RewardModel
from tether.runs.labels import LabelSet, NewPair
from tether.studio import StudioConfig

PROMPTS = ("ab", "cd", "ef", "fa", "bd", "ce")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, `a` and `b`, an ensemble `judge` of three, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for member in range(3):
        model, tokenizer = load_classifier(str(folder / "a"), new_head_seed=member)
        with torch.no_grad():
            model.score.weight.mul_(50)
        model.save_pretrained(folder / "judge" / f"member-{member}")
        tokenizer.save_pretrained(folder / "judge" / f"member-{member}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> LabelConfig:
    return LabelConfig(
        policy=str(models / "a"),
        pairs=6,
        output=str(tmp_path / "x.labels.db"),
        prompts=PromptsConfig(path=str(models / "prompts.jsonl")),
        sampling=SamplingConfig(max_new_tokens=6),
        open=False,
    )


def test_of_chat_prompts_the_set_keeps_the_turns_and_what_the_policy_read(models: Path, config: LabelConfig) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}f"
    chat = Path(config.output).parent / "chat"
    make_model().save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    prompts = replace(config.prompts, chat=True)
    for pair in sample_pairs(replace(config, policy=str(chat), prompts=prompts)):
        assert [message["role"] for message in pair.prompt] == ["user"]
        assert pair.text == pair.prompt[0]["content"] + "f"
    assert {pair.text for pair in sample_pairs(config)} == {None}


def test_two_answers_of_one_policy_to_each_prompt(config: LabelConfig) -> None:
    pairs = sample_pairs(config)
    assert sorted(str(pair.prompt) for pair in pairs) == sorted(PROMPTS)
    assert [pair.prompt for pair in pairs] != list(PROMPTS)  # in a random order
    assert all(pair.a != pair.b for pair in pairs)
    assert sample_pairs(config) == pairs
    assert sample_pairs(replace(config, seed=1)) != pairs


def test_one_answer_of_each_policy(config: LabelConfig, models: Path) -> None:
    """At temperature 0 each says one thing to a prompt, so that it can be told who said what."""
    greedy = replace(config, sampling=SamplingConfig(max_new_tokens=6, temperature=0.0))
    pairs = sample_pairs(replace(greedy, against=str(models / "b")))
    swapped = sample_pairs(replace(greedy, policy=str(models / "b"), against=str(models / "a")))
    assert {(p.prompt, p.a, p.b) for p in pairs} == {(p.prompt, p.b, p.a) for p in swapped}
    assert len(pairs) == len({pair.prompt for pair in pairs}) == 6


def test_a_policy_against_itself_is_not_the_same_twice(config: LabelConfig) -> None:
    assert len(sample_pairs(replace(config, against=config.policy))) == 6


def test_prompts_come_again_when_all_were_taken(config: LabelConfig) -> None:
    pairs = sample_pairs(replace(config, pairs=15))
    counts = sorted(sum(pair.prompt == text for pair in pairs) for text in PROMPTS)
    assert sum(counts) == 15
    assert counts[0] >= 2


def test_answers_that_are_all_the_same_are_no_pairs(
    config: LabelConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = replace(config, sampling=SamplingConfig(max_new_tokens=6, temperature=0.0))
    with pytest.raises(UserError, match="the two answers to every prompt are the same: raise"):
        sample_pairs(greedy)
    monkeypatch.setattr("tether.pipeline.label.ROUNDS", 1)
    short = replace(config, pairs=200, sampling=SamplingConfig(max_new_tokens=1))
    with caplog.at_level(logging.WARNING, "tether"):
        assert 0 < len(sample_pairs(short)) < 200
    assert "of 200 pairs: most answers to a prompt are the same" in caplog.text


def test_those_on_which_an_ensemble_disagrees_most_are_kept(config: LabelConfig, models: Path) -> None:
    judge = RewardModel(models / "judge", normalise=False)
    pool = sample_pairs(replace(config, pairs=24))
    kept = sample_pairs(replace(config, judge=str(models / "judge")))
    spread = {}
    for pair in pool:
        scores = judge.raw([pair.prompt] * 2, [pair.a, pair.b])  # (3, 2)
        spread[pair.prompt, pair.a, pair.b] = float(torch.sigmoid(scores[:, 0] - scores[:, 1]).std(correction=0))
    expected = sorted(spread.values(), reverse=True)[:6]
    assert [pair.disagreement for pair in kept] == pytest.approx(expected, abs=1e-5)
    assert expected[0] > 2 * min(spread.values())
    assert all((pair.prompt, pair.a, pair.b) in spread for pair in kept)


def test_disagreement_is_of_preferences_not_of_scores(models: Path) -> None:
    """Members that score on other scales but prefer alike do not disagree."""

    class Judge:
        def raw(self, prompts: list[str], completions: list[str], names: list[str]) -> torch.Tensor:
            values = torch.tensor([float(text) for text in completions])
            return torch.stack([values, values + 100.0, -values if prompts[0] == "split" else values])

    pairs = [NewPair("split", "0", "0"), NewPair("split", "3", "0"), NewPair("split", "1", "0")]
    kept = most_disputed(Judge(), pairs, 2)  # type: ignore[arg-type]
    assert [pair.a for pair in kept] == ["3", "1"]
    agreed = most_disputed(Judge(), [NewPair("all", "3", "0")], 1)  # type: ignore[arg-type]
    assert agreed[0].disagreement == pytest.approx(0)


def test_the_set_is_written_and_never_over_answers(config: LabelConfig) -> None:
    file = label(config)
    with LabelSet(file, writable=True) as labels:
        assert labels.count() == 6
        assert labels.about["name"] == "x"
        assert labels.about["settings"]["policy"] == config.policy
    with pytest.raises(UserError, match="already there"):
        label(config)
    label(replace(config, overwrite=True, pairs=3))
    with LabelSet(file, writable=True) as labels:
        assert labels.count() == 3
        labels.answer("ann", 1, "tie")
    with pytest.raises(UserError, match="holds 1 answers, which nothing brings back: move it away"):
        label(replace(config, overwrite=True))
    with LabelSet(file) as labels:
        assert len(labels.answers()) == 1


def test_the_page_is_opened_at_the_set(
    config: LabelConfig,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[tuple[StudioConfig, str]] = []
    monkeypatch.setattr("tether.studio.serve", lambda config, path: served.append((config, path)))
    command = ["label", "--policy", config.policy, "--against", str(models / "b")]
    command += ["--prompts.path", config.prompts.path, "--pairs", "2", "--sampling.max-new-tokens", "4"]
    assert main([*command, "--output", str(tmp_path / "a b.labels.db"), "--port", "0"]) == 0
    assert served == [(StudioConfig(runs=str(tmp_path), port=0), "/label?set=a+b.labels.db")]
    assert main([*command, "--output", str(tmp_path / "c.labels.db"), "--no-open"]) == 0
    assert len(served) == 1
    assert f"tether studio {tmp_path}" in capsys.readouterr().out


def test_what_was_said_becomes_a_file_of_preferences(
    config: LabelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = label(config)
    output = str(tmp_path / "preferences.jsonl")
    command = ["label", "--export", str(file), "--output", output]
    assert main(command) == 2  # nothing was said
    with LabelSet(file, writable=True) as labels:
        for pair, answer in enumerate(("left", "right", "tie", "both_bad", "skip"), start=1):
            labels.answer("ann", pair, answer)  # type: ignore[arg-type]
        expected = list(labels.preferences())
    assert main(command) == 0
    assert re.search(r"A is preferred in \d+% \(\d+ to \d+%\) of the pairs without a tie", capsys.readouterr().out)
    assert [json.loads(line) for line in Path(output).read_text().splitlines()] == expected
    found = load_preferences(PreferencesConfig(path=output)).pairs
    assert [pair.tie for pair in found] == [False, False, True]
    assert main(command) == 2  # the file is there
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": ""}, "no policy given"),
        ({"prompts": PromptsConfig()}, "no prompts given"),
        ({"output": "x.db"}, r"output: found 'x.db', expected a file NAME.labels.db"),
        ({"output": ""}, "output: found ''"),
        ({"export": "nothing.labels.db", "output": "x.jsonl"}, "nothing.labels.db: no such file"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    config: LabelConfig, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        label(replace(config, **changes))  # type: ignore[arg-type]


def test_one_judge_cannot_disagree_with_itself(config: LabelConfig, models: Path) -> None:
    with pytest.raises(UserError, match="one model, which cannot disagree with itself; expected several"):
        label(replace(config, judge=str(models / "judge" / "member-0")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"pool": 10}, "name one by judge"),
        ({"pool": 2, "judge": "x"}, "pool is 2, expected pairs"),
        ({"seed": -1}, "seed is -1"),
        ({"port": -1}, "port is -1"),
    ],
)
def test_settings_that_cannot_be(config: LabelConfig, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(config, **changes)  # type: ignore[arg-type]


def test_tools_that_the_preferences_cannot_hold_are_said(
    models: Path, config: LabelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if tools %}d{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}f"
    make_model(seed=0).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"prompt": [{"role": "user", "content": "ab"}], "tools": tools}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    prompts = PromptsConfig(path=str(tmp_path / "chat.jsonl"))
    label(replace(config, policy=str(tmp_path / "chat"), prompts=prompts, pairs=1))
    assert "which the preferences will not hold" in caplog.text
