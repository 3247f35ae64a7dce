"""What people note about a run: kept whole, beside a training, until another run takes the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tether.errors import UserError
from tether.runs import Run
from tether.runs.notes import LONGEST_NOTE, MOST_TAGS, Notes, checked_notes, read_notes, write_notes

KEPT = Notes("β is too small\n🙂", ("baseline", "two words"))


def run(folder: Path, overwrite: bool = False) -> Run:
    return Run.create(folder, {"model": "m"}, tensorboard=False, overwrite=overwrite)


def test_notes_are_kept_while_the_run_trains_and_survive_its_resuming(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == Notes()
    with run(tmp_path) as training:
        training.log(1, {"score": 1.0})
        write_notes(tmp_path, KEPT)
        training.log(2, {"score": 1.0})
    with Run.open(tmp_path, tensorboard=False) as training:
        training.rewind(1)
    assert read_notes(tmp_path) == KEPT
    write_notes(tmp_path, Notes())
    assert read_notes(tmp_path) == Notes()


def test_a_run_that_replaces_another_has_no_notes_of_it(tmp_path: Path) -> None:
    with run(tmp_path):
        write_notes(tmp_path, KEPT)
    for name in ("starts.jsonl", "console.log"):
        (tmp_path / name).touch()
    with run(tmp_path, overwrite=True):
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "lock"}


def test_notes_that_cannot_be_read_are_not_replaced(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"note": 1, "tags": []}', b'{"note": "", "tags": [1]}', b"\xff", b" " * 2**21):
        (tmp_path / "notes.json").write_bytes(content)
        for use in (read_notes, lambda folder: write_notes(folder, KEPT)):
            with pytest.raises(UserError, match=r"notes\.json: .*move it away"):
                use(tmp_path)
        assert (tmp_path / "notes.json").read_bytes() == content


def test_a_link_where_the_file_is_prepared_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".notes.json.partial").symlink_to(tmp_path / "elsewhere")
    write_notes(tmp_path, KEPT)
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert read_notes(tmp_path) == KEPT


def test_tags_are_single_lines_and_each_is_there_once() -> None:
    assert checked_notes("  a text \n", [" a  b", "a b", "", "c"]) == Notes("a text", ("a b", "c"))
    for note, tags in (
        ("x" * (LONGEST_NOTE + 1), []),
        ("", ["x" * 41]),
        ("", ["a,b"]),
        ("", ["\u202eabc"]),
        ("", [f"tag {n}" for n in range(MOST_TAGS + 1)]),
    ):
        with pytest.raises(UserError, match=r"^(note|tags): .*expected"):
            checked_notes(note, tags)
