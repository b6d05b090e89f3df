#!/usr/bin/env python3
"""Acts for a gateway on a node that it reaches by SSH: starts agents, says which there are, and ends them.

    python3 -I node.py < request.json                           as the user who logged in
    sudo -n -H -u USER -- python3 -I node.py < request.json     as the kernel's user, by one sudo rule

Like runas.py, beside which it lies and whose rules hold: one JSON document in, one JSON line out, no shell. What
concerns one kernel happens with its user's rights alone; only `find` and `look` need none.

Needs Linux and Python 3.8, nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import runas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set

    Document = Dict[str, Any]
else:
    from collections import namedtuple

MARK = "owner.json"
CCACHE = "krb5cc"
AGENT = re.compile(r"agent\.([\w-]+\.)?pyc?")
MARK_BYTES = 65536
AGAIN_SECONDS = 1.0


if TYPE_CHECKING:

    class Process(NamedTuple):
        """One process that runs, as /proc has it."""

        pid: int
        parent: int
        group: int
        session: int
        started: int
        uid: int

else:
    Process = namedtuple("Process", "pid parent group session started uid")


def process(pid: int) -> Optional[Process]:
    """The process of that pid, None where there is none that still runs (proc(5))."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        uid = os.stat("/proc/%d" % pid).st_uid
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]), uid)


def processes() -> Dict[int, Process]:
    """All that can be seen."""
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {one.pid: one for one in found if one is not None}


def words(pid: int) -> List[str]:
    """The command line of a process."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read().decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


def tags(argv: List[str]) -> Dict[str, str]:
    """The tags of an agent. Only what is one by its script: users may run whatever else with the same arguments."""
    if not any(AGENT.match(os.path.basename(word)) for word in argv[1:4]):
        return {}
    rest = iter(argv[1:])
    return {word: next(rest, "") for word in rest if word.startswith("--")}


def agents(request: Document, uid: Optional[int] = None) -> List[Document]:
    """The agents of this gateway on this host, or of one of its kernels where the request names one."""
    found = []
    for pid in processes():
        said = tags(words(pid))
        if said.get("--gateway-id") != request["gateway_id"] or said.get("--host") != request["host"]:
            continue
        if request.get("kernel_id") not in (None, said.get("--kernel-id")):
            continue
        now = process(pid)
        if now is None or uid not in (None, now.uid):
            continue
        found.append(
            {
                "pid": pid,
                "kernel_id": said.get("--kernel-id", ""),
                "epoch": epoch_of(said.get("--epoch", "")),
                "user": name_of(now.uid),
            }
        )
    return found


def epoch_of(word: str) -> int:
    """The number in a tag; 0 where it is none, as anybody may start a process that looks like an agent."""
    return int(word) if re.fullmatch("[0-9]{1,18}", word) else 0


def name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@contextlib.contextmanager
def alone(directory: str) -> Iterator[None]:
    """Have a kernel's directory for oneself: a killed gateway may have left a launch that is still under way.

    Raises `runas.Refused`.
    """
    runas.private_directory(directory)
    path = directory + ".lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


def launch(request: Document, user: pwd.struct_passwd) -> Document:
    """Start the agent, or find the one that an earlier launch of the same kernel has started."""
    directory = runas.inside(request["runtime_dir"])
    try:
        answer = launch_in(directory, request, user)
        path = request["config"]["env"].get("PATH", request["agent_env"]["PATH"])
        if shutil.which("kinit", path=path) is None:
            answer.pop("renew_till", None)
        return answer
    except runas.Taken as error:
        return {"taken": str(error)}  # the gateway has another name


def launch_in(directory: str, request: Document, user: pwd.struct_passwd) -> Document:
    with alone(directory):
        runas.private_directory(directory)
        found = adopt(request, user)
        # An agent that renews its tickets counts by when those end that it came with.
        renew_till = renewed(directory) if found else (request["config"].get("tickets") or {}).get("renew_till")
        if request.get("tickets") and not (found and renew_till):
            put_tickets(directory, request["tickets"])
        if found:
            return dict(found, renew_till=renew_till)
        drained = drain(request)
        if drained:
            runas.remove(request, user)
            return {"drained": drained}
        try:
            aside = os.path.join(directory, ".%s" % MARK)
            with open(aside, "w") as file:
                mark = {name: request[name] for name in ("gateway_id", "kernel_id", "epoch", "host")}
                json.dump(dict(mark, renew_till=renew_till), file)
            os.replace(aside, os.path.join(directory, MARK))
            for name, value in session().items():
                request["config"]["env"].setdefault(name, value)
            answer = runas.launch(request, user)
        except Exception:
            # Whoever is refused has nothing to clean up.
            stop({one["pid"] for one in agents(request, user.pw_uid)}, set(), 0.0)
            runas.remove(request, user)
            raise
        if not answer["line"]:
            answer["log"] = runas.logs(request, user)["text"]
    answer["boot"] = boot()
    answer["renew_till"] = renew_till
    return answer


def renewed(directory: str) -> Optional[float]:
    """Until when the agent there renews its tickets; None where it does not."""
    try:
        return float(json.loads(own_text(os.path.join(directory, MARK)))["renew_till"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tickets(request: Document, user: pwd.struct_passwd) -> Document:
    """Put newer Kerberos tickets in the place of those that a kernel has; one that has ended gets none."""
    directory = runas.inside(request["runtime_dir"])
    if not own_directory(directory):
        raise runas.Refused("there is no directory %s of %s" % (directory, user.pw_name))
    put_tickets(directory, request["tickets"])
    if not os.path.exists(os.path.join(directory, MARK)):  # it was ended meanwhile, and this is what is left of it
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, CCACHE))
            os.rmdir(directory)
    return {}


def put_tickets(directory: str, text: str) -> None:
    """Write a credential cache (base64): whoever reads it meets the old one or the new one, and is this user."""
    aside = os.path.join(directory, ".%s-%s" % (CCACHE, os.urandom(8).hex()))
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(base64.b64decode(text))
        os.replace(aside, os.path.join(directory, CCACHE))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def session() -> Dict[str, str]:
    """Where this user's own systemd is found, if there is one: a login by SSH and PAM would set it."""
    path = "/run/user/%d" % os.getuid()
    return {"XDG_RUNTIME_DIR": path} if os.path.isdir(path) and os.stat(path).st_uid == os.getuid() else {}


