"""The Hub as the source of identity: API tokens, and reports of activity.

jupyterhub's own `HubAuth` looks users up on the event loop's thread, keeps answers (also negative ones) for five
minutes in a dictionary without a bound, and asks once per request where many come at once. Here the same
requests go through a small cache of our own; the protocol is still `HubOAuth`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from aiohttp import ClientError
from jupyterhub.httpclient import JupyterHubHTTPClient
from jupyterhub.services.auth import HubOAuth
from tornado.web import HTTPError
from traitlets import Float, Integer
from traitlets.config import LoggingConfigurable

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.auth.cache import LookupCache
from hub_gateway.auth.hub_people import HubPeople
from hub_gateway.auth.oauth import GatewayOAuth, Model
from hub_gateway.deadlines import within
from hub_gateway.errors import BadRequest, Forbidden, TooManyRequests, Unavailable
from hub_gateway.kernels.types import JSON
from hub_gateway.metrics import METRICS

__all__ = ["GatewayOAuth", "HubAuthenticator", "HubService", "caller_of"]

_SERVER = re.compile(r"^access:servers!server=([^/]+)/(.*)$")
_TOKEN = re.compile(r"[\x21-\x7e]{1,1024}")
_GUESSING_SECONDS = 60.0


def caller_of(model: Model) -> Caller:
    """The caller that the Hub's answer to `GET /hub/api/user` describes."""
    name = str(model["name"])
    scopes = frozenset(str(scope) for scope in model.get("scopes") or ())
    servers = {found[2] for scope in scopes if (found := _SERVER.match(scope)) and found[1] == name}
    return Caller(
        name,
        kind="service" if model.get("kind") == "service" else "user",
        groups=frozenset(model.get("groups") or ()),
        scopes=scopes,
        admin=bool(model.get("admin")),
        # Only a single-user server's own token carries this for exactly one server of its owner.
        server=servers.pop() if len(servers) == 1 else None,
    )


