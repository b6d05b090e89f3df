"""Real Hubs: `hub` and `lab_hub` for tests that leave them usable, `own_hub` for those that need one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from hub_gateway._paths import jupyterhub_config_dir
from tests import engines
from tests.conftest import KERNELSPECS
from tests.harness.gateway import ROOT
from tests.harness.hub import RealHub

expect.set_options(timeout=20_000)  # ms: a machine that is busy with kernels draws late
ONCE = pytest.mark.skipif(
    os.environ.get("HUB_GATEWAY_TEST_DB") == "postgresql",
    reason="not applicable: what a Hub, its proxy and a browser do is put to the test once, on SQLite",
)
ARTEFACTS = ROOT / ".artefacts"
"""Where screenshots are kept."""
COMPANION = "--ServerApp.kernel_websocket_connection_class=hub_gateway.companion.NumberedGatewayConnection"

TENANCY = """
from hub_gateway.auth.scopes import client_scopes, custom_scopes
c.JupyterHub.load_groups = {
    "gateway-admins": {"users": ["admin"]},
    "analysts": {"users": ["alice", "bob"]},
    "leads": {"users": ["lea"]},
}
c.JupyterHub.custom_scopes = custom_scopes()
c.JupyterHub.load_roles += [
    {"name": "admins", "groups": ["gateway-admins"], "scopes": ["custom:hub-gateway:admin"]},
    {"name": "leads", "groups": ["leads"], "scopes": [
        "custom:hub-gateway:quotas:write!group=analysts", "custom:hub-gateway:kernels:stop!group=analysts"]},
]
c.JupyterHub.services[0]["oauth_client_allowed_scopes"] = client_scopes()
"""
POLICIES = f"c.QuotaService.initial_policies = {str(jupyterhub_config_dir() / 'demo_policies.yaml')!r}\n"


@pytest.fixture(scope="session")
def hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    """A Hub below a prefix, as many are, with the gateway as its managed service."""
    made = RealHub(kernelspecs=KERNELSPECS, base_url="/jupyter/", db_url=new_database())
    yield made
    made.close()


@pytest.fixture(scope="session")
def lab_hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    """A Hub whose single-user servers have our connection class, as the shipped configuration says."""
    made = RealHub(kernelspecs=KERNELSPECS, spawner_args=(COMPANION,), db_url=new_database())
    yield made
    made.close()


@pytest.fixture(scope="session")
def console_hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    """A Hub with administrators, leads and limits. Tests keep to users of their own, or leave things as they were."""
    made = RealHub(kernelspecs=KERNELSPECS, extra=TENANCY, gateway_config=POLICIES, db_url=new_database())
    yield made
    made.close()


@pytest.fixture
def own_hub(db_url: Callable[[], str | None]) -> Iterator[RealHub]:
    """A Hub for one test, which may break it."""
    made = RealHub(kernelspecs=KERNELSPECS, db_url=db_url())
    yield made
    made.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser (tests with it are marked `needs("chromium")`)."""
    found = engines.chromium()
    assert found is not None
    return found
