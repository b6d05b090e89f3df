"""Names of directories that nobody can guess, for where everybody may make one.

Who made a directory first under the name that another user's kernels are to have would keep that user from having any.
"""

from __future__ import annotations

import hmac
import secrets
from functools import cached_property

from hub_gateway.statedir import StateDir

__all__ = ["NAMES", "DirectoryNames"]

NAMES = 100
"""How many names of one user somebody else may take. A name can be taken that was seen, and is free again."""


class DirectoryNames:
    """Names by a key of the gateway, in its state directory; without one they are good for this process."""

    def __init__(self, state_dir: str) -> None:
        self.state_dir = state_dir

    def name(self, user: str, what: str) -> str:
        """The name of a directory of that user for that."""
        digest = hmac.new(self._key, what.encode(), "sha256").hexdigest()[:16]
        return f"hub-gateway-{user}-{digest}"

    @cached_property
    def _key(self) -> bytes:
        return StateDir(self.state_dir).secret("directory_names") if self.state_dir else secrets.token_bytes(32)
