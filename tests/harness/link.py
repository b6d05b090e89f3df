"""What the link's tests share: a running agent, a sink that collects, and waiting on the event loop."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import zmq

from hub_gateway.kernels.types import Registration
from hub_gateway.link import Dialect, KernelRelay

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "launchers" / "agent.py"
FLOOD = [sys.executable, str(ROOT / "tests" / "harness" / "flood_kernel.py"), "-f", "{connection_file}"]
IPYTHON = [sys.executable, str(ROOT / "launchers" / "ipykernel_launcher.py"), "-f", "{connection_file}"]
STOCK_IPYTHON = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())


def load_agent() -> ModuleType:
    """launchers/agent.py as a module."""
    spec = importlib.util.spec_from_file_location("hub_gateway_agent", AGENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def eventually(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    """The first true value of `condition`, on a running loop."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s: {what} (last value: {value!r})"
        await asyncio.sleep(0.01)


def websocket_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(opcode, payload) of joined, unmasked websocket frames."""
    offset = 0
    while offset < len(data):
        opcode, length = data[offset] & 15, data[offset + 1]
        assert data[offset] & 0x80 and length < 128
        offset += 2
        if length == 126:
            (length,) = struct.unpack_from("!H", data, offset)
            offset += 2
        elif length == 127:
            (length,) = struct.unpack_from("!Q", data, offset)
            offset += 8
        assert offset + length <= len(data)
        yield opcode, data[offset : offset + length]
        offset += length


def read_v1(frame: bytes) -> dict[str, Any]:
    """A v1 message as a client has it."""
    (count,) = struct.unpack_from("<Q", frame)
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    parts = [frame[offsets[i] : offsets[i + 1]] for i in range(count - 1)]
    names = ("header", "parent_header", "metadata", "content")
    message: dict[str, Any] = {name: json.loads(part) for name, part in zip(names, parts[1:5], strict=True)}
    return {**message, "channel": parts[0].decode(), "buffers": parts[5:]}


class Collector:
    """A sink that keeps all that it is given. `held` makes it a slow one: nothing is handed to the system."""

    def __init__(
        self,
        session: str | None = None,
        *,
        dialect: Dialect = Dialect.V1,
        keep: bool = True,
        after: int | None = None,
        held: bool = False,
        arrived: int = 0,
    ) -> None:
        self.session = session or uuid.uuid4().hex
        self.arrived = arrived
        self.heard = False
        self.there = True
        self.dismissed = False
        self.dialect = dialect
        self.keep = keep
        self.after = after
        self.held = held
        self.on_flushed: Callable[[int], None] | None = None
        self.data: list[bytes] = []
        self.parsed: list[dict[str, Any]] = []
        self.most = 0
        self.confirms = 0
        self._waiting: list[tuple[int, int]] = []

    def write(self, data: bytes, seq: int | None) -> None:
        self.data.append(data)
        if self.held:
            self._waiting.append((len(data), seq or 0))
            self.most = max(self.most, self.backlog)
        elif seq is not None and self.on_flushed is not None:
            self.on_flushed(seq)

    def confirm(self) -> None:
        self.confirms += 1

    def dismiss(self) -> None:
        self.dismissed = True

    async def answers(self) -> bool:
        return self.there

    @property
    def backlog(self) -> int:
        return sum(size for size, _ in self._waiting)

    def release(self, held: bool = False) -> None:
        """Everything is handed to the operating system."""
        waiting, self._waiting = self._waiting, []
        self.held = held
        for _, seq in waiting:
            if seq and self.on_flushed is not None:
                self.on_flushed(seq)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Everything so far, parsed."""
        data, self.data = self.data, []
        for block in data:
            for opcode, frame in websocket_frames(block):
                if self.dialect is Dialect.NUMBERED:
                    (number,) = struct.unpack_from("<Q", frame)
                    self.parsed.append({**read_v1(frame[8:]), "number": number})
                elif opcode == 2:
                    self.parsed.append(read_v1(frame))
                else:
                    self.parsed.append(json.loads(frame))
        return self.parsed

    def text(self, name: str = "stdout") -> str:
        """All `stream` text."""
        contents = [m["content"] for m in self.messages if m["header"]["msg_type"] == "stream"]
        return "".join(c["text"] for c in contents if c["name"] == name)

    def of(self, msg_id: str, msg_type: str) -> list[dict[str, Any]]:
        """Messages of a type that answer a request."""
        found = [m for m in self.messages if m["header"]["msg_type"] == msg_type]
        return [m for m in found if m["parent_header"].get("msg_id") == msg_id]

    def states(self) -> list[str]:
        """All execution states, in order."""
        return [m["content"]["execution_state"] for m in self.messages if m["header"]["msg_type"] == "status"]

    def finished(self, msg_id: str) -> bool:
        """Whether a request has its reply and its idle."""
        return finished(self.messages, msg_id)


