"""Real Hubs: `hub` and `lab_hub` for tests that leave them usable, `own_hub` for those that need one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests import engines
from tests.conftest import KERNELSPECS
from tests.harness.gateway import ROOT
from tests.harness.hub import RealHub

ARTEFACTS = ROOT / ".artefacts"
"""Where screenshots are kept."""
COMPANION = "--ServerApp.kernel_websocket_connection_class=hub_gateway.companion.NumberedGatewayConnection"


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
