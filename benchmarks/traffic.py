"""Measures of what passes through: round trips, floods, large messages, memory."""

from __future__ import annotations

import math
import random
import statistics
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Bench, milliseconds
from benchmarks.client import Channels, Transfer
from benchmarks.direct import DirectKernel
from benchmarks.gateways import EnterpriseGateway, Gateway, HubGateway
from benchmarks.report import Row
from benchmarks.tornado_client import cross_check

__all__ = ["floods", "large_messages", "memory", "round_trips", "with_tornado"]

ADDED_SECONDS = 0.7e-3
FLOOD_SHARE = 0.9
LARGE_SHARE = 0.45
MEMORY_MB = 100
FORMS = {"v1": True, "JSON": False}


def round_trips(bench: Bench) -> list[Row]:
    """`pass`: request to reply; direct and ours in turn, in random order."""
    count = bench.rounds(300)
    eg_count = bench.rounds(120)
    gateways: list[Gateway] = [gateway for gateway in (bench.hub, bench.eg) if gateway is not None]
    cpu: dict[str, float] = {}
    with ExitStack() as stack:
        direct = stack.enter_context(DirectKernel(bench.specs["ipykernel"]["argv"]))
        direct.wait_until_ready()
        paths: dict[str, Callable[[str], float]] = {"direct": direct.execute}
        for gateway in gateways:
            for form, v1 in FORMS.items():
                channels = stack.enter_context(gateway.channels(gateway.start("ipykernel"), v1=v1))
                channels.kernel_info()
                paths[f"{gateway.name} {form}"] = channels.execute
        samples: dict[str, list[float]] = {name: [] for name in paths}
        for execute in paths.values():
            for _ in range(10):
                execute("pass")
        before = bench.hub.cpu()
        names = [name for name in paths if not name.startswith("Enterprise")]
        for _ in range(count):
            random.shuffle(names)
            for name in names:
                samples[name].append(paths[name]("pass"))
        cpu[bench.hub.name] = (bench.hub.cpu() - before) / count / len(FORMS)
        if bench.eg is not None:
            before = bench.eg.cpu()
            for form in FORMS:
                for _ in range(eg_count):
                    samples[f"{bench.eg.name} {form}"].append(paths[f"{bench.eg.name} {form}"]("pass"))
            cpu[bench.eg.name] = (bench.eg.cpu() - before) / eg_count / len(FORMS)
        by_client = direct.client_execute("pass", count)
    for gateway in gateways:
        gateway.delete_all()
    bench.report.notes.append(
        f"`pass` round trip: {count} cells on each path, request to execute_reply, one after the other, direct and "
        f"ours in random order, then {eg_count} on each path of Enterprise Gateway; each path with its own ipykernel; "
        "raw blocking websocket client. Direct with jupyter_client's "
        f"BlockingKernelClient: {milliseconds(by_client)}."
    )
    floor = statistics.median(samples["direct"])
    rows = []
    for form in FORMS:
        ours = samples[f"Hub Gateway {form}"]
        eg = samples.get(f"Enterprise Gateway {form}")
        added = statistics.median(ours) - floor
        rows.append(
            Row(
                f"`pass` round trip, {form}",
                "<= direct + 0.7 ms",
                milliseconds(samples["direct"]),
                milliseconds(ours),
                milliseconds(eg) if eg else "",
                f"direct {1000 * added:+.2f} ms"
                + (f"; EG / {statistics.median(eg) / statistics.median(ours):.0f}" if eg else ""),
                added <= ADDED_SECONDS,
                {"direct": samples["direct"], "ours": ours, "eg": eg, "jupyter_client": by_client},
            )
        )
    rows.append(cpu_row("gateway CPU for one `pass`", cpu, 1e3, "ms"))
    return rows


def cpu_row(measure: str, cpu: dict[str, float], scale: float, unit: str) -> Row:
    ours, eg = cpu["Hub Gateway"], cpu.get("Enterprise Gateway")
    return Row(
        measure,
        ours=f"{scale * ours:.2f} {unit}",
        eg=f"{scale * eg:.2f} {unit}" if eg is not None else "",
        ratio=f"EG / {eg / max(ours, 1e-9):.0f}" if eg is not None else "",
        raw={"ours": ours, "eg": eg},
    )


class Paths:
    """One flood kernel on each way to it: direct, ours in both forms, Enterprise Gateway's in both forms."""

    def __init__(self, bench: Bench, stack: ExitStack) -> None:
        self.bench = bench
        self.direct = stack.enter_context(DirectKernel(bench.specs["flood"]["argv"]))
        self.direct.wait_until_ready()
        self.channels: dict[tuple[str, str], Channels] = {}
        for gateway in (bench.hub, bench.eg):
            if gateway is None:
                continue
            for form, v1 in FORMS.items():
                channels = stack.enter_context(gateway.channels(gateway.start("flood"), v1=v1))
                channels.kernel_info()
                self.channels[gateway.name, form] = channels
            stack.callback(gateway.delete_all)


