"""Reward functions that users bring: found, called by TRL's convention, and told on in one line when they fail."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tether.errors import RewardError, UserError
from tether.rewards import Rewards, RewardsConfig, check_reward

EXAMPLES = Path(__file__).parents[2] / "examples"


def score(function: str | Callable[..., Any], n: int = 2, timeout: float = 30, **columns: list[Any]) -> list[float]:
    return check_reward(function, ["p"] * n, [f"text {i}" for i in range(n)], columns, timeout=timeout)


def write(folder: Path, text: str, name: str = "rewards.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- the calling convention -------------------------------------------------------------------------------------------


def test_a_function_gets_the_arguments_that_it_names() -> None:
    seen: dict[str, Any] = {}

    def reward(completions, completion_ids, answer, level=3):  # type: ignore[no-untyped-def]
        seen.update(completions=completions, completion_ids=completion_ids, answer=answer, level=level)
        return [1, 2]

    chats = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    columns = {"answer": ["x", "y"], "unused": [0, 0]}
    scores = check_reward(reward, [[{"role": "user", "content": "?"}]] * 2, chats, columns, [[5, 2], [6]])
    assert scores == [1, 2]
    assert seen == {"completions": chats, "completion_ids": [[5, 2], [6]], "answer": ["x", "y"], "level": 3}


def test_keyword_arguments_take_everything() -> None:
    seen: dict[str, Any] = {}

    def reward(**everything):  # type: ignore[no-untyped-def]
        seen.update(everything)
        return [0, 0]

    # A column with the name of a given argument does not take its place.
    check_reward(reward, ["p", "q"], ["a", "b"], {"answer": [1, 2], "completions": ["gold", "gold"]})
    assert seen == {"prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[], []], "answer": [1, 2]}


def test_a_function_that_empties_its_lists_harms_no_other() -> None:
    def greedy(completions, answer):  # type: ignore[no-untyped-def]
        answer.clear()
        return [float(len(completions.pop())) for _ in range(2)]

    def modest(completions, answer):  # type: ignore[no-untyped-def]
        return [len(completions), len(answer)]

    scores = Rewards(RewardsConfig(), [greedy, modest])(["p"] * 2, ["a", "b"], [[], []], {"answer": [1, 2]})
    assert scores.parts["modest"] == [2, 2]


@pytest.mark.parametrize(
    "result",
    [
        [1, 0],
        (True, False),
        [1.0, np.float32(0)],
        [torch.tensor(1.0), torch.tensor(0)],
        torch.tensor([1, 0]),
        torch.tensor([1.0, 0.0], requires_grad=True),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        np.array([1.0, 0.0]),
        np.array([True, False]),
    ],
)
def test_any_list_of_numbers_will_do(result: Any) -> None:
    scores = score(lambda **_: result)
    assert scores == [1.0, 0.0]
    assert all(type(value) is float for value in scores)


def test_instances_modules_and_partials_are_functions_too() -> None:
    class Length:
        def __call__(self, completions: list[str], answer: list[int]) -> list[int]:
            return [len(text) + number for text, number in zip(completions, answer, strict=True)]

    class Model(torch.nn.Module):
        def forward(self, completions: list[str]) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return torch.tensor([float(len(text)) for text in completions])

    def scaled(completions, factor, answer):  # type: ignore[no-untyped-def]
        return [factor * len(text) for text in completions]

    assert score(Length(), answer=[1, 2]) == [7, 8]
    assert score(Model(), answer=[1, 2]) == [6, 6]
    assert score(functools.partial(scaled, factor=2), answer=[1, 2]) == [12, 12]


def test_async_functions_run_at_the_same_time_and_in_one_loop() -> None:
    meeting: list[asyncio.Event] = []
    loops = set()

    async def first(completions):  # type: ignore[no-untyped-def]
        loops.add(asyncio.get_running_loop())
        meeting.append(asyncio.Event())
        await asyncio.wait_for(meeting[-1].wait(), 10)  # set by the second, which must be running for this to end
        return [1] * len(completions)

    class Second:
        async def __call__(self, completions: list[str]) -> list[int]:
            loops.add(asyncio.get_running_loop())
            while not meeting:
                await asyncio.sleep(0.001)
            meeting[-1].set()
            return [2] * len(completions)

    def plain(completions):  # type: ignore[no-untyped-def]
        return Second()(completions)  # an awaitable from a function that is not async itself

    rewards = Rewards(RewardsConfig(timeout=20), [first, Second(), plain])
    for _ in range(2):
        scores = rewards(["p"], ["a"], [[]], {})
        assert scores.total == [5]
        meeting.clear()
    assert len(loops) == 1


def test_plain_functions_keep_their_thread_and_hold_no_lock() -> None:
    threads = []
    inside = threading.Barrier(2, timeout=10)

    def reward(completions):  # type: ignore[no-untyped-def]
        threads.append(threading.current_thread())
        inside.wait()  # passes only if both callers are inside at once
        return [0] * len(completions)

    both = [Rewards(RewardsConfig(timeout=20), [reward]) for _ in range(2)]
    for _ in range(2):
        callers = [threading.Thread(target=rewards, args=(["p"], ["a"], [[]], {})) for rewards in both]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(threads) == 4
    assert len(set(threads)) == 2
    assert all(thread.daemon for thread in threads)


# --- several functions ------------------------------------------------------------------------------------------------


def test_weights_and_parts() -> None:
    rewards = Rewards(RewardsConfig(weights=(2.0, -0.5)), [lambda **_: [1, 2], lambda **_: [4, 4]])
    scores = rewards(["p"] * 2, ["a", "b"], [[], []], {})
    assert scores.total == [0.0, 2.0]
    assert list(scores.parts.values()) == [[1, 2], [4, 4]]
    assert len(set(scores.parts)) == 2  # functions of the same name keep a part each


def brief(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def exclaims(completions: list[str]) -> list[float]:
    return [float("!" in text) for text in completions]


@pytest.mark.parametrize(
    ("functions", "config", "weights"),
    [
        (brief, RewardsConfig(), {"brief": 1.0}),
        ([brief, exclaims], RewardsConfig(), {"brief": 1.0, "exclaims": 1.0}),
        ((brief, exclaims), RewardsConfig(weights=(0.5, 2.0)), {"brief": 0.5, "exclaims": 2.0}),
        ({brief: 0.5, exclaims: 2}, RewardsConfig(), {"brief": 0.5, "exclaims": 2.0}),
        ({brief: 0.5, "length?per_token=1": 3.0}, RewardsConfig(), {"brief": 0.5, "length": 3.0}),
        ([brief, brief, "regex?pattern=a"], RewardsConfig(), {"brief": 1.0, "brief_2": 1.0, "regex": 1.0}),
    ],
)
def test_functions_from_python_have_names_and_weights(
    functions: Any, config: RewardsConfig, weights: dict[str, float]
) -> None:
    rewards = Rewards(config, functions)
    assert dict(zip(rewards.functions, rewards.weights, strict=True)) == weights
    scores = rewards(["p"], ["hey!"], [[1, 2]], {})
    assert list(scores.parts) == list(weights)
    assert scores.total[0] == pytest.approx(sum(weights[name] * scores.parts[name][0] for name in weights))


def test_weights_of_a_dict_come_after_the_tasks_own() -> None:
    rewards = Rewards(RewardsConfig(), {brief: 0.5}, first=exclaims)
    assert dict(zip(rewards.functions, rewards.weights, strict=True)) == {"exclaims": 1.0, "brief": 0.5}


@pytest.mark.parametrize(
    ("functions", "config", "message"),
    [
        (3, RewardsConfig(), "gold: found int, expected a function, a list of functions, or a dict from function to"),
        ([brief, 3], RewardsConfig(), r"gold: found int \(3\) among them, expected functions"),
        ({"correct": brief}, RewardsConfig(), r"gold: the weight of `correct` is function .*, expected a number"),
        ({brief: True}, RewardsConfig(), r"gold: the weight of `brief` is bool \(True\), expected a number"),
        ({brief: float("nan")}, RewardsConfig(), "gold.weights holds nan; expected finite numbers"),
        ({brief: 1.0}, RewardsConfig(weights=(1.0,)), "gold.weights is set, and the functions given have weights too"),
        ([], RewardsConfig(), "no reward: name at least one function"),
        ([brief, exclaims], RewardsConfig(weights=(1.0,)), "gold.weights has 1 numbers for 2 functions"),
    ],
)
def test_functions_from_python_that_do_not_fit(functions: Any, config: RewardsConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Rewards(config, functions, section="gold")
    assert "\n" not in str(caught.value)


def test_none_means_that_a_reward_does_not_apply() -> None:
    rewards = Rewards(RewardsConfig(), [lambda **_: [1, None], lambda **_: [None, 3]])
    scores = rewards(["p"] * 2, ["a", "b"], [[], []], {})
    assert scores.total == [1, 3]
    assert [[value != value for value in part] for part in scores.parts.values()] == [[False, True], [True, False]]


def test_none_from_every_function_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"no reward applies to completion 1 \('text 1'\)"):
        score(lambda **_: [1, None])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardsConfig(), "no reward: name at least one function"),
        (RewardsConfig(("arithmetic",), weights=(1.0, 2.0)), "reward.weights has 2 numbers for 1 functions"),
        (RewardsConfig(("arithmetic",), weights=(float("nan"),)), "reward.weights holds nan"),
        (RewardsConfig(("arithmetic",), timeout=0), "reward.timeout is 0"),
    ],
)
def test_a_configuration_that_does_not_fit(config: RewardsConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewards(config)


# --- finding functions ------------------------------------------------------------------------------------------------


def test_from_a_file_with_a_sibling(tmp_path: Path) -> None:
    write(tmp_path, "SCALE = 3", "helper_beside_the_reward.py")
    path = write(
        tmp_path,
        "from __future__ import annotations\nimport dataclasses\nimport helper_beside_the_reward as helper\n"
        "@dataclasses.dataclass\nclass Settings:\n    scale: int = helper.SCALE\n"
        "calls = []\ndef first(completions):\n    calls.append(1)\n    return [Settings().scale] * len(completions)\n"
        "def second(completions):\n    return [len(calls)] * len(completions)\n",
        "random.py",  # hides no module of Python
    )
    before = sys.modules.get("random")
    rewards = Rewards(RewardsConfig((f"{path}:first", f"{path}:second")))
    scores = rewards(["p"], ["a"], [[]], {})
    assert scores.parts == {"first": [3], "second": [1]}  # both live in one module: the file runs once
    assert sys.modules.get("random") is before


def test_from_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_the_user"
    package.mkdir()
    write(package, "def one(completions):\n    return [1] * len(completions)\n", "scoring.py")
    monkeypatch.chdir(tmp_path)
    assert score("package_of_the_user.scoring:one") == [1, 1]


@pytest.mark.parametrize("spec", ["correct", "numerics", ":f", "file.py:", "rewards.py"])
def test_a_name_that_is_nothing(spec: str) -> None:
    with pytest.raises(
        UserError, match=r"expected `file\.py:name`, `package\.module:name`, or one of: exact_match, regex"
    ):
        Rewards(RewardsConfig((spec,)))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def correct(completions): pass\n_hidden = len\nimport os", "corect", r"has no `corect`; it has: correct$"),
        ("", "f", "it has: no function"),
        ("def f(:\n  pass", "f", r"rewards.py, line 1: SyntaxError"),
        ("\n\nimport not_a_module_anywhere", "f", r"ModuleNotFoundError: .*not_a_module_anywhere.*line 3\)"),
        (
            "def g():\n    raise ValueError('no\\nkey')\ng()",
            "f",
            r"fails when imported: ValueError: no key \(.*line 2\)",
        ),
        ("raise SystemExit(3)", "f", r"fails when imported: SystemExit: 3"),
        ("class Panic(BaseException): ...\nraise Panic(3)", "f", r"fails when imported: Panic: 3"),
        ("f = 3", "f", "is not callable, but int"),
        ("class F:\n    def __call__(self): pass", "F", r"is a class; name a function, or an instance: `f = F\(\)`"),
        ("def f(completions, /): pass", "f", "`completions` is positional-only"),
        ("def f(completions): pass", "f?right=1", "options after `\\?` are for the built-in rewards"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, name: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        Rewards(RewardsConfig((f"{path}:{name}",)))
    assert "\n" not in str(caught.value)


def test_a_file_or_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file: nowhere.py \(seen from"):
        Rewards(RewardsConfig(("nowhere.py:f",)))
    with pytest.raises(UserError, match="no module `nowhere` is installed or in"):
        Rewards(RewardsConfig(("nowhere.inside:f",)))


def test_a_missing_column_is_found_before_anything_runs() -> None:
    def reward(completions, solution, weight=1):  # type: ignore[no-untyped-def]
        raise AssertionError("never called")

    rewards = Rewards(RewardsConfig(), [reward])
    rewards.check(["solution"])
    with pytest.raises(
        UserError, match="reward `reward` needs the column `solution`, but the prompts have: prompt, answer"
    ):
        rewards.check(["prompt", "answer"])
    with pytest.raises(UserError, match="needs the column `solution`"):
        rewards(["p"], ["a"], [[]], {})


# --- failing functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None; expected a list of 2 numbers, one per completion: is a `return` missing?"),
        ([1], "returned 1 numbers; expected a list of 2 numbers"),
        ([1, 2, 3], "returned 3 numbers"),
        (1.5, r"returned float \(1.5\); expected a list"),
        (torch.tensor(1.0), "returned Tensor"),
        ("good", r"returned str \('good'\)"),
        ({"a": 1}, "returned dict; expected a list"),
        ((value for value in (1, 2)), "returned generator"),
        ([1, "2"], r"returned str \('2'\) for completion 1 \('text 1'\); expected a number"),
        ([[1], [2]], r"returned list \('\[1\]'\) for completion 0"),
        (torch.ones(2, 1), "returned list .* for completion 0"),
        ([0, float("nan")], r"returned nan for completion 1 \('text 1'\); expected a finite number"),
        ([float("-inf"), 0], "returned -inf for completion 0"),
        (np.array([0, np.inf]), "returned inf for completion 1"),
        ([10**400, 0], "returned inf for completion 0"),
        ([1j, 0], "returned complex"),
    ],
)
def test_a_result_that_is_not_one_number_per_completion(result: Any, message: str) -> None:
    def reward(**_: Any) -> Any:
        return result

    with pytest.raises(RewardError, match=message) as caught:
        score(reward)
    assert "reward `reward`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exception_names_the_users_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "import json\ndef f(completions):\n    return [json.loads('{\\n') for _ in completions]\n")
    with pytest.raises(RewardError, match=r"rewards.py:f` raised JSONDecodeError: .*rewards.py, line 3\)$") as caught:
        score(f"{path}:f")
    assert caught.value.__cause__ is not None  # for a traceback when one is asked for


def test_an_exception_in_a_module_names_its_forward() -> None:
    class Model(torch.nn.Module):
        def forward(self, completions: list[str]) -> list[float]:
            return [1 / 0]

    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: .*test_functions.py, line \d+\)"):
        score(Model())


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), TimeoutError("slow"), StopIteration()])
def test_any_exception_becomes_a_reward_error(error: BaseException) -> None:
    def reward(**_: Any) -> Any:
        raise error

    async def reward_async(**_: Any) -> Any:
        raise RuntimeError("broken") from error

    async def raised_async(**_: Any) -> Any:
        raise error

    with pytest.raises(RewardError, match=f"reward `reward` raised {type(error).__name__}"):
        score(reward)
    if not isinstance(error, StopIteration):  # which Python itself turns into another in a coroutine
        with pytest.raises(RewardError, match=f"reward `raised_async` raised {type(error).__name__}"):
            score(raised_async)
    with pytest.raises(RewardError, match="reward `reward_async` raised RuntimeError: broken"):
        score(reward_async)


def test_a_time_limit_of_its_own_says_what_to_do() -> None:
    import signal

    def reward(completions):  # type: ignore[no-untyped-def]
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    with pytest.raises(RewardError, match="rewards run in a thread of their own"):
        score(reward)


def test_a_function_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    hang = True

    def slow(completions):  # type: ignore[no-untyped-def]
        if hang:
            release.wait(60)
        return [1] * len(completions)

    async def slow_async(completions):  # type: ignore[no-untyped-def]
        if hang:
            await asyncio.sleep(60)
        return [1] * len(completions)

    async def blocking(completions):  # type: ignore[no-untyped-def]
        if hang:
            release.wait(60)  # an async function that never lets go of the loop
        return [1] * len(completions)

    for function in (slow, slow_async, blocking):
        hang = True
        rewards = Rewards(RewardsConfig(timeout=0.2), [function])
        start = time.perf_counter()
        with pytest.raises(
            RewardError, match=r"has not returned after 0.2 s for 1 completions: mend it, or raise `--reward"
        ):
            rewards(["p"], ["a"], [[]], {})
        assert time.perf_counter() - start < 30  # it would take 60
        hang = False
        assert rewards(["p"], ["a"], [[]], {}).total == [1]  # a later call is not held up by the one left behind
    release.set()


def test_a_process_ends_although_a_reward_hangs(tmp_path: Path) -> None:
    import subprocess

    path = write(tmp_path, "import time\ndef hang(completions):\n    time.sleep(600)\n")
    program = (
        "from tether.rewards import check_reward\n"
        f"try: check_reward({path + ':hang'!r}, ['p'], ['a'], timeout=0.2)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "RewardError", "")


# --- the examples that users copy -------------------------------------------------------------------------------------


def test_example_gsm8k() -> None:
    rewards = Rewards(RewardsConfig((f"{EXAMPLES}/gsm8k.py:correct", f"{EXAMPLES}/gsm8k.py:well_formed"), (1.0, 0.5)))
    completions = ["so\n#### 1,072", "#### 7", "1072", [{"role": "assistant", "content": "#### 1072.0"}]]
    columns = {"answer": ["48+24 = ...\n#### 1072"] * 4}
    rewards.check(columns)
    scores = rewards(["q"] * 4, completions, [[]] * 4, columns)
    assert scores.parts == {"correct": [1, -1, -1, 1], "well_formed": [1, 1, 0, 1]}
    assert scores.total == [1.5, -0.5, -1, 1.5]


def test_example_async_judge() -> None:
    assert check_reward(f"{EXAMPLES}/judge_async.py:politeness", ["q"] * 2, ["Thank you", "No"]) == [1, 0]


def test_each_call_sees_the_data_set_whatever_others_do_to_their_lists() -> None:
    """Prompts, columns and token ids are a call's own at every depth, and a row's own where rows share an entry."""
    kept: list[Any] = []

    def greedy(prompts: Any, completions: Any, completion_ids: Any, tests: Any, **_: Any) -> list[float]:
        scores = []
        for prompt, completion, ids, cases in zip(prompts, completions, completion_ids, tests, strict=True):
            scores.append(float(len(cases["of"][0]) + len(prompt) + len(ids)))
            prompt.append(completion[0])
            prompt[0]["content"] = "gone"
            cases["of"][0].pop()
            cases.clear()
            ids.clear()
        kept.append(tests)
        return scores

    shared_prompt = [{"role": "user", "content": "?"}]
    shared_tests = {"of": ([1, 2, 3], np.zeros(2))}
    chat = [{"role": "assistant", "content": "a"}]
    rewards = Rewards(RewardsConfig(), [greedy, greedy])
    for _ in range(2):
        found = rewards([shared_prompt] * 3, [chat] * 3, [[4, 5]] * 3, {"tests": [shared_tests] * 3})
        assert found.total == [12.0] * 3  # twice 3 tests, 1 message, 2 tokens
    assert shared_prompt == [{"role": "user", "content": "?"}]
    assert shared_tests["of"][0] == [1, 2, 3]
    assert all(row is not shared_tests for rows in kept for row in rows)


def test_what_cannot_be_copied_is_handed_on_as_it_is() -> None:
    lock = threading.Lock()
    assert score(
        lambda completions, lock: [float(entry is locks[0]) for entry in lock], lock=(locks := [lock] * 2)
    ) == [1, 1]
