"""The directory in which one gateway keeps what must outlive it, and the lock that says it is alive.

The lock is the operating system's: it is let go by any death of the process, kill -9 included. Who
holds it therefore knows that no earlier gateway with the same state lives, and may take over its
leases at once instead of waiting for them to run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hub_gateway.errors import BadRequest

__all__ = ["StateDir"]


class StateDir:
    """`path`, created with mode 0700. Files in it are 0600."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self._lock_fd: int | None = None

    def create(self) -> None:
        """Create it where it is missing; close it to others where it is open to them. Raises `BadRequest`."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o700)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise BadRequest(
                f"The state directory {self.path} cannot be used: {error.strerror or error}.",
                hint="HubGateway.state_dir (--state-dir) must name a directory that the gateway may make and write to",
            ) from error

    def try_lock(self) -> bool:
        """Take the lock if nobody holds it. It is held until the process ends or `unlock`."""
        if self._lock_fd is not None:
            return True
        fd = os.open(self.path / "gateway.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd
        return True

    def lock_holder(self) -> int | None:
        """The process id that the present holder wrote, if it did."""
        try:
            return int((self.path / "gateway.lock").read_text() or 0) or None
        except (OSError, ValueError):
            return None

    def unlock(self) -> None:
        """Let the lock go."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def secret(self, name: str, size: int = 32) -> bytes:
        """A random secret that stays: read from the file `name`, which is made on first use."""
        path = self.path / name
        # Written aside and linked, so that a crash or a second process never leaves half a secret.
        if not path.exists():
            aside = self.path / f".{name}.{secrets.token_hex(8)}"
            self._write_private(aside, secrets.token_hex(size).encode())
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            aside.unlink()
        try:
            return bytes.fromhex(path.read_text().strip())
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"The secret in {path} cannot be read: {_why(error)}.",
                hint="it is made by the gateway; restore it from a backup, or remove it to have a new one made",
            ) from error

    def write_address(self, facts: Mapping[str, object]) -> None:
        """Say where this gateway listens, for the command line on the same machine."""
        aside = self.path / f".gateway.json.{os.getpid()}"
        self._write_private(aside, json.dumps(dict(facts)).encode())
        aside.replace(self.path / "gateway.json")

    def read_address(self) -> dict[str, object]:
        """What `write_address` wrote last; empty where nothing was."""
        try:
            found = json.loads((self.path / "gateway.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def _write_private(path: Path, content: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _why(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not hexadecimal"
