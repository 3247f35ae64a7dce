"""What a run's folder says of each start; and that no secret is among it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tether.runs.console import ConsoleLog
from tether.runs.starts import MASK, append_start, describe_start, masked, without_secrets
from tether.studio.runs import config_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--api-key", "s3cret"], ["--api-key", MASK]),
        (["--reward.api_key=s3cret", "--seed", "1"], [f"--reward.api_key={MASK}", "--seed", "1"]),
        (["--HF-Token", "s3cret"], ["--HF-Token", MASK]),
        (["--password", "12345"], ["--password", MASK]),
        (["--client.secret", "--seed", "1"], ["--client.secret", "--seed", "1"]),
        (["--sampling.max-new-tokens", "16"], ["--sampling.max-new-tokens", "16"]),
        (["--prompts.max-tokens=16"], ["--prompts.max-tokens=16"]),
        (["--api-tokens", "s3cret"], ["--api-tokens", MASK]),
        (["judge?url=http://h&api_key=s3cret&n=1"], [f"judge?url=http://h&api_key={MASK}&n=1"]),
        (["--reward.functions=judge?token=s3cret"], [f"--reward.functions=judge?token={MASK}"]),
        (["http://me:s3cret@host/x"], [f"http://{MASK}@host/x"]),
        (["--model", "a/model", "--kl.beta=0.1"], ["--model", "a/model", "--kl.beta=0.1"]),
    ],
)
def test_secrets_of_a_command_line_are_masked(given: list[str], shown: list[str]) -> None:
    assert masked(["tether", "ppo", *given]) == ["tether", "ppo", *shown]


def test_a_start_names_command_versions_and_machine_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/tether", "ppo", "--model", "a model", "--hf-token", "s3cret"])
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    start = describe_start(CPU, 7)
    assert start["command"] == "tether ppo --model 'a model' --hf-token '***'"
    assert (start["iteration"], start["folder"]) == (7, os.getcwd())
    assert start["versions"]["python"] == platform.python_version()
    assert start["versions"].keys() == {"python", "tether", "torch", "transformers"}
    machine = start["machine"]
    assert machine["processor"]
    assert machine["memory"] > 2**20
    assert (machine["device"], machine["device_name"], machine["threads"]) == ("cpu", None, torch.get_num_threads())
    text = json.dumps(start)
    assert "s3cret" not in text
    assert "from-the-environment" not in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/lib/tether/__main__.py", "tether"), ("train.py", "train.py"), ("/x/tether.py", "/x/tether.py")],
)
def test_another_program_is_named_by_its_path(path: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [path, "--seed", "1"])
    assert describe_start(CPU)["command"] == f"{shown} --seed 1"


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *own, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert describe_start(CPU)["commit"] is None
    git(tmp_path, "init", "-q")
    assert describe_start(CPU)["commit"] is None  # nothing is committed yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "untracked").touch()
    assert describe_start(CPU)["commit"] == {"id": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert describe_start(CPU)["commit"] == {"id": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_start(CPU)["commit"] is None  # without git


def test_every_start_is_a_line(tmp_path: Path) -> None:
    for iteration in (0, 3):
        append_start(tmp_path, {"iteration": iteration})
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 3]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--reward.options", '{"api_key": "sk-1", "k": 2}'], ["--reward.options", f'{{"api_key": "{MASK}", "k": 2}}']),
        (["--header", "Authorization: Bearer sk-1"], ["--header", f"Authorization: {MASK}"]),
        (["--auth", "Bearer sk-1"], ["--auth", MASK]),
        (["--api-keys", "a", "b", "--seed", "1"], ["--api-keys", MASK, MASK, "--seed", "1"]),
        (["--tokenizer", "folder"], ["--tokenizer", "folder"]),
    ],
)
def test_other_ways_to_write_a_secret_are_masked_too(given: list[str], shown: list[str]) -> None:
    assert masked(["tether", *given]) == ["tether", *shown]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text('{"iteration": 0')
    append_start(tmp_path, {"iteration": 3})
    assert (tmp_path / "starts.jsonl").read_text() == '{"iteration": 0\n{"iteration": 3}\n'


def test_a_working_folder_that_is_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert describe_start(torch.device("cpu"))["folder"] is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h/score?sig=abc&k=2", f"http://h/score?sig={MASK}&k=2"),
        ("judge?url=https://u:p@ss@h/v1", f"judge?url=https://{MASK}@h/v1"),
        ("error: http://h/v1?api_key=abc: refused", f"error: http://h/v1?api_key={MASK} refused"),
        ("sigma=2, 16 tokens = up to 256", "sigma=2, 16 tokens = up to 256"),
    ],
)
def test_texts_lose_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_neither_the_log_nor_the_pages_show_what_the_configuration_holds(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("reward:\n  functions: ['judge?api_key=hidden&model=m']\n")
    assert config_of(tmp_path) == {"reward": {"functions": [f"judge?api_key={MASK}&model=m"]}}
    with ConsoleLog(tmp_path / "console.log"):
        print("reward judge?api_key=hidden failed")
    assert "hidden" not in (tmp_path / "console.log").read_text()
