#!/usr/bin/env python3
"""The kernel agent: starts one Jupyter kernel, supervises it, and serves it to gateways over one encrypted port.

Needs Python 3.8 and pyzmq, nothing else, and is shipped as this one file. It is started as

    python -IS agent.py --kernel-id K --gateway-id G --epoch N  <  configuration.json

The arguments are tags, so that the process can be found; everything that matters is one JSON document
on standard input (see `Settings`). It answers with one line of JSON on standard output, its
registration, and says everything else on standard error. The link protocol is described in
docs/explanation/link-protocol.md; `hub_gateway.link` is the other end of it.

Outline: `Settings`, `KernelProcess` (the child), `Ring` (numbered messages that somebody still needs),
`Outlet` (who gets them: peers, sessions, windows), `KernelSockets` (the Jupyter side), `Agent` (the loop).
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

    Frames = List[bytes]
    Event = Dict[str, Any]

VERSION = 1
SHELL, CONTROL, STDIN, IOPUB = range(4)
CHANNELS = ("shell", "control", "stdin", "iopub")
BATCH, LARGE, EVENT = 1, 2, 3
REPLAY = 1
TO_KERNEL, ACK, CALL = 0x10, 0x11, 0x12
DELIMITER = b"<IDS|MSG>"
MAX_PARTS = 254  # header, parent_header, metadata, content and 250 buffers
MESSAGE_BYTES = 512 * 2**20
BATCH_MESSAGES = 512
BATCH_BYTES = 256 * 1024
LARGE_BYTES = 64 * 1024
BURST = 2
RETAIN_BYTES = 8 * 2**20
RETAIN_MESSAGES = 10000
JOINED_TEXT = 1024 * 1024
QUEUE_BYTES = 16 * 2**20
MAX_SESSIONS = 1000
MAX_HAD = 10000
PEER_SECONDS = 30.0
STATE_SECONDS = 0.05
LINGER_SECONDS = 60.0
STEADY_SECONDS = 10.0
KINIT_SECONDS = 30.0
KINIT_LOOK_SECONDS = 0.25
QUIET_SECONDS = 0.2
PARTING_SECONDS = 1.0
UNAWARE_SECONDS = 5.0
PATIENCE_SECONDS = 2.0
PATH_LIMIT = 90
NOBLOCK, RCVMORE = 1, 13  # zmq's numbers: as enums they cost a conversion each time
HEAD = struct.Struct("<BBQH")
FOUR = struct.Struct("<BB4I")
U64 = struct.Struct("<Q")
DROPPABLE = frozenset(("stream", "display_data", "update_display_data", "execute_result", "clear_output"))
KEPT_HINT = "The rest was kept. Print less, or ask the administrator for a larger buffer (ring_bytes)."


class Log:
    """Standard error: what the agent has to say, and what the kernel writes to its stdout and stderr."""

    def __init__(self) -> None:
        self.path = ""
        self.limit = self.size = 0

    def bound(self, path: str, limit: int) -> None:
        """Where it is this file, keep it and the one before it (`path`.1) within `limit` bytes from now on."""
        try:
            found, ours = os.stat(path), os.fstat(2)
        except OSError:
            return  # it goes somewhere else, where somebody else looks after it
        if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
            self.path, self.limit, self.size = path, limit // 2, ours.st_size

    def write(self, data: bytes) -> None:
        """Append to it."""
        try:
            os.write(2, data)
        except OSError:
            return  # nobody reads the log any more; there is no other place to say so
        self.size += len(data)
        if self.path and self.size > self.limit:
            self.turn()

    def turn(self) -> None:
        """Begin a new file; only one before it is kept."""
        self.size = 0
        try:
            os.replace(self.path, self.path + ".1")
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(descriptor, 2)
            os.close(descriptor)
        except OSError:
            try:
                os.ftruncate(2, 0)
            except OSError:
                self.path = ""  # not even that can be done with it


LOG = Log()


def log(text: str) -> None:
    """One line in the log, which the proxy keeps."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    LOG.write(("[agent %s] %s\n" % (stamp, text)).encode("utf-8", "replace"))


class Settings:
    """The configuration document, checked. Durations in seconds, sizes in bytes."""

    DEFAULTS: Dict[str, Any] = {
        "listen": "127.0.0.1",
        "port_first": 0,
        "port_last": 0,
        "transport": "auto",
        "kernel_encryption": "none",
        "register_url": "",
        "ring_bytes": 256 * 2**20,
        "ring_messages": 1000000,
        "window_bytes": 4 * 2**20,
        "orphan_seconds": 3600.0,
        "session_seconds": 86400.0,
        "start_seconds": 60.0,
        "shutdown_seconds": 5.0,
        "stderr_bytes": 16 * 1024,
        "log_bytes": 16 * 2**20,
        "restart_limit": 5,
    }

    def __init__(self, document: Any) -> None:
        """Raises ValueError, with a sentence, for a document that is not understood."""
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ValueError("the configuration on standard input is not a version %d document" % VERSION)
        agent = document.get("agent")
        if not isinstance(agent, dict):
            raise ValueError("the configuration has no section 'agent'")
        self.kernel_id = self._text(document, "kernel_id")
        self.gateway_id = self._text(document, "gateway_id")
        self.epoch = int(document.get("epoch", 0))
        self.kernel_name = str(document.get("kernel_name") or "")
        self.interrupt_mode = str(document.get("interrupt_mode") or "signal")
        self.cwd: Optional[str] = document.get("cwd") or None
        self.runtime_dir = os.path.abspath(self._text(document, "runtime_dir"))
        argv, env = document.get("argv"), document.get("env", {})
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise ValueError("'argv' must be a list of strings that is not empty")
        if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
            raise ValueError("'env' must map names to strings")
        self.argv: List[str] = argv
        self.env: Dict[str, str] = env
        self.client_public_key = self._text(agent, "client_public_key")
        self.launch_token = self._text(agent, "launch_token")
        values = dict(self.DEFAULTS)
        for name, default in self.DEFAULTS.items():
            if agent.get(name) is not None:
                values[name] = type(default)(agent[name])
        self.listen: str = values["listen"]
        self.ports = range(values["port_first"], values["port_last"] + 1) if values["port_first"] else range(0)
        self.transport: str = values["transport"]  # auto until the directories are made
        self.kernel_encryption: str = values["kernel_encryption"]
        self.register_url: str = values["register_url"]
        self.ring_bytes: int = values["ring_bytes"]
        self.ring_messages: int = values["ring_messages"]
        self.window_bytes: int = values["window_bytes"]
        self.orphan_seconds: float = values["orphan_seconds"]
        self.session_seconds: float = values["session_seconds"]
        self.start_seconds: float = values["start_seconds"]
        self.shutdown_seconds: float = values["shutdown_seconds"]
        self.stderr_bytes: int = values["stderr_bytes"]
        self.log_bytes: int = values["log_bytes"]
        self.restart_limit: int = values["restart_limit"]
        if self.register_url and not self.register_url.startswith(("https://", "http://")):
            raise ValueError("'register_url' must be an http or https URL")
        self.linger_seconds = float(agent.get("linger_seconds") or LINGER_SECONDS)
        tickets = document.get("tickets")
        if tickets is not None and not isinstance(tickets, dict):
            raise ValueError("'tickets' must say which file has them, and when they end")
        self.tickets: Optional[Dict[str, Any]] = tickets

    @staticmethod
    def _text(source: Dict[str, Any], name: str) -> str:
        value = source.get(name)
        if not isinstance(value, str) or not value:
            raise ValueError("%r must be a string that is not empty" % name)
        return value


# ---------------------------------------------------------------------------------------------------------------------
# The kernel as a process


def find_packages() -> None:
    """Have pyzmq found, which the interpreter does not know of while it runs with -S.

    To look through site-packages can take as long as all else that comes before the kernel's start.
    """
    if sys.flags.no_site and "site" not in sys.modules:
        import site

        site.main()


def die_with_parent() -> Optional[Callable[[], None]]:
    """A function for the forked child that asks Linux to kill it when the agent dies; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class KernelProcess:
    """One generation of the kernel: its connection file, its process group, the tail of its stderr."""

    def __init__(self, settings: Settings, generation: int, directory: str) -> None:
        self.settings = settings
        self.generation = generation
        self.pid = 0
        self.status: Optional[int] = None
        self.failure = ""
        self.outputs: List[int] = []  # our ends of the pipes that are its stdout and stderr
        self.stderr = -1
        self.tail = bytearray()
        self.key = os.urandom(32).hex()
        self.connection = self._connection(directory)
        # The name carries the kernel id because programs in the kernel find their kernel by it.
        self.connection_file = os.path.join(settings.runtime_dir, "kernel-%s.json" % settings.kernel_id)

    def _connection(self, directory: str) -> Dict[str, Any]:
        names = ("shell_port", "control_port", "stdin_port", "iopub_port", "hb_port")
        connection: Dict[str, Any] = {
            "transport": self.settings.transport,
            "key": self.key,
            "signature_scheme": "hmac-sha256",
            "kernel_name": self.settings.kernel_name,
        }
        if self.settings.transport == "ipc":
            connection["ip"] = os.path.join(directory, "g%d" % self.generation)
            connection.update((name, number) for number, name in enumerate(names, 1))
            return connection
        import socket

        connection["ip"] = "127.0.0.1"
        held = [socket.socket() for _ in names]
        for name, sock in zip(names, held):
            sock.bind(("127.0.0.1", 0))
            connection[name] = sock.getsockname()[1]
        for sock in held:
            sock.close()
        if self.settings.kernel_encryption == "curve":
            find_packages()
            import zmq

            public, secret = zmq.curve_keypair()
            connection.update(curve_publickey=public.decode(), curve_secretkey=secret.decode())
        return connection

    def url(self, channel: int) -> str:
        """The ZeroMQ endpoint of a channel."""
        port = self.connection["%s_port" % CHANNELS[channel]]
        if self.settings.transport == "ipc":
            return "ipc://%s-%d" % (self.connection["ip"], port)
        return "tcp://%s:%d" % (self.connection["ip"], port)

    def start(self) -> str:
        """Start it as the leader of its own session. Returns "" or a sentence that says why it could not be started."""
        try:
            return self._fork()
        except OSError as error:
            # A full disk, no more processes: what is missing now may be there at the next restart.
            return self._not_started(127 << 8, "The kernel cannot be started on its node: %s." % error.strerror)

    def _not_started(self, status: int, failure: str) -> str:
        self.status, self.failure = status, failure
        self.tail += failure.encode("utf-8", "replace")
        return failure

    def _fork(self) -> str:
        write_private(self.connection_file, json.dumps(self.connection))
        argv = [word.replace("{connection_file}", self.connection_file) for word in self.settings.argv]
        env = dict(self.settings.env)
        # ipykernel and others end themselves when this process is no longer their parent.
        env["JPY_PARENT_PID"] = str(os.getpid())
        guard = die_with_parent()
        reader, writer = os.pipe()
        # Not the log itself: nobody could bound what the kernel writes there.
        stdout_reader, stdout_writer = os.pipe()
        stderr_reader, stderr_writer = os.pipe()
        agent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE", "SIGXFSZ", "SIGCHLD"):
                    if hasattr(signal, name):
                        signal.signal(getattr(signal, name), signal.SIG_DFL)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                os.dup2(stdout_writer, 1)
                os.dup2(stderr_writer, 2)
                if guard is not None:
                    guard()
                    if os.getppid() != agent:
                        os._exit(127)
                if self.settings.cwd:
                    os.chdir(self.settings.cwd)
                os.execvpe(argv[0], argv, env)
            except OSError as error:
                os.write(writer, b"%d" % (error.errno or 0))
            except BaseException:  # noqa: BLE001 - a forked copy of the agent must not go on in any case
                os.write(writer, b"0")
            os._exit(127)
        os.close(writer)
        self.pid, self.stderr, self.outputs = pid, stderr_reader, [stdout_reader, stderr_reader]
        for descriptor in (stdout_writer, stderr_writer):
            os.close(descriptor)
        for descriptor in self.outputs:
            os.set_blocking(descriptor, False)
        failure = os.read(reader, 64)
        os.close(reader)
        if not failure:
            return ""
        reason = os.strerror(int(failure)) if int(failure) else "it could not be executed"
        return self._not_started(os.waitpid(pid, 0)[1], self._explain(argv[0], reason))

    def _explain(self, program: str, reason: str) -> str:
        if self.settings.cwd and not os.path.isdir(self.settings.cwd):
            return "The kernel's working directory %s cannot be entered: %s." % (self.settings.cwd, reason)
        return "The kernel's program %s cannot be started: %s." % (program, reason)

    def read_output(self, source: int) -> bool:
        """Pass on what the kernel wrote to stdout or stderr, keep the last of stderr. False at the end of the pipe."""
        for _ in range(16):
            try:
                data = os.read(source, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            LOG.write(data)
            if source != self.stderr:
                continue
            self.tail += data
            if len(self.tail) > self.settings.stderr_bytes:
                del self.tail[: -self.settings.stderr_bytes]
        return True

    def stderr_tail(self) -> str:
        """The last of the kernel's stderr, from the beginning of a line where there is one."""
        text = bytes(self.tail).decode("utf-8", "replace")
        if len(self.tail) >= self.settings.stderr_bytes and "\n" in text:
            text = text.split("\n", 1)[1]
        return text

    def reap(self) -> bool:
        """Whether it has ended; collects the exit status and what else is left of its process group."""
        if self.status is None and self.pid:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0
            if pid:
                self.status = status
                self.kill(signal.SIGKILL)
        return self.status is not None

    def kill(self, signum: int) -> bool:
        """Send a signal to the whole process group."""
        if self.pid <= 0:
            return False  # 0 would be this process's own
        try:
            os.killpg(self.pid, signum)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def result(self) -> Tuple[Optional[int], Optional[int]]:
        """(exit code, signal): as a shell has it, 128 + signal, where a signal ended it."""
        if self.status is None:
            return None, None
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            return 128 + number, number
        return os.WEXITSTATUS(self.status), None

    def close(self, source: Optional[int] = None) -> None:
        """Release a pipe, or both."""
        for descriptor in list(self.outputs) if source is None else [source]:
            self.outputs.remove(descriptor)
            os.close(descriptor)


