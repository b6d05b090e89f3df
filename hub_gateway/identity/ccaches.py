"""Where Kerberos tickets are kept: files that only the gateway can read, renewed in time, gone with their kernel.

Each kernel has a directory (0700) with one credential cache (0600) of type FILE: Java reads no other. A new one is
written beside it and renamed, so that whoever reads it meets the old tickets or the new ones. Environments carry its
path at most, never what is in it; what runs as another user gets a copy over a pipe, by `read`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from traitlets import Float, Integer, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.errors import GatewayError, NotFound, Unavailable
from hub_gateway.identity.threads import BlockingCalls

__all__ = ["CCACHE", "CredentialStore", "TicketSource"]

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
CCACHE = "ccache"
"""The name of the file in the directory of each kernel."""
RARELY_SECONDS = 600.0
"""At most so long until tickets that have ended are asked for again.

Their owner may be locked at the KDC for as long as the kernel lives.
"""


class TicketSource(Protocol):
    """Where tickets come from."""

    def fetch(self, ccache: Path) -> float:
        """Write a new cache to a file that does not exist; when its tickets end (`time.time`). Blocks."""


@dataclass
class _Kept:
    source: TicketSource
    path: Path
    ends: float
    renewing: asyncio.Task[None] | None = None


class CredentialStore(LoggingConfigurable):
    """Credential caches of kernels, by kernel id (or another plain word). One process has the directory to itself.

    `state_dir` is where they are kept unless `directory` says otherwise. All methods are for one event loop.
    """

    directory = Unicode(
        help="""The directory of Kerberos credential caches, best on tmpfs (`/run/hub-gateway/credentials`).

        It is made with mode 0700, and must belong to the gateway's user. By default it is `credentials` in the
        state directory.
        """
    ).tag(config=True)
    timeout = Float(15.0, help="How long (seconds) a KDC may take to answer; what waits for it is told so then.").tag(
        config=True
    )
    max_calls = Integer(4, help="How many KDC requests may be under way at once.").tag(config=True)
    retry_seconds = Float(30.0, help="At most this long (seconds) after a failed renewal the next one is tried.").tag(
        config=True
    )

    def __init__(self, *, state_dir: str | Path, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.path = Path(self.directory) if self.directory else Path(state_dir) / "credentials"
        self.calls = BlockingCalls("The Kerberos service (KDC)", limit=self.max_calls, timeout=self.timeout)
        # Half of the places are for who waits at a launch: after a restart all kernels' tickets are renewed at once.
        self._renewals = asyncio.Semaphore(max(1, self.max_calls // 2))
        self._kept: dict[str, _Kept] = {}

    def start(self, live: Collection[str] = ()) -> None:
        """Make the directory, and purge what an earlier process left, but for the kernels that still live."""
        self._private(self.path)
        for found in self.path.iterdir():
            if found.name not in live or found.is_symlink() or not found.is_dir():
                self._remove(found)
                continue
            for file in found.iterdir():
                if file.name != CCACHE:
                    self._remove(file)

    async def keep(self, key: str, source: TicketSource, *, renew: bool = True) -> Path:
        """Have the tickets of a source in a file from now on, and `renew` them. Raises `Unavailable`."""
        await self.drop(key, remove=False)
        directory = self._private(self._directory(key))
        kept = _Kept(source, directory / CCACHE, 0.0)
        self._kept[key] = kept
        try:
            await self._fetch(key, kept)
        except BaseException:
            if self._kept.get(key) is kept:
                await self.drop(key)
            raise
        if renew:
            kept.renewing = asyncio.get_running_loop().create_task(self._renew(key, kept))
        return kept.path

    async def read(self, key: str) -> bytes:
        """The tickets themselves, to be handed on over a pipe. Raises `NotFound`."""
        path = self._directory(key) / CCACHE
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise NotFound(f"There are no Kerberos tickets for {key}.") from error

    def ends(self, key: str) -> float | None:
        """When the tickets end (`time.time`); None where there are none."""
        kept = self._kept.get(key)
        return None if kept is None or not kept.ends else kept.ends

    async def drop(self, key: str, *, remove: bool = True) -> None:
        """Renew no more, and remove what was kept. Idempotent."""
        kept = self._kept.pop(key, None)
        if kept is not None and kept.renewing is not None:
            kept.renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await kept.renewing
        if remove:
            self._remove(self._directory(key))

    async def close(self) -> None:
        """Renew nothing more. Files of kernels stay: kernels outlive the gateway."""
        for key in list(self._kept):
            await self.drop(key, remove=False)

    async def _fetch(self, key: str, kept: _Kept) -> None:
        # A name of its own for each: a call that timed out may still write to its file.
        aside = kept.path.with_name(f".{secrets.token_hex(8)}")

        def fetch() -> float:
            try:
                ends = kept.source.fetch(aside)
                aside.chmod(0o600)
                if self._kept.get(key) is not kept:
                    raise Unavailable(f"The Kerberos tickets of {key} are not wanted any more.")
                aside.replace(kept.path)
                return ends
            finally:
                with contextlib.suppress(OSError):
                    aside.unlink()

        kept.ends = await self.calls.run(fetch)

    async def _renew(self, key: str, kept: _Kept) -> None:
        failures = 0
        while True:
            await asyncio.sleep(self._pause(kept.ends - time.time(), failures))
            try:
                async with self._renewals:
                    await self._fetch(key, kept)
                failures = 0
            except (GatewayError, OSError) as error:
                failures += 1
                said = error.message if isinstance(error, GatewayError) else str(error)
                hint = error.hint if isinstance(error, GatewayError) else ""
                left = max(0.0, kept.ends - time.time())
                self.log.warning("Tickets of %s end in %.0f s and cannot be renewed: %s %s", key, left, said, hint)
            except Exception:
                # Whatever a source has come up with: nobody but this task would try again.
                failures += 1
                self.log.exception("Tickets of %s cannot be renewed", key)

    def _pause(self, life: float, failures: int) -> float:
        """How long to wait with the next renewal, not all at the same moment."""
        usual = max(0.5, life / 4) * random.uniform(1.0, 1.2)  # noqa: S311 (no secret)
        if not failures:
            return usual
        if life > 0:
            return min(self.retry_seconds, usual)
        return float(min(self.retry_seconds * 2 ** min(failures, 10), RARELY_SECONDS))

    def _directory(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of the credential store")
        return self.path / key

    def _private(self, path: Path) -> Path:
        """A directory that is ours alone. Raises `Unavailable` where somebody else could have made it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise Unavailable(
                "The gateway has no safe place for Kerberos tickets; ask its administrator.",
                hint=f"{path} must be a directory of the gateway's own user, and no link",
            )
        if stat.S_IMODE(facts.st_mode) & 0o077:
            path.chmod(0o700)
        return path

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
