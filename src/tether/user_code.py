"""Importing what a user names: a file from wherever it lies, or a module. Knows nothing of what is in it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

from tether.errors import UserError


def import_place(
    place: str, label: str, kind: str, example: str, guard: Callable[[str], AbstractContextManager[None]]
) -> ModuleType:
    """The module that `place` names: a path that ends in .py, or a dotted name.

    A file is imported under a name of its own; the folder it lies in, or the current one for a module, is importable
    meanwhile.

    Args:
        place: what the user wrote before the colon.
        label: with which messages begin.
        kind: part of the name under which a file is imported, such as `reward`.
        example: how a file is named, for the message where a module is not found.
        guard: given the path or the name, a context that turns whatever the user's code raises into a UserError.

    Raises:
        UserError: there is no such file or module, or it fails when imported.
    """
    if place.endswith(".py"):
        return _import_file(Path(place), label, kind, guard)
    return _import_module(place, label, example, guard)


def _import_file(path: Path, label: str, kind: str, guard: Callable[[str], AbstractContextManager[None]]) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{label}: no such file: {path} (seen from {Path.cwd()})")
    path = path.resolve()
    # A name of its own, so that a file called random.py hides nothing; another one when the file was changed.
    state = f"{path}:{path.stat().st_mtime_ns}"
    name = f"tether_{kind}_{path.stem}_{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # the suffix is .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    try:
        with _importable(path.parent), guard(str(path)):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(
    name: str, label: str, example: str, guard: Callable[[str], AbstractContextManager[None]]
) -> ModuleType:
    with _importable(Path.cwd()), guard(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only when the module itself, or a package on the way to it, is what was not found.
            if error.name is None or not (name + ".").startswith(error.name + "."):
                raise
            remedy = f"; a file is named with its suffix: `{example}`" if "/" in name or "." not in name else ""
            raise UserError(f"{label}: no module `{error.name}` is installed or in {Path.cwd()}{remedy}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the import path while something is imported; last afterwards, for what it imports later."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:  # the module may have changed the path itself
            sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)