def _checked(found: Any) -> Model | None:
    """The Hub's answer. Raises ValueError where it is none that a Hub would give."""
    if found is None:
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str) or not found["name"]:
        raise ValueError("the answer to GET /user does not describe a user")
    return {"scopes": [], **found}


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
    hub_timeout = Float(
        10.0, help="How long (seconds) the Hub may take to say whose a token is, before it counts as away."
    ).tag(config=True)
    cache_size = Integer(10_000, help="How many tokens are remembered at most.").tag(config=True)
    failures_per_minute = Integer(
        120,
        help="""How many invalid tokens one address may have looked up in a minute before it is refused unasked.

        Tokens that were valid before are looked up all the same, so that one user's guessing does not keep out
        others behind the same address.
        """,
    ).tag(config=True)

    people: HubPeople

    def __init__(self, hub_auth: HubOAuth, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hub_auth = hub_auth
        self.people = HubPeople(hub_auth, parent=self)
        self._cache: LookupCache[Model | None] = LookupCache(
            self.cache_size, lambda model: self.negative_cache_seconds if model is None else self.cache_seconds
        )
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._away = False

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        model = await self.model_of(token, remote_ip=remote_ip, fresh=fresh)
        if model is None:
            return None
        self.check_access(model)
        return caller_of(model)

    def check_access(self, model: Model) -> None:
        """Whether a token opens this gateway at all. Raises `Forbidden`."""
        if not self.hub_auth.check_scopes(self.hub_auth.access_scopes, model):
            needed = " or ".join(sorted(self.hub_auth.access_scopes))
            raise Forbidden(
                f"{str(model.get('kind', 'user')).capitalize()} {model['name']} may not use this gateway: the token "
                f"lacks the scope {needed}; ask the Hub's administrator for it."
            )

    async def model_of(
        self, token: str, session_id: str = "", *, remote_ip: str = "", fresh: bool = False
    ) -> Model | None:
        """The Hub's own description of a token's owner, or None. Raises `TooManyRequests`, `Unavailable`.

        `session_id` is a browser's session at the Hub: what was true of a token in one is not believed in the next.
        `fresh` asks the Hub now, also where it is being asked the same: that question may have begun before what made
        this one needed.
        """
        if not _TOKEN.fullmatch(token):
            return None
        key = f"{session_id}:{hashlib.sha256(token.encode()).hexdigest()}"
        known = None if fresh else self._cache.fresh(key)
        if known is not None:
            METRICS.authentications.labels("cached").inc()
            return known[0]
        earlier = self._cache.peek(key)
        if earlier is None or earlier[1] is None:
            self._refuse_guessing(remote_ip)
        model = await self._look_up(key, token, fresh)
        if model is None:
            self._failed(remote_ip)
        return model

    async def _look_up(self, key: str, token: str, fresh: bool) -> Model | None:
        async def ask() -> Model | None:
            try:
                answer = self.hub_auth.user_for_token(token, use_cache=False, sync=False)
                model = _checked(await within(answer, self.hub_timeout))
            except (HTTPError, ClientError, OSError, AttributeError, ValueError, asyncio.TimeoutError) as error:
                # ClientError: an answer that breaks off, which jupyterhub 6 reads outside of what it guards.
                # AttributeError: how jupyterhub 6 answers an unusual status (it reads `.code` of an aiohttp response).
                self._hub_is(away=True)
                raise Unavailable(
                    "The JupyterHub cannot be asked who you are at the moment; try again in a few seconds.",
                    hint=str(error) or type(error).__name__,
                ) from error
            self._hub_is(away=False)
            return model

        stale = self._stale(key) if not fresh else None
        if self._away and stale is not None:
            # A Hub that is known to be away may take its time to say so again: nobody waits for that.
            self._cache.begin(key, ask)
            return stale
        try:
            model = await (self._cache.ask_anew(key, ask) if fresh else self._cache.ask(key, ask))
        except Unavailable:
            if stale is not None:
                return stale
            METRICS.authentications.labels("unavailable").inc()
            raise
        METRICS.authentications.labels("refused" if model is None else "accepted").inc()
        return model

    def _stale(self, key: str) -> Model | None:
        """An answer that no longer holds, for as long as the Hub is away."""
        found = self._cache.peek(key)
        if found is None or found[1] is None or found[0] > self.stale_seconds:
            return None
        METRICS.authentications.labels("stale").inc()
        return found[1]

    def _hub_is(self, *, away: bool) -> None:
        if away and not self._away:
            self.log.warning(
                "The Hub cannot be reached; whom it knew less than %.0f s ago may go on meanwhile", self.stale_seconds
            )
        elif self._away and not away:
            self.log.info("The Hub can be reached again")
        self._away = away

    def _refuse_guessing(self, remote_ip: str) -> None:
        since, count = self._failures.get(remote_ip, (0.0, 0))
        left = since + _GUESSING_SECONDS - time.monotonic()
        if count >= self.failures_per_minute and left > 0:
            raise TooManyRequests(
                "Too many invalid tokens came from your address; wait a minute and try again.", retry_after=left
            )

    def _failed(self, remote_ip: str) -> None:
        now = time.monotonic()
        since, count = self._failures.get(remote_ip, (now, 0))
        self._failures[remote_ip] = (now, 1) if now - since >= _GUESSING_SECONDS else (since, count + 1)
        self._failures.move_to_end(remote_ip)
        while len(self._failures) > self.cache_size:
            self._failures.popitem(last=False)

    async def close(self) -> None:
        """Close the connections to the Hub."""
        await JupyterHubHTTPClient.loop_instance().close()


class HubService(LoggingConfigurable):
    """This gateway as a service of a Hub. Everything else that it needs stands in the JUPYTERHUB_* environment."""

    def __init__(self, *, cookie_secret: bytes, base_url: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Given here, since jupyterhub looks for it in the environment when it is imported, and cookies belong to it.
        self.oauth = GatewayOAuth(parent=self, state_key=cookie_secret, base_url=base_url)
        if not self.oauth.access_scopes:
            raise BadRequest(
                "It is not known which of the Hub's users may come in: the service has no name.",
                hint="set JUPYTERHUB_SERVICE_NAME to the name that the Hub's configuration gives this service",
            )
        self.authenticator = HubAuthenticator(self.oauth, parent=self)
        self.oauth.lookup = self.authenticator.model_of

    @property
    def people(self) -> HubPeople:
        """The Hub's users and groups."""
        return self.authenticator.people

    async def report_activity(self, user: str, body: Mapping[str, JSON]) -> None:
        """`POST users/:user/activity`. Raises `Unavailable`."""
        url = f"{self.oauth.api_url}/users/{quote(user, safe='')}/activity"
        request = self.oauth._api_request("POST", url, json=dict(body))  # type: ignore[no-untyped-call]
        try:
            await within(request, self.authenticator.hub_timeout)
        except ValueError:
            # A good answer: it is empty, which jupyterhub tries to read as JSON.
            return
        except (HTTPError, ClientError, OSError, AttributeError, asyncio.TimeoutError) as error:
            raise Unavailable(
                f"The Hub did not take the activity of {user}: {str(error) or type(error).__name__}."
            ) from error
