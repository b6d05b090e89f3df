"""Identity from the Hub: what is believed, for how long, and what happens when it cannot be asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from traitlets.config import Config, Configurable

from hub_gateway.auth.hub import HubAuthenticator, HubService, caller_of
from hub_gateway.auth.scopes import KERNELS_READ, SCOPES, custom_scopes, granted
from hub_gateway.errors import BadRequest, Forbidden, TooManyRequests, Unavailable
from tests.harness.fake_hub import ACCESS, FakeHub
from tests.harness.waiting import eventually
from tests.harness.web import WebServer

BASE_URL = "/services/hub-gateway/"


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHub]:
    made = FakeHub()
    await made.start()
    for name, value in made.environment(BASE_URL).items():
        monkeypatch.setenv(name, value)
    yield made
    await made.stop()


def service(**traits: Any) -> HubService:
    config = Config({"HubAuthenticator": traits})
    return HubService(cookie_secret=b"c" * 32, base_url=BASE_URL, parent=Configurable(config=config))


@pytest.fixture
async def made(hub: FakeHub) -> AsyncIterator[HubService]:
    found = service(hub_timeout=5.0)
    yield found
    await found.authenticator.close()


@pytest.fixture
def authenticator(made: HubService) -> HubAuthenticator:
    return made.authenticator


def configured(authenticator: HubAuthenticator, **traits: Any) -> HubAuthenticator:
    for name, value in traits.items():
        setattr(authenticator, name, value)
    return authenticator


async def test_a_token_says_who_is_calling(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    token = hub.issue("alice", scopes=(ACCESS, "access:servers!server=alice/gpu"))
    caller = await authenticator.authenticate(token)
    assert caller is not None
    assert (caller.name, caller.kind, caller.groups, caller.server) == ("alice", "user", {"analysts"}, "gpu")
    assert await authenticator.authenticate("never-issued") is None


def test_the_server_is_told_from_its_own_token_only() -> None:
    def server(*scopes: str) -> str | None:
        return caller_of({"name": "alice", "scopes": scopes}).server

    assert server("access:servers!server=alice/") == ""
    assert server("access:servers!server=alice/gpu") == "gpu"
    assert server("access:servers!server=bob/gpu") is None
    assert server("access:servers!server=alice/a", "access:servers!server=alice/b") is None
    assert server("access:servers!user=alice") is None


def test_services_are_not_users() -> None:
    caller = caller_of({"name": "alice", "kind": "service", "scopes": []})
    assert caller.kind == "service" and caller.groups == frozenset()


async def test_a_token_that_may_not_access_the_service(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    token = hub.issue("alice", scopes=("access:services!service=other",))
    with pytest.raises(Forbidden, match=r"alice.*access:services"):
        await authenticator.authenticate(token)
    assert await authenticator.authenticate(hub.issue("root", scopes=("access:services",)))


async def test_many_requests_with_one_token_are_one_question(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    token = hub.issue("alice")
    hub.delay = 0.05
    callers = await asyncio.gather(*(authenticator.authenticate(token) for _ in range(40)))
    assert {caller.name for caller in callers if caller} == {"alice"} and hub.looked_up == 1
    await authenticator.authenticate(token)
    assert hub.looked_up == 1
    await authenticator.authenticate(token, fresh=True)
    assert hub.looked_up == 2


async def test_who_asks_anew_gets_no_answer_to_an_earlier_question(
    hub: FakeHub, authenticator: HubAuthenticator
) -> None:
    token = hub.issue("alice")
    hub.hangs = True
    earlier = asyncio.ensure_future(authenticator.authenticate(token))
    await eventually(lambda: hub.looked_up == 1, "the earlier question")
    anew = asyncio.ensure_future(authenticator.authenticate(token, fresh=True))
    await eventually(lambda: hub.looked_up == 2, "a question of its own")
    hub.hang.set()
    assert await earlier and await anew


async def test_cold_tokens_and_a_slow_hub_stop_nobody_else(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    """jupyterhub's own way takes four seconds for this, in which nothing else is answered."""
    tokens = [hub.issue(f"user{number}") for number in range(20)]
    hub.delay = 0.3

    class Kernels:
        async def list(self, caller: object) -> list[object]:
            return []

    async with WebServer(Kernels(), authenticator=authenticator) as server, server.client() as client:
        began = time.monotonic()
        asking = asyncio.gather(
            *(client.get("/api/kernels", headers={"Authorization": f"token {token}"}) for token in tokens)
        )
        await eventually(lambda: hub.looked_up > 0, "the questions")
        asked = time.monotonic()
        assert (await client.get("/healthz")).status_code == 200
        assert time.monotonic() - asked < 0.25
        answers = await asking
        assert {answer.status_code for answer in answers} == {200}
        assert time.monotonic() - began < 2.5


