"""Episodes over HTTP: lists, one episode step by step, the same prompt across iterations, films."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.studio.folders import client, episode, make_control_run, make_run

from tether.runs import Run

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 50


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three iterations of four episodes: ids 1 to 12."""
    episodes = [
        episode("first question", "short", 0.25),
        episode("first question", "a longer answer", 0.5),
        episode("second 100% question", "cut off", math.nan, terminated=False, truncated=True, details={"group": 1}),
        episode("second 100% question", "x" * 1000, -1.0, details={"group": 1}),
    ]
    make_run(tmp_path / "ppo", iterations=3, episodes=episodes)
    return tmp_path


def ids(root: Path, **query: Any) -> list[int]:
    reply = client(root).get("/api/episodes", params={"run": "ppo", **query})
    assert reply.status_code == 200, reply.text
    return [found["id"] for found in reply.json()["episodes"]]


def test_a_list_is_sorted_and_cut_into_pages(root: Path) -> None:
    assert ids(root) == list(range(1, 13))
    assert ids(root, limit=2, offset=3) == [4, 5]
    assert ids(root, order="id", descending=1, limit=2) == [12, 11]
    assert ids(root, order="length", descending="true", limit=3) == [4, 8, 12]
    assert ids(root, order="score", limit=4) == [4, 8, 12, 1]
    assert ids(root, order="score", descending=1, limit=3) == [2, 6, 10]
    assert ids(root, offset=10**12) == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"iteration_from": 2, "iteration_to": 2}, [5, 6, 7, 8]),
        ({"score_from": 0.5}, [2, 6, 10]),
        ({"score_to": 0.25, "iteration_to": 1}, [1, 4]),
        ({"length_from": 100}, [4, 8, 12]),
        ({"ended": "truncated"}, [3, 7, 11]),
        ({"ended": ""}, list(range(1, 13))),
        ({"text": "LONGER"}, [2, 6, 10]),
        ({"text": "100%", "iteration_to": 1}, [3, 4]),
        ({"text": "%"}, [3, 4, 7, 8, 11, 12]),
        ({"text": "'; DROP TABLE episodes; --"}, []),
        ({"kl_from": 1000}, []),
        ({"prompt": "nothing"}, []),
    ],
)
def test_filters(root: Path, query: dict[str, Any], expected: list[int]) -> None:
    reply = client(root).get("/api/episodes", params={"run": "ppo", **query}).json()
    assert [found["id"] for found in reply["episodes"]] == expected
    assert reply["total"] == len(expected)


def test_a_prompts_hash_is_its_filter(root: Path) -> None:
    found = client(root).get("/api/episodes", params={"run": "ppo", "limit": 1}).json()["episodes"][0]
    assert isinstance(found["prompt_hash"], str)
    assert ids(root, prompt=found["prompt_hash"]) == [1, 2, 5, 6, 9, 10]


def test_summaries_are_short_and_numbers_that_are_none_are_null(root: Path) -> None:
    found = client(root).get("/api/episodes", params={"run": "ppo"}).json()["episodes"]
    assert len(found[3]["response"]) == 300
    assert found[2]["score"] is None
    assert (found[2]["terminated"], found[2]["truncated"], found[2]["group"]) == (False, True, 1)


@pytest.mark.parametrize(
    "query",
    [
        {"order": "prompt"},
        {"limit": 0},
        {"limit": 201},
        {"offset": -1},
        {"score_from": "nan"},
        {"score_to": "high"},
        {"iteration_from": 2**63},
        {"ended": "never"},
        {"descending": "maybe"},
        {"text": "x" * 1001},
        {"text": "a\x00b"},
    ],
)
def test_filters_that_cannot_be_are_one_line(root: Path, query: dict[str, Any]) -> None:
    reply = client(root).get("/api/episodes", params={"run": "ppo", **query})
    assert reply.status_code == 422
    assert next(iter(query)) in reply.json()["error"]


