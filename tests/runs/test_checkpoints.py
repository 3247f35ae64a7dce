"""Checkpoints are whole or not there: after torn writes, full disks and SIGKILL."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tether.errors import UserError
from tether.runs import load_state, save_state
from tether.runs.checkpoints import broken, latest_checkpoint, list_checkpoints, remove_after, save_checkpoint


def content(iteration: int) -> torch.Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(iteration))


def write(iteration: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        save_state(folder, "state", {"iteration": iteration, "weights": content(iteration)})
        (folder / "policy").mkdir()
        (folder / "policy" / "config.json").write_text(f'{{"iteration": {iteration}}}')

    return fill


def assert_whole(iteration: int, path: Path) -> None:
    state = load_state(path, "state")
    assert state["iteration"] == iteration
    assert torch.equal(state["weights"], content(iteration))
    assert json.loads((path / "policy" / "config.json").read_text()) == {"iteration": iteration}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for iteration in (1, 2, 9, 10):
        path = save_checkpoint(tmp_path, iteration, write(iteration), keep=2)
        assert path == tmp_path / f"iteration-{iteration:06d}"
    assert names(tmp_path) == ["iteration-000009", "iteration-000010"]
    assert latest_checkpoint(tmp_path) == (10, tmp_path / "iteration-000010")
    assert_whole(10, tmp_path / "iteration-000010")
    manifest = json.loads((tmp_path / "iteration-000010" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state.json", "state.safetensors", "policy/config.json"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing file": ("policy/config.json", Path.unlink, "policy/config.json is missing"),
    "truncated": ("state.safetensors", truncate, "state.safetensors has "),
    "one bit": ("state.safetensors", flip, "state.safetensors has changed since it was written"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "torn manifest": (
        "manifest.json",
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        "manifest.json is damaged",
    ),
    "not a manifest": ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    "missing folder": ("policy", shutil.rmtree, "policy/config.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_one_is_passed_over_with_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage, reason = DAMAGE[kind]
    for iteration in (1, 2):
        save_checkpoint(tmp_path, iteration, write(iteration))
    damage(tmp_path / "iteration-000002" / name)
    with caplog.at_level(logging.WARNING, logger="tether"):
        assert latest_checkpoint(tmp_path) == (1, tmp_path / "iteration-000001")
    (warning,) = caplog.messages
    assert f"iteration-000002: broken ({reason}" in warning
    assert "\n" not in warning

    save_checkpoint(tmp_path, 2, write(2))  # takes the place of the broken one
    assert latest_checkpoint(tmp_path) == (2, tmp_path / "iteration-000002")
    assert names(tmp_path) == ["iteration-000001", "iteration-000002"]


def test_a_whole_one_is_not_written_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write(1))
    assert save_checkpoint(tmp_path, 1, lambda folder: pytest.fail("written again")) == path


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("disk is full")])
def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    save_checkpoint(tmp_path, 1, write(1))
    with pytest.raises(UserError, match=r"iteration-000002: cannot save the checkpoint: (No space|disk is full)"):
        save_checkpoint(tmp_path, 2, fail)
    assert names(tmp_path) == ["iteration-000001"]
    assert_whole(1, tmp_path / "iteration-000001")


def test_remove_after_takes_later_ones_and_leftovers(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, iteration, write(iteration), keep=5)
    (tmp_path / ".iteration-000004.partial").mkdir()
    (tmp_path / ".iteration-000001.removed").mkdir()
    remove_after(tmp_path, 2)
    assert names(tmp_path) == ["iteration-000001", "iteration-000002"]


def save_for_ever(folder: Path, said: int) -> None:
    """What a run does as far as checkpoints go: go on from the last one, and say when one is saved."""
    latest = latest_checkpoint(folder)
    first = latest[0] + 1 if latest else 1
    remove_after(folder, first - 1)
    os.write(said, b"ready\n")
    for iteration in itertools.count(first):
        save_checkpoint(folder, iteration, write(iteration))
        os.write(said, f"{iteration}\n".encode())


def test_sigkill_at_random_moments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process saves checkpoints in a loop and is killed at 10 random moments, each time going on from the last."""
    moments = random.Random(0)
    acknowledged = 0
    for _ in range(10):
        hears, says = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, says)
            finally:
                os._exit(1)
        os.close(says)
        with os.fdopen(hears) as stream:
            assert stream.readline() == "ready\n"
            time.sleep(moments.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = max([acknowledged, *map(int, stream.read().split())])

        latest = latest_checkpoint(tmp_path)
        if latest is None:
            assert acknowledged == 0
            continue
        assert latest[0] in (acknowledged, acknowledged + 1)  # what was acknowledged is there
        for iteration, path in list_checkpoints(tmp_path):
            assert broken(path) is None
            assert_whole(iteration, path)
        acknowledged = latest[0]
    assert acknowledged > 5
    assert not caplog.messages  # none of them was broken
