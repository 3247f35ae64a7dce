"""Alarms: raised when they should be, once, cleared again, and the same ones for a run that was resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tether.runs import Run
from tether.runs.alarms import Alarm, AlarmLog, AlarmsConfig, find_alarms

QUIET = {
    "kl_k1": 1.0,
    "length_ratio": 1.0,
    "entropy": 1.0,
    "score": 0.0,
    "gold": 0.0,
    "score_std": 2.0,
    "gold_std": 0.5,
}


def rows(**series: list[Any]) -> list[dict[str, Any]]:
    length = max(map(len, series.values()))
    return [
        {"iteration": number + 1, **QUIET, **{name: values[number] for name, values in series.items()}}
        for number in range(length)
    ]


def found(config: AlarmsConfig, **series: list[Any]) -> list[tuple[int, str, str]]:
    return [(alarm.iteration, alarm.kind, alarm.state) for alarm in find_alarms(rows(**series), config)]


ONE = AlarmsConfig(window=1)


def test_a_quiet_run_raises_nothing() -> None:
    assert found(AlarmsConfig(), kl_k1=[1.0] * 20) == []


@pytest.mark.parametrize(
    ("name", "kind", "fine", "bad"),
    [
        ("kl_k1", "kl", 20.0, 20.1),
        ("length_ratio", "length", 2.0, 2.1),
        ("length_ratio", "length", 0.5, 0.49),
        ("entropy", "entropy", 0.01, 0.009),
    ],
)
def test_each_threshold_is_raised_once_and_cleared(name: str, kind: str, fine: float, bad: float) -> None:
    series = {name: [fine, bad, bad, fine, fine, bad]}
    assert found(ONE, **series) == [(2, kind, "raised"), (4, kind, "cleared"), (6, kind, "raised")]
    off = AlarmsConfig(window=1, kl=None, length_ratio=None, entropy=None)
    assert found(off, **series) == []


def test_thresholds_can_be_set() -> None:
    assert found(AlarmsConfig(window=1, kl=0.5), kl_k1=[0.4, 0.6]) == [(2, "kl", "raised")]
    assert found(AlarmsConfig(window=1, length_ratio=1.1), length_ratio=[1.0, 1.2]) == [(2, "length", "raised")]
    assert found(AlarmsConfig(window=1, entropy=0.9), entropy=[1.0, 0.8]) == [(2, "entropy", "raised")]


def test_the_mean_over_the_window_counts_and_a_whole_window_clears() -> None:
    kl = [0.0, 0.0, 50.0, 30.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    # means of three: 0, 0, 16.7, 26.7, 26.7, 10, 0, 0, 0: not due from iteration 6 on, so cleared in iteration 8
    assert found(AlarmsConfig(window=3), kl_k1=kl) == [(4, "kl", "raised"), (8, "kl", "cleared")]


def test_a_cleared_alarm_says_since_when_it_was_raised_and_both_say_what_was_seen() -> None:
    raised, cleared = find_alarms(rows(kl_k1=[1.0, 25.0, 24.0, 3.0]), ONE)
    assert (raised.since, cleared.since, cleared.iteration) == (2, 2, 4)
    assert raised.value == 25.0
    assert raised.threshold == 20.0
    assert raised.seen == "the KL to the reference is 25 nats per response (alarm above 20)"
    assert raised.message.startswith(f"{raised.seen}: raise --kl.beta")
    assert cleared.message == "over: the KL to the reference is 3 nats per response (alarm above 20)"
    assert "\n" not in raised.message


def test_gold_that_falls_while_the_score_rises() -> None:
    score = [0.0, 1.0, 2.0, 3.0, 4.0]
    gold = [0.0, 0.4, 0.2, 0.1, 0.0]  # gold's standard deviation is 0.5: 0.6 of it lost by iteration 4
    (alarm,) = find_alarms(rows(score=score, gold=gold), ONE)
    assert (alarm.iteration, alarm.kind, alarm.state) == (4, "gap", "raised")
    assert alarm.value == pytest.approx(0.6)
    assert "since iteration 2 the gold score has fallen by 0.60" in alarm.seen
    assert "the score went +1.00" in alarm.seen  # from 1 to 3, in units of 2
    assert found(AlarmsConfig(window=1, gap=None), score=score, gold=gold) == []
    assert found(AlarmsConfig(window=1, gap=0.9), score=score, gold=gold) == []


def test_no_gap_where_both_fall_or_gold_does_not() -> None:
    falling = [0.0, -1.0, -2.0, -3.0]
    rising = [0.0, 1.0, 2.0, 3.0]
    assert found(ONE, score=falling, gold=falling) == []
    assert found(ONE, score=rising, gold=rising) == []
    assert found(ONE, score=rising, gold=[0.0] * 4) == []


def test_the_gap_waits_for_a_whole_window() -> None:
    config = AlarmsConfig(window=2)
    # the first gold alone would have been the best: means are 0.5 (iteration 2), 0, 0
    assert found(config, score=[0.0] * 4, gold=[1.0, 0.0, 0.0, 0.0]) == [(3, "gap", "raised")]
    assert found(AlarmsConfig(window=4), score=[0.0] * 4, gold=[1.0, 0.0, 0.0, 0.0]) == []


@pytest.mark.parametrize("name", ["kl_k1", "length_ratio", "entropy", "gold", "score"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_a_number_raises_nothing(name: str, value: Any) -> None:
    assert found(ONE, **{name: [value, value]}) == []


def test_a_run_without_gold_or_without_spread_has_no_gap() -> None:
    series = {"score": [0.0, 1.0], "gold": [1.0, 0.0]}
    assert found(ONE, **series) == [(2, "gap", "raised")]
    assert found(ONE, **series, gold_std=[0.0, 0.0]) == []
    assert found(ONE, **series, score_std=[0.0, 0.0]) == []
    bare = [{"iteration": n, "score": 0.0, "entropy": 1.0} for n in (1, 2)]
    assert find_alarms(bare, ONE) == []


@pytest.mark.parametrize(
    ("name", "value"), [("kl", 0.0), ("length_ratio", 1.0), ("entropy", -1.0), ("gap", math.nan), ("window", 0)]
)
def test_bad_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        AlarmsConfig(**{name: value})  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_the_log_goes_on_after_a_rewind_as_if_nothing_had_happened(tmp_path: Path) -> None:
    series = rows(kl_k1=[1.0, 30.0, 30.0, 1.0, 30.0, 1.0])
    metrics = [{name: value for name, value in row.items() if name != "iteration"} for row in series]
    for name in ("whole", "broken"):
        with Run.create(tmp_path / name, {}, tensorboard=False) as run:
            log = AlarmLog(run.folder, ONE)
            assert not log.file.exists()  # a run without alarms has no file
            for number in range(1, 7 if name == "whole" else 6):
                run.log(number, metrics[number - 1])
                log.log(number, metrics[number - 1])
    assert len(read(tmp_path / "broken")) == 3
    with Run.open(tmp_path / "broken", tensorboard=False) as run:
        run.rewind(3)
        log = AlarmLog(run.folder, ONE)
        assert [(alarm["iteration"], alarm["state"]) for alarm in read(run.folder)] == [(2, "raised")]
        for number in range(4, 7):
            run.log(number, metrics[number - 1])
            log.log(number, metrics[number - 1])
    assert read(tmp_path / "broken") == read(tmp_path / "whole")
    assert [Alarm(**entry) for entry in read(tmp_path / "whole")] == find_alarms(series, ONE)


def test_starting_again_removes_the_alarms(tmp_path: Path) -> None:
    with Run.create(tmp_path, {}, tensorboard=False) as run:
        AlarmLog(run.folder, ONE).log(1, {"kl_k1": 99.0})
    assert (tmp_path / "alarms.jsonl").exists()
    Run.create(tmp_path, {}, overwrite=True, tensorboard=False).close()
    assert not (tmp_path / "alarms.jsonl").exists()
