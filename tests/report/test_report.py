"""The page about a run: what it says, and that nothing which a model wrote gets out of its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tether.cli import main
from tether.config import config_to_dict
from tether.episode import Episode
from tether.errors import UserError
from tether.pipeline.frontier import best_of_n_curve
from tether.pipeline.ppo import PPOConfig
from tether.report import ReportConfig, report
from tether.report.page import page
from tether.report.run import read_run, verdict
from tether.report.text import escape, shorten
from tether.rewards import RewardsConfig
from tether.runs import Run, read_revisited
from tether.runs.alarms import AlarmsConfig

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></article></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "<!-- --><style>*{display:none}</style>",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "]]></svg><iframe src=javascript:alert(1)>",
    '<a href="javascript:alert(1)">x</a><base href=http://evil>',
]
UNSEEN = "right\u202eto left\u2066\u200b\x00\x1b[31m\U000e0041"


def row(iteration: int, **changes: Any) -> dict[str, float]:
    """Metrics of an iteration in which nothing is wrong."""
    names = ("score", "reward", "kl", "kl_k1", "eos_share", "distinct_responses", "repeated_ngrams", "clip_fraction")
    metrics = dict.fromkeys(names, iteration / 10)
    metrics |= {"score_std": 1.0, "response_length": 8.0, "length_ratio": 1.0, "entropy": 1.0, "beta": 0.05}
    return metrics | changes


def episode(prompt: str, response: str, score: float = 0.0, details: Mapping[str, Any] | None = None) -> Episode:
    pieces = [response[i : i + 3] for i in range(0, len(response), 3)]
    numbers = [float(i) for i in range(len(pieces))]
    return Episode(
        prompt=prompt,
        response=response,
        score=score,
        terminated=False,
        truncated=True,
        actions=pieces,
        action_ids=list(range(len(pieces))),
        log_probs=numbers,
        values=numbers,
        rewards=numbers,
        advantages=numbers,
        returns=numbers,
        reference_log_probs=[-number for number in numbers],
        details=dict(details or {}),
    )


def make_run(folder: Path, rows: list[dict[str, float]], episodes: bool = True, **config: Any) -> Path:
    settings = config_to_dict(PPOConfig(model="a/model", output=str(folder), **config))
    with Run.create(folder, settings, tensorboard=False) as run:
        for iteration, metrics in enumerate(rows, start=1):
            run.log(iteration, metrics)
            if episodes:
                texts = [f"answer {index} of {iteration}" for index in range(3)]
                stored = [episode(f"question {i}", text, float(i), {"gold": 0.25}) for i, text in enumerate(texts)]
                run.log_episodes(iteration, stored)
    return folder


class Reader(HTMLParser):
    """Elements, attributes and text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    make_run(tmp_path, [row(1)], episodes=False, reward=RewardsConfig((HOSTILE[0],)), task="")
    with Run.open(tmp_path, tensorboard=False) as run:
        run.log(2, row(2) | {f"score/{HOSTILE[0]}": 1.0})
        for iteration in (1, 2):
            run.log_episodes(iteration, [episode(text, text, n) for n, text in enumerate([*HOSTILE, UNSEEN])])
    reader = Reader(report(ReportConfig(str(tmp_path))).read_text(encoding="utf-8"))
    assert reader.open == []
    known = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3"}
    known |= {"p", "ul", "li", "b", "i", "em", "small", "span", "strong", "code", "pre", "div", "article", "details"}
    known |= {"summary", "figure", "figcaption", "svg", "path", "circle", "text", "title", "g"}
    assert reader.tags <= known
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href", "style")]
    for text in HOSTILE:
        assert text in reader.text
    assert UNSEEN not in reader.text
    shown = "right⟨U+202E⟩to left⟨U+2066⟩⟨U+200B⟩⟨U+0000⟩⟨U+001B⟩[31m⟨U+E0041⟩"
    assert shown in reader.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes


def test_escaping() -> None:
    assert escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escape("one\ttwo\r\nthree\n") == "one\ttwo\nthree\n"
    assert escape("👩\u200d🚀 é ن\u200cه") == "👩\u200d🚀 é ن\u200cه"  # joiners are part of writing
    assert escape("\udc80\u2028") == "⟨U+DC80⟩⟨U+2028⟩"


def test_long_texts_lose_their_middle() -> None:
    assert shorten("abcdef", 3, 3) == "abcdef"
    assert shorten("abcdefgh", 3, 2) == "abc […3 characters…] gh"
    assert shorten("abcdefgh", 3, 0) == "abc […5 characters…] "


