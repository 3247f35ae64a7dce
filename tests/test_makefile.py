"""`make sync`, with a uv that only notes what it was asked for: failures say why and leave .venv alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UV = """#!/bin/sh
echo "$@" >> asked
case "$*" in
    *"$(cat fails 2>/dev/null || echo nothing)"*) echo "error: it broke" >&2; exit 2;;
    "pip freeze"*) printf 'numpy==2.0\\nnvidia-cublas==13.1\\ncuda-toolkit==13.0\\ntriton==3.0\\nmy-own==1.0\\n';;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with an environment whose torch is the default one, and a lock file newer than that."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "uv").write_text(UV)
    (tmp_path / "uv").chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\n")
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / ".venv" / ".torch").write_text("default\n")
    os.utime(tmp_path / ".venv" / ".torch", (0, 0))
    return tmp_path


def sync(clone: Path, *words: str) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of the errors, what uv was asked for."""
    made = subprocess.run(
        ["make", "sync", "UV=./uv", *words], cwd=clone, capture_output=True, text=True, timeout=120, check=False
    )
    asked = clone / "asked"
    return made.returncode, made.stderr.splitlines(), asked.read_text().splitlines() if asked.exists() else []


def why_not(clone: Path, index: str) -> list[str]:
    made = subprocess.run(
        ["sh", ".ci/why-not", index, "do that"], cwd=clone, capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 1
    return made.stderr.splitlines()


def test_packages_of_a_users_own_stay(clone: Path) -> None:
    code, _, asked = sync(clone)
    assert code == 0
    assert any(line.startswith("sync --inexact --frozen") for line in asked)
    assert sync(clone)[2] == asked  # nothing is left to do


def test_the_small_torch_takes_the_place_of_the_other_and_what_only_that_needed_goes(clone: Path) -> None:
    code, _, asked = sync(clone, "TORCH=cpu", "TORCH_SPEC=some.whl")
    assert code == 0
    install = next(line for line in asked if line.startswith("pip install"))
    assert "--reinstall-package torch" in install
    assert "some.whl" in install
    assert "pip uninstall --quiet --python .venv nvidia-cublas cuda-toolkit triton" in asked
    assert not any("venv --quiet" in line for line in asked)  # packages are changed in the environment that is there
    assert (clone / ".venv" / ".torch").read_text() == "cpu\n"


def test_the_real_model_is_downloaded_where_it_is_asked_for_alone(clone: Path) -> None:
    assert not any("real" in line for line in sync(clone)[2])
    subprocess.run(["make", "sync-real", "UV=./uv"], cwd=clone, check=True, timeout=120, capture_output=True)
    asked = (clone / "asked").read_text().splitlines()
    assert any(line.startswith("export") and "--frozen" in line and "--only-group real" in line for line in asked)
    assert asked[-1] == "pip install --quiet --python .venv -r .venv/real.txt"


@pytest.mark.parametrize("words", [(), ("TORCH=cpu",)])
def test_a_failure_ends_with_why_and_leaves_the_environment(clone: Path, words: tuple[str, ...]) -> None:
    (clone / "fails").write_text("--compile-bytecode")
    code, errors, _ = sync(clone, *words)
    assert code != 0
    assert errors[0] == "error: it broke"
    assert errors[1].startswith("make: ")
    assert "; .venv is as it was" in errors[1]
    assert (clone / ".venv" / ".torch").read_text() == "default\n"
    assert (clone / ".venv" / "bin" / "python").exists()


def test_an_index_that_cannot_be_reached_is_named_with_the_remedy(clone: Path) -> None:
    (line,) = why_not(clone, "http://127.0.0.1:9/simple/")
    assert line.startswith("make: http://127.0.0.1:9/simple/ cannot be reached (")
    assert line.endswith("; .venv is as it was: do that")
    shutil.rmtree(clone / ".venv")
    assert ".venv" not in why_not(clone, "http://127.0.0.1:9/simple/")[0]
