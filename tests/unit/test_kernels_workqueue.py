"""The work queue: deduplicated, one at a time per key, delayed, with back-off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from hub_gateway.kernels.workqueue import WorkQueue
from tests.harness.waiting import eventually

Handler = Callable[[str], Awaitable[float | None]]


@pytest.fixture
async def make_queue() -> AsyncIterator[Callable[..., WorkQueue]]:
    made: list[WorkQueue] = []

    def make(handler: Handler, **options: object) -> WorkQueue:
        queue = WorkQueue(handler, **{"base_delay": 0.01, **options})  # type: ignore[arg-type]
        queue.start()
        made.append(queue)
        return queue

    yield make
    for queue in made:
        await queue.close()


async def until(condition: Callable[[], bool]) -> None:
    await eventually(condition, "the queue", timeout=5, interval=0)


async def test_a_key_that_is_added_often_is_handled_once(make_queue: Callable[..., WorkQueue]) -> None:
    seen: Counter[str] = Counter()

    async def handle(key: str) -> None:
        seen[key] += 1

    queue = make_queue(handle)
    for _ in range(100):
        queue.add("a")
        queue.add("b")
    await until(lambda: len(queue) == 0)
    assert seen == {"a": 1, "b": 1}


async def test_one_key_is_never_handled_twice_at_a_time(make_queue: Callable[..., WorkQueue]) -> None:
    """And one that is added while it is handled is handled once more."""
    running, most, times = 0, 0, 0
    go = asyncio.Event()

    async def handle(key: str) -> None:
        nonlocal running, most, times
        running, times = running + 1, times + 1
        most = max(most, running)
        await go.wait()
        running -= 1

    queue = make_queue(handle)
    queue.add("a")
    await until(lambda: running == 1)
    for _ in range(10):
        queue.add("a")
    assert "a" in queue
    go.set()
    await until(lambda: len(queue) == 0)
    assert (most, times) == (1, 2)


async def test_no_more_than_its_workers(make_queue: Callable[..., WorkQueue]) -> None:
    running, most, done = 0, 0, 0

    async def handle(key: str) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running, done = running - 1, done + 1

    queue = make_queue(handle, workers=3)
    for number in range(50):
        queue.add(str(number))
    await until(lambda: done == 50)
    assert most == 3


async def test_a_delay_is_kept_and_an_earlier_one_wins(make_queue: Callable[..., WorkQueue]) -> None:
    loop = asyncio.get_running_loop()
    seen: dict[str, float] = {}

    async def handle(key: str) -> None:
        seen[key] = loop.time()

    queue = make_queue(handle)
    began = loop.time()
    queue.add("later", 0.05)
    queue.add("sooner", 30)
    queue.add("sooner", 0.0)
    queue.add("sooner", 30)
    await until(lambda: len(seen) == 2)
    assert seen["sooner"] < seen["later"]
    assert seen["later"] - began >= 0.05


async def test_what_fails_comes_back_later_and_later(make_queue: Callable[..., WorkQueue]) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    errors: list[Exception] = []

    async def handle(key: str) -> None:
        times.append(loop.time())
        if len(times) < 5:
            raise ValueError(len(times))

    queue = make_queue(handle, on_error=lambda key, error: errors.append(error))
    queue.add("a")
    await until(lambda: len(times) == 5 and len(queue) == 0)
    assert [error.args for error in errors] == [(1,), (2,), (3,), (4,)]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert all(gap >= 0.8 * 0.01 * 2**n for n, gap in enumerate(gaps))
    assert queue.failures("a") == 0


async def test_a_handler_that_fails_does_not_hold_up_others(make_queue: Callable[..., WorkQueue]) -> None:
    seen = []

    async def handle(key: str) -> None:
        if key == "bad":
            raise OSError
        seen.append(key)

    queue = make_queue(handle, workers=1, base_delay=10)
    queue.add("bad")
    queue.add("good")
    await until(lambda: seen == ["good"])


async def test_a_handler_says_when_it_wants_to_see_a_key_again(make_queue: Callable[..., WorkQueue]) -> None:
    times = 0

    async def handle(key: str) -> float | None:
        nonlocal times
        times += 1
        return 0.0 if times < 4 else None

    queue = make_queue(handle)
    queue.add("a")
    await until(lambda: len(queue) == 0)
    assert times == 4


async def test_a_cancelled_handler_does_not_block_its_key(make_queue: Callable[..., WorkQueue]) -> None:
    times = 0

    async def handle(key: str) -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise asyncio.CancelledError

    queue = make_queue(handle)
    queue.add("a")
    await until(lambda: times == 1 and "a" not in queue)
    queue.add("a")
    await until(lambda: times == 2)


async def test_a_lane_that_is_full_holds_up_no_other(make_queue: Callable[..., WorkQueue]) -> None:
    handled: list[str] = []
    go_on = asyncio.Event()

    async def handle(key: str) -> None:
        if key.startswith("slow"):
            await go_on.wait()
        handled.append(key)

    queue = make_queue(handle, workers=2, lane=lambda key: key[:4])
    for number in range(5):
        queue.add(f"slow{number}")
    for number in range(5):
        queue.add(f"fast{number}")
    await until(lambda: len(handled) == 5)
    assert all(key.startswith("fast") for key in handled) and len(queue) == 5
    go_on.set()
    await until(lambda: len(handled) == 10)
    assert handled[5:] == [f"slow{number}" for number in range(5)] and len(queue) == 0