async def test_revocation_is_seen_soon(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    configured(authenticator, cache_seconds=0.1)
    token = hub.issue("alice")
    assert await authenticator.authenticate(token)
    del hub.tokens[token]
    assert await authenticator.authenticate(token), "for as long as the cache holds"

    async def refused() -> bool:
        return await authenticator.authenticate(token) is None

    await eventually(refused, "the revocation", timeout=5)


async def test_a_refusal_does_not_last(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    configured(authenticator, negative_cache_seconds=0.1)
    assert await authenticator.authenticate("late") is None
    hub.tokens["late"] = hub.tokens[hub.issue("alice")]

    async def let_in() -> bool:
        return await authenticator.authenticate("late") is not None

    await eventually(let_in, "the token that was issued meanwhile", timeout=5)


async def test_random_tokens_neither_fill_memory_nor_reach_the_hub_for_ever(hub: FakeHub, made: HubService) -> None:
    authenticator = service(cache_size=50, failures_per_minute=100).authenticator
    known = hub.issue("alice")
    configured(authenticator, cache_seconds=0.0)
    assert await authenticator.authenticate(known, remote_ip="10.0.0.1")
    refused = 0
    for number in range(150):
        try:
            assert await authenticator.authenticate(f"guess{number}", remote_ip="10.0.0.1") is None
        except TooManyRequests as error:
            refused += 1
            assert error.retry_after is not None and 0 < error.retry_after <= 60
    assert refused == 50 and hub.looked_up == 101
    assert len(authenticator._cache) <= 50
    assert await authenticator.authenticate("guess", remote_ip="10.0.0.2") is None, "another address is not concerned"


async def test_a_neighbours_guessing_does_not_keep_out_who_was_in(
    hub: FakeHub, authenticator: HubAuthenticator
) -> None:
    """All servers of a Hub may come from one address."""
    configured(authenticator, cache_seconds=0.0, failures_per_minute=5)
    alice = hub.issue("alice")
    assert await authenticator.authenticate(alice, remote_ip="10.0.0.1")
    for number in range(5):
        await authenticator.authenticate(f"guess{number}", remote_ip="10.0.0.1")
    with pytest.raises(TooManyRequests):
        await authenticator.authenticate("another", remote_ip="10.0.0.1")
    assert await authenticator.authenticate(alice, remote_ip="10.0.0.1")


async def test_a_server_with_an_expired_token_is_not_taken_for_guessing(
    hub: FakeHub, authenticator: HubAuthenticator
) -> None:
    configured(authenticator, failures_per_minute=3)
    for _ in range(50):
        assert await authenticator.authenticate("expired", remote_ip="10.0.0.1") is None
    assert hub.looked_up == 1


async def test_a_hub_that_is_gone(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    configured(authenticator, cache_seconds=0.0)
    token = hub.issue("alice")
    assert await authenticator.authenticate(token)
    await hub.stop()
    with pytest.raises(Unavailable, match="JupyterHub"):
        await authenticator.authenticate("somebody-new")
    caller = await authenticator.authenticate(token)
    assert caller is not None and caller.name == "alice", "who was known may go on"
    with pytest.raises(Unavailable):
        await authenticator.authenticate(token, fresh=True)
    configured(authenticator, stale_seconds=0.0)
    with pytest.raises(Unavailable):
        await authenticator.authenticate(token)
    await hub.start()
    assert await authenticator.authenticate(token)


async def test_a_hub_that_hangs_is_waited_for_once(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    configured(authenticator, cache_seconds=0.0, hub_timeout=0.3)
    token = hub.issue("alice")
    assert await authenticator.authenticate(token)
    hub.hangs = True
    began = time.monotonic()
    assert await authenticator.authenticate(token)
    assert time.monotonic() - began < 2
    configured(authenticator, hub_timeout=30.0)
    began = time.monotonic()
    for _ in range(20):
        assert await authenticator.authenticate(token)
    assert time.monotonic() - began < 0.3, "nobody waits for a Hub that is known to be away"
    # It comes back, and is believed again.
    del hub.tokens[token]
    hub.hangs = False
    hub.hang.set()

    async def refused() -> bool:
        return await authenticator.authenticate(token) is None

    await eventually(refused, "the Hub's own word", timeout=5)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<html>maintenance</html>"),
        (200, "[]"),
        (200, "{}"),
        (200, '{"name": null}'),
        (418, "teapot"),
        (404, "{}"),
        (500, "oops"),
        (502, "<html>bad gateway</html>"),
        (599, "x"),
        (799, "x"),
    ],
)
async def test_an_answer_that_is_none_proves_nothing(
    hub: FakeHub, authenticator: HubAuthenticator, status: int, body: str
) -> None:
    hub.answer = (status, body)
    with pytest.raises(Unavailable) as raised:
        await authenticator.authenticate(hub.issue("alice"))
    assert hub.url not in raised.value.message and "127.0.0.1" not in raised.value.message
    hub.answer = None


async def test_an_answer_that_breaks_off_proves_nothing(hub: FakeHub, made: HubService) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        writer.close()

    server = await asyncio.start_server(break_off, "127.0.0.1", 0)
    made.oauth.api_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hub/api"
    with pytest.raises(Unavailable):
        await made.authenticator.authenticate("a-token")
    with pytest.raises(Unavailable):
        await made.report_activity("alice", {})
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("token", ["é", "a b", "a\tb", "x" * 2000, "", "\ud800", "a\r\nX: y"])
async def test_what_cannot_be_a_token_is_not_asked_about(
    hub: FakeHub, authenticator: HubAuthenticator, token: str
) -> None:
    assert await authenticator.authenticate(token) is None
    assert hub.looked_up == 0


async def test_tokens_are_not_logged(
    hub: FakeHub, authenticator: HubAuthenticator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = [hub.issue("alice"), hub.issue("bob", scopes=()), "never-issued-token"]
    for token in tokens:
        try:
            await authenticator.authenticate(token)
        except Forbidden:
            continue
    await hub.stop()
    for token in tokens:
        with pytest.raises(Unavailable):
            await authenticator.authenticate(token, fresh=True)
    assert caplog.text
    for token in (*tokens, hub.service_token):
        assert token not in caplog.text


async def test_the_event_loop_is_never_used_up_for_a_look_up(made: HubService) -> None:
    """jupyterhub's synchronous ways are closed, so that no base class takes them by accident."""
    with pytest.raises(RuntimeError):
        made.oauth.user_for_token("x")
    with pytest.raises(RuntimeError):
        made.oauth.get_user(None)  # type: ignore[arg-type]


async def test_activity_is_reported(hub: FakeHub, made: HubService) -> None:
    body: dict[str, Any] = {"last_activity": "2030-01-01T00:00:00.000000Z", "servers": {}}
    await made.report_activity("alice", body)
    assert hub.activity == [("alice", body)]
    hub.servers["alice"] = {"other"}
    with pytest.raises(Unavailable):
        await made.report_activity("alice", {**body, "servers": {"gone": {}}})
    hub.service_token = "changed"
    with pytest.raises(Unavailable):
        await made.report_activity("alice", body)
    await hub.stop()
    with pytest.raises(Unavailable):
        await made.report_activity("alice", body)


async def test_a_service_without_a_name_lets_nobody_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_SERVICE_NAME")
    monkeypatch.delenv("JUPYTERHUB_OAUTH_ACCESS_SCOPES")
    with pytest.raises(BadRequest):
        service()


async def test_both_schemes_in_any_case(hub: FakeHub, authenticator: HubAuthenticator) -> None:
    class Kernels:
        async def list(self, caller: object) -> list[object]:
            return []

    token = hub.issue("alice")
    async with WebServer(Kernels(), authenticator=authenticator) as server:

        async def status(header: str, query: str = "", **more: str) -> int:
            # tornado's client, as jupyter_server uses it: it sends what others would not.
            request = HTTPRequest(f"{server.url}/api/kernels{query}", headers={"Authorization": header, **more})
            return (await AsyncHTTPClient().fetch(request, raise_error=False)).code

        for scheme in ("token", "Token", "bearer", "Bearer", "BEARER"):
            assert await status(f"{scheme} {token}") == 200
        for header in ("", "token", "token ", f"Basic {token}", token, f"None {token}", f"token {token} x"):
            assert await status(header) == 401, header
        assert await status("", f"?token={token}", **{"Sec-Fetch-Mode": "websocket"}) == 401


def test_scopes_are_data() -> None:
    assert set(custom_scopes()) == {scope.name for scope in SCOPES}
    assert all(scope.name.startswith("custom:hub-gateway:") and scope.description for scope in SCOPES)
    admin = caller_of({"name": "a", "scopes": [KERNELS_READ]})
    lead = caller_of({"name": "b", "scopes": [f"{KERNELS_READ}!group=analysts"]})
    for caller, groups, may in ((admin, (), True), (lead, ("analysts",), True), (lead, ("others",), False)):
        assert granted(caller, KERNELS_READ, user="carol", groups=groups) is may
