"""Soft limits, graces, bursts, weekly times, days on which clocks change."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from hub_gateway.db.models import utcnow
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import Resources
from hub_gateway.metrics import METRICS
from hub_gateway.quotas.enforce import Line, Notice, Stop, enforce
from hub_gateway.quotas.enforce import look as lines_of
from hub_gateway.quotas.explain import limits
from hub_gateway.quotas.notices import Notifier
from hub_gateway.quotas.resolve import active, window_bounds
from hub_gateway.quotas.types import Counts, Period, Policy, Resource, SubjectKind, Weekly, WindowKind
from tests.harness.quotas import begin, new, put, release
from tests.harness.waiting import eventually

GPUS = Policy("gpus", SubjectKind.EVERYONE, resource=Resource.GPU, soft=1, hard=4, grace_seconds=600)


async def look(store: KernelStore, **later: float) -> tuple[list[Notice], list[Stop]]:
    now = utcnow() + timedelta(**later)
    return await store.write(lambda tx: enforce(tx, store.admission, now))


async def test_a_soft_limit_is_told_once(quota_store: KernelStore) -> None:
    await put(quota_store, GPUS)
    await quota_store.admit(new(1, resources=Resources(gpu=1)))
    assert await look(quota_store) == ([], [])
    crossing = await quota_store.admit(new(2, resources=Resources(gpu=2)))
    assert "above the soft limit of the policy gpus" in crossing.notices[0]
    [notice], stops = await look(quota_store)
    assert (notice.owner, notice.event, set(notice.kernels)) == ("bob", "soft", {"k1", "k2"}) and not stops
    assert "3 GPUs are in use" in notice.sentence and "4 GPUs at most" in notice.sentence
    assert await look(quota_store) == ([], [])
    await release(quota_store, "k2")
    assert await look(quota_store) == ([], [])
    await quota_store.admit(new(3, resources=Resources(gpu=2)))
    assert len((await look(quota_store))[0]) == 1


async def test_a_lowered_limit_stops_the_newest_after_its_grace(quota_store: KernelStore) -> None:
    made = await put(quota_store, GPUS)
    for number in range(1, 5):
        await quota_store.admit(new(number, resources=Resources(gpu=1)))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=10 - number))
    await look(quota_store)
    await put(quota_store, Policy(**{**vars(made), "soft": None, "hard": 2.0}))
    [warning], stops = await look(quota_store)
    assert warning.event == "over" and "10 minutes" in warning.sentence and not stops
    assert await look(quota_store, minutes=9) == ([], [])
    notices, stops = await look(quota_store, minutes=11)
    assert [stop.kernel_id for stop in stops] == ["k4", "k3"] and not notices
    assert "gpus" in stops[0].sentence and "grace of 10 minutes" in stops[0].sentence


async def test_nobody_is_stopped_twice_or_told_so(quota_store: KernelStore) -> None:
    """Two processes look while the kernels end: what is being stopped no longer counts as what is to be."""
    made = await put(quota_store, Policy("two", SubjectKind.EVERYONE, hard=3, grace_seconds=60))
    for number in range(3):
        await quota_store.admit(new(number))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=10 - number))
    await put(quota_store, Policy(**{**vars(made), "hard": 1.0}))
    await look(quota_store)
    _, stops = await look(quota_store, minutes=2)
    assert [stop.kernel_id for stop in stops] == ["k2", "k1"]
    assert await look(quota_store, minutes=2) == ([], [])
    assert await look(quota_store, minutes=5) == ([], [])
    ended = await quota_store.get("k2")
    assert ended is not None and ended.target.value == "ended" and "policy two" in ended.message


async def test_a_limit_that_is_lowered_again_has_a_grace_again(quota_store: KernelStore) -> None:
    """What was told was about another limit: nobody is stopped on the strength of that."""
    made = await put(quota_store, Policy("few", SubjectKind.EVERYONE, hard=3, grace_seconds=60))
    for number in range(3):
        await quota_store.admit(new(number))
    made = await put(quota_store, Policy(**{**vars(made), "hard": 2.0}))
    assert len((await look(quota_store))[0]) == 1
    await put(quota_store, Policy(**{**vars(made), "hard": 0.0}))
    [again], stops = await look(quota_store)
    assert "allows 0 kernels" in again.sentence and not stops
    _, stops = await look(quota_store, minutes=2)
    assert len(stops) == 3


async def test_after_a_burst_comes_the_grace(quota_store: KernelStore) -> None:
    await put(
        quota_store, Policy("b", SubjectKind.EVERYONE, hard=1, burst=2, burst_seconds=600, grace_seconds=60, soft=1)
    )
    await quota_store.admit(new(1))
    await quota_store.admit(new(2))
    await begin(quota_store, "k1", utcnow() - timedelta(hours=1))
    [notice], stops = await look(quota_store, minutes=9)
    assert notice.event == "soft" and not stops
    [warning], stops = await look(quota_store, minutes=11)
    assert warning.event == "over" and "allows 1 kernel" in warning.sentence and not stops
    _, [stop] = await look(quota_store, minutes=13)
    assert stop.kernel_id == "k2"


async def test_the_page_says_when_kernels_are_stopped(quota_store: KernelStore) -> None:
    made = await put(quota_store, GPUS)
    await quota_store.admit(new(1, resources=Resources(gpu=4)))
    await put(quota_store, Policy(**{**vars(made), "hard": 2.0}))
    await look(quota_store)
    [view] = await quota_store.db.read(
        lambda tx: limits(tx, quota_store.admission, "bob", SubjectKind.USER, (), utcnow())
    )
    assert view.stops_at is not None and timedelta(minutes=9) < view.stops_at - utcnow() <= timedelta(minutes=10)
    assert "kernels are stopped from" in view.warning


async def test_without_a_grace_nobody_is_stopped(quota_store: KernelStore) -> None:
    made = await put(quota_store, Policy("two", SubjectKind.EVERYONE, hard=2))
    await quota_store.admit(new(1))
    await quota_store.admit(new(2))
    await put(quota_store, Policy(**{**vars(made), "hard": 0.0}))
    assert await look(quota_store) == await look(quota_store, days=30) == ([], [])
    with pytest.raises(LaunchRefused):
        await quota_store.admit(new(3))


async def test_time_that_runs_out_while_a_kernel_runs(quota_store: KernelStore) -> None:
    day = {"window": WindowKind.ROLLING, "window_seconds": 86400}
    await put(
        quota_store, Policy("h", SubjectKind.EVERYONE, resource=Resource.KERNEL_HOURS, hard=3, grace_seconds=60, **day)
    )
    await quota_store.admit(new(1))
    await begin(quota_store, "k1", utcnow() - timedelta(hours=2))
    assert await look(quota_store) == ([], [])
    [warning], _ = await look(quota_store, minutes=61)
    assert "kernel-hours" in warning.sentence
    _, [stop] = await look(quota_store, minutes=63)
    assert stop.kernel_id == "k1"


async def test_a_burst_lasts_as_long_as_it_may(quota_store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [utcnow()]
    monkeypatch.setattr("hub_gateway.kernels.admissions.utcnow", lambda: clock[0])
    await put(quota_store, Policy("b", SubjectKind.EVERYONE, hard=1, burst=2, burst_seconds=600))
    await quota_store.admit(new(1))
    await quota_store.admit(new(2))
    with pytest.raises(LaunchRefused):
        await quota_store.admit(new(3))
    await release(quota_store, "k2", clock[0] + timedelta(minutes=4))
    clock[0] += timedelta(minutes=5)
    await quota_store.admit(new(4))  # six minutes of the burst are left
    clock[0] += timedelta(minutes=7)
    await release(quota_store, "k4", clock[0])
    with pytest.raises(LaunchRefused):
        await quota_store.admit(new(5))
    clock[0] += timedelta(minutes=11)  # recovered
    await quota_store.admit(new(6))


@pytest.mark.parametrize("begins", [0, 600])
async def test_a_burst_ends_for_who_was_above_it_before(quota_store: KernelStore, begins: int) -> None:
    """The limit is lowered, or begins at some time, below what is held: the burst runs from then on, and ends."""
    for number in range(8):
        await quota_store.admit(new(number))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=10 - number))
    burst = {"hard": 2, "burst": 8, "burst_seconds": 60, "grace_seconds": 0}
    await put(quota_store, Policy("b", SubjectKind.EVERYONE, valid_from=utcnow() + timedelta(seconds=begins), **burst))
    assert await look(quota_store, seconds=begins + 1) == ([], [])
    assert await look(quota_store, seconds=begins + 55) == ([], [])
    [warning], stops = await look(quota_store, seconds=begins + 62)
    assert warning.event == "over" and "allows 2 kernels" in warning.sentence and not stops
    _, stops = await look(quota_store, seconds=begins + 63)
    assert [stop.kernel_id for stop in stops] == ["k7", "k6", "k5", "k4", "k3", "k2"]


async def test_a_grant_does_not_spend_the_burst_below_it(quota_store: KernelStore) -> None:
    await put(quota_store, Policy("b", SubjectKind.EVERYONE, hard=1, burst=3, burst_seconds=600, grace_seconds=0))
    ends = utcnow() + timedelta(hours=1)
    await put(quota_store, Policy("more", SubjectKind.USER, "bob", hard=8, priority=1000, valid_until=ends))
    for number in range(3):
        await quota_store.admit(new(number))
    assert await look(quota_store, minutes=59) == ([], [])
    # The grant has ended: the burst begins now, and has all of its time.
    assert await look(quota_store, minutes=61) == ([], [])
    assert await look(quota_store, minutes=70) == ([], [])
    [warning], _ = await look(quota_store, minutes=72)
    assert warning.event == "over"


async def test_a_burst_recovers_while_its_policy_does_not_count(quota_store: KernelStore) -> None:
    """Under a grant that comes later, as when use is below the limit."""
    await put(quota_store, Policy("b", SubjectKind.EVERYONE, hard=1, burst=3, burst_seconds=600, grace_seconds=0))
    for number in range(3):
        await quota_store.admit(new(number))
    await look(quota_store, minutes=5)
    span = {"valid_from": utcnow() + timedelta(minutes=6), "valid_until": utcnow() + timedelta(hours=2)}
    await put(quota_store, Policy("more", SubjectKind.USER, "bob", hard=8, priority=1000, **span))
    assert await look(quota_store, minutes=7) == ([], [])
    assert await look(quota_store, minutes=121) == ([], [])
    assert await look(quota_store, minutes=130) == ([], [])


async def test_looking_for_what_time_does_holds_nobody_up(quota_store: KernelStore) -> None:
    """Only lines in which something changes are written, and each alone does what all together would."""
    await put(quota_store, Policy("each", SubjectKind.EVERYONE, soft=1, hard=9))
    lab = {"resource": Resource.CPU, "counts": Counts.TOGETHER}
    await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", soft=1, hard=9, **lab))
    for number, owner in enumerate(("alice", "bob", "bob", "carol", "carol")):
        await quota_store.admit(new(number, owner=owner, groups=("lab",), resources=Resources(cpu=1)))

    async def changing() -> list[Line]:
        return await quota_store.db.read(lambda tx: lines_of(tx, quota_store.admission, utcnow()))

    found = await changing()
    assert set(found) == {("each", ("user", "bob")), ("each", ("user", "carol")), ("lab", ("group", "lab"))}
    for line, told in zip(sorted(found), (("bob",), ("carol",), ("alice", "bob", "carol")), strict=True):
        notices, _ = await quota_store.write(lambda tx, line=line: enforce(tx, quota_store.admission, utcnow(), [line]))
        assert tuple(sorted(notice.owner for notice in notices)) == told
    assert await changing() == []
    await release(quota_store, "k1")
    assert await changing() == [("each", ("user", "bob"))]


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("local", "holds"),
    [
        (datetime(2030, 3, 29, 23, 0, tzinfo=BERLIN), True),  # Friday night
        (datetime(2030, 3, 30, 5, 59, tzinfo=BERLIN), True),
        (datetime(2030, 3, 30, 6, 0, tzinfo=BERLIN), False),
        (datetime(2030, 3, 31, 1, 59, tzinfo=BERLIN), False),  # the night before summer time, a Sunday
        (datetime(2030, 3, 31, 23, 0, tzinfo=BERLIN), True),
        (datetime(2030, 4, 1, 5, 30, tzinfo=BERLIN), True),
        (datetime(2030, 10, 28, 5, 30, tzinfo=BERLIN), True),  # after winter time began
        (datetime(2030, 10, 28, 6, 30, tzinfo=BERLIN), False),
    ],
)
def test_weekly_times_are_what_the_clock_on_the_wall_says(local: datetime, holds: bool) -> None:
    nights = Weekly((4, 6), 22 * 60, 6 * 60)
    policy = Policy("n", SubjectKind.EVERYONE, timezone="Europe/Berlin", weekly=(nights,))
    assert active(policy, local.astimezone(timezone.utc)) is holds


def test_calendar_windows_begin_at_midnight_there() -> None:
    month = Policy("m", SubjectKind.EVERYONE, window=WindowKind.CALENDAR, period=Period.MONTH, timezone="Europe/Berlin")
    begin_, end = window_bounds(month, datetime(2030, 3, 15, tzinfo=timezone.utc))
    assert (begin_.isoformat(), end.isoformat()) == ("2030-02-28T23:00:00+00:00", "2030-03-31T22:00:00+00:00")
    day = Policy(**{**vars(month), "period": Period.DAY})
    begin_, end = window_bounds(day, datetime(2030, 3, 31, 12, tzinfo=timezone.utc))
    assert end - begin_ == timedelta(hours=23)
    week = Policy(**{**vars(month), "period": Period.WEEK, "timezone": "UTC"})
    assert window_bounds(week, datetime(2028, 2, 29, 12, tzinfo=timezone.utc))[0].isoformat().startswith("2028-02-28")


async def test_a_limit_of_one_kernel_is_not_enforced_over_time(quota_store: KernelStore) -> None:
    await put(
        quota_store, Policy("c", SubjectKind.EVERYONE, resource=Resource.CPU, counts=Counts.KERNEL, hard=1, soft=1)
    )
    await quota_store.admit(new(1, resources=Resources(cpu=4)))
    assert await look(quota_store) == ([], [])


async def test_a_webhook_hears_of_it_and_one_that_fails_disturbs_nobody(tmp_path: Any) -> None:
    heard: list[dict[str, Any]] = []
    (tmp_path / "token").write_text("secret\n")

    class Hook(RequestHandler):
        def post(self, status: str) -> None:
            heard.append({**json.loads(self.request.body), "authorization": self.request.headers["Authorization"]})
            self.set_status(int(status))

    listening, port = bind_unused_port()
    server = HTTPServer(Application([(r"/(\d+)", Hook)]))
    server.add_sockets([listening])
    failed = METRICS.notices.labels("webhook", "failed")
    before = failed._value.get()
    for status in (200, 500):
        notifier = Notifier(webhook_url=f"http://127.0.0.1:{port}/{status}", webhook_token_file=str(tmp_path / "token"))
        notifier.tell("bob", "gpus", "soft", "Too many.")
        await notifier.close()
    server.stop()
    gone = Notifier(webhook_url="http://127.0.0.1:9/", webhook_token_file=str(tmp_path / "missing"))
    gone.tell("bob", "gpus", "soft", "Too many.")
    await gone.close()
    assert [one["sentence"] for one in heard] == ["Too many."] * 2 and heard[0]["authorization"] == "Bearer secret"
    assert failed._value.get() == before + 2


@pytest.mark.parametrize(("answers", "heard"), [((503, 429, 200), 3), ((503, 403, 200), 2)])
async def test_a_notice_is_sent_again_where_that_may_help(answers: tuple[int, ...], heard: int) -> None:
    coming = list(answers)

    class Hook(RequestHandler):
        def post(self) -> None:
            self.set_status(coming.pop(0))

    listening, port = bind_unused_port()
    server = HTTPServer(Application([("/", Hook)]))
    server.add_sockets([listening])
    sent, failed = (METRICS.notices.labels("webhook", outcome) for outcome in ("sent", "failed"))
    before = (sent._value.get(), failed._value.get())
    tasks = len(asyncio.all_tasks())
    notifier = Notifier(webhook_url=f"http://127.0.0.1:{port}/", retry_seconds=[0.01, 0.01, 0.01])
    notifier.tell("bob", "gpus", "soft", "Too many.")
    await eventually(lambda: sum(before) < sent._value.get() + failed._value.get(), "what became of it")
    server.stop()
    assert len(answers) - len(coming) == heard
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks, "nothing to be left")
    assert (sent._value.get(), failed._value.get()) == (before[0] + (heard == 3), before[1] + (heard < 3))
    await notifier.close()


async def test_an_e_mail_hears_of_it() -> None:
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        data = False
        while line := await reader.readline():
            said.append(line)
            if data:
                if line == b".\r\n":
                    data = False
                    writer.write(b"250 taken\r\n")
                continue
            data = line.upper().startswith(b"DATA")
            writer.write(
                b"354 go on\r\n" if data else b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 ok\r\n"
            )
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    notifier = Notifier(smtp_server=f"127.0.0.1:{port}", smtp_starttls=False, mail_to="{user}@example.org")
    notifier.tell("bob", "gpus", "soft", "You hold 3 GPUs.")
    await notifier.close()
    await eventually(lambda: any(b"You hold 3 GPUs." in line for line in said), "the mail")
    assert any(b"bob@example.org" in line for line in said)
    server.close()
    await server.wait_closed()
    failed = METRICS.notices.labels("email", "failed")
    before = failed._value.get()
    notifier.tell("bob", "gpus", "soft", "You hold 4 GPUs.")  # nobody listens any more
    notifier.tell("bob\nBcc: all@example.org", "gpus", "soft", "You hold 4 GPUs.")
    await notifier.close()
    assert failed._value.get() == before + 2
