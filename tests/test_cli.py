"""The command line: help, settings from a file and from flags, exit codes, and every command once from end to end."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.models import make_model, make_tokenizer
from tests.run_folders import assert_same_run
from tether import cli
from tether.cli import COMMANDS, main
from tether.pipeline.control import ControlConfig
from tether.pipeline.demo import DemoConfig
from tether.pipeline.evaluate import EvalConfig
from tether.pipeline.explain import ExplainConfig
from tether.pipeline.export import ExportConfig
from tether.pipeline.generate import GenerateConfig
from tether.pipeline.label import LabelConfig
from tether.pipeline.ppo import PPOConfig
from tether.pipeline.prove import ProveConfig
from tether.pipeline.reward_model import RewardModelConfig
from tether.pipeline.score import ScoreConfig
from tether.pipeline.sft import SFTConfig
from tether.report import ReportConfig
from tether.runs import read_config, read_metrics
from tether.studio import StudioConfig

CONFIGS = {
    "ppo": PPOConfig,
    "check": PPOConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
    "studio": StudioConfig,
    "label": LabelConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "eval": EvalConfig,
    "control": ControlConfig,
    "explain": ExplainConfig,
    "demo": DemoConfig,
    "prove": ProveConfig,
}


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Flag, default and the docstring under the field, of a configuration in which nothing was set."""
    source = _field_texts(type(config))
    for field in dataclasses.fields(config):
        name, default = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(default):
            yield from leaves(default, f"{name}.")
        elif field.init:
            yield name, default, source[field.name]


def _field_texts(config: type) -> dict[str, str]:
    texts = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return texts


def squeezed(text: str) -> str:
    """Without the boxes that help is drawn in, and without any white space or quotes."""
    return re.sub(r"[\s│╭╮╰╯─'\"]", "", text)


# ---- help and version ------------------------------------------------------------------------------------------------


def test_each_command_has_a_configuration_here() -> None:
    assert CONFIGS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", CONFIGS)
def test_help_shows_every_field_with_default_and_meaning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: tether {command}" in said
    assert "--config FILE.yaml" in said
    for name, default, meaning in leaves(CONFIGS[command]()):
        flag = "--" + name.replace("_", "-")
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = re.escape(squeezed(f"{meaning} (default: {shown})"))
        assert meaning, f"{name} has no text"
        # between a flag and its text stands what it takes: a type, or the choices
        assert re.search(rf"{re.escape(flag)}[^a-z.-].{{0,200}}?{text}", squeezed(said)), flag


def test_help_of_ppo_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    assert "--resume FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", said, re.MULTILINE) for name in COMMANDS)
    assert "--debug" in said


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"tether {version('tether')}\n"


