"""Whatever environment people bring: collected from, tried, filmed and resumed, by one path."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import VectorObservationWrapper, VectorWrapper
from gymnasium.wrappers import NormalizeObservation
from gymnasium.wrappers import vector as vector_wrappers
from tests.control import test_environments, test_infos, test_world, zoo
from tests.run_folders import metric_lines, newest_checkpoint

from tether.cli import main
from tether.config import config_from_dict
from tether.control import films
from tether.control.acting import Actor
from tether.control.environments import Environments, EnvironmentsConfig
from tether.control.kept import to_arrays
from tether.control.policy import ControlPolicy, NetworkConfig
from tether.control.world import ControlCollectConfig
from tether.control.wrappers import ActionRepeat
from tether.errors import UserError
from tether.pipeline.control import (
    ControlConfig,
    ControlEvalConfig,
    ControlEvaluation,
    _try_out,
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
        ("tether.runs.folder.Run._open_tensorboard", "TensorBoard: ", BaseException("lost")),
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


# Native environments, tried as they were trained -------------------------------------------------------------------


class Turned(VectorObservationWrapper):  # type: ignore[type-arg]
    """A user's own wrapper of the vector environment, which the single one has not."""

    def observations(self, observations: Any) -> Any:
        return -observations


class Counting(VectorWrapper):  # type: ignore[type-arg]
    """Takes something along from one episode to the next."""

    begun = 0

    def reset(self, **options: Any) -> Any:
        self.begun += 1
        return self.env.reset(**options)


@pytest.fixture
def native_ids() -> Iterator[None]:
    def register(name: str, vector: Any) -> None:
        single = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
        gymnasium.register(name, entry_point=single, vector_entry_point=vector, max_episode_steps=20)

    def turned(num_envs: int = 1, **options: Any) -> Any:
        return Turned(vector_wrappers.NormalizeObservation(CartPoleVectorEnv(num_envs, **options)))

    register("Kinds/Turned-v0", turned)
    register("Kinds/Blind-v0", lambda num_envs=1, max_episode_steps=20: CartPoleVectorEnv(num_envs, max_episode_steps))
    register("Kinds/Counting-v0", lambda num_envs=1, **options: Counting(CartPoleVectorEnv(num_envs, **options)))
    yield
    for name in ("Turned", "Blind", "Counting"):
        gymnasium.registry.pop(f"Kinds/{name}-v0")


def test_what_was_trained_natively_is_tried_natively(native_ids: None, tmp_path: Path) -> None:
    run = train(settings(tmp_path / "run", "Kinds/Turned-v0", "auto", longest_episode=20))
    config = config_from_dict(ControlConfig, read_config(run), "")
    saved = load_state(newest_checkpoint(run)[1], "trainer")["world"]["environments"]
    with Environments.to_try(config.env, config.environments, 3) as trying:
        assert trying.kind == "native"
        trying.bring_gathered(saved)
        moments = dict(to_arrays(saved["wrappers"])[0][1])["NormalizeObservation"]
        first = trying.reset()
        drawn = CartPoleVectorEnv(1, 20).reset(seed=trying._seed_of(0, before=1))[0]
        assert first == pytest.approx(-(drawn - moments["mean"]) / np.sqrt(moments["var"] + 1e-8), rel=1e-5)
        assert float(trying.state_dict()["wrappers"][0][1][0][1]["count"]) == pytest.approx(float(moments["count"]))
    with (
        Environments.to_try(config.env, replace(config.environments, vectorization="sync"), 3) as single,
        pytest.raises(UserError, match="wrapper `NormalizeObservation` had gathered, but there is none"),
    ):
        single.bring_gathered(saved)
    film = tmp_path / "film.mp4"
    assert tried(run, 2, seed=1) == tried(run, 2, seed=1, record=str(film))
    assert len(imageio.imread(film)) == tried(run, 1, seed=1).lengths[0] + 1


def test_a_native_environment_that_renders_nothing_is_not_filmed_as_another(native_ids: None, tmp_path: Path) -> None:
    run = train(settings(tmp_path / "run", "Kinds/Blind-v0", "native", longest_episode=20))
    assert len(tried(run, 2).returns) == 2
    with pytest.raises(UserError, match="takes no `render_mode`, so its episodes cannot be filmed"):
        tried(run, 1, record=str(tmp_path / "film.gif"))


# Wrappers that keep something in other places ----------------------------------------------------------------------


class Filter:
    """Called with each observation, of which it keeps the mean."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, observation: Any) -> Any:
        self.seen += 1
        return observation


class Slots:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = 0


class Holding(gymnasium.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: Any, held: Any) -> None:
        super().__init__(env)
        self.held = held

    def observation(self, observation: Any) -> Any:
        if callable(self.held):
            return self.held(observation)
        self.held.seen += 1
        return observation


class OwnNormalise(NormalizeObservation):  # type: ignore[type-arg]
    """gymnasium's, with something of its own."""

    begun = 0

    def reset(self, **options: Any) -> Any:
        self.begun += 1
        return super().reset(**options)


class SavedNormalise(OwnNormalise):
    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]


HOLDERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "callable": (lambda env: Holding(env, Filter()), "Holding.held"),
    "slots": (lambda env: Holding(env, Slots()), "Holding.held"),
    "given to gymnasium's": (
        lambda env: gymnasium.wrappers.TransformObservation(env, Filter(), None),
        "TransformObservation.func",
    ),
    "a class of one that is kept": (OwnNormalise, "OwnNormalise.begun"),
}


