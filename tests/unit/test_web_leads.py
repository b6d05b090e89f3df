"""The lead of a group whom a Hub knows: what it says now is what counts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from traitlets.config import Config, Configurable

from hub_gateway.auth.hub import HubService
from hub_gateway.auth.scopes import ADMIN, QUOTAS_WRITE
from hub_gateway.quotas.types import Policy, SubjectKind
from tests.harness.fake_hub import ACCESS, FakeHub
from tests.harness.tenancy import Quotas
from tests.harness.web import WebServer
from tests.unit.test_web_api import is_error

BASE_URL = "/services/hub-gateway/"
NEW = {"subject": "user:bob", "hard": 2}


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHub]:
    made = FakeHub()
    made.groups = {"analysts": ["bob", "lea"], "others": ["carol"]}
    await made.start()
    for name, value in made.environment(BASE_URL).items():
        monkeypatch.setenv(name, value)
    yield made
    await made.stop()


@pytest.fixture
async def server(hub: FakeHub) -> AsyncIterator[WebServer]:
    config = Config({"HubAuthenticator": {"hub_timeout": 2.0}, "HubPeople": {"request_timeout": 2.0}})
    service = HubService(cookie_secret=b"c" * 32, base_url=BASE_URL, parent=Configurable(config=config))
    quotas = Quotas({"all": Policy("all", SubjectKind.EVERYONE, hard=9, version=1)})
    authenticator = service.authenticator
    async with WebServer(None, authenticator=authenticator, hub=service, base_url=BASE_URL, quotas=quotas) as made:
        yield made
    await authenticator.close()


def client(server: WebServer, token: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"token {token}"}, timeout=30)


async def test_a_lead_sets_limits_of_who_is_in_the_group_now(server: WebServer, hub: FakeHub) -> None:
    token = hub.issue("lea", scopes=(ACCESS, f"{QUOTAS_WRITE}!group=analysts"))
    async with client(server, token) as lea:
        assert (await lea.put("/api/quota/policies/a", json=NEW)).status_code == 201
        assert (await lea.get("/api/limits?user=bob")).json()["groups"] == ["analysts"]
        is_error(await lea.put("/api/quota/policies/b", json={"subject": "user:carol"}), 403)
        hub.groups["analysts"].remove("bob")
        hub.groups["others"].append("bob")
        is_error(await lea.put("/api/quota/policies/c", json=NEW), 403)
        assert (await lea.get("/api/quota/policies/a")).status_code == 200, "seen for some seconds more"


async def test_a_token_that_was_revoked_or_lost_its_scope_changes_nothing(server: WebServer, hub: FakeHub) -> None:
    token = hub.issue("admin", scopes=(ACCESS, ADMIN))
    async with client(server, token) as admin:
        assert (await admin.put("/api/quota/policies/a", json=NEW)).status_code == 201
        hub.tokens[token]["scopes"] = [ACCESS]
        is_error(await admin.put("/api/quota/policies/b", json=NEW), 403)
        del hub.tokens[token]
        is_error(await admin.put("/api/quota/policies/b", json=NEW), 401)
        is_error(await admin.get("/api/quota/policies"), 401)


async def test_while_the_hub_is_away_is_read_but_not_changed(server: WebServer, hub: FakeHub) -> None:
    token = hub.issue("admin", scopes=(ACCESS, ADMIN))
    async with client(server, token) as admin:
        assert (await admin.get("/api/quota/policies")).status_code == 200
        await hub.stop()
        assert (await admin.get("/api/quota/policies")).status_code == 200
        for path in ("/api/limits?user=bob", "/api/admin/people"):
            assert "JupyterHub" in is_error(await admin.get(path), 503)["message"]
        said = is_error(await admin.put("/api/quota/policies/a", json=NEW), 503)
        assert said["message"].startswith("The JupyterHub cannot be asked")
        await hub.start()
        assert (await admin.put("/api/quota/policies/a", json=NEW)).status_code == 201


async def test_a_gateway_whose_role_lacks_scopes_says_so(
    server: WebServer, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hub.lists = False
    async with client(server, hub.issue("lea", scopes=(ACCESS, f"{ADMIN}!group=analysts"))) as lea:
        is_error(await lea.get("/api/limits?user=bob"), 503)
    assert "list:groups" in caplog.text
