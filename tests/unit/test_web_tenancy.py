"""Who may do what over the REST interface, and what it does not believe."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from hub_gateway.audit import AuditLog, Line
from hub_gateway.audit import query as audit_lines
from hub_gateway.auth.base import Caller
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.errors import Unavailable
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelStatus, KernelTarget
from hub_gateway.quotas.policies import PolicyStore
from hub_gateway.quotas.reports import Reports as LedgerReports
from hub_gateway.quotas.types import Origin, Policy, SubjectKind, Verdict
from hub_gateway.web.application import ROUTES
from hub_gateway.web.tenancy import TenancyHandler
from tests.contract.mini import MiniGateway, Setup
from tests.harness.tenancy import CALLERS, Audit, Identity, Put, Quotas, Reports, Request, Tokens
from tests.harness.waiting import eventually
from tests.harness.web import WebServer
from tests.unit.test_web_api import is_error

# It starts for as long as a test takes.
SLEEP = {"argv": ["/bin/sh", "-c", "sleep 600", "{connection_file}"], "display_name": "Sleep", "language": "none"}
UNTIL = (utcnow() + timedelta(days=2)).isoformat()
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("all", SubjectKind.EVERYONE, hard=10, version=1, updated_by="admin"),
        Policy("analysts", SubjectKind.GROUP, "analysts", hard=5, version=1, updated_by="admin"),
        Policy("cap", SubjectKind.GROUP, "analysts", hard=7, priority=500, version=1, updated_by="admin"),
        Policy("others", SubjectKind.GROUP, "others", hard=5, version=1, updated_by="admin"),
        Policy("bob-one", SubjectKind.USER, "bob", hard=1, version=1, updated_by="admin"),
        Policy("led", SubjectKind.USER, "bob", hard=1, version=1, updated_by="lea", delegated=True),
        Policy("carol-one", SubjectKind.USER, "carol", hard=1, version=1, updated_by="admin"),
        Policy("ci", SubjectKind.SERVICE, "ci", hard=1, version=1, updated_by="admin"),
    )
}


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def mini(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[MiniGateway]:
    for name in ("sleep", "other"):
        (state_dir / "kernels" / name).mkdir(parents=True)
        (state_dir / "kernels" / name / "kernel.json").write_text(json.dumps(SLEEP))
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    async with MiniGateway(Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)) as made:
        yield made
        local = made.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(made.gateway_id)))


@pytest.fixture
def quotas() -> Quotas:
    return Quotas(dict(POLICIES))


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
async def server(mini: MiniGateway, quotas: Quotas, tokens: Tokens) -> AsyncIterator[WebServer]:
    parts = {"quotas": quotas, "identity": Identity(), "audit": Audit(), "reports": Reports()}
    async with WebServer(mini.service, authenticator=tokens, db=mini.db, **parts) as made:
        yield made


Ask = Callable[..., Any]


@pytest.fixture
async def ask(server: WebServer) -> AsyncIterator[Ask]:
    """`ask(who, "GET", path, ...)`."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def made(who: str | None, method: str, path: str, **more: Any) -> httpx.Response:
            headers = {} if who is None else {"Authorization": f"token {who}-token"}
            return await client.request(method, path, headers={**headers, **more.pop("headers", {})}, **more)

        yield made


def shown(answer: httpx.Response, *of: str) -> tuple[int, str, dict[str, str]]:
    """An answer, with what was asked for blotted out."""
    text = answer.text
    for one in of:
        text = text.replace(one, "X")
    headers = {k: v for k, v in answer.headers.items() if k not in ("x-request-id", "date", "etag", "content-length")}
    return answer.status_code, text, headers


# -- the matrix

