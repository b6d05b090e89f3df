"""Structured logs: one line a record, with the fields that name a kernel, a user, a proxy.

Code logs with `extra={"kernel_id": ..., "user": ...}`, or `extra=about(kernel)`; the formatters here put every such
field into the line. Nothing secret is ever a field.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone
from typing import Any, Protocol

__all__ = ["FIELDS", "about", "configure_logging", "harmless"]

FIELDS = ("kernel_id", "user", "proxy", "request_id", "status", "method", "path", "duration_ms", "remote_ip")
"""The fields that may stand in a record, in the order in which they are shown."""


# Also what breaks lines outside of ASCII, what turns the direction of a line round, and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Kernelish(Protocol):
    """A kernel, as a row or as one to be admitted."""

    @property
    def id(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def proxy(self) -> str: ...


def about(kernel: Kernelish) -> dict[str, str]:
    """The fields that name a kernel, for `extra=`."""
    return {"kernel_id": kernel.id, "user": kernel.owner, "proxy": kernel.proxy}


def harmless(text: str) -> str:
    """A text from anywhere as part of one line: it forges no record, and tells a terminal nothing."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: record.__dict__[name] for name in FIELDS if record.__dict__.get(name) is not None}


class TextFormatter(logging.Formatter):
    """`2026-11-23T10:00:00.123Z I message kernel_id=... user=... replica=...`"""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self.replica = replica

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        fields = {**_fields(record), "replica": self.replica}
        said = record.getMessage() + "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{moment} {record.levelname[0]} {harmless(said)}"
        if record.exc_info:
            line += "".join(f"\n{harmless(part)}" for part in self.formatException(record.exc_info).split("\n"))
        return line


class JSONFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self.replica = replica

    def format(self, record: logging.LogRecord) -> str:
        """The record as one JSON object."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "replica": self.replica,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(log: logging.Logger | Any, level: int | str, style: str, replica: str) -> None:
    """Send this application's log, tornado's and alembic's to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter(replica) if style == "json" else TextFormatter(replica))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("hub_gateway", "jupyterhub", "tornado.application", "tornado.general"):
        logging.getLogger(name).setLevel(level)
    logger = log.logger if isinstance(log, logging.LoggerAdapter) else log
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level)
