"""Sizes of one kernelspec, as users of different groups meet them in their own servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import KERNELSPECS
from tests.e2e.conftest import TENANCY
from tests.harness.hub import RealHub
from tests.harness.jupyter_server import JupyterServer
from tests.harness.notebook import Notebook
from tests.harness.waiting import until

PROFILES = [
    {
        "name": "large",
        "display_name": "Python (large)",
        "resources": {"cpu": 6, "memory": "1G"},
        "env": {"SIZE": "large"},
        "groups": ["analysts"],
    },
    {"name": "small", "display_name": "Python (small)", "resources": {"cpu": 1}, "env": {"SIZE": "small"}},
]
POLICIES = """
policies:
- name: eight-cores
  subject: everyone
  object: kernelspec:python--*
  resource: cpu
  hard: 8
"""
SIZE = "import os; print(os.environ['SIZE'])"


@pytest.fixture
def hub(tmp_path: Path, db_url: Callable[[], str | None]) -> Iterator[RealHub]:
    policies = tmp_path / "policies.yaml"
    policies.write_text(POLICIES)
    spec = {**KERNELSPECS["python"], "metadata": {"hub_gateway": {"resources": {"cpu": 2}, "profiles": PROFILES}}}
    made = RealHub(
        kernelspecs={"python": spec},
        extra=TENANCY,
        gateway_config=f"c.QuotaService.initial_policies = {str(policies)!r}\n"
        "c.KernelSpecManager.ensure_native_kernel = False\n",
        db_url=db_url(),
    )
    yield made
    made.close()


@pytest.fixture
def server_of(hub: RealHub, tmp_path: Path) -> Iterator[Callable[[str], JupyterServer]]:
    """A user's own server, which knows nothing but the gateway's address."""
    made: list[JupyterServer] = []

    def start(user: str) -> JupyterServer:
        made.append(JupyterServer(tmp_path / user, gateway_url=hub.gateway_url, gateway_token=hub.user_token(user)))
        return made[-1]

    yield start
    for server in made:
        server.close()


def launcher(server: JupyterServer) -> dict[str, str]:
    """The entries of Lab's launcher: names and what is shown."""
    with server.client() as client:
        found = client.get("/api/kernelspecs").json()["kernelspecs"]
        return {name: one["spec"]["display_name"] for name, one in found.items()}


def ask(hub: RealHub, user: str, name: str) -> httpx.Response:
    """Ask the gateway for a kernel."""
    headers = {"Authorization": f"token {hub.user_token(user)}"}
    return httpx.post(f"{hub.gateway_url}/api/kernels", json={"name": name}, headers=headers, timeout=60)


def test_each_group_has_its_sizes(hub: RealHub, server_of: Callable[[str], JupyterServer]) -> None:
    alice, carol = server_of("alice"), server_of("carol")
    small = {"python": "Python", "python--small": "Python (small)"}
    assert launcher(alice) == {**small, "python--large": "Python (large)"}
    assert launcher(carol) == small

    unknown = ask(hub, "carol", "python--large")
    assert unknown.status_code == 404 and "available: python, python--small" in unknown.json()["message"]
    with Notebook(carol.ws_url, carol.open_notebook("python--small"), carol.headers) as notebook:
        assert notebook.execute(SIZE).text == "small\n"

    kernel_id = alice.open_notebook("python--large")
    with Notebook(alice.ws_url, kernel_id, alice.headers) as notebook:
        assert notebook.execute(SIZE).text == "large\n"
    until(lambda: launcher(alice)["python--large"] == "Python (large) (no room)", "the launcher to say so")
    refused = ask(hub, "alice", "python--large")
    assert refused.status_code == 403, "six of eight cores are taken"
    assert "eight-cores" in refused.json()["message"] and "6 cores" in refused.json()["message"]
    assert ask(hub, "alice", "python--small").status_code == 201

    hub.stop_hub()
    hub.start_hub()
    with alice.client() as client:
        assert client.post(f"/api/kernels/{kernel_id}/restart").status_code == 200
        assert client.get(f"/api/kernels/{kernel_id}").json()["name"] == "python--large"
    with Notebook(alice.ws_url, kernel_id, alice.headers) as notebook:
        assert notebook.execute(SIZE).text == "large\n"
    assert ask(hub, "alice", "python--large").status_code == 403, "what it holds is held on"
