"""Environments that cannot work: one line that says which, what was found and what was expected."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.control.environments import Environments, EnvironmentsConfig, make_environment
from tether.errors import UserError

HEAD = """
import gymnasium
import numpy as np
from gymnasium import spaces

class Env(gymnasium.Env):
    observation_space = spaces.Box(-9, 9, (2,))
    action_space = spaces.Discrete(2)
    seen = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.first(), {}

    def first(self):
        return self.seen

    def step(self, action):
        self.time += 1
        return self.act(action)

    def act(self, action):
        return self.seen, 0.0, False, False, {}
"""
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file with the environment `Env` above and the body given; the name of its `make_env`."""

    def write(body: str) -> str:
        text = HEAD + textwrap.indent(textwrap.dedent(body), "    ") + "\n\ndef make_env():\n    return Env()\n"
        (tmp_path / "envs.py").write_text(text)
        return f"{tmp_path}/envs.py:make_env"

    return write


def make(env: str, **config: Any) -> Environments:
    return Environments(env, EnvironmentsConfig(**config), 1)


def drive(env: str, steps: int, config: dict[str, Any]) -> None:
    with make(env, **config) as envs:
        envs.reset()
        for _ in range(steps):
            envs.step(np.zeros((envs.count, *envs.action_space.shape)))  # type: ignore[misc]


