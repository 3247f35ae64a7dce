"""The benchmarks of growth and of the machine's limits: they run, count right, and know what a GPU is without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tether.memory import process_peak

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PHASES = {"sampling", "reference", "learning"}
PICTURES = importlib.util.find_spec("matplotlib") is not None  # of the group `benchmarks`

measured = pytest.mark.skipif(process_peak() is None, reason="resident memory is known on Linux alone")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def outputs(folder: Path) -> list[str]:
    pictures = ["--png", str(folder / "out.png")] if PICTURES else []
    return ["--json", str(folder / "out.json"), *pictures]


@pytest.mark.slow
@measured
def test_scaling_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--repeats", "1"]
    command += ["--only", "response", "learner", *outputs(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "time ~ n^" in done.stdout
    assert "Slopes: " in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    (response,) = report["sweeps"]
    assert response["variable"] == "response"
    assert [point["value"] for point in response["points"]] == [4, 8, 16]
    assert [point["amount"] for point in response["points"]] == [4 * (4 + n) for n in (4, 8, 16)]
    for point in response["points"]:
        assert point["seconds"].keys() == point["bytes"].keys() == PHASES
        assert all(0 < seconds < 60 for seconds in point["seconds"].values())
        assert all(0 < size < 2**30 for size in point["bytes"].values())
    assert response["fits"].keys() == PHASES
    assert [row["vocabulary"] for row in report["learner"]] == [64, 128]
    assert all(row["tokens"] == [48, 96] and len(row["bytes"]) == 2 for row in report["learner"])
    assert (tmp_path / "out.png").exists() == PICTURES


def test_roofline_runs(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    roofline = script("roofline")
    small = replace(roofline.WORKLOADS["tiny"], layers=1, prompts=8, response_tokens=8, epochs=1)
    monkeypatch.setitem(roofline.WORKLOADS, "tiny", small)
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--quick", *outputs(tmp_path)])
    assert roofline.main() == 0
    assert "learning, of peak" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["workload"], row["precision"]) == ("tiny", "float32")
    assert row["shares"].keys() == roofline.SHARES.keys()
    # the time of a decode step is the difference of two times, which of so few steps may come out on either side of 0
    assert all(math.isfinite(share) for share in row["shares"].values())
    assert all(len(values) == 1 for values in row["rounds"].values())
    assert row["shares"]["learning, of peak"] > 0
    assert (tmp_path / "out.png").exists() == PICTURES


def test_fits_find_the_power_and_the_line(script: Any) -> None:
    scaling = script("scaling")
    x = [1, 2, 4, 8, 16, 32]
    assert scaling.growth(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)
    # the lower half does not count
    assert scaling.growth(x, [100, 100, 100, 8**2, 16**2, 32**2]) == pytest.approx(2)
    assert scaling.growth([1, 10], [5, 50]) == pytest.approx(1)
    fit = scaling.line(x, [7 + 5 * n for n in x])
    assert (fit["slope"], fit["constant"], fit["r2"]) == pytest.approx((5, 7, 1))
    assert scaling.line(x, [4] * 6)["r2"] is None


def test_only_what_is_named_changes_and_samples_share_as_many_responses(script: Any) -> None:
    scaling = script("scaling")
    for variable in scaling.variables(quick=False):
        changed = [variable.change(scaling.BASE, value) for value in variable.values]
        if variable.name == "samples":
            assert {workload.sequences for workload in changed} == {16}
            assert {workload.prompt_tokens for workload in changed} == {512}
        else:
            name = {"response": "response_tokens"}.get(variable.name, variable.name)
            assert [replace(w, **{name: getattr(scaling.BASE, name)}) for w in changed] == [scaling.BASE] * len(changed)


@measured
def test_the_learners_peak_does_not_grow_by_logits(script: Any) -> None:
    """2,048 more response tokens at once: whole logits in float32 would be 256 MiB, and a gradient as much.

    The first turn is for what libraries set aside once. Of the rest 5 to 12 MiB were measured, on processors with and
    without AVX-512, one and two threads.
    """
    scaling, workloads = script("scaling"), script("workloads")
    vocabulary, peaks = 32_768, []
    for prompts in (48, 16, 48):
        workload = replace(scaling.QUICK, vocabulary=vocabulary, prompts=prompts, response_tokens=64, minibatches=1)
        world, learner = workloads.make_ppo(workload, microbatch_size=scaling.ONE_PASS)
        meter = workloads.PhaseMeter(world, learner)
        trajectories = world.collect()
        assert int(trajectories.mask.sum()) == prompts * 64  # no response ends early
        learner.update(trajectories, *learner.credit(trajectories))
        peaks.append(meter.bytes["learning"][0] - meter.base)
    assert peaks[2] - peaks[1] < 2048 * 4 * vocabulary / 4


# A GPU, without one ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch.cuda says, in place of a GPU; `peak` may be set."""
    state = SimpleNamespace(peak=3 * 2**20, held=2**20, waited=0)
    answers = {
        "current_device": lambda: 0,
        "get_device_name": lambda: "A GPU",
        "synchronize": lambda: setattr(state, "waited", state.waited + 1),
        "max_memory_allocated": lambda device=None: state.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(state, "peak", state.held),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return state


def qwen(script: Any) -> Any:
    workloads = script("workloads")
    with torch.device("meta"):
        return workloads.make_model(workloads.WORKLOADS["0.5b"], torch.bfloat16, "meta")


def test_the_largest_model_has_the_shape_of_qwen_2_5_0_5b(script: Any) -> None:
    model = qwen(script)
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_the_largest_model_costs(script: Any) -> None:
    """Against the counts of Qwen2.5-0.5B: 0.36 B parameters without embeddings, 2 heads of keys and values of 64."""
    roofline, model = script("roofline"), qwen(script)
    workload = roofline.WORKLOADS["0.5b"]
    policy = SimpleNamespace(model=model, parameters=model.parameters)
    costs = roofline.Costs.of(workload, policy, "bfloat16-weights")
    trunk = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert (costs.trunk, costs.head, costs.parameters) == (trunk, 151_936 * 896, 494_032_768)
    cache = 512 * (64 + 256) * 24 * 2 * 2 * 64  # responses, tokens, layers, keys and values, heads, channels
    assert costs.read_for_a_step == 2 * (trunk + 151_936 * 896 + cache)
    tokens, drawn = 512 * (64 + 512), 512 * 512
    attention = 512 * 24 * 6 * (64 + 512) ** 2 * 896  # 12 · L · d · T² of PaLM's appendix B, halved
    assert costs.flop_of_learning == 4 * (6 * trunk * tokens + 6 * costs.head * drawn + attention)
    assert costs.moved_by_the_optimizer == 7 * 2 * 494_032_768
    assert roofline.Costs.of(workload, policy, "float32").weight_bytes == 4


def test_clocks_wait_for_the_gpu_and_peaks_are_its_own(script: Any, gpu: SimpleNamespace) -> None:
    workloads = script("workloads")
    assert workloads.seconds(lambda: None, "cuda") >= 0
    assert gpu.waited == 2
    workloads.reset_peak("cuda")
    gpu.peak = 5 * 2**20
    assert workloads.peak_bytes("cuda") == 5 * 2**20
    workloads.reset_peak("cuda")
    assert workloads.peak_bytes("cuda") == 2**20
    assert workloads.machine_line("cuda").startswith("A GPU; ")


def test_phases_are_measured_on_the_gpu(script: Any, gpu: SimpleNamespace) -> None:
    scaling, workloads = script("scaling"), script("workloads")
    world, learner = workloads.make_ppo(scaling.QUICK)
    draw = world.sampler.sample

    def hungry(*arguments: Any) -> Any:
        gpu.peak = 9 * 2**20
        return draw(*arguments)

    world.sampler.sample = hungry
    meter = workloads.PhaseMeter(world, learner, "cuda")
    trajectories = world.collect()
    learner.update(trajectories, *learner.credit(trajectories))
    assert meter.base == 2**20
    assert meter.bytes == {"sampling": [9 * 2**20], "reference": [2**20], "learning": [2**20]}
    assert gpu.waited == 6


def test_peaks_of_the_gpu_are_measured_on_large_tensors(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workloads, shapes = script("workloads"), []

    def on_meta(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shapes.append((shape, device, dtype))
        return torch.empty(*shape, device="meta", dtype=dtype)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "randn", on_meta)
    monkeypatch.setattr(torch, "ones", on_meta)
    assert workloads.matrix_peak("cuda", torch.bfloat16) > 0
    assert workloads.memory_bandwidth("cuda") > 0
    assert shapes == [((8192, 8192), "cuda", torch.bfloat16)] * 2 + [((2**30,), "cuda", torch.float32)]


@pytest.mark.parametrize("name", ["scaling", "roofline"])
def test_what_is_missing_is_said_before_anything_runs(
    name: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = script(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for request, said in (
        (["--device", "cuda"], "--device cuda: torch finds no GPU"),
        (["--json", str(tmp_path / "no" / "out.json")], "its folder does not exist"),
    ):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", *request])
        assert module.main() == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.out == ""