def adopt(request: Document, user: pwd.struct_passwd) -> Document:
    """What an interrupted launch left, once it says where it listens; one that never does is ended."""
    deadline = time.monotonic() + runas.LINE_SECONDS
    while True:
        alive = agents(request, user.pw_uid)
        if not alive:
            return {}
        line = runas.read(request, user)["text"]
        try:
            pid = json.loads(line).get("pid")
        except (ValueError, AttributeError):
            pid = None
        for agent in alive:
            if agent["pid"] == pid:
                return {"pid": pid, "epoch": agent["epoch"], "line": line, "boot": boot()}
        if time.monotonic() > deadline:
            stop({one["pid"] for one in alive}, set(), float(request["seconds"]))
            return {}
        time.sleep(0.05)


def end(request: Document, user: pwd.struct_passwd) -> Document:
    """End a kernel, its agent and all that they started, and remove the directory. With `pid`, that agent alone."""
    # Where it was recorded, or made by another replica under a name of its own.
    wanted = runas.inside(request["runtime_dir"])
    name = os.path.basename(wanted)
    places = [os.path.join(folder, name) for folder in folders(os.path.dirname(os.path.dirname(wanted)))]
    places = [place for place in places if own_directory(place)]
    directory = wanted if wanted in places or not places else places[0]
    with contextlib.ExitStack() as stack:
        # What another user has in its place, or could look into, is left alone. The processes end all the same.
        with contextlib.suppress(runas.Refused):
            stack.enter_context(alone(directory))
        mine = {one["pid"] for one in agents(request, user.pw_uid)}
        only = request.get("pid")
        if only is not None:
            stop(mine & {only}, set(), float(request["seconds"]))
            if mine - {only}:
                return {}  # it was a second agent of a kernel that lives, whose directory it is
        # Where an agent was killed, what its kernel started still carries the kernel's id.
        mark = b"KERNEL_ID=" + request["kernel_id"].encode()
        stop(mine, marked(mark), float(request["seconds"]))
        for _ in range(3):
            late = marked(mark)
            if not late:
                break
            stop(set(), late, 0.0)
        for place in set(places) | {directory}:
            with contextlib.suppress(runas.Refused):
                runas.remove({"runtime_dir": place}, user)
    return {}


def marked(mark: bytes) -> Set[int]:
    """Our processes that have this variable in their environment, except this one and those that it is run by."""
    table = processes()
    found, above = set(), os.getpid()
    ancestors = set()
    while above in table:
        ancestors.add(above)
        above = table[above].parent
    for one in table.values():
        if one.uid != os.getuid() or one.pid in ancestors:
            continue
        try:
            with open("/proc/%d/environ" % one.pid, "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.add(one.pid)
        except OSError:
            pass  # it has ended, or it is none of ours any more
    return found


def stop(polite: Set[int], more: Set[int], seconds: float) -> None:
    """Ask processes to end, then kill them with all that they started, and `more`."""
    table = processes()
    family = {pid: table[pid] for pid in polite | more if pid in table}
    size = -1
    while len(family) != size:
        size = len(family)
        parents, sessions = set(family), {one.session for one in family.values() if one.session == one.pid}
        for one in table.values():
            if one.parent in parents or (one.session in sessions and one.uid == os.getuid()):
                family[one.pid] = one
    family.pop(os.getpid(), None)
    asked = [family[pid] for pid in polite if pid in family]
    if asked:
        send(asked, signal.SIGTERM)
        soon = min(AGAIN_SECONDS, seconds)
        # A process that is still starting can lose a signal: its handler is there, who heeds it is not yet.
        if not gone(asked, soon):
            send(asked, signal.SIGTERM)
            gone(asked, seconds - soon)
    left = list(family.values())
    send(left, signal.SIGKILL)
    gone(left, 5.0)


def lives(one: Process) -> bool:
    """Whether it is still that process, and runs."""
    now = process(one.pid)
    return now is not None and now.started == one.started


def send(some: List[Process], signum: int) -> None:
    for one in some:
        if lives(one):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one.pid, signum)


