"""Measures of what happens around the messages: opening, listing, starting, stalls, descriptors."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Bench, milliseconds, percentile
from benchmarks.client import Http
from benchmarks.direct import concurrent_starts
from benchmarks.gateways import EnterpriseGateway, Gateway, HubGateway, in_parallel
from benchmarks.ping import Pinger, Pings
from benchmarks.report import Row

__all__ = ["listing", "opening", "stalls", "starts"]

OPEN_SECONDS = 0.020
DESCRIPTORS = 4
STALL_SECONDS = 0.050
START_RATIO = 1.1
LIST_RATE = 1000
KERNELS = 10


def opened(gateway: Gateway, count: int) -> tuple[list[float], list[float]]:
    """Seconds from TCP connect to the 101, and to a first kernel_info_reply, on a kernel that lives."""
    kernel_id = gateway.start("flood")
    opens, replies = [], []
    for _ in range(count):
        started = time.perf_counter()
        with gateway.channels(kernel_id, v1=True) as channels:
            opens.append(time.perf_counter() - started)
            channels.kernel_info()
            replies.append(time.perf_counter() - started)
    gateway.delete_all()
    return opens, replies


def opening(bench: Bench) -> list[Row]:
    """Opening a websocket on a live kernel."""
    ours = opened(bench.hub, bench.rounds(60))
    eg = opened(bench.eg, bench.rounds(12)) if bench.eg is not None else None
    aim = f"<= {1000 * OPEN_SECONDS:.0f} ms"
    rows = []
    for index, measure in enumerate(("websocket open on a live kernel", "open to the first kernel_info_reply")):
        median = statistics.median(ours[index])
        rows.append(
            Row(
                measure,
                aim if index == 0 else "",
                "",
                milliseconds(ours[index]),
                milliseconds(eg[index]) if eg else "",
                f"EG / {statistics.median(eg[index]) / median:.0f}" if eg else "",
                median <= OPEN_SECONDS if index == 0 else None,
                {"ours": ours[index], "eg": eg[index] if eg else None},
            )
        )
    bench.report.notes.append(
        "websocket open: from TCP connect to the answer 101, one after the other, each on a new connection."
    )
    return rows


def with_kernels(gateway: Gateway, requests: int) -> dict[str, Any]:
    """Descriptors for ten kernels with two websockets each, then requests for the list of twenty."""
    # What a process opens once (threads, pooled connections to the database) is no kernel's.
    in_parallel(KERNELS, lambda _: gateway.start("flood"))
    gateway.delete_all()
    time.sleep(1)  # let connections of earlier measures end, so that they are not counted
    before = gateway.descriptors()
    kernels = in_parallel(KERNELS, lambda _: gateway.start("flood"))
    time.sleep(1)
    idle = gateway.descriptors()
    with ExitStack() as stack:
        for kernel_id in kernels:
            for v1 in (True, False):
                stack.enter_context(gateway.channels(kernel_id, v1=v1)).kernel_info()
        connected = gateway.descriptors()
    in_parallel(KERNELS, lambda _: gateway.start("flood"))
    latencies = []
    with Http(gateway.endpoint) as http:
        for index in range(requests + 50):
            started = time.perf_counter()
            status, body = http.request("GET", "/api/kernels")
            if status != 200 or len(json.loads(body)) != 2 * KERNELS:
                raise AssertionError(f"GET /api/kernels answered {status} with {body[:200]!r}")
            if index >= 50:
                latencies.append(time.perf_counter() - started)
    gateway.delete_all()
    return {
        "without_websockets": (idle - before) / KERNELS,
        "with_two": (connected - before) / KERNELS,
        "latencies": latencies,
    }


def rate(latencies: list[float]) -> float:
    """Requests a second: of the total time, so that slow ones count."""
    return len(latencies) / sum(latencies)


def listing(bench: Bench) -> list[Row]:
    """Descriptors per kernel, and GET /api/kernels."""
    ours = with_kernels(bench.hub, bench.rounds(3000))
    eg = with_kernels(bench.eg, bench.rounds(1500)) if bench.eg is not None else None
    per_second = rate(ours["latencies"])
    bench.report.notes.append(
        "descriptors: those of the gateway process, ten kernels with two websockets each less none, after ten others "
        "have come and gone. GET /api/kernels: "
        "20 kernels, one keep-alive connection, one request after the other; the client parses each answer."
    )
    return [
        Row(
            "gateway descriptors per kernel with two websockets",
            f"<= {DESCRIPTORS}",
            "",
            f"{ours['with_two']:.1f} ({ours['without_websockets']:.1f} with none)",
            f"{eg['with_two']:.1f} ({eg['without_websockets']:.1f} with none)" if eg else "",
            f"EG / {eg['with_two'] / ours['with_two']:.1f}" if eg else "",
            ours["with_two"] <= DESCRIPTORS,
            {"ours": ours, "eg": eg},
        ),
        Row(
            "GET /api/kernels, 20 kernels",
            f">= {LIST_RATE:,} req/s",
            "",
            f"{per_second:,.0f} req/s (median {1000 * statistics.median(ours['latencies']):.2f} ms)",
            f"{rate(eg['latencies']):,.0f} req/s" if eg else "",
            f"EG x {per_second / rate(eg['latencies']):.1f}" if eg else "",
            per_second >= LIST_RATE,
        ),
    ]


def starts(bench: Bench) -> list[Row]:
    """Ten kernels started at once, to the last kernel_info_reply."""
    direct: list[float] = []
    ours: list[float] = []
    eg: list[float] = []
    failed = 0
    argv = bench.specs["ipykernel"]["argv"]
    concurrent_starts(argv, 2)  # warm: byte code and page cache
    for number in range(bench.rounds(5)):
        order = ["direct", "ours", "eg"] if number % 2 else ["eg", "ours", "direct"]
        for who in order:
            if who == "direct":
                direct.append(concurrent_starts(argv, KERNELS))
            elif who == "ours":
                seconds, wrong = bench.hub.concurrent_starts("ipykernel", KERNELS)
                if wrong:
                    raise AssertionError(f"Hub Gateway: {wrong} of {KERNELS} concurrent starts failed")
                ours.append(seconds)
            elif bench.eg is not None:
                seconds, wrong = bench.eg.concurrent_starts("ipykernel", KERNELS)
                failed += wrong
                eg.append(seconds)
    ratio = statistics.median(ours) / statistics.median(direct)
    bench.report.notes.append(
        f"concurrent starts: ten ipykernels, {len(ours)} rounds in turn, medians. Direct: jupyter_client's "
        "AsyncKernelManager." + (f" {failed} of {KERNELS * len(eg)} starts failed in Enterprise Gateway." if eg else "")
    )
    return [
        Row(
            f"{KERNELS} concurrent starts to the last kernel_info",
            "<= 1.1 x direct",
            f"{statistics.median(direct):.2f} s",
            f"{statistics.median(ours):.2f} s",
            f"{statistics.median(eg):.2f} s" + (f" ({failed} failed)" if failed else "") if eg else "",
            f"{ratio:.2f} x direct",
            ratio <= START_RATIO,
            {"direct": direct, "ours": ours, "eg": eg, "eg_failed": failed},
        )
    ]


def stalled(bench: Bench, gateway: Gateway, output: Any, rounds: int) -> dict[str, Any]:
    """What the loop monitor and the pinging process saw during concurrent starts."""
    pings: list[Pings] = []
    found: list[dict[str, Any]] = []
    gateway.concurrent_starts("ipykernel", 2)
    for _ in range(rounds):
        gateway.stalls(output)
        with Pinger(gateway.endpoint) as pinger:
            gateway.concurrent_starts("ipykernel", KERNELS)
        found += gateway.stalls(output)
        pings.append(pinger.result)
    late = [entry["late"] for entry in found] or [0.0]
    own = [max(0.0, entry["late"] - entry["starved"]) for entry in found] or [0.0]
    return {
        "longest": max(late),
        "longest_own": max(own),
        "p99": percentile(late, 0.99),
        "longest_ping": max(ping.longest for ping in pings) / 1000,
        "longest_wakeup": max(ping.longest_wakeup for ping in pings) / 1000,
        "median_ping": statistics.median(ping.median for ping in pings) / 1000,
        "entries": sorted(found, key=lambda entry: -entry["late"])[:20],
    }


def describe(found: dict[str, Any]) -> str:
    return (
        f"{1000 * found['longest_own']:.0f} ms ({1000 * found['longest']:.0f} with waits for a CPU); "
        f"GET /api <= {1000 * found['longest_ping']:.0f} ms"
    )


def stalls(bench: Bench) -> list[Row]:
    """The longest time that the event loop did not turn during ten concurrent starts."""
    rounds = bench.rounds(3)
    path = bench.fresh("hub-monitored")
    with HubGateway(path, monitor=path / "stalls.json") as hub:
        ours = stalled(bench, hub, path / "stalls.json", rounds)
    eg = None
    if bench.eg_python is not None:
        path = bench.fresh("eg-monitored")
        with EnterpriseGateway(path, bench.eg_python, monitor=path / "stalls.json") as gateway:
            eg = stalled(bench, gateway, path / "stalls.json", rounds)
    bench.report.notes.append(
        "event-loop stall: a callback every 5 ms in the gateway's own loop notes how late it is called; the time that "
        "the thread was ready to run but had no CPU (the system's run_delay) is taken off, because ten interpreters "
        "start on these cores. A second process asks GET /api every 10 ms; "
        f"it was itself woken up to {1000 * ours['longest_wakeup']:.0f} ms late."
    )
    return [
        Row(
            f"longest event-loop stall, {KERNELS} concurrent starts",
            f"<= {1000 * STALL_SECONDS:.0f} ms",
            "",
            describe(ours),
            describe(eg) if eg else "",
            f"EG / {eg['longest_own'] / max(ours['longest_own'], 1e-3):.1f}" if eg else "",
            ours["longest_own"] <= STALL_SECONDS,
            {"ours": ours, "eg": eg},
        )
    ]