class Renewal:
    """Renews a TGT in a file by `kinit -R`, at half of its life, until it can be renewed no more.

    kinit works on a copy, which then takes the place of the file: whoever reads it meets the old one or the new one.
    """

    def __init__(self, facts: Dict[str, Any], env: Dict[str, str]) -> None:
        self.path = str(facts["path"])
        self.ends = float(facts["ends"])
        self.life = float(facts["life"])
        self.renew_till = float(facts["renew_till"])
        self.env = dict(os.environ, **env)
        self.aside = self.path + ".new"
        self.process: Any = None
        self.began = 0.0
        self.wait = (self.ends - time.time()) / 2

    def go_on(self) -> Optional[float]:
        """Do what is due; in how many seconds it is to be called again, None for never."""
        now = time.time()
        if self.process is not None:
            if self.process.poll() is None and now - self.began < KINIT_SECONDS:
                return KINIT_LOOK_SECONDS
            self.settle(now)
        elif self.wait <= 0 and now < self.ends:
            self.begin(now)
            return KINIT_LOOK_SECONDS
        if now >= self.ends:
            log("the Kerberos ticket has ended")
            return None
        if self.ends >= self.renew_till - 1:
            log("the Kerberos ticket was renewed for the last time; it ends at %s" % time.ctime(self.ends))
            return None
        seconds, self.wait = max(0.1, self.wait), 0.0
        return seconds

    def begin(self, now: float) -> None:
        """Have kinit renew a copy."""
        import shutil
        import subprocess

        self.began = now
        try:
            self.clear()
            descriptor = os.open(self.aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as copy, open(self.path, "rb") as file:
                shutil.copyfileobj(file, copy)
            command = ["kinit", "-R", "-c", "FILE:" + self.aside]
            # What it says goes to the log.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=self.env)
        except OSError as error:
            log("the Kerberos ticket cannot be renewed: %s" % error)
            self.clear()
            self.again(now)

    def settle(self, now: float) -> None:
        """Take what kinit has made, if it has made anything."""
        process, self.process = self.process, None
        if process.poll() is None:
            process.kill()
            process.wait()
        try:
            if process.returncode == 0:
                os.replace(self.aside, self.path)
                self.ends = min(self.renew_till, self.began + self.life)
                self.wait = (self.ends - now) / 2
                return
            log("kinit could not renew the Kerberos ticket (exit code %d)" % process.returncode)
        except OSError as error:
            log("the renewed Kerberos ticket cannot be put in its place: %s" % error)
        self.clear()
        self.again(now)

    def again(self, now: float) -> None:
        """Try once more, well before the ticket ends."""
        self.wait = min(60.0, max(0.5, (self.ends - now) / 4))

    def clear(self) -> None:
        try:
            os.unlink(self.aside)
        except OSError:
            pass  # there is none

    def stop(self) -> None:
        """Leave no process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def write_private(path: str, text: str) -> None:
    """Write a file with mode 0600, all of it or nothing."""
    temporary = "%s.%d" % (path, os.getpid())
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def describe_exit(code: Optional[int], signum: Optional[int]) -> str:
    """`exit code 137 (SIGKILL; often out of memory)`."""
    if signum is None:
        return "exit code %s" % code
    try:
        name = signal.Signals(signum).name
    except ValueError:
        name = "signal %d" % signum
    return "exit code %s (%s%s)" % (code, name, "; often out of memory" if signum == signal.SIGKILL else "")


# ---------------------------------------------------------------------------------------------------------------------
# Jupyter messages


def now_text() -> str:
    """The time as Jupyter headers have it."""
    moment = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + ".%06dZ" % (moment % 1 * 1e6)


def make_message(session: str, msg_type: str, content: Dict[str, Any], parent: bytes = b"{}") -> Frames:
    """[header, parent_header, metadata, content] of a message of the agent's own."""
    header = {
        "msg_id": os.urandom(16).hex(),
        "msg_type": msg_type,
        "username": "agent",
        "session": session,
        "date": now_text(),
        "version": "5.3",
    }
    return [json.dumps(header).encode(), parent, b"{}", json.dumps(content).encode()]


def load_dict(data: bytes) -> Dict[str, Any]:
    """A JSON object, or {} for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def digest_of(data: bytes) -> bytes:
    """A hash by which something long is known again."""
    import hashlib

    return hashlib.sha256(data).digest()


def text_of(source: Dict[str, Any], name: str) -> str:
    """A string member, or ""."""
    value = source.get(name)
    return value if isinstance(value, str) else ""


def pack_lengths(channel: int, parts: Frames) -> bytes:
    """The head of one message within a frame."""
    if len(parts) == 4:
        return FOUR.pack(channel, 4, len(parts[0]), len(parts[1]), len(parts[2]), len(parts[3]))
    return struct.pack("<BB%dI" % len(parts), channel, len(parts), *map(len, parts))


# ---------------------------------------------------------------------------------------------------------------------
# The ring


class Entry:
    """One link frame's worth of messages: first..last, all for the same receiver."""

    __slots__ = ("count", "dropped", "first", "gone", "head", "last", "next", "payload", "settled", "size", "to")

    def __init__(self, first: int, last: int, to: bytes, head: bytes, payload: Frames, size: int) -> None:
        self.first = first
        self.last = last
        self.to = to
        self.head = head
        self.payload = payload
        self.size = size
        self.count = last - first + 1
        self.next: Optional[Entry] = None
        self.gone = False
        self.settled = False  # looked at by compaction before
        self.dropped = (0, 0)  # a notice: how many messages and bytes it stands for

    def messages(self) -> Iterator[Tuple[int, int, Frames]]:
        """(number, channel, parts) of each message."""
        if self.head[0] == LARGE:
            yield self.first, self.head[HEAD.size], [bytes(memoryview(part)) for part in self.payload]
            return
        offset, position, number = HEAD.size, 0, self.first
        payload = self.payload[0]
        while offset < len(self.head):
            channel, count = self.head[offset], self.head[offset + 1]
            lengths = struct.unpack_from("<%dI" % count, self.head, offset + 2)
            offset += 2 + 4 * count
            parts = []
            for length in lengths:
                parts.append(payload[position : position + length])
                position += length
            yield number, channel, parts
            number += 1


def make_entry(first: int, to: bytes, messages: List[Tuple[int, Frames]]) -> Entry:
    """An entry of (channel, parts) messages, numbered from `first`."""
    last = first + len(messages) - 1
    heads = b"".join([pack_lengths(channel, parts) for channel, parts in messages])
    payload = b"".join([part for _, parts in messages for part in parts])
    return Entry(first, last, to, HEAD.pack(BATCH, 0, last, len(messages)) + heads, [payload], len(payload))


class Ring:
    """What some session has not yet been served, oldest first, bounded in bytes and messages.

    A linked list, so that many readers can stand at different places and old entries are let go by
    dropping the reference to them. `root` is the last entry that was let go.
    """

    def __init__(self, max_bytes: int, max_messages: int, session: str) -> None:
        self.max_bytes = max_bytes
        self.max_messages = max_messages
        self.session = session
        self.root = self.tail = Entry(1, 0, b"", b"", [], 0)
        self.size = 0
        self.messages = 0
        self.due = (max_bytes, max_messages)  # beyond this `compact` is worth its while
        self.floor = 0  # messages up to this number may have been let go unserved
        self.joined_messages = 0
        self.dropped_messages = 0

    @property
    def seq(self) -> int:
        """The number of the newest message."""
        return self.tail.last

    def append(self, entry: Entry) -> None:
        """Add the newest entry."""
        self.tail.next = entry
        self.tail = entry
        self.size += entry.size
        self.messages += entry.count

    @property
    def full(self) -> bool:
        """Whether `compact` is due."""
        return self.size > self.due[0] or self.messages > self.due[1]

    def trim(self, cursor: int, size: int = 0, messages: int = 0) -> None:
        """Let go of what is numbered up to `cursor`, but not below this size."""
        entry = self.root.next
        while entry is not None and entry.last <= cursor and (self.size > size or self.messages > messages):
            self.size -= entry.size
            self.messages -= entry.count
            self.root = entry
            entry = entry.next
        if self.size * 2 < self.max_bytes and self.messages * 2 < self.max_messages:
            self.due = (self.max_bytes, self.max_messages)

    def after(self, cursor: int) -> Entry:
        """The last entry that a reader who has everything up to `cursor` needs no more."""
        found = self.root
        entry = found.next
        while entry is not None and entry.last <= cursor:
            found, entry = entry, entry.next
        return found

    def weigh(self, place: Entry) -> Tuple[int, int]:
        """(bytes, messages) after `place`."""
        size = messages = 0
        entry = place.next
        while entry is not None:
            size += entry.size
            messages += entry.count
            entry = entry.next
        return size, messages

    def settle(self) -> None:
        """Say when `compact` will be due again: not before something has come, or it would run all the time."""
        self.due = (
            max(self.max_bytes, self.size + self.max_bytes // 8),
            max(self.max_messages, self.messages + self.max_messages // 8),
        )

    def discard_oldest(self, last: int, size: int, messages: int) -> None:
        """Give up entries of any kind up to number `last`, down to this size: the very last resort."""
        entry = self.root.next
        while entry is not None and entry.last <= last and (self.size > size or self.messages > messages):
            self.dropped_messages += entry.count
            self.floor = entry.last
            self.trim(entry.last)
            entry = entry.next

    def compact(self, barriers: Set[int], last: int, size: int, messages: int) -> None:
        """Make room, down to this size, among what is numbered up to `last`; replies, status, errors and comm stay.

        First the oldest `stream` messages of one parent are joined, then the oldest output gives way to
        one notice per gap. Nothing is joined across a number in `barriers` (how far somebody has been
        served), so that nobody gets anything twice. Readers must find their place again by number.
        """
        for step in (self._join, self._drop):
            before, entry = self.root, self.root.next
            while entry is not None and entry.last <= last and (self.size > size or self.messages > messages):
                before, entry = step(before, entry, barriers)

    def _replace(self, before: Entry, first: Entry, last: Entry, entries: List[Entry]) -> Entry:
        """Put `entries` in place of first..last; returns the last of them (or `before`)."""
        node: Optional[Entry] = first
        while node is not None:
            node.gone = True
            self.size -= node.size
            self.messages -= node.count
            if node is last:
                break
            node = node.next
        following = last.next
        for entry in entries:
            entry.settled = True
            self.size += entry.size
            self.messages += entry.count
            before.next = entry
            before = entry
        before.next = following
        if self.tail is last:
            self.tail = before
        return before

    def _join(self, before: Entry, entry: Entry, barriers: Set[int]) -> Tuple[Entry, Optional[Entry]]:
        """Join `stream` messages in `entry` and its followers, as far as they belong together."""
        if entry.settled or entry.to:
            return entry, entry.next
        # A few entries at a time, so that joins may span them.
        last, budget = entry, 4 * JOINED_TEXT
        while last.next is not None and last.next is not self.tail and not last.next.settled and not last.next.to:
            budget -= last.size
            if budget < 0:
                break
            last = last.next
        runs: List[Tuple[int, int, Frames]] = []
        text: List[str] = []
        key: Optional[Tuple[bytes, str]] = None
        length = 0

        def finish() -> None:
            if len(text) > 1 and key is not None:
                number, channel, parts = runs[-1]
                content = json.dumps({"name": key[1], "text": "".join(text)}).encode()
                runs[-1] = (number, channel, [*parts[:3], content])
                self.joined_messages += len(text) - 1

        node: Optional[Entry] = entry
        previous = 0
        while node is not None:
            for number, channel, parts in node.messages():
                found = self._stream(channel, parts)
                fits = length < JOINED_TEXT and previous not in barriers
                if found is not None and key == (parts[1], found[0]) and fits:
                    runs[-1] = (number, channel, parts)
                    text.append(found[1])
                    length += len(found[1])
                else:
                    finish()
                    runs.append((number, channel, parts))
                    key = (parts[1], found[0]) if found is not None else None
                    text = [found[1]] if found is not None else []
                    length = len(text[0]) if text else 0
                previous = number
            if node is last:
                break
            node = node.next
        finish()
        end = self._replace(before, entry, last, self._entries(runs))
        return end, end.next

    @staticmethod
    def _stream(channel: int, parts: Frames) -> Optional[Tuple[str, str]]:
        """(name, text) of a `stream` message that can be joined."""
        if channel != IOPUB or len(parts) != 4 or b'"stream"' not in parts[0]:
            return None
        content = load_dict(parts[3])
        name, text = content.get("name"), content.get("text")
        if isinstance(name, str) and isinstance(text, str) and load_dict(parts[0]).get("msg_type") == "stream":
            return name, text
        return None

    @staticmethod
    def _entries(runs: List[Tuple[int, int, Frames]], to: bytes = b"") -> List[Entry]:
        """Entries of messages with these numbers: a new one wherever the numbers have a gap."""
        entries: List[Entry] = []
        group: List[Tuple[int, Frames]] = []
        first = size = 0
        for number, channel, parts in runs:
            length = sum(map(len, parts))
            if group and (number != first + len(group) or size + length > BATCH_BYTES or len(group) >= BATCH_MESSAGES):
                entries.append(make_entry(first, to, group))
                group, size = [], 0
            if not group:
                first = number
            group.append((channel, parts))
            size += length
        if group:
            entries.append(make_entry(first, to, group))
        return entries

    def _drop(self, before: Entry, entry: Entry, barriers: Set[int]) -> Tuple[Entry, Optional[Entry]]:
        """Replace the output in `entry` by notices, extending a notice just before it."""
        if entry.to or entry is self.tail or entry.dropped[0]:
            return entry, entry.next
        result: List[Entry] = []
        kept: List[Tuple[int, int, Frames]] = []
        gap: Optional[Tuple[int, int, int, bytes]] = None
        extends = before if before.dropped[0] and before is not self.root and before.last not in barriers else None
        if extends is not None:
            gap = (extends.last, extends.dropped[0], extends.dropped[1], b"{}")

        def close_gap() -> None:
            nonlocal gap
            if gap is not None:
                result.append(self._notice(*gap))
                gap = None

        changed = False
        for number, channel, parts in entry.messages():
            if channel == IOPUB and load_dict(parts[0]).get("msg_type") in DROPPABLE:
                result.extend(self._entries(kept))
                kept = []
                size = sum(map(len, parts))
                count, total = (gap[1], gap[2]) if gap is not None else (0, 0)
                gap = (number, count + 1, total + size, parts[1])
                self.dropped_messages += 1
                changed = True
            else:
                if changed:
                    close_gap()
                else:
                    extends = gap = None
                kept.append((number, channel, parts))
        if not changed:
            return entry, entry.next
        result.extend(self._entries(kept))
        close_gap()
        if extends is None:
            end = self._replace(before, entry, entry, result)
        else:
            end = self._replace(self._before(extends), extends, entry, result)
        return end, end.next

    def _before(self, entry: Entry) -> Entry:
        node = self.root
        while node.next is not None and node.next is not entry:
            node = node.next
        return node

    def _notice(self, number: int, count: int, size: int, parent: bytes) -> Entry:
        """A `stream` message that stands for messages that were dropped."""
        what = "%d output message%s (%.1f MB)" % (count, "" if count == 1 else "s", size / 1e6)
        text = "\n[%s dropped here: the buffer for output that nobody fetched was full. %s]\n" % (what, KEPT_HINT)
        message = make_message(self.session, "stream", {"name": "stderr", "text": text}, parent)
        entry = make_entry(number, b"", [(IOPUB, message)])
        entry.dropped = (count, size)
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# Who gets what


class Session:
    """One client session (a websocket's session_id): how far it has been served, and by whom."""

    __slots__ = ("away_since", "cursor", "facts", "keep", "name", "peer", "place", "state")

    def __init__(self, name: bytes, cursor: int) -> None:
        self.name = name
        self.cursor = cursor
        self.keep = True
        self.peer: Optional[Peer] = None
        self.state = "away"  # away, replay, live, paused
        self.place: Optional[Entry] = None  # where its replay stands
        self.away_since = time.monotonic()
        self.facts: Event = {}  # what `attaching` and `attached` say


class Peer:
    """One gateway connection."""

    __slots__ = ("acked", "epoch", "live", "name", "place", "replays", "seen", "sent", "sessions", "unaware")

    def __init__(self, name: bytes, epoch: int, place: Entry) -> None:
        self.unaware = 0.0  # until then, or until it says so, it may not know that the kernel died
        self.name = name
        self.epoch = epoch
        self.place = place  # the last entry that was sent live, or passed over
        self.sent = 0
        self.acked = 0
        self.seen = time.monotonic()
        self.sessions: Dict[bytes, Session] = {}
        self.live = 0
        self.replays: List[Session] = []


class Outlet:
    """Numbers messages and sends each to the sessions that it is for, within every peer's window.

    `send(frames)` hands one multipart message to the link and returns False where the peer is gone.
    """

    def __init__(self, settings: Settings, send: Callable[[Frames], bool], own_session: str) -> None:
        self.settings = settings
        self.send = send
        self.ring = Ring(settings.ring_bytes, settings.ring_messages, own_session)
        self.retained = min(RETAIN_BYTES, settings.ring_bytes // 8), min(RETAIN_MESSAGES, settings.ring_messages // 8)
        self.peers: Dict[bytes, Peer] = {}
        self.sessions: Dict[bytes, Session] = {}

    # -- publishing

    def batch(self, to: bytes, heads: Frames, parts: Frames, count: int, size: int) -> None:
        """Publish `count` small messages to every session (`to` empty) or to one."""
        ring = self.ring
        first = ring.tail.last + 1
        last = first + count - 1
        head = HEAD.pack(BATCH, 0, last, count) + b"".join(heads)
        self._publish(Entry(first, last, to, head, [b"".join(parts)], size))

    def large(self, to: bytes, channel: int, parts: Frames, size: int) -> None:
        """Publish one message as its own parts."""
        number = self.ring.tail.last + 1
        head = HEAD.pack(LARGE, 0, number, 1) + pack_lengths(channel, parts)
        self._publish(Entry(number, number, to, head, parts, size))

    def message(self, channel: int, parts: Frames, to: bytes = b"") -> None:
        """Publish one message of the agent's own."""
        self.batch(to, [pack_lengths(channel, parts)], parts, 1, sum(map(len, parts)))

    def _publish(self, entry: Entry) -> None:
        ring = self.ring
        previous = ring.tail
        ring.append(entry)
        if not self.sessions:
            ring.trim(entry.last)
            for peer in self.peers.values():
                peer.place = entry
            return
        window = self.settings.window_bytes
        for peer in list(self.peers.values()):
            if peer.place is previous and not peer.replays and peer.sent - peer.acked <= window:
                peer.place = entry
                if self._wanted(peer, entry):
                    self._send(peer, entry.to, entry.head, entry)
            else:
                self.pump(peer)
        if ring.full:
            self._make_room()

    @staticmethod
    def _wanted(peer: Peer, entry: Entry) -> bool:
        if not entry.to:
            return peer.live > 0
        session = peer.sessions.get(entry.to)
        return session is not None and session.state == "live"

    def _send(self, peer: Peer, to: bytes, head: bytes, entry: Entry) -> bool:
        peer.sent += entry.size
        if self.send([peer.name, to, head, *entry.payload]):
            return True
        self.forget_peer(peer)
        return False

    def event(self, peer: Peer, event: Event, to: bytes = b"") -> None:
        """Send an event, outside of the window."""
        if not self.send([peer.name, to, b"\x03" + json.dumps(event).encode()]):
            self.forget_peer(peer)

    def broadcast(self, event: Event) -> None:
        """Send an event to every peer."""
        for peer in list(self.peers.values()):
            self.event(peer, event)

    def pump(self, peer: Peer) -> None:
        """Send what a peer's window has room for: live entries and replays in turn."""
        window = self.settings.window_bytes
        while peer.name in self.peers:
            if not peer.live:
                peer.place = self.ring.tail
            busy = False
            for session in list(peer.replays):
                if session.place is None or session.place.last >= peer.place.last:
                    self._replayed(peer, session)
                    busy = True
                elif peer.sent - peer.acked <= window:
                    busy = True
                    entry = session.place = session.place.next
                    if entry is None:
                        self._replayed(peer, session)
                    elif entry.to in (b"", session.name):
                        head = entry.head[:1] + b"\x01" + entry.head[2:]
                        if not self._send(peer, session.name, head, entry):
                            return
            if peer.place.next is not None and peer.sent - peer.acked <= window:
                busy = True
                peer.place = peer.place.next
                if self._wanted(peer, peer.place) and not self._send(peer, peer.place.to, peer.place.head, peer.place):
                    return
            if not busy:
                return

    def _replayed(self, peer: Peer, session: Session) -> None:
        """A replay has reached the place where the peer stands: from here on the session is live."""
        peer.replays.remove(session)
        session.place = None
        session.state = "live"
        peer.live += 1
        self.event(peer, dict(session.facts, event="attached", seq=peer.place.last), session.name)

    # -- room

    def _make_room(self) -> None:
        """Bring the ring back to its limits.

        What a connected client still waits for does not count up to `BURST` times the limit: it goes out as fast
        as the link takes it. What only absent or slow clients have not got is joined, then dropped.
        """
        ring = self.ring
        limit, count = ring.max_bytes, ring.max_messages
        barriers = {session.cursor for session in self.sessions.values()}
        readers = [peer.place.last for peer in self.peers.values()]
        replays = [session for session in self.sessions.values() if session.place is not None]
        barriers.update(readers, [session.place.last for session in replays if session.place is not None])
        waited = [peer.place for peer in self.peers.values() if peer.live]
        waited += [session.place for session in replays if session.place is not None]
        place = min(waited, key=lambda entry: entry.last) if waited else ring.tail
        served = place.last
        size, messages = ring.weigh(place)
        if ring.size - size > limit or ring.messages - messages > count:
            ring.compact(barriers, served, size + limit * 3 // 4, messages + count * 3 // 4)
        if ring.size - size > 2 * limit or ring.messages - messages > 2 * count:
            # What is never dropped is too much: first those who are not there, then the oldest, whoever needs it.
            away = [session for session in self.sessions.values() if session.state == "away"]
            for session in sorted(away, key=lambda one: one.cursor):
                if ring.size - size > limit or ring.messages - messages > count:
                    log("the buffer is full; session %r is given up" % session.name)
                    self.forget(session)
                    self.trim()
            ring.discard_oldest(served, size + limit, messages + count)
        if ring.size > BURST * limit or ring.messages > BURST * count:
            ring.compact(barriers, ring.seq, (BURST - 1) * limit, (BURST - 1) * count)
            ring.discard_oldest(ring.seq, 2 * BURST * limit, 2 * BURST * count)
        ring.settle()
        for peer, reader in zip(list(self.peers.values()), readers):
            peer.place = self.ring.after(reader)
        for session in replays:
            if session.place is not None:
                session.place = self.ring.after(session.place.last)

    def trim(self) -> None:
        """Let go of what every session has been served.

        The newest of it stays: what was handed to a socket may yet be lost on its way, and a client that
        numbers what it gets can then ask for it again.
        """
        if self.sessions:
            self.ring.trim(min([session.cursor for session in self.sessions.values()]), *self.retained)
        else:
            self.ring.trim(self.ring.seq)

    # -- peers and sessions

    def greet(self, name: bytes, epoch: int) -> Peer:
        """A peer, made known if it was not."""
        peer = self.peers.get(name)
        if peer is None:
            peer = self.peers[name] = Peer(name, epoch, self.ring.tail)
        peer.epoch = epoch
        return peer

    def forget_peer(self, peer: Peer) -> None:
        """It is gone: its sessions are away from now on, or forgotten where they asked for that."""
        if self.peers.pop(peer.name, None) is None:
            return
        for session in list(peer.sessions.values()):
            self.detach(session, forget=not session.keep)
        self.trim()

    def attach(self, peer: Peer, name: bytes, after: Optional[int], keep: bool, ident: Any = None) -> None:
        """Serve a session through this peer: replay from its cursor, then live.

        `attaching` goes out before the replay and `attached` after it, both with the caller's `ident`, so that
        the caller can tell what was under way to the session before from what belongs to this attachment.
        """
        ring = self.ring
        # A number that was never given is another ring's.
        start = after if after is not None and 0 <= after <= ring.seq else None
        session = self.sessions.get(name)
        if session is None:
            session = self._admit(name, ring.seq if start is None else start)
        else:
            old = session.peer
            self._unlink(session)
            if old is not None and old is not peer:
                self.event(old, {"event": "moved", "session": name.decode("utf-8", "replace")}, name)
        if start is None:
            start = session.cursor
        # What lies between them may still be on its way to the client: only an acknowledgement moves the cursor up.
        session.cursor = min(session.cursor, start)
        floor = max(ring.root.last, ring.floor)
        session.keep = keep
        session.peer = peer
        session.state = "replay"
        session.place = ring.after(start)
        peer.sessions[name] = session
        peer.replays.append(session)
        session.facts = {
            "session": name.decode("utf-8", "replace"),
            "id": ident,
            "from": start,
            "lost": max(0, floor - start),
        }
        self.event(peer, dict(session.facts, event="attaching", seq=ring.seq), name)
        self.pump(peer)

    def expect(self, name: bytes) -> None:
        """A session whose client is away, and for which there will be something: keep what comes from now on."""
        if name not in self.sessions:
            self._admit(name, self.ring.seq)

    def _admit(self, name: bytes, cursor: int) -> Session:
        if len(self.sessions) >= MAX_SESSIONS:
            away = [one for one in self.sessions.values() if one.state == "away"]
            if away:
                self.forget(min(away, key=lambda one: one.away_since))
        session = self.sessions[name] = Session(name, cursor)
        return session

    def _unlink(self, session: Session) -> None:
        peer = session.peer
        if peer is not None:
            peer.sessions.pop(session.name, None)
            if session.state == "live":
                peer.live -= 1
            elif session.state == "replay":
                peer.replays.remove(session)
        session.peer = session.place = None
        session.state = "away"
        session.away_since = time.monotonic()

    def pause(self, peer: Peer, name: bytes) -> None:
        """Stop sending to a session of this peer; its cursor stays."""
        session = peer.sessions.get(name)
        if session is not None:
            self._unlink(session)
            session.peer = peer
            session.state = "paused"
            peer.sessions[name] = session
            self.pump(peer)

    def detach(self, session: Session, forget: bool) -> None:
        """A session is not served any more; its cursor is kept unless it is to be forgotten."""
        if forget:
            self.forget(session)
        else:
            self._unlink(session)
        self.trim()

    def forget(self, session: Session) -> None:
        """Drop a session and its cursor."""
        self._unlink(session)
        self.sessions.pop(session.name, None)

    def acknowledge(self, peer: Peer, processed: int, cursors: List[Tuple[bytes, int]]) -> None:
        """A peer has worked off `processed` bytes in all, and served sessions up to these numbers."""
        if peer.acked < processed <= peer.sent:
            peer.acked = processed
        moved = False
        for name, cursor in cursors:
            session = peer.sessions.get(name)
            if session is not None and session.cursor < cursor <= self.ring.seq:
                session.cursor = cursor
                moved = True
        if moved:
            self.trim()
        if peer.place.next is not None or peer.replays:
            self.pump(peer)

    def expire(self, now: float) -> None:
        """Forget peers that have been silent and sessions that have been away for too long."""
        for peer in list(self.peers.values()):
            if now - peer.seen > PEER_SECONDS:
                log("no word from a gateway for %d s; it is forgotten" % PEER_SECONDS)
                self.forget_peer(peer)
        for session in list(self.sessions.values()):
            if session.state == "away" and now - session.away_since > self.settings.session_seconds:
                self.forget(session)
        self.trim()
        if self.ring.size > self.ring.max_bytes or self.ring.messages > self.ring.max_messages:
            self._make_room()


# ---------------------------------------------------------------------------------------------------------------------
# The Jupyter side


class KernelSockets:
    """shell, control, stdin and iopub of one kernel generation."""

    def __init__(self, context: Any, kernel: KernelProcess) -> None:
        import hashlib
        import hmac

        import zmq

        self.compare = hmac.compare_digest
        self.hmac = hmac.new(kernel.key.encode(), digestmod=hashlib.sha256)
        # Whoever reaches the ipc socket is the kernel's own user; a loopback port may have been taken by anybody.
        self.verify = kernel.settings.transport != "ipc"
        self.again = zmq.Again
        self.pair = zmq.PAIR
        self.context = context
        self.generation = kernel.generation
        self.sockets: List[Any] = []
        self.monitors: List[Any] = []
        self.watched_to_end = False
        identity = b"agent-%d" % kernel.generation
        for channel in range(4):
            sock = context.socket(zmq.SUB if channel == IOPUB else zmq.DEALER)
            sock.linger = 0
            sock.rcvhwm = sock.sndhwm = 0
            sock.reconnect_ivl = 20
            if "curve_publickey" in kernel.connection:
                # jupyter_client's convention: one key pair for both sides.
                sock.curve_serverkey = sock.curve_publickey = kernel.connection["curve_publickey"].encode()
                sock.curve_secretkey = kernel.connection["curve_secretkey"].encode()
            if channel == IOPUB:
                sock.subscribe(b"")
            else:
                sock.identity = identity  # the same on all: a kernel asks for input at the identity that it serves
            sock.connect(kernel.url(channel))
            self.sockets.append(sock)

    def sign(self, parts: Frames) -> bytes:
        """The signature of [header, parent_header, metadata, content]."""
        digest = self.hmac.copy()
        for part in parts[:4]:
            digest.update(part)
        return digest.hexdigest().encode()

    def send(self, channel: int, parts: Frames) -> None:
        """Sign a message and send it to the kernel."""
        self.sockets[channel].send_multipart([DELIMITER, self.sign(parts), *parts], copy=False)

    def receive(self, channel: int) -> Any:
        """[header, parent_header, metadata, content, *buffers] of the next message, or None for a bad one.

        Raises `zmq.Again` where there is none. Parts of 64 KiB and more may be frames as ZeroMQ received them.
        """
        sock = self.sockets[channel]
        parts: List[Any] = [sock.recv(NOBLOCK)]
        try:
            parts.append(sock.recv(NOBLOCK))
            if parts[1] == DELIMITER:
                # As every message of a good kernel is: asking ZeroMQ after each part whether there is another
                # would cost four times as much as the parts do.
                receive = sock.recv
                signature, header, parent = receive(NOBLOCK), receive(NOBLOCK), receive(NOBLOCK)
                metadata, content = receive(NOBLOCK), receive(NOBLOCK, False)
                body = [header, parent, metadata, content if len(content) >= LARGE_BYTES else content.bytes]
                while content.more:
                    content = receive(NOBLOCK, False)
                    body.append(content if len(content) >= LARGE_BYTES else content.bytes)
                if signature == DELIMITER or DELIMITER in body[:4]:
                    return None  # it was too short, and this is the next one
                return body if self.good(signature, body) else None
            while sock.get(RCVMORE):
                parts.append(sock.recv(NOBLOCK))
        except self.again:
            return None
        try:
            start = parts.index(DELIMITER) + 2
        except ValueError:
            return None
        body = parts[start:]
        return body if len(body) >= 4 and self.good(parts[start - 1], body) else None

    def good(self, signature: bytes, body: Any) -> bool:
        """Whether the signature is right, where it matters."""
        return not self.verify or self.compare(self.sign(body), signature)

    def watch_end(self) -> None:
        """From now on ZeroMQ says when a connection has ended. Not before the kernel is ready: that would cost time."""
        for channel, sock in enumerate(self.sockets):
            address = "inproc://end-%d-%d" % (self.generation, channel)
            sock.monitor(address, 0x0200)  # DISCONNECTED
            monitor = self.context.socket(self.pair)
            monitor.linger = 0
            monitor.connect(address)
            self.monitors.append(monitor)

    def ended(self) -> bool:
        """Whether ZeroMQ has read to the end of every connection, so that a socket without a message is empty."""
        for monitor in list(self.monitors):
            try:
                monitor.recv_multipart(NOBLOCK)
            except self.again:
                return False
            self.monitors.remove(monitor)
            monitor.close(0)
            self.watched_to_end = True
        return self.watched_to_end

    def close(self) -> None:
        """Close all four."""
        for sock in self.monitors + self.sockets:
            sock.close(0)


# ---------------------------------------------------------------------------------------------------------------------
# What gateways say


def parse_command(frames: Frames) -> Tuple[str, Any]:
    """What a gateway's message says, without its routing prefix; ValueError for anything malformed.

    ("probe", None), ("kernel", (session, channel, origin, parts)), ("ack", (processed, cursors)) or ("call", dict).
    """
    if frames == [b""]:
        return "probe", None
    if not frames or len(frames[0]) != 1:
        raise ValueError("no kind")
    kind = frames[0][0]
    if kind == TO_KERNEL:
        if len(frames) < 8 or len(frames) > 4 + MAX_PARTS or len(frames[2]) != 1 or frames[2][0] >= IOPUB:
            raise ValueError("bad request")
        return "kernel", (frames[1], frames[2][0], frames[3], frames[4:])
    if kind == ACK:
        if len(frames) % 2 or len(frames[1]) != 8 or any(len(cursor) != 8 for cursor in frames[3::2]):
            raise ValueError("bad acknowledgement")
        cursors = [(name, U64.unpack(cursor)[0]) for name, cursor in zip(frames[2::2], frames[3::2])]
        return "ack", (U64.unpack(frames[1])[0], cursors)
    if kind == CALL and len(frames) == 2:
        call = load_dict(frames[1])
        if isinstance(call.get("op"), str):
            return "call", call
    raise ValueError("unknown kind")


class Pending:
    """A client's request that the kernel has not finished."""

    __slots__ = ("busy", "channel", "header", "idle", "late", "msg_type", "replied", "session")

    def __init__(self, session: bytes, channel: int, header: bytes, msg_type: str) -> None:
        self.session = session
        self.channel = channel
        self.header = header
        self.msg_type = msg_type
        self.busy = False
        self.idle = False
        self.late = False  # it came when the kernel was dead already
        # Messages that are not requests (comm_msg) have no reply.
        self.replied = not msg_type.endswith("_request")


class Agent:
    """The loop: kernel, link, timers. One thread."""

    def __init__(self, settings: Settings, directory: str) -> None:
        self.settings = settings
        self.directory = directory
        self.session = os.urandom(16).hex()
        self.own = self.session.encode()
        self.generation = 1
        self.kernel = KernelProcess(settings, 1, directory)
        self.phase = "starting"  # starting, running, restarting, stopping, dead
        self.epoch = settings.epoch
        self.running = True
        self.timers: Dict[str, Tuple[float, Callable[[], None]]] = {}
        self.contact = time.monotonic()
        # What the kernel does.
        self.info_seen = False
        self.iopub_live = False
        self.nudges: Set[str] = set()
        self.busy: Set[str] = set()
        self.pending: Dict[str, Pending] = {}
        self.origins: Dict[bytes, bytes] = {}
        self.had: Dict[bytes, None] = {}  # the newest messages of clients, in the order in which they came
        self.queue: List[Tuple[bytes, int, Frames]] = []
        self.queued = 0
        self.ready_at = 0.0
        self.restarts = 0
        self.ending = False  # told to end, and not yet gone
        self.cut_parent = b""  # of the last message that was not passed on whole
        self.death = ""  # how the last kernel ended
        self.verdict = ""  # why this one was killed
        self.parting: Optional[Tuple[float, Optional[float]]] = None  # dead, and not yet read to the end: see `part`
        self.restarts_in_a_row = 0
        self.activity = time.time()
        self.said_state: Tuple[str, float] = ("", 0.0)
        # (peer, id, operation) of calls to answer when the kernel is up or gone
        self.waiting: List[Tuple[bytes, Any, str]] = []
        self.last_exit: Optional[Event] = None
        self.counters = {"refused_peers": 0, "failed_handshakes": 0, "bad_frames": 0, "unrouted_replies": 0}
        self.counters["repeated_requests"] = 0
        self.sockets: Optional[KernelSockets] = None
        self.renewal = Renewal(settings.tickets, settings.env) if settings.tickets else None
        self.wake = -1

    # -- set-up

    def heed_signals(self) -> None:
        """Have the loop told of signals, also of those that come before it runs."""
        self.wake, writer = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def open(self) -> Dict[str, Any]:
        """Bind the link. Returns the registration."""
        import zmq
        from zmq.utils import z85

        self.zmq = zmq
        self.context = zmq.Context()
        self.client_key = z85.decode(self.settings.client_public_key.encode())
        self.zap = self.context.socket(zmq.REP)
        self.zap.linger = 0
        self.zap.bind("inproc://zeromq.zap.01")
        public, secret = zmq.curve_keypair()
        link = self.link = self.context.socket(zmq.ROUTER)
        link.linger = 0
        link.rcvhwm = link.sndhwm = 0
        link.router_mandatory = True
        link.curve_server = True
        link.curve_secretkey, link.curve_publickey = secret, public
        link.zap_domain = b"kernel"
        link.handshake_ivl = 5000
        link.setsockopt(zmq.HEARTBEAT_IVL, 10000)
        link.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30000)
        if ":" in self.settings.listen:
            link.ipv6 = True
        # HANDSHAKE_FAILED_NO_DETAIL, _PROTOCOL, _AUTH
        self.monitor = link.get_monitor_socket(0x0800 | 0x2000 | 0x4000)
        host = "[%s]" % self.settings.listen if ":" in self.settings.listen else self.settings.listen
        port = self.bind("tcp://%s" % host)
        self.outlet = Outlet(self.settings, self.transmit, self.session)
        self.poller = zmq.Poller()
        self.handlers: Dict[Any, Callable[[], None]] = {}
        self.watch(self.link, self.on_link)
        self.watch(self.zap, self.on_zap)
        self.watch(self.monitor, self.on_monitor)
        self.watch(self.wake, self.on_signal)
        registration = {
            "version": VERSION,
            "kernel_id": self.settings.kernel_id,
            "gateway_id": self.settings.gateway_id,
            "epoch": self.settings.epoch,
            "pid": os.getpid(),
            "host": public_host(self.settings),
            "port": port,
            "public_key": public.decode(),
        }
        registration["proof"] = make_proof(self.settings, registration)
        return registration

    def bind(self, address: str) -> int:
        """Bind the link to a free port: any, or one of those that are allowed, from a random one on."""
        if not self.settings.ports:
            return int(self.link.bind_to_random_port(address))
        ports = list(self.settings.ports)
        first = int.from_bytes(os.urandom(4), "big") % len(ports)
        for port in ports[first:] + ports[:first]:
            try:
                self.link.bind("%s:%d" % (address, port))
                return port
            except self.zmq.ZMQError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        raise OSError(errno.EADDRINUSE, "no port of %d to %d is free" % (ports[0], ports[-1]))

    def transmit(self, frames: Frames) -> bool:
        """Send to a peer; False where it is not connected any more."""
        try:
            self.link.send_multipart(frames, copy=False)
        except self.zmq.ZMQError as error:
            if error.errno != self.zmq.EHOSTUNREACH:
                raise
            return False
        return True

    # -- the loop

    def run(self, started: str) -> None:
        """Serve until the kernel has ended for good. `started` is why the kernel could not be started, or ""."""
        self.on_expire()
        self.look_after_tickets()
        if started:
            self.failed(started)
        else:
            self.connect_kernel()
            self.look_after_kernel()  # it may have ended before its signal could be told to the loop
        handlers, poll = self.handlers, self.poller.poll
        while self.running:
            deadline = min([due for due, _ in self.timers.values()]) if self.timers else None
            timeout = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
            for source, _ in poll(timeout):
                handler = handlers.get(source)
                if handler is not None:  # closed by an earlier one of this round
                    handler()
            if deadline is not None and time.monotonic() >= deadline:
                now = time.monotonic()
                for name, (due, action) in list(self.timers.items()):
                    if due <= now and self.timers.get(name) == (due, action):
                        del self.timers[name]
                        action()

    def watch(self, source: Any, handler: Callable[[], None]) -> None:
        """Call `handler` whenever a socket or descriptor is readable."""
        self.poller.register(source, self.zmq.POLLIN)
        self.handlers[source] = handler

    def unwatch(self, source: Any) -> None:
        """Look at it no more."""
        if self.handlers.pop(source, None) is not None:
            self.poller.unregister(source)

    def after(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` once, later. A timer of the same name is replaced."""
        self.timers[name] = (time.monotonic() + seconds, action)

    def cancel(self, *names: str) -> None:
        """Forget timers."""
        for name in names:
            self.timers.pop(name, None)

    def on_signal(self) -> None:
        try:
            numbers = os.read(self.wake, 4096)
        except BlockingIOError:
            return
        self.look_after_kernel()
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self.shut_down()

    def on_output(self, source: int) -> None:
        if not self.kernel.read_output(source):
            self.unwatch(source)
            self.kernel.close(source)

    def on_zap(self) -> None:
        """Answer one authentication request (RFC 27): the gateway's key and no other."""
        import hmac

        frames = self.zap.recv_multipart()
        good = len(frames) == 7 and frames[5] == b"CURVE" and hmac.compare_digest(frames[6], self.client_key)
        if not good:
            self.counters["refused_peers"] += 1
        verdict = [b"200", b"OK"] if good else [b"400", b"unknown key"]
        self.zap.send_multipart(frames[:2] + verdict + [b"", b""])

    def on_monitor(self) -> None:
        for _ in range(200):
            try:
                self.monitor.recv_multipart(self.zmq.NOBLOCK)
            except self.zmq.Again:
                return
            self.counters["failed_handshakes"] += 1

    def on_expire(self) -> None:
        now = time.monotonic()
        self.outlet.expire(now)
        if now - self.contact > self.settings.orphan_seconds and self.phase != "stopping":
            log("no gateway for %d s: the kernel is shut down" % self.settings.orphan_seconds)
            self.shut_down()
        self.after("expire", min(5.0, max(0.1, self.settings.orphan_seconds / 4)), self.on_expire)

    def look_after_tickets(self) -> None:
        """Have the kernel's Kerberos tickets renewed in time."""
        seconds = None if self.renewal is None else self.renewal.go_on()
        if seconds is not None:
            self.after("tickets", seconds, self.look_after_tickets)

    # -- the kernel's messages

    def connect_kernel(self) -> None:
        """Open sockets to the kernel and ask whether it is there."""
        self.sockets = KernelSockets(self.context, self.kernel)
        for channel, sock in enumerate(self.sockets.sockets):
            self.watch(sock, functools.partial(self.drain, channel))
        for source in self.kernel.outputs:
            self.watch(source, functools.partial(self.on_output, source))
        self.info_seen = self.iopub_live = False
        self.nudge()

    def disconnect_kernel(self) -> None:
        for source in list(self.kernel.outputs):
            self.unwatch(source)
            self.kernel.read_output(source)
            self.kernel.close(source)
        if self.sockets is not None:
            for sock in self.sockets.sockets:
                self.unwatch(sock)
            self.sockets.close()
            self.sockets = None
        self.busy.clear()
        self.nudges.clear()

    def ask(self, channel: int, msg_type: str, content: Dict[str, Any]) -> None:
        """Send a request of the agent's own; what comes of it is not passed on."""
        if self.sockets is not None and self.parting is None:
            parts = make_message(self.session, msg_type, content)
            self.nudges.add(load_dict(parts[0])["msg_id"])
            self.sockets.send(channel, parts)

    def nudge(self) -> None:
        """Ask for kernel_info until it has answered and iopub is known to be live."""
        if self.phase in ("starting", "restarting") and not (self.info_seen and self.iopub_live):
            self.ask(SHELL, "kernel_info_request", {})
            self.after("nudge", 0.2 if self.info_seen else 5.0, self.nudge)

    def drain(self, channel: int) -> bool:  # noqa: C901 - in one piece: this is the hot path
        """Take what a kernel socket has, up to one batch, and publish it. False where it had nothing."""
        sockets = self.sockets
        if sockets is None:
            return False
        again, receive = self.zmq.Again, sockets.receive
        before = self.outlet.ring.seq
        target = b""
        heads: Frames = []
        out: Frames = []
        count = size = taken = 0
        while taken < BATCH_MESSAGES and size < BATCH_BYTES:
            taken += 1
            try:
                body = receive(channel)
            except again:
                taken -= 1
                break
            if body is None:
                self.counters["bad_frames"] += 1
                continue
            lengths = [len(part) for part in body]
            total = sum(lengths)
            if len(lengths) > MAX_PARTS or total > MESSAGE_BYTES:
                if count:
                    self.outlet.batch(target, heads, out, count, size)
                    heads, out, count, size = [], [], 0, 0
                body = self.cut(channel, body)
                lengths = [len(part) for part in body]
                total = sum(lengths)
            # Most output needs no look: neither a status nor the agent's own affair.
            if channel != IOPUB or self.nudges or lengths[3] < 256 or not self.iopub_live:
                to = self.accept_output(body) if channel == IOPUB else self.accept_reply(channel, body)
                if to is None:
                    continue
            else:
                to = b""
            if to != target or total >= LARGE_BYTES:
                if count:
                    self.outlet.batch(target, heads, out, count, size)
                    heads, out, count, size = [], [], 0, 0
                target = to
            if total >= LARGE_BYTES:
                self.outlet.large(to, channel, body, total)
                # Fair to the other sockets: a large message is a turn's work.
                if taken >= 4:
                    break
                continue
            if len(lengths) == 4:
                heads.append(FOUR.pack(channel, 4, *lengths))
            else:
                heads.append(struct.pack("<BB%dI" % len(lengths), channel, len(lengths), *lengths))
            out += body
            count += 1
            size += total
        if count:
            self.outlet.batch(target, heads, out, count, size)
        if self.outlet.ring.seq != before:
            self.activity = time.time()
        return taken > 0

    def cut(self, channel: int, body: Any) -> Any:
        """A message that exceeds the link's limits as far as it can be passed on; the user is told, once per cell."""
        parent = body[1] if len(body[1]) < LARGE_BYTES else b"{}"
        left, size = body[:4], sum([len(part) for part in body])
        kind = text_of(load_dict(body[0]), "msg_type") if len(body[0]) < LARGE_BYTES else ""
        if len(body) > MAX_PARTS:
            what = "The %d binary buffers of a message (%s) were left out: it may have %d."
            text = what % (len(body) - 4, kind, MAX_PARTS - 4)
        else:
            what = "A message (%s) of %.0f MB was left out, or its buffers were: it may have %.0f MB."
            text = what % (kind, size / 1e6, MESSAGE_BYTES / 1e6)
        if sum([len(part) for part in left]) > MESSAGE_BYTES:
            if channel == IOPUB:
                return make_message(self.session, "stream", {"name": "stderr", "text": "\n[%s]\n" % text}, parent)
            error = {"status": "error", "ename": "MessageTooLarge", "evalue": text, "traceback": [text]}
            return make_message(self.session, kind, error, parent)
        if parent != self.cut_parent:
            self.cut_parent = parent
            self.publish("stream", {"name": "stderr", "text": "\n[%s]\n" % text}, parent)
        return left

    def accept_output(self, body: Any) -> Optional[bytes]:
        """Look at an iopub message: b"" for everybody, or None where it is not for clients."""
        header, content = body[0], body[3] if isinstance(body[3], bytes) else b""
        self.iopub_live = True
        to: Optional[bytes] = b""
        if b'"iopub_welcome"' in header:
            to = None
        elif self.nudges and self.own in body[1] and text_of(load_dict(body[1]), "session") == self.session:
            if b'"idle"' in content:
                self.nudges.discard(text_of(load_dict(body[1]), "msg_id"))
            to = None
        elif b'"execution_state"' in content and b'"status"' in header:
            self.on_status(body)
        if self.phase != "running":
            self.check_ready()
        return to

    def accept_reply(self, channel: int, body: Any) -> Optional[bytes]:
        """Look at a message of another channel: the session that it is for, or None."""
        parent = load_dict(bytes(memoryview(body[1])))
        session = text_of(parent, "session")
        if session == self.session:
            if channel == SHELL and not self.info_seen and b'"kernel_info_reply"' in body[0]:
                self.info_seen = True
                self.check_ready()
                if not self.iopub_live:
                    self.after("nudge", 0.1, self.nudge)
            return None
        if channel != STDIN:
            pending = self.pending.get(text_of(parent, "msg_id"))
            if pending is not None:
                pending.replied = True
                if pending.idle:
                    del self.pending[text_of(parent, "msg_id")]
        origin = session.encode("utf-8", "replace")
        to = self.origins.get(origin, origin)
        if to not in self.outlet.sessions:
            self.counters["unrouted_replies"] += 1
            return None
        return to

    def on_status(self, body: Any) -> None:
        """Follow busy and idle: the kernel is busy while any request is."""
        content = load_dict(bytes(memoryview(body[3])))
        state = content.get("execution_state")
        if state not in ("busy", "idle"):
            return
        msg_id = text_of(load_dict(bytes(memoryview(body[1]))), "msg_id")
        pending = self.pending.get(msg_id)
        if state == "busy":
            self.busy.add(msg_id)
            if pending is not None:
                pending.busy = True
        else:
            self.busy.discard(msg_id)
            if pending is not None:
                pending.idle = True
                if pending.replied:
                    del self.pending[msg_id]
        self.activity = time.time()
        self.tell_state()

    @property
    def execution_state(self) -> str:
        """As in the Jupyter REST API."""
        if self.phase == "running":
            return "busy" if self.busy else "idle"
        return "dead" if self.phase in ("dead", "stopping") else self.phase

    def tell_state(self) -> None:
        """Tell the peers, at most every 50 ms; the last state is always told."""
        now = time.monotonic()
        if "state" in self.timers:
            return
        if now - self.said_state[1] < STATE_SECONDS:
            self.after("state", STATE_SECONDS, self.tell_state)
            return
        self.said_state = (self.execution_state, now)
        self.outlet.broadcast(dict({"event": "state"}, **self.state()))

    def state(self) -> Event:
        """What `state` and `welcome` have in common. `age` spares the gateway from comparing clocks."""
        return {
            "execution_state": self.execution_state,
            "last_activity": self.activity,
            "age": max(0.0, time.time() - self.activity),
        }

    def check_ready(self) -> None:
        """Up once it has answered and its output reaches us: let the waiting requests go."""
        if self.phase not in ("starting", "restarting") or self.ending or self.parting is not None:
            return
        if not (self.info_seen and self.iopub_live):
            return
        self.phase = "running"
        self.ready_at = time.monotonic()
        self.cancel("nudge", "patience")
        self.activity = time.time()
        self.outlet.broadcast(dict({"event": "ready", "generation": self.generation}, **self.state()))
        self.publish("status", {"execution_state": "idle"})
        self.answer_waiting("restart")
        queue, self.queue, self.queued = self.queue, [], 0
        for session, channel, parts in queue:
            self.request(session, channel, parts, waited=True)
        self.tell_state()
        if self.sockets is not None:
            self.sockets.watch_end()

    def publish(self, msg_type: str, content: Dict[str, Any], parent: bytes = b"{}") -> None:
        """An iopub message of the agent's own, in the kernel's name."""
        self.outlet.message(IOPUB, make_message(self.session, msg_type, content, parent))

    # -- gateways

    def on_link(self) -> None:
        """Work off what gateways sent, a fair amount."""
        receive, noblock = self.link.recv_multipart, self.zmq.NOBLOCK
        for _ in range(200):
            try:
                frames = receive(noblock)
            except self.zmq.Again:
                return
            name = frames[0]
            self.contact = time.monotonic()
            peer = self.outlet.peers.get(name)
            if peer is not None:
                peer.seen = self.contact
            try:
                kind, value = parse_command(frames[1:])
            except ValueError:
                self.counters["bad_frames"] += 1
                continue
            if kind == "ack" and peer is not None:
                self.outlet.acknowledge(peer, value[0], value[1])
            elif kind == "call" and (peer is not None or value["op"] == "hello"):
                self.on_call(name, peer, value)
            elif kind == "kernel" and peer is not None:
                session, channel, origin, parts = value
                self.remember_origin(origin, session)
                self.request(session, channel, parts, peer.unaware > self.contact)
            else:
                # A new connection, or one that was forgotten: ask it to introduce itself.
                self.transmit([name, b"", b'\x03{"event": "greet"}'])

    def is_new(self, session: bytes, msg_id: str) -> bool:
        """Whether a client's message has not come before: a gateway that cannot know sends it again."""
        if not msg_id:
            return True
        name = msg_id.encode("utf-8", "replace")
        key = session + b"\0" + (name if len(name) < 200 else digest_of(name))
        if key in self.had:
            self.counters["repeated_requests"] += 1
            return False
        self.had[key] = None
        if len(self.had) > MAX_HAD:
            del self.had[next(iter(self.had))]
        return True

    def remember_origin(self, origin: bytes, session: bytes) -> None:
        if self.origins.get(origin) != session:
            self.origins[origin] = session
            if len(self.origins) > MAX_SESSIONS:
                del self.origins[next(iter(self.origins))]

    def request(self, session: bytes, channel: int, parts: Frames, unaware: bool = False, waited: bool = False) -> None:
        """Pass a client's message on to the kernel, or keep it until there is one.

        What was meant for a kernel that died is not for the next one: the cells before it died with it.
        """
        self.activity = time.time()
        header = load_dict(parts[0])
        msg_type, msg_id = text_of(header, "msg_type"), text_of(header, "msg_id")
        if not waited and not self.is_new(session, msg_id):
            return
        if self.phase in ("dead", "stopping"):
            text = self.epitaph() if self.phase == "dead" else "The kernel is being shut down."
            self.conclude(Pending(session, channel, parts[0], msg_type), "error", text)
            if self.phase == "dead" and not waited and not self.ready_at and msg_type == "execute_request":
                self.tell_dead({session})
            return
        orphaned = msg_type != "kernel_info_request" and (unaware or self.parting is not None)
        if unaware and orphaned and (self.phase != "running" or self.parting is None):
            self.conclude(Pending(session, channel, parts[0], msg_type), "aborted", self.death)
            return
        late = orphaned and self.phase == "running"
        if (self.phase != "running" or self.sockets is None or self.parting is not None) and not late:
            size = sum(map(len, parts))
            if self.queued + size > QUEUE_BYTES:
                text = "The kernel is starting, and too much (%d MB) waits for it already." % (self.queued >> 20)
                self.conclude(Pending(session, channel, parts[0], msg_type), "error", text)
                return
            self.queue.append((session, channel, parts))
            self.queued += size
            return
        pending = Pending(session, channel, parts[0], msg_type)
        pending.late = late
        if channel != STDIN and msg_id and len(self.pending) < 10000:
            self.pending[msg_id] = pending
        if not late:
            self.sockets.send(channel, parts)

    def on_call(self, name: bytes, peer: Optional[Peer], call: Event) -> None:
        """A control operation. Malformed ones are counted."""
        op, ident = call["op"], call.get("id")
        epoch = call.get("epoch", peer.epoch if peer is not None else 0)
        session = call.get("session")
        if not isinstance(epoch, int) or not (session is None or isinstance(session, str)):
            self.counters["bad_frames"] += 1
            return
        if op == "hello":
            self.on_hello(name, epoch)
            return
        if peer is None:
            return
        if session is not None:
            self.on_session_call(peer, session.encode("utf-8", "replace"), call)
        elif op == "noted":
            peer.unaware = 0.0
        elif op == "ping":
            self.outlet.event(peer, dict({"event": "pong", "id": ident, "counters": self.count()}, **self.state()))
        elif op == "interrupt":
            self.interrupt(peer, ident)
        elif op == "signal" and isinstance(call.get("signum"), int):
            self.signal(peer, ident, call["signum"])
        elif op in ("restart", "shutdown"):
            if epoch < self.epoch:
                self.done(peer.name, ident, "stale epoch", "stale_epoch")
            else:
                self.on_end_call(peer, op, ident)
        else:
            self.counters["bad_frames"] += 1
            if ident is not None:
                self.done(peer.name, ident, "unknown operation")

    def on_end_call(self, peer: Peer, op: str, ident: Any) -> None:
        """`restart` or `shutdown`, answered when it is done."""
        self.waiting.append((peer.name, ident, op))
        if op == "restart":
            self.restart()
        else:
            self.shut_down()

    def on_session_call(self, peer: Peer, name: bytes, call: Event) -> None:
        """An operation on one session."""
        op, after = call["op"], call.get("after")
        if op == "attach" and name and (after is None or isinstance(after, int)):
            self.outlet.attach(peer, name, after, bool(call.get("keep", True)), call.get("id"))
        elif op == "expect" and name:
            self.outlet.expect(name)
        elif op == "pause":
            self.outlet.pause(peer, name)
        elif op == "detach":
            found = peer.sessions.get(name)
            if found is not None:
                self.outlet.detach(found, bool(call.get("forget", not found.keep)))
        else:
            self.counters["bad_frames"] += 1

    def on_hello(self, name: bytes, epoch: int) -> None:
        if epoch < self.epoch:
            refusal = {"event": "refused", "error": "stale epoch", "epoch": self.epoch}
            self.transmit([name, b"", b"\x03" + json.dumps(refusal).encode()])
            return
        self.epoch = epoch
        peer = self.outlet.greet(name, epoch)
        sessions = {s.name.decode("utf-8", "replace"): s.cursor for s in self.outlet.sessions.values()}
        welcome = {
            "event": "welcome",
            "kernel_id": self.settings.kernel_id,
            "epoch": self.epoch,
            "pid": self.kernel.pid,
            "generation": self.generation,
            "phase": self.phase,
            "seq": self.outlet.ring.seq,
            "sessions": sessions,
            "counters": self.count(),
            "exited": self.last_exit,
        }
        self.outlet.event(peer, dict(welcome, **self.state()))

    def count(self) -> Dict[str, int]:
        """All counters."""
        ring = self.outlet.ring
        more = {
            "joined_messages": ring.joined_messages,
            "dropped_messages": ring.dropped_messages,
            "ring_bytes": ring.size,
            "ring_messages": ring.messages,
            "restarts": self.restarts,
        }
        return dict(self.counters, **more)

    def done(self, name: bytes, ident: Any, error: str = "", code: str = "conflict") -> None:
        """Answer a call. `code` says of an error what kind it is: conflict, failed (the kernel did), stale_epoch."""
        peer = self.outlet.peers.get(name)
        if peer is not None:
            event = {"event": "done", "id": ident, "ok": not error}
            if error:
                event.update(error=error, code=code)
            self.outlet.event(peer, event)

    def answer_waiting(self, op: str, error: str = "", code: str = "conflict") -> None:
        """Answer those who wait for `restart` or `shutdown`; an `error` is a sentence."""
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if one[2] == op:
                self.done(one[0], one[1], error, code)
            else:
                self.waiting.append(one)

    def interrupt(self, peer: Peer, ident: Any) -> None:
        if self.phase != "running":
            self.done(peer.name, ident, "The kernel is not running: it is %s." % self.phase)
        elif self.settings.interrupt_mode == "message":
            self.ask(CONTROL, "interrupt_request", {})
            self.done(peer.name, ident)
        else:
            self.signal(peer, ident, signal.SIGINT)

    def signal(self, peer: Peer, ident: Any, signum: int) -> None:
        try:
            sent = 0 < signum < 65 and self.kernel.pid > 0 and not self.kernel.reap() and self.kernel.kill(signum)
        except OSError as error:
            self.done(peer.name, ident, "The signal cannot be sent: %s." % error.strerror)
            return
        self.done(peer.name, ident, "" if sent else "The kernel has no process that could take the signal.")

    # -- end and new beginning

    def restart(self) -> None:
        """A new kernel in place of this one."""
        if self.phase == "stopping":
            self.answer_waiting("restart", "The kernel is being shut down.")
            return
        alive = self.phase != "dead"
        was_running = self.phase == "running"
        if self.phase == "restarting":
            return  # answered together with the restart that is under way
        self.phase = "restarting"
        self.restarts_in_a_row = 0
        for msg_id in list(self.pending):
            self.conclude(self.pending.pop(msg_id), "aborted", "The kernel was restarted.")
        # No iopub status: JupyterLab takes `restarting` for a kernel that died, and tells the user so.
        self.outlet.broadcast({"event": "restarting"})
        self.tell_state()
        if alive:
            self.end_kernel(was_running, restart=True)
        else:
            self.spawn()

    def shut_down(self) -> None:
        """End the kernel, then the agent."""
        if self.phase == "stopping":
            return
        was_running, alive = self.phase == "running", self.kernel.pid > 0 and not self.kernel.reap()
        self.phase = "stopping"
        self.answer_waiting("restart", "The kernel is being shut down.")
        self.cancel("nudge", "patience", "linger")
        for msg_id in list(self.pending):
            self.conclude(self.pending.pop(msg_id), "aborted", "The kernel was shut down.")
        if alive:
            self.end_kernel(was_running, restart=False)
        else:
            self.finish()

    def end_kernel(self, polite: bool, restart: bool) -> None:
        """Ask, then SIGTERM, then SIGKILL. What follows is up to `on_kernel_exit`."""
        self.ending = True
        if self.parting is not None:
            return  # it is dead
        if polite:
            if self.busy and self.settings.interrupt_mode == "signal":
                self.kernel.kill(signal.SIGINT)
            self.ask(CONTROL, "shutdown_request", {"restart": restart})
            self.after("escalate", self.settings.shutdown_seconds, self.terminate_kernel)
        else:
            self.terminate_kernel()

    def terminate_kernel(self) -> None:
        self.kernel.kill(signal.SIGTERM)
        self.after("escalate", min(2.0, self.settings.shutdown_seconds), self.kill_kernel)

    def kill_kernel(self) -> None:
        self.kernel.kill(signal.SIGKILL)

    def look_after_kernel(self) -> None:
        """Begin with the end of a kernel whose process has ended."""
        if self.phase == "dead" or self.parting is not None or not self.kernel.pid or not self.kernel.reap():
            return
        self.cancel("escalate", "nudge", "patience")
        self.parting = (time.monotonic(), None)
        self.part()

    def part(self) -> None:
        """Read what the dead kernel had sent to its end, and only then go on.

        A message may still be with the system, or with ZeroMQ's own thread. All is there when ZeroMQ has seen the
        connections end and the sockets are empty. Where it does not (a child of the kernel's holds them, or
        they were never there), a short silence has to do.
        """
        if self.parting is None:
            return
        now = time.monotonic()
        heard, empty = self.parting
        ended = self.sockets is None or self.sockets.ended()  # asked before the sockets are
        had = [self.drain(channel) for channel in range(4)]
        if any(had):
            self.parting = (now, empty)
            self.after("part", 0.0, self.part)
            return
        empty = now if empty is None else empty
        if ended or now - heard > QUIET_SECONDS or now - empty > PARTING_SECONDS:
            self.parting = None
            self.on_kernel_exit()
        else:
            self.parting = (heard, empty)
            self.after("part", 0.002, self.part)

    def on_kernel_exit(self) -> None:
        """The kernel's process has ended, by our wish, while starting, or all by itself, and all it said was read."""
        running = self.phase == "running"
        ending, self.ending = self.ending, False
        starting = not running and not ending
        self.disconnect_kernel()
        code, signum = self.kernel.result()
        log("the kernel (pid %d) ended: %s" % (self.kernel.pid, describe_exit(code, signum)))
        if time.monotonic() - self.ready_at > STEADY_SECONDS:
            self.restarts_in_a_row = 0
        again = running and self.restarts_in_a_row < self.settings.restart_limit
        self.report_exit("starting" if starting else self.phase, again or (ending and self.phase == "restarting"))
        if again:
            for peer in self.outlet.peers.values():
                peer.unaware = time.monotonic() + UNAWARE_SECONDS
            # Before all that clients are told, so that one that was told is not taken for one that could not know.
            self.outlet.broadcast({"event": "restarting"})
        if running:
            text = self.death = self.epitaph()
            cells = [one for one in self.pending.values() if one.msg_type == "execute_request" and not one.late]
            cells = [one for one in cells if not one.replied and not one.idle]
            if cells and not any(cell.busy for cell in cells):
                cells[0].busy = True  # it died before its `busy` was out; kernels take cells in order
            for msg_id in list(self.pending):
                one = self.pending.pop(msg_id)
                self.conclude(one, "aborted" if one.late else "error", text)
        if self.phase == "stopping":
            self.finish()
        elif again:
            self.restarts_in_a_row += 1
            self.phase = "restarting"
            self.publish("status", {"execution_state": "restarting"})
            self.tell_state()
            self.spawn()
        elif ending:
            self.spawn()
        else:
            self.dead()

    def report_exit(self, during: str, again: bool) -> None:
        code, signum = self.kernel.result()
        self.last_exit = {
            "event": "exited",
            "code": code,
            "signal": signum,
            "stderr_tail": self.kernel.stderr_tail(),
            "while": during,
            "will_restart": again,
        }
        self.outlet.broadcast(self.last_exit)

    def epitaph(self) -> str:
        """Why there is no kernel, in a sentence, with the last lines of its stderr."""
        if self.kernel.failure:
            return self.kernel.failure
        code, signum = self.kernel.result()
        text = self.verdict or "Kernel died: %s." % describe_exit(code, signum)
        tail = [line for line in self.kernel.stderr_tail().strip().splitlines() if line != self.verdict][-20:]
        return text + (" Last lines of stderr:\n" + "\n".join(tail) if tail else "")

    def conclude(self, pending: Pending, status: str, text: str) -> None:
        """Give a request its end in the kernel's place."""
        if not pending.msg_type.endswith("_request"):
            return
        first, _, rest = text.partition("\n")
        error = {"ename": "DeadKernelError", "evalue": first, "traceback": [first, *rest.splitlines()]}
        execute = pending.msg_type == "execute_request"
        blamed = status == "error" and (pending.busy or self.phase != "running")
        if execute and blamed and not pending.replied and not pending.idle:
            self.publish("error", error, pending.header)
        if not pending.replied:
            running = pending.busy or not execute or self.phase != "running"
            content: Dict[str, Any] = dict(error, status=status if running else "aborted")
            if execute:
                content.update(execution_count=0, user_expressions={}, payload=[])
            reply = make_message(self.session, pending.msg_type[: -len("request")] + "reply", content, pending.header)
            if pending.session in self.outlet.sessions:
                self.outlet.message(pending.channel, reply, pending.session)
        if not pending.idle:
            self.publish("status", {"execution_state": "idle"}, pending.header)

    def failed(self, text: str) -> None:
        """The kernel's program could not even be executed."""
        log(text)
        self.kernel.close()
        self.report_exit("starting", False)
        self.dead()

    def dead(self) -> None:
        """No kernel, and no more attempts. Stay for a while, so that somebody can read why."""
        self.phase = "dead"
        self.answer_waiting("restart", self.epitaph(), "failed")
        queue, self.queue, self.queued = self.queue, [], 0
        for session, channel, parts in queue:
            self.request(session, channel, parts, waited=True)
        self.tell_dead({one[0] for one in queue if text_of(load_dict(one[2][0]), "msg_type") == "execute_request"})
        self.tell_state()
        self.after("linger", self.settings.linger_seconds, self.finish)

    def tell_dead(self, told: Set[bytes]) -> None:
        """Tell that the kernel is dead: everybody, or those who were told why, if it never ran.

        JupyterLab sends nothing to a kernel that it knows to be dead: a cell that is run later would stay empty.
        """
        if self.ready_at:
            self.publish("status", {"execution_state": "dead"})
            return
        message = make_message(self.session, "status", {"execution_state": "dead"}, b"{}")
        for session in told:
            if session in self.outlet.sessions:
                self.outlet.message(IOPUB, message, session)

    def spawn(self) -> None:
        """Start the next generation."""
        self.cancel("linger")
        self.generation += 1
        self.restarts += 1
        self.verdict = ""
        self.kernel.close()
        self.kernel = KernelProcess(self.settings, self.generation, self.directory)
        failure = self.kernel.start()
        if failure:
            self.failed(failure)
            return
        self.connect_kernel()
        self.after("patience", self.settings.start_seconds, self.lose_patience)

    def lose_patience(self) -> None:
        """End a restart that hangs; `dead` follows, from where another restart is possible."""
        self.verdict = "The restarted kernel did not answer within %g s and was killed." % self.settings.start_seconds
        log(self.verdict)
        # What is read of an end are the last lines of stderr.
        self.kernel.tail += (self.verdict + "\n").encode()
        self.kill_kernel()
        self.after("patience", PATIENCE_SECONDS, self.give_up_kernel)

    def give_up_kernel(self) -> None:
        """Not even SIGKILL ends it, as where it hangs in the operating system."""
        self.disconnect_kernel()
        self.report_exit("starting", False)
        self.dead()

    def finish(self) -> None:
        """Nothing is left to supervise."""
        self.answer_waiting("restart", "The kernel is being shut down.")
        self.answer_waiting("shutdown")
        self.running = False

    def close(self) -> None:
        """Leave nothing behind: no process of the kernel's group, no file."""
        if self.kernel.pid and not self.kernel.reap():
            self.kernel.kill(signal.SIGKILL)
        if self.renewal is not None:
            self.renewal.stop()
        if self.sockets is not None:
            self.sockets.close()
        for source in (self.zap, self.monitor):
            source.close(0)
        self.link.close(1000)  # the last answers
        self.context.term()


# ---------------------------------------------------------------------------------------------------------------------
# Registration and start


def public_host(settings: Settings) -> str:
    """The address at which gateways reach this node."""
    if settings.listen not in ("0.0.0.0", "::", "*"):  # noqa: S104
        return settings.listen
    import socket

    if settings.register_url:
        from urllib.parse import urlsplit

        parts = urlsplit(settings.register_url)
        try:
            family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 443, 0, socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as sock:
                sock.connect(address)  # sends nothing; the system chooses the address that leads there
                return str(sock.getsockname()[0])
        except OSError as error:
            log("cannot tell which address leads to the gateway: %s" % error)
    return socket.getfqdn()


def make_proof(settings: Settings, registration: Dict[str, Any]) -> str:
    """HMAC-SHA256 with the launch token over kernel_id|epoch|host|port|public_key, in hex."""
    import hashlib
    import hmac

    names = ("kernel_id", "epoch", "host", "port", "public_key")
    text = "|".join([str(registration[name]) for name in names])
    return hmac.new(settings.launch_token.encode(), text.encode(), hashlib.sha256).hexdigest()


def post_registration(settings: Settings, text: str) -> None:
    """Post the registration to the gateway, with patience. Runs in a thread of its own."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + settings.start_seconds
    delay = 0.25
    while True:
        headers = {"Content-Type": "application/json", "User-Agent": "hub-gateway-agent"}
        request = urllib.request.Request(  # noqa: S310
            settings.register_url, text.encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - the scheme was checked
                return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                log("the gateway refused the registration: %d %s" % (error.code, error.reason))
                return
            log("the gateway did not take the registration: %d %s" % (error.code, error.reason))
        except OSError as error:
            log("the gateway cannot be reached: %s" % error)
        if time.monotonic() + delay > deadline:
            log("the registration is given up")
            return
        time.sleep(delay)
        delay = min(delay * 2, 5.0)


def make_directories(settings: Settings) -> str:
    """Make the runtime directory; returns the directory for ipc sockets, whose paths must be short.

    Says in the settings which transport it is to be, where that was left open.
    """
    os.makedirs(settings.runtime_dir, 0o700, exist_ok=True)
    os.chmod(settings.runtime_dir, 0o700)
    if settings.transport == "tcp":
        return settings.runtime_dir
    short = len(os.fsencode(settings.runtime_dir)) + len("/g1000-5") <= PATH_LIMIT
    if short and (settings.transport == "ipc" or has_sockets(settings.runtime_dir)):
        settings.transport = "ipc"
        return settings.runtime_dir
    directory = os.path.join("/tmp", "hg-" + os.urandom(8).hex())  # noqa: S108 - new, and 0700
    os.mkdir(directory, 0o700)
    if settings.transport == "ipc" or has_sockets(directory):
        settings.transport = "ipc"
        return directory
    os.rmdir(directory)
    settings.transport = "tcp"
    how = "encrypted" if settings.kernel_encryption == "curve" else "signed, but not encrypted: it does not know CURVE"
    where = settings.runtime_dir
    log("no unix socket can be made in %s or /tmp; the kernel is reached by loopback (%s)" % (where, how))
    return settings.runtime_dir


def has_sockets(directory: str) -> bool:
    """Whether unix sockets can be made in a directory, which not every network file system can."""
    path = os.path.join(directory, "g0")
    try:
        if sys.platform.startswith("linux"):
            os.mknod(path, 0o600 | stat.S_IFSOCK)  # as binding does; the module socket would cost time before the start
        else:
            import socket

            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(path)
        os.unlink(path)
    except (OSError, AttributeError):
        return False
    return True


def remove_files(settings: Settings, directory: str) -> None:
    """Remove connection file, sockets, tickets and, where nothing else is in it, the runtime directory."""
    for folder in {directory, settings.runtime_dir}:
        try:
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                ours = name in ("kernel-%s.json" % settings.kernel_id, "agent.json") or name.startswith(("g", "krb5cc"))
                if ours and not os.path.isdir(path):
                    os.unlink(path)
            os.rmdir(folder)
        except OSError as error:
            # The proxy's kernel.log is often left there for it to read.
            if folder != settings.runtime_dir:
                log("cannot remove %s: %s" % (folder, error))


def say(text: str) -> None:
    """The one line on standard output; nothing else goes there afterwards."""
    try:
        os.write(1, text.encode() + b"\n")
    except OSError as error:
        log("nobody reads the registration: %s" % error)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def main() -> int:
    """Run the agent; the exit code."""
    os.umask(0o077)
    try:
        settings = Settings(json.loads(sys.stdin.buffer.read()))
        directory = make_directories(settings)
    except (ValueError, TypeError, OSError) as error:
        log("cannot start: %s" % error)
        return 2
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    LOG.bound(os.path.join(settings.runtime_dir, "kernel.log"), settings.log_bytes)
    agent = Agent(settings, directory)
    agent.heed_signals()
    # The kernel is slow to start, so it starts before anything that it does not need (pyzmq above all).
    failure = agent.kernel.start()
    find_packages()
    try:
        registration = json.dumps(agent.open())
        write_private(os.path.join(settings.runtime_dir, "agent.json"), registration)
        say(registration)
        if settings.register_url:
            import threading

            threading.Thread(target=post_registration, args=(settings, registration), daemon=True).start()
        agent.run(failure)
        agent.close()
    finally:
        if agent.kernel.pid and not agent.kernel.reap():
            agent.kernel.kill(signal.SIGKILL)
        remove_files(settings, directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
