"""Lists of episodes: the same as filtering and sorting all of them by hand, and answered from indices alone."""

from __future__ import annotations

import math
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.runs.test_episodes import episode

from tether.errors import UserError
from tether.runs import EpisodeFilter, StoredEpisode, find_episodes, read_episodes, same_prompt, siblings
from tether.runs.episodes import EpisodeStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations of eight episodes, two to each of four prompts; one score is NaN."""
    folder = tmp_path_factory.mktemp("run")
    source = random.Random(0)
    store = EpisodeStore(folder)
    for iteration in range(1, 7):
        batch = []
        for place in range(8):
            score = source.choice((-1.0, 0.0, 0.5, 1.0))
            made = replace(
                episode(score=score, steps=source.randint(1, 9), reference=place != 7),
                prompt=f"Prompt {place // 2}: 100% of it",
                response=source.choice(("Yes", "no_way", "n\\a", "Ünder", "100 percent"))
                + "!" * source.randint(0, 400),
                truncated=place == 3,
                terminated=place != 3,
                details={"group": place // 2},
            )
            batch.append(made)
        store.append(iteration, batch)
    store.append(7, [replace(episode(), score=math.nan)])
    store.close()
    return folder


def passes(found: StoredEpisode, where: EpisodeFilter) -> bool:
    for name in ("iteration", "score", "kl", "length"):
        low, high, value = getattr(where, f"{name}_from"), getattr(where, f"{name}_to"), getattr(found, name)
        if (low is not None or high is not None) and (value is None or math.isnan(value)):
            return False
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    if where.ended is not None and not getattr(found, where.ended):
        return False
    if where.text is not None and where.text.lower() not in f"{found.prompt}\n{found.response}".lower():
        return False
    return where.prompt is None or where.prompt == found.prompt_hash


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"iteration_from": 2, "iteration_to": 4},
    {"score_from": 0.0},
    {"score_to": 0.0, "length_from": 3},
    {"kl_from": 0.2, "kl_to": 2.0},
    {"length_to": 10**30, "ended": "truncated"},
    {"ended": "terminated", "iteration_to": 3},
    {"text": "YES"},
    {"text": "o_w"},
    {"text": "100%"},
    {"text": "n\\a", "score_from": 0.0},
    {"text": "there is no such text"},
)


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_filters_orders_and_pages_are_those_of_all_episodes_by_hand(folder: Path, where: dict[str, Any]) -> None:
    chosen = EpisodeFilter(**where)
    expected = [found for found in read_episodes(folder, limit=1000) if passes(found, chosen)]
    for order in ("id", "iteration", "score", "reward", "kl", "length"):
        for descending in (False, True):

            def key(found: StoredEpisode, order: str = order, down: bool = descending) -> tuple[bool, float]:
                value = getattr(found, order)
                unknown = value is None or math.isnan(value)
                return unknown, 0.0 if unknown else (-value if down else value)

            ids = [found.id for found in sorted(expected, key=key)]
            pages = [find_episodes(folder, chosen, order, descending, 7, start) for start in range(0, 49, 7)]
            assert [found.id for page, _ in pages for found in page] == ids
            assert {total for _, total in pages} == {len(ids)}


def test_a_summary_is_the_episode_less_its_steps_with_texts_cut(folder: Path) -> None:
    stored = read_episodes(folder, limit=1000)
    cut, _ = find_episodes(folder, limit=1000)
    whole, _ = find_episodes(folder, limit=1000, characters=None)
    for summary, entire, expected in zip(cut, whole, stored, strict=True):
        for name, value in vars(entire).items():
            original = getattr(expected, name)
            assert value == original or (value is None and math.isnan(original)), name
        assert vars(summary) == vars(entire) | {"response": entire.response[:300], "prompt": entire.prompt[:300]}
    assert max(len(entire.response) for entire in whole) > 300


def test_siblings_share_iteration_and_start(folder: Path) -> None:
    assert [found.id for found in siblings(folder, 12)] == [11, 12]
    assert [found.id for found in siblings(folder, 49)] == [49]  # without a group
    with pytest.raises(UserError, match=r"episodes\.db: no episode 50, expected 1 to 49"):
        siblings(folder, 50)
    with pytest.raises(UserError, match=rf"no episode {10**30}"):
        same_prompt(folder, 10**30)


def test_the_same_prompt_gives_the_best_answer_of_each_iteration(folder: Path) -> None:
    found = same_prompt(folder, 13)
    assert [answer.iteration for answer in found] == [1, 2, 3, 4, 5, 6]
    for answer in found:
        rivals = [e for e in read_episodes(folder, answer.iteration, limit=100) if e.prompt_hash == answer.prompt_hash]
        assert len(rivals) == 2
        assert answer.score == max(rival.score for rival in rivals)
        assert answer.response in [rival.response for rival in rivals]


def test_lists_are_counted_filtered_and_sorted_in_an_index(folder: Path) -> None:
    """Without it 100,000 episodes of 200 tokens would be two seconds of reading."""
    with closing(sqlite3.connect(folder / "episodes.db")) as connection:
        for order in ("score", "kl", "length", "reward"):
            query = f"SELECT id FROM episodes WHERE score > 0 AND terminated = 1 ORDER BY {order}, id"
            plan = connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
            assert "USING COVERING INDEX" in str(plan), plan
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT * FROM episodes WHERE prompt_hash = 'a'").fetchall()
        assert "episodes_by_prompt" in str(plan)


def test_an_unknown_order_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="order is 'id; DROP', expected one of id, iteration, score"):
        find_episodes(folder, order="id; DROP")  # type: ignore[arg-type]
