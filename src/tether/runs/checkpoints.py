"""Checkpoints: folders that are there whole or not at all, whatever happened while they were written.

    checkpoints/iteration-000012/            what the caller wrote, and
    checkpoints/iteration-000012/manifest.json   {"iteration": 12, "files": {path: {"size": bytes, "sha256": hex}}}

A checkpoint is written under a name that starts with a dot, flushed to the disk, and renamed. Which one is the latest
is said by the numbers alone. Knows nothing of what is inside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from tether.errors import UserError

logger = logging.getLogger("tether")

_NAME = re.compile(r"iteration-(\d{6,})")
_MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, iteration: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Let `write` fill a folder and put it in place as the checkpoint of `iteration`; keep the `keep` newest.

    A whole checkpoint of this iteration that is already there is left as it is: the state after an iteration is one.

    Raises:
        UserError: the disk refused (full, read-only). Earlier checkpoints are untouched.
    """
    final = folder / f"iteration-{iteration:06d}"
    if final.exists():
        if broken(final) is None:
            return final
        _remove(final)
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        _write_manifest(partial, iteration)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final}: cannot save the checkpoint: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for _, old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, path), oldest first, broken ones included."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that is as it was written, or None. Broken ones are passed over with a warning each."""
    for iteration, path in reversed(list_checkpoints(folder)):
        fault = broken(path)
        if fault is None:
            return iteration, path
        logger.warning("%s: broken (%s), looking for an older one", path, fault)
    return None


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest has the size and SHA-256 of its writing."""
    try:
        files = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes, expected {entry['size']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, path)} is missing"
    except OSError as error:
        return f"{os.path.relpath(error.filename, path)} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is damaged"
    return None


def remove_after(folder: Path, iteration: int) -> None:
    """Remove the checkpoints of later iterations and what an interrupted save or removal left behind."""
    for number, path in list_checkpoints(folder):
        if number > iteration:
            _remove(path)
    if folder.is_dir():
        for path in folder.glob(".iteration-*"):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Under another name first: a removal that is interrupted must not look like a broken checkpoint."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _write_manifest(folder: Path, iteration: int) -> None:
    """List every file and flush it to the disk, the manifest and the folders last."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({"iteration": iteration, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
