"""Users and groups of a JupyterHub, by its REST API and with a short memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import ClientError
from jupyterhub.httpclient import fetch
from jupyterhub.services.auth import HubAuth
from jupyterhub.utils import make_ssl_context
from traitlets import Float, Integer
from traitlets.config import LoggingConfigurable

from hub_gateway.auth.base import AbstractMeta
from hub_gateway.auth.cache import LookupCache
from hub_gateway.auth.people import GroupInfo, People, PeoplePage, Person
from hub_gateway.deadlines import within
from hub_gateway.errors import Unavailable
from hub_gateway.kernels.types import JSON

__all__ = ["HubPeople"]

PAGED = "application/jupyterhub-pagination+json"
MAX_PAGES = 1000


class HubPeople(LoggingConfigurable, People, metaclass=AbstractMeta):
    """Users and groups as the Hub knows them now.

    The role of the service needs `hub_gateway.auth.scopes.SERVICE_SCOPES`; without them every answer is
    `Unavailable`, and the log says why.
    """

    cache_seconds = Float(
        30.0,
        help="""How long (seconds) the Hub's answer about users and groups is believed.

        Whoever has a permission for one group only is looked up anew before each privileged act.
        """,
    ).tag(config=True)
    request_timeout = Float(10.0, help="How long (seconds) the Hub may take for one answer.").tag(config=True)
    page_size = Integer(200, help="How many users or groups are asked for at once; the Hub may give fewer.").tag(
        config=True
    )
    cache_size = Integer(10_000, help="How many answers are remembered at most.").tag(config=True)

    def __init__(self, hub_auth: HubAuth, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hub_auth = hub_auth
        self._cache: LookupCache[Any] = LookupCache(self.cache_size, lambda _: self.cache_seconds)

    async def user(self, name: str, *, fresh: bool = False) -> Person | None:
        found = await self._asked(f"users/{quote(name, safe='')}", fresh)
        return None if found is None else _person(found)

    async def auth_state(self, name: str) -> Mapping[str, JSON]:
        # Not remembered: it holds tokens.
        found = await self._ask(f"users/{quote(name, safe='')}")
        state = found.get("auth_state") if isinstance(found, dict) else None
        return state if isinstance(state, dict) else {}

    async def group(self, name: str, *, fresh: bool = False) -> GroupInfo | None:
        found = await self._asked(f"groups/{quote(name, safe='')}", fresh)
        return None if found is None else _group(found)

    async def groups(self) -> tuple[GroupInfo, ...]:
        found: tuple[GroupInfo, ...] = await self._kept("groups", self._all_groups)
        return found

    async def last_known_groups(self) -> tuple[GroupInfo, ...]:
        try:
            return await self.groups()
        except Unavailable:
            known = self._cache.peek("groups")
            if known is None:
                raise
            found: tuple[GroupInfo, ...] = known[1]
            return found

    async def page(self, query: str = "", *, offset: int = 0, limit: int = 50) -> PeoplePage:
        wanted = {"offset": offset, "limit": limit, "sort": "name"}
        if query:
            # A part of a name, for the Hub's database; what is special there stands for itself only by chance.
            wanted["name_filter"] = query
        found = await self._asked(f"users?{urlencode(wanted)}", fresh=False)
        people, total, following = _page(found)
        return PeoplePage(tuple(_person(one) for one in people), total, following)

    async def _all_groups(self) -> tuple[GroupInfo, ...]:
        found: list[GroupInfo] = []
        offset: int | None = 0
        for _ in range(MAX_PAGES):
            if offset is None:
                break
            answer = await self._ask(f"groups?{urlencode({'offset': offset, 'limit': self.page_size})}")
            items, _, offset = _page(answer)
            found += [_group(one) for one in items]
        return tuple(sorted(found, key=lambda group: group.name))

    async def _asked(self, path: str, fresh: bool) -> Any:
        async def ask() -> Any:
            return await self._ask(path)

        if fresh:
            # Not even a look-up that is under way already: it may have begun before what made this one needed.
            return await ask()
        return await self._kept(path, ask)

    async def _kept(self, key: str, ask: Any) -> Any:
        known = self._cache.fresh(key)
        return known[0] if known is not None else await self._cache.ask(key, ask)

    async def _ask(self, path: str) -> Any:
        """The Hub's answer, None for 404. Raises `Unavailable`."""
        hub = self.hub_auth
        options: dict[str, Any] = {}
        if hub.certfile or hub.keyfile:
            options["ssl"] = make_ssl_context(hub.keyfile, hub.certfile, cafile=hub.client_ca)
        headers = {"Authorization": f"token {hub.api_token}", "Accept": PAGED}
        try:
            return await within(self._fetch(f"{hub.api_url}/{path}", headers, options), self.request_timeout)
        except (OSError, ClientError, ValueError, KeyError, TypeError, asyncio.TimeoutError) as error:
            raise Unavailable(
                "The JupyterHub cannot be asked for its users and groups at the moment; try again in a few seconds.",
                hint=str(error) or type(error).__name__,
            ) from error

    @staticmethod
    async def _fetch(url: str, headers: Mapping[str, str], options: Mapping[str, Any]) -> Any:
        answer = await fetch(url, raise_for_status=False, headers=dict(headers), **options)
        async with answer:
            if answer.status == 404:
                return None
            if answer.status == 403:
                raise ValueError(
                    "the Hub refuses it: give the gateway's role the scopes list:users, read:users:name, "
                    "read:users:groups, read:users:activity, list:groups and read:groups"
                )
            if answer.status != 200:
                raise ValueError(f"the Hub answers {answer.status}")
            return await answer.json(content_type=None)


def _page(answer: Any) -> tuple[list[Any], int, int | None]:
    """Items, how many there are in all, and where the next page begins."""
    if isinstance(answer, list):  # a Hub that does not know the header
        return answer, len(answer), None
    if not isinstance(answer, dict) or not isinstance(answer.get("items"), list):
        raise _odd()
    facts = answer.get("_pagination") or {}
    following = facts.get("next") or {}
    return answer["items"], int(facts.get("total", len(answer["items"]))), following.get("offset")


def _person(found: Any) -> Person:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise _odd()
    return Person(
        found["name"], frozenset(found.get("groups") or ()), bool(found.get("admin")), found.get("last_activity")
    )


def _group(found: Any) -> GroupInfo:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise _odd()
    return GroupInfo(found["name"], frozenset(found.get("users") or ()), dict(found.get("properties") or {}))


def _odd() -> Unavailable:
    return Unavailable(
        "The JupyterHub's answer about its users and groups cannot be understood; tell the administrator.",
        hint="is JUPYTERHUB_API_URL the address of the Hub's REST API?",
    )