def test_as_a_process_wrong_input_is_one_line_and_exit_code_2() -> None:
    process = subprocess.run([sys.executable, "-m", "tether", "fly"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("tether: error: no command 'fly'; expected one of demo, ppo,")
    assert process.stderr.count("\n") == 1


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("tether: error: ")
    assert main(["sft"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tether.pipeline.prove.prove", interrupted)
    assert main(["prove"]) == 130
    assert capsys.readouterr().err == "tether: interrupted\n"


def test_numbers_that_overflow_are_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverged(config: object) -> None:
        raise FloatingPointError("the gradient's norm is nan in iteration 3")

    monkeypatch.setattr("tether.pipeline.prove.prove", diverged)
    assert main(["prove"]) == 1
    assert capsys.readouterr().err == "tether: error: the gradient's norm is nan in iteration 3\n"


# ---- every command from end to end -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": p, "completion": c, "answer": c} for p, c in [("ab", "c"), ("c", "de"), ("deab", "f")] * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def ppo(folder: Path, *flags: str) -> list[str]:
    return [
        *("ppo", "--model", str(folder / "model"), "--prompts.path", str(folder / "rows.jsonl")),
        *("--reward.functions", "exact_match", "--iterations", "2", "--sampling.max-new-tokens", "4"),
        *("--collect.prompts", "4", "--learner.minibatches", "2", "--learner.epochs", "1", *flags),
    ]


def test_fine_tune_then_ppo_then_generate_then_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command names the folder that the next one reads."""
    rows = str(folder / "rows.jsonl")
    sft = ["sft", "--model", str(folder / "model"), "--data", rows, "--output", str(folder / "sft")]
    assert main([*sft, "--batch-size", "4", "--learning-rate", "1e-2", "--epochs", "20"]) == 0
    tuned = re.search(r"the model, a Hugging Face folder: +(\S+)", capsys.readouterr().out)
    assert tuned
    losses = [line["loss"] for line in read_metrics(folder / "sft") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]

    assert main(ppo(folder, "--model", tuned[1], "--output", str(folder / "ppo"))) == 0
    said = capsys.readouterr().out
    policy = re.search(r"the policy, a Hugging Face folder: +(\S+)", said)
    assert policy
    assert "--resume" not in said  # nothing is left to do

    responses = folder / "responses.jsonl"
    sampling = ["--sampling.max-new-tokens", "4", "--sampling.temperature", "0"]
    assert main(["generate", "--model", policy[1], "--prompts.path", rows, "--output", str(responses), *sampling]) == 0
    written = [json.loads(line) for line in responses.read_text().splitlines()]
    assert [line["prompt"] for line in written] == ["ab", "c", "deab"] * 4
    correct = sum(line["response"] == line["answer"] for line in written) / 12
    assert correct > 0.5  # fine-tuning has taught it
    capsys.readouterr()

    result = folder / "result.json"
    data = ["--prompts.path", rows, "--reward.functions", "exact_match", "--output", str(result)]
    assert main(["eval", "--model", policy[1], *data, *sampling]) == 0
    assert "pass@1" in capsys.readouterr().out
    measured = json.loads(result.read_text())
    assert measured["result"]["score"]["mean"] == pytest.approx(2 * correct - 1)


def test_piped_output_is_plain_lines(folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tether", *ppo(folder, "--output", str(folder / "run"))],
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "HOME": str(folder)},
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == f"loading {folder / 'model'} …"
    assert re.fullmatch(r"device +cpu, 1 thread, float32, no autocast", lines[1])
    assert [line.split()[0] for line in lines[2:9]] == [
        *("model", "critic", "reference", "prompts", "reward", "iteration", "run"),
    ]
    assert lines[9] == "iteration 1 …"
    pace = r"\d+(\.\d+)? s per iteration"
    assert re.fullmatch(rf"iteration 1/2  score +[+-]\d\.\d{{3}}  reward.*  {pace}, \d+ s left", lines[10])
    assert re.fullmatch(rf"iteration 2/2  score +[+-]\d\.\d{{3}}  reward.*  {pace}", lines[11])
    assert "\x1b" not in process.stdout + process.stderr
    assert "\r" not in process.stdout + process.stderr
    assert process.stderr == ""


def test_flags_win_over_the_file_and_the_whole_configuration_is_kept(folder: Path) -> None:
    settings = folder / "settings.yaml"
    settings.write_text(
        yaml.safe_dump(
            {
                "model": str(folder / "model"),
                "output": str(folder / "first"),
                "iterations": 7,
                "seed": 5,
                "prompts": {"path": str(folder / "rows.jsonl")},
                "reward": {"functions": ["exact_match"]},
                "sampling": {"max_new_tokens": 3},
                "collect": {"prompts": 2},
                "learner": {"minibatches": 1, "learning_rate": 1e-3},
            }
        )
    )
    assert main(["ppo", "--config", str(settings), "--iterations", "2", "--learner.learning-rate", "2e-3"]) == 0
    kept = read_config(folder / "first")
    assert kept["iterations"] == 2  # the flag
    assert kept["learner"]["learning_rate"] == 2e-3  # the flag
    assert kept["seed"] == 5  # the file
    assert kept["learner"]["minibatches"] == 1  # the file
    assert kept["learner"]["clip_low"] == 0.2  # the default
    assert len(read_metrics(folder / "first")) == 2
    assert read_metrics(folder / "first")[0]["learning_rate"] == 2e-3

    again = ["ppo", "--config", str(folder / "first" / "config.yaml"), "--output", str(folder / "again")]
    assert main(again) == 0
    assert_same_run(folder / "again", folder / "first")
    assert read_config(folder / "again") | {"output": ""} == kept | {"output": ""}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume needs the folder of a run, e.g. --resume runs/ppo"),
        (["--resume", "--seed", "1"], "--resume needs the folder of a run"),
        (["--resume", "nowhere"], "nowhere: holds no run to resume (no config.yaml)"),
        (["--resume=nowhere"], "nowhere: holds no run to resume (no config.yaml)"),
        (["--resume", "x", "--config", "y"], "leave --config out"),
        ([], "no reward"),
    ],
)
def test_wrong_use_of_ppo_is_one_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ppo", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tether: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_whatever_would_end_the_program_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "pop", cli._Command("", lambda words: sys.exit(0)))
    assert main(["pop"]) == 2
    said = capsys.readouterr().err
    assert "tether: error: SystemExit (0) was raised in " in said
    assert "test_cli.py, line" in said
