"""How many calls of one user a host carries out at once, and what one that hangs does to others."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import pytest

from hub_gateway.proxies.ssh_connect import Problem, SshError, SshOptions
from hub_gateway.proxies.ssh_hosts import Host
from hub_gateway.proxies.ssh_pool import Lane, SshPool
from hub_gateway.proxies.ssh_turns import Turns


@dataclass
class Channel:
    """A command on a host, of which it is not known whether it has ended."""

    closed: bool = False

    def exit_status_ready(self) -> bool:
        return self.closed


class Calls:
    """Calls that last until they are told to end."""

    def __init__(self, at_once: int) -> None:
        self.turns = Turns()
        self.at_once = at_once
        self.begun: list[str] = []
        self.over = asyncio.Event()

    async def one(self, who: str, hangs: Channel | None = None) -> None:
        async with self.turns.take(who, self.at_once) as line:
            self.begun.append(who)
            if hangs is None:
                await self.over.wait()
            else:
                line.hanging.append(hangs)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_user_waits_for_nobody_else() -> None:
    calls = Calls(at_once=2)
    tasks = [asyncio.ensure_future(calls.one(who)) for who in ("ada", "ada", "ada", "bea")]
    await settle()
    assert calls.begun == ["ada", "ada", "bea"]
    calls.over.set()
    await asyncio.gather(*tasks)
    assert calls.begun == ["ada", "ada", "bea", "ada"]
    assert not calls.turns._lines


async def test_what_hangs_counts_until_it_has_ended() -> None:
    calls, channels = Calls(at_once=2), [Channel(), Channel()]
    calls.over.set()
    for channel in channels:
        await calls.one("ada", hangs=channel)
    with pytest.raises(SshError, match="2 earlier calls for the same user hang there") as caught:
        await calls.one("ada")
    assert caught.value.problem is Problem.BUSY and not caught.value.problem.of_host
    await calls.one("bea")
    channels[0].closed = True
    await calls.one("ada")
    assert calls.begun == ["ada", "ada", "bea", "ada"]


async def test_who_waits_learns_that_the_calls_before_hang() -> None:
    calls = Calls(at_once=1)
    hung = Channel()

    async def hang() -> None:
        async with calls.turns.take("ada", 1) as line:
            await calls.over.wait()
            line.hanging.append(hung)

    first = asyncio.ensure_future(hang())
    await settle()
    waiting = [asyncio.ensure_future(calls.one("ada")) for _ in range(3)]
    await settle()
    calls.over.set()
    await first
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [SshError] * 3


async def test_who_is_cancelled_while_waiting_keeps_nobody_waiting() -> None:
    calls = Calls(at_once=1)
    first, second, third = (asyncio.ensure_future(calls.one("ada")) for _ in range(3))
    await settle()
    calls.over.set()
    second.cancel()
    await asyncio.wait_for(asyncio.gather(first, third), 10)
    assert second.cancelled() and calls.begun == ["ada", "ada"]


async def test_who_waits_when_the_gateway_ends_is_told() -> None:
    calls = Calls(at_once=1)
    first, second = (asyncio.ensure_future(calls.one("ada")) for _ in range(2))
    await settle()
    calls.turns.close()
    with pytest.raises(SshError, match="the gateway is ending"):
        await asyncio.wait_for(second, 10)
    calls.over.set()
    await first


async def test_who_was_just_woken_counts_among_those_that_come_then() -> None:
    """Both calls end in the same turn of the loop: who waited, and who comes after, are in one line."""
    calls, last = Calls(at_once=2), asyncio.Event()

    async def until_last() -> None:
        async with calls.turns.take("ada", 2):
            calls.begun.append("late")
            await last.wait()

    first = [asyncio.ensure_future(calls.one("ada")) for _ in range(2)]
    await settle()
    late = [asyncio.ensure_future(until_last())]
    await settle()
    calls.over.set()
    await asyncio.gather(*first)
    late += [asyncio.ensure_future(until_last()) for _ in range(2)]
    await settle()
    assert calls.begun.count("late") == 2
    last.set()
    await asyncio.gather(*late)
    assert calls.begun.count("late") == 3 and not calls.turns._lines


async def test_what_hangs_after_it_has_waited_counts() -> None:
    calls, channels = Calls(at_once=2), [Channel(), Channel()]
    first = [asyncio.ensure_future(calls.one("ada")) for _ in range(2)]
    await settle()
    waiting = [asyncio.ensure_future(calls.one("ada", hangs=channel)) for channel in channels]
    await settle()
    calls.over.set()
    await asyncio.gather(*first, *waiting)
    with pytest.raises(SshError, match="2 earlier calls for the same user hang there"):
        await calls.one("ada")


async def test_nothing_is_kept_of_whoever_has_given_up() -> None:
    calls = Calls(at_once=1)
    first, second = (asyncio.ensure_future(calls.one("ada")) for _ in range(2))
    await settle()
    second.cancel()
    await asyncio.wait({second})
    calls.over.set()
    await first
    assert second.cancelled() and not calls.turns._lines


async def test_what_hangs_is_noted_between_two_steps_of_the_loop() -> None:
    """A thread must not change what the loop may just be looking through."""
    pool = SshPool(SshOptions(known_hosts=(), authenticate=lambda login, host: {}))
    host, hung = Host("a", "a"), Channel()
    begun, release = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        release.wait()
        raise SshError(Problem.UNFINISHED, "it hangs", hanging=hung)

    async with pool._turns.take((host.address, host.port, Lane.CALL, "ada"), 4) as line:
        running = asyncio.ensure_future(pool.run(host, call, who="ada"))
        await asyncio.to_thread(begun.wait)
        release.set()
        for threads in pool._threads.values():
            threads.shutdown(wait=True)  # which the loop does not get to hear of here
        assert line.hanging == []
        with pytest.raises(SshError, match="it hangs"):
            await running
        assert line.hanging == [hung]
    pool.close()
