"""The program of the process beside, in which answers of a model are parsed, compared and scored.

Run as a script by `tether.rewards.scoring`, so that whatever an answer makes sympy do, it does not do it here. Imports
nothing of Tether. One JSON object a line comes in, one goes out.

Some scorers hand the answer to Python's `eval`, sympy's parser among them. While a scorer runs, `eval` and that parser
take arithmetic and nothing else: numbers, strings, tuples and lists, operators, comparisons, and calls of the functions
of `CALLABLE`. No attribute, subscript, lambda or comprehension: code that a model wrote is not run here either.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MOST_MEMORY = 4 * 2**30  # bytes of address space: 9^9^9^9 ends as an error, not as a full machine
ALLOWED = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Call),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.keyword),
)
CALLABLE = {
    *("Symbol", "Integer", "Float", "Rational", "Function", "factorial", "Abs", "sqrt", "exp", "log", "ln"),
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "asec", "acsc", "acot"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "Pow", "Mul", "Add"),
}
TRUSTED = {"collections", "dataclasses", "enum", "functools", "typing"}  # they make classes while modules are imported


class RefusedError(ValueError):
    """The text is more than arithmetic."""


class UnknownTaskError(Exception):
    """The library has no such task; its argument lists those that it has."""


def check_expression(source: str) -> None:
    """RefusedError unless `source` is made of `ALLOWED` alone and calls nothing but `CALLABLE`.

    SyntaxError, RecursionError or MemoryError where it is no Python at all, or nested too deeply.
    """
    for node in ast.walk(ast.parse(source.strip(), mode="eval")):
        if not isinstance(node, ALLOWED):
            raise RefusedError(f"{type(node).__name__} in an answer is not evaluated")
        if isinstance(node, ast.Call):
            function = node.func
            while isinstance(function, ast.Call):  # Function('f')(x)
                function = function.func
            if not isinstance(function, ast.Name) or function.id not in CALLABLE:
                raise RefusedError("a call in an answer is not evaluated")


@contextmanager
def guarded() -> Iterator[None]:
    """`eval`, `exec` and sympy's parser refuse what `check_expression` refuses."""
    sympy_parser: Any = import_module("sympy.parsing.sympy_parser")
    run_eval, run_exec, stringify = builtins.eval, builtins.exec, sympy_parser.stringify_expr

    def checked_eval(source: Any, *scopes: Any) -> Any:
        if (
            isinstance(source, str | bytes) and sys._getframe(1).f_globals.get("__name__") not in TRUSTED
        ):  # compiled code is sympy's own, of a text that `checked_stringify` saw
            check_expression(source if isinstance(source, str) else source.decode())
        return run_eval(source, *scopes)

    def checked_exec(source: Any, *scopes: Any, **closure: Any) -> None:
        own = sys._getframe(1).f_globals.get("__name__") in TRUSTED or source == "from sympy import *"  # the parser's
        if isinstance(source, str | bytes) and not own:
            raise RefusedError("statements are not executed")
        run_exec(source, *scopes, **closure)

    def checked_stringify(*arguments: Any) -> str:
        code = str(stringify(*arguments))
        check_expression(code)
        return code

    builtins.eval, builtins.exec, sympy_parser.stringify_expr = checked_eval, checked_exec, checked_stringify
    try:
        yield
    finally:
        builtins.eval, builtins.exec, sympy_parser.stringify_expr = run_eval, run_exec, stringify


def marked(text: str) -> bool:
    """Whether a text marks its mathematics, by dollars, brackets or a box."""
    return any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))


