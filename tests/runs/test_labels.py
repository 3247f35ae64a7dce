"""The store of labels: pairs, answers by several people, undo, and what comes out."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import unicodedata
from contextlib import closing
from pathlib import Path

import pytest

from tether.errors import UserError
from tether.runs.labels import LabelSet, NewPair, count_answers, create_labels
from tether.runs.messages import prompt_text

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pairs = [NewPair(f"question {i}", f"a{i}", f"b{i}") for i in range(1, 5)]
    create_labels(tmp_path / "set.labels.db", {"name": "set"}, [*pairs, NewPair(CHAT, "a5", "b5", 0.25)])
    return tmp_path / "set.labels.db"


def a_side(labels: LabelSet, annotator: str, pair: int) -> str:
    """Where this person sees the first policy's answer."""
    return "left" if labels.shown_pair(annotator, pair).left.startswith("a") else "right"


def test_pairs_come_in_order_until_all_are_judged(file: Path) -> None:
    with LabelSet(file, writable=True) as labels:
        for done in range(5):
            pair = labels.next_pair("ann")
            assert pair is not None
            assert (pair.id, labels.done("ann"), labels.count()) == (done + 1, done, 5)
            assert {pair.left, pair.right} == {f"a{pair.id}", f"b{pair.id}"}
            labels.answer("ann", pair.id, "skip" if done == 0 else "left")
        assert labels.next_pair("ann") is None
        assert labels.done("bob") == 0
        other = labels.next_pair("bob")
        assert other is not None
        assert other.id == 1


def test_messages_are_shown_with_who_says_them(file: Path) -> None:
    with LabelSet(file) as labels:
        assert labels.shown_pair("ann", 5).prompt == "system: Be brief.\n\nuser: Hi"
    assert prompt_text({"other": 1}) == '{"other": 1}'


