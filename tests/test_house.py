"""The rules of the house that can be read off the source: who imports whom, and that the core knows no world."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tether

SOURCE = Path(tether.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
CORE = sorted((SOURCE / "ppo").glob("*.py"))
NAMES = {path: str(path.relative_to(SOURCE)) for path in FILES}

WORLDS = {"language", "control"}
LEAVES = {
    *("errors", "yaml_file", "episode", "user_code", "devices", "pretrained", "memory", "uncertainty"),
    *("adapter_folders", "chat", "positions", "random_states", "tokens"),
}
"""What every room may import, since it imports none."""

BELOW: dict[str, set[str]] = {
    "adapter_folders": {"errors"},
    "ppo": set(),
    "train": {"ppo", "episode", "memory"},
    "config": LEAVES,
    "rewards": LEAVES,
    "runs": LEAVES | {"config", "ppo"},
    "language": LEAVES | {"config", "ppo", "rewards"},
    "control": LEAVES | {"config", "ppo", "rewards"},
    "pipeline": LEAVES | {"config", "ppo", "rewards", "runs", "train"} | WORLDS,
    "report": LEAVES | {"config", "runs"},
    "studio": LEAVES | {"config", "ppo", "rewards", "runs", "report"},
    "chat": {"errors"},
    "cli": LEAVES | {"config", "ppo", "rewards", "runs", "train", "pipeline", "report", "studio"} | WORLDS,
    "__main__": {"cli"},
    "devices": {"errors"},
    "errors": set(),
    "episode": set(),
    "memory": set(),
    "positions": set(),
    "pretrained": {"errors"},
    "random_states": set(),
    "tokens": set(),
    "uncertainty": set(),
    "user_code": {"errors"},
    "yaml_file": {"errors"},
}
"""What each room may import besides itself; arrows point down."""

WORDS_OF_A_WORLD = {
    *("prompt", "prompts", "response", "responses", "token", "tokens", "tokenizer", "eos", "pad", "text", "texts"),
    *("vocabulary", "logits", "transformers", "gym", "gymnasium", "env", "envs", "environment", "simulator"),
    *("language", "control", "image", "pixel"),
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of everything that a file imports, inside functions too."""
    package = ("tether", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_is_under_a_thousand_lines_and_the_loop_under_150() -> None:
    assert sum(lines(path) for path in CORE) < 1000
    assert lines(SOURCE / "train.py") < 150


@pytest.mark.parametrize("path", CORE, ids=NAMES.get)
def test_the_core_imports_torch_alone(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or name.startswith("tether.ppo"), name


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "__init__"], ids=NAMES.get)
def test_arrows_point_down(path: Path) -> None:
    own = room(path)
    assert own in BELOW, f"{NAMES[path]}: a room of which BELOW does not say what it may import"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "tether":
            assert parts[1] == own or parts[1] in BELOW[own], f"{NAMES[path]} imports {name}"


def test_the_worlds_do_not_know_each_other() -> None:
    for own, other in (("language", "control"), ("control", "language")):
        assert other not in BELOW[own]
        for path in FILES:
            if room(path) == own:
                assert not any(name.startswith(f"tether.{other}") for name in imports(path)), NAMES[path]


@pytest.mark.parametrize("path", [*CORE, SOURCE / "train.py"], ids=NAMES.get)
def test_the_core_and_the_loop_have_no_word_of_either_world(path: Path) -> None:
    """In code, comments and docstrings."""
    words = re.findall(r"[A-Z]?[a-z]+", path.read_text(encoding="utf-8").replace("_", " "))
    assert not {word.lower() for word in words} & WORDS_OF_A_WORLD


@pytest.mark.parametrize("path", [path for path in FILES if lines(path)], ids=NAMES.get)
def test_each_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{NAMES[path]} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_nothing_unpickles_and_nothing_trusts_remote_code_by_default(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = node.func.value
            assert not (isinstance(owner, ast.Name) and owner.id in {"torch", "pickle"}), NAMES[path]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not (isinstance(node.value, ast.Constant) and node.value.value is True), NAMES[path]
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & {name.split(".")[0] for name in imports(path)}
