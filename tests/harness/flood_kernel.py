"""A kernel of ours for measurements and tests: it answers kernel_info and prints as fast as ZeroMQ takes it.

    python flood_kernel.py -f CONNECTION_FILE

`execute_request` with the code `flood N SIZE` publishes N `stream` messages with SIZE bytes of text, numbered,
signed, at 50,000 a second and more (all headers are made first), then the reply and idle. `data N SIZE` publishes
N `display_data` with one binary buffer of SIZE bytes each. `stream N` and `large N SIZE` are for measurements: N
`stream` messages, or N `display_data` with SIZE bytes of text/plain, each made and signed when it is sent, as a real
kernel does it; the text begins with the message's number, eight digits from 00000000. `pass` does nothing, `sleep S`
waits, `exit N` ends with that code. Nothing is ever dropped (SNDHWM is 0).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
import time
from typing import Any

import zmq
import zmq.backend

DELIMITER = b"<IDS|MSG>"
# pyzmq's own method without the Python layer above it, which costs more than all the rest of a message here.
send_frame: Any = zmq.backend.Socket.send


class FloodKernel:
    """One kernel, one thread."""

    def __init__(self, connection: dict[str, Any]) -> None:
        self.digest = hmac.new(connection["key"].encode(), digestmod=hashlib.sha256)
        self.session = os.urandom(8).hex()
        self.number = 0
        self.executions = 0
        self.context = zmq.Context()
        self.sockets = {}
        separator = "-" if connection["transport"] == "ipc" else ":"
        for name, kind in (
            ("shell", zmq.ROUTER),
            ("control", zmq.ROUTER),
            ("stdin", zmq.ROUTER),
            ("hb", zmq.REP),
            ("iopub", zmq.XPUB),
        ):
            sock = self.context.socket(kind)
            sock.linger = 1000
            sock.sndhwm = sock.rcvhwm = 0
            sock.bind(f"{connection['transport']}://{connection['ip']}{separator}{connection[name + '_port']}")
            self.sockets[name] = sock
        self.iopub = self.sockets["iopub"]

    def header(self, msg_type: str) -> bytes:
        # By hand: at this rate the kernel itself would be what is measured.
        self.number += 1
        return (
            f'{{"msg_id": "{self.session}_{self.number}", "msg_type": "{msg_type}", "username": "flood", '
            f'"session": "{self.session}", "date": "2026-01-01T00:00:00.000000Z", "version": "5.3"}}'
        ).encode()

    def frames(self, msg_type: str, parent: bytes, content: bytes, buffers: tuple[bytes, ...] = ()) -> list[bytes]:
        parts = [self.header(msg_type), parent, b"{}", content]
        digest = self.digest.copy()
        digest.update(b"".join(parts))
        return [DELIMITER, digest.hexdigest().encode(), *parts, *buffers]

    def publish(self, msg_type: str, parent: bytes, content: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> None:
        frames = self.frames(msg_type, parent, json.dumps(content).encode(), buffers)
        self.iopub.send_multipart([msg_type.encode(), *frames])

    def publish_now(self, msg_type: str, parent: bytes, content: bytes) -> None:
        """The same, as fast as Python can: 50,000 a second and more."""
        self.number += 1
        header = (
            f'{{"msg_id":"{self.session}_{self.number}","msg_type":"{msg_type}","username":"flood",'
            f'"session":"{self.session}","date":"2026-01-01T00:00:00.000000Z","version":"5.3"}}'
        ).encode()
        digest = self.digest.copy()
        digest.update(b"".join((header, parent, b"{}")))
        digest.update(content)
        for frame in (msg_type.encode(), DELIMITER, digest.hexdigest().encode(), header, parent, b"{}"):
            send_frame(self.iopub, frame, zmq.SNDMORE)
        send_frame(self.iopub, content, 0, len(content) < 65536)  # large ones go without a copy

    def run(self) -> None:
        poller = zmq.Poller()
        for sock in self.sockets.values():
            poller.register(sock, zmq.POLLIN)
        while True:
            for sock, _ in poller.poll():
                if sock is self.iopub:
                    topic = sock.recv()
                    if topic[:1] == b"\x01":
                        content = {"subscription": topic[1:].decode("utf-8", "replace")}
                        self.publish("iopub_welcome", b"{}", content)
                elif sock is self.sockets["hb"]:
                    sock.send(sock.recv())
                else:
                    self.handle(sock, sock.recv_multipart())

    def handle(self, sock: zmq.Socket[bytes], frames: list[bytes]) -> None:
        start = frames.index(DELIMITER)
        identity, (header, _, _, content) = frames[:start], frames[start + 2 : start + 6]
        msg_type = json.loads(header)["msg_type"]
        self.publish("status", header, {"execution_state": "busy"})
        answer: dict[str, Any] = {"status": "ok"}
        if msg_type == "kernel_info_request":
            answer.update(
                protocol_version="5.3",
                implementation="flood",
                implementation_version="1",
                banner="flood",
                language_info={"name": "flood", "version": "1", "mimetype": "text/plain", "file_extension": ".txt"},
            )
        elif msg_type == "execute_request":
            self.executions += 1
            answer.update(execution_count=self.executions, user_expressions={}, payload=[])
            self.execute(json.loads(content)["code"].split(), header)
        elif msg_type == "shutdown_request":
            answer.update(json.loads(content))
        reply = self.frames(msg_type.replace("request", "reply"), header, json.dumps(answer).encode())
        sock.send_multipart([*identity, *reply])
        self.publish("status", header, {"execution_state": "idle"})
        if msg_type == "shutdown_request":
            self.context.destroy(linger=500)
            sys.exit(0)

    def execute(self, words: list[str], parent: bytes) -> None:
        command = words[0] if words else "pass"
        if command == "flood":
            size = int(words[2])
            messages = []
            for number in range(int(words[1])):
                content = b'{"name": "stdout", "text": "%b\\n"}' % f"{number} ".ljust(size - 1, "x").encode()
                messages.append([b"stream", *self.frames("stream", parent, content)])
            send, more = self.iopub.send, zmq.SNDMORE
            for message in messages:
                for part in message[:-1]:
                    send(part, more)
                send(message[-1])
        elif command == "data":
            block = os.urandom(int(words[2]))
            for number in range(int(words[1])):
                content = {"data": {"text/plain": str(number)}, "metadata": {}, "transient": {}}
                self.publish("display_data", parent, content, (block,))
        elif command == "text":
            block_text = "x" * int(words[2])
            for _ in range(int(words[1])):
                self.publish("stream", parent, {"name": "stdout", "text": block_text})
        elif command in ("stream", "large"):
            self.execute_measured(words, parent)
        elif command == "sleep":
            time.sleep(float(words[1]))
        elif command == "exit":
            os._exit(int(words[1]))

    def execute_measured(self, words: list[str], parent: bytes) -> None:
        if words[0] == "stream":
            for number in range(int(words[1])):
                self.publish_now("stream", parent, b'{"name":"stdout","text":"%08d\\n"}' % number)
        else:
            fill = b"." * (int(words[2]) - 8) + b'"},"metadata":{},"transient":{}}'
            for number in range(int(words[1])):
                self.publish_now("display_data", parent, b'{"data":{"text/plain":"%08d%s' % (number, fill))


def main() -> None:
    path = sys.argv[sys.argv.index("-f") + 1] if "-f" in sys.argv else sys.argv[-1]
    with open(path) as stream:
        connection = json.load(stream)
    FloodKernel(connection).run()


if __name__ == "__main__":
    main()
