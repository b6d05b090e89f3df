"""Credential caches of type FILE, read and written as bytes, so that one ticket can be handed on without the others.

The format is MIT's (`doc/formats/ccache_file_format`), version 4, which Heimdal and Java read as well. What a kernel
gets is put together from tickets that are wanted, rather than made by removing others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["FORWARDABLE", "RENEWABLE", "Ccache", "Ticket", "parse"]

VERSION = b"\x05\x04"
FORWARDABLE, RENEWABLE = 0x40000000, 0x00800000
"""Flags of tickets (RFC 4120, section 5.3), as they are kept in a cache."""
CONFIG = "X-CACHECONF:"
"""The realm of entries that are no tickets but settings of the library."""


@dataclass(frozen=True)
class Ticket:
    """One ticket. Times are seconds since the epoch; `renew_till` is 0 for one that is not renewable."""

    client: str
    server: str
    begins: int
    ends: int
    renew_till: int
    flags: int
    raw: bytes


@dataclass(frozen=True)
class Ccache:
    """A principal and its tickets."""

    principal: str
    head: bytes
    """The principal as the file has it."""
    tickets: tuple[Ticket, ...]

    def only(self, wanted: Iterable[Ticket]) -> bytes:
        """A file with these tickets alone."""
        return VERSION + struct.pack(">H", 0) + self.head + b"".join(ticket.raw for ticket in wanted)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise ValueError("it ends in the middle")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        (found,) = struct.unpack(f">{form}", self.take(struct.calcsize(f">{form}")))
        return int(found)

    def text(self) -> str:
        return self.take(self.number("I")).decode("utf-8", "surrogateescape")

    def principal(self) -> str:
        self.number("I")
        count = self.number("I")
        realm = self.text()
        components = [self.text() for _ in range(count)]
        return f"{'/'.join(map(_escaped, components))}@{realm}"

    def ticket(self) -> Ticket:
        begin = self.at
        client, server = self.principal(), self.principal()
        self.number("H")
        self.take(self.number("I"))  # the session key
        authenticated, begins, ends, renew_till = (self.number("I") for _ in range(4))
        begins = begins or authenticated  # which holds where there is no start time (RFC 4120, section 5.3)
        self.number("B")
        flags = self.number("I")
        for _ in range(2):  # addresses, authorization data
            for _ in range(self.number("I")):
                self.number("H")
                self.take(self.number("I"))
        for _ in range(2):  # the ticket, a second one
            self.take(self.number("I"))
        return Ticket(client, server, begins, ends, renew_till, flags, self.data[begin : self.at])


def parse(data: bytes) -> Ccache:
    """The tickets of a file, without the library's own entries. Raises `ValueError` with the reason."""
    if data[:2] != VERSION:
        raise ValueError("it is no credential cache of version 4")
    reader = _Reader(data)
    reader.take(2)
    reader.take(reader.number("H"))
    begin = reader.at
    principal = reader.principal()
    head, tickets = data[begin : reader.at], []
    while reader.at < len(data):
        found = reader.ticket()
        if not found.server.endswith(f"@{CONFIG}"):
            tickets.append(found)
    return Ccache(principal, head, tuple(tickets))


def _escaped(component: str) -> str:
    return component.replace("\\", "\\\\").replace("/", "\\/").replace("@", "\\@")
