"""The Hub as the source of identity: API tokens, OAuth for pages, and reports of activity.

jupyterhub's own `HubAuth` looks users up on the event loop's thread, keeps answers (also negative ones) for five
minutes in a dictionary without a bound, and asks once per request where many come at once. Here the same
requests go through a small cache of our own; the protocol is still `HubOAuth`'s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from cryptography.fernet import Fernet, InvalidToken
from jupyterhub.services.auth import HubOAuth
from tornado.web import HTTPError
from traitlets import Bytes, Float, Integer
from traitlets.config import LoggingConfigurable

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.auth.cache import LookupCache
from hub_gateway.errors import Forbidden, TooManyRequests, Unavailable
from hub_gateway.kernels.types import JSON
from hub_gateway.metrics import METRICS

__all__ = ["GatewayOAuth", "HubAuthenticator", "HubService", "caller_of"]

_SERVER = re.compile(r"^access:servers!server=([^/]+)/(.*)$")
STATE_SECONDS = 600
Model = Mapping[str, Any]


def caller_of(model: Model) -> Caller:
    """The caller that the Hub's answer to `GET /hub/api/user` describes."""
    name = str(model["name"])
    scopes = frozenset(str(scope) for scope in model.get("scopes") or ())
    server = None
    for scope in scopes:
        found = _SERVER.match(scope)
        # Only a single-user server's own token carries this for exactly one server of its owner.
        if found and found.group(1) == name:
            server = found.group(2)
    return Caller(
        name,
        kind="service" if model.get("kind") == "service" else "user",
        groups=frozenset(model.get("groups") or ()),
        scopes=scopes,
        admin=bool(model.get("admin")),
        server=server,
    )


class GatewayOAuth(HubOAuth):
    """HubOAuth whose logins under way survive a restart, and may end on another replica.

    What belongs to a login (where to go next, the PKCE verifier) is not kept in memory but travels in the state
    itself, encrypted with a key made from the cookie secret.
    """

    state_key = Bytes(help="The secret from which the state's key is made.")

    def _fernet(self) -> Fernet:
        digest = hashlib.sha256(b"hub-gateway oauth state\0" + self.state_key).digest()
        return Fernet(base64.urlsafe_b64encode(digest))

    def generate_state(self, next_url: str | None = None, **extra_state: Any) -> str:
        """The state: an encrypted document with its time in it."""
        document = json.dumps({"next_url": next_url, **extra_state})
        return self._fernet().encrypt(document.encode()).decode().rstrip("=")

    def _decode_state(self, state_id: str, /) -> dict[str, Any]:
        padded = state_id + "=" * (-len(state_id) % 4)
        try:
            found = json.loads(self._fernet().decrypt(padded.encode(), ttl=STATE_SECONDS))
        except (InvalidToken, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def clear_oauth_state(self, state_id: str) -> None:
        """Nothing is kept; the code that comes with a state works only once, at the Hub."""


class HubAuthenticator(Authenticator):
    """Resolves tokens at the Hub, with a bounded cache, one look-up per token at a time."""

    cache_seconds = Float(
        30.0, help="How long (seconds) the Hub's answer for a valid token is believed. Revocation takes this long."
    ).tag(config=True)
    negative_cache_seconds = Float(
        5.0, help="How long (seconds) the Hub's answer that a token is invalid is believed."
    ).tag(config=True)
    stale_seconds = Float(
        300.0,
        help="""How long (seconds) an earlier answer is believed while the Hub cannot be reached.

        Users then keep working with their kernels through a restart of the Hub. 0 turns it off.
        """,
    ).tag(config=True)
    cache_size = Integer(10_000, help="How many tokens are remembered at most.").tag(config=True)
    failures_per_minute = Integer(
        120, help="How many invalid tokens one address may present in a minute before it is refused unasked."
    ).tag(config=True)

    def __init__(self, hub_auth: HubOAuth, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hub_auth = hub_auth
        self._cache: LookupCache[Model | None] = LookupCache(
            self.cache_size, lambda model: self.negative_cache_seconds if model is None else self.cache_seconds
        )
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        key = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        known = None if fresh else self._cache.fresh(key)
        if known is not None:
            METRICS.authentications.labels("cached").inc()
            model = known[0]
        else:
            self._refuse_guessing(remote_ip)
            model = await self._look_up(key, token, fresh)
        if model is None:
            self._failed(remote_ip)
            return None
        if not self.hub_auth.check_scopes(self.hub_auth.access_scopes, model):
            raise Forbidden(
                f"{model.get('kind', 'user').capitalize()} {model['name']} may not use this gateway: the token lacks "
                f"the scope {' or '.join(sorted(self.hub_auth.access_scopes))}; ask the Hub's administrator for it."
            )
        return caller_of(model)

    async def _look_up(self, key: str, token: str, fresh: bool) -> Model | None:
        async def ask() -> Model | None:
            try:
                found: Model | None = await self.hub_auth.user_for_token(token, use_cache=False, sync=False)
            except (HTTPError, AttributeError) as error:
                # AttributeError: how jupyterhub 6 answers an unusual status (it reads `.code` of an aiohttp response).
                raise Unavailable(
                    "The JupyterHub cannot be asked who you are at the moment; try again in a few seconds.",
                    hint=str(error),
                ) from error
            return found

        try:
            model = await self._cache.ask(key, ask)
        except Unavailable:
            stale = self._cache.peek(key)
            if not fresh and stale is not None and stale[1] is not None and stale[0] <= self.stale_seconds:
                METRICS.authentications.labels("stale").inc()
                self.log.warning("The Hub is away; an answer %.0f s old is used for %s", stale[0], stale[1]["name"])
                return stale[1]
            METRICS.authentications.labels("unavailable").inc()
            raise
        METRICS.authentications.labels("refused" if model is None else "accepted").inc()
        return model

    def _refuse_guessing(self, remote_ip: str) -> None:
        since, count = self._failures.get(remote_ip, (0.0, 0))
        if count >= self.failures_per_minute and time.monotonic() - since < 60:
            raise TooManyRequests(
                "Too many invalid tokens came from your address; wait a minute and try again.", retry_after=60
            )

    def _failed(self, remote_ip: str) -> None:
        now = time.monotonic()
        since, count = self._failures.get(remote_ip, (now, 0))
        self._failures[remote_ip] = (now, 1) if now - since >= 60 else (since, count + 1)
        self._failures.move_to_end(remote_ip)
        while len(self._failures) > self.cache_size:
            self._failures.popitem(last=False)


class HubService(LoggingConfigurable):
    """This gateway as a service of a Hub. Everything it needs stands in the JUPYTERHUB_* environment."""

    def __init__(self, *, cookie_secret: bytes, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.oauth = GatewayOAuth(parent=self, state_key=cookie_secret)
        self.authenticator = HubAuthenticator(self.oauth, parent=self)

    async def report_activity(self, user: str, body: Mapping[str, JSON]) -> None:
        """`POST users/:user/activity`. Raises `Unavailable`."""
        url = f"{self.oauth.api_url}/users/{quote(user, safe='')}/activity"
        try:
            await self.oauth._api_request("POST", url, json=dict(body))
        except (HTTPError, ValueError, AttributeError) as error:
            raise Unavailable(f"The Hub did not take the activity of {user}: {error}.") from error
