"""How an agent registers: what it says, and how it proves that it was launched by us."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from hub_gateway.errors import BadRequest

__all__ = ["Facts", "proof_of", "registration_of"]


def proof_of(token: str, kernel_id: str, epoch: int, host: str, port: int, public_key: str) -> str:
    """The proof of a registration: hex HMAC-SHA256 by the launch token over the facts, joined with `|`."""
    facts = "|".join((kernel_id, str(epoch), host, str(port), public_key))
    return hmac.new(token.encode(), facts.encode(), sha256).hexdigest()


@dataclass(frozen=True)
class Facts:
    """What an agent says of itself, and its proof."""

    epoch: int
    host: str
    port: int
    key: str
    pid: int
    proof: str


def registration_of(kernel_id: str, payload: dict[str, Any]) -> Facts:
    """The registration that a request holds. Raises `BadRequest`."""
    epoch, host, port = (payload.get(name) for name in ("epoch", "host", "port"))
    key, pid, proof = (payload.get(name) for name in ("public_key", "pid", "proof"))
    if not (
        payload.get("kernel_id") == kernel_id
        and isinstance(epoch, int)
        and isinstance(host, str)
        and 0 < len(host) <= 255
        and isinstance(port, int)
        and 0 < port < 65536
        and isinstance(key, str)
        and len(key) == 40
        and isinstance(pid, int)
        and isinstance(proof, str)
    ):
        raise BadRequest("The registration must hold kernel_id, epoch, host, port, public_key, pid and proof.")
    return Facts(epoch, host, port, key, pid, proof)
