"""A process that asks a gateway for GET /api every 10 ms until its standard input ends; prints what it saw as JSON."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.client import Endpoint, Http

__all__ = ["Pinger", "Pings"]

INTERVAL = 0.01


@dataclass(frozen=True)
class Pings:
    """Milliseconds: answers to GET /api, and how late the pinging process itself was woken (its own want of CPU)."""

    count: int
    median: float
    p99: float
    longest: float
    longest_wakeup: float


class Pinger:
    """Context: pings while it is open; `result` afterwards."""

    result: Pings

    def __init__(self, endpoint: Endpoint) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ping"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        described = {"host": endpoint.host, "port": endpoint.port, "headers": dict(endpoint.headers)}
        self.process.stdin.write(json.dumps(described).encode() + b"\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def __enter__(self) -> Pinger:
        return self

    def __exit__(self, *exc: object) -> None:
        output, _ = self.process.communicate(timeout=30)
        self.result = Pings(**json.loads(output))


def main() -> None:
    http = Http(Endpoint(**json.loads(sys.stdin.readline())))
    answers: list[float] = []
    late: list[float] = []
    print("pinging", flush=True)
    due = time.perf_counter()
    while True:
        due = max(due + INTERVAL, time.perf_counter())
        if select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
            break
        started = time.perf_counter()
        late.append(started - due)
        status, _ = http.request("GET", "/api")
        if status != 200:
            raise RuntimeError(f"GET /api answered {status}")
        answers.append(time.perf_counter() - started)
    answers.sort()
    milliseconds = [1000 * seconds for seconds in answers]
    result = {
        "count": len(answers),
        "median": milliseconds[len(answers) // 2],
        "p99": milliseconds[int(len(answers) * 0.99)],
        "longest": milliseconds[-1],
        "longest_wakeup": 1000 * max(late),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
