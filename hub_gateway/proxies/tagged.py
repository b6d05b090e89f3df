"""Agents on this node, known by the tags in their command lines, and their private directories."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "Agent",
    "agents",
    "alive",
    "arguments",
    "elsewhere",
    "epoch_of",
    "is_agent",
    "kernels",
    "mark",
    "marked",
    "node",
    "registration",
    "tail",
]

MARK = "owner.json"
MARK_BYTES = 64 * 2**10
TAIL_BYTES = 64 * 2**10
_PROGRAM = re.compile(r"agent\.([\w-]+\.)?pyc?")
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


@dataclass(frozen=True)
class Agent:
    """One agent process of this node."""

    process: psutil.Process
    kernel_id: str
    epoch: int
    user: str | None


def arguments(kernel_id: str, gateway_id: str, epoch: int) -> list[str]:
    """The tags, as arguments. Nothing else about a kernel is in its command line."""
    return ["--kernel-id", kernel_id, "--gateway-id", gateway_id, "--epoch", str(epoch)]


def epoch_of(word: str) -> int:
    """The number in a tag; 0 where it is none, as anybody may start a process that looks like an agent."""
    return int(word) if re.fullmatch("[0-9]{1,18}", word) else 0


def agents(gateway_id: str, kernel_id: str | None = None) -> list[Agent]:
    """The agents of a gateway, or of one of its kernels."""
    return [
        Agent(process, tags["--kernel-id"], epoch_of(tags.get("--epoch", "")), _user(process))
        for process, tags in _tagged()
        if tags.get("--gateway-id") == gateway_id and kernel_id in (None, tags["--kernel-id"])
    ]


def is_agent(pid: int, kernel_id: str) -> bool:
    """Whether the process of that pid is the living agent of that kernel."""
    try:
        process = psutil.Process(pid)
        return _tags(process.cmdline()).get("--kernel-id") == kernel_id and alive(process)
    except _GONE:
        return False


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except _GONE:
        return False


def kernels(connection_file: str, uid: int) -> list[psutil.Process]:
    """The processes of a unix user that were started with that connection file: an argument by itself, or an option's.

    Whoever else names the file (an administrator who reads it, a shell whose command holds it) is none of them.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            if process.pid == os.getpid() or process.uids().real != uid:
                continue
            argv = process.cmdline()[1:]
            if any(word == connection_file or word.endswith(f"={connection_file}") for word in argv):
                found.append(process)
    return found


def node() -> dict[str, str]:
    """This machine, for who may meet what was recorded here: its name, and the boot that its processes are of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"name": socket.gethostname(), "boot": boot}


def elsewhere(recorded: object) -> str:
    """The name of the machine that a `node` was recorded on, where it is not this one; else empty.

    The name alone changes with a container that is made anew, the boot with every start of the machine; processes
    of an earlier boot are gone for certain. Only where both are others it is another machine.
    """
    if not isinstance(recorded, dict):
        return ""
    here = node()
    if recorded.get("name") == here["name"] or (here["boot"] and recorded.get("boot") == here["boot"]):
        return ""
    return str(recorded.get("name") or "unknown")


def registration(text: bytes, kernel_id: str) -> dict[str, Any] | None:
    """The registration that an agent printed, or wrote, about itself."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("kernel_id") != kernel_id:
        return None
    kept = {name: found.get(name) for name in ("host", "port", "public_key", "pid")}
    return None if None in kept.values() else kept


def mark(directory: Path, gateway_id: str, kernel_id: str, epoch: int) -> None:
    """Say whose a directory is, so that it is found when its process is gone."""
    aside = directory / f".{MARK}"
    aside.write_text(json.dumps({"gateway_id": gateway_id, "kernel_id": kernel_id, "epoch": epoch}))
    aside.replace(directory / MARK)


def marked(root: Path, gateway_id: str) -> Iterator[tuple[Path, str, int]]:
    """The directories under `root` that belong to kernels of a gateway: path, kernel id, epoch.

    What another user has put there, or a link leads to, is not looked at: it would be removed as a kernel's.
    """
    for path in root.glob(f"*/{MARK}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if not _own(path.parent.lstat(), stat.S_ISDIR):
                continue
            found = json.loads(_own_text(path))
            if found["gateway_id"] == gateway_id:
                yield path.parent, str(found["kernel_id"]), int(found["epoch"])


def _own(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is of a kind, and this user's."""
    return is_kind(found.st_mode) and found.st_uid == os.getuid()


def _own_text(path: Path) -> str:
    """What a small regular file of this user says. A pipe is not waited for. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not _own(found, stat.S_ISREG) or found.st_size > MARK_BYTES:
            raise OSError(f"{path} is no mark of this user")
        return file.read(MARK_BYTES).decode("utf-8", "replace")


def tail(path: Path) -> str:
    """The end of an agent's log, which may just have begun a new file; empty where there is none."""
    return (_end_of(path.with_name(f"{path.name}.1")) + _end_of(path))[-TAIL_BYTES:]


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _tagged() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    for process in psutil.process_iter():
        try:
            argv = process.cmdline()
        except _GONE:
            continue
        tags = _tags(argv)
        # One with a host was started by way of SSH, though on this machine: another proxy looks after it.
        if "--kernel-id" in tags and "--host" not in tags and alive(process):
            yield process, tags


def _tags(argv: list[str]) -> dict[str, str]:
    # Only what is an agent by its script: users may run whatever else with the same arguments.
    if not any(_PROGRAM.fullmatch(Path(argument).name) for argument in argv[1:4]):
        return {}
    rest = iter(argv[1:])
    return {word: value for word in rest if word.startswith("--") for value in (next(rest, ""),)}


def _user(process: psutil.Process) -> str | None:
    try:
        return process.username()
    except (*_GONE, KeyError):
        return None
