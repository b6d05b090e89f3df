"""What a user sees in a cell while the kernel is not there: progress, and why it never came."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from hub_gateway.link import messages

__all__ = ["Progress", "Request"]

Say = Callable[[str, str, list[bytes]], None]
"""(session, channel, message): to the websocket of that session."""


@dataclass(frozen=True)
class Request:
    """A client's request that waits for a kernel."""

    session: str
    channel: str
    header: bytes
    msg_type: str


class Progress:
    """Answers in place of a kernel that is still to come, or that never will."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._text = ""
        self._failure: tuple[str, list[str]] | None = None
        self._pending: list[Request] = []
        self._shown: dict[int, str] = {}

    @property
    def failed(self) -> bool:
        """Whether there will be no kernel."""
        return self._failure is not None

    def add(self, session: str, channel: str, header: bytes) -> None:
        """A request came, and there is no kernel to take it."""
        try:
            parsed = json.loads(header)
            msg_type = str(parsed["msg_type"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        request = Request(session, channel, header, msg_type)
        if self._failure is not None:
            self._refuse(request)
            return
        if len(self._pending) < 10_000:
            self._pending.append(request)
            if self._text:
                self._show(request)

    def announce(self, text: str) -> None:
        """Show how far the start is, under every cell that waits; the text before it is replaced."""
        self._text = text
        for request in self._pending:
            self._show(request)

    def _show(self, request: Request) -> None:
        if request.msg_type != "execute_request":
            return
        update = id(request) in self._shown
        display_id = self._shown.setdefault(id(request), uuid.uuid4().hex)
        self._say(request.session, "iopub", messages.display(self._text, display_id, request.header, update=update))

    def done(self) -> None:
        """The kernel is there and answers by itself from now on."""
        for request in self._pending:
            if id(request) in self._shown:
                self._say(request.session, "iopub", messages.clear_output(request.header))
        self._pending.clear()
        self._shown.clear()
        self._text = ""
        self._failure = None

    def fail(self, text: str, stderr: list[str]) -> set[str]:
        """There is no kernel and will be none: every request, now and later, is answered with the reason.

        `stderr` are the last lines that the kernel wrote, if any. JupyterLab shows nothing but the traceback.
        Returns the sessions that a cell of theirs has told the reason.
        """
        pending = list(self._pending)
        self.done()
        # The sentence may quote them already, on one line.
        sentence = text.split(" Last lines of stderr:", 1)[0]
        self._failure = (text, [sentence, "Last lines of stderr:", *stderr] if stderr else [text])
        for request in pending:
            self._refuse(request)
        return {request.session for request in pending if request.msg_type == "execute_request"}

    def _refuse(self, request: Request) -> None:
        assert self._failure is not None
        if not request.msg_type.endswith("_request"):
            return
        text, traceback = self._failure
        if request.msg_type == "execute_request":
            self._say(request.session, "iopub", messages.error("KernelStartError", text, traceback, request.header))
        answer = messages.reply(request.msg_type, "KernelStartError", text, traceback, request.header)
        self._say(request.session, request.channel, answer)
        self._say(request.session, "iopub", messages.status("idle", request.header))
