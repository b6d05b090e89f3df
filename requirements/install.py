#!/usr/bin/env python3
"""Make the environment that a Makefile target needs: `install.py ENVIRONMENT GROUP...`.

ENVIRONMENT is a directory for a venv; each GROUP is a lock file beside this script (`demo`, `test`, ...), or
`project` (this checkout, editable), or `chp` (configurable-http-proxy from npm, with Node.js from the
lock file `node` where the machine has none that is new enough), or `kerberos` (built here, as there are no wheels;
left out with one line where a compiler or the headers of MIT Kerberos are missing).

It runs on a bare Python 3.10 with its venv module. What is installed already is recorded in the environment
with the hash of its lock file, so that a second run does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
NODE_MAJOR = 20
"""What configurable-http-proxy asks for."""


def stop(message: str) -> None:
    """End with one line that says what to do."""
    sys.exit(f"install.py: {message}")


def run(command: list[str], **more: object) -> None:
    """Run a command; its failure is ours."""
    print("+", " ".join(command), flush=True)
    try:
        subprocess.run(command, check=True, cwd=ROOT, **more)  # type: ignore[call-overload]
    except subprocess.CalledProcessError as error:
        stop(f"this command failed with exit code {error.returncode}: {' '.join(command)}")


def digest(*paths: Path) -> str:
    """One hash over the contents of files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes() + b"\0")
    return found.hexdigest()


class Environment:
    """A venv, and the record of what was installed into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / "bin"
        self.python = self.bin / "python"
        self.record = path / "installed.json"

    def create(self) -> None:
        """Make the venv if it is missing, broken (its Python was removed), or of another Python."""
        wanted = [sys.version, str(self.path)]
        done = self.done()
        if done.get("python") == wanted and subprocess.run([self.python, "-c", ""], check=False).returncode == 0:
            return
        if sys.version_info < (3, 10):  # noqa: UP036  (this is where an older one is told)
            stop(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}; try `make PYTHON=python3.11 ...`")
        if self.path.exists() and not self.record.exists() and any(self.path.iterdir()):
            stop(f"{self.path} exists and was not made by this script; remove it, or choose another: make VENV=DIR ...")
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError:
            stop("this Python has no venv module; on Debian: apt-get install python3-venv")
        self.path.mkdir(parents=True)
        self.save({})  # from here on the directory is ours, even if the next line is interrupted
        run([sys.executable, "-m", "venv", str(self.path)])
        self.save({"python": wanted})

    def done(self) -> dict[str, object]:
        """What was installed: group -> hash of its lock."""
        try:
            found = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save(self, done: dict[str, object]) -> None:
        self.record.write_text(json.dumps(done, indent=1))

    def once(self, group: str, stamp: str) -> bool:
        """Whether `group` still has to be installed in the state `stamp`."""
        return self.done().get(group) != stamp

    def finished(self, group: str, stamp: str) -> None:
        self.save({**self.done(), group: stamp})

    def pip(self, *arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        run([str(self.python), "-m", "pip", "install", *quiet, *arguments], env=environment)

    def locks(self, groups: list[str], *options: str) -> None:
        """Install lock files: exactly these files, checked by their hashes, and nothing else."""
        for group in groups:
            lock = LOCKS / f"{group}.txt"
            if not lock.is_file():
                stop(f"there is no group {group!r}: {lock} does not exist")
            stamp = digest(lock)
            if self.once(group, stamp):
                self.pip("--require-hashes", "--no-deps", *options, "-r", str(lock))
                self.finished(group, stamp)

    def project(self) -> None:
        """Install this checkout, editable: its commands, and its modules as they are in the work tree."""
        stamp = digest(ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "hub_gateway" / "_version.py")
        if self.once("project", stamp):
            # Without isolation: setuptools is in the lock, nothing is fetched.
            self.pip("--no-deps", "--no-build-isolation", "--no-index", "--editable", str(ROOT))
            self.finished("project", stamp)

    def kerberos(self) -> None:
        """Build what speaks to MIT's libraries, if this machine can."""
        lacking = [name for name in ("cc", "krb5-config") if shutil.which(name) is None]
        if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
            lacking.append("Python.h")
        if lacking:
            print(f"install.py: without Kerberos, as this machine has no {', no '.join(lacking)}")
            return
        self.locks(["kerberos-build"])
        self.locks(["kerberos"], "--no-build-isolation")

    def chp(self) -> None:
        """Install configurable-http-proxy into node_modules/, by its lock file."""
        stamp = digest(ROOT / "package.json", ROOT / "package-lock.json")
        program = ROOT / "node_modules" / ".bin" / "configurable-http-proxy"
        path = os.environ.get("PATH", os.defpath)
        if not node_is_new_enough():
            self.locks(["node"])
            path = f"{self.bin}{os.pathsep}{path}"
        if self.once("chp", stamp) or not program.exists():
            npm = shutil.which("npm", path=path)
            if npm is None:
                self.locks(["node"])  # Debian has node and npm in different packages
                path = f"{self.bin}{os.pathsep}{path}"
                npm = str(self.bin / "npm")
            quiet = ["--no-audit", "--no-fund", "--no-update-notifier"]
            run([npm, "ci", "--omit=dev", "--ignore-scripts", *quiet], env={**os.environ, "PATH": path})
            self.finished("chp", stamp)


def node_is_new_enough() -> bool:
    """Whether the machine's own Node.js can run configurable-http-proxy."""
    node = shutil.which("node")
    if node is None:
        return False
    answer = subprocess.run([node, "--version"], check=False, capture_output=True, text=True).stdout
    major = answer.strip().lstrip("v").split(".")[0]
    return major.isdigit() and int(major) >= NODE_MAJOR


def main() -> None:
    """Bring the environment to what was asked for."""
    if len(sys.argv) < 2:
        stop(str(__doc__))
    environment = Environment(Path(sys.argv[1]).absolute())
    environment.create()
    groups = sys.argv[2:]
    environment.locks([group for group in groups if group not in ("project", "chp", "kerberos")])
    if "project" in groups:
        environment.project()
    if "kerberos" in groups:
        environment.kerberos()
    if "chp" in groups:
        environment.chp()


if __name__ == "__main__":
    main()