def refusal(env: str, steps: int = 5, **config: Any) -> str:
    """What is said of `env`, in one line, when it is made and stepped."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            drive(env, steps, config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"environment `{env}`")
    return message.removeprefix(f"environment `{env}`")


# The configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"action_repeat": 0}, "action_repeat is 0, expected at least 1"),
        ({"frame_stack": -1}, "frame_stack is -1, expected at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps is 0, expected at least 1"),
        ({"vectorization": "gpu"}, "vectorization is 'gpu', expected auto, native, sync or async"),
        (
            {"options": {"max_episode_steps": 9}},
            "options.max_episode_steps cannot be given: it is a field beside `options`",
        ),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        EnvironmentsConfig(**fields)
    assert str(caught.value) == message


# The name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ("CartPole-v9", ["has no such version, expected `CartPole-v0` or `CartPole-v1`"]),
        ("CartPole", ["has no version, expected `CartPole-v0` or `CartPole-v1`"]),
        ("cartpole-v1", ["no such id", "did you mean `CartPole-v1`"]),
        ("LunarLandr-v3", ["did you mean `LunarLander-v3`"]),
        ("xyzzy", ["no such id is registered with gymnasium; ids of another package are `package:Id-v0`"]),
        ("envs.py", ["names a file, expected the function in it too: `envs.py:make_env`"]),
        (":make_env", ["expected a registered id, `file.py:make_env`, or `package.module:make_env`"]),
        ("nowhere/envs.py:make_env", ["no such file: nowhere/envs.py (seen from "]),
        ("no_such_package:make_env", ["no module `no_such_package` is installed or in"]),
        ("gymnasium.spaces:make_env", ["gymnasium.spaces has no `make_env`"]),
        ("gymnasium:NoSuch-v0", ["no such id is registered"]),
        ("gymnasium:__version__", ["is not callable, but str; expected a function that returns a gymnasium.Env"]),
    ],
)
def test_names_that_lead_nowhere(env: str, parts: list[str]) -> None:
    message = refusal(env)
    assert all(part in message for part in parts), message


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")
def test_a_game_without_its_namespace_is_found_near_by() -> None:
    assert "`ALE/Pong-v5`" in refusal("Pong-v5")


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "Box2D", None)
    for name in ("gymnasium.envs.box2d", "gymnasium.envs.box2d.lunar_lander"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    message = refusal("LunarLander-v3")
    assert "Box2D is not installed" in message
    assert 'pip install "tether[control]"' in message


def test_atari_games_without_ale_py(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ale_py" else find_spec(name))
    monkeypatch.setattr("gymnasium.registry", {})
    assert refusal("ALE/Pong-v5") == (
        ': needs the package ale-py, which is not installed: `pip install "tether[control]"` brings Box2D, MuJoCo and '
        "the Atari games"
    )


# The function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import nothing_of_that_name", ["fails when imported: ModuleNotFoundError", "envs.py, line 1)"]),
        ("def make_env(:", ["fails when imported: ", "envs.py, line 1: SyntaxError"]),
        ("def other(): pass", ["envs.py has no `make_env`; it has: other"]),
        ("make_env = 3", ["is not callable, but int"]),
        ("def make_env():\n    raise ValueError('no\\nmap')", ["fails: ValueError: no map (", "envs.py, line 2)"]),
        ("def make_env(): return None", ["returned null, expected a gymnasium.Env"]),
        ("import gymnasium\nclass E(gymnasium.Env): pass\ndef make_env(): return E", ["return an instance"]),
        (
            "import gymnasium\ndef make_env(): return gymnasium.make_vec('CartPole-v1')",
            ["return one environment, Tether steps several together"],
        ),
        ("def make_env(level): pass", ["needs the option `level`: give it as `options: {level: …}`"]),
        (
            "import gymnasium\nonly = gymnasium.make('CartPole-v1')\ndef make_env(): return only",
            ["returned the same environment twice, expected a new one from every call"],
        ),
        (
            "import gymnasium\nclass E(gymnasium.Env): pass\ndef make_env(): return E()",
            ["its observation_space is null"],
        ),
    ],
)
def test_functions_that_make_no_environment(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "envs.py").write_text(text)
    message = refusal(f"{tmp_path}/envs.py:make_env")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("vectorization", ["auto", "sync", "native"])
def test_options_that_it_does_not_take(vectorization: str) -> None:
    message = refusal("CartPole-v1", options={"sutton_barto_rewards": True}, vectorization=vectorization)
    assert "option `sutton_barto_rewards` is not one that it takes; it takes: sutton_barto_reward" in message
    assert message.endswith("did you mean `sutton_barto_reward`?")


def test_options_that_the_environment_refuses() -> None:
    assert ": cannot be made: " in refusal("HalfCheetah-v5", options={"gravitas": 1})


def test_an_environment_that_cannot_be_recorded(write: Write) -> None:
    with pytest.raises(UserError, match="takes no `render_mode`, so its episodes cannot be recorded"):
        make_environment(write(""), EnvironmentsConfig(), render_mode="rgb_array")


@pytest.mark.parametrize(("env", "config"), [("Pendulum-v1", {}), ("CartPole-v1", {"frame_stack": 2})])
def test_native_where_there_is_none_or_it_cannot(env: str, config: dict[str, Any]) -> None:
    message = refusal(env, vectorization="native", **config)
    assert "cannot be stepped natively" in message
    assert "`vectorization: sync`" in message


# The spaces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ("spaces.Discrete(16)", ["observation space Discrete(16), expected a Box", "FlattenObservation", "one-hot"]),
        ("spaces.Dict({'a': spaces.Discrete(3)})", ["expected a Box", "FlattenObservation"]),
        ("spaces.Tuple([spaces.Discrete(3)])", ["expected a Box", "FlattenObservation"]),
        ("spaces.Text(4)", ["expected a Box"]),
        ("spaces.Box(0, 1, (3, 4))", ["shape (3, 4) and are float32, expected a vector (n,), or an image"]),
        ("spaces.Box(0, 1, (8, 8, 3))", ["shape (8, 8, 3) and are float32"]),
        ("spaces.Box(0, 255, (8, 8, 8), dtype=np.uint8)", ["expected an image (H, W, C) or (C, H, W) with few C"]),
        ("spaces.Box(0, 1, (0,))", ["is empty"]),
        ("spaces.Box(0, 1, ())", ["shape () and are float32"]),
    ],
)
def test_observation_spaces_that_cannot_be_learnt_from(space: str, parts: list[str], write: Write) -> None:
    message = refusal(write(f"observation_space = {space}"))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "space",
    [
        "spaces.Dict({'a': spaces.Discrete(3)})",
        "spaces.MultiBinary(3)",
        "spaces.Box(0, 1, (2, 2))",
        "spaces.Box(0, 5, (2,), dtype=np.int64)",
        "spaces.MultiDiscrete([[2, 2], [2, 2]])",
    ],
)
def test_action_spaces_that_cannot_be_learnt_with(space: str, write: Write) -> None:
    message = refusal(write(f"action_space = {space}"))
    assert "expected Discrete, MultiDiscrete or a Box of floats" in message
    assert "gymnasium.ActionWrapper" in message


def test_actions_without_room(write: Write) -> None:
    message = refusal(write("action_space = spaces.Box(np.zeros(2, np.float32), np.array([0, 1], np.float32))"))
    assert "expected every lower bound below its upper bound" in message


def test_unbounded_actions_are_fine(write: Write) -> None:
    with make(write("action_space = spaces.Box(-np.inf, np.inf, (2,))"), count=1) as envs:
        envs.reset()
        envs.step(np.full((1, 2), 1e6))


# What it returns --------------------------------------------------------------------------------------------

ACT = """
def act(self, action):
    {}
    return {}
