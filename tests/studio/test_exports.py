"""What can be taken along: CSV that no spreadsheet computes, an episode as one file, and preferences."""

from __future__ import annotations

import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.studio.folders import client, episode, make_run

from tether.studio import exports
from tether.studio.exports import csv_lines, file_name, guarded

HOSTILE = "</pre><script>alert(1)</script>\" onmouseover='x' \u202eevil\x00 =1+1"


def table(root: Path, path: str, **query: Any) -> list[dict[str, str]]:
    reply = client(root).get(f"/api/export/{path}", params=query)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/csv; charset=utf-8"
    assert re.fullmatch(r'attachment; filename="[A-Za-z0-9._-]+\.csv"', reply.headers["content-disposition"])
    return list(csv.DictReader(io.StringIO(reply.text, newline="")))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", '=HYPERLINK("x")'])
def test_text_that_a_spreadsheet_would_compute_is_guarded(text: str) -> None:
    assert guarded(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1, -1.5, None, True, "text", "", "1-1", "a=b"])
def test_numbers_and_plain_text_are_as_they_are(value: Any) -> None:
    assert guarded(value) is value


def test_what_is_written_can_be_read_back() -> None:
    rows = [['a "quoted", text', "line\r\nbreak\nand\ttab", 1.5, None], ["half \ud800 pair", "\u202e", -2, [1, "é"]]]
    text = b"".join(csv_lines(["a", "b", "c", "d"], rows)).decode("utf-8")
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["a", "b", "c", "d"],
        ['a "quoted", text', "line\r\nbreak\nand\ttab", "1.5", ""],
        ["half \\ud800 pair", "\u202e", "-2", '[1, "é"]'],
    ]


def test_the_table_of_runs_and_the_metrics_of_one(tmp_path: Path) -> None:
    make_run(tmp_path / "=cmd", iterations=2)
    (found,) = table(tmp_path, "runs.csv")
    assert (found["run"], found["score"], found["state"]) == ("'=cmd", "0.2", "finished")
    rows = table(tmp_path, "metrics.csv", run="=cmd")
    assert [row["iteration"] for row in rows] == ["1", "2"]
    assert [row["score"] for row in rows] == ["0.1", "0.2"]


def test_all_episodes_that_pass_the_filters_with_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "PAGE", 7)
    monkeypatch.setattr(exports, "TEXTS", 3)
    episodes = [episode(f"=prompt {i}", "x" * 1000 + str(i), float(i)) for i in range(10)]
    make_run(tmp_path / "ppo", iterations=3, episodes=episodes)
    rows = table(tmp_path, "episodes.csv", run="ppo")
    assert [row["id"] for row in rows] == [str(i) for i in range(1, 31)]
    assert rows[3]["prompt"] == "'=prompt 3"
    assert rows[3]["response"] == "x" * 1000 + "3"
    rows = table(tmp_path, "episodes.csv", run="ppo", order="score", descending=1, iteration_from=3, score_from=4)
    assert [row["score"] for row in rows] == ["9.0", "8.0", "7.0", "6.0", "5.0", "4.0"]
    assert table(tmp_path, "episodes.csv", run="ppo", text="nothing like this") == []


def test_a_line_for_each_step(tmp_path: Path) -> None:
    make_run(tmp_path / "ppo", iterations=1, episodes=[episode("q", "-1 = and so on")])
    rows = table(tmp_path, "steps.csv", run="ppo", id=1)
    assert [row["action"] for row in rows] == ["'-1 ", "'= a", "nd ", "so ", "on"]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["log_prob"] == "-1.0"
    assert rows[0]["alternatives"] == '[["-1 ", 0.5], ["other", 0.25]]'
    assert "state" not in rows[0]


class Elements(HTMLParser):
    """Tags and attributes of a page, and the text of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_episode_as_one_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    steps = math.ceil(len(HOSTILE) / 3)
    make_run(tmp_path / "a run", iterations=1, episodes=[episode(HOSTILE, HOSTILE, states=[HOSTILE] * steps)])
    reply = client(tmp_path).get("/api/export/episode.html", params={"run": "a run", "id": 1})
    assert reply.headers["content-disposition"] == 'attachment; filename="a-run-episode-1.html"'
    page = Elements(reply.text)
    tags = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "pre", "span"}
    assert set(page.tags) == tags | {"table", "tr", "th", "td", "footer"}
    assert page.attributes == {"lang", "charset", "http-equiv", "content", "name", "class", "title"}
    assert "default-src 'none'" in reply.text
    assert "url(" not in reply.text
    assert "alert(1)" in page.text  # as text
    assert "⟨U+202E⟩evil⟨U+0000⟩" in page.text
    assert page.tags.count("tr") == 1 + steps
    assert 'class="p8' in reply.text
    assert 'class="n1' in reply.text
    assert "clipped" in reply.text


def test_an_episode_without_steps_or_numbers_is_a_page_too(tmp_path: Path) -> None:
    nothing = episode("q", "", float("nan"), new_log_probs=None, reference_log_probs=None, entropies=None)
    make_run(tmp_path / "ppo", iterations=1, episodes=[nothing])
    reply = client(tmp_path).get("/api/export/episode.html", params={"run": "ppo", "id": 1})
    assert reply.status_code == 200
    assert "score —" in reply.text


def test_names_of_files_are_plain() -> None:
    assert file_name("a/b c", "episodes") == "a-b-c-episodes"
    assert file_name('../..\r\n"; x=', "x") == "x-x"
    assert file_name("...", "-") == "export"
    assert len(file_name("x" * 1000)) == 150