def checked(transfer: Transfer, count: int) -> float:
    """The seconds of a transfer; NaN where a message was missing, doubled or out of order."""
    return transfer.seconds if transfer.complete(count) else math.nan


def complete(seconds: list[float]) -> list[float]:
    """The runs in which everything came."""
    return [value for value in seconds if not math.isnan(value)]


def times_faster(slower: list[float], faster: list[float]) -> float | None:
    """Ratio of the medians; None where one of them never delivered everything."""
    known = complete(slower), complete(faster)
    return statistics.median(known[0]) / statistics.median(known[1]) if all(known) else None


def ratios(direct: list[float], ours: list[float], eg: list[float]) -> tuple[float | None, str]:
    """Our share of direct, and the cell that says it and how many times Enterprise Gateway's it is."""
    share, times = times_faster(direct, ours), times_faster(eg, ours)
    cells = [f"{share:.2f} x direct" if share else "", f"EG x {times:.1f}" if times else ""]
    return share, "; ".join(cell for cell in cells if cell)


def per_second(count: float, seconds: list[float], unit: str) -> str:
    known = complete(seconds)
    if not known:
        return "lost messages" if seconds else ""
    rate = f"{count / statistics.median(known):,.0f} {unit}"
    return (
        rate if len(known) == len(seconds) else f"{rate} ({len(seconds) - len(known)} of {len(seconds)} lost messages)"
    )


def floods(bench: Bench) -> list[Row]:
    """20,000 and 200,000 small iopub messages."""
    rows: list[Row] = []
    with ExitStack() as stack:
        paths = Paths(bench, stack)
        for size, rounds, eg_rounds in ((20_000, bench.rounds(6), 1), (200_000, bench.rounds(3), 0)):
            code = f"stream {size}"
            direct: list[float] = []
            ours: dict[str, list[float]] = {form: [] for form in FORMS}
            eg: dict[str, list[float]] = {form: [] for form in FORMS}
            cpu: dict[str, float] = {}
            agents = bench.hub.children_cpu("agent.")
            before = bench.hub.cpu()
            for _ in range(rounds):
                direct.append(checked(paths.direct.flood(code), size))
                for form in FORMS:
                    run = paths.channels["Hub Gateway", form].flood(code)
                    ours[form].append(checked(run, size))
            cpu["Hub Gateway"] = (bench.hub.cpu() - before) / (rounds * size * len(FORMS))
            agent_cpu = (bench.hub.children_cpu("agent.") - agents) / (rounds * size * len(FORMS))
            if bench.eg is not None and eg_rounds:
                before = bench.eg.cpu()
                for form in FORMS:
                    for _ in range(eg_rounds):
                        run = paths.channels["Enterprise Gateway", form].flood(code)
                        eg[form].append(checked(run, size))
                cpu["Enterprise Gateway"] = (bench.eg.cpu() - before) / (eg_rounds * size * len(FORMS))
            for form in FORMS:
                share, ratio = ratios(direct, ours[form], eg[form])
                rows.append(
                    Row(
                        f"flood, {size:,} messages, {form}",
                        "all; >= 0.9 x direct",
                        per_second(size, direct, "msg/s"),
                        per_second(size, ours[form], "msg/s"),
                        per_second(size, eg[form], "msg/s"),
                        ratio,
                        share is not None and share >= FLOOD_SHARE and complete(ours[form]) == ours[form],
                        {"direct": direct, "ours": ours[form], "eg": eg[form]},
                    )
                )
            row = cpu_row(f"gateway CPU for one of {size:,}", cpu, 1e6, "us")
            row.ours += f" (agent {1e6 * agent_cpu:.2f})"
            rows.append(row)
        by_client = paths.direct.client_flood("stream 20000").seconds
    bench.report.notes.append(
        "flood: a kernel that signs and sends numbered `stream` messages as fast as it can; from the execute_request "
        "to `idle`, medians of interleaved rounds; that every number came, once and in order, is asserted. Direct: raw "
        f"recv_multipart (jupyter_client's own client takes {20_000 / by_client:,.0f} msg/s)."
    )
    return rows


