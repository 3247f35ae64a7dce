"""The store of episodes: what goes in comes out, fast, all or nothing, readable while it is written."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tether.episode import Episode
from tether.errors import UserError
from tether.runs import count_episodes, read_episode, read_episodes
from tether.runs.episodes import EpisodeStore


def episode(score: float = 1.0, steps: int = 3, reference: bool = True) -> Episode:
    def numbers(scale: float) -> list[float]:
        return [scale * (step + 1) / 8 for step in range(steps)]  # exact in float32

    return Episode(
        prompt="What is 2 + 2?",
        response=f'"vier" ≈ 4\n{score}',
        score=score,
        terminated=True,
        truncated=False,
        actions=[f" token {step}" for step in range(steps)],
        action_ids=list(range(steps)),
        log_probs=numbers(-1.0),
        values=numbers(0.5),
        rewards=numbers(0.25),
        advantages=numbers(2.0),
        returns=numbers(4.0),
        reference_log_probs=numbers(-2.0) if reference else None,
        new_log_probs=numbers(-1.5) if reference else None,
        entropies=numbers(3.0) if reference else None,
        alternatives=[[(f" token {step}", 0.5), (" other", 0.25)][: step + 1] for step in range(steps)],
        details={"exact_match": 1.0, "answer": "vier"},
    )


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    episodes = [
        episode(),
        episode(score=-1.0, steps=0),
        replace(
            episode(reference=False),
            action_ids=[[0.5], [1.0], [2.0]],
            alternatives=None,
            states=["low", "high", "low"],
            frames="films/1.png",
            details={"group": 4},
        ),
    ]
    store = EpisodeStore(tmp_path)
    store.append(1, episodes)
    stored = read_episodes(tmp_path)  # while the writer is open
    store.close()
    for position, (found, expected) in enumerate(zip(stored, episodes, strict=True)):
        assert (found.id, found.iteration, found.position) == (position + 1, 1, position)
        for name in vars(expected):
            assert getattr(found, name) == getattr(expected, name), name
    assert stored[0].reward == 0.25 * 6 / 8
    assert stored[0].length == 3
    assert stored[0].kl == 6 / 8  # Σ log π − log π_ref
    assert stored[2].kl is None
    assert stored[2].reference_log_probs is None
    assert [found.group for found in stored] == [None, None, 4]
    assert len({found.prompt_hash for found in stored}) == 1
    assert read_episode(tmp_path, 2) == stored[1]


def test_orders_limits_and_iterations(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append(1, [episode(score=s) for s in (0.5, -1.0, 1.0)])
    store.append(2, [episode(score=s, steps=n) for s, n in ((0.0, 5), (2.0, 1))])
    store.close()

    def scores(**arguments: object) -> list[float]:
        return [found.score for found in read_episodes(tmp_path, **arguments)]  # type: ignore[arg-type]

    assert scores() == [0.5, -1.0, 1.0, 0.0, 2.0]
    assert scores(iteration=1, order="best") == [1.0, 0.5, -1.0]
    assert scores(order="worst", limit=2) == [-1.0, 0.0]
    assert scores(order="newest", limit=2, offset=1) == [0.0, 1.0]
    assert scores(order="longest", limit=1) == [0.0]
    assert scores(order="most kl", limit=1) == [0.0]
    assert (count_episodes(tmp_path), count_episodes(tmp_path, 2), count_episodes(tmp_path, 3)) == (5, 2, 0)


def test_nan_scores_stay_nan(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append(1, [replace(episode(), score=math.nan, rewards=[math.nan] * 3, log_probs=[math.nan] * 3)])
    store.close()
    (found,) = read_episodes(tmp_path)
    assert math.isnan(found.score)
    assert math.isnan(found.reward)
    assert found.kl is not None
    assert math.isnan(found.kl)


def test_documented_schema_works_without_tether(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append(1, [episode()])
    store.close()
    connection = sqlite3.connect(tmp_path / "episodes.db")
    joined = "SELECT log_probs, length FROM episodes JOIN steps ON episode_id = id WHERE score > 0"
    blob, length = connection.execute(joined).fetchone()
    assert np.frombuffer(blob, "<f4").tolist() == [-0.125, -0.25, -0.375]
    assert length == 3
    connection.close()


def test_an_iteration_is_stored_as_a_whole_or_not(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    with pytest.raises(UserError, match=r"episodes\.db: NOT NULL constraint failed"):
        store.append(1, [episode(), replace(episode(), response=None)])  # type: ignore[arg-type]
    store.append(2, [episode()])
    store.remove_after(1)
    store.append(2, [episode()])
    store.close()
    assert [(found.id, found.iteration) for found in read_episodes(tmp_path)] == [(1, 2)]
    with closing(sqlite3.connect(tmp_path / "episodes.db")) as connection:
        assert connection.execute("SELECT episode_id FROM steps").fetchall() == [(1,)]


def test_text_that_utf8_has_no_code_for_is_written_out(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    odd = "half \ud800 of a pair, \x00, \u202e and 🙂"
    store.append(1, [replace(episode(), prompt=odd, response=odd, actions=[odd] * 3, details={"answer": odd})])
    store.close()
    (found,) = read_episodes(tmp_path)
    shown = "half \\ud800 of a pair, \x00, \u202e and 🙂"
    assert (found.prompt, found.response, found.details) == (shown, shown, {"answer": odd})
    assert found.actions == [odd] * 3


def test_a_store_of_another_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "episodes.db")) as connection:
        connection.execute("CREATE TABLE episodes (id INTEGER PRIMARY KEY)")
    for use in (read_episodes, EpisodeStore):
        with pytest.raises(
            UserError, match=r"episodes\.db: has layout 0 of an older version of Tether, expected 1 or 2"
        ):
            use(tmp_path)


def older(folder: Path) -> None:
    """Make the store one of layout 1, which knew nothing of clipping."""
    with closing(sqlite3.connect(folder / "episodes.db")) as connection:
        connection.execute("ALTER TABLE steps DROP COLUMN clipped")
        connection.execute("PRAGMA user_version = 1")


def test_a_store_of_layout_1_is_read_and_its_run_goes_on(tmp_path: Path) -> None:
    clipped = [True, False, True]
    store = EpisodeStore(tmp_path)
    store.append(1, [replace(episode(), clipped=clipped)])
    store.close()
    assert read_episode(tmp_path, 1).clipped == clipped
    older(tmp_path)
    before = read_episode(tmp_path, 1)
    assert before.clipped is None
    assert before.log_probs == pytest.approx(episode().log_probs)
    assert read_episodes(tmp_path) == [before]
    store = EpisodeStore(tmp_path)
    store.append(2, [replace(episode(), clipped=clipped), episode()])
    store.close()
    assert [found.clipped for found in read_episodes(tmp_path)] == [None, clipped, None]
    EpisodeStore(tmp_path).close()  # once is enough


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"episodes\.db: no such file, expected the folder of a run"):
        read_episodes(tmp_path)
    EpisodeStore(tmp_path).close()
    with pytest.raises(UserError, match=r"episodes\.db: no episode 7"):
        read_episode(tmp_path, 7)
    (tmp_path / "episodes.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match=r"episodes\.db: file is not a database"):
        read_episodes(tmp_path)
    with pytest.raises(UserError, match=r"episodes\.db: file is not a database"):
        EpisodeStore(tmp_path)
