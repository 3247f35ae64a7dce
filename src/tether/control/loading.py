"""Import what a configuration names, `file.py:name` or `package.module:name`, and say in one line what failed.

Knows nothing of environments.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from tether.errors import STOPS, UserError
from tether.user_code import import_place
from tether.yaml_file import one_line

logger = logging.getLogger(__name__)

INSTALL = '`pip install "tether[control]"` brings Box2D, MuJoCo and the Atari games'
_NOT_THE_USERS = (str(Path(__file__).parent), str(Path(traceback.__file__).parent))  # this room, the standard library


def import_named(label: str, place: str) -> ModuleType:
    """The module that `place` names, a file with its suffix or a module's dotted name.

    A file is imported from wherever it lies, under a name of its own; the folder it lies in, or the current one for a
    module, is importable meanwhile.

    Raises:
        UserError: there is none, or it fails when imported. The message begins with `label`.
    """
    return import_place(
        place, label, "environment", "file.py:make_env", lambda _: one_line_errors(f"{label}: fails when imported")
    )


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Whatever is raised inside as a UserError of one line that begins with `what`."""
    try:
        yield
    except (UserError, *STOPS):
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{what}: {one_line(str(error))[:200]} ({INSTALL})") from error
    except SyntaxError as error:
        raise UserError(
            f"{what}: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
        ) from error
    except BaseException as error:
        raise UserError(f"{what}: {reason_of(error)}") from error


def close_told(environment: Any, label: str) -> None:
    """Close an environment. What goes wrong there is told, and no more: everything that it was for is done."""
    try:
        with one_line_errors(f"{label}: close failed"):
            environment.close()
    except UserError as error:
        logger.warning("%s", error)


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
