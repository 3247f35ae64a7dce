"""Peak memory by phase: what a phase holds is seen in its figure and in no other; what is not known is not said."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models import CountingRewards, make_world
from tether import memory
from tether.memory import PeakMemory, keep_freed_memory, old_objects_left_alone, phases_apart, process_peak
from tether.ppo import Learner, LearnerConfig
from tether.train import iterate

HELD = 200  # MiB
CLOSE = 20  # MiB that a test process gains or gives back on its own meanwhile
PHASES = ("sampling", "scoring", "reference", "learning")

measured = pytest.mark.skipif(process_peak() is None, reason="resident memory is known on Linux alone")


@pytest.fixture(autouse=True)
def _freed_memory() -> Iterator[None]:
    """As in a run of PPO; the process that tests share may have holes in its memory from earlier ones otherwise."""
    keep_freed_memory()
    yield
    keep_freed_memory(False)


def test_freed_memory_is_kept_until_the_phase_ends() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library has no such switch")
    phase = PeakMemory()
    hold()
    kept = _resident()
    phase.lap()
    assert kept - _resident() > HELD - CLOSE  # and what else was free
    assert keep_freed_memory(False)


FEW = 10_000  # objects; Python 3.12 freezes some hundreds by itself


@pytest.fixture
def _nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.unfreeze()  # what the tests have frozen
    monkeypatch.setattr(memory, "_left_alone", False)
    yield
    assert gc.get_freeze_count() < FEW
    gc.freeze()


@pytest.mark.usefixtures("_nothing_frozen")
def test_the_collector_leaves_alone_what_was_there_before_and_takes_what_comes_after() -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    rings = [Ring() for _ in range(2)]
    garbage, before = (weakref.ref(ring) for ring in rings)
    del rings[0]
    with old_objects_left_alone():
        assert garbage() is None
        rings[:] = [Ring()]
        after = weakref.ref(rings.pop())
        gc.collect()
        assert before() is not None
        assert after() is None
        with old_objects_left_alone():
            pass
        gc.collect()
        assert before() is not None  # the outer one still holds
    gc.collect()
    assert before() is None


@pytest.mark.usefixtures("_nothing_frozen")
def test_a_loop_leaves_nothing_behind_to_the_collector_where_it_is_left_early_or_fails() -> None:
    world = make_world()
    learner = Learner(world.policy, LearnerConfig(minibatches=1), iterations=3)
    for _ in iterate(world, learner):
        assert gc.get_freeze_count() > FEW
        break
    assert gc.get_freeze_count() < FEW
    world.rewards = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        next(iterate(world, learner))


def test_a_loop_that_is_still_open_when_the_interpreter_ends_is_closed_in_silence() -> None:
    code = "from tether.memory import old_objects_left_alone as context; context = context(); context.__enter__()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _resident() -> float:
    """MiB that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def hold(mebibytes: int = HELD) -> None:
    """Have that much for a moment."""
    torch.ones(mebibytes * 2**18)
    gc.collect()


def laps(*phases: int) -> list[float]:
    """The peaks of phases that hold so many MiB."""
    running = PeakMemory()
    peaks = []
    for mebibytes in phases:
        hold(mebibytes)
        peak = running.lap()
        assert peak is not None
        peaks.append(peak)
    return peaks


@measured
def test_a_phase_is_as_high_as_what_it_held_and_its_neighbours_are_not() -> None:
    before, during, after = laps(1, HELD, 1)
    assert during - before == pytest.approx(HELD, abs=CLOSE)
    assert after - before == pytest.approx(0, abs=CLOSE)


@measured
def test_measurements_within_another_leave_its_figure_alone() -> None:
    outer = PeakMemory()
    bottom, _, _ = laps(1, HELD, 1)
    PeakMemory()
    held = outer.lap()
    left = outer.lap()
    assert held is not None
    assert left is not None
    assert held - bottom == pytest.approx(HELD, abs=CLOSE)
    assert left - bottom == pytest.approx(0, abs=CLOSE)


@measured
def test_the_peak_of_the_process_outlives_every_measurement() -> None:
    hold(4 * HELD)
    highest = process_peak()
    bottom, _ = laps(1, 1)
    assert highest is not None
    assert highest - bottom > 3 * HELD
    assert process_peak() == pytest.approx(highest, abs=1)


