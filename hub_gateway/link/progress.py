"""What a user sees in a cell while the kernel is not there: progress, and why it never came."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hub_gateway.link import messages

__all__ = ["Progress", "Request", "msg_id_of"]

Say = Callable[[str, str, list[bytes]], bool]
"""(session, channel, message): to the websocket of that session; False where it has none now."""


MAX_WAITING = 10_000
"""Requests that may wait at a time; of more, the oldest are forgotten."""
MAX_HEADER = 1000
"""Bytes of a header that are kept; of a longer one what a client needs to know its request by."""


@dataclass(frozen=True)
class Request:
    """A client's request that has no reply yet."""

    session: str
    channel: str
    header: bytes
    msg_type: str
    msg_id: str


def _nobody(request: Request) -> None:
    """Nobody asks."""


class Progress:
    """Answers in place of a kernel that is still to come, that never will, or that is no more.

    `on_refused(request)` is told of each request whose client has been told that there is no kernel. A client that is
    not there is told when it comes.
    """

    def __init__(self, say: Say, on_refused: Callable[[Request], None] = _nobody) -> None:
        self._say = say
        self._on_refused = on_refused
        self._owed: dict[str, tuple[Request, tuple[str, str, list[str]]]] = {}
        self._text = ""
        self._failure: tuple[str, str, list[str]] | None = None
        self._waiting: dict[str, Request] = {}
        self._shown: dict[str, str] = {}

    @property
    def failed(self) -> bool:
        """Whether there will be no kernel."""
        return self._failure is not None

    @property
    def waiting(self) -> bool:
        """Whether any request has no reply yet."""
        return bool(self._waiting)

    def add(self, session: str, channel: str, header: bytes, *, shown: bool = False) -> None:
        """A request came. It waits until its reply is `answered`, or is refused where there will be no kernel.

        `shown` says that an earlier gateway may have shown progress under it, to be cleared in the end.
        """
        if b"_request" not in header:
            return
        parsed = _loaded(header)
        msg_type, msg_id = parsed.get("msg_type"), parsed.get("msg_id")
        if not isinstance(msg_type, str) or not isinstance(msg_id, str) or not msg_type.endswith("_request"):
            return
        if len(header) > MAX_HEADER:
            header = _shortened(parsed)
            if len(header) > MAX_HEADER:
                return  # nobody has such ids
        request = Request(session, channel, header, msg_type, msg_id)
        if self._failure is not None:
            self._refuse(request, self._failure)
            return
        self._waiting[msg_id] = request
        if len(self._waiting) > MAX_WAITING:
            self._forget(next(iter(self._waiting)))
        if self._text:
            self._show(msg_id, request)
        if shown and msg_type == "execute_request":
            self._shown.setdefault(msg_id, "")

    def came(self, session: str) -> bool:
        """A client is there (again): it gets what it has not been told. Whether that ended a cell of it."""
        owed = [one for one in self._owed.values() if one[0].session == session]
        for request, failure in owed:
            del self._owed[request.msg_id]
            self._refuse(request, failure)
        if self._text:
            for msg_id, request in list(self._waiting.items()):
                if request.session == session and not self._shown.get(msg_id):
                    self._show(msg_id, request)
        return any(request.msg_type == "execute_request" for request, _ in owed)

    def answered(self, parent: bytes) -> None:
        """A reply came from the kernel, or from its agent in its place, with this parent header."""
        msg_id = _loaded(parent).get("msg_id")
        if isinstance(msg_id, str):
            self._forget(msg_id)

    def left(self, session: str) -> None:
        """A client will not come back, or is served by another gateway: its replies do not come by here."""
        for msg_id in [one for one, request in self._waiting.items() if request.session == session]:
            self._forget(msg_id)
        for msg_id in [one for one, (request, _) in self._owed.items() if request.session == session]:
            self._on_refused(self._owed.pop(msg_id)[0])

    def _forget(self, msg_id: str) -> None:
        self._waiting.pop(msg_id, None)
        self._shown.pop(msg_id, None)

    def announce(self, text: str) -> None:
        """Show how far the start is, under every cell that waits; the text before it is replaced."""
        self._text = text
        for msg_id, request in self._waiting.items():
            self._show(msg_id, request)

    def _show(self, msg_id: str, request: Request) -> None:
        if request.msg_type != "execute_request":
            return
        known = self._shown.get(msg_id)
        display_id = known or uuid.uuid4().hex
        text = messages.display(self._text, display_id, request.header, update=bool(known))
        if self._say(request.session, "iopub", text):
            self._shown[msg_id] = display_id

    def done(self) -> None:
        """The kernel is there and answers by itself from now on."""
        for msg_id in self._shown:
            request = self._waiting[msg_id]
            self._say(request.session, "iopub", messages.clear_output(request.header))
        self._shown.clear()
        self._text = ""
        self._failure = None

    def fail(self, name: str, text: str, stderr: list[str]) -> set[str]:
        """There is no kernel and will be none: every request, now and later, is answered with the reason.

        `name` is the error's; `stderr` are the last lines that the kernel wrote, if any. JupyterLab shows nothing but
        the traceback. Returns the sessions that a cell of theirs has told the reason.
        """
        self.done()
        waiting, self._waiting = list(self._waiting.values()), {}
        # The sentence may quote them already, on one line.
        sentence = text.split(" Last lines of stderr:", 1)[0]
        self._failure = (name, text, [sentence, "Last lines of stderr:", *stderr] if stderr else [text])
        told = [request for request in waiting if self._refuse(request, self._failure)]
        return {request.session for request in told if request.msg_type == "execute_request"}

    def _refuse(self, request: Request, failure: tuple[str, str, list[str]]) -> bool:
        """Tell a client why its request comes to nothing; False where it is not there to be told."""
        name, text, traceback = failure
        header, channel = request.header, request.channel
        answers = [
            (channel, messages.reply(request.msg_type, name, text, traceback, header)),
            ("iopub", messages.status("idle", header)),
        ]
        if request.msg_type == "execute_request":
            answers.insert(0, ("iopub", messages.error(name, text, traceback, header)))
        for where, answer in answers:
            if not self._say(request.session, where, answer):
                self._owed[request.msg_id] = (request, failure)
                if len(self._owed) > MAX_WAITING:
                    del self._owed[next(iter(self._owed))]
                return False
        self._on_refused(request)
        return True


def msg_id_of(header: bytes) -> str:
    """The id of a message, empty where it has none."""
    msg_id = _loaded(header).get("msg_id")
    return msg_id if isinstance(msg_id, str) else ""


def _shortened(header: dict[str, Any]) -> bytes:
    """A header without whatever else a client has put into it."""
    names = ("msg_id", "msg_type", "session", "username", "date", "version")
    return json.dumps({name: header[name] for name in names if isinstance(header.get(name), str)}).encode()


def _loaded(header: bytes) -> dict[str, Any]:
    """A header, empty where it is none."""
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