# None: nobody; otto leads another group, hubadmin is an admin of the Hub without a scope of ours.
WHO = (None, "bob", "carol", "lea", "otto", "hubadmin", "ci", "admin")
NEW = {"subject": "user:bob", "hard": 2}
STOP = {"ids": [str(uuid.UUID(int=1))]}
MATRIX: list[tuple[str, str, Any, tuple[int, ...]]] = [
    # method, path, body: nobody, bob, carol, lead, other lead, admin of the Hub, a service, admin
    ("GET", "/api/limits", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/limits?user=bob", None, (401, 200, 403, 200, 404, 403, 403, 200)),
    ("GET", "/api/limits?user=nobody", None, (401, 403, 403, 404, 404, 403, 403, 404)),
    ("GET", "/api/limits?user=services/ci", None, (401, 403, 403, 404, 404, 403, 200, 200)),
    ("GET", "/api/queue", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/requests", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("POST", "/api/requests/1/answer", {"grant": True}, (401, 403, 403, 200, 404, 403, 403, 200)),
    ("POST", "/api/requests/9/answer", {"grant": True}, (401, 403, 403, 404, 404, 403, 403, 404)),
    ("DELETE", "/api/requests/1", None, (401, 204, 404, 404, 404, 404, 404, 404)),
    ("GET", "/api/quota/policies", None, (401, 403, 403, 200, 200, 403, 403, 200)),
    ("GET", "/api/quota/policies/all", None, (401, 403, 403, 200, 200, 403, 403, 200)),
    ("GET", "/api/quota/policies/bob-one", None, (401, 403, 403, 200, 404, 403, 403, 200)),
    ("GET", "/api/quota/policies/analysts", None, (401, 403, 403, 200, 404, 403, 403, 200)),
    ("GET", "/api/quota/policies/ci", None, (401, 403, 403, 404, 404, 403, 403, 200)),
    ("GET", "/api/quota/policies/none", None, (401, 403, 403, 404, 404, 403, 403, 404)),
    ("PUT", "/api/quota/policies/new", NEW, (401, 403, 403, 201, 403, 403, 403, 201)),
    ("PUT", "/api/quota/policies/bob-one", {**NEW, "version": 1}, (401, 403, 403, 403, 409, 403, 403, 200)),
    ("PUT", "/api/quota/policies/led", {**NEW, "version": 1}, (401, 403, 403, 200, 409, 403, 403, 200)),
    ("PUT", "/api/quota/policies/cap", {"subject": "group:analysts", "version": 1},
     (401, 403, 403, 403, 409, 403, 403, 200)),
    ("PUT", "/api/quota/policies/new", {"subject": "group:analysts"}, (401, 403, 403, 201, 403, 403, 403, 201)),
    ("PUT", "/api/quota/policies/new", {"subject": "everyone"}, (401, 403, 403, 403, 403, 403, 403, 201)),
    ("PUT", "/api/quota/policies/new", {"subject": "service:ci"}, (401, 403, 403, 403, 403, 403, 403, 201)),
    ("PUT", "/api/quota/policies/new", {"subject": "user:lea"}, (401, 403, 403, 403, 403, 403, 403, 201)),
    ("PUT", "/api/quota/policies/new", {**NEW, "delegated": False}, (401, 403, 403, 201, 403, 403, 403, 201)),
    ("DELETE", "/api/quota/policies/bob-one", None, (401, 403, 403, 403, 404, 403, 403, 204)),
    ("DELETE", "/api/quota/policies/led", None, (401, 403, 403, 204, 404, 403, 403, 204)),
    ("DELETE", "/api/quota/policies/cap", None, (401, 403, 403, 403, 404, 403, 403, 204)),
    ("DELETE", "/api/quota/policies/all", None, (401, 403, 403, 403, 403, 403, 403, 204)),
    ("POST", "/api/quota/policies/new/preview", NEW, (401, 403, 403, 200, 403, 403, 403, 200)),
    ("GET", "/api/quota/export", None, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("POST", "/api/quota/diff", {"text": ""}, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("POST", "/api/quota/apply", {"text": ""}, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("POST", "/api/quota/simulate", {"text": ""}, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("GET", "/api/quota/explain", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/quota/explain?user=bob", None, (401, 200, 403, 200, 404, 403, 403, 200)),
    ("GET", "/api/usage", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/usage?user=bob", None, (401, 200, 404, 200, 200, 404, 404, 200)),
    ("GET", "/api/usage?group=analysts", None, (401, 404, 404, 200, 404, 404, 404, 200)),
    ("GET", "/api/ledger/entries", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/ledger/entries?user=bob", None, (401, 200, 404, 200, 200, 404, 404, 200)),
    ("GET", "/api/ledger/entries?group=analysts", None, (401, 404, 404, 200, 404, 404, 404, 200)),
    ("GET", "/api/prices", None, (401, 403, 403, 200, 200, 403, 403, 200)),
    ("POST", "/api/prices", {"core_hour": 1}, (401, 403, 403, 403, 403, 403, 403, 201)),
    ("POST", "/api/ledger/close", {"month": "2030-01"}, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("POST", "/api/ledger/corrections", {"entry": 1, "seconds": -1, "note": "x"},
     (401, 403, 403, 403, 403, 403, 403, 201)),
    ("GET", "/api/audit", None, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("GET", "/api/audit/verify", None, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("GET", "/api/identity", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("GET", "/api/identity?user=bob", None, (401, 200, 403, 200, 404, 403, 403, 200)),
    ("DELETE", "/api/identity/bob", None, (401, 403, 403, 204, 404, 403, 403, 204)),
    ("DELETE", "/api/identity/carol", None, (401, 403, 403, 404, 404, 403, 403, 404)),
    ("GET", "/api/maintenance", None, (401, 200, 200, 200, 200, 200, 200, 200)),
    ("PUT", "/api/maintenance", {"sentence": "No."}, (401, 403, 403, 403, 403, 403, 403, 200)),
    ("GET", "/api/admin/kernels", None, (401, 403, 403, 200, 200, 403, 403, 200)),
    ("GET", "/api/admin/kernels?group=analysts", None, (401, 403, 403, 200, 404, 403, 403, 200)),
    ("GET", "/api/admin/kernels?group=nobody", None, (401, 403, 403, 404, 404, 403, 403, 404)),
    ("POST", "/api/admin/kernels/stop", STOP, (401, 403, 403, 202, 202, 403, 403, 202)),
    ("GET", "/api/admin/people", None, (401, 403, 403, 200, 200, 403, 403, 200)),
    ("GET", "/api/admin/clusters", None, (401, 403, 403, 200, 200, 403, 403, 200)),
]  # fmt: skip


async def test_who_may_do_what(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    wrong = []
    for method, path, body, expected in MATRIX:
        for who, status in zip(WHO, expected, strict=True):
            quotas.kept = dict(POLICIES)
            quotas.asked = {1: Request(1, "bob", "bob-one", 2, None, "why")}
            answer = await ask(who, method, path, json=body)
            if answer.status_code != status:
                wrong.append((who, method, path, answer.status_code, status, answer.text[:150]))
            elif status >= 400:
                is_error(answer, status)
    assert not wrong, "\n".join(map(str, wrong))


def test_the_matrix_is_complete() -> None:
    covered = {(method, path.partition("?")[0]) for method, path, _, _ in MATRIX} | {("POST", "/api/requests")}
    for path, handler in ROUTES:
        if issubclass(handler, TenancyHandler):
            for method in set(handler.allowed()) - {"HEAD", "OPTIONS"}:
                assert any(verb == method and re.fullmatch(path, known) for verb, known in covered), (method, path)


async def test_every_change_asks_the_hub_anew(server: WebServer, tokens: Tokens, ask: Ask) -> None:
    """A token that was revoked a second ago changes nothing, although it is still good enough for reading."""
    changes = [(method, path, body) for method, path, body, _ in MATRIX if method != "GET"]
    tokens.fresh["admin"] = None
    for method, path, body in changes:
        is_error(await ask("admin", method, path, json=body), 401)
    tokens.fresh["admin"] = replace(CALLERS["admin"], scopes=frozenset())
    for method, path, body in changes:
        assert (await ask("admin", method, path, json=body)).status_code in (403, 404), (method, path)
    tokens.fresh_error = Unavailable("The JupyterHub cannot be asked who you are at the moment; try again.")
    for method, path, body in changes:
        is_error(await ask("admin", method, path, json=body), 503)
    assert (await ask("admin", "GET", "/api/quota/policies")).status_code == 200


async def test_a_hub_that_is_away_is_said(server: WebServer, tokens: Tokens, ask: Ask) -> None:
    tokens.people.error = Unavailable("The JupyterHub cannot be asked for its users and groups at the moment.")
    for path in ("/api/admin/kernels", "/api/admin/people", "/api/limits?user=bob", "/api/quota/explain?user=bob"):
        body = is_error(await ask("lea", "GET", path), 503)
        assert "JupyterHub" in body["message"]
    is_error(await ask("lea", "PUT", "/api/quota/policies/new", json=NEW), 503)
    assert (await ask("admin", "GET", "/api/admin/kernels")).status_code == 200, "who may see all needs no groups"
    assert (await ask("bob", "GET", "/api/limits")).status_code == 200


# -- what is foreign is like what does not exist


async def test_foreign_and_unknown_are_the_same_to_the_byte(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    quotas.asked = {1: Request(1, "bob", "bob-one", 2, None, "why")}
    for path, foreign, unknown in (
        ("/api/limits?user={}", "bob", "zoe"),
        ("/api/quota/explain?user={}", "bob", "zoe"),
        ("/api/identity?user={}", "bob", "zoe"),
        ("/api/usage?group={}", "analysts", "unknowns"),
        ("/api/admin/kernels?group={}", "analysts", "unknowns"),
        ("/api/quota/policies/{}", "bob-one", "none-one"),
    ):
        one, other = [shown(await ask("otto", "GET", path.format(name)), name) for name in (foreign, unknown)]
        assert one == other and one[0] == 404, path
    for method, path, body, foreign, unknown in (
        ("POST", "/api/requests/{}/answer", {"grant": True}, "1", "9"),
        ("DELETE", "/api/requests/{}", None, "1", "9"),
        ("DELETE", "/api/quota/policies/{}", None, "bob-one", "none-one"),
        ("DELETE", "/api/identity/{}", None, "bob", "zoe"),
    ):
        one, other = [
            shown(await ask("otto", method, path.format(name), json=body), name) for name in (foreign, unknown)
        ]
        assert one == other and one[0] == 404, path


# -- kernels of others


async def test_kernels_of_others(server: WebServer, mini: MiniGateway, ask: Ask) -> None:
    owners = ("bob", "bob", "carol", "lea")
    made = [await mini.service.create(CALLERS[owner], CreateKernel(name="sleep")) for owner in owners]
    other = await mini.service.create(CALLERS["carol"], CreateKernel(name="other", path="a/50%_x.ipynb"))

    async def seen(who: str, query: str = "") -> list[str]:
        answer = await ask(who, "GET", f"/api/admin/kernels?limit=2{query}")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        found = [kernel["id"] for kernel in body["kernels"]]
        for _ in range(10):
            if body["next"] is None:
                assert body["total"] == len(found) and len(set(found)) == len(found)
                return found
            body = (await ask(who, "GET", f"/api/admin/kernels?limit=2{query}&after={body['next']}")).json()
            found += [kernel["id"] for kernel in body["kernels"]]
        raise AssertionError("the pages do not end")

    everything = [record.id for record in (*made, other)]
    assert await seen("admin", "&sort=created") == everything
    assert await seen("admin") == everything[::-1]
    for sort in ("owner", "-owner", "kernelspec", "cpu", "-memory", "status", "activity", "-activity", "gpu", "proxy"):
        assert set(await seen("admin", f"&sort={sort}")) == set(everything), sort
    assert set(await seen("lea")) == {made[0].id, made[1].id, made[3].id}
    assert set(await seen("otto")) == {made[2].id, other.id}
    assert (
        set(await seen("admin", "&group=analysts"))
        == set(await seen("lea", "&group=analysts"))
        == set(await seen("lea"))
    )
    assert set(await seen("admin", "&owner=bob")) == {made[0].id, made[1].id}
    assert await seen("otto", "&owner=bob") == [] == await seen("otto", "&owner=zoe")
    assert await seen("admin", "&kernelspec=other") == await seen("admin", "&q=50%25_X") == [other.id]
    assert await seen("admin", "&q=%25") == [other.id], "a percent sign is one"
    assert await seen("admin", "&status=failed") == []
    facts = (await ask("admin", "GET", "/api/admin/kernels?owner=lea")).json()["kernels"][0]
    assert facts["owner"] == "lea" and facts["kernelspec"] == "sleep" and facts["status"] in ("starting", "running")
    assert not {"launch", "link_secret", "launch_token", "proxy_state"} & set(facts)


async def test_kernels_of_others_are_stopped_with_a_reason(server: WebServer, mini: MiniGateway, ask: Ask) -> None:
    bob = await mini.service.create(CALLERS["bob"], CreateKernel(name="sleep"))
    carol = await mini.service.create(CALLERS["carol"], CreateKernel(name="sleep"))
    unknown = str(uuid.uuid4())
    body = {"ids": [bob.id, carol.id, unknown, bob.id], "message": "The node is needed."}
    answer = await ask("lea", "POST", "/api/admin/kernels/stop", json=body)
    assert answer.status_code == 202
    assert answer.json() == {"stopping": [bob.id], "unknown": [carol.id, unknown]}
    said = "Stopped by lea: The node is needed."
    row = await mini.service.store.get(bob.id)
    assert row is not None and row.message == said and row.target is KernelTarget.ENDED
    (line,) = await stops(mini)
    assert (line.actor, line.subject, line.detail) == ("lea", "bob", {"kernel": bob.id, "message": said})


async def stops(mini: MiniGateway) -> list[Line]:
    """What the audit trail says of stops."""
    return list(await mini.db.read(lambda tx: audit_lines(tx, action="kernel.stop")))


async def test_a_stop_is_in_the_audit_trail_before_anybody_waits_for_its_end(
    server: WebServer, mini: MiniGateway, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that dies while kernels take their time has accounted for what it did."""
    waits = asyncio.Event()

    async def for_ever(*_: Any) -> None:
        waits.set()
        await asyncio.Event().wait()

    bob = await mini.service.create(CALLERS["bob"], CreateKernel(name="sleep"))
    monkeypatch.setattr(mini.service.controller, "wait", for_ever)
    asking = asyncio.ensure_future(ask("admin", "POST", "/api/admin/kernels/stop", json={"ids": [bob.id]}))
    await asyncio.wait_for(waits.wait(), 20)
    assert [line.subject for line in await stops(mini)] == ["bob"]
    asking.cancel()


async def test_a_failed_kernel_is_stopped_off_the_lists_and_a_stopped_one_is_unknown(
    server: WebServer, mini: MiniGateway, ask: Ask
) -> None:
    bob = await mini.service.create(CALLERS["bob"], CreateKernel(name="sleep"))
    await mini.service.stop(bob.id, "It was idle for too long.")

    async def has_failed() -> bool:
        row = await mini.service.store.get(bob.id)
        return row is not None and row.status is KernelStatus.FAILED

    await eventually(has_failed, "the kernel's end", timeout=20)
    body = {"ids": [bob.id], "message": "Away with it."}
    answer = await ask("admin", "POST", "/api/admin/kernels/stop", json=body)
    assert answer.json() == {"stopping": [bob.id], "unknown": []}
    assert (await ask("admin", "GET", "/api/admin/kernels")).json()["total"] == 0
    row = await mini.service.store.get(bob.id)
    assert row is not None and row.message == "It was idle for too long.", "why it ended has not changed"
    assert len(await stops(mini)) == 1
    assert (await ask("admin", "POST", "/api/admin/kernels/stop", json=body)).json()["unknown"] == [bob.id]
    assert len(await stops(mini)) == 1, "nothing was stopped"


# -- policies


async def test_two_admins_at_once(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    path = "/api/quota/policies/led"
    read = await ask("admin", "GET", path)
    assert read.headers["ETag"] == '"1"'
    first = await ask("lea", "PUT", path, json={**read.json(), "hard": 2}, headers={"If-Match": '"1"'})
    assert first.status_code == 200 and first.headers["ETag"] == '"2"' and first.json()["hard"] == 2
    for headers, body in (
        ({"If-Match": '"1"'}, NEW),
        ({}, {**NEW, "version": 1}),
        ({}, NEW),
        ({"If-Match": "*"}, NEW),
        ({"If-Match": '"2"'}, {**NEW, "version": 1}),
    ):
        said = is_error(await ask("admin", "PUT", path, json=body, headers=headers), 409)["message"]
        assert "lea" in said or "ETag" in said
    assert quotas.kept["led"].hard == 2
    is_error(await ask("admin", "DELETE", path, headers={"If-Match": '"1"'}), 409)
    is_error(await ask("admin", "PUT", "/api/quota/policies/gone", json={**NEW, "version": 3}), 409)
    assert (await ask("admin", "DELETE", path, headers={"If-Match": '"2"'})).status_code == 204


class Stored(Quotas):
    """Policies in rows, as the gateway keeps them."""

    def __init__(self, db: Any) -> None:
        super().__init__()
        self.db, self.store = db, PolicyStore()

    async def policies(self) -> Any:
        return await self.db.read(self.store.all)

    async def policy(self, name: str) -> Policy | None:
        return next((policy for policy in await self.policies() if policy.name == name), None)

    async def put(self, policy: Policy, actor: str, dry_run: bool = False) -> Any:
        return Put(await self.db.write(lambda tx: self.store.put(tx, policy, actor)))

    async def delete(self, name: str, actor: str) -> None:
        await self.db.write(lambda tx: self.store.delete(tx, name, actor))


async def test_of_many_changes_at_once_one_wins(server: WebServer, mini: MiniGateway, ask: Ask) -> None:
    server.services.quotas, server.services.audit = Stored(mini.db), AuditLog()
    path = "/api/quota/policies/race"

    async def change(hard: int, version: int) -> int:
        answer = await ask("admin", "PUT", path, json={**NEW, "hard": hard, "version": version})
        if answer.status_code == 409:
            is_error(answer, 409)
        return answer.status_code

    made = await asyncio.gather(*(change(hard, 0) for hard in range(8)))
    assert sorted(made) == [201, *[409] * 7]
    for version in (1, 2):
        changed = await asyncio.gather(*(change(10 * version + n, version) for n in range(8)))
        assert sorted(changed) == [200, *[409] * 7]
    model = (await ask("admin", "GET", path)).json()
    assert model["version"] == 3 and 20 <= model["hard"] < 28
    again = await ask("admin", "PUT", path, json=model)
    assert again.status_code == 200 and again.json()["version"] == 4, "as it was read, with everything in it"
    assert (await ask("admin", "DELETE", path)).status_code == 204
    is_error(await ask("admin", "PUT", path, json=model), 409)
    entries = (await ask("admin", "GET", "/api/audit?subject=race&limit=3")).json()
    assert [entry["action"] for entry in entries["entries"]] == ["policy.delete", "policy.set", "policy.set"]
    assert entries["entries"][0]["actor"] == "admin" and entries["next"]
    assert (await ask("admin", "GET", "/api/audit/verify")).json()["ok"] is True
    await mini.db.write(lambda tx: tx.execute(text("UPDATE audit SET actor = 'nobody' WHERE id = 2")) and None)
    assert (await ask("admin", "GET", "/api/audit/verify")).json()["ok"] is False


async def test_what_is_read_can_be_sent_back(server: WebServer, ask: Ask) -> None:
    body = {
        "subject": "group:analysts",
        "object": "kernelspec:spark_*",
        "resource": "memory",
        "counts": "together",
        "window": "now",
        "hard": "64G",
        "soft": "512MiB",
        "action": "queue",
        "queue_seconds": 600,
        "valid_from": "2030-01-31",
        "valid_until": "2030-02-28T12:00:00+01:00",
        "weekly": [{"days": [4, 0, 4], "begin": "22:00", "end": "24:00"}],
        "note": "Two\nlines",
    }
    made = await ask("admin", "PUT", "/api/quota/policies/m", json=body)
    assert made.status_code == 201, made.text
    model = made.json()
    assert (model["hard"], model["soft"]) == (64 * 2**30, 512 * 2**20)
    assert model["valid_until"] == "2030-02-28T11:00:00.000000Z"
    assert model["weekly"] == [{"days": [0, 4], "begin": "22:00", "end": "24:00"}]
    read = (await ask("admin", "GET", "/api/quota/policies/m")).json()
    again = await ask("admin", "PUT", "/api/quota/policies/m", json=read)
    assert again.status_code == 200
    keep = {k: v for k, v in again.json().items() if k not in ("version", "problems")}
    assert keep == {k: v for k, v in read.items() if k != "version"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "`subject`"),
        ({"subject": "bob"}, "`subject`"),
        ({"subject": "user:"}, "`subject`"),
        ({"subject": "root:bob"}, "`subject`"),
        ({"subject": 7}, "`subject`"),
        ({**NEW, "hrad": 1}, "`hrad`"),
        ({**NEW, "hard": "1; DROP TABLE"}, "`hard`"),
        ({**NEW, "hard": -1}, "`hard`"),
        ({**NEW, "hard": True}, "`hard`"),
        ({**NEW, "hard": 1e300}, "`hard`"),
        ({**NEW, "hard": 10**400}, "`hard`"),
        ({**NEW, "hard": "4G"}, "`hard`"),
        ({**NEW, "hard": "4", "resource": "memory"}, "`hard`"),
        ({**NEW, "hard": "NaN"}, "`hard`"),
        ({**NEW, "resource": "bananas"}, "`resource`"),
        ({**NEW, "object": "spark"}, "`object`"),
        ({**NEW, "priority": "high"}, "`priority`"),
        ({**NEW, "priority": 10**400}, "`priority`"),
        ({**NEW, "enabled": "yes"}, "`enabled`"),
        ({**NEW, "valid_until": "tomorrow"}, "`valid_until`"),
        ({**NEW, "valid_until": "2030-02-31"}, "`valid_until`"),
        ({**NEW, "queue_seconds": 10**12}, "`queue_seconds`"),
        ({**NEW, "weekly": [{"days": [7], "begin": "00:00", "end": "01:00"}]}, "`weekly`"),
        ({**NEW, "weekly": [{"days": [1], "begin": "24:30", "end": "01:00"}]}, "`weekly`"),
        ({**NEW, "note": "x" * 3000}, "`note`"),
        ({**NEW, "version": "1"}, "`version`"),
        ({**NEW, "name": "another"}, "`name`"),
        ({**NEW, "origin": "grant"}, "`valid_until`"),
        ({"subject": "group:a", "origin": "grant", "valid_until": UNTIL}, "one user"),
    ],
)
async def test_bad_policies(quotas: Quotas, server: WebServer, ask: Ask, body: dict[str, Any], said: str) -> None:
    found = is_error(await ask("admin", "PUT", "/api/quota/policies/new", content=json.dumps(body)), 400)
    assert said in found["message"]
    assert "new" not in quotas.kept


async def test_bad_json_amounts_and_names(server: WebServer, ask: Ask) -> None:
    for content in (b'{"subject": "user:bob", "hard": NaN}', b'{"subject": "user:bob", "hard": Infinity}', b"[", b"7"):
        is_error(await ask("admin", "PUT", "/api/quota/policies/new", content=content), 400)
    for name in ("a%20b", "%2e%2e", "-x", "x" * 101, "a%2Fb", "%C3%A4"):
        is_error(await ask("admin", "PUT", f"/api/quota/policies/{name}", json=NEW), 400)
        is_error(await ask("admin", "GET", f"/api/quota/policies/{name}"), 404)


async def test_grants_have_an_approver_and_win(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    grant = {**NEW, "origin": "grant", "valid_until": UNTIL, "approver": "somebody"}
    made = (await ask("admin", "PUT", "/api/quota/policies/g1", json=grant)).json()
    assert (made["approver"], made["priority"], made["origin"]) == ("admin", 1000, "grant")
    lead = (await ask("lea", "PUT", "/api/quota/policies/g2", json={**grant, "delegated": False})).json()
    assert (lead["approver"], lead["delegated"]) == ("lea", True), "beside what the administrator has set"
    is_error(await ask("lea", "PUT", "/api/quota/policies/g4", json={**grant, "subject": "user:lea"}), 403)
    assert quotas.kept["g1"].origin is Origin.GRANT


async def test_a_dry_run_and_a_preview_change_nothing(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    assert (await ask("admin", "PUT", "/api/quota/policies/new?dry_run=true", json=NEW)).status_code == 200
    preview = await ask("admin", "POST", "/api/quota/policies/new/preview", json={**NEW, "days": 7})
    assert preview.json()["simulation"]["launches"] == 20
    assert "new" not in quotas.kept
    mine = (await ask("lea", "POST", "/api/quota/policies/new/preview", json=NEW)).json()["simulation"]
    assert [one["user"] for one in mine["by_user"]] == ["bob"] and mine["launches"] == 10
    assert "carol" not in json.dumps(mine)


async def test_lists_are_paged_and_filtered(server: WebServer, ask: Ask) -> None:
    names: list[str] = []
    query = "limit=3"
    for _ in range(5):
        page = (await ask("admin", "GET", f"/api/quota/policies?{query}")).json()
        names += [policy["name"] for policy in page["policies"]]
        if page["next"] is None:
            break
        query = f"limit=3&after={page['next']}"
    assert names == sorted(POLICIES)
    lead = (await ask("lea", "GET", "/api/quota/policies")).json()["policies"]
    assert {policy["name"] for policy in lead} == {"all", "analysts", "cap", "bob-one", "led"}
    one = (await ask("admin", "GET", "/api/quota/policies?subject=user:bob")).json()
    assert one["total"] == 2


# -- requests for more


async def test_asking_for_more(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    wanted = {"policy": "bob-one", "amount": 3, "until": UNTIL, "reason": "A deadline."}
    made = await ask("bob", "POST", "/api/requests", json=wanted)
    assert made.status_code == 201 and made.json()["owner"] == "bob"
    foreign = await ask("bob", "POST", "/api/requests", json={**wanted, "policy": "carol-one"})
    unknown = await ask("bob", "POST", "/api/requests", json={**wanted, "policy": "none"})
    assert shown(foreign, "carol-one") == shown(unknown, "none") and foreign.status_code == 404
    for wrong in ({"amount": -1}, {"amount": "x"}, {"until": "2020-01-01"}, {"until": "2990-01-01"}, {"reason": " "},
                  {"amount": None}, {"owner": "carol"}, {"until": None}):  # fmt: skip
        is_error(await ask("bob", "POST", "/api/requests", json={**wanted, **wrong}), 400)

    async def seen(who: str) -> list[str]:
        return [one["owner"] for one in (await ask(who, "GET", "/api/requests")).json()["requests"]]

    assert await seen("bob") == await seen("lea") == await seen("admin") == ["bob"]
    assert await seen("carol") == await seen("otto") == []
    is_error(await ask("lea", "POST", "/api/requests/1/answer", json={"grant": False}), 400)
    granted = await ask("lea", "POST", "/api/requests/1/answer", json={"grant": True, "amount": 2})
    assert granted.json()["state"] == "granted"
    assert quotas.calls[-1] == ("answer", 1, "lea", True, {"until": None, "amount": 2.0, "lead": True})
    is_error(await ask("lea", "POST", "/api/requests/1/answer", json={"grant": True}), 404)
    quotas.asked[7] = Request(7, "lea", "analysts", 9, None, "mine")
    is_error(await ask("lea", "POST", "/api/requests/7/answer", json={"grant": True}), 403)
    assert (await ask("admin", "POST", "/api/requests/7/answer", json={"grant": True})).status_code == 200
    for number in ("0x1", "99999999999", "-1", "%EF%BC%91"):
        is_error(await ask("lea", "POST", f"/api/requests/{number}/answer", json={"grant": True}), 404)


# -- what is asked strictly


async def test_arguments_that_are_not_known_are_said(server: WebServer, ask: Ask) -> None:
    for path in (
        "/api/limits?usr=bob",
        "/api/limits?user=a&user=b",
        "/api/limits?user=%00",
        "/api/usage?by=magic",
        "/api/usage?from=2030-13-01",
        "/api/usage?from=2030-02-01&to=2030-01-01",
        "/api/usage?from=1980-01-01&to=2030-01-01",
        "/api/usage?format=xml",
        "/api/admin/kernels?limit=0",
        "/api/admin/kernels?limit=1e3",
        "/api/admin/kernels?limit=501",
        "/api/admin/kernels?sort=launch_token",
        "/api/admin/kernels?status=gone",
        "/api/admin/kernels?q=%0A",
        "/api/admin/kernels?after=xyz",
        "/api/admin/kernels?after=WzEsMl0",
        "/api/admin/kernels?after=WyJ4IiwieSJd",
        "/api/admin/kernels?sort=cpu&after=W05hTiwieSJd",
        "/api/admin/people?after=WyIxIl0",
        "/api/audit?after=WzFlOTk5XQ",
        "/api/audit?after=Wzk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5XQ",
    ):
        is_error(await ask("admin", "GET", path), 400)


async def test_a_page_in_a_browser_cannot_act_for_its_visitor(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    """No cookie, no token in the address, no form counts; a replayed change meets its own version."""
    cookie = {"Cookie": "service-hub-gateway=admin-token; _xsrf=x"}
    path = "/api/quota/policies/forged"
    is_error(await ask(None, "PUT", path, json=NEW, headers=cookie), 401)
    is_error(await ask(None, "PUT", f"{path}?token=admin-token", json=NEW), 401)
    is_error(await ask("admin", "POST", "/api/quota/apply", data={"text": "x"}), 400)
    assert not quotas.calls
    change = {**NEW, "version": 1}
    assert (await ask("admin", "PUT", "/api/quota/policies/bob-one", json=change)).status_code == 200
    is_error(await ask("admin", "PUT", "/api/quota/policies/bob-one", json=change), 409)


async def test_bodies_are_bounded(server: WebServer, ask: Ask) -> None:
    is_error(await ask("admin", "POST", "/api/quota/apply", json={"text": "x" * 2**20}), 413)
    is_error(await ask("admin", "POST", "/api/quota/apply", json={"text": 7}), 400)
    is_error(await ask("admin", "POST", "/api/admin/kernels/stop", json={"ids": ["x"] * 1001}), 400)
    for ids in ([], "x", [7], [""], ["\u0007"], None):
        is_error(await ask("admin", "POST", "/api/admin/kernels/stop", json={"ids": ids}), 400)
    many = [str(uuid.uuid4()) for _ in range(1000)]
    answer = await ask("admin", "POST", "/api/admin/kernels/stop", json={"ids": many})
    assert answer.json() == {"stopping": [], "unknown": many}


# -- reports


async def test_whose_usage_is_reported(server: WebServer, ask: Ask) -> None:
    reports: Any = server.services.reports
    cases: list[tuple[str, str, str | None, tuple[str, ...] | None]] = [
        ("bob", "", "bob", None),
        ("ci", "", "services/ci", None),
        ("lea", "", None, ("analysts",)),
        ("lea", "?user=lea", "lea", None),
        ("lea", "?user=bob", "bob", ("analysts",)),
        ("admin", "", None, None),
        ("admin", "?user=bob", "bob", None),
        ("admin", "?group=x", None, ("x",)),
    ]
    for who, query, owner, groups in cases:
        assert (await ask(who, "GET", f"/api/usage{query}")).status_code == 200
        assert (reports.asked[-1].owner, reports.asked[-1].groups) == (owner, groups), (who, query)
    rows = (await ask("lea", "GET", "/api/usage?by=group")).json()["rows"]
    assert [row["key"] for row in rows] == ["analysts"], "not the other groups of her people"
    table = await ask("bob", "GET", "/api/usage?format=table")
    assert table.headers["Content-Type"].startswith("text/plain")
    csv = await ask("bob", "GET", "/api/usage?format=csv&from=2030-01-01&to=2030-02-01")
    assert csv.headers["Content-Type"].startswith("text/csv") and csv.headers["X-Content-Type-Options"] == "nosniff"
    assert csv.headers["Content-Disposition"] == 'attachment; filename="usage-2030-01-01-2030-02-01.csv"'


async def test_prices_and_the_ledger(server: WebServer, ask: Ask) -> None:
    reports: Any = server.services.reports
    for wrong in ({"core_hour": -1}, {"core_hour": 10**400}, {"gpu_models": {"a": -1}}, {"gpu_models": []}, {"x": 1}):
        is_error(await ask("admin", "POST", "/api/prices", json=wrong), 400)
    assert (await ask("admin", "POST", "/api/prices", json={"gpu_models": {"a100": 2.5}})).status_code == 201
    assert reports.written[-1][2]["gpu_models"] == {"a100": 2.5}
    for month in ("2030-13", "2030-1", "x", "", None):
        is_error(await ask("admin", "POST", "/api/ledger/close", json={"month": month}), 400)
    for wrong in ({"entry": 0}, {"entry": "1"}, {"seconds": None}, {"note": ""}):
        body = {"entry": 1, "seconds": 1, "note": "x", **wrong}
        is_error(await ask("admin", "POST", "/api/ledger/corrections", json=body), 400)


async def test_a_real_report_is_safe_for_a_spreadsheet(server: WebServer, mini: MiniGateway, ask: Ask) -> None:
    server.services.reports = LedgerReports()
    hour = {"cpu": 2.0, "memory": 0, "gpu": 0, "gpu_model": "", "started": 1_700_000_000.0, "stopped": 1_700_003_600.0}
    who = {"groups": "\nanalysts\n", "cost_center": "", "kernelspec": "p", "proxy": "local", "queue": "", "note": ""}
    kept = {"kind": "interval", "seconds": 3600.0, "price_version": 0, "recorded_at": utcnow(), "kernel_id": "k"}
    owner = "=cmd|'/c calc'!A1"
    await mini.db.write(lambda tx: tx.add(LedgerEntry(owner=owner, **hour, **who, **kept)))
    query = "from=2023-11-01&to=2023-12-01"
    csv = (await ask("lea", "GET", f"/api/usage?format=csv&{query}")).text
    assert f"'{owner}" in csv and f",{owner}" not in csv and not any(line.startswith("=") for line in csv.splitlines())
    found = (await ask("lea", "GET", f"/api/usage?{query}")).json()
    assert [(row["key"], row["core_hours"]) for row in found["rows"]] == [(owner, 2.0)]
    assert (await ask("otto", "GET", f"/api/usage?{query}")).json()["rows"] == []
    assert owner in (await ask("admin", "GET", f"/api/usage?format=table&{query}")).text
    assert (await ask("admin", "POST", "/api/prices", json={"core_hour": 0.5})).json()["version"] == 1
    fixed = await ask("admin", "POST", "/api/ledger/corrections", json={"entry": 1, "seconds": -60, "note": "late"})
    assert fixed.status_code == 201 and fixed.json()["corrects"] == 1
    moved = {"entry": 1, "cost_center": "4711", "note": "late"}
    fixed = await ask("admin", "POST", "/api/ledger/corrections", json=moved)
    assert fixed.status_code == 201 and fixed.json()["cost_center"] == "4711"
    is_error(await ask("admin", "POST", "/api/ledger/corrections", json={"entry": 1, "note": "nothing"}), 400)
    is_error(await ask("admin", "POST", "/api/ledger/corrections", json={"entry": 99, "seconds": 1, "note": "x"}), 404)
    listed = (await ask("admin", "GET", "/api/ledger/entries?limit=3")).json()
    assert [one["id"] for one in listed["entries"]] == [4, 3, 2] and listed["entries"][0]["corrects"] == 1
    rest = (await ask("admin", "GET", f"/api/ledger/entries?limit=3&after={listed['next']}")).json()
    assert [(one["id"], one["owner"], one["groups"], one["started"][:19]) for one in rest["entries"]] == [
        (1, owner, ["analysts"], "2023-11-14T22:13:20")
    ]
    assert rest["next"] is None
    await mini.db.write(
        lambda tx: tx.add(
            LedgerEntry(owner="bob", **hour, **{**who, "groups": "\nanalysts\n\nsecret\n"}, **kept, unix_user="bob")
        )
    )
    [bobs, *others] = (await ask("lea", "GET", "/api/ledger/entries")).json()["entries"]
    assert (bobs["groups"], bobs["unix_user"]) == (["analysts"], None), "a lead's business is her own group"
    assert len(others) == 4
    [bobs] = (await ask("bob", "GET", "/api/ledger/entries")).json()["entries"]
    assert (bobs["groups"], bobs["unix_user"]) == (["analysts", "secret"], "bob")
    assert (await ask("otto", "GET", "/api/ledger/entries")).json()["entries"] == []
    is_error(await ask("bob", "GET", "/api/ledger/entries?user=lea"), 404)
    closed = await ask("admin", "POST", "/api/ledger/close", json={"month": "2023-11"})
    assert closed.status_code == 200 and closed.json()["entries"] == 2
    is_error(await ask("admin", "POST", "/api/ledger/close", json={"month": "2023-11"}), 409)


async def test_the_audit_trail_is_paged(server: WebServer, ask: Ask) -> None:
    audit: Any = server.services.audit
    for number in range(5):
        audit.append(None, actor="<b>", action="login", subject=f"u{number}", outcome="ok", detail={})
    first = (await ask("admin", "GET", "/api/audit?limit=3")).json()
    rest = (await ask("admin", "GET", f"/api/audit?limit=3&after={first['next']}")).json()
    assert [entry["id"] for entry in (*first["entries"], *rest["entries"])] == [5, 4, 3, 2, 1]
    assert rest["next"] is None


# -- people, the launcher, maintenance


async def test_people(server: WebServer, mini: MiniGateway, ask: Ask) -> None:
    await mini.service.create(CALLERS["bob"], CreateKernel(name="sleep"))
    everybody = (await ask("admin", "GET", "/api/admin/people?limit=2")).json()
    assert [one["name"] for one in everybody["people"]] == ["admin", "bob"] and everybody["total"] == 6
    assert everybody["people"][1]["kernels"] == 1 and "limits" not in everybody["people"][1]
    following = (await ask("admin", "GET", f"/api/admin/people?limit=2&after={everybody['next']}")).json()
    assert [one["name"] for one in following["people"]] == ["carol", "hubadmin"]
    mine = (await ask("lea", "GET", "/api/admin/people?limits=true")).json()
    assert [one["name"] for one in mine["people"]] == ["bob", "lea"] and mine["next"] is None
    assert {limit["policy"] for limit in mine["people"][0]["limits"]} == {"all", "analysts", "cap", "bob-one", "led"}
    assert (await ask("lea", "GET", "/api/admin/people?q=caro")).json()["people"] == []


async def test_the_launcher_says_where_there_is_no_room(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    quotas.rooms = {"sleep": Verdict("refused", sentence="You have reached your limit of 1 kernel.")}
    found = (await ask("bob", "GET", "/api/kernelspecs")).json()["kernelspecs"]
    assert found["sleep"]["spec"]["display_name"] == "Sleep (no room)"
    assert found["sleep"]["spec"]["metadata"]["hub_gateway"]["no_room"] == quotas.rooms["sleep"].sentence
    assert found["other"]["spec"]["display_name"] == "Sleep" and "no_room" not in json.dumps(found["other"])
    assert (await ask("bob", "GET", "/api/kernelspecs/sleep")).json() == found["sleep"]
    for _ in range(5):
        await ask("bob", "GET", "/api/kernelspecs")
    assert quotas.calls == [("room", "bob")], "it is polled: asked once in two seconds"
    quotas.rooms = {}
    assert (await ask("carol", "GET", "/api/kernelspecs/sleep")).json()["spec"]["display_name"] == "Sleep"


async def test_a_launcher_does_not_wait_for_limits(
    server: WebServer, quotas: Quotas, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub_gateway.web.kernelspecs.ROOM_TIMEOUT", 0.05)
    quotas.gate = asyncio.Event()
    assert set((await ask("bob", "GET", "/api/kernelspecs")).json()["kernelspecs"]) == {"sleep", "other"}
    quotas.gate.set()
    quotas.gate, quotas.error = None, Unavailable("The database is away.")
    assert set((await ask("carol", "GET", "/api/kernelspecs")).json()["kernelspecs"]) == {"sleep", "other"}


async def test_maintenance(server: WebServer, quotas: Quotas, ask: Ask) -> None:
    said = "The cluster is upgraded until 18:00."
    assert (await ask("admin", "PUT", "/api/maintenance", json={"sentence": said})).json() == {"sentence": said}
    assert (await ask("bob", "GET", "/api/maintenance")).json() == {"sentence": said}
    for wrong in ("x\ny", "x" * 501, 7):
        is_error(await ask("admin", "PUT", "/api/maintenance", json={"sentence": wrong}), 400)
    assert (await ask("admin", "PUT", "/api/maintenance", json={"sentence": None})).json() == {"sentence": None}


async def test_clusters(server: WebServer, mini: MiniGateway, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (await ask("admin", "GET", "/api/admin/clusters")).json()
    assert {finding["level"] for finding in found["local"]} <= {"ok", "warning", "error"}

    async def away() -> Any:
        raise Unavailable("The cluster cannot be reached.")

    monkeypatch.setattr(mini.proxies.get("local"), "check", away)
    (finding,) = (await ask("admin", "GET", "/api/admin/clusters")).json()["local"]
    assert (finding["level"], finding["message"]) == ("error", "The cluster cannot be reached.")


async def test_a_gateway_without_these_parts(mini: MiniGateway) -> None:
    async with WebServer(mini.service, authenticator=Tokens(), db=mini.db) as made, made.client("admin") as admin:
        for path in ("/api/limits", "/api/quota/policies", "/api/usage", "/api/audit", "/api/identity", "/api/queue"):
            is_error(await admin.get(path), 404)
        assert (await admin.get("/api/kernelspecs")).status_code == 200


def test_callers_are_what_the_tests_take_them_for() -> None:
    assert isinstance(CALLERS["hubadmin"], Caller) and CALLERS["hubadmin"].admin and not CALLERS["hubadmin"].scopes
