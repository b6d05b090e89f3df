"""The table: rows, the machine they were measured on, and how both are written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Report", "Row", "machine"]

COLUMNS = ("measure", "aim", "direct", "Hub Gateway", "Enterprise Gateway 3.3.0", "ratio", "met?")
KEPT = "<!-- What follows is written by hand and kept by `python -m benchmarks --write`. -->"
INTRODUCTION = """\
# Performance: results

This page is written by `make bench`, which measures everything in one run on one machine. {about}

*direct* is the same kernel without any gateway: raw ZeroMQ sockets in plain text, kernel started by jupyter_client.
*Hub Gateway* is the gateway as it is installed, with its defaults, SQLite and local kernels: the link between gateway
and agent is encrypted.
*Enterprise Gateway* 3.3.0 runs from its own environment with its defaults, in plain text. All three run the same kernel
command. Clients, gateways and kernels share the machine.
"""


@dataclass
class Row:
    """One line of the table; `met` is None where there is no aim."""

    measure: str
    aim: str = ""
    direct: str = ""
    ours: str = ""
    eg: str = ""
    ratio: str = ""
    met: bool | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        met = "" if self.met is None else "yes" if self.met else "**no**"
        return (self.measure, self.aim, self.direct, self.ours, self.eg, self.ratio, met)


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def eg_versions(python: str | None) -> str:
    """The versions in Enterprise Gateway's environment."""
    if python is None:
        return "not measured"
    names = ("jupyter_enterprise_gateway", "jupyter_server", "jupyter_client", "pyzmq", "tornado")
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {names!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def machine(eg_python: str | None) -> dict[str, str]:
    """What the numbers depend on."""
    ours = ("jupyter_client", "ipykernel", "pyzmq", "tornado", "sqlalchemy")
    return {
        "CPU": f"{cpu_model()}, {psutil.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ours),
        "Enterprise Gateway": eg_versions(eg_python),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Report:
    """The rows of one run."""

    def __init__(self, facts: dict[str, str]) -> None:
        self.facts = facts
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.others: dict[str, float] = {}
        """CPU (percent of the machine) that other programs used just before each measure."""

    def text(self) -> str:
        """The table for a terminal."""
        lines = [COLUMNS, *(tuple(cell.replace("**", "") for cell in row.cells()) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        ruled = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in ruled
        )

    def surroundings(self) -> str:
        busiest = max(self.others.values(), default=0.0)
        mean = sum(self.others.values()) / max(1, len(self.others))
        load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
        return (
            f"Other programs used {mean:.0f} % of the machine's CPU on average just before the measures "
            f"({busiest:.0f} % at most); load average at the end {load}."
        )

    def markdown(self) -> str:
        lines = [INTRODUCTION.format(about=self.surroundings())]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in self.rows]
        lines += ["", "## How each is measured", "", *(f"- {note}" for note in self.notes)]
        lines += ["", "## The machine", "", *(f"- {name}: {value}" for name, value in self.facts.items()), ""]
        return "\n".join(lines)

    def write(self, page: Path) -> None:
        """Write the page; what follows the marker in it is kept."""
        old = page.read_text() if page.exists() else ""
        kept = old.partition(KEPT)[2]
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(self.markdown() + f"\n{KEPT}{kept or chr(10)}")

    def write_json(self, path: Path) -> None:
        """Write every sample, to four digits, and a line for each row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"machine": self.facts, "other_programs_cpu_percent": self.others}, indent=1)
        rows = ",\n".join(json.dumps(_rounded(asdict(row))) for row in self.rows)
        path.write_text(f'{about[:-2]},\n "rows": [\n{rows}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