@measured
def test_the_peak_can_be_read_without_beginning_anew() -> None:
    running = PeakMemory()
    hold()
    first, second, lap = running.peak(), running.peak(), running.lap()
    assert first == pytest.approx(second, abs=1) == pytest.approx(lap, abs=1)


class HungryRewards(CountingRewards):
    def __call__(self, *arguments: Any) -> Any:
        hold()
        return super().__call__(*arguments)


@measured
@pytest.mark.parametrize("hungry", ["scoring", "learning"])
def test_the_loop_reports_the_peak_of_each_phase(hungry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(rewards=HungryRewards() if hungry == "scoring" else CountingRewards())
    learner = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1), iterations=2)
    if hungry == "learning":
        step = learner.optimizer.step
        monkeypatch.setattr(learner.optimizer, "step", lambda: (hold(), step())[1])
    metrics = list(iterate(world, learner))[-1].metrics
    peaks = {phase: metrics[f"memory/{phase}"] for phase in PHASES}
    high = peaks.pop(hungry)
    assert all(high - other == pytest.approx(HELD, abs=CLOSE) for other in peaks.values()), (high, peaks)
    assert all(peak < 2**17 for peak in peaks.values())  # MiB, not KiB nor bytes


@measured
def test_where_freed_memory_stays_the_next_phase_has_no_figure_unless_it_is_little() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library has no such switch")
    with phases_apart(False):
        running = PeakMemory()
        hold()
        with phases_apart(True):
            first = running.lap()
        hold()
        second, third = running.lap(), running.lap()
    assert first == pytest.approx(second, abs=CLOSE)
    assert third is None
    running = PeakMemory()
    with phases_apart(False):
        hold(1)
        assert running.lap() is not None
        hold(1)
        fourth = running.lap()
    assert second is not None
    assert fourth is not None
    assert second - fourth == pytest.approx(HELD, abs=CLOSE)


@measured
@pytest.mark.parametrize("much", [True, False])
def test_the_loop_measures_large_models_now_and_then_and_small_ones_always(
    much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.train.MEMORY_EVERY", 3)
    world = make_world(rewards=HungryRewards() if much else CountingRewards())
    learner = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1), iterations=6)
    told = [{f"memory/{phase}" for phase in PHASES} <= step.metrics.keys() for step in iterate(world, learner)]
    assert told == ([True, True, False, True, False, False] if much else [True] * 6)


# Where the system does not tell -----------------------------------------------------------------------------------


def no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))


def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(name: str) -> Any:
        def refuse(text: str) -> int:
            raise PermissionError(13, "Permission denied", name)

        return SimpleNamespace(write_text=refuse) if name.endswith("clear_refs") else Path(name)

    monkeypatch.setattr(memory, "Path", path)


@pytest.mark.parametrize("system", [no_linux, forbidden])
def test_where_the_system_does_not_tell_there_is_no_metric(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system(monkeypatch)
    running = PeakMemory()
    assert running.peak() is None
    assert running.lap() is None
    world = make_world()
    step = next(iterate(world, Learner(world.policy, LearnerConfig(epochs=1, minibatches=1), iterations=1)))
    assert {f"time/{phase}" for phase in PHASES} <= step.metrics.keys()
    assert not [name for name in step.metrics if name.startswith("memory/")]


def test_a_device_of_another_kind_has_no_figure() -> None:
    assert PeakMemory("meta").lap() is None
    assert process_peak("meta") is None


def test_on_a_gpu_the_figure_is_that_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {0: 5 * 2**20, 1: 7 * 2**20}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device.index])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device.index: 2**20}))
    monkeypatch.setattr(memory, "_of_process", {})
    running, other = PeakMemory("cuda"), PeakMemory("cuda:1")
    peaks[0] = 9 * 2**20
    assert running.lap() == 9
    assert running.lap() == 1
    assert other.lap() == 1
    assert [process_peak(device) for device in ("cuda", "cuda:0", "cuda:1")] == [9, 9, 7]


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 900 + 700 + 50), ("max", None)])
def test_files_that_the_system_keeps_at_hand_count_as_free(
    limit: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = memory.free_memory()
    kept = "anon 100\ninactive_file 700\nactive_file 50\nslab 9"
    for name, text in {"memory.max": limit, "memory.current": "900", "memory.stat": kept}.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    found = memory.free_memory()
    assert without is not None
    assert found == left if left is not None else found > 2**20
