"""/api/kernels: a user's kernels."""

from __future__ import annotations

from typing import Any

from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import CreateKernel
from hub_gateway.web.base import APIHandler, BaseHandler, json_body, string_field

__all__ = ["InterruptHandler", "KernelHandler", "KernelsHandler", "LaunchHandler", "RestartHandler", "kernel_request"]


def kernel_request(body: dict[str, Any]) -> CreateKernel:
    """What `POST /api/kernels` asks for. Raises `BadRequest`."""
    env = body.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise BadRequest("The field `env` must map names of environment variables to strings.")
    return CreateKernel(name=string_field(body, "name"), env=env, path=string_field(body, "path"))


class KernelsHandler(APIHandler):
    """List one's kernels; start one."""

    async def get(self) -> None:
        service = self.services.kernels
        self.write_json([service.kernel_model(record) for record in await service.list(self.caller)])

    async def post(self) -> None:
        body = json_body(self)
        record = await self.services.kernels.create(
            self.caller, kernel_request(body), kernel_id=string_field(body, "kernel_id")
        )
        self.set_header("Location", f"{self.request.path.rstrip('/')}/{record.id}")
        self.write_json(self.services.kernels.kernel_model(record), 201)


class KernelHandler(APIHandler):
    """One kernel."""

    async def get(self, kernel_id: str) -> None:
        self.write_json(self.services.kernels.kernel_model(await self.services.kernels.get(self.caller, kernel_id)))

    async def delete(self, kernel_id: str) -> None:
        await self.services.kernels.shutdown(self.caller, kernel_id)
        self.set_status(204)


class InterruptHandler(APIHandler):
    """Interrupt what the kernel runs."""

    async def post(self, kernel_id: str) -> None:
        await self.services.kernels.interrupt(self.caller, kernel_id)
        self.set_status(204)


class RestartHandler(APIHandler):
    """Restart the kernel; answers when it is ready again. Websockets stay open."""

    async def post(self, kernel_id: str) -> None:
        record = await self.services.kernels.restart(self.caller, kernel_id)
        self.write_json(self.services.kernels.kernel_model(record))


class LaunchHandler(BaseHandler):
    """Where an agent says where it listens. It has no user's token: it proves that this gateway launched it."""

    max_body_bytes = 16 * 1024

    async def post(self, kernel_id: str) -> None:
        await self.services.kernels.register(kernel_id, json_body(self))
        self.set_status(204)
