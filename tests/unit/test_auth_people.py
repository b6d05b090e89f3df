"""Users and groups, from the Hub and from the token file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jupyterhub.httpclient import JupyterHubHTTPClient
from traitlets.config import Config, Configurable

from hub_gateway.auth.base import Caller
from hub_gateway.auth.hub import HubService
from hub_gateway.auth.hub_people import HubPeople
from hub_gateway.auth.scopes import ADMIN
from hub_gateway.auth.tokenfile import TokenFile
from hub_gateway.errors import Unavailable
from hub_gateway.identity.mapper import IdentityMapper
from tests.harness.fake_hub import FakeHub
from tests.unit.test_auth_tokenfile import entry, write


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHub]:
    made = FakeHub()
    made.groups = {"analysts": ["bob", "carol"], "a/b ü": ["bob"], **{f"g{n}": [] for n in range(7)}}
    made.properties = {"analysts": {"cost_center": "4711"}}
    made.users = {"dave", "Ärmel"}
    await made.start()
    for name, value in made.environment("/services/hub-gateway/").items():
        monkeypatch.setenv(name, value)
    yield made
    await JupyterHubHTTPClient.loop_instance().close()
    await made.stop()


def people(**options: float) -> HubPeople:
    config = Config({"HubPeople": {"request_timeout": 2.0, **options}})
    return HubService(
        cookie_secret=b"c" * 32, base_url="/services/hub-gateway/", parent=Configurable(config=config)
    ).people


async def test_people_of_a_hub(hub: FakeHub) -> None:
    found = people()
    bob = await found.user("bob")
    assert bob is not None and bob.groups == {"analysts", "a/b ü"} and not bob.admin
    assert await found.user("nobody") is None and await found.group("nobody") is None
    analysts = await found.group("analysts")
    assert analysts is not None and analysts.users == {"bob", "carol"}
    assert analysts.properties == {"cost_center": "4711"}
    assert await found.members(["analysts", "a/b ü", "nobody"]) == {"bob", "carol"}
    assert len(await found.groups()) == 9, "all pages"
    first = await found.page(limit=3)
    assert ([person.name for person in first.people], first.total, first.next) == (["bob", "carol", "dave"], 4, 3)
    assert [person.name for person in (await found.page(offset=3, limit=3)).people] == ["Ärmel"]
    assert [person.name for person in (await found.page("AR")).people] == ["carol"]


async def test_answers_are_remembered_for_a_while(hub: FakeHub) -> None:
    found = people()
    for _ in range(3):
        await found.members(["analysts"])
    assert hub.requests["/hub/api/groups/analysts"] == 1
    hub.groups["analysts"] = ["carol"]
    assert await found.members(["analysts"]) == {"bob", "carol"}
    assert await found.members(["analysts"], fresh=True) == {"carol"}


async def test_a_hub_that_is_away_or_refuses(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    found = people(cache_seconds=0.0, request_timeout=0.2)
    hub.lists = False
    with pytest.raises(Unavailable) as refused:
        await found.groups()
    assert "list:groups" in refused.value.hint
    hub.lists = True
    for answer in ((500, "x"), (200, "<html>"), (200, "7"), (200, '{"items": 7}'), (200, '{"name": 7}'), (200, "[{}]")):
        hub.answer = answer
        with pytest.raises(Unavailable):
            await found.groups()
        with pytest.raises(Unavailable):
            await found.user("bob")
    hub.answer = None
    hub.hangs = True
    with pytest.raises(Unavailable):
        await found.user("bob")
    hub.hangs = False
    await hub.stop()
    with pytest.raises(Unavailable):
        await found.members(["analysts"])


async def test_a_launch_while_the_hub_restarts_is_billed_as_ever(hub: FakeHub) -> None:
    """However old what is known of the groups, whose members the tokens tell; but nobody's powers come from it."""
    found = people(cache_seconds=0.0)
    mapper = IdentityMapper(people=found)
    assert (await mapper.map(Caller("bob", groups=frozenset({"analysts"})))).cost_center == "4711"
    await hub.stop()
    assert (await mapper.map(Caller("bob", groups=frozenset({"analysts"})))).cost_center == "4711"
    with pytest.raises(Unavailable):
        await found.groups()
    newly_started = IdentityMapper(people=people())
    assert (await newly_started.map(Caller("bob", groups=frozenset({"analysts"})))).cost_center == ""


async def test_people_of_a_token_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "tokens.json",
        entry("a", "alice", groups=["x"], admin=True),
        entry("b", "alice", groups=["y"]),
        entry("c", "bob", groups=["y"]),
        entry("d", "old", groups=["z"], expires="2020-01-01"),
    )
    tokens = TokenFile(str(file), reload_seconds=0.0)
    await tokens.start()
    found = tokens.people
    assert [group.name for group in await found.groups()] == ["x", "y"]
    assert await found.members(["y", "z"]) == {"alice", "bob"}
    alice = await found.user("alice")
    assert alice is not None and alice.groups == {"x", "y"} and alice.admin
    assert await found.user("old") is None and await found.group("z") is None
    page = await found.page("A", limit=1)
    assert [person.name for person in page.people] == ["alice"] and page.total == 1
    caller = await tokens.authenticate("a")
    assert caller is not None and caller.scopes == {ADMIN}, "the file's admin is the gateway's"
    file.write_text(json.dumps({"tokens": [entry("c", "bob", groups=["new"])]}))
    assert await found.members(["new"], fresh=True) == {"bob"}
