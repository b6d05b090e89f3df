"""What every measure is given, and the arithmetic that they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gateways import EnterpriseGateway, HubGateway, kernelspecs
from benchmarks.report import Report

__all__ = ["Bench", "milliseconds", "percentile", "settle"]

QUIET_PERCENT = 15.0


@dataclass
class Bench:
    """The running gateways, the kernels' commands and how much to do. `eg` is None where it is not measured."""

    hub: HubGateway
    eg: EnterpriseGateway | None
    eg_python: str | None
    directory: Path
    report: Report
    quick: bool = False

    @property
    def specs(self) -> dict[str, dict[str, Any]]:
        return kernelspecs()

    def rounds(self, usual: int) -> int:
        return max(1, usual // 3) if self.quick else usual

    def fresh(self, name: str) -> Path:
        """A new directory."""
        path = self.directory / name
        path.mkdir(parents=True)
        return path


def percentile(samples: Sequence[float], part: float) -> float:
    """The sample below which `part` of all lie."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def milliseconds(samples: Sequence[float]) -> str:
    """Median and 95th percentile of seconds, in ms."""
    return f"{1000 * statistics.median(samples):.2f} ms (p95 {1000 * percentile(samples, 0.95):.2f})"


def settle(patience: float = 60.0) -> float:
    """Wait until the machine is quiet, or patience ends; percent of its CPU that is in use."""
    deadline = time.monotonic() + patience
    while True:
        busy = psutil.cpu_percent(interval=0.5)
        if busy < QUIET_PERCENT or time.monotonic() > deadline:
            return busy