"""
GOOD = "self.seen, 0.0, False, False, {}"
BAD_STEPS = [
    ("1 / (3 - self.time)", GOOD, "step 3 of its episode: step raised ZeroDivisionError: division by zero ("),
    ("", "self.seen, 0.0, False, {}", "step 1 of its episode: step returned 4 values, expected five: (observation,"),
    ("", "None", "step 1 of its episode: step returned a NoneType, expected five"),
    ("", "np.zeros(3, np.float32), 0.0, False, False, {}", "step 1 of its episode: the observation is shape (3,)"),
    (
        "",
        "np.zeros(2), 0.0, False, False, {}",
        "shape (2,), float64, but its observation_space says shape (2,), float",
    ),
    ("", "[0.0, 0.0], 0.0, False, False, {}", "the observation is a list"),
    ("", "self.seen, None, False, False, {}", "the reward is a NoneType, expected one number"),
    ("", "self.seen, '1', False, False, {}", "the reward is a str, expected one number"),
    ("", "self.seen, np.zeros(1), False, False, {}", "the reward is shape (1,), expected one number"),
    ("", "self.seen, 0.0, None, False, {}", "terminated and truncated are None and False, expected True or False"),
    ("", "self.seen, 0.0, False, False, None", "info is a NoneType, expected a dict"),
    (
        "x = self.seen.copy(); x[1] = np.nan if self.time == 2 else 0",
        "x, 0.0, False, False, {}",
        "step 2 of its episode: observation[1] is nan, expected a finite number",
    ),
    (
        "",
        "self.seen, float('-inf'), False, False, {}",
        "step 1 of its episode: reward is -inf, expected a finite",
    ),
    ("", "self.seen / 0, 1.0, True, False, {}", "step 1 of its episode: observation[0] is nan"),
]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("line", "result", "expected"), BAD_STEPS)
def test_steps_that_are_none(line: str, result: str, expected: str, write: Write) -> None:
    message = refusal(write("import numpy; numpy.seterr(all='ignore')" + ACT.format(line or "pass", result)), count=2)
    assert message.startswith(", index 0, ")
    assert expected in message


def test_the_environment_that_went_wrong_is_the_one_that_is_named(write: Write) -> None:
    body = """
    made = []

    def __init__(self):
        self.index = len(self.made)
        self.made.append(self)

    def act(self, action):
        if self.index == 2 and self.time == 4:
            self.seen = self.seen + np.inf
        return self.seen, 0.0, self.time == 6, False, {}
    """
    expected = ", index 2, step 4 of its episode: observation[0] is inf, expected a finite number"
    assert refusal(write(body), count=3) == expected


def test_very_large_numbers_are_finite(write: Write) -> None:
    body = "seen = np.full(2, 3e38, np.float32)" + ACT.format("pass", "self.seen, 1e308, False, False, {}")
    with warnings.catch_warnings(), make(write(body), count=3) as envs:
        warnings.simplefilter("error")
        envs.reset()
        assert envs.step(np.zeros(3)).rewards.tolist() == [1e308] * 3


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def reset(self, seed=None): pass", "reset raised TypeError"),
        ("def reset(self, *, seed=None, options=None): return self.seen", "reset returned a ndarray, expected two:"),
        ("def first(self): return [1.0, 2.0]", "reset: the observation is a list"),
        ("def first(self): return self.seen + np.float32(np.nan)", "reset: observation[0] is nan"),
        ("def first(self): raise OSError('no\\ngame')", "reset raised OSError: no game"),
    ],
)
def test_resets_that_are_none(body: str, expected: str, write: Write) -> None:
    assert expected in refusal(write(body))


@pytest.mark.parametrize(
    ("line", "result", "expected"),
    [BAD_STEPS[0], BAD_STEPS[3], BAD_STEPS[11], ("import os; os._exit(7)", "None", "ended with exit code 7")],
)
def test_errors_in_worker_processes_are_told_here(line: str, result: str, expected: str, write: Write) -> None:
    assert expected in refusal(write(ACT.format(line or "pass", result)), count=2, vectorization="async")


def test_a_function_that_fails_in_its_worker_process_only(write: Write, tmp_path: Path) -> None:
    env = write("")
    text = (tmp_path / "envs.py").read_text()
    check = "    import multiprocessing\n    assert multiprocessing.parent_process() is None, 'not\\nhere'\n"
    (tmp_path / "envs.py").write_text(text.replace("def make_env():\n", "def make_env():\n" + check))
    message = refusal(env, count=2, vectorization="async")
    assert message.startswith(": fails: AssertionError: not here (")


def test_closing_while_a_step_is_not_done_ends_the_worker_processes(write: Write, monkeypatch: Any) -> None:
    envs = make(write(ACT.format("import time; time.sleep(60)", GOOD)), count=2, vectorization="async")
    envs.reset()
    vector: Any = envs._vector
    processes = list(vector._vector.processes)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vector._vector, "step_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        envs.step(np.zeros(2))
    envs.close()
    envs.close()
    assert not any(process.is_alive() for process in processes)


# Atari ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"options": {"stack_number": 3}}, "option `stack_number` is not one that it takes; it takes: "),
        ({"options": {"stack_num": 3}, "frame_stack": 2}, "frame_stack is 2 and option `stack_num` is 3: give one"),
        ({"options": {"life_loss_info": True}}, "`episodic_life: true` ends an episode with each life"),
        ({"options": {"grayscale": False}}, "option `grayscale` is False, expected True"),
        ({"options": {"frameskip": 0}}, "option `frameskip` is 0, expected a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_atari_options_that_cannot_be(config: dict[str, Any], expected: str, vectorization: str) -> None:
    assert expected in refusal("ALE/Pong-v5", count=1, vectorization=vectorization, **config)


@pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed")
def test_an_ale_py_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.11.2")
    assert refusal("ALE/Pong-v5") == ": found ale-py 0.11.2, expected 0.12 or newer: `pip install -U ale-py`"


# Between saving and going on --------------------------------------------------------------------------------


def test_another_number_of_environments_cannot_go_on() -> None:
    with make("CartPole-v1", count=2) as two, make("CartPole-v1", count=3) as three:
        two.reset()
        with pytest.raises(UserError, match="the saved state is of 2 environments, the configuration says count 3"):
            three.load_state_dict(two.state_dict())


def test_actions_of_another_shape_are_refused() -> None:
    with make("CartPole-v1", count=2) as envs:
        with pytest.raises(RuntimeError, match="reset has to be called before step"):
            envs.step(np.zeros(2))
        envs.reset()
        with pytest.raises(ValueError, match=r"actions have shape \(3,\), expected \(2,\)"):
            envs.step(np.zeros(3))