def large_messages(bench: Bench) -> list[Row]:
    """200 messages of 1 MB of text."""
    code, count = "large 200 1000000", 200
    rounds = bench.rounds(6)
    rows = []
    with ExitStack() as stack:
        paths = Paths(bench, stack)
        direct: list[float] = []
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in paths.channels}
        for _ in range(rounds):
            direct.append(checked(paths.direct.flood(code), count))
            for key, channels in paths.channels.items():
                run = channels.large(code)
                seconds[key].append(checked(run, count))
    for form in FORMS:
        ours, eg = seconds["Hub Gateway", form], seconds.get(("Enterprise Gateway", form), [])
        share, ratio = ratios(direct, ours, eg)
        faster = times_faster(eg, ours) if complete(eg) else math.inf
        fast = share is not None and share >= LARGE_SHARE and faster is not None and faster > 1
        rows.append(
            Row(
                f"200 messages of 1 MB, {form}",
                ">= 0.45 x direct, > EG",
                per_second(count, direct, "MB/s"),
                per_second(count, ours, "MB/s"),
                per_second(count, eg, "MB/s"),
                ratio,
                fast and complete(ours) == ours,
                {"direct": direct, "ours": ours, "eg": eg},
            )
        )
    bench.report.notes.append(
        f"1 MB messages: signed display_data of text, {rounds} interleaved rounds; the client receives each whole and "
        "looks at its number."
    )
    return rows


def slow_reader(channels: Channels, stop: threading.Event) -> None:
    """Read about 1 MB/s."""
    while not stop.wait(0.06):
        channels.some(65536)


def memory_of(gateway: Gateway, v1: bool) -> dict[str, Any]:
    kernel_id = gateway.start("flood")
    base = gateway.rss()
    stop = threading.Event()
    with gateway.channels(kernel_id, v1=v1, receive_buffer=65536) as slow, gateway.channels(kernel_id, v1=v1) as fast:
        slow.kernel_info()
        fast.kernel_info()
        gateway.reset_peak()
        thread = threading.Thread(target=slow_reader, args=(slow, stop))
        thread.start()
        run = fast.large("large 200 1000000")
        peak = gateway.peak()
        stop.set()
        thread.join()
    gateway.delete_all()
    return {"before": base, "peak": peak, "seconds": run.seconds, "received": len(run.numbers)}


def memory_cell(found: dict[str, Any]) -> str:
    lost = "" if found["received"] == 200 else f", {200 - found['received']} messages lost"
    return f"{found['peak']:.0f} MB ({found['before']:.0f} before{lost})"


def memory(bench: Bench) -> list[Row]:
    """Peak memory of a gateway that was just started, while 200 MB pass to one client beside a slow one."""
    rows = []
    for form, v1 in FORMS.items():
        with HubGateway(bench.fresh(f"hub-memory-{form}")) as hub:
            ours = memory_of(hub, v1)
        eg = None
        if bench.eg_python is not None:
            with EnterpriseGateway(bench.fresh(f"eg-memory-{form}"), bench.eg_python) as gateway:
                eg = memory_of(gateway, v1)
        rows.append(
            Row(
                f"gateway memory, 200 MB and a slow client, {form}",
                f"<= {MEMORY_MB} MB",
                "",
                memory_cell(ours),
                memory_cell(eg) if eg else "",
                f"EG / {eg['peak'] / ours['peak']:.1f}" if eg else "",
                ours["peak"] <= MEMORY_MB and ours["received"] == 200,
                {"ours": ours, "eg": eg},
            )
        )
    bench.report.notes.append(
        "gateway memory, of gateways that were just started: the system's own record of the highest resident memory of "
        "the gateway process (VmHWM, reset before, so exact and not sampled), from the request until the fast client "
        "has all 200 messages; the slow client reads 1 MB/s."
    )
    return rows


def with_tornado(bench: Bench) -> list[Row]:
    """The same two through tornado's websocket client: what another client sees."""
    found = {}
    for gateway in (bench.hub, bench.eg):
        if gateway is None:
            continue
        kernels = gateway.start("ipykernel"), gateway.start("flood")
        found[gateway.name] = cross_check(gateway.endpoint, *kernels, count=bench.rounds(100))
        gateway.delete_all()
    ours, eg = found["Hub Gateway"], found.get("Enterprise Gateway")
    bench.report.notes.append(
        "tornado's client: one more client, to see that nothing depends on the raw one; it parses every message."
    )
    return [
        Row(
            "`pass`, v1, tornado's client",
            ours=milliseconds(ours.passes),
            eg=milliseconds(eg.passes) if eg else "",
            raw={"ours": ours.passes, "eg": eg.passes if eg else None},
        ),
        Row(
            "flood, 20,000 messages, v1, tornado's client",
            ours=per_second(20_000, [checked(ours.flood, 20_000)], "msg/s"),
            eg=per_second(20_000, [checked(eg.flood, 20_000)], "msg/s") if eg else "",
            raw={"ours": ours.flood.seconds, "eg": eg.flood.seconds if eg else None},
        ),
    ]
