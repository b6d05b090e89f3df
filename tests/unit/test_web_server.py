"""Where a request comes from: what the guessing limit, the log and the audit trail go by."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import httpx
import pytest
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from hub_gateway.app import HubGateway
from hub_gateway.web.server import GatewayServer

Ask = Callable[[Mapping[str, str]], Awaitable[str]]


class _Address(RequestHandler):
    def get(self) -> None:
        self.finish(self.request.remote_ip or "")

    post = get


@pytest.fixture
async def make_server() -> AsyncIterator[Callable[..., Ask]]:
    made: list[GatewayServer] = []

    def make(**options: object) -> Ask:
        (socket,) = bind_sockets(0, "127.0.0.1")
        server = GatewayServer(Application([("/", _Address)]), **options)
        server.add_sockets([socket])
        made.append(server)

        async def ask(headers: Mapping[str, str]) -> str:
            async with httpx.AsyncClient() as client:
                answer = await client.post(
                    f"http://127.0.0.1:{socket.getsockname()[1]}/", headers=dict(headers), content=b"x" * 1000
                )
                return answer.text

        return ask

    yield make
    for server in made:
        server.stop()
        await server.close_all_connections()


FORGED = {"X-Forwarded-For": "1.1.1.1, 9.9.9.9", "X-Real-Ip": "8.8.8.8"}
"""As it comes through the Hub's proxy, which added the 9.9.9.9, from a client that made up the rest."""


async def test_a_client_cannot_choose_its_address(make_server: Callable[..., Ask]) -> None:
    assert await make_server(xheaders=True)(FORGED) == "9.9.9.9"
    assert await make_server(xheaders=True)({"X-Real-Ip": "8.8.8.8"}) == "127.0.0.1"


async def test_proxies_before_the_hubs_may_be_named(make_server: Callable[..., Ask]) -> None:
    assert await make_server(xheaders=True, trusted_downstream=["9.9.9.9"])(FORGED) == "1.1.1.1"


async def test_without_a_proxy_nothing_is_believed(make_server: Callable[..., Ask]) -> None:
    assert await make_server(xheaders=False)(FORGED) == "127.0.0.1"
    assert HubGateway(token_file="tokens.json").trust_xheaders is False
    assert HubGateway().trust_xheaders is True
