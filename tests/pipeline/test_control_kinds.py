"""Whatever environment people bring: collected from, tried, filmed and resumed, by one path."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tests.control import test_environments, test_infos, test_world, zoo
from tests.run_folders import metric_lines, newest_checkpoint

from tether.cli import main
from tether.config import config_from_dict
from tether.control.acting import Actor
from tether.control.environments import Environments, EnvironmentsConfig
from tether.control.world import ControlCollectConfig
from tether.pipeline.control import (
    ControlConfig,
    ControlEvalConfig,
    ControlEvaluation,
    build_control,
    evaluate_control,
    load_actor,
    train_control,
)
from tether.ppo import LearnerConfig
from tether.runs import load_state, read_config, read_episodes, read_metrics

ZOO = f"{zoo.__file__}:make_env"
TRIES = [(kind, "", "sync") for kind in zoo.KINDS] + [
    *(("vector", trick, "sync") for trick in (*zoo.TRICKS, "samples") if trick != "everyone's random numbers"),
    *(("vector", trick, "async") for trick in ("normalised", "everyone's random numbers")),
]


def settings(output: Path, env: str = ZOO, vectorization: Any = "sync", **changes: Any) -> ControlConfig:
    changes = {"total_steps": 32, "count": 2, "longest_episode": 6, "options": {}, "film_every": 0, **changes}
    own = {name: changes.pop(name) for name in ("count", "longest_episode", "options")}
    return ControlConfig(
        env=env,
        output=str(output),
        checkpoint_every=1,
        environments=EnvironmentsConfig(vectorization=vectorization, **own),
        collect=ControlCollectConfig(8, film_every=changes.pop("film_every"), record=2),
        learner=LearnerConfig(epochs=1, minibatches=1),
        **changes,
    )


def train(config: ControlConfig, resume: bool = False) -> Path:
    train_control(config, resume=resume, progress=False).world.environments.close()
    return Path(config.output)


def tried(run: Path, episodes: int = 3, **options: Any) -> ControlEvaluation:
    return evaluate_control(ControlEvalConfig(str(run), episodes, **options))


@pytest.mark.parametrize(("kind", "trick", "vectorization"), TRIES)
def test_every_kind_is_collected_from_tried_filmed_and_resumed(
    kind: str, trick: str, vectorization: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"kind": kind, "trick": trick}
    small = kind in ("image", "grey", "channels first", "mask")
    length = {"total_steps": 16 if small else 32, "options": options}
    whole = train(settings(tmp_path / "whole", vectorization=vectorization, film_every=8, **length))
    parts = replace(settings(tmp_path / "parts", vectorization=vectorization, film_every=8, **length), total_steps=16)
    train(parts)
    if not small:
        with caplog.at_level(logging.WARNING):
            assert metric_lines(train(replace(parts, total_steps=32), resume=True)) == metric_lines(whole)
        assert "cannot be resumed" not in caplog.text
    films = [episode.frames for episode in read_episodes(whole, limit=100) if episode.frames]
    assert films
    assert all((whole / film).stat().st_size for film in films)
    first = tried(whole, seed=1, sample=True, record=str(tmp_path / "film.gif"))
    assert (tmp_path / "film.gif").stat().st_size
    assert first == tried(whole, seed=1, sample=True)
    assert first.lengths == [6 if trick == "endless" else 5] * 3
    assert (first.success is None) == (trick != "tells of success") == ("success" not in read_metrics(whole)[-1])


@pytest.mark.parametrize(
    ("env", "vectorization"),
    [
        ("CartPole-v1", "native"),
        ("Zoo/Counters-v0", "native"),
        (f"{test_environments.__file__}:global_env", "async"),
        (f"{test_world.__file__}:mixed", "sync"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not an instance of AutoresetMode")
def test_those_that_are_not_rendered_too(env: str, vectorization: str, tmp_path: Path) -> None:
    gymnasium.register("Zoo/Counters-v0", vector_entry_point=test_infos.Counters)
    options = {"mode": "SameStep", "say": None, "ends": "terminated"} if env == "Zoo/Counters-v0" else {}
    try:
        whole = settings(tmp_path / "whole", env, vectorization, options=options)
        parts = settings(tmp_path / "parts", env, vectorization, options=options, total_steps=16)
        expected = metric_lines(train(whole))
        train(parts)
        assert metric_lines(train(replace(parts, total_steps=32), resume=True)) == expected
        first = tried(Path(whole.output), seed=1)
        assert first == tried(Path(whole.output), seed=1)
        assert len(first.lengths) == 3
    finally:
        gymnasium.registry.pop("Zoo/Counters-v0")


def test_one_path_serves_training_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(settings(tmp_path / "run"))
    assert set(tried(run).lengths) == {5}
    called: list[str] = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: called.append(name) or original(*a, **k))

    for owner, name in ((Actor, "see"), (Actor, "act"), (Environments, "reset"), (Environments, "step")):
        note(owner, name)
    rounds = []
    for act in (lambda: train(settings(tmp_path / "other")), lambda: tried(run)):
        called.clear()
        act()
        rounds.append(set(called))
    assert rounds[0] == rounds[1] == {"see", "act", "reset", "step"}
    monkeypatch.setattr(
        Actor, "act", lambda self, seen, noise: (torch.ones(len(seen), dtype=torch.int64), np.ones(len(seen), int))
    )
    assert {step for e in read_episodes(train(settings(tmp_path / "ones")), limit=99) for step in e.action_ids} == {1}
    assert tried(run).returns == pytest.approx([6.5] * 3)


def test_evaluation_gives_each_episode_its_seed_as_training_does(tmp_path: Path) -> None:
    run = train(settings(tmp_path / "run"))
    played = tried(run, 2, seed=7)
    assert played.returns == tried(run, 2, seed=7).returns
    config = config_from_dict(ControlConfig, read_config(run), "")
    with (
        Environments.to_try(config.env, config.environments, 7) as trying,
        Environments(config.env, replace(config.environments, count=1), 7) as training,
    ):
        actor = load_actor(config, trying, newest_checkpoint(run)[1])
        for environments in (trying, training):
            environments.reset()
        for _ in range(12):
            action = actor.act(actor.see(trying.observations), None)[1]  # type: ignore[arg-type]
            one, other = trying.step(action), training.step(action)
            assert np.array_equal(one.observations, other.observations)
            assert np.array_equal(trying.seeds, training.seeds)  # type: ignore[arg-type]


# Wrappers with state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_statistics_of_a_wrapper_are_used_frozen_where_a_policy_is_tried(vectorization: str, tmp_path: Path) -> None:
    run = train(settings(tmp_path / "run", vectorization=vectorization, options={"trick": "normalised"}))
    checkpoint = newest_checkpoint(run)[1]
    saved = load_state(checkpoint, "trainer")["world"]["environments"]
    moments = [dict(now)["NormalizeObservation"] for _, now in saved["wrappers"]]
    counts = np.array([float(each["count"]) for each in moments])
    assert (counts > 16).all()
    config = config_from_dict(ControlConfig, read_config(run), "")
    with Environments.to_try(config.env, config.environments, 0) as trying:
        trying.bring_gathered(saved)
        for _ in range(2):
            trying.reset()
            trying.step(np.zeros(1, int))
        ((_, now),) = trying.state_dict()["wrappers"]
        used = dict(now)["NormalizeObservation"]
    assert float(used["count"]) == pytest.approx(counts.sum())
    mean = sum(c * each["mean"].numpy() for c, each in zip(counts, moments, strict=True)) / counts.sum()
    assert used["mean"].numpy() == pytest.approx(mean, rel=1e-5)


def test_a_wrapper_whose_state_nobody_can_ask_for_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = train(settings(tmp_path / "run", options={"trick": "forgetful"}))
        assert caplog.text.count("its wrapper keeps `Forgetful.running`") == 1
        assert "collect.normalise_observations" in caplog.text
        caplog.clear()
        tried(run)
        assert caplog.text.count("its wrapper keeps `Forgetful.running`") == 1
        caplog.clear()
        train(settings(tmp_path / "kept", options={"trick": "own statistics"}))
    assert "keeps" not in caplog.text


# Episodes without an end ------------------------------------------------------------------------------------------


def test_an_episode_that_never_ends_is_cut_off_and_its_value_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(tmp_path / "run", options={"trick": "endless"}, longest_episode=5, total_steps=320)
    world, _ = build_control(config)
    with world.environments, torch.no_grad(), caplog.at_level(logging.WARNING):
        world.policy.value_head.bias.fill_(100.0)
        batch = world.collect()
        for _ in range(20):
            world.collect()
        state = world.state_dict()
    assert batch.truncated[0].nonzero().flatten().tolist() == [4, 7]  # the second is the end of the collection
    assert not batch.terminated.any()
    assert float(batch.bootstrap_values[0, 4]) > 90
    assert caplog.text.count("had not ended after 5 steps") == 1
    assert len(state["environments"]["actions"]) <= 5
    run = train(config)
    assert tried(run).lengths == [5, 5, 5]


def test_a_limit_of_its_own_may_be_longer() -> None:
    config = EnvironmentsConfig(count=1, longest_episode=3, max_episode_steps=4, options={"trick": "endless"})
    with Environments(ZOO, config, 0) as environments:
        environments.reset()
        assert [bool(environments.step(np.zeros(1, int)).truncated[0]) for _ in range(4)] == [False] * 3 + [True]


# Ends of the program ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("how", ["exit", "interrupt"])
def test_an_environment_that_ends_the_program_is_an_error(
    how: str, vectorization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    leaving = f"{zoo.__file__}:make_leaving"
    words = f"control --env {leaving} --output {run} --total-steps 64 --environments.count 2 --collect.steps 8"
    flags = ["--environments.options", f"{{how: {how}, at: 20}}", "--environments.vectorization", vectorization]
    code = main([*words.split(), *flags, "--learner.minibatches", "1"])
    if (how, vectorization) == ("interrupt", "sync"):  # as Ctrl-C does
        assert code == 130
    else:
        assert code == 2
        assert "step raised" in capsys.readouterr().err.splitlines()[-1]
    assert newest_checkpoint(run)[0] == 2


def test_what_fails_when_an_environment_is_closed_is_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(settings(tmp_path / "run", f"{zoo.__file__}:make_leaving", options={"how": "close", "at": 999}))
    assert "close failed: SystemExit: at the end" in caplog.text


# What people look at ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said", "error"),
    [
        ("tether.control.films.render", "no film, and training goes on", SystemExit()),
        ("tether.runs.folder.Run._open_tensorboard", "TensorBoard: ", RuntimeError("lost")),
        ("tether.runs.folder.Run.log_episodes", "episodes: ", OSError("full")),
        ("tether.pipeline.training.Progress.iteration", "the display: ", BrokenPipeError("gone")),
    ],
)
def test_what_people_look_at_never_ends_a_run(
    place: str, said: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    expected = metric_lines(train(settings(tmp_path / "well", film_every=8)))
    original = build_control

    def built(*arguments: Any) -> Any:
        made = original(*arguments)
        monkeypatch.setattr(place, fail)  # what is found wrong before the run is refused
        return made

    monkeypatch.setattr("tether.pipeline.control.build_control", built)
    with caplog.at_level(logging.WARNING):
        run = train(settings(tmp_path / "run", film_every=8))
    assert caplog.text.count(said) == 1
    assert metric_lines(run) == expected
    assert newest_checkpoint(run)[0] == 2


def test_numbers_in_options_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "world.py").write_text(
        "import json, pathlib\nfrom tests.control.zoo import Zoo\n\ndef make_env(a, b=0, c=0, d=0, e=0):\n"
        f"    pathlib.Path({str(tmp_path / 'told')!r}).write_text(json.dumps([a, b, c, d, e]))\n"
        "    return Zoo('vector', '', None)\n"
    )
    small = ["--total-steps", "8", "--environments.count", "1", "--collect.steps", "8", "--overwrite"]
    options = "{a: 1e-3, b: 1_000, c: .5, d: -2E5, e: '1e3'}"
    (tmp_path / "c.yaml").write_text(f"environments: {{options: {options}}}\n")
    for way in (["--environments.options", options], ["--config", str(tmp_path / "c.yaml")]):
        command = ["control", "--env", f"{tmp_path}/world.py:make_env", "--output", str(tmp_path / "run")]
        assert main([*command, *small, *way]) == 0
        assert json.loads((tmp_path / "told").read_text()) == [0.001, 1000, 0.5, -200000.0, "1e3"]
    assert main(["control", "--resume", str(tmp_path / "run"), "--total-steps", "16"]) == 0
