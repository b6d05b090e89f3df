"""The launcher on the hosts: brought there over the connection, and called with one JSON document, answering with one.

Nothing but `node.py` is ever run on a host, and nothing of a kernel is in its command line. The files are known by
their content: what lies on the host under the name of their hash is verified once by each gateway, and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hub_gateway.errors import GatewayError, LaunchFailed, Unavailable
from hub_gateway.proxies.ssh_hosts import Host
from hub_gateway.proxies.ssh_pool import Done, Lane, SshError, SshPool

__all__ = ["Bundle", "NodeOptions", "Nodes", "Shelf", "as_error", "readable"]

FILES = ("agent.py", "ipykernel_launcher.py", "node.py", "runas.py")
BOOTSTRAP = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))"
SHELVE_SECONDS = 30.0


@dataclass(frozen=True)
class Bundle:
    """The launchers of this version, and the name by which they are known."""

    directory: Path

    @cached_property
    def texts(self) -> dict[str, str]:
        return {name: (self.directory / name).read_text() for name in FILES}

    @cached_property
    def hashes(self) -> dict[str, str]:
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()

    def request(self, root: str, names: Sequence[str]) -> bytes:
        """What `launchers/shelve.py` reads, that program first."""
        program = (self.directory / "shelve.py").read_bytes()
        shelf = {"root": root, "names": names, "digest": self.digest}
        document = {**shelf, "files": self.texts, "hashes": self.hashes}
        return b"%d\n%s%s" % (len(program), program, _line(document))


@dataclass(frozen=True)
class Shelf:
    """Where the launchers lie on a host, and by which of its addresses that was found out."""

    directory: str
    agent: str
    address: str


@dataclass(frozen=True)
class NodeOptions:
    """How the launcher is called. In `root` and `sudo`, `{user}` stands for a login and for the kernel's user.

    `names` are for the directory of a login on a host, where everybody may make one in `root`.
    """

    python: str
    root: str
    sudo: tuple[str, ...]
    names: Callable[[str, str], Sequence[str]]


class Nodes:
    """Calls launchers. `call` blocks, and is for the threads of the pool."""

    def __init__(self, pool: SshPool, bundle: Bundle, options: NodeOptions) -> None:
        self.pool = pool
        self.bundle = bundle
        self.options = options
        self._shelves: dict[tuple[str, str], Shelf] = {}

    def shelf(self, host: Host, login: str, lane: Lane = Lane.CALL, *, anew: bool = False) -> Shelf:
        """Where the launchers lie, brought there if they are not. Raises `SshError`, `LaunchFailed`."""
        found = self._shelves.get((host.name, login))
        if found is not None and not anew:
            return found
        words = [self.options.python, "-I", "-c", BOOTSTRAP]
        root = self.options.root.replace("{user}", login)
        request = self.bundle.request(root, self.options.names(login, host.name))
        done = self.pool.command(host, login, words, request, SHELVE_SECONDS, lane)
        answer = _answer(done)
        if answer is None:
            raise LaunchFailed(
                f"The host {host.name} cannot run kernels: it has no usable Python ({_said(done)}). Ask the "
                "administrator.",
                hint=f"set DistributedProxy.python; now it is {self.options.python}",
            )
        if not answer.get("ok"):
            raise LaunchFailed(
                f"The host {host.name} cannot run kernels: the launcher cannot be put there "
                f"({readable(answer.get('error'))}). Ask the administrator.",
                hint=f"DistributedProxy.launchers_root is {root}",
            )
        made = Shelf(str(answer["directory"]), str(answer["agent"]), done.address)
        self._shelves[host.name, login] = made
        return made

    def call(
        self, host: Host, login: str, action: str, request: Mapping[str, Any], *, user: str | None = None, within: float
    ) -> dict[str, Any]:
        """Have the launcher do something `within` seconds, as `user` or (None) as whoever logs in.

        Raises `SshError` where the host could not be asked, `LaunchFailed` where it refuses.
        """
        document = {**request, "action": action, "user": user}
        lane = Lane.LOOK if user is None else Lane.CALL
        for anew in (False, True):
            shelf = self.shelf(host, login, lane, anew=anew)
            prefix = [] if user in (None, login) or login == "root" else self._sudo(user)
            words = [*prefix, self.options.python, "-I", f"{shelf.directory}/node.py"]
            done = self.pool.command(host, login, words, _line(document), within, lane)
            answer = _answer(done)
            if answer is not None:
                break
            if "node.py" not in done.err or "No such file" not in done.err:
                raise self._mute(host, login, user, done)
        else:
            raise self._mute(host, login, user, done)
        if not answer.get("ok"):
            raise LaunchFailed(
                f"The kernel cannot run on {host.name} as the unix user {user or login}: "
                f"{readable(answer.get('error'))}. Ask the administrator.",
            )
        return answer

    def _sudo(self, user: str | None) -> list[str]:
        return [word.replace("{user}", str(user)) for word in self.options.sudo]

    def _mute(self, host: Host, login: str, user: str | None, done: Done) -> LaunchFailed:
        """Why there is no answer."""
        if user in (None, login):
            return LaunchFailed(
                f"The host {host.name} cannot run kernels ({_said(done)}). Ask the administrator.",
                hint=f"{self.options.python} ended with {done.code} as {login}",
            )
        return LaunchFailed(
            f"The gateway may not act as the unix user {user} on {host.name} ({_said(done)}). Ask the administrator.",
            hint=f"{login} needs a sudo rule for {self.options.python} -I and node.py on {host.name}; see the how-to",
        )


def as_error(host: Host, error: SshError) -> GatewayError:
    """What it means for a kernel of that host that it could not be asked: nothing for certain."""
    return Unavailable(
        f"The host {host.name} cannot be asked at the moment: {error.text}. Try again in a minute, or tell the "
        "administrator.",
        hint=error.problem.value,
    )


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _answer(done: Done) -> dict[str, Any] | None:
    """The launcher's document, which is the last line: a login may print its own before."""
    lines = done.out.strip().splitlines()
    with contextlib.suppress(ValueError):
        found = json.loads(lines[-1] if lines else b"")
        if isinstance(found, dict):
            return found
    return None


def _said(done: Done) -> str:
    lines: Sequence[str] = done.err.strip().splitlines() or done.out.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[-200:] if lines else f"exit code {done.code}, without a word"


def readable(error: object) -> str:
    """An error of the node, with the plain words first where there are some."""
    text = str(error or "it gives no reason").rstrip(".")
    if "No space left" in text or "Disk quota" in text:
        return f"its disk is full ({text})"
    return text