def test_a_set_of_layout_1_is_judged_on(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("ALTER TABLE pairs DROP COLUMN text")
        connection.execute("PRAGMA user_version = 1")
    with LabelSet(file, writable=True) as labels:
        pair = labels.shown_pair("ann", 5)
        assert (pair.prompt, pair.messages) == ("system: Be brief.\n\nuser: Hi", CHAT)
        labels.answer("ann", 5, "tie")
        assert [row["prompt"] for row in labels.preferences()] == [CHAT]


def test_left_is_each_answer_by_chance_and_the_same_at_every_look(tmp_path: Path) -> None:
    pairs = [NewPair("q", f"a{i}", f"b{i}") for i in range(400)]
    create_labels(tmp_path / "x.labels.db", {}, pairs)
    create_labels(tmp_path / "y.labels.db", {}, pairs)
    sides = {}
    for name, person in (("x", "ann"), ("x", "bob"), ("y", "ann")):
        for look in range(2):
            with LabelSet(tmp_path / f"{name}.labels.db") as labels:
                sides[name, person, look] = [a_side(labels, person, i) for i in range(1, 401)]
        assert sides[name, person, 0] == sides[name, person, 1]
        assert 150 < sides[name, person, 0].count("left") < 250
    assert sides["x", "ann", 0] != sides["x", "bob", 0]
    assert sides["x", "ann", 0] != sides["y", "ann", 0]  # no one can work it out from the pair and the name


def test_an_answer_is_kept_by_what_was_meant_not_by_its_side(file: Path) -> None:
    with LabelSet(file, writable=True) as labels:
        for person in ("ann", "bob", "cem", "dan"):
            side = a_side(labels, person, 1)
            labels.answer(person, 1, side)  # type: ignore[arg-type]
        assert [(answer.answer, answer.left) for answer in labels.answers()] == [
            ("a", "a" if a_side(labels, person, 1) == "left" else "b") for person in ("ann", "bob", "cem", "dan")
        ]


def test_judging_again_replaces_and_undo_takes_back_the_newest(file: Path) -> None:
    with LabelSet(file, writable=True) as labels:
        labels.answer("ann", 1, "tie")
        labels.answer("ann", 2, "both_bad")
        labels.answer("bob", 3, "tie")
        labels.answer("ann", 1, "skip", "a note")
        assert [(a.pair, a.annotator, a.answer, a.note) for a in labels.answers()] == [
            (2, "ann", "both_bad", None),
            (3, "bob", "tie", None),
            (1, "ann", "skip", "a note"),
        ]
        assert [labels.undo("ann") for _ in range(3)] == [1, 2, None]
        assert [a.annotator for a in labels.answers()] == ["bob"]
        assert labels.undo("nobody") is None


def test_what_reward_models_learn_from(file: Path) -> None:
    with LabelSet(file, writable=True) as labels:
        b_side = {"left": "right", "right": "left"}[a_side(labels, "ann", 2)]
        labels.answer("ann", 5, a_side(labels, "ann", 5))  # type: ignore[arg-type]
        labels.answer("ann", 2, b_side, "because")  # type: ignore[arg-type]
        labels.answer("ann", 1, "tie")
        labels.answer("bob", 1, "both_bad")
        labels.answer("ann", 3, "skip")
        assert list(labels.preferences()) == [
            {"prompt": "question 1", "chosen": "a1", "rejected": "b1", "tie": True, "annotator": "ann"},
            {"prompt": "question 2", "chosen": "b2", "rejected": "a2", "annotator": "ann", "note": "because"},
            {"prompt": CHAT, "chosen": "a5", "rejected": "b5", "annotator": "ann"},
        ]
        assert count_answers(labels.answers()) == {"a": 1, "b": 1, "tie": 1, "both_bad": 1, "skip": 1}


def test_answers_are_flushed_to_the_disk(file: Path) -> None:
    with LabelSet(file, writable=True) as labels:
        settings = [
            labels._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        ]
    assert settings == ["delete", 2]  # 2: FULL, which syncs at every commit


def test_two_writers_wait_for_each_other(file: Path) -> None:
    with LabelSet(file, writable=True) as first, LabelSet(file, writable=True) as second:
        for pair in (1, 2, 3):
            first.answer("ann", pair, "tie")
            second.answer("bob", pair, "tie")
        assert len(first.answers()) == len(second.answers()) == 6


def test_reading_alone_cannot_write(file: Path) -> None:
    with LabelSet(file) as labels, pytest.raises(UserError, match="readonly"):
        labels.answer("ann", 1, "tie")


def test_half_surrogate_pairs_of_a_model_are_written_out(tmp_path: Path) -> None:
    create_labels(tmp_path / "x.labels.db", {}, [NewPair("\ud800", "a\udfff", "b")])
    with LabelSet(tmp_path / "x.labels.db") as labels:
        pair = labels.shown_pair("ann", 1)
    assert {pair.left, pair.right} == {"a\\udfff", "b"}


@pytest.mark.parametrize("pair", [0, 6, 2**62])
def test_no_such_pair(file: Path, pair: int) -> None:
    with LabelSet(file, writable=True) as labels, pytest.raises(UserError, match=f"no pair {pair}, expected 1 to 5"):
        labels.answer("ann", pair, "tie")


def test_other_files_are_refused_in_one_line(tmp_path: Path, file: Path) -> None:
    text, empty, other, torn = (tmp_path / f"{name}.labels.db" for name in ("text", "empty", "other", "torn"))
    text.write_text("no database at all, but long enough to be one" * 100)
    empty.touch()
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (x)")
    torn.write_bytes(file.read_bytes()[:5000])
    for broken in (text, empty, other, torn, tmp_path / "nothing.labels.db"):
        with pytest.raises(UserError) as error, LabelSet(broken) as labels:
            labels.answers()
        assert str(broken) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        create_labels(tmp_path / "nowhere" / "x.labels.db", {}, [NewPair("q", "a", "b")])
    assert list(tmp_path.iterdir()) == []


def test_a_set_at_rest_is_one_file_whoever_closes_it_last(file: Path, tmp_path: Path) -> None:
    reader = LabelSet(file)
    reader.count()
    with LabelSet(file, writable=True) as labels:
        labels.answer("ann", 1, "tie")
        assert reader.done("ann") == 1
    reader.close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    copy = tmp_path / "copy.labels.db"
    copy.write_bytes(file.read_bytes())
    with LabelSet(copy) as labels:
        assert len(labels.answers()) == 1


def test_the_log_of_an_earlier_version_is_brought_into_the_file(file: Path) -> None:
    with closing(sqlite3.connect(file)) as earlier:
        earlier.execute("PRAGMA journal_mode = WAL")
        earlier.execute("SELECT COUNT(*) FROM pairs").fetchall()
        reader = LabelSet(file)
        reader.count()
    with LabelSet(file, writable=True) as labels:
        labels.answer("ann", 1, "tie")
    assert file.with_name(f"{file.name}-wal").exists()
    reader.close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with LabelSet(file) as labels:
        assert len(labels.answers()) == 1


def test_a_set_of_an_earlier_version_is_one_file_from_the_next_look_on(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    copy = file.with_name("copy.labels.db")
    with LabelSet(file, writable=True) as labels:
        labels.answer("ann", 1, "tie")
        copy.write_bytes(file.read_bytes())
        with LabelSet(copy) as copied:
            assert len(copied.answers()) == 1


def test_the_journal_of_a_writer_that_was_killed_is_undone_for_readers(file: Path) -> None:
    source = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
for _ in range(50):
    connection.execute("INSERT INTO pairs (prompt, a, b) VALUES ('x', ?, 'y')", ("z" * 5000,))
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", source, str(file)], check=True)
    assert file.with_name(f"{file.name}-journal").stat().st_size
    with LabelSet(file) as labels:
        assert labels.count() == 5
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_one_person_under_two_spellings_is_one(file: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")
    with LabelSet(file, writable=True) as labels:
        labels.answer(apart, 1, "tie")
        labels.answer(f" {composed} ", 1, "skip")
        assert [(answer.annotator, answer.answer) for answer in labels.answers()] == [(composed, "skip")]
        assert labels.done(apart) == labels.done(composed) == 1
        # as an earlier version kept it
        labels._connection.execute(
            "INSERT INTO answers SELECT 1, ?, 'tie', 'a', NULL, 0, 99 FROM answers LIMIT 1", (apart,)
        )
        assert [(answer.annotator, answer.answer) for answer in labels.answers()] == [(composed, "tie")]
        assert [row["annotator"] for row in labels.preferences()] == [composed]
        shown = labels.next_pair(apart)
        assert shown is not None
        assert shown.id == 2
        assert labels.undo(composed) == 1
        assert labels.done(composed) == 0