def finished(messages: list[dict[str, Any]], msg_id: str) -> bool:
    """Whether a request has its reply and its idle among these."""
    answers = [m for m in messages if m["parent_header"].get("msg_id") == msg_id]
    idle = [m for m in answers if m["header"]["msg_type"] == "status" and m["content"]["execution_state"] == "idle"]
    return bool(idle) and any(m["channel"] != "iopub" for m in answers)


class RunningAgent:
    """A real agent with a real kernel, as a proxy starts it."""

    def __init__(self, argv: list[str] = IPYTHON, *, python: str = sys.executable, **settings: Any) -> None:
        self.runtime_dir = tempfile.mkdtemp(prefix="hga-", dir="/tmp")
        self.kernel_id = str(uuid.uuid4())
        self.env = {"PATH": os.environ["PATH"], "HOME": self.runtime_dir, "IPYTHONDIR": self.runtime_dir + "/ipython"}
        flags = settings.pop("flags", "-IS")
        document = {
            "version": 1,
            "kernel_id": self.kernel_id,
            "gateway_id": "tests",
            "epoch": settings.pop("epoch", 1),
            "argv": argv,
            "env": self.env,
            "cwd": settings.pop("cwd", None),
            "runtime_dir": self.runtime_dir,
            "kernel_name": "test",
            "interrupt_mode": settings.pop("interrupt_mode", "signal"),
            "agent": {"client_public_key": PUBLIC, "launch_token": "token", **settings},
        }
        self.log = Path(self.runtime_dir, "kernel.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, flags, str(AGENT), "--kernel-id", self.kernel_id, "--gateway-id", "tests", "--epoch", "1"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(document).encode())
        self.process.stdin.close()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.said: dict[str, Any] = json.loads(line)
        self.registration = Registration(
            self.said["host"], self.said["port"], self.said["public_key"], self.said["pid"]
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)


class Gateway:
    """The gateway's side, in this process: a relay, and what it heard."""

    def __init__(self, agent: RunningAgent, **options: Any) -> None:
        self.agent = agent
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.events: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.relay = KernelRelay(
            agent.kernel_id, zmq_context=self.context, on_event=self.events.append, count=self._count, **options
        )

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    async def connect(self, epoch: int = 1, *, ready: bool = True) -> Gateway:
        await self.relay.connect(self.agent.registration, SECRET, PUBLIC, epoch, timeout=20)
        if ready:
            await eventually(lambda: self.relay.ready, "the kernel to be ready")
        return self

    def attach(self, sink: Collector) -> Collector:
        self.relay.attach(sink)
        return sink

    def event(self, name: str) -> dict[str, Any] | None:
        """The last event of that name."""
        found = [event for event in self.events if event["event"] == name]
        return found[-1] if found else None

    def send(self, sink: Collector, code: str) -> str:
        """Send an execute_request; its msg_id."""
        return self.request(sink, "execute_request", {"code": code, "silent": False, "store_history": True})

    def request(self, sink: Collector, msg_type: str, content: dict[str, Any], channel: str = "shell") -> str:
        msg_id = uuid.uuid4().hex
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": sink.session, "username": "", "version": "5.3"}
        self.relay.receive(
            sink, channel, [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()], sink.session
        )
        return msg_id

    async def execute(self, sink: Collector, code: str, timeout: float = 30.0) -> str:
        """Execute and wait for reply and idle; the msg_id."""
        msg_id = self.send(sink, code)
        await eventually(lambda: sink.finished(msg_id), f"{code!r} to finish", timeout)
        return msg_id

    def throw_away(self) -> None:
        """As kill -9 of the gateway has it: nothing is said to the agent."""
        link = self.relay._link
        self.relay._link = None
        if link is not None:
            link.close()
        self.context.destroy(linger=0)

    def close(self) -> None:
        self.relay.disconnect()
        self.context.destroy(linger=0)
