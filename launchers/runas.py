#!/usr/bin/env python3
"""Acts for the local process proxy as another unix user: starts an agent, reads its files, signals, removes.

    python -I runas.py < request.json                              as root: drops to the user in the request
    sudo -n -H -u USER -- python -I runas.py < request.json        as an unprivileged gateway, by one sudo rule

The request is one JSON document on standard input, the answer one JSON line on standard output. There is no
shell, nothing of the caller's environment is passed on, and every file is touched with the user's own
rights, so that a link that the user planted leads only to what the user may touch anyway.

Needs Python 3.8, nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Tuple

    Document = Dict[str, Any]

TAIL_BYTES = 64 * 1024
FILE_BYTES = 64 * 1024
LINE_SECONDS = 30.0


class Refused(Exception):
    """The request is not carried out; the sentence says why."""


class Taken(Refused):
    """Somebody else has what is to be a directory of this user."""


def become(name: str) -> pwd.struct_passwd:
    """Be that user, for good. As root all ids change; otherwise we must be that user already."""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise Refused("there is no unix user %r" % name) from None
    if user.pw_uid == 0:
        raise Refused("kernels never run as root")
    if os.geteuid() == 0:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    if (os.getuid(), os.geteuid()) != (user.pw_uid, user.pw_uid) or os.getgid() == 0:
        raise Refused("running as uid %d, not as %s" % (os.getuid(), name))
    return user


def private_directory(path: str) -> None:
    """Make a directory, and its parent, for this user alone; refuse one that is somebody else's, or open to others."""
    for step in (os.path.dirname(path), path):
        try:
            os.mkdir(step, 0o700)
        except FileExistsError:
            pass
        found = os.lstat(step)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Taken("%s exists and is not a directory of %s" % (step, pwd.getpwuid(os.getuid()).pw_name))
        mode = stat.S_IMODE(found.st_mode) & 0o777
        if mode != 0o700:
            # Closing it now would not tell what others have put there meanwhile.
            raise Refused("%s has the mode %04o, where only its owner may look (0700); remove it" % (step, mode))


def inside(path: str) -> str:
    """The runtime directory of a request: absolute, plain, and this user's."""
    if not os.path.isabs(path) or os.path.normpath(path) != path:
        raise Refused("%r is not a plain absolute path" % path)
    return path


def launch(request: Document, user: pwd.struct_passwd) -> Document:
    """Start the agent in a session of its own; its first line is the answer."""
    directory = inside(request["runtime_dir"])
    private_directory(directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    log = os.open(os.path.join(directory, "kernel.log"), flags, 0o600)
    environment = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell}
    environment.update(request["agent_env"])
    config = request["config"]
    config["env"] = dict(environment, **config["env"])
    wanted = config.get("cwd")
    config["cwd"] = next((d for d in (wanted, user.pw_dir) if d and os.path.isdir(d) and os.access(d, os.X_OK)), "/")
    os.umask(0o077)
    process = subprocess.Popen(
        request["command"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    os.close(log)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(config).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; what it said is in its log
    line = first_line(process.stdout.fileno())
    return {"pid": process.pid, "line": line.decode("utf-8", "replace")}


def first_line(fd: int) -> bytes:
    """The first line that arrives, or what came until the end or the deadline."""
    deadline, got = time.monotonic() + LINE_SECONDS, b""
    while b"\n" not in got:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(fd, 65536) if ready else b""
        if not part:
            break
        got += part
    return got.split(b"\n", 1)[0]


def read(request: Document, user: pwd.struct_passwd) -> Document:
    """The agent's registration file, if it is there."""
    return {"text": file_text(os.path.join(inside(request["runtime_dir"]), "agent.json"), FILE_BYTES)}


def logs(request: Document, user: pwd.struct_passwd) -> Document:
    """The end of the log, which may just have begun a new file."""
    path = os.path.join(inside(request["runtime_dir"]), "kernel.log")
    return {"text": (file_text(path + ".1", TAIL_BYTES) + file_text(path, TAIL_BYTES))[-TAIL_BYTES:]}


def file_text(path: str, limit: int) -> str:
    """The end of a file of this user. It is empty where there is none, or something that would be waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return ""
        raise
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return ""
        file.seek(max(0, found.st_size - limit))
        return file.read(limit).decode("utf-8", "replace")


def send(request: Document, user: pwd.struct_passwd) -> Document:
    """Signal processes; those that are gone, or are not this user's, are left out."""
    sent = []
    for pid in request["pids"]:
        try:
            os.kill(int(pid), int(request["signum"]))
            sent.append(pid)
        except (ProcessLookupError, PermissionError):
            pass
    return {"sent": sent}


def remove(request: Document, user: pwd.struct_passwd) -> Document:
    """Remove the runtime directory."""
    directory = inside(request["runtime_dir"])
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return {}
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Refused("%s is not a directory of %s" % (directory, user.pw_name))
    shutil.rmtree(directory, ignore_errors=True)
    return {}


def probe(request: Document, user: pwd.struct_passwd) -> Document:
    """Whether this works at all, and whether the agent's interpreter does for this user."""
    done = subprocess.run(
        request["command"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=20,
        env={},
    )
    return {"code": done.returncode, "output": done.stdout.decode("utf-8", "replace")[-500:]}


ACTIONS = {"launch": launch, "read": read, "logs": logs, "signal": send, "remove": remove, "probe": probe}


def serve(actions: Dict[str, Any], anybody: Tuple[str, ...] = ()) -> None:
    """Carry out the request on standard input, as its user; an action of `anybody` needs none."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.chdir("/")
    try:
        request = json.loads(sys.stdin.buffer.readline())  # SSH does not say that there is no more
        action, name = request["action"], request.get("user")
        user = None if name is None and action in anybody else become(name)
        answer = actions[action](request, user)
        answer["ok"] = True
    except (Refused, OSError, KeyError, TypeError, ValueError, subprocess.SubprocessError) as error:
        text = str(error) if isinstance(error, (Refused, OSError)) else "%s: %s" % (type(error).__name__, error)
        answer = {"ok": False, "error": text}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(ACTIONS)
