"""The hosts of the distributed proxy: how they are written down, how they are, and which one takes the next kernel."""

from __future__ import annotations

import enum
import random
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Health", "Host", "Hosts", "Placement", "host_of", "listed"]

SSH_PORT = 22
_WRITTEN = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::(?P<port>\d{1,5}))?")
_PLAIN_SIX = re.compile(r"[0-9A-Fa-f]*:[0-9A-Fa-f:.]+")


class Placement(str, enum.Enum):
    """Which of the hosts that can takes the next kernel."""

    ROUND_ROBIN = "round-robin"
    LEAST_CONNECTION = "least-connection"  # the fewest kernels of this gateway; Enterprise Gateway's word for it
    LEAST_LOAD = "least-load"  # the lowest load average for each CPU


@dataclass(frozen=True)
class Host:
    """One host that is reached by SSH."""

    name: str
    """As it is written in the configuration; kernels' agents carry it as a tag."""
    address: str
    port: int = SSH_PORT
    listen: str = ""
    """On which of its addresses agents listen; empty is the one that SSH connects to."""
    reach: str = ""
    """At which address gateways reach agents; empty is `listen`."""


@dataclass
class Health:
    """What is known of a host. `at` is when it last answered (monotonic seconds)."""

    at: float = 0.0
    failed_at: float = 0.0
    why: str = ""
    kernels: int = 0
    load: float = 0.0
    cpus: int = 1
    drained: str = ""
    launched: int = 0
    """Kernels that were sent there after it last told how it is."""


def host_of(written: str | Mapping[str, Any]) -> Host:
    """A host as a configuration or a kernelspec has it. Raises `ValueError`."""
    if isinstance(written, str):
        text = written.strip()
        if _PLAIN_SIX.fullmatch(text):
            return Host(text, text)
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(f"{written!r} is no host: write name, name:port, or [address]:port")
        port = int(match["port"] or SSH_PORT)
        if not 0 < port < 65536:
            raise ValueError(f"{written!r}: there is no port {port}")
        return Host(text, match["six"] or match["name"], port)
    unknown = set(written) - {"name", "host", "port", "listen", "reach"}
    if unknown or not isinstance(written.get("host"), str):
        raise ValueError(f"a host needs `host`, and may have name, port, listen and reach; found {sorted(written)}")
    found = host_of(written["host"])
    port = int(written.get("port") or found.port)
    name = str(written.get("name") or (found.name if port == found.port else f"{found.name}:{port}"))
    return Host(name, found.address, port, str(written.get("listen") or ""), str(written.get("reach") or ""))


def listed(written: object) -> list[str]:
    """A kernelspec's list of hosts: a list, or Enterprise Gateway's comma-separated string."""
    names = written.split(",") if isinstance(written, str) else written if isinstance(written, Sequence) else ()
    return [str(name).strip() for name in names if str(name).strip()]


@dataclass
class Hosts:
    """The hosts, and what is known of each. Used on the event loop only.

    `retry_seconds` is how long a host that could not be reached is not chosen while there are others.
    """

    hosts: Mapping[str, Host]
    placement: Placement = Placement.ROUND_ROBIN
    drained: frozenset[str] = frozenset()
    retry_seconds: float = 30.0
    health: dict[str, Health] = field(default_factory=dict)
    # Several gateways that start at once do not all begin with the first.
    _turn: int = field(default_factory=lambda: random.randrange(1000))  # noqa: S311

    def of(self, name: str) -> Health:
        """What is known of a host."""
        return self.health.setdefault(name, Health())

    def answered(self, name: str, facts: Mapping[str, Any]) -> None:
        """It told how it is."""
        known = self.of(name)
        known.at, known.failed_at, known.why, known.launched = time.monotonic(), 0.0, "", 0
        known.kernels = len(facts.get("agents") or ())
        known.load, known.cpus = float(facts.get("load") or 0.0), max(1, int(facts.get("cpus") or 1))
        known.drained = str(facts.get("drained") or "")

    def failed(self, name: str, why: str) -> None:
        """It could not be reached."""
        known = self.of(name)
        known.failed_at, known.why = time.monotonic(), why

    def stale(self, names: Iterable[str], seconds: float) -> list[str]:
        """Which of these have not told for so long how they are, and are not known to be out of reach."""
        if self.placement is Placement.ROUND_ROBIN:
            return []
        now = time.monotonic()
        known = {name: self.of(name) for name in names}
        return [n for n, h in known.items() if (not h.at or now - h.at > seconds) and not self._down(h)]

    def order(self, names: Sequence[str]) -> list[str]:
        """The hosts that may take a kernel, best first; those that could not be reached of late come last."""
        able = [name for name in names if name in self.hosts and not self.why_not(name)]
        if self.placement is Placement.ROUND_ROBIN:
            self._turn += 1
            first = self._turn % len(able) if able else 0
            able = able[first:] + able[:first]
        else:
            random.shuffle(able)  # among equals
            able.sort(key=self._burden)
        return sorted(able, key=lambda name: self._down(self.of(name)))

    def why_not(self, name: str) -> str:
        """Why a host takes no new kernels, whether or not it can be reached; empty where it does."""
        if name in self.drained:
            return "its administrator is draining it"
        return self.of(name).drained

    def _burden(self, name: str) -> float:
        known = self.of(name)
        if self.placement is Placement.LEAST_CONNECTION:
            return known.kernels + known.launched
        return (known.load + known.launched) / known.cpus

    def _down(self, known: Health) -> bool:
        return bool(known.failed_at) and time.monotonic() - known.failed_at < self.retry_seconds
