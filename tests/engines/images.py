"""Root file systems for container images, from Debian's and Python's package indexes alone: no registry is needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from tests.engines import SYSTEM_PATH

__all__ = ["debian_archive", "root_archive"]

SUITE = "bookworm"
PYTHON = "3.11"
"""Python of that suite."""
# With python3 itself debootstrap fails: its postinst compiles with a Python that is not configured yet.
DEBIAN = ("python3-minimal", "libpython3-stdlib", f"libpython{PYTHON}-stdlib")
UNUSED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")


def root_archive() -> Path:
    """A tar of Debian with Python, pyzmq and ipykernel; made at first, for a minute, and kept in the user's cache."""
    wheels = closure("ipykernel")
    return _kept("python", wheels, lambda root: _with_python(root, wheels), DEBIAN)


def debian_archive() -> Path:
    """A tar of Debian and nothing else, as images are built on."""
    return _kept("debian", [], lambda root: None, ())


def _kept(name: str, recipe_of: list[str], finish: Callable[[Path], None], packages: tuple[str, ...]) -> Path:
    """The archive of that name, made where the recipe has changed since."""
    recipe = "\n".join((Path(__file__).read_text(), *mirror(), *recipe_of))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hub-gateway" / "images"
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}.tar"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for outdated in cache.glob(f"{name}-*.tar*"):
                outdated.unlink()
            _make(made, finish, packages)
    return made


def _make(made: Path, finish: Callable[[Path], None], packages: tuple[str, ...]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="hgt-image-"))
    try:
        root = directory / "root"
        include = [f"--include={','.join(packages)}"] if packages else []
        _run("debootstrap", "--variant=minbase", *include, SUITE, str(root), *mirror())
        finish(root)
        for path in UNUSED:
            shutil.rmtree(root / path, ignore_errors=True)
        unfinished = made.with_suffix(".tar.part")
        _run("tar", "-C", str(root), "--numeric-owner", "-cf", str(unfinished), ".")
        unfinished.replace(made)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _with_python(root: Path, wheels: list[str]) -> None:
    packages = root / "usr" / "local" / "lib" / f"python{PYTHON}" / "dist-packages"
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
        *(f"--target={packages}", *wheels),
    )


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}", "LANG": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}"


def closure(name: str) -> list[str]:
    """A distribution and all that it needs, in the versions that are installed here: `name==version`."""
    found: dict[str, str] = {}
    missing = [name]
    while missing:
        one = re.split(r"[^\w.-]", missing.pop(), maxsplit=1)[0]
        if one.lower() in found:
            continue
        try:
            distribution = metadata.distribution(one)
        except metadata.PackageNotFoundError:
            continue  # an optional one, or for another platform
        found[one.lower()] = f"{one}=={distribution.version}"
        missing += [need for need in distribution.requires or () if "extra ==" not in need]
    return sorted(found.values())


def mirror() -> list[str]:
    """The Debian mirror that this machine uses; none where that is not known: debootstrap has one of its own."""
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in lists:
        if path.suffix in (".list", ".sources") and path.is_file():
            for address in re.findall(r"https?://\S+", path.read_text()):
                if re.search(r"/debian/?$", address):
                    return [str(address)]
    return []
