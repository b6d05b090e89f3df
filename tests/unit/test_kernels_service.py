"""Kernels and sessions as their owners see them, on real rows and real processes."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from hub_gateway.auth.base import Caller
from hub_gateway.db.models import Kernel, Reservation, utcnow
from hub_gateway.errors import BadRequest, Conflict, Forbidden, NotFound, Unavailable
from hub_gateway.identity.unix import UnixUsers
from hub_gateway.kernels.activity import ActivityReporter
from hub_gateway.kernels.culler import Culler
from hub_gateway.kernels.service import CreateKernel, owner_of
from hub_gateway.kernels.types import ExecutionState
from tests.contract.mini import MiniGateway, Setup
from tests.harness.quotas import apart
from tests.harness.waiting import eventually

SLEEP = {"argv": ["/bin/sleep", "600", "{connection_file}"], "display_name": "Sleep", "language": "none"}
SPECS: dict[str, dict[str, Any]] = {
    "sleep": SLEEP,
    "private": {**SLEEP, "metadata": {"process_proxy": {"config": {"authorized_users": "bob, carol"}}}},
    "eg": {
        **SLEEP,
        "metadata": {
            "process_proxy": {"class_name": "enterprise_gateway.services.processproxies.processproxy.LocalProcessProxy"}
        },
    },
    "elsewhere": {**SLEEP, "metadata": {"process_proxy": {"name": "mars"}}},
    "never_culled": {**SLEEP, "metadata": {"hub_gateway": {"cull_idle_timeout": 0}}},
}
ALICE, BOB = Caller("alice", groups=frozenset({"b", "a"}), server=""), Caller("bob")


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def gateway(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[MiniGateway]:
    for name, spec in SPECS.items():
        (state_dir / "kernels" / name).mkdir(parents=True)
        (state_dir / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    (state_dir / "kernels" / "sleep" / "logo-64x64.png").write_bytes(b"png")
    (state_dir / "kernels" / "broken").mkdir()
    (state_dir / "kernels" / "broken" / "kernel.json").write_text("{")
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    async with MiniGateway(Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)) as made:
        yield made
        local = made.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(made.gateway_id)))


async def become(gateway: MiniGateway, kernel_id: str, **values: Any) -> None:
    """Write to a row behind everybody's back."""
    await gateway.service.store.write(
        lambda tx: tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(**values)) and None
    )


async def test_a_created_kernel_is_complete(gateway: MiniGateway) -> None:
    record = await gateway.service.create(ALICE, CreateKernel(name="sleep", path="a.ipynb", env={"KERNEL_X": "1"}))
    assert (record.owner, record.groups, record.hub_server) == ("alice", ("a", "b"), "")
    plan, _, _ = await gateway.service.store.plan(record.id)
    assert plan.env == {
        "KERNEL_X": "1",
        "KERNEL_ID": record.id,
        "KERNEL_USERNAME": "alice",
        "KERNEL_GATEWAY": "1",
    }
    model = gateway.service.kernel_model(record)
    assert model["execution_state"] == "starting" and model["connections"] == 0 and model["name"] == "sleep"
    datetime.strptime(str(model["last_activity"]), "%Y-%m-%dT%H:%M:%S.%fZ")


async def test_refusals(gateway: MiniGateway) -> None:
    create = gateway.service.create
    with pytest.raises(NotFound, match="sleep"):
        await create(ALICE, CreateKernel(name="nonsense"))
    with pytest.raises(Forbidden, match="alice"):
        await create(ALICE, CreateKernel(name="private"))
    with pytest.raises(BadRequest, match="mars"):
        await create(ALICE, CreateKernel(name="elsewhere"))
    with pytest.raises(BadRequest, match="UUID"):
        await create(ALICE, CreateKernel(name="sleep"), kernel_id="../../etc")
    with pytest.raises(Forbidden, match="bob"):
        await create(ALICE, CreateKernel(name="sleep", env={"KERNEL_USERNAME": "bob"}))
    reservations = await gateway.db.read(lambda tx: tx.execute(select(Reservation)).all())
    assert reservations == []


