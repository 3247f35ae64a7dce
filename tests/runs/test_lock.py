"""Whether somebody is writing a run, asked without being in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tether.errors import UserError
from tether.runs.lock import FolderLock, is_held


def test_held_from_the_start_of_a_writer_to_its_end(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    lock = FolderLock(tmp_path)
    assert is_held(tmp_path)
    assert is_held(tmp_path)  # asking takes nothing away
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing"):
        FolderLock(tmp_path)
    lock.release()
    assert not is_held(tmp_path)


def test_a_writer_that_was_killed_holds_nothing_though_its_id_is_left(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")  # as if the id had come to another process
    assert not is_held(tmp_path)
    FolderLock(tmp_path).release()


def test_another_process_is_seen(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tether.runs.lock import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        writer.kill()
        writer.wait()
    assert (tmp_path / "lock").read_text()
    assert not is_held(tmp_path)


def test_a_lock_that_is_no_file_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    assert not is_held(tmp_path)
