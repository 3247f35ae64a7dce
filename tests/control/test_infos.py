"""What environments say beside their steps: success in every form, and the states that episodes ended in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from tether.control import infos
from tether.control.environments import Environments, EnvironmentsConfig
from tether.control.infos import batched_success, flag_of, whole_success
from tether.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    infos.warn_once.cache_clear()


@pytest.mark.parametrize(
    "value",
    [True, np.True_, 1, 1.0, np.float32(1), np.array(True), np.array([1]), [True], torch.tensor(True), torch.ones(1)],
)
def test_a_flag_has_many_forms(value: Any) -> None:
    assert flag_of({"is_success": value}) == flag_of({"success": value}) == 1.0
    assert batched_success({"success": [value, value], "_success": np.array([False, True])}, 2) == pytest.approx(
        [np.nan, 1.0], nan_ok=True
    )


@pytest.mark.parametrize("value", ["yes", np.zeros(2), {}, float("nan"), np.array("x")])
def test_what_is_no_flag_is_said_once_and_counts_for_nothing(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [flag_of({"success": value}) for _ in range(3)] == [None] * 3
    assert caplog.text.count("`success` in the info is ") == 1
    assert flag_of({"is_success": None, "success": 1}) == flag_of({"is_success": value, "success": 1}) == 1.0


def test_a_rate_is_over_all_episodes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert whole_success([1.0, np.nan, 0.0, np.nan]) == [1.0, 0.0, 0.0, 0.0]
    assert "count as failed" in caplog.text


class Counters(VectorEnv[Any, Any, Any]):
    """Each counts to its number, where it is cut off; and says of it what `say` makes of the last states."""

    def __init__(self, num_envs: int, mode: Any, say: Any, ends: str = "cut") -> None:
        self.num_envs, self.say, self.ends, self.mode = num_envs, say, ends, mode
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = spaces.Box(-9, 99, (1,)), spaces.Discrete(2)
        self.limits = np.arange(num_envs) + 2
        self.over = np.zeros(num_envs, bool)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if mask.all():
            self.time = np.zeros((self.num_envs, 1), np.float32)
        self.time[mask] = 0
        return self.time.copy(), {}

    def step(self, actions: Any) -> Any:
        self.time += 1
        over = self.time[:, 0] >= self.limits
        info = self.say(self.time.copy(), over) if over.any() and self.say else {}
        shown = self.time.copy()
        if self.mode in (AutoresetMode.SAME_STEP, "SameStep"):
            self.time[over] = 0
            shown = self.time.copy()
        none = np.zeros(self.num_envs, bool)
        return shown, np.ones(self.num_envs), *((none, over) if self.ends == "cut" else (over, none)), info


def objects(states: Any, over: Any) -> Any:
    return np.array([*(row if end else None for row, end in zip(states, over, strict=True)), None], dtype=object)[:-1]


SAID = {
    "gymnasium": lambda s, o: {"final_obs": objects(s, o), "_final_obs": o},
    "gymnasium before 1.0": lambda s, o: {"final_observation": objects(s, o), "_final_observation": o},
    "whole array": lambda s, o: {"final_obs": s},
    "tensor": lambda s, o: {"final_observation": torch.from_numpy(s), "_final_observation": o},
    "list": lambda s, o: {"final_obs": list(s)},
    "by number": lambda s, o: {"final_obs": {i: s[i] for i in np.flatnonzero(o).tolist()}},
    "a dict of each": lambda s, o: [
        {"terminal_observation": row} if end else {} for row, end in zip(s, o, strict=True)
    ],
}


@pytest.fixture
def counters() -> Iterator[str]:
    gymnasium.register("InfoCounters-v0", vector_entry_point=Counters)
    yield "InfoCounters-v0"
    gymnasium.registry.pop("InfoCounters-v0")


def stepped(env: str, steps: int, **options: Any) -> list[Any]:
    with Environments(env, EnvironmentsConfig(count=2, options=options), 0) as environments:
        environments.reset()
        return [environments.step(np.zeros(2, int)) for _ in range(steps)]


@pytest.mark.filterwarnings("ignore:.*not an instance of AutoresetMode")
@pytest.mark.parametrize("say", SAID.values(), ids=SAID)
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, "SameStep"])
def test_the_state_that_was_cut_off_in_is_found(say: Any, mode: Any, counters: str) -> None:
    steps = stepped(counters, 3, mode=mode, say=say)
    assert [step.successors.ravel().tolist() for step in steps] == [[1, 1], [2, 2], [1, 3]]
    assert [step.observations.ravel().tolist() for step in steps] == [[1, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize(
    "say",
    [
        lambda s, o: {},
        lambda s, o: {"final_obs": s, "_final_obs": np.zeros_like(o)},
        lambda s, o: {"final_obs": objects(s, ~o)},
        lambda s, o: {"final_obs": s[o]},
    ],
    ids=["nothing", "masked", "of others", "without places"],
)
def test_nothing_is_bootstrapped_from_the_next_episode(say: Any, counters: str) -> None:
    with pytest.raises(UserError, match="an episode was cut off, but its last observation is neither `final_obs` nor"):
        stepped(counters, 2, mode=AutoresetMode.SAME_STEP, say=say)
    stepped(counters, 4, mode=AutoresetMode.SAME_STEP, say=say, ends="terminated")  # nothing comes after those


def test_a_state_of_another_shape_is_refused(counters: str) -> None:
    with pytest.raises(UserError, match=r"`final_obs` in the info has shape \(3,\), expected \(1,\)"):
        stepped(counters, 2, mode=AutoresetMode.SAME_STEP, say=lambda s, o: {"final_obs": [np.zeros(3)] * 2})


def test_an_environment_that_begins_no_episode_itself_is_told_to(counters: str) -> None:
    steps = stepped(counters, 3, mode=AutoresetMode.DISABLED, say=lambda s, o: {"success": o})
    assert [step.successors.ravel().tolist() for step in steps] == [[1, 1], [2, 2], [1, 3]]
    assert [step.observations.ravel().tolist() for step in steps] == [[1, 1], [0, 2], [1, 0]]
    assert all(step.valid.all() for step in steps)
    assert steps[1].success is not None
    assert steps[1].success.tolist() == [1, 0]


@pytest.mark.parametrize(
    "final",
    [{"is_success": np.array([True, False]), "_is_success": np.array([True, False])}, [{"is_success": True}, None]],
    ids=["batched", "of each"],
)
def test_success_is_told_of_the_episode_that_ended(final: Any, counters: str) -> None:
    steps = stepped(
        counters,
        2,
        mode=AutoresetMode.SAME_STEP,
        say=lambda s, o: {"final_obs": s, "final_info": final, "success": [0, 0]},
    )
    assert steps[1].success == pytest.approx([1, np.nan], nan_ok=True)


def test_a_flag_beside_final_info_counts_where_there_is_none_within() -> None:
    beside = {"is_success": np.array([True, True]), "final_info": {"x": 1}}
    assert batched_success(beside, 2) == pytest.approx([1, 1])
    both = {**beside, "final_info": {"success": np.array([False, False]), "_success": np.array([True, False])}}
    assert batched_success(both, 2) == pytest.approx([0, np.nan], nan_ok=True)
    assert batched_success({"final_info": [{"success": True}, None]}, 2) == pytest.approx([1, np.nan], nan_ok=True)


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)])
def test_one_flag_of_a_vector_environment_counts_where_there_is_one(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert batched_success({"success": value}, 1) == pytest.approx([1])
    with caplog.at_level(logging.WARNING):
        assert batched_success({"success": value}, 2) is None
    assert ["expected one for each of 2" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("mask", [[1], np.array([1]), [0, 1], torch.tensor([True])])
def test_a_mask_is_true_or_false_for_each(mask: Any) -> None:
    seen, over = np.zeros((2, 1)), np.array([False, True])
    with pytest.raises(UserError, match="`_final_obs` in the info has shape"):
        infos.final_observations({"final_obs": np.ones((2, 1)), "_final_obs": mask}, over, seen, "it")
    with pytest.raises(UserError, match="`_success` in the info has shape"):
        batched_success({"success": np.ones(2), "_success": mask}, 2)


def test_a_flag_beyond_floats_is_none() -> None:
    assert flag_of({"success": 10**400}) is None
