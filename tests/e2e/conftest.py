"""`real_hub`: one Hub for all tests that leave it as they found it; `own_hub`: one that a test may break."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import KERNELSPECS
from tests.e2e.realhub import RealHub


@pytest.fixture(scope="session")
def real_hub() -> Iterator[RealHub]:
    """A running Hub, proxy and gateway with the users alice, bob and admin."""
    hub = RealHub(kernelspecs=KERNELSPECS)
    try:
        yield hub.start()
    finally:
        hub.close()


@pytest.fixture
def own_hub(db_url: Callable[[], str | None]) -> Iterator[RealHub]:
    """The same, for a test that restarts parts of it; on the database under test."""
    hub = RealHub(kernelspecs=KERNELSPECS, db_url=db_url())
    try:
        yield hub.start()
    finally:
        hub.close()
