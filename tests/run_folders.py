"""Whether two folders of runs say the same, to the last bit: checkpoint, metrics and episodes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from tether.runs import latest_checkpoint


def newest_checkpoint(run: Path) -> tuple[int, Path]:
    found = latest_checkpoint(run)
    assert found is not None
    return found


def metric_lines(run: Path) -> list[bytes]:
    """The bytes of metrics.jsonl, less the fields that measure time and memory, which end each line."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert all(b', "time/' in line for line in lines)
    return [line.partition(b', "time/')[0] for line in lines]


def episode_rows(run: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(run / "episodes.db")) as connection:
        return connection.execute("SELECT * FROM episodes JOIN steps ON episode_id = id ORDER BY id").fetchall()


def checkpoint_files(run: Path) -> dict[str, bytes]:
    folder = newest_checkpoint(run)[1]
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(found: Path, expected: Path) -> None:
    """Policy, critic, optimizer and random states, metrics and episodes: the same bytes."""
    assert metric_lines(found) == metric_lines(expected)
    assert episode_rows(found) == episode_rows(expected)
    assert newest_checkpoint(found)[0] == newest_checkpoint(expected)[0]
    files = checkpoint_files(found)
    assert {"critic.safetensors", "trainer.safetensors", "trainer.json"} < files.keys()
    assert {"policy/model.safetensors", "policy/adapter_model.safetensors"} & files.keys()
    different = [name for name, content in checkpoint_files(expected).items() if files.get(name) != content]
    assert different == []
    assert len(files) == len(checkpoint_files(expected))
