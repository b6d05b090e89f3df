"""The wheel, installed in a clean venv outside of the checkout, runs everything; on each Python that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import httpx
import pytest

from hub_gateway.db.revision import HEAD
from hub_gateway.demo.processes import find_proxy
from tests.e2e.conftest import ONCE
from tests.harness.gateway import ROOT
from tests.harness.notebook import Notebook
from tests.harness.pythons import OTHERS, gateway_python
from tests.harness.waiting import until

pytestmark = ONCE

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "PYTHON", "HUB_GATEWAY_", "KERNEL_"))}
IMPORT_ALL = """
import importlib, pkgutil, hub_gateway
names = [module.name for module in pkgutil.walk_packages(hub_gateway.__path__, "hub_gateway.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), "modules of", hub_gateway.__file__)
"""


def run(*command: str | Path, cwd: Path, timeout: float = 600) -> str:
    """Run a command; its standard output."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=CLEAN,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    made = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={made}", ROOT, cwd=made)
    return made


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a new venv with the wheel, and what the lock file says for the demonstration."""
    directory = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps")
    run(*pip, "--require-hashes", "-r", ROOT / "requirements" / "demo.txt", cwd=directory)
    run(*pip, next(dist.glob("*.whl")), cwd=directory)
    run(python, "-m", "pip", "check", cwd=directory)  # the lock satisfies what the wheel asks for
    return python.parent


@pytest.fixture(params=["this", *OTHERS])
def installed(request: pytest.FixtureRequest, dist: Path) -> Path:
    """The bin directory of an environment with the wheel, for each Python of this machine that it promises."""
    if request.param == "this":
        found: Path = request.getfixturevalue("clean")
        return found
    python = gateway_python(request.param)
    again = ("install", "--quiet", "--no-deps", "--no-index", "--force-reinstall")
    run(python, "-m", "pip", "--disable-pip-version-check", *again, next(dist.glob("*.whl")), cwd=dist)
    run(python, "-m", "pip", "check", cwd=dist)
    return python.parent


def test_what_lies_at_the_top_travels_in_both(dist: Path) -> None:
    wheel = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    for directory in ("launchers", "kernelspecs", "migrations", "jupyterhub_config"):
        here = {
            path.relative_to(ROOT / directory).as_posix()
            for path in (ROOT / directory).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert here <= {n.removeprefix(f"hub_gateway/_{directory}/") for n in wheel}, f"{directory} in the wheel"
        assert {f"{directory}/{name}" for name in here} <= sdist, f"{directory} in the sdist"
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hub_gateway").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= wheel
    assert package <= sdist
    assert not [name for name in wheel if "__pycache__" in name or name.startswith("tests/")]


def test_a_gateway_from_the_wheel_runs_a_cell(installed: Path, tmp_path: Path) -> None:
    command, state = installed / "jupyter-hubgateway", tmp_path / "state"
    common = (f"--state-dir={state}", f"--token-file={tmp_path / 'tokens.yaml'}")
    assert f"modules of {installed.parent}" in run(installed / "python", "-c", IMPORT_ALL, cwd=tmp_path)
    token = run(command, "token", "alice", f"--file={tmp_path / 'tokens.yaml'}", cwd=tmp_path).strip()
    assert HEAD in run(command, "db", "upgrade", *common, cwd=tmp_path)
    checked = run(command, "check", *common, cwd=tmp_path)
    assert "error" not in {line.split()[0] for line in checked.splitlines()}, checked
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [command, *common, "--port=0"], cwd=tmp_path, env=CLEAN, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:

        def address() -> str | None:
            assert gateway.poll() is None, (tmp_path / "log").read_text()
            try:
                url = str(json.loads((state / "gateway.json").read_text())["url"]).rstrip("/")
                return url if httpx.get(f"{url}/readyz").status_code == 200 else None
            except (OSError, ValueError, KeyError, httpx.HTTPError):
                return None

        url = until(address, "the gateway to be ready", timeout=60)
        headers = {"Authorization": f"token {token}"}
        made = httpx.post(f"{url}/api/kernels", json={}, headers=headers, timeout=30)
        assert made.status_code == 201, made.text
        kernel_id = made.json()["id"]
        with Notebook("ws" + url.removeprefix("http"), kernel_id, headers) as notebook:
            assert str(installed.parent) in notebook.execute("import sys; print(sys.prefix)").text
        assert httpx.delete(f"{url}/api/kernels/{kernel_id}", headers=headers, timeout=30).status_code == 204
    finally:
        gateway.terminate()
        assert gateway.wait(30) == 0


def test_the_demonstration_runs_from_the_wheel(clean: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(clean), str(Path(find_proxy()[0]).parent), CLEAN.get("PATH", os.defpath)])
    done = subprocess.run(
        [clean / "jupyter-hubgateway", "demo", "--check"],
        cwd=tmp_path,
        env={**CLEAN, "PATH": path, "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "demo: ok"
