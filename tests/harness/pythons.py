"""Other Pythons of this machine that can run the agent, which nodes have in all ages."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["agent_python"]

ROOT = Path(__file__).resolve().parents[2]
PYZMQ = "pyzmq==26.2.0"
"""The last one with wheels for Python 3.8, and for all that came since."""


@functools.cache
def agent_python(version: str) -> str:
    """A Python of that version (3.8) with pyzmq; made once, and kept beside the other environments."""
    environment = ROOT / f".venv-agent-{version}"
    python = environment / "bin" / "python"
    if _has_zmq(python):
        return str(python)
    base = _found(version)
    if base is None:
        pytest.skip(f"not applicable: there is no Python {version}")
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(environment)], check=True, capture_output=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--only-binary=:all:", PYZMQ]
    subprocess.run(install, check=False, capture_output=True, timeout=300)
    if not _has_zmq(python):
        pytest.skip(f"not applicable: Python {version} has no pyzmq, and none can be installed")
    return str(python)


def _found(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *(f"{one}/bin/python" for one in pyenv.glob(f"{version}.*"))]
    what = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if candidate is not None and _says(candidate, what) == version:
            return candidate
    return None


def _has_zmq(python: Path) -> bool:
    return python.exists() and _says(str(python), "import zmq; print(zmq.has('curve'))") == "True"


def _says(python: str, code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    return done.stdout.strip()
