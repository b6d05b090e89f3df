"""Launches under a mapping: what the kernel's row says, and who is refused."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from hub_gateway import audit
from hub_gateway.auth.base import Caller
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.errors import Forbidden, LaunchRefused, Unavailable
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.quotas.types import Policy, SubjectKind
from tests.contract.mini import MiniGateway, Setup
from tests.harness.quotas import apart, put, release

SLEEP = {"argv": ["/bin/sleep", "600", "{connection_file}"], "display_name": "Sleep", "language": "none"}
ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def gateway(
    state_dir: Path, db_url: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MiniGateway]:
    (state_dir / "kernels" / "sleep").mkdir(parents=True)
    (state_dir / "kernels" / "sleep" / "kernel.json").write_text(json.dumps(SLEEP))
    rule = {"name": "lower", "pattern": "(.*)", "case": "lower", "principal": "$1", "unix_user": "$1"}
    mapping = {"rules": [rule], "default_realm": "EXAMPLE.TEST", "require_unix_user": False}
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    setup = Setup(str(state_dir), url, (str(state_dir / "kernels"),), {"IdentityMapper": mapping})
    made = MiniGateway(setup)
    # It is about admission here: nothing is started, as somebody who may not exist on this machine.
    monkeypatch.setattr(made.controller, "changed", lambda *_args, **_more: None)
    async with made:
        yield made


async def create(gateway: MiniGateway, name: str, **more: Any) -> Any:
    return await gateway.service.create(Caller(name, **more), CreateKernel(name="sleep"))


async def rows(gateway: MiniGateway, table: Any = Kernel) -> list[Any]:
    return await gateway.db.read(lambda tx: list(tx.execute(select(table.__table__)).mappings()))


async def actions(gateway: MiniGateway) -> list[tuple[str, str, str]]:
    lines = await gateway.db.read(lambda tx: list(audit.query(tx)))
    return [(line.action, line.subject, line.outcome) for line in reversed(lines)]


async def test_the_row_says_as_whom_and_why(gateway: MiniGateway) -> None:
    gateway.service.identity.services = {"ci": {"unix_user": "ci", "cost_center": "4711"}}
    await create(gateway, "alice")
    await create(gateway, "ci", kind="service")
    found = {row["owner"]: row for row in await rows(gateway)}
    alice, ci = found["alice"], found["services/ci"]
    assert (alice["principal"], alice["unix_user"], alice["identity_rule"]) == ("alice@EXAMPLE.TEST", "alice", "lower")
    assert (ci["principal"], ci["unix_user"], ci["identity_rule"], ci["cost_center"]) == (
        None,
        "ci",
        "services/ci",
        "4711",
    )
    held = {row["owner"]: row["principal"] for row in await rows(gateway, Reservation)}
    assert held == {"alice": "alice@EXAMPLE.TEST", "services/ci": None}


@pytest.mark.parametrize("together", [True, False])
async def test_of_two_users_who_would_be_one_only_one_launches(gateway: MiniGateway, together: bool) -> None:
    if not together:
        apart(gateway.service.store)
    names = ["alice", "Alice", "ALICE", "aLICE"]
    found = await asyncio.gather(*(create(gateway, name) for name in names), return_exceptions=True)
    refused = [one for one in found if isinstance(one, LaunchRefused)]
    assert len(refused) == 3 and len(await rows(gateway)) == 1 and len(await rows(gateway, Reservation)) == 1
    assert "belongs to another user of the Hub" in refused[0].message
    said = [outcome for action, _, outcome in await actions(gateway) if action.startswith("identity.")]
    assert sorted(said) == ["ok", "refused", "refused", "refused"]
    assert (await gateway.db.read(audit.verify)).ok


@pytest.mark.parametrize("name", ["root", "hdfs", "a b", "\u0430lice", ME])
async def test_whom_no_rule_lets_through_gets_nothing(gateway: MiniGateway, name: str) -> None:
    with pytest.raises(Forbidden):
        await create(gateway, name)
    assert await rows(gateway) == [] and await rows(gateway, Reservation) == []
    assert [action for action, _, _ in await actions(gateway)] == ["identity.refused"]


async def test_a_failed_kernel_is_started_again_for_its_owner_as_they_are_now(gateway: MiniGateway) -> None:
    """Limits, bills and tickets follow the groups and the principal of today, not of the first launch."""
    rule = {"name": "old", "pattern": "(.*)", "unix_user": "$1", "principal": "$1@OLD.TEST", "cost_center": "old"}
    gateway.service.identity.allowed_realms = ["OLD.TEST", "NEW.TEST"]
    gateway.service.identity.rules = [rule]
    store = gateway.service.store
    await put(store, Policy("all", SubjectKind.EVERYONE, hard=0))
    await put(store, Policy("lab", SubjectKind.GROUP, "lab", hard=5))
    await put(store, Policy("law", SubjectKind.GROUP, "law", hard=5))
    record = await create(gateway, "alice", groups=frozenset({"lab"}))
    await release(store, record.id)
    await fail(gateway, record.id)
    changed = {"name": "new", "principal": "$1@NEW.TEST", "cost_center": "new"}
    gateway.service.identity.rules = [{**rule, **changed}]
    with pytest.raises(LaunchRefused, match="policy all"):
        await gateway.service.restart(Caller("alice"), record.id)
    gateway.service.restart_wait_seconds = 0
    with pytest.raises(Unavailable, match="still starting"):
        await gateway.service.restart(Caller("alice", groups=frozenset({"law"})), record.id)
    (kernel,), (held,) = await rows(gateway), await rows(gateway, Reservation)
    for row in (kernel, held):
        assert (row["groups"], row["principal"], row["cost_center"]) == (["law"], "alice@NEW.TEST", "new")
    assert kernel["identity_rule"] == "new"


async def fail(gateway: MiniGateway, kernel_id: str) -> None:
    """Its kernel is dead."""
    failed = {"status": KernelStatus.FAILED.value}
    await gateway.service.store.write(
        lambda tx: tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(**failed)) and None
    )


async def test_a_failed_kernel_is_not_started_again_as_somebody_else(gateway: MiniGateway) -> None:
    record = await create(gateway, "alice")
    await fail(gateway, record.id)
    gateway.service.identity.rules = [{"name": "new", "pattern": "(.*)", "unix_user": "x_$1"}]
    with pytest.raises(Forbidden, match="start a new kernel"):
        await gateway.service.restart(Caller("alice"), record.id)
    gateway.service.identity.rules = [{"name": "table", "table": {"bob": {"unix_user": "alice"}}}]
    with pytest.raises(Forbidden, match="No rule"):
        await gateway.service.restart(Caller("alice"), record.id)
    # Released meanwhile, and taken by somebody else.
    await gateway.service.identity.release("alice", "admin")
    await create(gateway, "bob")
    gateway.service.identity.rules = [{"name": "same", "pattern": "(.*)", "unix_user": "$1"}]
    with pytest.raises(LaunchRefused, match="belongs to another user"):
        await gateway.service.restart(Caller("alice"), record.id)
    assert (await gateway.service.store.get(record.id)).status is KernelStatus.FAILED  # type: ignore[union-attr]
