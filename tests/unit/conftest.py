"""A database with its tables, and a store on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hub_gateway.db import revision
from hub_gateway.db.engine import Database
from hub_gateway.db.secrets import Vault
from hub_gateway.kernels.store import KernelStore
from hub_gateway.quotas.admission import Admission


@pytest.fixture
async def tenancy_db(db_url: Callable[[], str | None], tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(db_url() or f"sqlite:///{tmp_path}/test.sqlite")
    await asyncio.to_thread(revision.prepare_at_start, made, upgrade_older=False)
    yield made
    await made.close()


@pytest.fixture
def quota_store(tenancy_db: Database) -> KernelStore:
    return KernelStore(tenancy_db, Vault([Vault.generate_key()]), instance="one", admission=Admission(where="/limits"))