def test_an_episode_step_by_step(root: Path) -> None:
    found = client(root).get("/api/episode", params={"run": "ppo", "id": 6}).json()
    assert (found["iteration"], found["position"], found["prompt"]) == (2, 1, "first question")
    assert (found["previous"], found["next"]) == (5, 7)
    assert [other["id"] for other in found["siblings"]] == [5]
    assert found["film"] is None
    assert found["details"] == {"group": 0}
    steps = found["steps"]
    assert "".join(steps["action"]) == found["response"] == "a longer answer"
    assert steps["log_prob"] == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert steps["kl"] == [0.25] * 5
    assert steps["ratio"] == [pytest.approx(math.exp(-0.5))] * 5
    assert steps["advantage"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert steps["clipped"] == [False, True, False, False, False]
    assert steps["alternatives"][0] == [["a l", 0.5], ["other", 0.25]]
    assert {len(column) for column in steps.values() if column is not None} == {5}


def test_the_first_and_the_last_episode_have_one_neighbour(root: Path) -> None:
    asking = client(root)
    assert asking.get("/api/episode", params={"run": "ppo", "id": 1}).json()["previous"] is None
    assert asking.get("/api/episode", params={"run": "ppo", "id": 12}).json()["next"] is None


@pytest.mark.parametrize("id", [13, 2**63 - 1])
def test_there_is_no_such_episode(root: Path, id: int) -> None:
    for path in ("episode", "same-prompt", "film", "export/steps.csv", "export/episode.html"):
        reply = client(root).get(f"/api/{path}", params={"run": "ppo", "id": id})
        assert reply.status_code == 404
        assert reply.json()["error"] == f"episodes.db: no episode {id}, expected 1 to 12"


@pytest.mark.parametrize("id", [0, -1, 2**63, "one", "", "1.5"])
def test_numbers_that_no_episode_has(root: Path, id: Any) -> None:
    assert client(root).get("/api/episode", params={"run": "ppo", "id": id}).status_code == 422


def test_the_same_prompt_across_iterations_is_whole(root: Path) -> None:
    found = client(root).get("/api/same-prompt", params={"run": "ppo", "id": 4}).json()["episodes"]
    assert [other["iteration"] for other in found] == [1, 2, 3]
    assert {other["prompt"] for other in found} == {"second 100% question"}
    assert all(len(other["response"]) == 1000 for other in found)


def test_clipping_is_what_the_loss_knew_and_never_a_guess(tmp_path: Path) -> None:
    """Ratio and advantage would say otherwise; an older run, which kept nothing of it, shows nothing."""
    far = episode("q", "x" * 9, new_log_probs=[9.0] * 3, advantages=[1.0] * 3, clipped=[False, True, False])
    make_run(tmp_path / "ppo", iterations=1, episodes=[far, replace(far, clipped=None)])
    asking = client(tmp_path)
    told = [asking.get("/api/episode", params={"run": "ppo", "id": id}).json()["steps"]["clipped"] for id in (1, 2)]
    assert told == [[False, True, False], None]
    pages = [asking.get("/api/export/episode.html", params={"run": "ppo", "id": id}).text for id in (1, 2)]
    assert [page.count("<td>yes</td>") for page in pages] == [1, 0]
    assert ["<th>clipped</th>" in page for page in pages] == [True, False]


def test_what_is_not_known_is_null_and_what_is_no_number_too(tmp_path: Path) -> None:
    bare = episode(
        "q",
        "abc",
        new_log_probs=None,
        clipped=None,
        reference_log_probs=None,
        entropies=None,
        alternatives=None,
        values=[math.nan],
        rewards=[math.inf],
    )
    late = episode("q", "abc", new_log_probs=[math.nan])
    huge = episode("q", "abc", new_log_probs=[1e30])
    make_run(tmp_path / "ppo", iterations=1, episodes=[bare, late, huge])
    first, second, third = (
        client(tmp_path).get("/api/episode", params={"run": "ppo", "id": id}).json()["steps"] for id in (1, 2, 3)
    )
    for name in ("new_log_prob", "reference_log_prob", "kl", "entropy", "ratio", "clipped", "alternatives"):
        assert first[name] is None
    assert (first["value"], first["reward"]) == ([None], [None])
    assert (second["ratio"], second["clipped"]) == ([None], [False])
    assert third["ratio"] == [None]


def test_chat_prompts_are_turns_in_the_list_the_episode_and_its_page(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Why?</b> " + "x" * 400}]
    raw = "[S]Be brief.[U]Why?[A]"
    damaged = {"group": 0, "messages": [{"role": 1}]}
    told = [
        episode(raw, "because", details={"group": 0, "messages": turns}),
        episode("text", "answer"),
        episode("odd", "answer", details=damaged),
    ]
    make_run(tmp_path / "ppo", iterations=2, episodes=told)
    asking = client(tmp_path)
    listed = asking.get("/api/episodes", params={"run": "ppo"}).json()["episodes"]
    assert listed[0]["messages"][0] == turns[0]
    assert listed[0]["messages"][1]["content"] == turns[1]["content"][:300]
    assert [row["messages"] for row in listed[1:3]] == [None, None]
    found = asking.get("/api/episode", params={"run": "ppo", "id": 1}).json()
    assert (found["prompt"], found["messages"], found["details"]) == (raw, turns, {"group": 0})
    same = asking.get("/api/same-prompt", params={"run": "ppo", "id": 1}).json()["episodes"]
    assert [other["messages"] for other in same] == [turns, turns]
    page = asking.get("/api/export/episode.html", params={"run": "ppo", "id": 1}).text
    assert "<dt>system</dt><dd><pre>Be brief.</pre></dd><dt>user</dt><dd><pre>&lt;b&gt;Why?&lt;/b&gt;" in page
    assert f"<summary>Raw text</summary><pre>{raw}</pre>" in page
    assert "messages" not in asking.get("/api/export/episodes.csv", params={"run": "ppo"}).text


def test_control_episodes_show_their_film(tmp_path: Path) -> None:
    filmed = episode("start", "fell over", frames="films/1.png", states=["s1", "s2", "s3"])
    folder = make_control_run(tmp_path / "pole", episodes=[filmed, episode("start", "fell over")])
    (folder / "films").mkdir()
    (folder / "films" / "1.png").write_bytes(PNG)
    asking = client(tmp_path)
    found = asking.get("/api/episode", params={"run": "pole", "id": 1}).json()
    assert found["steps"]["state"] == ["s1", "s2", "s3"]
    film = asking.get(found["film"])
    assert (film.content, film.headers["content-type"]) == (PNG, "image/png")
    assert asking.get("/api/film", params={"run": "pole", "id": 2}).status_code == 404


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("../../secret.png", 403),
        ("/etc/hostname", 404),
        ("films/gone.png", 404),
        ("config.yaml", 404),
        ("films/link.png", 403),
        ("x\x00.png", 404),
        ("film.html", 404),
    ],
)
def test_a_film_is_an_image_within_the_folder(tmp_path: Path, name: str, status: int) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = make_control_run(tmp_path / "runs" / "pole", episodes=[episode("start", "end", frames=name)])
    (folder / "films").mkdir()
    (folder / "films" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "film.html").write_text("<script>alert(1)</script>")
    reply = client(tmp_path / "runs").get("/api/film", params={"run": "pole", "id": 1})
    assert reply.status_code == status
    assert b"secret" not in reply.content.replace(b"secret.png", b"")


def test_episodes_can_be_read_while_the_run_writes(root: Path) -> None:
    asking = client(root)
    with Run.open(root / "ppo", tensorboard=False) as run:
        run.log_episodes(4, [episode("new", "answer")])
        reply = asking.get("/api/episodes", params={"run": "ppo", "iteration_from": 4}).json()
    assert [found["prompt"] for found in reply["episodes"]] == ["new"]


def test_a_run_without_episodes_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "ppo")
    reply = client(tmp_path).get("/api/episodes", params={"run": "ppo"})
    assert (reply.status_code, reply.json()["error"]) == (404, "episodes.db: this run has stored no episodes")
