"""Notes and tags of a run: kept by the page, under the rules of everything that writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.studio.folders import URL, client, make_run

from tether.runs import Run
from tether.runs.notes import Notes, read_notes
from tether.studio import create_app


def said(**changes: Any) -> dict[str, Any]:
    words = {"run": "ppo", "note": "worked\nat last", "tags": ["baseline", " two  words "]}
    return words | {"seen": {"note": "", "tags": []}} | changes


def test_notes_are_kept_and_listed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo")
    asking = client(tmp_path)
    assert asking.get("/api/run", params={"run": "ppo"}).json()["tags"] == []
    with Run.open(folder, tensorboard=False):  # while it trains
        reply = asking.post("/api/notes", json=said())
    assert (reply.status_code, reply.json()) == (200, {"note": "worked\nat last", "tags": ["baseline", "two words"]})
    assert read_notes(folder) == Notes("worked\nat last", ("baseline", "two words"))
    page = asking.get("/api/run", params={"run": "ppo"}).json()
    assert (page["note"], page["tags"]) == ("worked\nat last", ["baseline", "two words"])
    assert asking.get("/api/runs").json()["runs"][0]["tags"] == ["baseline", "two words"]
    assert "two words" in asking.get("/api/export/runs.csv").text
    seen = {"note": page["note"], "tags": page["tags"]}
    assert asking.post("/api/notes", json=said(note="", tags=[], seen=seen)).json() == {"note": "", "tags": []}


def test_what_another_page_wrote_meanwhile_is_not_replaced_unseen(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo")
    asking = client(tmp_path)
    assert asking.post("/api/notes", json=said(note="first")).status_code == 200
    late = asking.post("/api/notes", json=said(note="second"))  # its page was opened before
    assert (late.status_code, late.json().keys()) == (409, {"error"})
    assert read_notes(folder).note == "first"
    seen = {"note": "first", "tags": ["baseline", "two words"]}
    assert asking.post("/api/notes", json=said(note="second", seen=seen)).status_code == 200
    assert read_notes(folder).note == "second"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"run": "nowhere"}, 404),
        ({"run": "../ppo"}, 403),
        ({"note": "x" * 10_001}, 422),
        ({"note": None}, 422),
        ({"tags": ["a,b"]}, 422),
        ({"tags": ["\u202e"]}, 422),
        ({"tags": ["x" * 41]}, 422),
        ({"tags": [str(n) for n in range(21)]}, 422),
        ({"tags": [str(n) for n in range(101)]}, 422),
        ({"tags": "baseline"}, 422),
        ({"other": 1}, 422),
        ({"seen": None}, 422),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(
    tmp_path: Path, changes: dict[str, Any], status: int
) -> None:
    folder = make_run(tmp_path / "ppo")
    reply = client(tmp_path).post("/api/notes", json=said(**changes))
    assert reply.status_code == status
    assert reply.json().keys() == {"error"}
    assert not (folder / "notes.json").exists()


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_notes_from_elsewhere_are_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    folder = make_run(tmp_path / "ppo")
    asking = TestClient(create_app(tmp_path), base_url=URL)
    assert asking.post("/api/notes", json=said(), headers=headers).status_code == 403
    form = {"Origin": URL, "Content-Type": "text/plain"}
    assert asking.post("/api/notes", content=b"{}", headers=form).status_code == 403
    assert not (folder / "notes.json").exists()


def test_damaged_notes_are_the_runs_fault_and_stay(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo")
    (folder / "notes.json").write_text("{")
    asking = client(tmp_path)
    found = asking.get("/api/runs").json()["runs"][0]
    assert found["state"] == "damaged"
    assert found["fault"].startswith("notes.json: damaged")
    assert asking.post("/api/notes", json=said()).status_code == 400
    assert (folder / "notes.json").read_text() == "{"


def test_notes_do_not_leave_the_folder_by_a_link(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "ppo")
    (tmp_path / "outside.json").write_text('{"note": "", "tags": []}')
    (folder / "notes.json").symlink_to(tmp_path / "outside.json")
    assert client(tmp_path / "runs").post("/api/notes", json=said()).status_code == 403
    assert "worked" not in (tmp_path / "outside.json").read_text()