async def test_a_client_may_choose_the_id_once(gateway: MiniGateway) -> None:
    wanted = "6f1f5ab0-0000-4000-8000-000000000001"
    record = await gateway.service.create(ALICE, CreateKernel(name="sleep"), kernel_id=wanted)
    assert record.id == wanted
    with pytest.raises(Conflict):
        await gateway.service.create(BOB, CreateKernel(name="sleep", env={"KERNEL_ID": wanted}))


async def test_enterprise_gateways_class_names_are_understood(gateway: MiniGateway) -> None:
    assert (await gateway.service.create(ALICE, CreateKernel(name="eg"))).proxy == "local"


async def test_a_user_is_never_taken_for_a_service() -> None:
    assert owner_of(Caller("x")) != owner_of(Caller("x", kind="service"))


async def test_what_cannot_be_done_to_a_starting_kernel(gateway: MiniGateway) -> None:
    record = await gateway.service.create(ALICE, CreateKernel(name="sleep"))
    for call in (gateway.service.restart, gateway.service.interrupt):
        with pytest.raises(Conflict, match="starting"):
            await call(ALICE, record.id)


# Kernelspecs


async def test_kernelspecs_are_what_the_user_may_use(gateway: MiniGateway) -> None:
    alice, bob = await gateway.service.kernelspecs(ALICE), await gateway.service.kernelspecs(BOB)
    assert list(bob["kernelspecs"]) == ["eg", "elsewhere", "never_culled", "private", "sleep"]  # type: ignore[arg-type]
    assert list(alice["kernelspecs"]) == ["eg", "elsewhere", "never_culled", "sleep"]  # type: ignore[arg-type]
    assert alice["default"] in alice["kernelspecs"]  # type: ignore[operator]
    sleep: Any = alice["kernelspecs"]
    assert sleep["sleep"]["resources"] == {"logo-64x64": "/kernelspecs/sleep/logo-64x64.png"}
    assert sleep["sleep"]["spec"]["argv"] == SLEEP["argv"]


async def test_kernelspec_files(gateway: MiniGateway) -> None:
    found = await gateway.service.kernelspec_resource("sleep", "logo-64x64.png", ALICE)
    assert found.read_bytes() == b"png"
    for name, path in (
        ("sleep", "../../gateway.sqlite"),
        ("sleep", "/etc/passwd"),
        ("sleep", "nothing.png"),
        ("sleep", "a\0b"),
        ("sleep", "kernel.json"),
        ("sleep", "logo-64x64.png/../kernel.json"),
        ("private", "kernel.json"),
        ("..", "secret_keys"),
    ):
        with pytest.raises(NotFound):
            await gateway.service.kernelspec_resource(name, path, ALICE)


async def test_a_new_kernelspec_is_found_without_a_restart(gateway: MiniGateway, state_dir: Path) -> None:
    assert "new" not in (await gateway.service.kernelspecs(ALICE))["kernelspecs"]  # type: ignore[operator]
    (state_dir / "kernels" / "new").mkdir()
    (state_dir / "kernels" / "new" / "kernel.json").write_text(json.dumps(SLEEP))
    gateway.service.specs.refresh_seconds = 0.0

    async def found() -> bool:
        return "new" in (await gateway.service.kernelspecs(ALICE))["kernelspecs"]  # type: ignore[operator]

    await eventually(found, "the new kernelspec", timeout=10)


# Sessions


def body(path: str = "a.ipynb", **more: Any) -> dict[str, Any]:
    return {"path": path, "name": "", "type": "notebook", "kernel": {"name": "sleep"}, **more}


async def test_a_session_has_its_kernel_and_takes_it_along(gateway: MiniGateway) -> None:
    service = gateway.service
    session = await service.create_session(ALICE, body())
    kernel: Any = session["kernel"]
    assert session["path"] == "a.ipynb" and session["notebook"] == {"path": "a.ipynb", "name": ""}
    assert [record.id for record in await service.list(ALICE)] == [kernel["id"]]
    assert await service.get_session(ALICE, str(session["id"])) == session
    assert await service.create_session(ALICE, body()) == session  # the path has one already
    assert await service.list_sessions(ALICE) == [session]
    await service.delete_session(ALICE, str(session["id"]))
    assert await service.list_sessions(ALICE) == [] and await service.list(ALICE) == []
    with pytest.raises(NotFound):
        await service.get_session(ALICE, str(session["id"]))


