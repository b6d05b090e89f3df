"""The conformance suite is run against every proxy, on its real engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hub_gateway.auth.base import Caller
from tests.contract.cases import UNIX_USERS, ProxyCase, administer
from tests.contract.mini import MiniGateway, Setup
from tests.contract.suite import case_named, params

PYTHON = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
DYING = ["/bin/sh", "-c", "echo 'libcudart.so.12: cannot open' >&2; exit 3", "{connection_file}"]
SPECS = {
    "python": {"argv": PYTHON, "display_name": "Python", "language": "python"},
    "message": {"argv": PYTHON, "display_name": "Python", "language": "python", "interrupt_mode": "message"},
    "loopback": {
        "argv": PYTHON,
        "display_name": "Python, by loopback",
        "language": "python",
        "metadata": {"hub_gateway": {"transport": "tcp"}, "supported_encryption": ["curve"]},
    },
    "dies": {"argv": DYING, "display_name": "Dies", "language": "none"},
    "silent": {"argv": ["/bin/sleep", "600", "{connection_file}"], "display_name": "Silent", "language": "none"},
    "nowhere": {"argv": ["/nonexistent/kernel", "{connection_file}"], "display_name": "Nowhere", "language": "none"},
}


@dataclass
class Bench:
    """A place for one gateway, on one proxy."""

    case: ProxyCase
    setup: Setup
    state_dir: Path
    gateway_ids: set[str] = field(default_factory=set)

    @property
    def alice(self) -> Caller:
        return Caller(self.case.users[0])

    @property
    def bob(self) -> Caller:
        return Caller(self.case.users[1])

    def add_spec(self, name: str, spec: Mapping[str, Any]) -> None:
        """One more kernelspec."""
        add_spec(self.state_dir / "kernels", name, spec)

    def gateway(self) -> MiniGateway:
        return MiniGateway(self.setup)

    def agents(self, gateway: MiniGateway) -> list[str]:
        self.gateway_ids.add(gateway.gateway_id)
        return self.case.agents(gateway.gateway_id)

    def leftovers(self, gateway: MiniGateway) -> list[str]:
        self.gateway_ids.add(gateway.gateway_id)
        return self.case.leftovers(gateway.gateway_id, self.state_dir)


def add_spec(kernels: Path, name: str, spec: Mapping[str, Any]) -> None:
    (kernels / name).mkdir(parents=True)
    (kernels / name / "kernel.json").write_text(json.dumps(spec))


@pytest.fixture(params=params())
def bench(request: pytest.FixtureRequest, db_url: Callable[[], str | None]) -> Iterator[Bench]:
    yield from bench_of(case_named(request.param), db_url())


def bench_of(case: ProxyCase, db_url: str | None) -> Iterator[Bench]:
    """The place for one test of a case; cleaned up when it is taken up again."""
    state_dir = Path(tempfile.mkdtemp(prefix="hgt-"))  # unix sockets need short paths
    gateway_ids: set[str] = set()
    try:
        config = case.prepare(state_dir)
        kernels = state_dir / "kernels"
        for name, spec in {**SPECS, **case.specs}.items():
            add_spec(kernels, name, spec)
        url = db_url or f"sqlite:///{state_dir}/gateway.sqlite"
        yield Bench(case, Setup(str(state_dir), url, (str(kernels),), config), state_dir, gateway_ids)
    finally:
        case.clean(gateway_ids, state_dir)  # also what was prepared before that failed, or skipped the test
        shutil.rmtree(state_dir, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def remove_unix_users() -> Iterator[None]:
    yield
    for user in UNIX_USERS:
        subprocess.run([administer("userdel"), "--remove", user], capture_output=True, check=False)
