"""Environments stepped together: where episodes end and begin, what a step shows, and going on from a saved state."""

from __future__ import annotations

import importlib.util
import logging
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from tether.control.environments import Environments, EnvironmentsConfig, Step, make_environment

HERE = __file__


class Count(gymnasium.Env[NDArray[np.float32], Any]):
    """Shows its time and the number of its episode; terminates after 3 steps, or 1000 where action 1 comes last."""

    def __init__(self, pixels: bool = False, length: int = 3, told: bool = False) -> None:
        self.pixels, self.length, self.told = pixels, length, told
        shape, kind = ((5, 6, 3), np.uint8) if pixels else ((2,), np.float32)
        self.observation_space = spaces.Box(0, 255, shape, dtype=kind)
        self.action_space = spaces.Discrete(2)
        self.episode = 0

    def _show(self) -> NDArray[Any]:
        if self.pixels:
            picture = np.zeros((5, 6, 3), np.uint8)
            picture[0, 1, 2] = self.time
            return picture
        return np.array([self.time, self.episode], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.episode += 1
        return self._show(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        ended = self.time >= self.length
        info = {"is_success": bool(action)} if ended and self.told else {}
        return self._show(), 1.0 + self.time / 10, ended, False, info


def count_env(**options: Any) -> gymnasium.Env[Any, Any]:
    return Count(**options)


class Unlike(Count):
    """Remembers how often any of them was reset: no function of the seed."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        type(self).resets += 1
        self.episode = type(self).resets
        return super().reset(seed=seed)


def unlike_env() -> gymnasium.Env[Any, Any]:
    return Unlike()


class CountVector(VectorEnv[Any, Any, Any]):
    """A native vector environment that begins an episode in the same step, every 3rd, and keeps an object."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, **_: Any) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 9, (1,))
        self.single_action_space = spaces.Discrete(2)
        self.engine = object()

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.time = np.zeros((self.num_envs, 1), np.float32)
        return self.time, {}

    def step(self, actions: Any) -> Any:
        self.time += 1
        ended = self.time[:, 0] >= 3
        infos: dict[str, Any] = {}
        if ended.any():
            infos["final_obs"] = np.array([row.copy() for row in self.time] + [None], dtype=object)[:-1]
            self.time[ended] = 0
        return self.time, np.ones(self.num_envs), ended, np.zeros(self.num_envs, bool), infos


@pytest.fixture
def count_vector() -> Iterator[str]:
    gymnasium.register("CountVector-v0", entry_point=None, vector_entry_point=CountVector)
    yield "CountVector-v0"
    gymnasium.registry.pop("CountVector-v0")


def make(env: str, seed: int = 1, **config: Any) -> Environments:
    return Environments(env, EnvironmentsConfig(**config), seed)


def actions_for(envs: Environments, steps: int, seed: int = 0) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    space = envs.action_space
    if isinstance(space, spaces.Box):
        return list(rng.uniform(-1, 1, (steps, envs.count, *space.shape)).astype(np.float32))
    return list(rng.integers(0, int(space.n), (steps, envs.count)))  # type: ignore[union-attr]


def same(left: Step, right: Step) -> bool:
    names = ("observations", "rewards", "terminated", "truncated", "successors", "valid")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


# What a step shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_where_an_episode_ends_the_successor_is_its_last_state_and_the_next_one_is_seen(vectorization: str) -> None:
    with make(f"{HERE}:count_env", count=2, vectorization=vectorization) as envs:
        assert envs.kind == vectorization
        assert envs.reset().tolist() == [[0, 1], [0, 1]]
        zeros = np.zeros(2)
        assert envs.step(zeros).observations.tolist() == [[1, 1], [1, 1]]
        envs.step(zeros)
        step = envs.step(zeros)
        assert step.successors.tolist() == [[3, 1], [3, 1]]
        assert step.observations.tolist() == [[0, 2], [0, 2]]
        assert envs.observations is not None
        assert envs.observations.tolist() == [[0, 2], [0, 2]]
        assert step.terminated.tolist() == [True, True]
        assert step.truncated.tolist() == [False, False]
        assert step.valid.tolist() == [True, True]
        assert step.rewards.tolist() == [1.3, 1.3]
        assert step.rewards.dtype == np.float64
        assert step.observations.dtype == step.successors.dtype == np.float32
        assert step.success is None
        after = envs.step(zeros)
        assert after.successors.tolist() == after.observations.tolist() == [[1, 2], [1, 2]]


def test_a_native_environment_ignores_the_action_after_an_end_and_says_so() -> None:
    with make("CartPole-v1", count=3) as envs:
        assert envs.kind == "native"
        envs.reset()
        ended = np.zeros(3, bool)
        for _ in range(60):
            before = envs.observations
            step = envs.step(np.ones(3))
            assert (step.valid == ~ended).all()
            assert (step.rewards == step.valid).all()
            assert (np.abs(step.successors[ended]) <= 0.05).all()  # where CartPole begins
            assert (step.successors == step.observations).all()
            assert not np.array_equal(before, step.observations)
            ended = step.terminated | step.truncated
            assert (np.abs(step.successors[step.terminated][:, 2]) > 0.2).all()  # where the pole has fallen


def test_a_native_environment_that_begins_in_the_same_step_shows_both_states(count_vector: str) -> None:
    with make(count_vector, count=2) as envs:
        envs.reset()
        steps = [envs.step(np.zeros(2)) for _ in range(4)]
        assert [step.successors[0, 0] for step in steps] == [1, 2, 3, 1]
        assert [step.observations[0, 0] for step in steps] == [1, 2, 0, 1]
        assert all(step.valid.all() for step in steps)


def test_termination_wins_where_the_time_limit_is_reached_in_the_same_step() -> None:
    with make(f"{HERE}:count_env", count=1, max_episode_steps=3) as envs:
        envs.reset()
        step = [envs.step(np.zeros(1)) for _ in range(3)][-1]
        assert (step.terminated.tolist(), step.truncated.tolist()) == ([True], [False])


@pytest.mark.parametrize("vectorization", ["sync", "native"])
def test_another_time_limit_truncates(vectorization: str) -> None:
    with make("CartPole-v1", count=1, max_episode_steps=4, vectorization=vectorization) as envs:
        envs.reset()
        steps = [envs.step(np.array([k % 2])) for k in range(4)]
        assert [bool(step.truncated[0]) for step in steps] == [False, False, False, True]
        assert not steps[-1].terminated[0]


def test_a_longer_time_limit_replaces_the_registered_one() -> None:
    with make("Pendulum-v1", count=1, max_episode_steps=203) as envs:
        envs.reset()
        ends = [bool(envs.step(np.zeros((1, 1))).truncated[0]) for _ in range(203)]
        assert ends == [False] * 202 + [True]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_success_is_what_the_environment_says_of_it(vectorization: str) -> None:
    with make(f"{HERE}:count_env", count=2, vectorization=vectorization, options={"told": True}) as envs:
        envs.reset()
        steps = [envs.step(np.array([0, 1])) for _ in range(3)]
        assert steps[0].success is None
        assert steps[2].success is not None
        assert steps[2].success.tolist() == [0.0, 1.0]


def test_arrays_of_earlier_steps_stay_as_they_were() -> None:
    for env, kind in (("CartPole-v1", "native"), ("CartPole-v1", "sync"), ("CartPole-v1", "async")):
        with make(env, count=2, vectorization=kind) as envs:
            envs.reset()
            steps = [envs.step(action) for action in actions_for(envs, 30)]
            copies = [(step.observations.copy(), step.successors.copy()) for step in steps]
            for action in actions_for(envs, 30):
                envs.step(action)
            assert all(
                (s.observations == o).all() and (s.successors == p).all()
                for s, (o, p) in zip(steps, copies, strict=True)
            )


# Wrappers ---------------------------------------------------------------------------------------------------


def test_images_are_put_channels_first_and_stacked_along_them() -> None:
    with make(f"{HERE}:count_env", count=1, frame_stack=2, options={"pixels": True, "length": 9}) as envs:
        assert envs.observation_space.shape == (6, 5, 6)
        assert envs.observation_space.dtype == np.uint8
        assert envs.reset().shape == (1, 6, 5, 6)
        envs.step(np.zeros(1))
        seen = envs.step(np.zeros(1)).observations
        assert seen.dtype == np.uint8
        assert [seen[0, channel, 0, 1] for channel in range(6)] == [0, 0, 1, 0, 0, 2]


def test_vectors_are_stacked_oldest_first_and_an_episode_begins_with_its_first_repeated() -> None:
    with make(f"{HERE}:count_env", count=1, frame_stack=3) as envs:
        assert envs.observation_space.shape == (6,)
        assert envs.reset()[0, ::2].tolist() == [0, 0, 0]
        steps = [envs.step(np.zeros(1)) for _ in range(3)]
        assert steps[0].observations[0, ::2].tolist() == [0, 0, 1]
        assert steps[2].successors[0].tolist() == [1, 1, 2, 1, 3, 1]
        assert steps[2].observations[0].tolist() == [0, 2, 0, 2, 0, 2]


def test_a_repeated_action_sums_the_rewards_and_stops_where_the_episode_ends() -> None:
    with make(f"{HERE}:count_env", count=1, action_repeat=2) as envs:
        envs.reset()
        first, second = envs.step(np.zeros(1)), envs.step(np.zeros(1))
        assert first.rewards[0] == pytest.approx(1.1 + 1.2)
        assert second.rewards[0] == pytest.approx(1.3)
        assert second.terminated[0]
        assert second.successors[0, 0] == 3


def test_what_a_native_environment_cannot_do_is_done_by_single_ones() -> None:
    assert make("CartPole-v1", count=1, frame_stack=2).kind == "sync"
    assert make("CartPole-v1", count=1, action_repeat=2).kind == "sync"
    assert make("CartPole-v1", count=1, options={"sutton_barto_reward": True}).kind == "native"


def test_one_environment_for_evaluation_has_the_same_wrappers() -> None:
    config = EnvironmentsConfig(frame_stack=2, action_repeat=2, options={"pixels": True})
    env = make_environment(f"{HERE}:count_env", config)
    assert env.observation_space.shape == (6, 5, 6)
    env.reset(seed=0)
    assert env.step(0)[1] == pytest.approx(2.3)
    env.close()


def test_an_environment_to_record_renders() -> None:
    env = make_environment("CartPole-v1", EnvironmentsConfig(), render_mode="rgb_array")
    env.reset(seed=0)
    frame: Any = env.render()
    assert frame.shape == (400, 600, 3)
    env.close()


# Seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "native"])
def test_the_seed_decides_everything(kind: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        with make("CartPole-v1", seed, count=2, vectorization=kind) as envs:
            envs.reset()
            runs.append(np.array([envs.step(action).observations for action in actions_for(envs, 50)]))
    assert (runs[0] == runs[1]).all()
    assert not (runs[0] == runs[2]).all()


def test_an_episode_is_a_function_of_its_seed_and_its_actions_whatever_the_others_do() -> None:
    runs = []
    for other in (0, 1):
        with make("CartPole-v1", count=2, vectorization="sync") as envs:
            envs.reset()
            runs.append([envs.step(np.array([k % 3 > 0, other])).observations[0] for k in range(80)])
    assert np.array_equal(runs[0], runs[1])


def test_environments_and_episodes_differ_in_their_seeds() -> None:
    with make("CartPole-v1", count=4, vectorization="sync") as envs:
        assert len(np.unique(np.concatenate([envs.reset(), envs.reset()]), axis=0)) == 8


def test_worker_processes_and_this_one_do_the_same() -> None:
    with (
        make("CartPole-v1", count=2, vectorization="sync") as here,
        make("CartPole-v1", count=2, vectorization="async") as there,
    ):
        assert np.array_equal(here.reset(), there.reset())
        assert all(same(here.step(action), there.step(action)) for action in actions_for(here, 60))


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "config"),
    [
        ("CartPole-v1", {"vectorization": "sync"}),
        ("CartPole-v1", {"vectorization": "native"}),
        ("CartPole-v1", {"vectorization": "async", "count": 2}),
        ("CartPole-v1", {"frame_stack": 3, "action_repeat": 2}),
        ("Pendulum-v1", {"max_episode_steps": 30}),
    ],
    ids=["sync", "native", "async", "stacked", "pendulum"],
)
def test_resuming_is_never_having_stopped(env: str, config: dict[str, Any], tmp_path: Path) -> None:
    with make(env, **{"count": 3, **config}) as envs, make(env, seed=99, **{"count": 3, **config}) as again:
        actions = actions_for(envs, 140)
        envs.reset()
        for action in actions[:67]:
            envs.step(action)
        torch.save(envs.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert again.load_state_dict(state)
        assert np.array_equal(again.observations, envs.observations)  # type: ignore[arg-type]
        for action in actions[67:]:
            assert same(envs.step(action), again.step(action))


def test_saving_again_after_resuming_is_the_same_state() -> None:
    with make("CartPole-v1", count=2, vectorization="sync") as envs:
        envs.reset()
        for action in actions_for(envs, 40):
            envs.step(action)
        state = envs.state_dict()
        envs.load_state_dict(state)
        assert str(envs.state_dict()) == str(state)


def test_a_state_of_before_the_first_reset_begins_as_the_first_run_did() -> None:
    config: dict[str, Any] = {"count": 2, "vectorization": "sync"}
    with make("CartPole-v1", 1, **config) as envs, make("CartPole-v1", 5, **config) as again:
        assert again.load_state_dict(envs.state_dict())
        assert np.array_equal(envs.reset(), again.reset())


def test_actions_of_ended_episodes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.control.environments._LOG_SLACK", 10)
    with make(f"{HERE}:count_env", count=2) as envs:
        envs.reset()
        for _ in range(100):
            envs.step(np.zeros(2))
        assert len(envs._log) <= 15
        assert tuple(envs.state_dict()["actions"].shape) == (1, 2)


def test_an_environment_that_is_no_function_of_its_seed_begins_new_episodes_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with make(f"{HERE}:unlike_env", count=2) as envs:
        envs.reset()
        envs.step(np.zeros(2))
        state = envs.state_dict()
        with caplog.at_level(logging.WARNING):
            assert not envs.load_state_dict(state)
        assert [record.getMessage() for record in caplog.records] == [
            f"environment `{HERE}:unlike_env`: its episodes cannot be resumed, new ones begin: the same seeds and "
            "actions led to other observations, so it depends on something else too"
        ]
        assert envs.observations is not None
        assert envs.observations[:, 0].tolist() == [0, 0]


def test_a_native_environment_of_unknown_parts_begins_new_episodes_and_says_so(
    count_vector: str, caplog: pytest.LogCaptureFixture
) -> None:
    with make(count_vector, count=2) as envs:
        envs.reset()
        envs.step(np.zeros(2))
        state = envs.state_dict()
        assert state["attributes"] is None
        with caplog.at_level(logging.WARNING):
            assert not envs.load_state_dict(state)
        assert len(caplog.records) == 1
        assert envs.observations is not None
        assert envs.observations.tolist() == [[0], [0]]


def test_a_state_of_other_vectorization_begins_new_episodes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with make("CartPole-v1", count=2) as native, make("CartPole-v1", count=2, vectorization="sync") as single:
        native.reset()
        with caplog.at_level(logging.WARNING):
            assert not single.load_state_dict(native.state_dict())
        assert "stepped in another way" in caplog.text


def test_worker_processes_go_on_from_what_this_one_saved() -> None:
    with (
        make("CartPole-v1", count=2, vectorization="sync") as here,
        make("CartPole-v1", count=2, vectorization="async") as there,
    ):
        here.reset()
        for action in actions_for(here, 30):
            here.step(action)
        assert there.load_state_dict(here.state_dict())
        assert all(same(here.step(action), there.step(action)) for action in actions_for(here, 30))


# Atari ------------------------------------------------------------------------------------------------------

atari = pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")


@atari
def test_atari_games_are_stepped_natively_with_their_own_preprocessing_and_resume_exactly() -> None:
    config: dict[str, Any] = {"count": 2, "max_episode_steps": 40, "options": {"num_threads": 1}}
    with make("ALE/Breakout-v5", **config) as envs, make("ALE/Breakout-v5", 7, **config) as again:
        assert (envs.kind, envs.observation_space.shape) == ("native", (4, 84, 84))
        actions = actions_for(envs, 80)
        assert envs.reset().dtype == np.uint8
        ends = [bool(envs.step(action).truncated.any()) for action in actions[:50]]
        assert any(ends)
        assert again.load_state_dict(envs.state_dict())
        steps = [(envs.step(action), again.step(action)) for action in actions[50:]]
        assert all(same(left, right) for left, right in steps)
        assert all(left.valid.all() and left.rewards.dtype == np.float64 for left, _ in steps)


@atari
def test_an_atari_game_for_evaluation_is_the_one_of_training_with_rewards_as_they_are() -> None:
    config = EnvironmentsConfig(count=1, options={"num_threads": 1})
    env = make_environment("ALE/MsPacman-v5", config, render_mode="rgb_array")
    with Environments("ALE/MsPacman-v5", config, 3) as envs:
        first = envs.reset()
        observation, _ = env.reset(seed=envs._seed_of(0, before=1))
        assert np.array_equal(first[0], observation)
        rewards = []
        for action in actions_for(envs, 150):
            step = envs.step(action)
            observation, reward, *_ = env.step(action[0])
            assert np.array_equal(step.observations[0], observation)
            rewards.append((step.rewards[0], reward))
        assert max(clipped for clipped, _ in rewards) == 1.0
        assert max(full for _, full in rewards) == 10.0
    frame: Any = env.render()
    assert frame.shape == (210, 160, 3)
    env.close()


@atari
def test_stack_and_repeat_of_an_atari_game_are_the_fields() -> None:
    with make("ALE/Pong-v5", count=1, frame_stack=2, action_repeat=3) as envs:
        assert envs.observation_space.shape == (2, 84, 84)


# Where environments come from -------------------------------------------------------------------------------


def test_a_function_from_a_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_envs.py").write_text("LENGTH = 0.5\n")
    (tmp_path / "envs.py").write_text(
        textwrap.dedent(
            """
            import gymnasium
            import helper_of_envs

            def make_env(gravity=9.8, render_mode=None):
                assert helper_of_envs.LENGTH == 0.5
                env = gymnasium.make("CartPole-v1", render_mode=render_mode)
                env.unwrapped.gravity = gravity
                return env

            gymnasium.registry.pop("FromAFile-v0", None)  # this file is imported under two names
            gymnasium.register("FromAFile-v0", entry_point=make_env)
            """
        )
    )
    monkeypatch.chdir("/")
    with make(f"{tmp_path}/envs.py:make_env", count=1, options={"gravity": 1.0}) as envs:
        assert envs.reset().shape == (1, 4)
    with make(f"{tmp_path}/envs.py:make_env", count=1, vectorization="async") as envs:
        assert envs.reset().shape == (1, 4)
    env = make_environment(f"{tmp_path}/envs.py:make_env", EnvironmentsConfig(), render_mode="rgb_array")
    env.reset()
    assert env.render() is not None
    env.close()
    monkeypatch.chdir(tmp_path)
    with make("envs:make_env", count=1) as envs:
        assert envs.reset().shape == (1, 4)
    with make("envs:FromAFile-v0", count=1) as envs:
        assert envs.reset().shape == (1, 4)


# Worker processes -------------------------------------------------------------------------------------------


class Global(Count):
    """Draws from every generator that a process has."""

    def _show(self) -> NDArray[Any]:
        drawn = np.random.normal() + random.random() + float(torch.rand(()))  # noqa: NPY002
        return np.array([self.time, drawn], dtype=np.float32)


def global_env() -> gymnasium.Env[Any, Any]:
    return Global()


def test_each_worker_has_global_random_numbers_of_its_own_and_the_same_after_resume() -> None:
    config: dict[str, Any] = {"env": f"{HERE}:global_env", "count": 3, "vectorization": "async"}
    before = torch.get_rng_state()
    with make(**config) as envs, make(**config) as other, make(seed=2, **config) as third:
        starts = envs.reset()[:, 1].tolist()
        assert len(set(starts)) == 3
        assert other.reset()[:, 1].tolist() == starts
        assert not set(starts) & set(third.reset()[:, 1].tolist())
        for _ in range(4):
            envs.step(np.zeros(3))
        assert other.load_state_dict(envs.state_dict())
        for _ in range(4):
            assert same(envs.step(np.zeros(3)), other.step(np.zeros(3)))
    assert torch.equal(before, torch.get_rng_state())
