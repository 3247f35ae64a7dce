"""Rewards over HTTP, against a server of the test's own that is slow, broken, or away."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_model, make_prompts, make_tokenizer, make_world

from tether.errors import RewardError, UserError
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.frontier import FrontierConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.ppo import LearnerConfig
from tether.rewards import Rewards, RewardsConfig, check_reward
from tether.rewards.client import AnswerError, Service
from tether.rewards.judge import RUBRIC, Judge, rating_of
from tether.rewards.loading import load_reward
from tether.rewards.remote import Remote

Answer = tuple[int, Any]
QUICK = "#backoff=0.01&retries=2&timeout=2"


class Scorer:
    """A server whose answer to its n-th request, counted from 1, a test decides."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Callable[[int, dict[str, Any]], Answer] = lambda number, body: (200, {"scores": lengths(body)})
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        scorer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with scorer._lock:
                    scorer.requests.append(body)
                    scorer.headers.append(dict(self.headers))
                    scorer.paths.append(self.path)
                    number = len(scorer.requests)
                    scorer._at_once += 1
                    scorer.most_at_once = max(scorer.most_at_once, scorer._at_once)
                try:
                    status, answer = scorer.answer(number, body)
                finally:
                    with scorer._lock:
                        scorer._at_once -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    if status in (301, 307):
                        self.send_header("Location", "http://elsewhere/score")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the asker has gone, as a test of time limits wants

            def log_message(self, *_: Any) -> None:
                """Nothing: a test's output is for its failures."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def lengths(body: dict[str, Any]) -> list[float]:
    return [float(len(text)) for text in body["completions"]]


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    made = Scorer()
    yield made
    made.server.shutdown()
    made.server.server_close()


def score(spec: str, count: int = 5) -> list[float]:
    """The scores of `count` completions, the i-th i letters long."""
    completions = ["x" * i for i in range(count)]
    return check_reward(spec, ["p"] * count, completions, {"answer": [str(i) for i in range(count)]})


# ---- what is sent, and how -------------------------------------------------------------------------------------------


def test_batches_go_out_with_their_columns_and_scores_come_back_in_order(scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (time.sleep(0.02 * (number % 3)), (200, {"scores": lengths(body)}))[1]
    assert score(f"{scorer.url}#batch=2&concurrency=2", 9) == list(range(9))
    assert sorted(len(body["completions"]) for body in scorer.requests) == [1, 2, 2, 2, 2]
    whole = max(scorer.requests, key=lambda body: body["completions"])
    assert whole == {"prompts": ["p"], "completions": ["x" * 8], "columns": {"answer": ["8"]}}
    assert scorer.most_at_once == 2
    assert set(scorer.paths) == {"/score"}  # the options stay here


@pytest.mark.parametrize("wrapped", [lambda s: {"scores": s}, lambda s: {"rewards": s}, lambda s: s])
def test_answers_in_the_forms_in_use(scorer: Scorer, wrapped: Callable[[Any], Any]) -> None:
    scorer.answer = lambda number, body: (200, wrapped(lengths(body)))
    assert score(scorer.url) == [0, 1, 2, 3, 4]


def test_null_means_that_the_reward_does_not_apply(scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (200, [None, 1])
    rewards = Rewards(RewardsConfig((scorer.url, "length?per_token=1")))
    assert rewards(["p"] * 2, ["a", "b"], [[1], [1, 2]], {}).total == [1, 3]


def test_chats_go_out_as_messages_and_a_token_in_the_header(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    scorer.answer = lambda number, body: (200, [1.5])
    messages = [{"role": "assistant", "content": "hi"}]
    spec = f"{scorer.url}#token_env=SCORER_TOKEN"
    assert check_reward(spec, [[{"role": "user", "content": "q"}]], [messages]) == [1.5]
    assert scorer.requests[0]["completions"] == [messages]
    assert scorer.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(UserError, match="SCORER_TOKEN is not set"):
        load_reward(spec)


@pytest.mark.parametrize("token", ["two\nlines", "gehe\u00efm"])
def test_a_token_that_no_header_can_hold_is_named_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", token)
    with pytest.raises(UserError, match="SCORER_TOKEN holds more than a token") as caught:
        load_reward("http://host/x#token_env=SCORER_TOKEN")
    assert token[:4] not in str(caught.value)


def test_a_judge_needs_no_key_unless_one_is_named(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    scorer.answer = lambda number, body: (200, judged("5"))
    assert check_reward(judge(scorer), ["p"], ["a"]) == [0.5]
    assert "Authorization" not in scorer.headers[0]
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        load_reward(judge(scorer, "&token_env=JUDGE_KEY"))


# ---- servers that fail -----------------------------------------------------------------------------------------------

HALF: Answer = (200, {"scores": [1.0, 2.0]})
FAILURES: dict[str, tuple[Answer, str]] = {
    "500": ((500, {"detail": "out of memory"}), r"answered 500 .*out of memory.*3 attempts"),
    "503": ((503, b""), r"answered 503 .*3 attempts"),
    "half a batch": (HALF, "answered 2 scores for 5 completions .3 attempts"),
    "garbage": ((200, b"<html>\n\xff502 Bad Gateway</html>"), "answered something that is not JSON: '<html>"),
    "empty": ((200, b""), "not JSON"),
    "another thing": ((200, {"score": 1}), "expected .*one number per completion"),
    "not a number": ((200, [1, 2, "3", 4, 5]), "answered '3' for completion 2 of a batch, expected a finite number"),
    "true": ((200, [1, 2, True, 4, 5]), "answered True for completion 2"),
    "nan": ((200, b"[1, NaN, 3, 4, 5]"), "answered nan for completion 1"),
    "infinite": ((200, b"[1, 1e999, 3, 4, 5]"), "answered inf for completion 1"),
    "beyond all bounds": ((200, [1, 10**400, 3, 4, 5]), "answered 10+ for completion 1"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_keeps_failing_is_one_line(name: str, scorer: Scorer) -> None:
    answer, message = FAILURES[name]
    scorer.answer = lambda number, body: answer
    with pytest.raises(RewardError, match=message) as caught:
        score(scorer.url + QUICK)
    assert "\n" not in str(caught.value)
    assert scorer.url in str(caught.value)
    assert len(scorer.requests) == 3


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_recovers_is_survived(name: str, scorer: Scorer) -> None:
    scorer.answer = lambda number, body: FAILURES[name][0] if number <= 2 else (200, lengths(body))
    assert score(scorer.url + QUICK) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("status", "message"), [(400, "answered 400"), (404, "answered 404"), (301, "elsewhere")])
def test_what_will_not_pass_is_not_asked_again(status: int, message: str, scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (status, b"no")
    with pytest.raises(RewardError, match=rf"{message}.*\(one attempt\)"):
        score(scorer.url + QUICK)
    assert len(scorer.requests) == 1


def test_a_slow_server_is_given_up_or_survived(scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (time.sleep(0.5 if number == 1 else 0), (200, lengths(body)))[1]
    assert score(f"{scorer.url}#timeout=0.2&backoff=0.01") == [0, 1, 2, 3, 4]
    scorer.answer = lambda number, body: (time.sleep(0.5), (200, lengths(body)))[1]
    with pytest.raises(RewardError, match=r"no answer within 0\.1 s .2 attempts"):
        score(f"{scorer.url}#timeout=0.1&backoff=0.01&retries=1")


def test_a_server_that_drips_is_held_to_the_time_limit(scorer: Scorer) -> None:
    """Each byte comes in time, the whole answer would not."""

    class Dripping(scorer.server.RequestHandlerClass):  # type: ignore[misc,name-defined]
        def do_POST(self) -> None:  # noqa: N802 - the name that the server looks for
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    scorer.server.RequestHandlerClass = Dripping
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within 0\.3 s"):
        score(f"{scorer.url}#timeout=0.3&retries=0")
    assert time.monotonic() - begun < 25  # all of it takes 50


def test_a_server_that_is_away_is_one_line(scorer: Scorer) -> None:
    scorer.server.server_close()
    with pytest.raises(RewardError, match=r"no connection \(Connection refused\) \(3 attempts"):
        score(scorer.url + QUICK)


class Impatient(threading.Event):
    """Notes how long it was to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return False


