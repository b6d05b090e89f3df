"""Logs: a line names what it is about, and nothing from outside can forge one or reach a terminal."""

from __future__ import annotations

import json
import logging
import sys

from hub_gateway.kernels.types import LaunchPlan, NewKernel
from hub_gateway.logs import JSONFormatter, TextFormatter, about

KERNEL = NewKernel("k1", "alice", "python", "local", LaunchPlan((), {}))
NASTY = "a\nb\rc\x1b]0;title\x07\x9b31m\u2028\u202eevil\ud800"


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.WARNING, "f", 1, message, arguments, None)
    made.__dict__.update(extra)
    return made


def test_lines_name_kernel_user_proxy_and_replica() -> None:
    line = TextFormatter("r1").format(record("It failed", **about(KERNEL)))
    assert line.endswith(" W It failed kernel_id=k1 user=alice proxy=local replica=r1")
    entry = json.loads(JSONFormatter("r1").format(record("It failed", **about(KERNEL))))
    assert {"kernel_id": "k1", "user": "alice", "proxy": "local", "replica": "r1"}.items() <= entry.items()


def test_what_comes_from_outside_stays_within_its_line() -> None:
    for formatter in (TextFormatter("r"), JSONFormatter("r")):
        line = formatter.format(record("it said %s", NASTY, path=NASTY))
        assert line.isprintable() and line.isascii()
        line.encode()


def test_a_traceback_is_lines_without_controls() -> None:
    made = record("it broke")
    try:
        raise ValueError(NASTY)
    except ValueError:
        made.exc_info = sys.exc_info()
    lines = TextFormatter("r").format(made).split("\n")
    assert len(lines) > 3 and all(line.isprintable() for line in lines)
