"""The floor: the same kernels without any gateway, by jupyter_client and raw ZeroMQ."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager

from benchmarks.client import Message, Transfer, execute_content

__all__ = ["DirectKernel", "concurrent_starts"]

NUMBER = re.compile(rb'"text(?:/plain)?": ?"(\d{8})')


class DirectKernel:
    """One kernel started by jupyter_client, with raw sockets to it (and no high-water marks)."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.manager = KernelManager(kernel_name="bench")
        self.manager._kernel_spec = KernelSpec(argv=list(argv), display_name="bench", language="python")
        self.manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        connection: dict[str, Any] = json.loads(Path(self.manager.connection_file).read_text())
        self.context = zmq.Context()
        self.shell = self.socket(zmq.DEALER, connection["shell_port"])
        self.iopub = self.socket(zmq.SUB, connection["iopub_port"])
        self.iopub.subscribe(b"")

    def socket(self, kind: int, port: int) -> zmq.Socket[bytes]:
        sock = self.context.socket(kind)
        sock.linger = sock.rcvhwm = sock.sndhwm = 0
        sock.connect(f"tcp://127.0.0.1:{port}")
        return sock

    def __enter__(self) -> DirectKernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.manager.shutdown_kernel(now=True)

    def send(self, msg_type: str, content: Message) -> None:
        session = self.manager.session
        self.shell.send_multipart(session.serialize(session.msg(msg_type, content)))

    def kernel_info(self) -> None:
        """Ask for kernel_info and wait for the reply."""
        self.send("kernel_info_request", {})
        self.shell.recv_multipart()

    def wait_until_ready(self) -> None:
        """Wait until iopub is subscribed, so that nothing of a flood is missed."""
        self.kernel_info()
        while not self.iopub.poll(200):
            self.kernel_info()
        while self.iopub.poll(200):
            self.iopub.recv_multipart()

    def execute(self, code: str) -> float:
        """Run a cell; seconds from the request to its reply. Returns when `idle` came too."""
        started = time.perf_counter()
        self.send("execute_request", execute_content(code))
        self.manager.session.deserialize(self.frames(self.shell), content=True)
        replied = time.perf_counter() - started
        while b'"idle"' not in self.iopub.recv_multipart()[-1]:
            pass
        return replied

    @staticmethod
    def frames(sock: zmq.Socket[bytes]) -> list[bytes]:
        frames = sock.recv_multipart()
        return frames[frames.index(b"<IDS|MSG>") + 1 :]

    def flood(self, code: str) -> Transfer:
        """Run a flood; the messages are kept (the start of large ones) and looked at afterwards."""
        started = time.perf_counter()
        self.send("execute_request", execute_content(code))
        contents: list[bytes] = []
        receive = self.iopub.recv_multipart
        while True:
            content = receive()[-1]
            contents.append(content if len(content) < 65536 else content[:64])
            if b'"idle"' in content[:64]:
                break
        seconds = time.perf_counter() - started
        self.shell.recv_multipart()
        numbers = [int(found[1]) for found in map(NUMBER.search, contents) if found]
        return Transfer(seconds, numbers)

    def client_execute(self, code: str, count: int) -> list[float]:
        """Round trips by jupyter_client's BlockingKernelClient."""
        client = self.manager.client()
        client.start_channels(stdin=False, hb=False)
        client.wait_for_ready(timeout=30)
        samples = []
        for _ in range(count):
            started = time.perf_counter()
            client.execute(code, store_history=False, allow_stdin=False)
            client.get_shell_msg(timeout=30)
            samples.append(time.perf_counter() - started)
            while client.get_iopub_msg(timeout=30)["content"].get("execution_state") != "idle":
                pass
        client.stop_channels()
        return samples

    def client_flood(self, code: str) -> Transfer:
        """A flood as jupyter_client's BlockingKernelClient takes it, every message parsed and verified."""
        client = self.manager.client()
        client.start_channels(stdin=False, hb=False)
        client.wait_for_ready(timeout=30)
        with contextlib.suppress(Empty):
            while True:
                client.get_iopub_msg(timeout=0.2)
        numbers: list[int] = []
        started = time.perf_counter()
        client.execute(code, store_history=False)
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream":
                numbers.append(int(message["content"]["text"][:8]))
            elif message["content"].get("execution_state") == "idle":
                break
        seconds = time.perf_counter() - started
        client.stop_channels()
        return Transfer(seconds, numbers)


async def start_and_ask(manager: AsyncKernelManager, argv: Sequence[str], context: zmq.asyncio.Context) -> bool:
    """Start a kernel and wait for its kernel_info_reply; False where it ended."""
    manager._kernel_spec = KernelSpec(argv=list(argv), display_name="bench", language="python")
    await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shell = context.socket(zmq.DEALER)
    shell.connect(f"tcp://127.0.0.1:{manager.shell_port}")
    session = manager.session
    await shell.send_multipart(session.serialize(session.msg("kernel_info_request", {})))
    while not await shell.poll(1000):
        if not await manager.is_alive():
            return False
    await shell.recv_multipart()
    return True


async def concurrent_starts_async(argv: Sequence[str], count: int) -> tuple[float, bool]:
    context = zmq.asyncio.Context()
    managers = [AsyncKernelManager(kernel_name="bench") for _ in range(count)]
    started = time.perf_counter()
    up = await asyncio.gather(*(start_and_ask(manager, argv, context) for manager in managers))
    seconds = time.perf_counter() - started
    await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in managers))
    context.destroy(linger=0)
    return seconds, all(up)


def concurrent_starts(argv: Sequence[str], count: int) -> float:
    """Seconds from the first start to the last kernel_info_reply of `count` kernels started at once.

    jupyter_client chooses ports before the kernel has them; a round in which somebody else took one is repeated.
    """
    for _ in range(3):
        seconds, up = asyncio.run(concurrent_starts_async(argv, count))
        if up:
            return seconds
    raise AssertionError(f"of {count} kernels that were started directly one ended, three times")
