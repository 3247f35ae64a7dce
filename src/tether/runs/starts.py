"""Each start of a run, as a line of `starts.jsonl`: the command, the code, the versions and the machine.

The environment's variables are never written, and values of flags that may be secrets are masked.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

STARTS_FILE = "starts.jsonl"
PACKAGES = ("tether", "torch", "transformers")
GIT_SECONDS = 5.0  # that git may take
MASK = "***"
# of flags and fields that may hold a secret
_NAMES = "key|token(?!iz)|passw|pwd|secret|auth|credential|bearer|sig(?:nature)?\\b"
_SECRET = re.compile(_NAMES, re.IGNORECASE)
_WITHIN = re.compile(rf"([\w.-]*(?:{_NAMES})[\w.-]*=)[^&\s]+", re.IGNORECASE)  # x?api_key=…
_FIELD = re.compile(rf"([\w.-]*(?:{_NAMES})[\w.-]*[\"']?\s*:\s*[\"']?)(?:Bearer\s+)?[^&\s\"',}}]+", re.IGNORECASE)
_LOGIN = re.compile(r"(\w://)\S+@")  # to the last @: a password may hold one


def describe_start(device: torch.device, iteration: int = 0) -> dict[str, Any]:
    """What is known of a run that starts or goes on: a line of `starts.jsonl`.

    Args:
        device: where the parameters are.
        iteration: the one that it goes on from; 0 for a new run.
    """
    return {
        "time": time.time(),
        "iteration": iteration,
        "command": shlex.join([_program(sys.argv[0]), *masked(sys.argv[1:])]),
        "folder": _working_folder(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": _machine(device),
    }


def append_start(folder: Path, start: dict[str, Any]) -> None:
    """Add a line. Raises OSError where it cannot be written."""
    file = folder / STARTS_FILE
    torn = file.exists() and not file.read_bytes().endswith(b"\n")  # by a kill: a line of its own for the next
    with file.open("a", encoding="utf-8") as stream:
        stream.write(("\n" if torn else "") + json.dumps(start) + "\n")


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None


def _program(path: str) -> str:
    """`tether`, wherever it is installed and as `python -m tether` too; the path of any other program."""
    file = Path(path)
    return "tether" if file.name == "tether" or file.parts[-2:] == ("tether", "__main__.py") else path


def masked(arguments: Sequence[str]) -> list[str]:
    """A command line, with *** for each value that may be a secret.

    That is all values of a flag whose name may stand for one (key, token, password, auth, …), unless it only counts
    tokens; the same within a value (`judge?api_key=…`, `{"token": …}`); and a login within an address.
    """
    shown: list[str] = []
    hides_next = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if hides_next and not word.startswith("--"):
            shown.append(word if _counts(shown[-1], word) else MASK)
        elif word.startswith("--") and _SECRET.search(name):
            hides_next = not equals
            shown.append(word if not equals or _counts(name, value) else f"{name}={MASK}")
        else:
            hides_next = False
            shown.append(without_secrets(_FIELD.sub(rf"\1{MASK}", word)))
    return shown


def without_secrets(text: str) -> str:
    """A text with *** for what stands behind `api_key=` and the like, and for logins within addresses."""
    return _LOGIN.sub(rf"\1{MASK}@", _WITHIN.sub(rf"\1{MASK}", text))


def _counts(name: str, value: str) -> bool:
    """Whether a flag such as --sampling.max-new-tokens gives a number of tokens."""
    return value.isdecimal() and not _SECRET.search(re.sub("tokens", "", name, flags=re.IGNORECASE))


def _commit() -> dict[str, Any] | None:
    """The commit of the working directory, and whether tracked files differ from it; None where there is none."""
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    lines = found.stdout.splitlines()
    ids = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    if found.returncode or not ids or not re.fullmatch("[0-9a-f]{40,64}", ids[0]):
        return None
    return {"id": ids[0], "dirty": any(not line.startswith("#") for line in lines)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory() -> int | None:
    """Bytes of the machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
