"""Places where a test makes the gateway die, as a power cut would.

Armed only by the environment of the process: `HUB_GATEWAY_FAILPOINT=name` kills it with SIGKILL the
first time that it comes by `name`, `name:3` the third time.
"""

from __future__ import annotations

import os
import signal

__all__ = ["ENV", "hit"]

ENV = "HUB_GATEWAY_FAILPOINT"


class _Armed:
    """The failpoint of this process, read when the first one is passed."""

    def __init__(self) -> None:
        name, _, count = os.environ.get(ENV, "").partition(":")
        self.name = name
        self.left = int(count or 1)


_armed: _Armed | None = None


def hit(name: str) -> None:
    """Die here, if this is the armed failpoint."""
    global _armed
    if _armed is None:
        _armed = _Armed()
    if name != _armed.name:
        return
    _armed.left -= 1
    if _armed.left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
