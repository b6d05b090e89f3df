"""/api/kernelspecs: what can be started."""

from __future__ import annotations

import asyncio
import mimetypes

from hub_gateway.errors import NotFound
from hub_gateway.web.base import APIHandler

__all__ = ["KernelSpecHandler", "KernelSpecsHandler", "ResourceHandler"]

MAX_RESOURCE_BYTES = 10 * 2**20


class KernelSpecsHandler(APIHandler):
    """All kernelspecs that the caller may use. `?user=` is taken note of only as far as jupyter_server needs it.

    With KERNEL_USERNAME set, jupyter_server asks for one kernelspec as `?user=alice/python3`.
    """

    async def get(self) -> None:
        found = await self.services.kernels.kernelspecs(self.caller)
        _, _, name = self.get_query_argument("user", "").partition("/")
        if name:
            self.write_json(one_of(found, name))
        else:
            self.write_json(found)


class KernelSpecHandler(APIHandler):
    """One kernelspec."""

    async def get(self, name: str) -> None:
        self.write_json(one_of(await self.services.kernels.kernelspecs(self.caller), name))


class ResourceHandler(APIHandler):
    """A file of a kernelspec, such as its logo."""

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
