"""/api/kernelspecs: what can be started."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import Mapping
from typing import Any

from hub_gateway.deadlines import within
from hub_gateway.errors import NotFound, Unavailable
from hub_gateway.kernels.service import owner_of
from hub_gateway.metrics import METRICS
from hub_gateway.quotas.types import Verdict
from hub_gateway.web.authority import kind_of
from hub_gateway.web.base import APIHandler

__all__ = ["KernelSpecHandler", "KernelSpecsHandler", "ResourceHandler"]

MAX_RESOURCE_BYTES = 10 * 2**20
SIGNS = {"refused": " (no room)", "queued": " (queue)"}
"""What stands after the name of a kernelspec that cannot be had at once."""
ROOM_TIMEOUT = 1.0


class _CatalogueHandler(APIHandler):
    """What the handlers of kernelspecs share."""

    async def catalogue(self) -> dict[str, Any]:
        """The kernelspecs that the caller may use; those that their limits leave no room for say so.

        A limit that cannot be looked up in time keeps nobody's launcher empty: then nothing is said.
        """
        found = await self.services.kernels.kernelspecs(self.caller)
        specs: Any = found["kernelspecs"]
        rooms = await self._rooms(list(specs))
        if all(room.outcome == "admitted" for room in rooms.values()):
            return found
        return {**found, "kernelspecs": {name: marked(model, rooms.get(name)) for name, model in specs.items()}}

    async def _rooms(self, names: list[str]) -> Mapping[str, Verdict]:
        services, caller = self.services, self.caller
        quotas = services.quotas
        if quotas is None or not names:
            return {}
        owner = owner_of(caller)

        async def ask() -> Mapping[str, Verdict]:
            return await quotas.room(owner, kind_of(owner), caller.groups, names)

        key = "\0".join((owner, *sorted(caller.groups), "", *names))
        known = services.rooms.fresh(key)
        if known is not None:
            return known[0]
        try:
            return await within(services.rooms.ask(key, ask), ROOM_TIMEOUT)
        except (Unavailable, asyncio.TimeoutError):
            METRICS.count_swallowed("room")
            return {}


def marked(model: Mapping[str, Any], room: Verdict | None) -> Mapping[str, Any]:
    """A kernelspec, with a sign in its display name where it cannot be had at once, and the reason in its metadata."""
    if room is None or room.outcome not in SIGNS:
        return model
    spec = model["spec"]
    metadata = spec.get("metadata") or {}
    hints = {**(metadata.get("hub_gateway") or {}), "no_room": room.sentence}
    shown = {
        "display_name": f"{spec.get('display_name') or model['name']}{SIGNS[room.outcome]}",
        "metadata": {**metadata, "hub_gateway": hints},
    }
    return {**model, "spec": {**spec, **shown}}


class KernelSpecsHandler(_CatalogueHandler):
    """All kernelspecs that the caller may use. `?user=` is taken note of only as far as jupyter_server needs it.

    With KERNEL_USERNAME set, jupyter_server asks for one kernelspec as `?user=alice/python3`.
    """

    async def get(self) -> None:
        found = await self.catalogue()
        _, _, name = self.get_query_argument("user", "").partition("/")
        if name:
            self.write_json(one_of(found, name))
        else:
            self.write_json(found)


class KernelSpecHandler(_CatalogueHandler):
    """One kernelspec."""

    async def get(self, name: str) -> None:
        self.write_json(one_of(await self.catalogue(), name))


class ResourceHandler(APIHandler):
    """A file that a kernelspec's `resources` name, such as its logo."""

    async def get(self, name: str, path: str) -> None:
        file = await self.services.kernels.kernelspec_resource(name, path, self.caller)
        content = await asyncio.to_thread(file.read_bytes)
        if len(content) > MAX_RESOURCE_BYTES:
            raise NotFound(f"The file {path} of kernelspec {name} is too large to be served.")
        self.set_header("Content-Type", mimetypes.guess_type(file.name)[0] or "application/octet-stream")
        self.set_header("Cache-Control", "private, max-age=3600")
        self.write(content)


def one_of(found: object, name: str) -> object:
    """One entry of the catalogue. Raises `NotFound`."""
    specs = found.get("kernelspecs") if isinstance(found, dict) else None
    if not isinstance(specs, dict) or name not in specs:
        raise NotFound(f"There is no kernelspec named {name[:100]!r} for you; choose another kernel.")
    return specs[name]
