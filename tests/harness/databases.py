"""The database under test: SQLite, or a throw-away PostgreSQL with HUB_GATEWAY_TEST_DB=postgresql."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

__all__ = ["database_kind", "db_url", "new_database"]


@pytest.fixture(scope="session")
def database_kind() -> str:
    """`sqlite` or `postgresql`."""
    return os.environ.get("HUB_GATEWAY_TEST_DB", "sqlite")


@pytest.fixture(scope="session")
def new_database(database_kind: str) -> Iterator[Callable[[], str | None]]:
    """Gives the URL of a new, empty database; None is the gateway's own default (SQLite in its state)."""
    if database_kind == "sqlite":
        yield lambda: None
        return
    from tests.harness.postgres import PostgresServer

    server = PostgresServer()
    yield lambda: server.create_database(f"t_{uuid.uuid4().hex[:12]}")
    server.close()


@pytest.fixture
def db_url(new_database: Callable[[], str | None]) -> Callable[[], str | None]:
    """The same, for one test."""
    return new_database
