"""Requests that wait for a kernel, kept where they outlive this process.

A cell that is run before its kernel is up waits in a relay, which is this process's memory; the kernel may be queued
for hours. So each such request is also written into a table, encrypted, and stays there until the agent has it, or its
client has been told that there is no kernel. A later gateway, or another replica, loads what it finds, and the agent
passes over what it has had already. Nothing is written while the kernel's agent is linked.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select, tuple_

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, WaitingRequest
from hub_gateway.db.secrets import Vault, VaultError
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.types import KernelStatus

if TYPE_CHECKING:
    from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as Transaction

__all__ = ["WaitingRequests"]

Key = tuple[str, str]
"""Kernel id, and the request's own key."""
KNOWN_SECONDS = 0.5
AGAIN_SECONDS = 1.0
AT_ONCE = 100


class WaitingRequests:
    """The table, and what is still to be written to it. Everything but `load` and `kernels` returns at once."""

    def __init__(self, db: Database, vault: Vault, on_swallowed: Callable[[str], None] = lambda where: None) -> None:
        self._db = db
        self._vault = vault
        self._on_swallowed = on_swallowed
        self._todo: dict[Key, Sequence[bytes] | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._known: tuple[float, asyncio.Future[frozenset[str]]] | None = None

    def keep(self, kernel_id: str, key: str, frames: Sequence[bytes]) -> None:
        """A request waits."""
        self._todo[kernel_id, key] = frames
        self._wake()

    def drop(self, kernel_id: str, keys: Sequence[str]) -> None:
        """These requests wait no more."""
        for key in keys:
            if self._todo.pop((kernel_id, key), None) is None:
                self._todo[kernel_id, key] = None
        self._wake()

    async def load(self, kernel_id: str) -> list[tuple[str, list[bytes]]]:
        """The requests that wait for a kernel, in the order in which they came: key and frames."""
        statement = (
            select(WaitingRequest.key, WaitingRequest.frames)
            .where(WaitingRequest.kernel_id == kernel_id)
            .order_by(WaitingRequest.id)
        )
        rows = await self._db.read(lambda tx: tx.execute(statement).all())

        def opened() -> list[tuple[str, list[bytes]]]:
            found = []
            for key, cipher in rows:
                try:
                    found.append((key, _unpacked(self._vault.decrypt_bytes(cipher))))
                except (VaultError, struct.error):
                    self._on_swallowed("waiting")  # its key is gone; the others are not
            return found

        return await asyncio.to_thread(opened) if rows else []

    async def kernels(self) -> frozenset[str]:
        """The kernels for which requests wait, as of half a second ago."""
        now = time.monotonic()
        if self._known is None or (self._known[1].done() and now - self._known[0] > KNOWN_SECONDS):
            self._known = (now, asyncio.ensure_future(self._read_kernels()))
        try:
            return await asyncio.shield(self._known[1])
        except BaseException:
            self._known = None
            raise

    async def _read_kernels(self) -> frozenset[str]:
        statement = select(WaitingRequest.kernel_id).distinct()
        return frozenset(await self._db.read(lambda tx: tx.execute(statement).scalars().all()))

    async def forget_stopped(self) -> None:
        """Drop what waits for kernels that were stopped."""
        stopped = select(Kernel.id).where(Kernel.status == KernelStatus.STOPPED.value)
        some = select(WaitingRequest.id).where(WaitingRequest.kernel_id.in_(stopped))
        if await self._db.read(lambda tx: tx.execute(some.limit(1)).first()) is not None:
            statement = delete(WaitingRequest).where(WaitingRequest.id.in_(some))
            options = {"synchronize_session": False}
            await self._db.write(lambda tx: tx.execute(statement, execution_options=options) and None)

    async def close(self) -> None:
        """Write what is left to write."""
        self._closing = True
        self._wake()
        if self._task is not None:
            await self._task

    def _wake(self) -> None:
        if self._todo and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._write_all())

    async def _write_all(self) -> None:
        while self._todo:
            some = {key: self._todo.pop(key) for key in list(self._todo)[:AT_ONCE]}
            try:
                await self._write(some)
            except (GatewayError, IntegrityError):  # the latter where another replica has just written the same
                self._on_swallowed("waiting")
                if self._closing:
                    return
                self._todo = {**some, **self._todo}
                await asyncio.sleep(AGAIN_SECONDS)

    async def _write(self, some: dict[Key, Sequence[bytes] | None]) -> None:
        def sealed() -> list[dict[str, str]]:
            return [
                {"kernel_id": key[0], "key": key[1], "frames": self._vault.encrypt_bytes(_packed(frames))}
                for key, frames in some.items()
                if frames is not None
            ]

        new = await asyncio.to_thread(sealed)
        gone = [key for key, frames in some.items() if frames is None]

        def write(tx: Transaction) -> None:
            columns = tuple_(WaitingRequest.kernel_id, WaitingRequest.key)
            if gone:
                tx.execute(delete(WaitingRequest).where(columns.in_(gone)).execution_options(synchronize_session=False))
            if not new:
                return
            # A kernel may have been forgotten meanwhile, and a client may have sent a request through two replicas.
            known = set(tx.execute(select(Kernel.id).where(Kernel.id.in_({row["kernel_id"] for row in new}))).scalars())
            there = {tuple(row) for row in tx.execute(select(*columns.clauses).where(columns.in_(list(some))))}
            rows = [row for row in new if row["kernel_id"] in known and (row["kernel_id"], row["key"]) not in there]
            if rows:
                tx.execute(insert(WaitingRequest), rows)

        await self._db.write(write)


def _packed(frames: Sequence[bytes]) -> bytes:
    """Frames as one: their number, their lengths, and all of them."""
    return struct.pack(f"<I{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames)


def _unpacked(data: bytes) -> list[bytes]:
    (count,) = struct.unpack_from("<I", data)
    frames, offset = [], 4 + 4 * count
    for length in struct.unpack_from(f"<{count}I", data, 4):
        frames.append(data[offset : offset + length])
        offset += length
    return frames
