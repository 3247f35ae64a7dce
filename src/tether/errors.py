"""What a user did that cannot work, said in one line. Knows nothing of any room of the house."""

import traceback
from pathlib import Path


class UserError(Exception):
    """A mistake in what came from outside: a file, a field, a reward function, a model folder.

    The message is one line that names the place (file, row, field), what was found and what was expected.
    The command line prints it without a traceback and exits with code 2; from Python it is an ordinary exception.
    """


STOPS = (KeyboardInterrupt, GeneratorExit)
"""What ends a program from outside. Whatever else is raised in what a user brought is a mistake there: SystemExit too,
and what a library derives from BaseException, such as the panics of one that is written in Rust."""


class RewardError(UserError):
    """A reward function raised, hung or returned something that is not one finite number per completion."""


def reason(error: BaseException) -> str:
    """An exception of a library in one line: its kind, and the first 300 characters of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def exited(error: SystemExit) -> UserError:
    """What to say where code that was brought, or a library, would end the program, which passes for success."""
    own = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    place = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return UserError(f"SystemExit ({error.code}) was raised{place}: raise another exception there, or return")
