"""Other Pythons of this machine: for the agent, which nodes have in all ages, and those that the gateway promises."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["OTHERS", "agent_python", "gateway_python"]

ROOT = Path(__file__).resolve().parents[2]
PYZMQ = "pyzmq==26.2.0"
"""The last one with wheels for Python 3.8, and for all that came since."""
PROMISED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
OTHERS = [version for version in PROMISED if version != f"{sys.version_info.major}.{sys.version_info.minor}"]
"""The versions that the package is said to run on, but for the one that runs the tests."""


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


def gateway_python(version: str) -> Path:
    """A Python of that version with what the demonstration's lock says; made once, and again where the lock changes."""
    base = _found(version)
    if base is None:
        pytest.skip(f"not applicable: there is no Python {version}")
    environment = ROOT / f".venv-wheel-{version}"
    made = subprocess.run(
        [base, str(ROOT / "requirements" / "install.py"), str(environment), "demo"],
        capture_output=True,
        text=True,
        check=False,
        env=_clean(),
        timeout=600,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return environment / "bin" / "python"


def _found(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *(f"{one}/bin/python" for one in pyenv.glob(f"{version}.*"))]
    what = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if candidate is not None and _says(candidate, what) == version:
            return candidate
    return None


def _has_zmq(python: Path) -> bool:
    return python.exists() and _says(str(python), "import zmq; print(zmq.has('curve'))") == "True"


def _says(python: str, code: str) -> str:
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, env=_clean(), timeout=60
    )
    return done.stdout.strip()


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