def test_a_page_has_all_that_a_run_has(tmp_path: Path) -> None:
    rows = [row(n, gold=0.5 - 0.2 * n, gold_std=0.5, kl_k1=3.0 * n) for n in range(1, 11)]
    make_run(tmp_path, rows, gold=RewardsConfig(("gold.py:true",)), alarms=AlarmsConfig(window=2))
    scores = [float(n % 5) for n in range(8)]
    data = {"prompts": 2, "samples": 4, "curve": best_of_n_curve(scores, scores, 4)}
    responses = [{"score": score, "gold": score} for score in scores]
    (tmp_path / "frontier.json").write_text(json.dumps(data | {"responses": responses}))
    text = page(read_run(tmp_path))
    reader = Reader(text)
    for heading in ("Alarms", "Score against KL", "What it earns", "What it costs", "How it learns", "Samples"):
        assert f"<h2>{heading}</h2>" in text
    # scores of 0.9 and 1.0 in the two iterations of the window
    assert "<b>0.950</b><span>score</span><small>± 0.050, first: 0.100</small>" in text
    assert "<b>95.0 %</b><span>distinct responses</span><small>± 5.0, first: 10.0 %</small>" in text
    for legend in ("PPO, score", "PPO, gold score", "best of n, score", "best of n, gold score"):
        assert f"</i>{legend}</li>" in text
    assert "best of n, gold score, n = 4: 3.50 ± 0.98 at 0.636 nats" in reader.text
    for name in ("score", "gold", "reward", "KL", "length", "entropy", "variety", "ended by itself", "clip fraction"):
        assert f"<figcaption><b>{name}</b>" in text
    assert "<figcaption><b>β</b>" not in text  # it never changes
    assert "score against gold</b> <span class=when>iteration 4 to now" in text
    assert "KL</b> <span class=when>iteration 8 to now" in text
    assert "alarm in iteration 8" in text
    assert text.count('class="mark"') == 2
    assert "Fooled." in text
    for heading in ("Best score, iteration 10", "Worst score, iteration 10", "Most KL, iteration 10"):
        assert f"<h3>{heading}</h3>" in text
    assert "answer 2 of 10" in reader.text
    assert "answer 0 of 1" in reader.text  # of the first iteration, beside that of the last
    assert "gold 0.25" in reader.text
    assert "gold.py:true" in reader.text
    assert "samples_per_prompt: 1" in reader.text
    assert "iteration 10 of 100" in reader.text


def test_alarms_that_have_cleared_say_until_when(tmp_path: Path) -> None:
    kl = [1.0, 50.0, 1.0, 1.0]
    rows = [row(n, kl_k1=value) for n, value in enumerate(kl, start=1)]
    make_run(tmp_path, rows, alarms=AlarmsConfig(window=1))
    assert "KL</b> <span class=when>iteration 2 to 3" in page(read_run(tmp_path))
    make_run(tmp_path / "quiet", [row(1)])
    assert "None was raised." in page(read_run(tmp_path / "quiet"))


def test_tokens_are_shaded_by_what_the_policy_likes_more_than_the_reference(tmp_path: Path) -> None:
    make_run(tmp_path, [row(1)])
    text = page(read_run(tmp_path))
    # log π − log π_ref of the pieces are 0, 2, 4, …
    assert '<span class="" title="+0.00 nats">ans</span><span class="up4" title="+2.00 nats">wer</span>' in text


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_has_just_begun(tmp_path: Path, count: int) -> None:
    make_run(tmp_path, [row(n) for n in range(1, count + 1)], episodes=False)
    text = page(read_run(tmp_path))
    assert "The run's folder holds no episodes." in text
    assert "Best-of-n of the reference was not drawn" in text
    assert "No held-out score" in text
    assert Reader(text).open == []


def test_a_run_that_goes_on_can_be_read(tmp_path: Path) -> None:
    with Run.create(tmp_path, config_to_dict(PPOConfig()), tensorboard=False) as run:
        with pytest.raises(UserError, match=r"metrics.jsonl: no iteration is done yet"):
            read_run(tmp_path)
        run.log(1, row(1))
        run.log(2, row(2, score=math.nan, kl_k1=math.inf))
        run.log_episodes(1, [episode("question", "answer")])
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 3, "sco')  # a line that is being written
        data = read_run(tmp_path)
        assert (len(data.rows), data.last) == (2, 1)
        assert data.column("score") == ([1.0], [0.1])
        assert Reader(page(data)).open == []


def test_a_run_of_control_has_a_page_too(tmp_path: Path) -> None:
    with Run.create(tmp_path, {"env": "CartPole-v1", "total_steps": 100}, tensorboard=False) as run:
        run.log(1, {"score": 20.0, "score_std": 3.0, "episode_length": 20.0, "entropy": 0.6})
        plain = episode("0.1 0.2", "20 steps")
        run.log_episodes(1, [Episode(**vars(plain) | {"reference_log_probs": None})])
    text = page(read_run(tmp_path))
    assert "CartPole-v1" in text
    assert "steps per episode" in text
    for missing in ("Followed or fooled", "Alarms", "Score against KL", "Most KL"):
        assert missing not in text


