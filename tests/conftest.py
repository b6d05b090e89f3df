"""Fixtures that every suite may use: a real gateway process and what stands around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.gateway import GatewayProcess

pytest_plugins = ["tests.report", "tests.harness.databases"]

PYTHON = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
"""As ipykernel installs its own kernelspec."""
DYING = ["/bin/sh", "-c", "echo 'cannot open shared object file: libcudart.so.12' >&2; exit 3", "{connection_file}"]


def kernelspec(argv: list[str], display_name: str, **more: Any) -> dict[str, Any]:
    """A kernelspec for tests."""
    return {"argv": argv, "display_name": display_name, "language": "python", "metadata": {}, **more}


KERNELSPECS: dict[str, dict[str, Any]] = {
    "python": kernelspec(PYTHON, "Python"),
    "message_mode": kernelspec(
        PYTHON,
        "Python, interrupted by message",
        interrupt_mode="message",
    ),
    "dies": kernelspec(DYING, "Dies at start"),
    "missing": kernelspec(["/nonexistent/interpreter", "{connection_file}"], "Not installed"),
    "flood": kernelspec(
        [sys.executable, str(Path(__file__).parent / "harness" / "flood_kernel.py"), "-f", "{connection_file}"], "Flood"
    ),
}


@pytest.fixture
def make_gateway(tmp_path: Path, db_url: Callable[[], str | None]) -> Iterator[Callable[..., GatewayProcess]]:
    """Makes gateway processes (not started), on the database under test; ends them and their kernels."""
    made: list[GatewayProcess] = []

    def make(**options: Any) -> GatewayProcess:
        options.setdefault("kernelspecs", KERNELSPECS)
        options.setdefault("db_url", db_url())
        gateway = GatewayProcess(tmp_path / f"gateway{len(made)}", **options)
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(make_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    """A running gateway with the users alice and bob."""
    return make_gateway().start()


def pytest_configure(config: pytest.Config) -> None:
    """Kernels of tests must not read the developer's own Jupyter configuration."""
    os.environ["JUPYTER_NO_CONFIG"] = "1"
