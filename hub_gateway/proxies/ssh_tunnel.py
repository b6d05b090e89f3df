"""Tunnels: local ports behind which a kernel's agent is reached through the SSH connection of its host.

One thread moves the bytes of all tunnels. They are encrypted from the gateway to the agent, which lets in nobody but
the gateway: whoever else finds the local port gets no further than that door.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Tunnels"]

LOG = logging.getLogger("hub_gateway.proxies.ssh")
CHUNK = 65536
IDLE_SECONDS = 60.0
"""After how long without a connection a port is closed: links that were lost come back within seconds."""
FULL_SECONDS = 0.005
"""How soon to look again at a channel whose window is full, of which nothing tells when it opens."""
PAIRS = 16
"""Connections to one port. A kernel's link takes one; any user of the gateway's machine may make more."""


@dataclass
class _Pair:
    """One connection to a local port, and its channel."""

    sock: socket.socket
    channel: Any
    to_node: bytearray = field(default_factory=bytearray)
    to_gateway: bytearray = field(default_factory=bytearray)
    minded: tuple[int, bool] = (selectors.EVENT_READ, True)
    """What the thread listens for: events of the socket, and whether the channel has something."""


@dataclass
class _Port:
    key: str
    listener: socket.socket
    open_channel: Callable[[], Any]
    pairs: int = 0
    gone: bool = False
    used: float = field(default_factory=time.monotonic)


class Tunnels:
    """Local ports, by kernel."""

    def __init__(self) -> None:
        self._ports: dict[str, _Port] = {}
        self._selector: selectors.BaseSelector | None = None
        self._wake: socket.socket | None = None
        self._todo: list[Callable[[], None]] = []
        self._guard = threading.Lock()
        self._full: set[int] = set()
        self._pairs: dict[int, tuple[_Port, _Pair]] = {}
        self._closed = False

    def port(self, key: str, open_channel: Callable[[], Any]) -> int:
        """The local port behind which `open_channel` (blocking) leads; the same one as long as it is used."""
        with self._guard:
            found = self._ports.get(key)
            if found is None:
                listener = socket.create_server(("127.0.0.1", 0))
                listener.setblocking(False)
                found = self._ports[key] = _Port(key, listener, open_channel)
                self._start()
                self._later(lambda: self._watch(found))
            found.used = time.monotonic()
            found.open_channel = open_channel
            number: int = found.listener.getsockname()[1]
            return number

    def close_port(self, key: str) -> None:
        """The kernel is gone."""
        with self._guard:
            found = self._ports.pop(key, None)
            if found is not None:
                self._later(lambda: self._unwatch(found))

    def close(self) -> None:
        """Close all of them."""
        with self._guard:
            self._closed = True
            self._ports.clear()
            if self._wake is not None:
                self._later(lambda: None)

    # In the thread, except `_later` and `_start`, for which the guard is held

    def _start(self) -> None:
        if self._selector is None:
            reader, self._wake = socket.socketpair()
            reader.setblocking(False)
            self._selector = selectors.DefaultSelector()
            self._selector.register(reader, selectors.EVENT_READ, lambda _: reader.recv(4096))
            threading.Thread(target=self._serve, name="ssh-tunnels", daemon=True).start()

    def _later(self, call: Callable[[], None]) -> None:
        self._todo.append(call)
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b"x")

    def _serve(self) -> None:
        assert self._selector is not None
        while not self._closed:
            for found, events in self._selector.select(FULL_SECONDS if self._full else IDLE_SECONDS / 4):
                try:
                    found.data(events)
                except (OSError, EOFError) as error:
                    LOG.info("A tunnel ended: %s", error)
            for fd in list(self._full):
                self._push(fd)
            with self._guard:
                todo, self._todo = self._todo, []
                now = time.monotonic()
                idle = [p for p in self._ports.values() if not p.pairs and now - p.used > IDLE_SECONDS]
                for port in idle:
                    del self._ports[port.key]
            for call in todo:
                call()
            for port in idle:
                self._unwatch(port)
        for found in list(self._selector.get_map().values()):
            if isinstance(found.fileobj, socket.socket):
                found.fileobj.close()
        for _, pair in self._pairs.values():
            pair.channel.close()
        self._selector.close()

    def _watch(self, port: _Port) -> None:
        assert self._selector is not None
        self._selector.register(port.listener, selectors.EVENT_READ, lambda _: self._accept(port))

    def _unwatch(self, port: _Port) -> None:
        assert self._selector is not None
        port.gone = True
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(port.listener)
        port.listener.close()
        for owner, pair in list(self._pairs.values()):
            if owner is port:
                self._end(pair)

    def _accept(self, port: _Port) -> None:
        sock, _ = port.listener.accept()
        if port.pairs >= PAIRS:
            sock.close()
            return
        port.used = time.monotonic()
        port.pairs += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Opening a channel takes an answer of the host, or a new connection to it.
        threading.Thread(target=self._open, args=(port, sock), name="ssh-tunnel-open", daemon=True).start()

    def _open(self, port: _Port, sock: socket.socket) -> None:
        try:
            channel = port.open_channel()
        except Exception as error:  # noqa: BLE001 (whatever it was, the link sees its connection closed, and comes again)
            LOG.warning("No tunnel for kernel %s: %s", port.key, error)
            sock.close()
            with self._guard:
                self._later(lambda: self._given_up(port))
            return
        with self._guard:
            self._later(lambda: self._begin(port, _Pair(sock, channel)))

    @staticmethod
    def _given_up(port: _Port) -> None:
        port.pairs -= 1

    def _begin(self, port: _Port, pair: _Pair) -> None:
        assert self._selector is not None
        pair.sock.setblocking(False)
        pair.channel.setblocking(False)
        for fd in (pair.sock.fileno(), pair.channel.fileno()):
            self._pairs[fd] = (port, pair)
        self._selector.register(pair.sock, selectors.EVENT_READ, lambda events: self._from_gateway(pair, events))
        self._selector.register(pair.channel.fileno(), selectors.EVENT_READ, lambda _: self._from_node(pair))
        if port.gone:
            self._end(pair)
        else:
            self._from_node(pair)

    def _from_gateway(self, pair: _Pair, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(pair)
            self._from_node(pair)
        if events & selectors.EVENT_READ and not pair.to_node:
            try:
                part = pair.sock.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                part = b""
            if not part:
                self._end(pair)
                return
            pair.to_node += part
            self._push(pair.sock.fileno())

    def _push(self, fd: int) -> None:
        """Send on what came from the gateway; while the channel takes nothing, read no more of it."""
        entry = self._pairs.get(fd)
        if entry is None:
            self._full.discard(fd)
            return
        _, pair = entry
        try:
            while pair.to_node and pair.channel.send_ready():
                del pair.to_node[: pair.channel.send(bytes(pair.to_node[:CHUNK]))]
        except TimeoutError:
            pass
        except (OSError, EOFError):
            self._end(pair)
            return
        if pair.channel.closed:
            self._end(pair)
        elif pair.to_node:
            self._full.add(fd)
            self._mind(pair)
        elif fd in self._full:
            self._full.discard(fd)
            self._mind(pair)

    def _from_node(self, pair: _Pair) -> None:
        try:
            while not pair.to_gateway and pair.channel.recv_ready():
                pair.to_gateway += pair.channel.recv(CHUNK)
                self._flush(pair)
            ended = pair.channel.closed or pair.channel.eof_received
            if ended and not pair.to_gateway and not pair.channel.recv_ready():
                self._end(pair)
        except OSError:
            self._end(pair)

    def _flush(self, pair: _Pair) -> None:
        """Send on what came from the node; while the gateway takes nothing, read no more of it."""
        try:
            while pair.to_gateway:
                del pair.to_gateway[: pair.sock.send(pair.to_gateway)]
        except BlockingIOError:
            pass
        except OSError:
            self._end(pair)
            return
        self._mind(pair)

    def _mind(self, pair: _Pair) -> None:
        """Listen for what can be worked off now, and for nothing else: it would be told of again and again."""
        assert self._selector is not None
        events = (0 if pair.to_node else selectors.EVENT_READ) | (selectors.EVENT_WRITE if pair.to_gateway else 0)
        wanted, (before, listening) = (events, not pair.to_gateway), pair.minded
        if wanted == pair.minded or pair.sock.fileno() not in self._pairs:
            return
        pair.minded = wanted
        fd = pair.channel.fileno()
        if listening and pair.to_gateway:
            self._selector.unregister(fd)
        elif not listening and not pair.to_gateway:
            self._selector.register(fd, selectors.EVENT_READ, lambda _: self._from_node(pair))
        if before and not events:
            self._selector.unregister(pair.sock)
        elif before:
            self._selector.modify(pair.sock, events, lambda found: self._from_gateway(pair, found))
        elif events:
            self._selector.register(pair.sock, events, lambda found: self._from_gateway(pair, found))

    def _end(self, pair: _Pair) -> None:
        assert self._selector is not None
        entry = self._pairs.pop(pair.sock.fileno(), None)
        if entry is None:
            return
        port, _ = entry
        fd = pair.channel.fileno()
        self._pairs.pop(fd, None)
        self._full.discard(pair.sock.fileno())
        for file in (pair.sock, fd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(file)
        pair.sock.close()
        pair.channel.close()
        port.pairs -= 1
        port.used = time.monotonic()
