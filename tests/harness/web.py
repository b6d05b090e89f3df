"""The web layer in this process, on a port of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
from tornado.httpclient import HTTPRequest
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection, websocket_connect

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.errors import GatewayError
from hub_gateway.services import Services, WebSettings
from hub_gateway.web.application import make_application
from hub_gateway.web.server import GatewayServer

__all__ = ["FixedTokens", "WebServer", "settings"]


class FixedTokens(Authenticator):
    """A token `alice-token` is alice's, and so on; `error` is raised in place of an answer."""

    error: GatewayError | None = None

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        if self.error is not None:
            raise self.error
        name = token.removesuffix("-token")
        return Caller(name) if name != token else None


class AnsweringDatabase:
    """As much of a database as the web layer knows."""

    error: GatewayError | None = None

    async def check(self) -> None:
        """Whether it answers."""
        if self.error is not None:
            raise self.error


def settings(**more: Any) -> WebSettings:
    return WebSettings(cookie_secret=b"c" * 32, **more)


class WebServer:
    """An HTTP server with the gateway's application; `kernels` may be a stand-in."""

    def __init__(
        self,
        kernels: Any,
        *,
        authenticator: Authenticator | None = None,
        db: Any = None,
        base_url: str = "/",
        hub: Any = None,
        web: WebSettings | None = None,
        **parts: Any,
    ) -> None:
        self.base_url = base_url
        self.services = Services(
            kernels=kernels,
            authenticator=authenticator or FixedTokens(),
            db=db or AnsweringDatabase(),
            web=web or settings(),
            hub=hub,
            ready=True,
            **parts,
        )
        self.application = make_application(self.services, base_url=base_url)
        self.port = 0
        self._server: GatewayServer | None = None

    async def __aenter__(self) -> WebServer:
        sockets = bind_sockets(self.port, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        web = self.services.web
        # As hub_gateway.app makes it.
        self._server = GatewayServer(
            self.application,
            xheaders=True,
            max_buffer_size=max(web.max_message_bytes, web.max_body_bytes) + 2**20,
            max_body_size=web.max_body_bytes,
        )
        self._server.add_sockets(sockets)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.stop()
        await self._server.close_all_connections()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.base_url.rstrip('/')}"

    def client(self, user: str | None = None, **more: Any) -> httpx.AsyncClient:
        """A client with a user's token, or with none."""
        headers = {} if user is None else {"Authorization": f"token {user}-token"}
        return httpx.AsyncClient(base_url=self.url, headers=headers | more.pop("headers", {}), timeout=30, **more)

    async def websocket(
        self,
        path: str,
        user: str | None = "alice",
        *,
        headers: Mapping[str, str] | None = None,
        subprotocols: list[str] | None = None,
        max_message_size: int = 512 * 2**20,
    ) -> WebSocketClientConnection:
        """Open a websocket."""
        token = {} if user is None else {"Authorization": f"token {user}-token"}
        request = HTTPRequest(
            "ws" + self.url.removeprefix("http") + path,
            headers={"User-Agent": "test", **token, **(headers or {})},
            connect_timeout=20,
            request_timeout=20,
        )
        return await websocket_connect(request, subprotocols=subprotocols, max_message_size=max_message_size)


async def read_json(ws: WebSocketClientConnection) -> dict[str, Any]:
    """The next message of the old form."""
    message = await ws.read_message()
    assert isinstance(message, str), message
    value: dict[str, Any] = json.loads(message)
    return value
