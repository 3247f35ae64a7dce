"""What the other commands say of long work: what they loaded, and how much of it is done."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from tests.models import make_model, make_tokenizer

from tether.cli import main
from tether.pipeline.progress import Tally

DEVICE = r"cpu, \d+ threads?, float32, no autocast"


def test_a_tally_speaks_now_and_then_of_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    tally = Tally(1000, "prompts", every=10)
    for done in (100, 200, 300, 1000):  # every 6 seconds
        now += 6
        tally.update(done)
    assert caplog.messages == ["200 of 1,000 prompts, 48 s left"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": p, "completion": "a", "chosen": "a", "rejected": "b"} for p in ("ab", "c", "de", "f")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "run"),
    [
        (["sft", "--data", "rows.jsonl", "--batch-size", "3"], "2 steps of 3 samples"),
        (["reward", "--preferences.path", "rows.jsonl", "--batch-size", "1"], r"\d steps of 1 comparison"),
    ],
)
def test_supervised_training_says_what_it_has(
    command: list[str], run: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main([*command, "--model", "model", "--output", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading model …"
    assert re.fullmatch(rf"device  {DEVICE}", lines[1])
    assert re.fullmatch(
        r"model   model \(Llama\w+\): [\d,]+ parameters, all trained; tokenizer of \d+ tokens", lines[2]
    )
    assert lines[3].startswith("data    ")
    assert re.fullmatch(rf"run     {run}, in run", lines[4])
    assert any(re.match(r"step 1/\d  loss .* s per step, 0 s left", line) for line in lines)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "--samples", "2", "--output", "out.jsonl"], "4 prompts × 2 responses × up to 3 tokens"),
        (["eval", "--reward.functions", "length?per_token=1"], "4 prompts × 1 response × up to 3 tokens"),
        (["label", "--pairs", "2", "--no-open", "--output", "x.labels.db"], "sampling 2 pairs of up to 3 tokens"),
    ],
)
def test_sampling_says_what_it_has(
    command: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    caplog.set_level(logging.INFO)
    flag = "--policy" if command[0] == "label" else "--model"
    words = [*command, flag, "model", "--prompts.path", "prompts.jsonl", "--sampling.max-new-tokens", "3"]
    assert main(words) == 0
    assert caplog.messages[0] == "loading model"
    assert re.fullmatch(
        rf"model \(LlamaForCausalLM\): [\d,]+ parameters, {DEVICE}; tokenizer of 16 tokens", caplog.messages[1]
    )
    assert caplog.messages[2] == said


def test_scoring_says_what_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    reward = ["reward", "--model", "model", "--preferences.path", "rows.jsonl", "--output", "run", "--members", "2"]
    assert main(reward) == 0
    caplog.set_level(logging.INFO)
    caplog.clear()
    words = ["score", "--model", "run/model", "--data", "rows.jsonl", "--response-column", "chosen"]
    assert main([*words, "--output", "scored.jsonl"]) == 0
    assert caplog.messages[0] == "loading run/model"
    assert re.fullmatch(rf"2 members, each run/model \(Llama\w+\): [\d,]+ parameters, {DEVICE}", caplog.messages[1])