def gone(some: List[Process], seconds: float) -> bool:
    """Wait until they have ended; False where that takes longer."""
    deadline = time.monotonic() + seconds
    while any(lives(one) for one in some):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def strike(request: Document, user: pwd.struct_passwd) -> Document:
    """Send a signal to the kernel: what its agent started."""
    mine = {one["pid"] for one in agents(request, user.pw_uid)} & {request["pid"]}
    send([one for one in processes().values() if one.parent in mine], int(request["signum"]))
    return {}


def find(request: Document, user: Optional[pwd.struct_passwd]) -> Document:
    """Which agents of this gateway run here, which directories are left, and how the node is."""
    left = []
    for path in [os.path.join(folder, name) for folder in folders(request["runtime_root"]) for name in listed(folder)]:
        try:
            mark = json.loads(own_text(os.path.join(path, MARK)))
            if (mark["gateway_id"], mark["host"]) == (request["gateway_id"], request["host"]):
                epoch, kernel_id = int(mark["epoch"]), str(mark["kernel_id"])
                left.append({"path": path, "kernel_id": kernel_id, "epoch": epoch})
        except (OSError, ValueError, KeyError, TypeError):
            pass  # made at this moment, or removed
    return {
        "agents": agents(request),
        "directories": left,
        "blind": not words(1),  # /proc with hidepid: others' processes cannot be seen
        "boot": boot(),
        "load": os.getloadavg()[0],
        "cpus": len(os.sched_getaffinity(0)),
        "drained": drain(request),
    }


def folders(root: str) -> List[str]:
    """The directories of this user's kernels in a root, of all replicas and versions of gateways.

    They are known by whose they are, and not by their names: those that others make are left alone.
    """
    name = re.compile("hub-gateway-%s(-[0-9a-f]{16})?" % re.escape(name_of(os.getuid())))
    found = [os.path.join(root, one) for one in listed(root) if name.fullmatch(one)]
    return [folder for folder in found if own_directory(folder)]


def listed(folder: str) -> List[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def own_directory(path: str) -> bool:
    """Whether it is a directory of this user, in which nobody else could have put anything."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def own_text(path: str) -> str:
    """What a regular file of this user says; nothing else is waited for, or read. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise OSError("%s is no file of this user" % path)
        return os.read(fd, MARK_BYTES).decode("utf-8", "replace")
    finally:
        os.close(fd)


def drain(request: Document) -> str:
    """Why this node takes no new kernels, as its administrator has written into a file; empty where it does."""
    try:
        with open(request["drain_file"], encoding="utf-8", errors="replace") as file:
            return file.read(200).strip() or "it is being drained"
    except (OSError, KeyError):
        return ""


def boot() -> str:
    """Which start of this machine this is."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def look(request: Document, user: Optional[pwd.struct_passwd]) -> Document:
    """What a check wants to know: of Python and pyzmq, room on the disk, the clock, and the limits' command."""
    program = "import sys, zmq; print(zmq.pyzmq_version(), 'curve' if zmq.has('curve') else 'without CURVE')"
    code, said = tried([sys.executable, "-I", "-c", program])
    answer: Document = {"time": time.time(), "python": sys.version.split()[0], "zmq": said if code == 0 else ""}
    if code != 0:
        answer["why"] = said
    root = request["runtime_root"]
    try:
        room = os.statvfs(root)
        answer["free"] = room.f_bavail * room.f_frsize
        answer["writable"] = os.access(root, os.R_OK | os.W_OK | os.X_OK)
        answer["open"] = os.stat(root).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH
    except OSError as error:
        answer.update(free=0, writable=False, root_error=str(error))
    if request.get("limit_command"):
        code, said = tried(request["limit_command"] + [sys.executable, "-I", "-c", "pass"])
        answer["limits"] = "" if code == 0 else said or "it ended with %d" % code
    return answer


def tried(command: List[str]) -> tuple:  # type: ignore[type-arg,unused-ignore]
    """The exit code of a command, and the end of what it said."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
            env=dict(os.environ, **session()),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace").strip()[-300:]


ACTIONS = {
    "launch": launch,
    "tickets": tickets,
    "logs": runas.logs,
    "signal": strike,
    "end": end,
    "find": find,
    "look": look,
}


if __name__ == "__main__":
    runas.serve(ACTIONS, anybody=("find", "look"))
