"""/api/sessions: notebooks and the kernels that they use."""

from __future__ import annotations

from hub_gateway.web.base import APIHandler, json_body

__all__ = ["SessionHandler", "SessionsHandler"]


class SessionsHandler(APIHandler):
    """List one's sessions; open one."""

    async def get(self) -> None:
        self.write_json(list(await self.services.kernels.list_sessions(self.caller)))

    async def post(self) -> None:
        model = await self.services.kernels.create_session(self.caller, json_body(self))
        self.set_header("Location", f"{self.request.path.rstrip('/')}/{model['id']}")
        self.write_json(model, 201)


class SessionHandler(APIHandler):
    """One session."""

    async def get(self, session_id: str) -> None:
        self.write_json(await self.services.kernels.get_session(self.caller, session_id))

    async def patch(self, session_id: str) -> None:
        self.write_json(await self.services.kernels.patch_session(self.caller, session_id, json_body(self)))

    async def delete(self, session_id: str) -> None:
        await self.services.kernels.delete_session(self.caller, session_id)
        self.set_status(204)
