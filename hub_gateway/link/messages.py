"""Jupyter messages that the gateway says in a kernel's name: status, notices, errors.

Each is [header, parent_header, metadata, content] in bytes, as
https://jupyter-client.readthedocs.io/en/stable/messaging.html has them.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timezone
from typing import Any, Final

__all__ = ["NO_PARENT", "clear_output", "display", "error", "make", "reply", "status", "stream"]

NO_PARENT: Final = b"{}"


def make(msg_type: str, content: dict[str, Any], parent: bytes = NO_PARENT) -> list[bytes]:
    """A message of the gateway's own."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": msg_type,
        "username": "gateway",
        "session": "hub-gateway",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "version": "5.3",
    }
    return [json.dumps(header).encode(), parent, b"{}", json.dumps(content).encode()]


def status(state: str, parent: bytes = NO_PARENT) -> list[bytes]:
    """iopub `status`."""
    return make("status", {"execution_state": state}, parent)


def stream(text: str, parent: bytes = NO_PARENT, name: str = "stderr") -> list[bytes]:
    """iopub `stream`."""
    return make("stream", {"name": name, "text": text}, parent)


def error(name: str, text: str, traceback: list[str], parent: bytes) -> list[bytes]:
    """iopub `error`."""
    return make("error", {"ename": name, "evalue": text, "traceback": traceback}, parent)


def display(text: str, display_id: str, parent: bytes, *, update: bool) -> list[bytes]:
    """iopub `display_data`, or its `update_display_data`."""
    content = {"data": {"text/plain": text}, "metadata": {}, "transient": {"display_id": display_id}}
    return make("update_display_data" if update else "display_data", content, parent)


def clear_output(parent: bytes) -> list[bytes]:
    """iopub `clear_output`."""
    return make("clear_output", {"wait": False}, parent)


def reply(request_type: str, name: str, text: str, traceback: list[str], parent: bytes) -> list[bytes]:
    """The reply of status `error` to a request."""
    content: dict[str, Any] = {"status": "error", "ename": name, "evalue": text, "traceback": traceback}
    if request_type == "execute_request":
        content.update(execution_count=0, user_expressions={}, payload=[])
    return make(request_type.removesuffix("request") + "reply", content, parent)
