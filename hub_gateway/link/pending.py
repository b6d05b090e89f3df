"""What clients have sent while the agent was not in touch: kept until the agent has it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hub_gateway.errors import GatewayError, PayloadTooLarge
from hub_gateway.link.client import AgentLink

__all__ = ["Pending", "PendingRequests", "key_of"]

HANDING_SECONDS = 30.0


def key_of(session: str, msg_id: str) -> str:
    """By what a request of a client is known again."""
    return hashlib.sha256(f"{session}\0{msg_id}".encode("utf-8", "replace")).hexdigest()


def _keep_not(key: str, frames: Sequence[bytes]) -> None:
    """What waits is in memory only."""


def _keep_no_more(keys: Sequence[str]) -> None:
    """As nothing was kept."""


@dataclass(frozen=True)
class Pending:
    """A message that waits for the link. `key` is empty where it is in memory only."""

    key: str
    frames: Sequence[bytes]

    @property
    def size(self) -> int:
        """Bytes of what the client sent."""
        return sum(map(len, self.frames[4:]))

    @property
    def owed(self) -> bool:
        """Whether its client waits for a reply."""
        return b"_request" in self.frames[4]


class PendingRequests:
    """The messages of one kernel that wait for its link, `limit` bytes at most, in their order.

    Those with a key are kept where they outlive this process, too (`on_waits`), until the agent has said that it
    has them, or their client knows that there is no kernel (`on_settled`).
    """

    def __init__(self, limit: int) -> None:
        self.on_waits: Callable[[str, Sequence[bytes]], None] = _keep_not
        """Told (key, frames) of a request that waits for the link, to be kept where it outlives this process."""
        self.on_settled: Callable[[Sequence[str]], None] = _keep_no_more
        """Told the keys of those that the agent has, or whose client knows that there is no kernel."""
        self._limit = limit
        self._queue: list[Pending] = []
        self._queued = 0
        self._kept: set[str] = set()
        self._handing: set[asyncio.Task[None]] = set()

    @property
    def kept(self) -> frozenset[str]:
        """The keys of those that are not settled."""
        return frozenset(self._kept)

    def add(self, one: Pending) -> None:
        """Keep one; not twice, where its client has sent it again. Raises `PayloadTooLarge`."""
        if one.key in self._kept:
            return
        if self._queued + one.size > self._limit:
            raise PayloadTooLarge(
                f"The kernel is not there yet, and more than {self._limit >> 20} MB are waiting for it already. "
                "Wait until it is ready, then send this again."
            )
        self._queue.append(one)
        self._queued += one.size
        if one.key:
            self._kept.add(one.key)
            self.on_waits(one.key, one.frames)

    def restore(self, requests: Sequence[tuple[str, Sequence[bytes]]], *, failed: bool) -> list[Pending]:
        """Requests (key, frames) that were kept; those that are not known already.

        They go before those that came since, unless there will be no kernel (`failed`): then the clients of
        some wait for an answer, and nobody misses the others.
        """
        found = [Pending(key, frames) for key, frames in requests if key not in self._kept]
        self._kept.update(one.key for one in found)
        if failed:
            self.settle([one.key for one in found if not one.owed])
        else:
            self._queue[:0] = found
            self._queued += sum(one.size for one in found)
        return found

    def settle(self, keys: Sequence[str]) -> None:
        """Keep these no more."""
        known = [key for key in keys if key in self._kept]
        if known:
            self._kept.difference_update(known)
            self.on_settled(known)

    def give_up(self) -> None:
        """There will be no kernel. Those that are owed a reply are settled when their clients have been told."""
        queue = self._take()
        self.settle([one.key for one in queue if not one.owed])

    def send(self, link: AgentLink, here: Collection[bytes]) -> None:
        """Pass everything on. `here` are the sessions whose clients are attached."""
        queue = self._take()
        for session in {bytes(one.frames[1]) for one in queue if one.key} - set(here):
            # Or else what comes of it would be for nobody.
            link.tell("expect", session=session.decode("utf-8", "replace"))
        for one in queue:
            link.request(list(one.frames), bounded=False)
        keys = [one.key for one in queue if one.key]
        if keys:
            task = asyncio.ensure_future(self._hand_over(link, keys))
            self._handing.add(task)
            task.add_done_callback(self._handing.discard)

    def _take(self) -> list[Pending]:
        queue, self._queue, self._queued = self._queue, [], 0
        return queue

    async def _hand_over(self, link: AgentLink, keys: Sequence[str]) -> None:
        """Settle requests once the agent has said that it has them; or else they are found, and sent, again."""
        try:
            await link.call("ping", HANDING_SECONDS)
        except GatewayError:
            self._kept.difference_update(keys)
        else:
            self.settle(keys)
