"""A browser without a window: pages, cookies and XSRF tokens as JupyterHub and JupyterLab want them of a real one."""

from __future__ import annotations

import json
import re
import struct
import uuid
from typing import Any

import httpx
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from hub_gateway.errors import LaunchFailed

__all__ = ["Browser", "Notebook", "StepFailed"]

V1 = "v1.kernel.websocket.jupyter.org"
PARTS = ("header", "parent_header", "metadata", "content")
Message = dict[str, Any]


class StepFailed(LaunchFailed):
    """Something that a user would do did not work."""


class Browser:
    """One user's browser, at one Hub."""

    def __init__(self, public_url: str) -> None:
        self.base = public_url.rstrip("/")
        self.client = httpx.AsyncClient(timeout=120, follow_redirects=True, max_redirects=20)
        self.name = ""

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def page(self, path: str) -> httpx.Response:
        """Go to a page, as by a link or the address bar. Raises `StepFailed`."""
        return self._good(await self.client.get(self.base + path, headers={"Sec-Fetch-Mode": "navigate"}))

    async def log_in(self, name: str, password: str) -> None:
        """Fill in the Hub's login form."""
        form = await self.page("/hub/login")
        token = re.search(r'name="_xsrf" value="([^"]+)"', form.text)
        if token is None:
            raise StepFailed("The Hub's login form has no XSRF token.")
        answer = await self.client.post(
            f"{self.base}/hub/login",
            data={"username": name, "password": password, "_xsrf": token[1]},
            headers={"Sec-Fetch-Mode": "navigate"},
        )
        if "/hub/login" in str(answer.url):
            raise StepFailed(f"The Hub does not let {name} in.")
        self._good(answer)
        self.name = name

    async def api(self, method: str, path: str, content: Any = None) -> Any:
        """What a page's JavaScript asks for: with the XSRF token of that page. Raises `StepFailed`."""
        prefix = "/hub/" if path.startswith("/hub/") else f"/user/{self.name}/"
        headers = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin", "X-XSRFToken": self.xsrf(prefix)}
        answer = await self.client.request(
            method, self.base + path, headers=headers, json=content if content is not None else None
        )
        self._good(answer)
        return answer.json() if answer.content else None

    async def submit(self, page: str, action: str, fields: dict[str, str]) -> httpx.Response:
        """Send a form of a page. Raises `StepFailed`."""
        address = httpx.URL(self.base + page).join(action)
        headers = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "same-origin", "Referer": self.base + page}
        return self._good(await self.client.post(address, data=fields, headers=headers))

    def xsrf(self, prefix: str) -> str:
        """The XSRF cookie of the Hub, of a server, or of a service."""
        found = [cookie.value for cookie in self.client.cookies.jar if cookie.name == "_xsrf" and cookie.path == prefix]
        return found[0] or "" if found else ""

    async def notebook(self, kernel_id: str) -> Notebook:
        """Open a kernel's websocket through the user's own server, as JupyterLab does."""
        session = uuid.uuid4().hex
        path = f"/user/{self.name}/api/kernels/{kernel_id}/channels"
        request = httpx.Request("GET", self.base + path)
        self.client.cookies.set_cookie_header(request)
        headers = {
            "Cookie": request.headers.get("Cookie", ""),
            "Origin": self.base,
            "Sec-Fetch-Mode": "websocket",
            "Sec-Fetch-Site": "same-origin",
        }
        socket = await websocket_connect(
            HTTPRequest(f"ws{self.base[4:]}{path}?session_id={session}", headers=headers, request_timeout=60),
            subprotocols=[V1],
            max_message_size=2**30,
        )
        return Notebook(socket, session)

    @staticmethod
    def _good(answer: httpx.Response) -> httpx.Response:
        if answer.status_code >= 400:
            raise StepFailed(
                f"{answer.request.method} {answer.request.url.copy_with(query=None)} answers {answer.status_code}: "
                f"{' '.join(re.sub('<[^>]*>', ' ', answer.text).split())[:600]}"
            )
        return answer


class Notebook:
    """One open notebook: sends requests and reads what they bring (v1.kernel.websocket.jupyter.org)."""

    def __init__(self, socket: WebSocketClientConnection, session: str) -> None:
        self.socket = socket
        self.session = session

    def close(self) -> None:
        """Close the websocket."""
        self.socket.close()

    async def send(self, msg_type: str, content: Message, channel: str = "shell") -> str:
        """Send one message; its id."""
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": msg_type,
            "session": self.session,
            "username": "",
            "date": "2026-01-01T00:00:00.000000Z",
            "version": "5.3",
        }
        blobs = [channel.encode(), *(json.dumps(part).encode() for part in (header, {}, {}, content))]
        offsets = [8 * (len(blobs) + 2)]
        for blob in blobs:
            offsets.append(offsets[-1] + len(blob))
        head = struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets)
        await self.socket.write_message(head + b"".join(blobs), binary=True)
        return header["msg_id"]

    async def receive(self) -> Message:
        """The next message, of any channel. Raises `StepFailed` where the connection ends."""
        data = await self.socket.read_message()
        if data is None:
            raise StepFailed("The kernel's websocket was closed.")
        if isinstance(data, str):
            raise StepFailed("The server does not speak the binary protocol that it agreed to.")
        (count,) = struct.unpack_from("<Q", data)
        offsets = struct.unpack_from(f"<{count}Q", data, 8)
        parts = [data[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]
        message: Message = {name: json.loads(part) for name, part in zip(PARTS, parts[1:5], strict=True)}
        return {**message, "channel": parts[0].decode(), "buffers": parts[5:]}

    async def run(self, code: str, *, answer: str | None = None) -> list[Message]:
        """Run a cell to its end; every message it brought. Raises `StepFailed` with the kernel's traceback.

        `answer` is what is typed where the cell asks for input.
        """
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": answer is not None,
            "stop_on_error": True,
        }
        request = await self.send("execute_request", content)
        found: list[Message] = []
        replied = idle = False
        while not (replied and idle):
            message = await self.receive()
            if message["parent_header"].get("msg_id") != request:
                continue
            found.append(message)
            kind = message["header"]["msg_type"]
            if kind == "input_request":
                await self.send("input_reply", {"value": answer, "status": "ok"}, channel="stdin")
            elif kind == "error":
                lines = "\n".join(message["content"].get("traceback", []))
                raise StepFailed(f"The cell failed: {message['content'].get('evalue')}\n{lines}")
            replied = replied or kind == "execute_reply"
            idle = idle or (kind == "status" and message["content"]["execution_state"] == "idle")
        return found
