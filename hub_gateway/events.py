"""Events for other systems, by jupyter-events: JSON lines that follow published schemas."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets import List, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.metrics import METRICS

if TYPE_CHECKING:
    from jupyter_events import EventLogger

    from hub_gateway.audit import Line

__all__ = ["AUDIT", "Events"]

AUDIT = "https://schema.hub-gateway.readthedocs.io/audit/v1"
SCHEMAS = Path(__file__).parent / "event_schemas"


class Events(LoggingConfigurable):
    """Sends events to log files, and to the handlers of `c.EventLogger.handlers`."""

    files = List(
        Unicode(),
        help="""Files to which events are appended, a JSON object a line.

        Handlers of any other kind: `c.EventLogger.handlers` (see jupyter-events).
        """,
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logger: EventLogger | None = None
        if not (self.files or "EventLogger" in self.config):
            return  # not even imported: it would cost a gateway without handlers 10 MB
        from jupyter_events import EventLogger

        self.logger = EventLogger(parent=self)
        for schema in sorted(SCHEMAS.glob("*.yaml")):
            self.logger.register_event_schema(schema)
        for file in self.files:
            handler = logging.FileHandler(file, delay=True)
            handler.handleError = _counted  # type: ignore[method-assign]
            self.logger.register_handler(handler)

    def audited(self, lines: Iterable[Line]) -> None:
        """Count and send lines of the audit trail that have been committed."""
        for line in lines:
            METRICS.audit_entries.inc()
            data = {name: getattr(line, name) for name in ("id", "actor", "action", "subject", "outcome", "hash")}
            self.emit(AUDIT, {**data, "detail": dict(line.detail)})

    def emit(self, schema: str, data: Mapping[str, Any]) -> None:
        """Send one event. What goes wrong is counted and logged; nobody's request fails of it."""
        if self.logger is None:
            return
        from jsonschema.exceptions import ValidationError

        try:
            self.logger.emit(schema_id=schema, data=dict(data))
        except (OSError, ValueError, ValidationError) as error:
            METRICS.count_swallowed("events")
            self.log.warning("An event could not be sent: %s", error)


def _counted(record: logging.LogRecord) -> None:
    METRICS.count_swallowed("events")
