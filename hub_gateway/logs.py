"""Structured logs: one line a record, with the fields that name a kernel, a user, a proxy.

Code logs with `extra={"kernel_id": ..., "user": ...}`; the formatters here put every such field into
the line. Nothing secret is ever a field.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

__all__ = ["FIELDS", "configure_logging"]

FIELDS = ("kernel_id", "user", "proxy", "request_id", "status", "method", "path", "duration_ms", "remote_ip")
"""The fields that may stand in a record, in the order in which they are shown."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: record.__dict__[name] for name in FIELDS if record.__dict__.get(name) is not None}


class TextFormatter(logging.Formatter):
    """`2026-11-23T10:00:00.123Z I hub_gateway message kernel_id=... user=...`"""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self.replica = replica

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        # A newline from outside must not be able to forge a record of its own.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{moment} {record.levelname[0]} {message}"
        line += "".join(f" {name}={value}" for name, value in _fields(record).items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
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