def verdict_of(folder: Path, score: list[float], gold: list[float], **changes: Any) -> tuple[str, str]:
    rows = [
        row(n, score=s, gold=g, gold_std=2.0, **changes) for n, (s, g) in enumerate(zip(score, gold, strict=True), 1)
    ]
    make_run(folder, rows, episodes=False, alarms=AlarmsConfig(window=1))
    found = verdict(read_run(folder))
    return found.kind, found.word


def test_the_verdict(tmp_path: Path) -> None:
    assert verdict_of(tmp_path / "1", [0, 1], [0, 2]) == ("good", "Followed, as far as the gold score can tell.")
    assert verdict_of(tmp_path / "2", [0, 1], [0, -0.5]) == ("bad", "Fooled.")
    assert verdict_of(tmp_path / "3", [0, 1, 2], [0, 4, 2]) == ("bad", "Fooled.")  # above its start, far below its best
    assert verdict_of(tmp_path / "4", [0, 1], [0, 0.1]) == ("open", "Climbed, but for nothing so far.")
    assert verdict_of(tmp_path / "5", [0, 0.05], [0, 2]) == ("open", "Not climbed yet.")
    sentence = verdict(read_run(tmp_path / "3")).sentence
    assert sentence == (
        "The reward is climbed while the gold score falls. Since the start the score went +2.00 standard deviations "
        "and the gold score +1.00 (at its best, about iteration 2, +2.00)."
    )
    assert "best" not in verdict(read_run(tmp_path / "1")).sentence
    assert verdict_of(tmp_path / "6", [0, 1], [0, 1], score_std=0.0) == ("open", "Followed or fooled?")


def test_a_chat_prompt_is_shown_by_its_turns(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [row(1)], episodes=False)
    turns = [{"role": "user", "content": "<i>Why?</i>"}]
    with Run.open(tmp_path / "run", tensorboard=False) as run:
        run.log_episodes(1, [episode("[U]Why?[A]", "because", details={"messages": turns})])
    shown = page(read_run(tmp_path / "run"))
    assert "<pre class=prompt>user: &lt;i&gt;Why?&lt;/i&gt;</pre>" in shown
    assert "[U]Why?[A]" not in shown


def test_the_start_is_that_of_the_frontiers_samples_where_there_are_some(tmp_path: Path) -> None:
    make_run(tmp_path, [row(1, score=5.0), row(2, score=7.0)], episodes=False, alarms=AlarmsConfig(window=1))
    assert read_run(tmp_path).risen("score") == pytest.approx(2.0)
    data = {"prompts": 1, "samples": 2, "curve": best_of_n_curve([1.0, 5.0], None, 2)}
    (tmp_path / "frontier.json").write_text(json.dumps(data | {"responses": [{"score": 1.0}, {"score": 5.0}]}))
    assert read_run(tmp_path).risen("score") == pytest.approx(2.0)  # (7 − 3) / 2
    assert read_run(tmp_path).start("score") == (3.0, 2.0)
    assert read_run(tmp_path).start("gold") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"responses": [], "curve": []}', '{"responses": [1], "curve": [1]}']
)
def test_a_damaged_frontier_is_named(tmp_path: Path, content: str) -> None:
    make_run(tmp_path, [row(1)], episodes=False)
    (tmp_path / "frontier.json").write_text(content)
    with pytest.raises(UserError, match=r"frontier\.json: damaged"):
        read_run(tmp_path)


def test_prompts_that_came_again(tmp_path: Path) -> None:
    with Run.create(tmp_path, {}, tensorboard=False) as run:
        run.log_episodes(1, [episode("a", "first a"), episode("b", "first b"), episode("once", "x")])
        run.log_episodes(2, [episode("b", "last b"), episode("twice", "y"), episode("twice", "z")])
        run.log_episodes(4, [episode("a", "last a")])
    pairs = [(first.response, last.response) for first, last in read_revisited(tmp_path)]
    assert pairs == [("first a", "last a"), ("first b", "last b")]
    assert len(read_revisited(tmp_path, limit=1)) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", [row(1)])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "<h1>run</h1>" in (folder / "report.html").read_text()
    assert main(["report", "--run", str(folder), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    capsys.readouterr()
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(folder), "--output", str(folder)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "tether: error: no run given: tether report FOLDER, such as tether report runs/ppo"
    assert "holds no run" in errors[1]
    assert "cannot be written" in errors[2]
    Run.create(folder, {}, overwrite=True, tensorboard=False).close()
    assert not (folder / "report.html").exists()