async def test_sessions_are_their_owners(gateway: MiniGateway) -> None:
    service = gateway.service
    session = await service.create_session(ALICE, body())
    key, kernel = str(session["id"]), session["kernel"]
    assert await service.list_sessions(BOB) == []
    for call in (service.get_session(BOB, key), service.delete_session(BOB, key), service.patch_session(BOB, key, {})):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(NotFound):
        await service.create_session(BOB, body(kernel=kernel))
    assert len(await service.list_sessions(ALICE)) == 1


async def test_a_session_changes_its_path_and_its_kernel(gateway: MiniGateway) -> None:
    service = gateway.service
    session = await service.create_session(ALICE, body())
    key, old = str(session["id"]), session["kernel"]["id"]  # type: ignore[index,call-overload]
    renamed = await service.patch_session(ALICE, key, {"path": "b.ipynb"})
    assert renamed == {**session, "path": "b.ipynb", "notebook": {"path": "b.ipynb", "name": ""}}
    changed: Any = await service.patch_session(ALICE, key, {"kernel": {"name": "eg"}})
    assert changed["path"] == "b.ipynb" and changed["kernel"]["name"] == "eg"
    assert [record.id for record in await service.list(ALICE)] == [changed["kernel"]["id"]] != [old]


async def test_a_session_of_a_kernel_that_is_gone_can_be_deleted(gateway: MiniGateway) -> None:
    session = await gateway.service.create_session(ALICE, {"path": "a.ipynb", "kernel": {"name": "sleep"}})
    await become(gateway, session["kernel"]["id"], status="stopped")  # type: ignore[index,call-overload]
    await gateway.service.delete_session(ALICE, str(session["id"]))
    with pytest.raises(NotFound, match="Session"):
        await gateway.service.delete_session(ALICE, str(session["id"]))


async def test_a_kernel_that_another_session_uses_stays(gateway: MiniGateway) -> None:
    service = gateway.service
    one: Any = await service.create_session(ALICE, body("a.ipynb"))
    two: Any = await service.create_session(
        ALICE, body("console-1", type="console", kernel={"id": one["kernel"]["id"]})
    )
    assert "notebook" not in two
    await service.delete_session(ALICE, one["id"])
    assert [record.id for record in await service.list(ALICE)] == [two["kernel"]["id"]]
    await service.delete_session(ALICE, two["id"])
    assert await service.list(ALICE) == []


@pytest.mark.parametrize("together", [True, False])
async def test_two_requests_for_one_notebook_make_one_session(gateway: MiniGateway, together: bool) -> None:
    service = gateway.service
    if not together:
        apart(service.store)
    found = await asyncio.gather(*(service.create_session(ALICE, body()) for _ in range(6)))
    assert {str(one["id"]) for one in found} == {str(found[0]["id"])}
    assert len(await service.list(ALICE)) == 1 == len(await service.list_sessions(ALICE))
    kernel = {"id": found[0]["kernel"]["id"]}  # type: ignore[index,call-overload]
    found = await asyncio.gather(*(service.create_session(ALICE, body("b.ipynb", kernel=kernel)) for _ in range(6)))
    assert {str(one["id"]) for one in found} == {str(found[0]["id"])}
    consoles = await asyncio.gather(*(service.create_session(ALICE, body("", kernel=kernel)) for _ in range(3)))
    assert len({str(one["id"]) for one in consoles}) == 3  # without a path there is nothing to share


