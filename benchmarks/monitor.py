"""Runs a module with a watch on its event loop: `python monitor.py OUTPUT MODULE ARGUMENTS...`

A callback every 5 ms notes how late it was called. For every lateness of 3 ms or more it keeps the time
(CLOCK_MONOTONIC), the lateness, the CPU time that the loop's thread used meanwhile, and how long the thread was ready
to run but had no CPU (Linux: run_delay of /proc/.../schedstat), all in seconds: so a loop that is blocked can be told
from one that is starved. SIGUSR2 writes them to OUTPUT as JSON. With BENCH_TRACE_STALLS set, a thread notes what
the loop was doing when it was 15 ms late.

Standard library only: it also runs Enterprise Gateway, in that one's environment.
"""

import asyncio
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

INTERVAL = 0.005
WORTH_KEEPING = 0.003
TRACE_AFTER = 0.015


class Monitor:
    """The lateness of one event loop."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.found: list[dict[str, Any]] = []
        self.traces: list[str] = []
        self.schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self.thread = threading.get_ident()
        self.due = 0.0

    def delay(self) -> float:
        try:
            return int(self.schedstat.read_text().split()[1]) / 1e9
        except OSError:
            return 0.0

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGUSR2, self.write)
        self.loop = loop
        self.cpu, self.waited = time.thread_time(), self.delay()
        self.due = time.monotonic()
        loop.call_soon(self.tick)

    def tick(self) -> None:
        now, cpu, waited = time.monotonic(), time.thread_time(), self.delay()
        late = now - self.due
        if late >= WORTH_KEEPING:
            entry: dict[str, Any] = {"at": now, "late": late, "cpu": cpu - self.cpu, "starved": waited - self.waited}
            if self.traces:
                entry["traces"] = self.traces
            self.found.append(entry)
        self.traces = []
        self.cpu, self.waited, self.due = cpu, waited, now + INTERVAL
        self.loop.call_later(INTERVAL, self.tick)

    def write(self) -> None:
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        partial.rename(self.output)
        self.found = []

    def watch(self) -> None:
        """Note the loop's stack while it is late; runs in a thread of its own."""
        while True:
            time.sleep(TRACE_AFTER / 2)
            if self.due and time.monotonic() - self.due > TRACE_AFTER and len(self.traces) < 10:
                frame = sys._current_frames().get(self.thread)
                stack = traceback.extract_stack(frame)[-12:]
                self.traces.append(" < ".join(f"{s.filename}:{s.lineno} {s.name}" for s in reversed(stack)))


def main() -> None:
    """Hook the main thread's first loop and run the module."""
    output, module = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = ""
    monitor = Monitor(output)
    run_forever = asyncio.BaseEventLoop.run_forever

    def watched(loop: asyncio.BaseEventLoop) -> None:
        if threading.get_ident() == monitor.thread and not monitor.due:
            monitor.install(loop)
        run_forever(loop)

    asyncio.BaseEventLoop.run_forever = watched  # type: ignore[method-assign, assignment]
    if os.environ.get("BENCH_TRACE_STALLS"):
        threading.Thread(target=monitor.watch, daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
