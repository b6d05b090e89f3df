"""A level-triggered work queue: *that* something changed is remembered, never what.

The semantics are those of Kubernetes' client-go work queue. A key that is added twice before it is
handled is handled once; one that is added while it is handled is handled again afterwards; one key is
never handled twice at a time; one that fails comes back later and later.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable

__all__ = ["WorkQueue"]


class WorkQueue:
    """Calls `handler(key)` for every key that was added, at most `workers` of one lane at a time.

    `lane(key)` says which keys may hold each other up; one lane that is full holds up no other. By default there is
    one. It is asked each time that a key is due.

    `handler` returns None, or after how many seconds it wants to see the key again. Where it raises,
    `on_error(key, error)` is told and the key comes back after `base_delay` seconds, doubled with every
    failure in a row up to `max_delay`, with jitter.
    """

    def __init__(
        self,
        handler: Callable[[str], Awaitable[float | None]],
        *,
        workers: int = 64,
        base_delay: float = 0.2,
        max_delay: float = 30.0,
        lane: Callable[[str], str] = lambda key: "",
        on_error: Callable[[str, Exception], None] = lambda key, error: None,
    ) -> None:
        self._handler = handler
        self._workers = workers
        self._base_delay = base_delay
        self._max_delay = max_delay
        self._lane = lane
        self._on_error = on_error
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._busy: Counter[str] = Counter()
        self._parked: defaultdict[str, deque[str]] = defaultdict(deque)
        """What is due in lanes that are full, in order."""
        self._failures: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hand out what was added."""
        self._dispatcher = asyncio.get_running_loop().create_task(self._dispatch(), name="workqueue")

    async def close(self) -> None:
        """Stop; what is being handled is cancelled, what is not is forgotten."""
        tasks = [*self._running.values(), *([self._dispatcher] if self._dispatcher else [])]
        self._due.clear()
        self._heap.clear()
        self._parked.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, key: str, delay: float = 0.0) -> None:
        """Have `key` handled, in `delay` seconds or earlier if it was due earlier."""
        when = asyncio.get_running_loop().time() + delay
        if key in self._due and self._due[key] <= when:
            return
        self._due[key] = when
        if key not in self._running:
            self._push(key)

    def failures(self, key: str) -> int:
        """How often in a row the handling of `key` has failed."""
        return self._failures.get(key, 0)

    def __contains__(self, key: str) -> bool:
        """Whether a key waits or is being handled."""
        return key in self._due or key in self._running

    def __len__(self) -> int:
        """How many keys wait or are being handled."""
        return len(self._due.keys() | self._running.keys())

    def _push(self, key: str) -> None:
        heapq.heappush(self._heap, (self._due[key], next(self._order), key))
        self._wake.set()

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            wait: float | None = None
            while self._heap:
                when, _, key = self._heap[0]
                # An entry that was superseded by an earlier one, or is being handled (and comes back after).
                if self._due.get(key) != when or key in self._running:
                    heapq.heappop(self._heap)
                    continue
                if when > loop.time():
                    wait = when - loop.time()
                    break
                heapq.heappop(self._heap)
                lane = self._lane(key)
                if self._busy[lane] < self._workers:
                    self._begin(key, lane)
                else:
                    self._parked[lane].append(key)
            timer = None if wait is None else loop.call_later(wait, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def _begin(self, key: str, lane: str) -> None:
        del self._due[key]
        self._busy[lane] += 1
        handling = asyncio.get_running_loop().create_task(self._handle(key, lane), name=f"reconcile {key}")
        self._running[key] = handling

    async def _handle(self, key: str, lane: str) -> None:
        again: float | None = None
        try:
            again = await self._handler(key)
            self._failures.pop(key, None)
        # The one place that catches everything: whatever goes wrong with one key, it is reported and retried.
        except Exception as error:  # noqa: BLE001
            self._failures[key] = self.failures(key) + 1
            self._on_error(key, error)
            delay = min(self._max_delay, self._base_delay * 2 ** (self._failures[key] - 1))
            again = delay * random.uniform(0.8, 1.2)  # noqa: S311 (jitter, not a secret)
        finally:
            del self._running[key]
            self._busy[lane] -= 1
            if self._parked[lane]:  # one has left, so one may come
                self._begin(self._parked[lane].popleft(), lane)
            if key in self._due:
                self._push(key)
            if again is not None:
                self.add(key, again)
            self._wake.set()