class Mathematics:
    """Compares mathematical answers by math-verify, within its own time limits, which need a process's main thread."""

    def __init__(self) -> None:
        self.library: Any = import_module("math_verify")
        self.golds: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """`verdict`: right, wrong, none (the completion states no answer) or gold (the expected one cannot be read)."""
        expected, given, limit = request["expected"], request["given"], request["timeout"]
        if expected not in self.golds:
            with guarded():  # data is as much somebody's text as a completion is
                self.golds[expected] = self._parsed(expected, limit, alone=True)
        gold = self.golds[expected]
        if not gold:
            return {"verdict": "gold"}
        if given is None:
            return {"verdict": "none"}
        with guarded():
            found = self._parsed(given, limit, alone=False)
            if not found:
                return {"verdict": "none"}
            return {"verdict": "right" if self.library.verify(gold, found, timeout_seconds=limit) else "wrong"}

    def _parsed(self, text: str, limit: int, alone: bool) -> Any:
        """What math-verify reads in a text. `alone`: one that marks nothing is the answer and nothing else."""
        if alone and "####" in text:
            text = text.rpartition("####")[2]
        text = text.strip()
        if alone and not marked(text):
            text = f"${text}$"
        found = self.library.parse(text, parsing_timeout=limit)
        return found if any(not isinstance(part, str) for part in found) else []


def stand_in_for_pycosat() -> None:
    """Let python-sat solve what reasoning-gym asks of pycosat, where that is not installed: it has no wheels.

    One task asks, and only whether a puzzle has a second solution, so the problems are the same with either.
    """
    if find_spec("pycosat") is not None:
        return
    solver: Any = import_module("pysat.solvers").Solver

    def itersolve(clauses: list[tuple[int, ...]]) -> Iterator[list[int]]:
        with solver(name="minisat22", bootstrap_with=clauses) as opened:
            yield from opened.enum_models()

    module = ModuleType("pycosat")
    module.itersolve = itersolve  # type: ignore[attr-defined]
    sys.modules["pycosat"] = module


class Gyms:
    """Data sets of reasoning-gym by what they were asked for with, each made when it is first asked for."""

    def __init__(self) -> None:
        stand_in_for_pycosat()
        import_module("reasoning_gym")
        self.made: dict[str, Gym] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """See `Gym.answer`; `known` names the tasks where there is none of this name."""
        key = json.dumps(request["of"], sort_keys=True)
        if key not in self.made:
            try:
                self.made[key] = Gym(**request["of"])
            except UnknownTaskError as error:
                return {"known": error.args[0]}
        return self.made[key].answer(request)


class Gym:
    """One data set of reasoning-gym: makes its problems, scores answers to them."""

    def __init__(self, task: str, options: dict[str, Any], size: int, seed: int) -> None:
        library: Any = import_module("reasoning_gym")
        known = sorted(library.factory.DATASETS)
        if task not in known:
            raise UnknownTaskError(known)
        if task == "composite":
            part: Any = import_module("reasoning_gym.composite").DatasetSpec
            options = {**options, "datasets": [part(**given) for given in options.get("datasets", [])]}
        self.data = library.create_dataset(task, **options, size=size, seed=seed)
        self.entries: dict[int, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Without an answer the problem itself; with one its `score`, 0 where the scorer cannot read it."""
        index = request["index"]
        if index not in self.entries:
            self.entries[index] = self.data[index]
        entry = self.entries[index]
        if "given" not in request:
            known = entry["answer"]
            return {"question": str(entry["question"]), "answer": None if known is None else str(known)}
        try:
            with guarded():
                return {"score": float(self.data.score_answer(request["given"], entry))}
        except (Exception, SystemExit):  # noqa: BLE001 - scorers of answers of a certain form raise anything at others
            return {"score": 0.0}


def serve(scorer: Any, lines: Any, write: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more."""
    for line in lines:
        request = json.loads(line)
        try:
            reply = scorer.answer(request)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the asker says what it was
            reply = {"error": f"{type(error).__name__}: {error}"}
        write({**reply, "id": request["id"]})


def main() -> None:
    """Be the process: the first line says which scorer."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(MOST_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))

    def write(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")

    first = json.loads(sys.stdin.readline())
    try:
        scorer: Any = Mathematics() if first["scorer"] == "math" else Gyms()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken installation raises anything
        write({"id": 0, "error": f"{type(error).__name__}: {error}"})
        return
    write({"id": 0})
    serve(scorer, sys.stdin, write)


if __name__ == "__main__":
    main()
