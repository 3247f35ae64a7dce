"""What the server answers: JSON of anything that a store may hold, and every mistake as one line with its status.

Knows nothing of runs or labels.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tether.errors import UserError, reason


class NotFoundError(UserError):
    """What was asked for is not there."""


class ForbiddenError(UserError):
    """It may be there, and is not for the page."""


class UnfitError(UserError):
    """A value that can be read and not be used."""


class ConflictError(UserError):
    """Something has changed since the page read it."""


DAMAGED = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, StopIteration)
"""What reading data of the wrong form raises."""

STATUS: dict[type[UserError], int] = {NotFoundError: 404, ForbiddenError: 403, UnfitError: 422, ConflictError: 409}


class Json(Response):
    """JSON in ASCII, so that half of a surrogate pair gets through too; NaN and infinities become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """`content` as bytes."""
        try:
            return _dumps(content)
        except ValueError:  # there is a NaN or an infinity somewhere
            return _dumps(finite(content))


def _dumps(content: Any) -> bytes:
    # a damaged store may hold bytes where text belongs: `default`
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str).encode("ascii")


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no notation for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What a damaged or half-written file makes readers raise, as one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read: {error.strerror or error}") from error
    except (sqlite3.Error, *DAMAGED) as error:
        raise UserError(f"{file.name}: damaged: {reason(error)}") from error


def problem(status: int, line: str) -> Json:
    """A mistake as every one is told."""
    return Json({"error": " ".join(line.split())}, status)


def add_handlers(app: FastAPI) -> None:
    """Mistakes become their status and one line, whatever raised them."""

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Json:
        return problem(STATUS.get(type(error), 400), str(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Json:
        reply = problem(error.status_code, str(error.detail))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> Json:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return problem(422, f"{place}: {first['msg']}")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Json:
        return problem(500, f"the studio failed: {reason(error)}; the terminal that it runs in says more")
