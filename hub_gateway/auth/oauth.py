"""Logins of browsers at the Hub: `HubOAuth`, without what keeps one process from being like another."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from cryptography.fernet import Fernet, InvalidToken
from jupyterhub.services.auth import HubOAuth
from tornado.web import RequestHandler
from traitlets import Bytes

__all__ = ["GatewayOAuth", "Lookup", "Model"]

STATE_SECONDS = 600
Model: TypeAlias = Mapping[str, Any]
"""The Hub's answer to `GET /hub/api/user`."""
Lookup: TypeAlias = Callable[[str, str], Awaitable[Model | None]]


class GatewayOAuth(HubOAuth):
    """HubOAuth whose logins under way survive a restart, and may end on another replica.

    What belongs to a login (where to go next, the PKCE verifier) is not kept in memory but travels in the state
    itself, encrypted with a key made from the cookie secret. A visitor who never logs in leaves nothing behind.

    Users are looked up by `lookup(token, session_id)` where it is set; never synchronously, which would stop the
    event loop.
    """

    state_key = Bytes(help="The secret from which the state's key is made.")
    lookup: Lookup | None = None

    def get_user(self, handler: RequestHandler, *, sync: bool = True) -> Awaitable[Model | None]:
        """The Hub's user of a request, by its cookie."""
        if sync:
            raise RuntimeError("a synchronous look-up would stop the event loop")
        found: Awaitable[Model | None] = super().get_user(handler, sync=False)  # type: ignore[no-untyped-call]
        return found

    def get_token(self, handler: RequestHandler, in_cookie: bool = True) -> str | None:
        """The token of the cookie. Pages are for browsers; what has a token of its own uses the REST API."""
        found: str | None = self._get_token_cookie(handler) if in_cookie else None  # type: ignore[no-untyped-call]
        return found

    def user_for_token(
        self, token: str, use_cache: bool = True, session_id: str = "", *, sync: bool = True
    ) -> Awaitable[Model | None]:
        """The Hub's user of a token, by `lookup` unless `use_cache` is False."""
        if sync:
            raise RuntimeError("a synchronous look-up would stop the event loop")
        if use_cache and self.lookup is not None:
            return self.lookup(token, session_id)
        found: Awaitable[Model | None] = super().user_for_token(  # type: ignore[no-untyped-call]
            token, use_cache, session_id, sync=False
        )
        return found

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

    def knows(self, state_id: str) -> bool:
        """Whether a state is of ours, and a login with it may still end."""
        return bool(self._decode_state(state_id))

    def clear_oauth_state(self, state_id: str) -> None:
        """Nothing is kept; the code that comes with a state works only once, at the Hub."""
