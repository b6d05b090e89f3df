"""Sessions of the Jupyter REST API: which notebook uses which kernel."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, select, update

from hub_gateway.db.models import Session, utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import JSON

__all__ = ["SessionRow", "SessionWish", "Sessions"]

LIMITS = {"path": 4096, "name": 1024, "type": 64}


@dataclass(frozen=True)
class SessionWish:
    """What a client says of a session."""

    path: str
    name: str
    type: str


@dataclass(frozen=True)
class SessionRow(SessionWish):
    """A session."""

    id: str
    kernel_id: str

    def model(self, kernel: dict[str, JSON]) -> dict[str, JSON]:
        """The session as the Jupyter REST API shows it, with the field that older clients look for."""
        model: dict[str, JSON] = {
            "id": self.id,
            "path": self.path,
            "name": self.name,
            "type": self.type,
            "kernel": kernel,
        }
        if self.type == "notebook":
            model["notebook"] = {"path": self.path, "name": self.name}
        return model


class Sessions:
    """The table of sessions. Every read and write names the owner."""

    def __init__(self, store: KernelStore) -> None:
        self.store = store

    @staticmethod
    def parse(body: Mapping[str, Any], before: SessionWish | None = None) -> SessionWish:
        """What a request body says, on top of what was. Raises `BadRequest`."""
        if not isinstance(body, Mapping):
            raise BadRequest("A session is an object with `path`, `name`, `type` and `kernel`.")
        old = body.get("notebook")  # the shape before notebook 5, which is still sent
        legacy = old if isinstance(old, Mapping) else {}
        values = {}
        for name, limit in LIMITS.items():
            fallback = getattr(before, name) if before is not None else ("notebook" if name == "type" else "")
            value = body.get(name, legacy.get(name))
            value = fallback if value is None else value
            if not isinstance(value, str) or len(value) > limit or "\0" in value:
                raise BadRequest(f"`{name}` must be a string of at most {limit} characters.")
            values[name] = value
        return SessionWish(**values)

    async def list(self, owner: str) -> Sequence[SessionRow]:
        """The owner's sessions, oldest first."""
        return await self._select(Session.owner == owner)

    async def get(self, owner: str, session_id: str) -> SessionRow:
        """One session. Raises `NotFound`."""
        found = await self._select(Session.owner == owner, Session.id == session_id)
        if not found:
            raise NotFound(f"Session {session_id[:64]} does not exist, or has ended.")
        return found[0]

    async def using(self, kernel_id: str) -> Sequence[SessionRow]:
        """The sessions that use a kernel."""
        return await self._select(Session.kernel_id == kernel_id)

    async def insert(self, owner: str, wanted: SessionWish, kernel_id: str) -> SessionRow:
        """Make a session."""
        row = SessionRow(wanted.path, wanted.name, wanted.type, str(uuid.uuid4()), kernel_id)
        values = {
            "id": row.id,
            "owner": owner,
            "path": row.path,
            "name": row.name,
            "type": row.type,
            "kernel_id": kernel_id,
            "created_at": utcnow(),
        }
        await self.store.db.write(lambda tx: tx.execute(insert(Session).values(values)) and None)
        return row

    async def update(self, owner: str, session_id: str, wanted: SessionWish, kernel_id: str) -> SessionRow:
        """Change a session. Raises `NotFound`."""
        statement = (
            update(Session)
            .where(Session.owner == owner, Session.id == session_id)
            .values(path=wanted.path, name=wanted.name, type=wanted.type, kernel_id=kernel_id)
            .returning(Session.id)
        )
        changed = await self.store.db.write(lambda tx: tx.execute(statement).scalar_one_or_none())
        if changed is None:
            raise NotFound(f"Session {session_id[:64]} does not exist, or has ended.")
        return SessionRow(wanted.path, wanted.name, wanted.type, session_id, kernel_id)

    async def delete(self, owner: str, session_id: str) -> None:
        """Forget a session."""
        statement = delete(Session).where(Session.owner == owner, Session.id == session_id)
        await self.store.db.write(lambda tx: tx.execute(statement) and None)

    async def _select(self, *where: ColumnElement[bool]) -> Sequence[SessionRow]:
        columns = (Session.path, Session.name, Session.type, Session.id, Session.kernel_id)
        statement = select(*columns).where(*where).order_by(Session.created_at, Session.id)
        return await self.store.db.read(lambda tx: [SessionRow(*row) for row in tx.execute(statement)])