def test_the_waits_double_with_a_random_part(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer.answer = lambda number, body: (500, b"")
    monkeypatch.setattr("tether.rewards.client.LONGEST_WAIT", 5.0)
    service = Service(url=scorer.url, retries=4, backoff=1.0)
    stop, other = Impatient(), Impatient()
    for seed, event in enumerate((stop, other)):
        with pytest.raises(AnswerError, match="500"):
            service.ask({}, lambda answer, last: answer, event, random.Random(seed))
    for wait, whole in zip(stop.waits, (1, 2, 4, 5), strict=True):
        assert whole / 2 <= wait <= whole
    assert stop.waits != other.waits


# ---- nothing that was sampled is lost --------------------------------------------------------------------------------


def test_a_failing_scorer_in_training_loses_nothing(scorer: Scorer, tmp_path: Path) -> None:
    def config(url: str) -> PPOConfig:
        return PPOConfig(
            output=str(tmp_path / "run"),
            iterations=3,
            reward=RewardsConfig((url + "#batch=4&retries=1&backoff=0.01",)),
            sampling=SamplingConfig(max_new_tokens=4),
            collect=CollectConfig(prompts=4),
            learner=LearnerConfig(minibatches=1, epochs=1),
            frontier=FrontierConfig(samples=0),
        )

    def parts() -> Parts:
        return Parts(make_model(), make_tokenizer(), [{"prompt": text} for text in ("ab", "cd", "ef", "fa")])

    scorer.answer = lambda number, body: (200, lengths(body)) if number == 1 else (500, b"broken")
    with pytest.raises(RewardError, match=r"answered 500 .*broken.*2 attempts") as caught:
        train_ppo(config(scorer.url), parts())
    unscored = [json.loads(line) for line in (tmp_path / "run" / "unscored.jsonl").read_text().splitlines()]
    assert [row["response"] for row in unscored] == scorer.requests[1]["completions"]
    assert {row["iteration"] for row in unscored} == {2}
    assert str(caught.value).endswith(f"; 4 responses without a score: {tmp_path / 'run' / 'unscored.jsonl'}")

    scorer.answer = lambda number, body: (200, lengths(body))
    trained = train_ppo(config(scorer.url), parts(), resume=True)
    assert trained.learner.iteration == 3
    assert scorer.requests[3] == scorer.requests[1]  # the same responses were sampled again, and scored


def test_half_a_batch_never_reaches_the_wrong_completion(scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (200, lengths(body)[: 1 if number % 2 else None])
    rewards = Rewards(RewardsConfig((f"{scorer.url}#batch=5&backoff=0.01",)))
    world = make_world(rewards=rewards, prompts=make_prompts(3), collect=CollectConfig(prompts=3))
    episodes = world.collect()
    assert len(episodes) == 3
    assert world._batch is not None
    assert world._batch.scores.total == [float(len(text)) for text in world._batch.samples.texts]


# ---- a judge ---------------------------------------------------------------------------------------------------------


def judged(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judge(scorer: Scorer, options: str = "") -> str:
    return f"judge?model=judge-1&url={scorer.url}&backoff=0.01&retries=2{options}"


def test_a_judge_is_asked_by_the_rubric_and_its_rating_scaled(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    scorer.answer = lambda number, body: (200, judged("It is polite.\n**Score:** 7.5"))
    chat = [{"role": "user", "content": "Hello {you}"}]
    answer = [{"role": "assistant", "content": "{completion} Hi"}]
    assert check_reward(judge(scorer), [chat], [answer]) == [0.75]
    (body,) = scorer.requests
    assert scorer.paths == ["/score/chat/completions"]
    assert scorer.headers[0]["Authorization"] == "Bearer key"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    asked = body["messages"][0]["content"]
    assert asked == RUBRIC.format(prompt="user: Hello {you}", completion="{completion} Hi", low=0, high=10)


def test_a_rubric_of_ones_own_may_name_columns(scorer: Scorer, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Is {completion} near {answer}? {{1}} to {high}.")
    scorer.answer = lambda number, body: (200, judged("4"))
    spec = judge(scorer, f"&rubric={rubric}&low=1&high=5")
    assert check_reward(spec, ["p"], ["six"], {"answer": [7]}) == [0.75]
    assert scorer.requests[0]["messages"][0]["content"] == "Is six near 7? {1} to 5."
    rewards = Rewards(RewardsConfig((spec,)))
    with pytest.raises(UserError, match=r"needs the column `answer`.*the rubric names it"):
        rewards.check(["gold"])
    rewards.check({"answer": [1, 2]}, ["p", "q"])
    assert len(scorer.requests) == 1  # looking whether the columns are there asks nobody


def test_a_judge_without_a_rating_is_asked_again_then_named_or_given_the_missing_score(scorer: Scorer) -> None:
    scorer.answer = lambda number, body: (200, judged("I'd rather not") if number % 3 else judged("Score: 10"))
    assert check_reward(judge(scorer), ["p"], ["a"]) == [1.0]
    scorer.answer = lambda number, body: (200, judged("Score: 11"))
    with pytest.raises(RewardError, match=r"gave no rating from 0 to 10: 'Score: 11' \(3 attempts"):
        check_reward(judge(scorer), ["p"], ["a"])
    assert check_reward(judge(scorer, "&missing=0.5"), ["p"], ["a"]) == [0.5]
    scorer.answer = lambda number, body: (200, {"error": "no such model"})
    with pytest.raises(RewardError, match=r"no such model.*expected a chat completion"):
        check_reward(judge(scorer, "&missing=0.5"), ["p"], ["a"])


@pytest.mark.parametrize("name", ["500", "503", "garbage", "empty"])
def test_a_judge_that_fails_is_survived_or_one_line(name: str, scorer: Scorer) -> None:
    answer, message = FAILURES[name]
    scorer.answer = lambda number, body: answer if number <= 2 else (200, judged("Score: 5"))
    assert check_reward(judge(scorer, "&concurrency=1"), ["p"] * 2, ["a", "b"]) == [0.5, 0.5]
    scorer.answer = lambda number, body: answer
    with pytest.raises(RewardError, match=f"reward `judge`.*{message}") as caught:
        check_reward(judge(scorer), ["p"], ["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Score: 3", 3),
        ("score = -2.5", -2.5),
        ('{"score": 8}', 8),
        ("Score: 3 at first, but\nScore: **4**", 4),
        (" 9\n", 9),
        ("I rate it 9", None),
        ("", None),
    ],
)
def test_ratings_are_read(text: str, rating: float | None) -> None:
    assert rating_of(text) == rating


# ---- wrong settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://", "is no address"),
        ("http://höst/x", "is no address"),
        ("http://host:port/x", "no address"),
        ("http://name:s3cret@host/x", "holds a password"),
        ("judge?model=m&url=http://name:s3cret@host/x", "holds a password"),
        ("http://host/x#batch=0", "`batch` is 0"),
        ("http://host/x#concurrency=0", "`concurrency` is 0"),
        ("http://host/x#timeout=0", "`timeout` is 0"),
        ("http://host/x#retries=-1", "`retries` is -1"),
        ("http://host/x#retries=1.5", "expected a whole number"),
        ("http://host/x#url=http://other", "no option `url`; it has: concurrency, timeout, .*batch"),
        ("judge?model=m", "needs the option `url`"),
        ("judge?url=http://host", "needs the option `model`"),
        ("judge?model=m&url=host", "is no address"),
        ("judge?model=m&url=http://host&low=3&high=3", "expected low below high"),
        ("judge?model=m&url=http://host&rubric=nowhere.txt", "nowhere.txt cannot be read"),
    ],
)
def test_settings_that_cannot_be_meant_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{prompt}", "does not name {completion}"), ("{completion} {", "braces"), ("{completion} {0}", "is no name")],
)
def test_rubrics_that_cannot_be_filled(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        Judge(model="m", url="http://host", rubric=str(tmp_path / "rubric.txt"))


def test_a_remote_scorer_is_a_reward_with_its_address_for_a_label() -> None:
    function = load_reward("https://host:8443/a?model=7#batch=3")
    assert (function.label, function.name) == ("https://host:8443/a?model=7", "remote")
    assert function.call == Remote(url="https://host:8443/a?model=7", batch=3)
