"""What users import: every public name is there, and naming the package costs next to nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tether


@pytest.mark.parametrize("name", tether.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(tether, name)
    assert inspect.isclass(thing) or callable(thing)
    assert inspect.getdoc(thing)
    assert thing.__module__.startswith("tether.")
    assert thing.__name__ == name


def test_names_are_said_alike_to_people_and_to_type_checkers() -> None:
    tree = ast.parse(Path(tether.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {(module, name) for module, names in tether._HOMES.items() for name in names}
    assert sorted(tether.__all__) == dir(tether) == sorted(name for _, name in typed)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tether' has no attribute 'PPOTrainer'"):
        _ = tether.PPOTrainer


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    ask = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, sep='\\n')"
    process = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True)
    return set(process.stdout.split("\n"))


def test_importing_the_package_loads_no_library() -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "tyro", "rich", "gymnasium", "pyarrow", "tensorboard"}
    assert not heavy & imported_by("import tether")
    assert not heavy & imported_by("import tether.cli")
    assert "tether" in imported_by("import tether")


def test_the_core_needs_torch_alone() -> None:
    loaded = imported_by("import tether; tether.Learner")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "gymnasium", "tyro", "rich", "pyarrow"}
