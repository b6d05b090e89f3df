"""Stand-alone authentication: a file that maps hashed tokens to users."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from traitlets import Float

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.auth.people import FilePeople
from hub_gateway.auth.scopes import ADMIN
from hub_gateway.errors import BadRequest

__all__ = ["Entry", "TokenFile", "read_entries"]


@dataclass(frozen=True)
class Entry:
    """One token: its SHA-256 in hex, who it stands for, and until when (seconds since the epoch, None: always)."""

    sha256: str
    caller: Caller
    expires: float | None = None


def read_entries(path: Path) -> list[Entry]:
    """The entries of a token file (YAML or JSON). Raises `BadRequest`, which names the entry that is wrong."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadRequest(f"The token file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"The token file {path} is neither YAML nor JSON: {error}.") from error
    tokens = document.get("tokens") if isinstance(document, dict) else None
    if not isinstance(tokens, list):
        raise BadRequest(f"The token file {path} must hold a list under the key `tokens`.")
    return [_entry(path, number, raw) for number, raw in enumerate(tokens, 1)]


def _entry(path: Path, number: int, raw: Any) -> Entry:
    def wrong(what: str) -> BadRequest:
        return BadRequest(f"Entry {number} of the token file {path}: {what}.")

    if not isinstance(raw, dict):
        raise wrong("it must be a mapping with `sha256` and `user`")
    digest, user = raw.get("sha256"), raw.get("user")
    if not isinstance(digest, str) or len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest.lower()):
        raise wrong("`sha256` must be the token's SHA-256, 64 hex digits")
    if not isinstance(user, str) or not user or "/" in user:
        raise wrong("`user` must be a name without a slash")
    groups, scopes = raw.get("groups") or [], raw.get("scopes") or []
    for name, value in (("groups", groups), ("scopes", scopes)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise wrong(f"`{name}` must be a list of strings")
    admin = raw.get("admin") is True
    # Without a Hub, whose roles would say it, the file's `admin` is the administrator of the gateway.
    held = frozenset(scopes) | ({ADMIN} if admin else frozenset())
    caller = Caller(user, groups=frozenset(groups), scopes=held, admin=admin)
    return Entry(digest.lower(), caller, _moment(raw.get("expires"), wrong))


def _moment(value: Any, wrong: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            raise wrong("`expires` must be a date and time such as 2030-01-31T12:00:00Z") from None
    if not isinstance(value, datetime):
        raise wrong("`expires` must be a date and time such as 2030-01-31T12:00:00Z")
    return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()


class TokenFile(Authenticator):
    """Tokens of a file, which is read again when it changes. A file that became wrong changes nothing."""

    reload_seconds = Float(2.0, help="How often (seconds), at most, the token file is looked at for changes.").tag(
        config=True
    )

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        self._entries: list[Entry] = []
        self._stamp: tuple[int, int] | None = None
        self._looked = float("-inf")
        self._loading: asyncio.Task[None] | None = None
        self.people = FilePeople(self._callers)

    async def start(self) -> None:
        await asyncio.to_thread(self._load, first=True)

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        now = time.monotonic()
        if fresh or now - self._looked > self.reload_seconds:
            self._looked = now
            await asyncio.to_thread(self._load)
        presented = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        # All of them, so that the time taken says nothing about which one matched.
        for entry in self._entries:
            if hmac.compare_digest(entry.sha256, presented):
                found = entry
        if found is None or (found.expires is not None and found.expires <= time.time()):
            return None
        return found.caller

    def _callers(self, fresh: bool) -> list[Caller]:
        now = time.monotonic()
        if fresh or now - self._looked > self.reload_seconds:
            self._looked = now
            self._load()
        wall = time.time()
        return [entry.caller for entry in self._entries if entry.expires is None or entry.expires > wall]

    def _load(self, first: bool = False) -> None:
        try:
            found = self.path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            entries = read_entries(self.path)
        except (OSError, BadRequest) as error:
            if first:
                raise BadRequest(str(error) if isinstance(error, BadRequest) else f"{self.path}: {error}.") from error
            self.log.error("The token file is left as it was: %s", error)
            return
        if found.st_mode & 0o004:
            self.log.warning("The token file %s can be read by everybody; chmod 600 it", self.path)
        self._entries, self._stamp = entries, stamp
