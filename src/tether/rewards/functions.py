"""Scores for completions: several reward functions, weighted and added up.

The calling convention is the one that users of TRL's reward functions know. Knows nothing of policies or of training.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import RewardError, UserError
from tether.rewards.calling import Caller
from tether.rewards.loading import GIVEN, RewardFunction, check_columns, describe, load_reward
from tether.rewards.verifiers import ExampleError, Text, text_of

Function = str | Callable[..., Any]
Functions = Function | Sequence[Function] | Mapping[Any, float]  # the mapping's keys are functions


@dataclass(frozen=True)
class RewardsConfig:
    """Where scores come from."""

    functions: tuple[str, ...] = ()
    """Each `file.py:name`, `package.module:name`, `http://…` (a remote scorer), or built in, with options after `?`:
    `exact_match?answer=answer`, `regex?pattern=…`, `numeric?answer=answer&right=1&wrong=-1`, `arithmetic`,
    `math_verify`, `length?per_token=…`, `format`, `judge?model=…&url=…`."""
    weights: tuple[float, ...] = ()
    """One factor per function, the task's own first where there is one; none given: all 1."""
    timeout: float = 300.0
    """Seconds that one call of one function may take."""


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores of N completions.

    Attributes:
        total: (N,) weighted sum over the functions.
        parts: for each function by name, (N,) what it returned, before its weight; NaN where it returned None.
    """

    total: list[float]
    parts: dict[str, list[float]]

    def __repr__(self) -> str:
        mean = math.fsum(self.total) / max(1, len(self.total))
        return f"Scores({len(self.total)} of {', '.join(self.parts)}, mean {mean:.3g})"


class Rewards:
    """Reward functions that score completions together.

    Args:
        config: which functions, their weights, the time limit.
        functions: instead of `config.functions`, for use from Python: a function, a list of them, or a dict from
            function to weight, which stands in place of `config.weights`. Names as in `config.functions` may be among
            them.
        first: a callable that comes before them all: the verifier of a task.
        section: of the configuration that `config` is, for messages: `reward` or `gold`.

    Raises:
        UserError: a function cannot be loaded, or the weights do not fit.
    """

    def __init__(
        self,
        config: RewardsConfig,
        functions: Functions | None = None,
        first: Callable[..., Any] | None = None,
        section: str = "reward",
    ) -> None:
        weights = config.weights
        if isinstance(functions, Mapping):
            if weights:
                raise UserError(f"{section}.weights is set, and the functions given have weights too: drop one of them")
            weights = tuple(_weight(section, *item) for item in functions.items())
            weights = weights if first is None else (1.0, *weights)
        loaded = [_load(section, function) for function in _listed(section, functions, config)]
        if first is not None:
            loaded.insert(0, _from_callable(first))
        if not loaded:
            raise UserError(f"no reward: name at least one function, as in `--{section}.functions rewards.py:correct`")
        weights = weights or (1.0,) * len(loaded)
        if len(weights) != len(loaded):
            found = f"{section}.weights has {len(weights)} numbers for {len(loaded)} functions"
            raise UserError(f"{found}; expected one each")
        for weight in weights:
            if not math.isfinite(weight):
                raise UserError(f"{section}.weights holds {weight}; expected finite numbers")
        if not config.timeout > 0:
            raise UserError(f"{section}.timeout is {config.timeout:g}; expected seconds above 0")
        self.functions: dict[str, RewardFunction] = {}
        for function in loaded:
            self.functions[_free_name(function.name, self.functions)] = function
        self.weights = tuple(weights)
        self._caller = Caller(config.timeout, f"--{section}.timeout")

    def check(
        self,
        columns: Mapping[str, Sequence[Any]] | Iterable[str],
        prompts: Sequence[Text] | None = None,
        places: Sequence[str] | None = None,
    ) -> None:
        """Whether every function gets the columns that it requires; to be called before anything is computed.

        Args:
            columns: the data set's columns: their names, or names and values.
            prompts: all prompts. With them and the columns' values, the built-in verifiers also read every answer.
            places: where each prompt is from, for messages, such as its file and row.

        Raises:
            UserError: a column is missing, or holds an answer that a built-in verifier cannot read.
        """
        names = list(columns)
        for function in self.functions.values():
            check_columns(function, names)
            offline = function.built_in and getattr(function.call, "offline", True)
            if offline and prompts is not None and isinstance(columns, Mapping):
                given = {"prompts": prompts, "completions": [""] * len(prompts), "completion_ids": [[]] * len(prompts)}
                try:
                    function.call(**{**columns, **given})
                except ExampleError as error:
                    if places is None:
                        raise
                    raise UserError(f"{places[error.index]}: {error.alone}") from error

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """Score N completions.

        Args:
            prompts: (N,) texts, or lists of messages.
            completions: (N,) texts; for chat prompts `[{"role": "assistant", "content": text}]`.
            completion_ids: (N,) token ids of the completions, eos included where it was drawn.
            columns: for each column of the data set, (N,) values. A column called `prompts`, `completions` or
                `completion_ids` is not handed on: these names mean the arguments above.

        Raises:
            RewardError: a function raised, hung, or did not return one finite number per completion; or every function
                returned None for the same completion.
        """
        columns = {name: values for name, values in columns.items() if name not in GIVEN}
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise ValueError(f"{name} has {len(values)} entries for {len(completions)} completions")
        for function in self.functions.values():
            check_columns(function, columns)
        parts = dict(zip(self.functions, self._caller.call(list(self.functions.values()), arguments), strict=True))
        total = []
        for index, completion in enumerate(completions):
            scores = [(weight, part[index]) for weight, part in zip(self.weights, parts.values(), strict=True)]
            applying = [weight * score for weight, score in scores if not math.isnan(score)]
            if not applying:
                shown = " ".join(text_of(completion).split())[:60]
                raise RewardError(
                    f"no reward applies to completion {index} ({shown!r}): {', '.join(self.functions)} returned None; "
                    "expected a number from at least one"
                )
            total.append(math.fsum(applying))
        return Scores(total, parts)


def check_reward(
    function: str | Callable[..., Any],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    timeout: float = 300.0,
) -> list[float]:
    """Try a reward function on examples, as training would call it, and return its scores.

    >>> check_reward("rewards.py:correct", ["2 + 2 ="], ["4"], {"answer": ["4"]})
    [1.0]

    Args:
        function: as in `RewardsConfig.functions`, or the function itself.
        prompts: (N,) texts or lists of messages.
        completions: (N,) of the same kind.
        columns: (N,) values for each column of the data set.
        completion_ids: (N,) token ids; without them each completion has none.
        timeout: seconds that the call may take.

    Raises:
        UserError: the function cannot be loaded or called, or returns anything but one finite number per completion.
    """
    rewards = Rewards(RewardsConfig(timeout=timeout), function)
    ids = [[] for _ in completions] if completion_ids is None else completion_ids
    return rewards(prompts, completions, ids, columns or {}).total


def _listed(section: str, functions: Functions | None, config: RewardsConfig) -> list[Any]:
    if functions is None:
        return list(config.functions)
    if callable(functions) or isinstance(functions, str):
        return [functions]
    if isinstance(functions, Iterable):
        return list(functions)
    raise UserError(
        f"{section}: found {type(functions).__name__}, expected a function, a list of functions, or a dict from "
        "function to weight"
    )


def _load(section: str, function: Any) -> RewardFunction:
    if isinstance(function, str):
        return load_reward(function)
    if not callable(function):
        raise UserError(f"{section}: found {type(function).__name__} ({function!r:.40}) among them, expected functions")
    return _from_callable(function)


def _weight(section: str, function: Any, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        name = getattr(function, "__name__", str(function))
        raise UserError(
            f"{section}: the weight of `{name}` is {type(weight).__name__} ({weight!r:.40}), expected a number, as in "
            "{correct: 1.0, brief: 0.1}"
        )
    return float(weight)


def _from_callable(function: Callable[..., Any]) -> RewardFunction:
    name = getattr(function, "__name__", type(function).__name__)
    return describe(function, label=name, name=name)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or `name_2`, `name_3`, … where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
