"""A Hub in this process, as far as a service sees one: who has which token, OAuth with PKCE, users' activity.

`users` and `groups` (with their members) are what it lists, a few at a time; not without the right (`lists`).
It can be slow, hang, fail, answer nonsense, or be gone (`stop`) and come back on the same port (`start`). What a real
Hub says is tested with a real one, in tests/e2e.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from collections import Counter
from typing import Any
from urllib.parse import urlencode

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

__all__ = ["SERVICE", "FakeHub"]

SERVICE = "hub-gateway"
ACCESS = f"access:services!service={SERVICE}"


class _Handler(RequestHandler):
    hub: FakeHub

    def initialize(self, hub: FakeHub) -> None:
        self.hub = hub

    async def prepare(self) -> None:
        self.hub.requests[self.request.path] += 1
        if self.hub.hangs:
            await self.hub.hang.wait()
        if self.hub.delay:
            await asyncio.sleep(self.hub.delay)
        if self.hub.answer is not None:
            status, body = self.hub.answer
            self.set_status(status)
            await self.finish(body)

    @property
    def token(self) -> str:
        return self.request.headers.get("Authorization", "").partition(" ")[2]

    def refuse(self) -> None:
        self.set_status(403)
        self.finish({"status": 403, "message": "Forbidden"})


class _User(_Handler):
    def get(self) -> None:
        model = self.hub.tokens.get(self.token)
        if model is None:
            self.refuse()
        else:
            self.finish(model)


class _List(_Handler):
    """Users or groups, as many at once as the Hub allows, for the service alone."""

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        raise NotImplementedError

    def get(self, name: str | None = None) -> None:
        if self.token != self.hub.service_token or not self.hub.lists:
            self.refuse()
        elif name:
            model = self.models.get(name)
            self.set_status(200 if model else 404)
            self.finish(model or {"status": 404, "message": "Not Found"})
        else:
            wanted = self.get_argument("name_filter", "").lower()
            found = [model for key, model in sorted(self.models.items()) if wanted in key.lower()]
            offset, limit = int(self.get_argument("offset", "0")), min(int(self.get_argument("limit", "50")), 3)
            following = {"offset": offset + limit, "limit": limit, "url": "http://internal/"}
            facts = {"offset": offset, "limit": limit, "total": len(found), "next": None}
            if offset + limit < len(found):
                facts["next"] = following
            assert self.request.headers["Accept"] == "application/jupyterhub-pagination+json"
            self.finish({"items": found[offset : offset + limit], "_pagination": facts})


class _Users(_List):
    @property
    def models(self) -> dict[str, dict[str, Any]]:
        names = {*self.hub.users, *(name for members in self.hub.groups.values() for name in members)}
        return {
            name: {
                "name": name,
                "admin": name == "admin",
                "groups": [group for group, members in self.hub.groups.items() if name in members],
                "last_activity": None,
            }
            for name in names
        }


class _Groups(_List):
    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"name": name, "users": list(members), "properties": self.hub.properties.get(name, {})}
            for name, members in self.hub.groups.items()
        }


class _Activity(_Handler):
    def post(self, name: str) -> None:
        if self.token != self.hub.service_token:
            self.refuse()
            return
        body = json.loads(self.request.body)
        known = self.hub.servers.get(name)
        for server in body.get("servers", {}):
            if known is not None and server not in known:
                self.set_status(400)
                self.finish({"status": 400, "message": f"No such server '{server}' for user {name}"})
                return
        self.hub.activity.append((name, body))
        # The real Hub answers 200 with nothing.


class _Authorize(_Handler):
    def get(self) -> None:
        """As if `hub.visitor` had just logged in at the Hub."""
        assert self.get_argument("client_id") == f"service-{SERVICE}"
        assert self.get_argument("code_challenge_method") == "S256"
        code = secrets.token_urlsafe(8)
        self.hub.codes[code] = (self.hub.visitor, self.get_argument("code_challenge"))
        query = urlencode({"code": code, "state": self.get_argument("state")})
        self.redirect(f"{self.get_argument('redirect_uri')}?{query}")


class _Token(_Handler):
    def post(self) -> None:
        user, challenge = self.hub.codes.pop(self.get_argument("code"), ("", ""))
        verifier = self.get_argument("code_verifier", "")
        proven = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        if not user or proven != challenge or self.get_argument("client_secret") != self.hub.service_token:
            self.set_status(400)
            self.finish({"error": "invalid_grant"})
            return
        self.finish({"access_token": self.hub.issue(user), "token_type": "Bearer"})


class FakeHub:
    """A Hub on a port of its own. `requests` counts what it was asked, by path."""

    def __init__(self) -> None:
        self.service_token = secrets.token_hex(16)
        self.tokens: dict[str, dict[str, Any]] = {}
        self.users: set[str] = set()
        self.groups: dict[str, list[str]] = {}
        self.properties: dict[str, dict[str, Any]] = {}
        self.lists = True
        self.servers: dict[str, set[str]] = {}
        """The servers of a user; who is not in it has any."""
        self.codes: dict[str, tuple[str, str]] = {}
        self.activity: list[tuple[str, dict[str, Any]]] = []
        self.requests: Counter[str] = Counter()
        self.visitor = "alice"
        self.delay = 0.0
        self.hangs = False
        self.hang = asyncio.Event()
        self.answer: tuple[int, str] | None = None
        self.port = 0
        self._server: HTTPServer | None = None

    def issue(self, user: str, *, scopes: tuple[str, ...] = (ACCESS,), **more: Any) -> str:
        """A new token of a user."""
        token = secrets.token_hex(16)
        self.tokens[token] = {
            "name": user,
            "kind": "user",
            "admin": False,
            "groups": ["analysts"],
            "scopes": [*scopes, f"read:users:name!user={user}"],
            **more,
        }
        return token

    @property
    def looked_up(self) -> int:
        """How often it was asked whose a token is."""
        return self.requests["/hub/api/user"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, base_url: str) -> dict[str, str]:
        """What a Hub tells a service."""
        return {
            "JUPYTERHUB_SERVICE_NAME": SERVICE,
            "JUPYTERHUB_SERVICE_PREFIX": base_url,
            "JUPYTERHUB_API_URL": f"{self.url}/hub/api",
            "JUPYTERHUB_API_TOKEN": self.service_token,
            "JUPYTERHUB_CLIENT_ID": f"service-{SERVICE}",
            "JUPYTERHUB_BASE_URL": "/",
            "JUPYTERHUB_HOST": "",
            "JUPYTERHUB_OAUTH_CALLBACK_URL": f"{base_url}oauth_callback",
            "JUPYTERHUB_OAUTH_ACCESS_SCOPES": json.dumps([ACCESS, "access:services"]),
        }

    async def start(self) -> None:
        """Listen; on the same port as before."""
        arguments = {"hub": self}
        application = Application(
            [
                ("/hub/api/user", _User, arguments),
                ("/hub/api/users/([^/]+)/activity", _Activity, arguments),
                ("/hub/api/users(?:/([^/]+))?", _Users, arguments),
                ("/hub/api/groups(?:/([^/]+))?", _Groups, arguments),
                ("/hub/api/oauth2/authorize", _Authorize, arguments),
                ("/hub/api/oauth2/token", _Token, arguments),
            ],
            log_function=lambda _: None,
        )
        sockets = bind_sockets(self.port, "127.0.0.1", reuse_port=False)
        self.port = sockets[0].getsockname()[1]
        self._server = HTTPServer(application)
        self._server.add_sockets(sockets)

    async def stop(self) -> None:
        """Be gone."""
        self.hang.set()
        if self._server is not None:
            self._server.stop()
            await self._server.close_all_connections()
            self._server = None