def of(wrap: Callable[[Any], Any], count: int = 1) -> Environments:
    return Environments.of([wrap(zoo.make_env()) for _ in range(count)], 1)


def try_out(environments: Environments) -> None:
    space = environments.observation_space
    _try_out(environments, Actor(ControlPolicy(space, environments.action_space, NetworkConfig(hidden=(4,)))))


@pytest.mark.parametrize("name", HOLDERS)
def test_state_in_any_place_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    wrap, place = HOLDERS[name]
    with caplog.at_level(logging.WARNING), of(wrap) as environments:
        try_out(environments)
    assert [place in line for line in caplog.messages] == [True]


def test_state_of_a_vector_environments_wrapper_is_named(native_ids: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Environments("Kinds/Counting-v0", EnvironmentsConfig(2), 1) as environments:
        assert environments.kind == "native"
        try_out(environments)
    assert ["`Counting.begun`" in line for line in caplog.messages] == [True]


def test_a_class_of_gymnasiums_keeps_its_own_state_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), of(SavedNormalise) as first, of(SavedNormalise) as second:
        try_out(first)
        assert not caplog.messages
        first.reset()
        first.step(np.zeros(1))
        second.bring_gathered(first.state_dict())
        (_, mine), (_, other) = first.state_dict()["wrappers"][0], second.state_dict()["wrappers"][0]
    assert dict(mine)["SavedNormalise"]["own"] == dict(other)["SavedNormalise"]["own"] == {"dict": [["begun", 1]]}
    assert dict(mine)["SavedNormalise"]["mean"].equal(dict(other)["SavedNormalise"]["mean"])


# Seeds, actions, numbers -------------------------------------------------------------------------------------------


class Draws(zoo.Zoo):
    def __init__(self, how: str) -> None:
        super().__init__("continuous", "", "rgb_array")
        self.how = how

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=None if self.how == "no seed" else seed)

    def seen(self) -> Any:
        if self.how == "a generator of its own":
            return np.random.default_rng().normal(size=2).astype(np.float32)
        if self.how == "everyone's":
            return np.random.normal(size=2).astype(np.float32)  # noqa: NPY002
        return super().seen()

    def step(self, action: Any) -> Any:
        result = super().step(action)
        if self.how == "changes its action":
            action *= 3
        return result

    def render(self) -> Any:
        self.np_random.normal()
        np.random.normal()  # noqa: NPY002
        return super().render()


@pytest.mark.parametrize(
    ("how", "lines"), [("no seed", 1), ("a generator of its own", 1), ("everyone's", 0), ("its own", 0)]
)
def test_an_environment_that_its_seed_does_not_decide_is_told(
    how: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Environments.of([Draws(how)], 1) as environments:
        try_out(environments)
    assert sum("the same seed began two different episodes" in line for line in caplog.messages) == lines
    assert len(caplog.messages) == lines


def test_an_action_that_is_changed_in_place_is_changed_for_nobody_else() -> None:
    actions = np.full((1, 1), 0.5, np.float32)
    with Environments.of([Draws("changes its action")], 1) as environments:
        environments.reset()
        environments.step(actions)
        assert environments.state_dict()["actions"].tolist() == [[[0.5]]]
    repeated = ActionRepeat(Draws("changes its action"), 2)
    repeated.reset(seed=1)
    assert repeated.step(np.ones(1, np.float32))[1] == pytest.approx(1.1 + 1.2)
    assert actions.tolist() == [[0.5]]


def test_rendering_draws_from_no_generator_of_the_episode() -> None:
    shown, unseen = Draws("its own"), Draws("its own")
    for env in (shown, unseen):
        env.reset(seed=5)
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    films.render(shown, "it")
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index,union-attr]  # noqa: NPY002
    action = np.zeros(1, np.float32)
    assert np.array_equal(shown.step(action)[0], unseen.step(action)[0])


@pytest.mark.parametrize("place", ["observation_space", "action_space"])
@pytest.mark.parametrize("kind", [">f4", "longdouble"])
def test_numbers_of_another_machine_are_refused(place: str, kind: str) -> None:
    env = Draws("its own")
    setattr(env, place, gymnasium.spaces.Box(-1, 1, (2,), np.dtype(kind)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected (numbers|floats) of"):
        Environments.of([env], 1)


@pytest.mark.parametrize("reward", [10**400, np.complex128(1)])
def test_a_reward_that_is_no_float_is_refused_in_a_line(reward: Any) -> None:
    env = Draws("its own")
    env.step = lambda action: (env.seen(), reward, False, False, {})  # type: ignore[method-assign]
    with Environments.of([env], 1) as environments:
        environments.reset()
        with pytest.raises(UserError, match="step 1 of its episode: the reward"):
            environments.step(np.zeros((1, 1)))


class Panic(BaseException):
    """As libraries that are written in Rust raise."""


@pytest.mark.parametrize("place", ["step", "reset", "close", "render"])
def test_what_is_no_exception_is_a_line_too(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    env = Draws("its own")
    monkeypatch.setattr(env, place, panic, raising=False)
    with Environments.of([env], 1) as environments:
        if place == "close":
            environments.close()
            assert "close failed: Panic: index out of bounds" in caplog.text
            return
        with pytest.raises(UserError, match="Panic: index out of bounds"):
            films.render(env, "it") if place == "render" else environments.step(0 * environments.reset()[:, :1])


def test_a_real_interruption_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    env = Draws("its own")
    monkeypatch.setattr(env, "reset", interrupted)
    with Environments.of([env], 1) as environments, pytest.raises(KeyboardInterrupt):
        environments.reset()
