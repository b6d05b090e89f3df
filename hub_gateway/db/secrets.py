"""Secrets at rest: what the database holds of link keys, launch tokens and environments is encrypted."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, WaitingRequest
from hub_gateway.errors import Unavailable

__all__ = ["Vault", "VaultError"]

ENCRYPTED = ("launch", "launch_token", "link_secret")
ROTATED_AT_ONCE = 200


class VaultError(Unavailable):
    """A secret was encrypted with a key that this gateway does not have, or the key file is unusable."""


class Vault:
    """Encrypts with the first key, decrypts with any (Fernet: AES-128-CBC and HMAC-SHA256)."""

    def __init__(self, keys: Iterable[str | bytes]) -> None:
        try:
            fernets = [Fernet(key) for key in keys]
        except ValueError as error:
            raise VaultError(
                "The gateway's key file holds a line that is not a key.",
                hint="one Fernet key (32 bytes, URL-safe base64) a line; lines with # are comments",
            ) from error
        if not fernets:
            raise VaultError("The gateway's key file holds no key.")
        self._fernet = MultiFernet(fernets)

    @staticmethod
    def generate_key() -> str:
        """A new key."""
        return Fernet.generate_key().decode()

    @classmethod
    def from_file(cls, path: str | Path) -> Vault:
        """The keys of a file (one a line), which is made with one key and mode 0600 where it is missing."""
        file = Path(path).expanduser()
        try:
            if not file.exists():
                _create(file, cls.generate_key() + "\n")
            if file.stat().st_mode & 0o077:
                raise VaultError(
                    f"The key file {file} can be read by other users.", hint=f"chmod 600 {file}, then rotate its keys"
                )
            lines = [line.strip() for line in file.read_text().splitlines()]
        except OSError as error:
            raise VaultError(f"The key file {file} cannot be used: {error.strerror}.") from error
        return cls(line for line in lines if line and not line.startswith("#"))

    def encrypt(self, plain: str) -> str:
        """The ciphertext, as text."""
        return self._fernet.encrypt(plain.encode()).decode()

    def decrypt(self, cipher: str) -> str:
        """The plain text. Raises `VaultError`."""
        try:
            return self._fernet.decrypt(cipher.encode()).decode()
        except InvalidToken as error:
            raise VaultError(
                "The gateway cannot read a stored secret: the key that encrypted it is missing.",
                hint="put the old key back into the key file, below the new one",
            ) from error

    def encrypt_bytes(self, plain: bytes) -> str:
        """The ciphertext of bytes, as text."""
        return self._fernet.encrypt(plain).decode()

    def decrypt_bytes(self, cipher: str) -> bytes:
        """The bytes. Raises `VaultError`."""
        try:
            return self._fernet.decrypt(cipher.encode())
        except InvalidToken as error:
            raise VaultError("The gateway cannot read a stored request: its key is missing.") from error

    def encrypt_json(self, value: Any) -> str:
        """The ciphertext of a JSON document."""
        return self.encrypt(json.dumps(value, separators=(",", ":")))

    def decrypt_json(self, cipher: str) -> Any:
        """The JSON document. Raises `VaultError`."""
        return json.loads(self.decrypt(cipher))

    async def rotate(self, db: Database) -> int:
        """Encrypt every secret in the database anew with the first key; the number of rows.

        In steps, each a transaction, so that it never holds up the gateway; it can be repeated at will.
        """
        done, last = 0, ""
        while True:
            found = await db.write(lambda session, last=last: self._rotate_some(session, last))  # type: ignore[misc]
            if not found:
                await db.write(self._rotate_waiting)
                return done
            done, last = done + len(found), found[-1]

    def _rotate_some(self, session: Session, after: str) -> list[str]:
        columns = [getattr(Kernel, name) for name in ENCRYPTED]
        rows = session.execute(
            select(Kernel.id, *columns).where(Kernel.id > after).order_by(Kernel.id).limit(ROTATED_AT_ONCE)
        ).all()
        for row in rows:
            ciphers = dict(zip(ENCRYPTED, row[1:], strict=True))
            # Only where nothing changed it in between: a relaunch writes fresh secrets with the first key anyway.
            session.execute(
                update(Kernel)
                .where(Kernel.id == row[0], *(getattr(Kernel, name) == old for name, old in ciphers.items()))
                .values({name: self._again(old) for name, old in ciphers.items() if old})
            )
        return [cast(str, row[0]) for row in rows]

    def _rotate_waiting(self, session: Session) -> None:
        """Requests that wait for their kernels: few, and short-lived."""
        for row in session.execute(select(WaitingRequest.id, WaitingRequest.frames)).all():
            found = update(WaitingRequest).where(WaitingRequest.id == row[0])
            session.execute(found.values(frames=self._again(row[1])))

    def _again(self, cipher: str) -> str:
        try:
            return self._fernet.rotate(cipher.encode()).decode()
        except InvalidToken as error:
            raise VaultError("A stored secret cannot be rotated: the key that encrypted it is missing.") from error


def _create(path: Path, content: str) -> None:
    """Make a file of mode 0600, whole or not at all, whoever else does the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
