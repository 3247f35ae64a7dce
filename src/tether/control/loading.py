"""Import what a configuration names, `file.py:name` or `package.module:name`, and say in one line what failed.

Knows nothing of environments.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import gymnasium

from tether.errors import UserError
from tether.yaml_file import one_line

INSTALL = '`pip install "tether[control]"` brings Box2D, MuJoCo and the Atari games'
_NOT_THE_USERS = (str(Path(__file__).parent), str(Path(traceback.__file__).parent))  # this room, the standard library


def import_named(label: str, place: str) -> ModuleType:
    """The module that `place` names, a file with its suffix or a module's dotted name.

    A file is imported from wherever it lies, under a name of its own; the folder it lies in, or the current one for a
    module, is importable meanwhile.

    Raises:
        UserError: there is none, or it fails when imported. The message begins with `label`.
    """
    return _import_file(label, Path(place)) if place.endswith(".py") else _import_module(label, place)


def _import_file(label: str, path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{label}: no such file: {path} (seen from {Path.cwd()})")
    path = path.resolve()
    # A name of its own, so that a file called random.py hides nothing; another one when the file was changed.
    state = f"{path}:{path.stat().st_mtime_ns}"
    name = f"tether_environment_{path.stem}_{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # the suffix is .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    try:
        with _importable(path.parent), one_line_errors(f"{label}: fails when imported"):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(label: str, name: str) -> ModuleType:
    with _importable(Path.cwd()), one_line_errors(f"{label}: fails when imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only when the module itself, or a package on the way to it, is what was not found.
            if error.name is None or not (name + ".").startswith(error.name + "."):
                raise
            remedy = "; a file is named with its suffix: `file.py:make_env`" if "/" in name or "." not in name else ""
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


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Whatever is raised inside as a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{what}: {one_line(str(error))[:200]} ({INSTALL})") from error
    except SyntaxError as error:
        raise UserError(
            f"{what}: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Kind, message and place of an exception from a user's code, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(_NOT_THE_USERS) and "site-packages" not in frame.filename
    ]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    text = one_line(str(error))[:300]
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"
