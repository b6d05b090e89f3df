"""Sessions of the Jupyter REST API: which notebook uses which kernel."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, Session, utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import JSON, KernelStatus

__all__ = ["SessionRow", "SessionWish", "Sessions"]

LIMITS = {"path": 4096, "name": 1024, "type": 64}
COLUMNS = (Session.path, Session.name, Session.type, Session.id, Session.kernel_id)


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
    """The table of sessions. Every read and write names the owner.

    What changes it holds the lock of admissions, so that of two requests for one notebook the second finds the session
    of the first. An index that is unique could not say so: notebooks may be renamed to a path that has a session.
    """

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
            raise _missing(session_id)
        return found[0]

    async def using(self, kernel_id: str) -> Sequence[SessionRow]:
        """The sessions that use a kernel."""
        return await self._select(Session.kernel_id == kernel_id)

    async def insert(self, owner: str, wanted: SessionWish, kernel_id: str) -> SessionRow:
        """Make a session of a kernel that is there, or find the one that the path has. Raises `NotFound`."""

        def write(tx: Transaction) -> SessionRow:
            lock(tx)
            found = self.open(tx, owner, wanted)
            if found is None:
                self._require(tx, owner, kernel_id)
                found = self.add(tx, owner, wanted, kernel_id)
            return found

        return await self.store.write(write)

    async def update(
        self, owner: str, session_id: str, wanted: SessionWish, kernel_id: str | None
    ) -> tuple[SessionRow, str | None]:
        """Change a session; it, and the kernel that is stopped since no session uses it any more. Raises `NotFound`.

        Without a `kernel_id` it keeps its kernel.
        """

        def write(tx: Transaction) -> tuple[SessionRow, str | None]:
            lock(tx)
            if kernel_id is not None:
                self._require(tx, owner, kernel_id)
            return self.change(tx, owner, session_id, wanted, kernel_id)

        return await self.store.write(write)

    async def delete(self, owner: str, session_id: str) -> str | None:
        """Forget a session; the kernel that was stopped since no session uses it any more. Raises `NotFound`.

        Both or neither: of a session that is gone nobody could ask again for its kernel's end.
        """

        def write(tx: Transaction) -> str | None:
            lock(tx)
            statement = delete(Session).where(Session.owner == owner, Session.id == session_id)
            kernel_id = tx.execute(statement.returning(Session.kernel_id)).scalar_one_or_none()
            if kernel_id is None:
                raise _missing(session_id)
            return self._left(tx, kernel_id)

        return await self.store.write(write)

    # Inside a transaction that holds the lock

    @staticmethod
    def open(tx: Transaction, owner: str, wanted: SessionWish) -> SessionRow | None:
        """The session that a path already has, with a kernel that is not stopped."""
        if not wanted.path:
            return None
        statement = (
            select(*COLUMNS)
            .join(Kernel, Kernel.id == Session.kernel_id)
            .where(Session.owner == owner, Session.path == wanted.path, Session.type == wanted.type)
            .where(Kernel.owner == owner, Kernel.status != KernelStatus.STOPPED.value)
            .order_by(Session.created_at, Session.id)
            .limit(1)
        )
        found = tx.execute(statement).one_or_none()
        return None if found is None else SessionRow(*found)

    @staticmethod
    def add(tx: Transaction, owner: str, wanted: SessionWish, kernel_id: str) -> SessionRow:
        """Make a session."""
        row = SessionRow(wanted.path, wanted.name, wanted.type, str(uuid.uuid4()), kernel_id)
        tx.execute(insert(Session).values(owner=owner, created_at=utcnow(), **asdict(row)))
        return row

    def change(
        self, tx: Transaction, owner: str, session_id: str, wanted: SessionWish, kernel_id: str | None
    ) -> tuple[SessionRow, str | None]:
        """Change a session, with the kernel that it had where `kernel_id` is None; see `update`."""
        mine = (Session.owner == owner, Session.id == session_id)
        before = tx.execute(select(Session.kernel_id).where(*mine)).scalar_one_or_none()
        if before is None:
            raise _missing(session_id)
        row = SessionRow(wanted.path, wanted.name, wanted.type, session_id, kernel_id or before)
        tx.execute(update(Session).where(*mine).values(**asdict(row)))
        return row, self._left(tx, before)

    def _left(self, tx: Transaction, kernel_id: str) -> str | None:
        if tx.execute(select(Session.id).where(Session.kernel_id == kernel_id).limit(1)).first() is not None:
            return None
        self.store.stopping(kernel_id)(tx)
        return kernel_id

    @staticmethod
    def _require(tx: Transaction, owner: str, kernel_id: str) -> None:
        statement = select(Kernel.id).where(
            Kernel.id == kernel_id, Kernel.owner == owner, Kernel.status != KernelStatus.STOPPED.value
        )
        if tx.execute(statement).first() is None:
            raise NotFound(f"Kernel {kernel_id[:64]} does not exist, or has ended.")

    async def _select(self, *where: ColumnElement[bool]) -> Sequence[SessionRow]:
        statement = select(*COLUMNS).where(*where).order_by(Session.created_at, Session.id)
        return await self.store.db.read(lambda tx: [SessionRow(*row) for row in tx.execute(statement)])


def _missing(session_id: str) -> NotFound:
    return NotFound(f"Session {session_id[:64]} does not exist, or has ended.")