async def test_a_session_is_deleted_with_its_kernel_or_not_at_all(
    gateway: MiniGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that was told 503 asks again, and the kernel does not stay."""
    service = gateway.service
    session = await service.create_session(ALICE, body())
    away = Unavailable("The gateway cannot reach its database.")

    def broken(*_: Any) -> Any:
        def stop(tx: Any) -> None:
            raise away

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(service.store, "stopping", broken)
        with pytest.raises(Unavailable):
            await service.delete_session(ALICE, str(session["id"]))
    assert await service.list_sessions(ALICE) == [session]

    async def unseen(*_: Any) -> None:
        raise away

    with monkeypatch.context() as patch:
        patch.setattr(gateway.controller, "wait", unseen)  # the end is certain, though it cannot be seen
        await service.delete_session(ALICE, str(session["id"]))

    async def gone() -> bool:
        return await service.list(ALICE) == []

    await eventually(gone, "the kernel is gone")


async def test_a_kernel_for_a_session_that_ended_meanwhile_is_not_started(
    gateway: MiniGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = gateway.service
    session = await service.create_session(ALICE, body())
    get = service.sessions.get

    async def then_delete(owner: str, session_id: str) -> Any:
        found = await get(owner, session_id)
        await service.delete_session(ALICE, session_id)
        return found

    monkeypatch.setattr(service.sessions, "get", then_delete)
    with pytest.raises(NotFound, match="Session"):
        await service.patch_session(ALICE, str(session["id"]), {"kernel": {"name": "eg"}})
    assert await service.list(ALICE) == []
    held = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
    assert await gateway.db.read(lambda tx: tx.execute(held).all()) == []


async def test_a_path_as_long_as_it_may_be(gateway: MiniGateway) -> None:
    path = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4096))
    session = await gateway.service.create_session(ALICE, body(path))
    assert await gateway.service.create_session(ALICE, body(path)) == session
    await gateway.service.delete_session(ALICE, str(session["id"]))


@pytest.mark.parametrize(
    "bad", [{"path": 1}, {"path": "x" * 5000}, {"kernel": []}, {"kernel": {"name": 1}}, {"type": ["x"]}, {"name": "\0"}]
)
async def test_malformed_sessions(gateway: MiniGateway, bad: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        await gateway.service.create_session(ALICE, {**body(), **bad})
    assert await gateway.service.list(ALICE) == []


# Culling and activity


async def running(gateway: MiniGateway, caller: Caller = ALICE, spec: str = "sleep", **values: Any) -> str:
    """A row that says it runs; its process never answers, which nobody asks here."""
    record = await gateway.service.create(caller, CreateKernel(name=spec))
    gateway.controller._queue.add = lambda key, delay=0.0: None  # type: ignore[method-assign]
    idle = {"status": "running", "execution_state": "idle", "last_activity": utcnow() - timedelta(hours=1)}
    await become(gateway, record.id, **{**idle, **values})
    return record.id


@pytest.fixture
async def rows(gateway: MiniGateway) -> dict[str, str]:
    """Kernels of every kind; nothing drives them."""
    await gateway.controller._queue.close()
    return {
        "idle": await running(gateway),
        "young": await running(gateway, last_activity=utcnow()),
        "busy": await running(gateway, execution_state="busy"),
        "connected": await running(gateway, connections=1),
        "never": await running(gateway, spec="never_culled"),
        "starting": await running(gateway, status="starting"),
    }


@pytest.mark.parametrize(
    ("options", "culled"),
    [
        ({}, set()),
        ({"cull_idle_timeout": 60.0}, {"idle"}),
        ({"cull_idle_timeout": 7200.0}, set()),
        ({"cull_idle_timeout": 60.0, "cull_busy": True}, {"idle", "busy"}),
        ({"cull_idle_timeout": 60.0, "cull_connected": True}, {"idle", "connected"}),
    ],
)
async def test_culling(gateway: MiniGateway, rows: dict[str, str], options: dict[str, Any], culled: set[str]) -> None:
    gateway.service.stop_wait_seconds = 0.0
    assert set(await Culler(service=gateway.service, **options).cull()) == {rows[name] for name in culled}
    targets = {record.id for record in await gateway.service.store.live() if record.target.value == "stopped"}
    assert targets == {rows[name] for name in culled}


async def test_activity_is_reported_once_and_per_server(gateway: MiniGateway, rows: dict[str, str]) -> None:
    await running(gateway, BOB)
    gateway.service.identity.services = {"svc": {}}
    await running(gateway, Caller("svc", kind="service"))
    said: list[tuple[str, Any]] = []

    async def report(user: str, news: Any) -> None:
        said.append((user, news))

    reporter = ActivityReporter(service=gateway.service, report=report)
    await become(gateway, rows["busy"], execution_state="idle")
    assert await reporter.report() == 2
    bodies = dict(said)
    assert set(bodies) == {"alice", "bob"}
    assert set(bodies["alice"]["servers"]) == {""} and "servers" not in bodies["bob"]
    assert await reporter.report() == 0
    await become(gateway, rows["busy"], execution_state="busy")  # works, and says nothing
    assert await reporter.report() == 1
    assert await reporter.report() == 1


async def test_a_server_that_is_gone_keeps_no_other_from_being_spared(gateway: MiniGateway) -> None:
    """The Hub refuses all of a report that names a server which it does not know."""
    await gateway.controller._queue.close()
    for server in ("", "gone", "lab"):
        await running(gateway, Caller("alice", server=server))
    taken: list[tuple[str, Any]] = []
    asked: list[Any] = []

    async def report(user: str, news: Any) -> None:
        asked.append(news)
        if "gone" in news.get("servers", {}):
            raise Unavailable("No such server 'gone' for user alice.")
        taken.append((user, news))

    reporter = ActivityReporter(service=gateway.service, report=report)
    await reporter.report()
    assert {name for _, news in taken for name in news.get("servers", {})} == {"", "lab"}
    assert any("last_activity" in news for _, news in taken)
    assert await reporter.report() == 0
    asked.clear()
    for record in await gateway.service.list(ALICE):
        await become(gateway, record.id, last_activity=utcnow())
    assert await reporter.report() == 1
    assert len(asked) == 1 and set(asked[0]["servers"]) == {"", "lab"}  # it is not asked about again


@pytest.mark.parametrize("where", ["activity", "culler"])
async def test_a_loop_survives_what_nobody_thought_of(gateway: MiniGateway, where: str) -> None:
    calls, swallowed = 0, []

    async def broken(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise (KeyError("x"), OSError("y"), Unavailable("z."))[calls % 3]

    gateway.service.store.mine = broken  # type: ignore[method-assign]
    loop: ActivityReporter | Culler
    if where == "activity":
        loop = ActivityReporter(service=gateway.service, report=broken, on_swallowed=swallowed.append)
        loop.activity_seconds = 0.001
    else:
        loop = Culler(service=gateway.service, on_swallowed=swallowed.append)
        loop.cull_interval = 0.001
    loop.start()
    await eventually(lambda: calls > 6, "it goes on")
    await loop.close()
    assert len(swallowed) >= 6 and set(swallowed) == {where}


async def test_a_report_that_fails_is_repeated(gateway: MiniGateway, rows: dict[str, str]) -> None:
    async def fail(user: str, news: Any) -> None:
        raise Unavailable("The Hub is down.")

    await become(gateway, rows["busy"], execution_state=ExecutionState.IDLE.value)
    reporter = ActivityReporter(service=gateway.service, report=fail)
    assert await reporter.report() == 1
    assert await reporter.report() == 1


# Identity


@pytest.mark.parametrize(
    "name", ["root", "nobody", "daemon", "no-such-user", "Root", "a b", "../x", "-x", "", "röot", "x" * 40]
)
def test_unix_users_that_never_get_a_kernel(name: str) -> None:
    with pytest.raises(Forbidden):
        UnixUsers(impersonate=True).map(name)


def test_without_impersonation_nobody_is_mapped() -> None:
    assert UnixUsers().map("root") is None


async def test_a_kernel_without_a_unix_user_is_not_admitted(gateway: MiniGateway) -> None:
    gateway.service.identity.unix_users.impersonate = True
    with pytest.raises(Forbidden):
        await gateway.service.create(Caller("no-such-user"), CreateKernel(name="sleep"))
    assert await gateway.service.store.live() == ()
