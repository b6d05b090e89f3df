"""The local process proxy: agents as processes on the gateway's own node.

A kernel runs as the gateway's own user, or as another unix user through `launchers/runas.py`. An agent
is known again, by any later gateway, by the tags in its command line: kernel id, gateway id and epoch.
They are unique to it, which (pid, start time) is not when somebody sets the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pwd
import py_compile
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil
from traitlets import List, Unicode, default

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies import runas, tagged
from hub_gateway.proxies.agent_config import AGENT_ENVIRONMENT, agent_config, shutdown_option
from hub_gateway.proxies.base import (
    ClusterObject,
    Finding,
    IdentityNeed,
    LaunchRequest,
    Phase,
    PhaseReport,
    ProcessProxy,
    State,
)
from hub_gateway.proxies.names import NAMES, DirectoryNames
from hub_gateway.proxies.threads import to_its_end

__all__ = ["LocalProxy"]

T = TypeVar("T")
LINE_SECONDS = 30.0
AGAIN_SECONDS = 1.0


class LocalProxy(ProcessProxy):
    """Kernels as processes on the gateway's node."""

    config_keys = {}
    identity = IdentityNeed.UNIX_USER
    identifies = ("pid",)

    python = Unicode(
        sys.executable,
        help="""Python (3.8 or newer, with pyzmq) that runs the agent. Kernels that run as other unix users need one
        that those users can execute.""",
    ).tag(config=True)
    runtime_root = Unicode(
        help="""Directory in which kernels of the gateway's own user have their private directories.

        By default `run` in the gateway's state directory. Unix sockets lie in it, so short paths are better;
        where they would be too long, the agent makes a private directory in /tmp.
        """
    ).tag(config=True)
    user_runtime_root = Unicode(
        help="""Directory in which kernels of other unix users have theirs.

        By default `/run/hub-gateway` for a gateway that is root (or where there is no /run: /tmp), which makes it, and
        in it a directory for each user. A gateway that uses sudo cannot make anything for others: it needs a directory
        that everybody may write to, with the sticky bit, by default /tmp. There each user gets a directory whose
        name nobody can guess, since whoever made it first would keep that user from starting kernels.
        """
    ).tag(config=True)
    sudo_command = List(
        Unicode(),
        default_value=["sudo", "-n", "-H", "-u", "{user}", "--"],
        help="""How a gateway that is not root gets to run its launcher as another user.

        The rule for sudo names the interpreter and the launcher, and nothing else, for example
        `gateway ALL=(%kernels) NOPASSWD: /opt/gateway/bin/python -I /opt/gateway/.../runas.py`.
        """,
    ).tag(config=True)
    launchers = Unicode(
        help="""Directory of `agent.py` and `runas.py`. By default the installed one.

        Where kernels run as other unix users, these must be able to read it; copy it to a public place
        if the gateway is installed in a private one.
        """
    ).tag(config=True)
    path = Unicode(help="PATH of kernels. By default the directory of `python`, then the system's.").tag(config=True)
    inherited_environment = List(
        Unicode(),
        default_value=["LANG", "LC_ALL", "LC_CTYPE", "TZ"],
        help="Variables of the gateway's own environment that kernels get too. Name nothing secret.",
    ).tag(config=True)
    shutdown_seconds = shutdown_option(12.0)

    @default("runtime_root")
    def _default_runtime_root(self) -> str:
        state_dir = getattr(self.parent, "state_dir", "")
        if state_dir:
            return str(Path(state_dir) / "run")
        return str(Path(tempfile.gettempdir()) / f"hub-gateway-{os.getuid()}")

    @default("user_runtime_root")
    def _default_user_runtime_root(self) -> str:
        return "/run/hub-gateway" if self._is_root() and Path("/run").is_dir() else "/tmp"  # noqa: S108 (see there)

    @default("launchers")
    def _default_launchers(self) -> str:
        return str(launchers_dir())

    @default("path")
    def _default_path(self) -> str:
        return f"{Path(self.python).parent}:/usr/local/bin:/usr/bin:/bin"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Starting and ending processes takes waiting; 32 at once is more than a node can start well. Each has its own
        # threads: kernels that do not come up, or do not end, keep nobody from ending others, or looking at them.
        self._launching = ThreadPoolExecutor(32, thread_name_prefix="local-launch")
        self._ending = ThreadPoolExecutor(32, thread_name_prefix="local-end")
        self._looking = ThreadPoolExecutor(8, thread_name_prefix="local-look")
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._watched: dict[int, int] = {}
        self.on_ended: Callable[[str], None] = lambda kernel_id: None
        """Told, on the event loop, the id of a kernel whose agent has ended."""

    async def close(self) -> None:
        for pid in list(self._watched):
            self._unwatch(pid)
        for pool in (self._launching, self._ending, self._looking):
            pool.shutdown(wait=False)

    @staticmethod
    async def _in_thread(pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        """Run `call` in a thread, to its end: one that is cancelled has still done what it was doing."""
        return await to_its_end(asyncio.get_running_loop().run_in_executor(pool, call))

    async def _look(self, call: Callable[[], T]) -> T:
        """Run `call`, which changes nothing, in a thread; one that is cancelled goes on there by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._looking, call)

    def _watch(self, state: State, kernel_id: str) -> None:
        """Have `on_ended` called when an agent ends, whose child it may be; where that cannot be, polls notice it."""
        pid = state.get("pid")
        if not isinstance(pid, int) or pid in self._watched or not hasattr(os, "pidfd_open"):
            return
        with contextlib.suppress(OSError):
            self._watched[pid] = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(self._watched[pid], self._agent_ended, pid, kernel_id)

    def _unwatch(self, pid: int) -> None:
        fd = self._watched.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    def _agent_ended(self, pid: int, kernel_id: str) -> None:
        self._unwatch(pid)
        self.on_ended(kernel_id)

    # Launch

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        user = self._other_user(request.unix_user)
        before = {**(request.previous or {}), "gateway_id": request.gateway_id, "kernel_id": request.kernel_id}
        directory = await self._look(lambda: self._recorded_directory(before, user))
        # The intent is recorded before anything is done: whatever follows can be found by it.
        state: State = {"runtime_dir": str(directory), "user": user, "node": {**tagged.node()}}
        yield dict(state)
        if request.previous is not None:
            adopted = await self._in_thread(self._launching, lambda: self._adopt(request, directory, user))
            if adopted is not None:
                self._watch(adopted, request.kernel_id)
                yield {**state, **adopted}
                return
        if user is None:
            process = await self._in_thread(self._launching, lambda: self._spawn(request, directory))
            state["pid"] = process.pid
            yield dict(state)
            line = await self._in_thread(self._launching, lambda: _first_line(process))
            with contextlib.suppress(OSError):
                assert process.stdout is not None
                process.stdout.close()
        else:
            line = await self._in_thread(self._launching, lambda: self._spawn_as(request, directory, user, state))
        registration = tagged.registration(line, request.kernel_id)
        if registration is None:
            raise LaunchFailed(await self._why_not(request, state))
        state["registration"] = registration
        self._watch(state, request.kernel_id)
        yield state

    def _spawn(self, request: LaunchRequest, directory: Path) -> subprocess.Popen[bytes]:
        try:
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            tagged.mark(directory, request.gateway_id, request.kernel_id, request.epoch)
            with open(os.open(directory / "kernel.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
                own = pwd.getpwuid(os.getuid())
                account = {"HOME": own.pw_dir, "USER": own.pw_name, "LOGNAME": own.pw_name}
                environment = {**account, **self._node_environment()}
                process = subprocess.Popen(
                    self._command(request),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**environment, **AGENT_ENVIRONMENT},
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchFailed(
                f"The kernel's agent cannot be started on the gateway's node: {error.strerror or error}.",
                hint=str(error),
            ) from error
        self._children[process.pid] = process
        cwd = _usable(request.cwd) or _usable(environment["HOME"]) or "/"
        config = self._config(request, directory, {**environment, **request.env}, cwd)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said is in its log
            process.stdin.write(json.dumps(config).encode())
            process.stdin.close()
        return process

    def _spawn_as(self, request: LaunchRequest, directory: Path, user: str, state: State) -> bytes:
        self._provide(directory.parent, user)
        answer = self._runas(
            user,
            "launch",
            runtime_dir=str(directory),
            command=self._command(request),
            agent_env={**self._node_environment(), **AGENT_ENVIRONMENT},
            config=self._config(request, directory, request.env, request.cwd),
        )
        state["pid"] = answer["pid"]
        return str(answer["line"]).encode()

    def _command(self, request: LaunchRequest) -> list[str]:
        tags = tagged.arguments(request.kernel_id, request.gateway_id, request.epoch)
        return [self.python, "-IS", self._agent_program, *tags]

    @cached_property
    def _agent_program(self) -> str:
        """The agent, compiled where that can be: Python compiles a script anew at every start, for 25 ms of CPU."""
        source = Path(self.launchers) / "agent.py"
        if self.python != sys.executable:
            return str(source)
        try:
            compiled = py_compile.compile(str(source), doraise=True)
        except (OSError, py_compile.PyCompileError):
            return str(source)
        return str(compiled)

    def _config(
        self, request: LaunchRequest, directory: Path, env: Mapping[str, str], cwd: str | None
    ) -> dict[str, Any]:
        argv = list(request.argv)
        # As jupyter_client does for kernels of its own environment: "python" is the one that runs us.
        if argv[0] in ("python", "python3", f"python3.{sys.version_info.minor}"):
            argv[0] = self.python
        return agent_config(
            request,
            argv=argv,
            launchers=Path(self.launchers),
            runtime_dir=str(directory),
            env=env,
            cwd=cwd,
            listen="127.0.0.1",
        )

    def _node_environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in self.inherited_environment if name in os.environ}
        return {"PATH": self.path, "LANG": "C.UTF-8", **kept}

    def _adopt(self, request: LaunchRequest, directory: Path, user: str | None) -> State | None:
        """What an interrupted launch of the same kernel left, if its agent lives and says where it listens."""
        deadline = time.monotonic() + LINE_SECONDS
        while True:
            alive = tagged.agents(request.gateway_id, request.kernel_id)
            if not alive:
                return None
            text = self._read(directory, user)
            for agent in alive:
                registration = tagged.registration(text.encode(), request.kernel_id)
                if registration is not None and registration["pid"] == agent.process.pid:
                    return {"pid": agent.process.pid, "epoch": agent.epoch, "registration": registration}
            if time.monotonic() > deadline:
                self._end([agent.process for agent in alive], user)
                return None
            time.sleep(0.05)

    def _read(self, directory: Path, user: str | None) -> str:
        if user is not None:
            return str(self._runas(user, "read", runtime_dir=str(directory))["text"])
        try:
            return (directory / "agent.json").read_text()
        except OSError:
            return ""

    async def _why_not(self, request: LaunchRequest, state: State) -> str:
        said = (await self.logs(state, 5)).strip().replace("\n", " / ")
        return f"The kernel's agent ended before it was up. It said: {said or 'nothing'}"

    # Afterwards

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        found = await self._look(lambda: {key: self._phase(key, state) for key, state in states.items()})
        for kernel_id, report in found.items():
            if report.phase is Phase.RUNNING:
                self._watch(states[kernel_id], kernel_id)
        return found

    def _phase(self, kernel_id: str, state: State) -> PhaseReport:
        elsewhere = tagged.elsewhere(state.get("node"))
        if elsewhere:
            return PhaseReport(Phase.UNKNOWN, f"it was started on another node ({elsewhere})")
        pid = state.get("pid")
        if not isinstance(pid, int):
            return PhaseReport(Phase.PENDING)
        child = self._children.get(pid)
        if child is not None and child.poll() is not None:
            return PhaseReport(Phase.GONE, f"its agent (pid {pid}) ended with code {child.returncode}")
        if tagged.is_agent(pid, kernel_id):
            return PhaseReport(Phase.RUNNING)
        return PhaseReport(Phase.GONE, f"its agent (pid {pid}) is not there any more")

    async def terminate(self, state: State) -> None:
        self._require_here(state)
        await self._in_thread(self._ending, lambda: self._terminate(state))

    @staticmethod
    def _require_here(state: State) -> None:
        """Processes of another node cannot be seen from here, which does not prove that they are gone."""
        elsewhere = tagged.elsewhere(state.get("node"))
        if elsewhere:
            raise Unavailable(
                f"The kernel was started on another node ({elsewhere}), where only a gateway on that node can end it.",
                hint="local kernels and the gateway that drives them must be on one node; start a gateway there",
            )

    def _terminate(self, state: State) -> None:
        kernel_id, gateway_id, pid = state.get("kernel_id"), state.get("gateway_id"), state.get("pid")
        assert isinstance(kernel_id, str) and isinstance(gateway_id, str)
        user = self._other_user(state.get("user", state.get("unix_user")))
        if "only_pid" in state:
            self._end([a.process for a in tagged.agents(gateway_id, kernel_id) if a.process.pid == pid], user)
            if tagged.agents(gateway_id, kernel_id):
                return  # it was a second agent of a kernel that lives, whose directory it is
        directory = self._recorded_directory(state, user)
        found = [agent.process for agent in tagged.agents(gateway_id, kernel_id)]
        self._end(found, user)
        # A kernel whose agent was killed; it is known by the connection file in its command line.
        connection_file = os.path.abspath(directory / f"kernel-{kernel_id}.json")  # noqa: PTH100 (as the agent does)
        self._end(tagged.kernels(connection_file, self._uid(user)), user, signum=signal.SIGKILL)
        if user is not None:
            self._runas(user, "remove", runtime_dir=str(directory))
        else:
            shutil.rmtree(directory, ignore_errors=True)

    def _end(self, processes: Sequence[psutil.Process], user: str | None, signum: int = signal.SIGTERM) -> None:
        """Ask processes to end, then kill them with everything that they started."""
        if not processes:
            return
        family: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += process.children(recursive=True)
        self._send(processes, signum, user)
        soon = min(AGAIN_SECONDS, self.shutdown_seconds)
        self._wait(processes, soon)
        again = [one for one in processes if tagged.alive(one)]
        if again:
            # A process that is still starting can lose a signal: its handler is there, who heeds it is not yet.
            self._send(again, signum, user)
            self._wait(again, self.shutdown_seconds - soon)
        left = [one for one in (*processes, *family) if tagged.alive(one)]
        if left:
            self._send(left, signal.SIGKILL, user)
            self._wait(left, 5.0)

    def _wait(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(tagged.alive(one) for one in processes):
            time.sleep(0.01)
        for process in processes:
            child = self._children.get(process.pid)
            if child is not None and child.poll() is not None:
                self._children.pop(process.pid, None)  # the sweep, in another thread, may have been first

    def _send(self, processes: Sequence[psutil.Process], signum: int, user: str | None) -> None:
        if user is not None and not self._is_root():
            self._runas(user, "signal", pids=[one.pid for one in processes], signum=signum)
            return
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.send_signal(signum)

    async def signal(self, state: State, signum: int) -> None:
        self._require_here(state)
        pid, kernel_id = state.get("pid"), state.get("kernel_id")
        if not isinstance(pid, int) or not isinstance(kernel_id, str):
            return

        def send() -> None:
            if not tagged.is_agent(pid, kernel_id):
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self._send(psutil.Process(pid).children(), signum, self._other_user(state.get("user")))

        await self._in_thread(self._ending, send)

    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        return await self._look(lambda: self._owned(gateway_id))

    def _owned(self, gateway_id: str) -> list[ClusterObject]:
        for pid, child in list(self._children.items()):
            if child.poll() is not None:  # nobody else waits for it, and it would stay a zombie
                self._children.pop(pid, None)
        found, living = [], set()
        for agent in tagged.agents(gateway_id):
            living.add(agent.kernel_id)
            state: State = {
                "kernel_id": agent.kernel_id,
                "gateway_id": gateway_id,
                "pid": agent.process.pid,
                "user": agent.user,
                "only_pid": True,
            }
            what = f"agent process {agent.process.pid}"
            found.append(ClusterObject(agent.kernel_id, gateway_id, agent.epoch, state, what))
        for directory, kernel_id, epoch in tagged.marked(Path(self.runtime_root), gateway_id):
            if kernel_id not in living:
                left: State = {"kernel_id": kernel_id, "gateway_id": gateway_id, "runtime_dir": str(directory)}
                found.append(ClusterObject(kernel_id, gateway_id, epoch, left, f"directory {directory}"))
        return found

    def same(self, recorded: State, found: State) -> bool:
        if "only_pid" in found:
            return super().same(recorded, found)
        return recorded.get("runtime_dir") == found.get("runtime_dir")

    async def logs(self, state: State, lines: int = 50) -> str:
        directory, user = state.get("runtime_dir"), self._other_user(state.get("user"))
        if not isinstance(directory, str) or tagged.elsewhere(state.get("node")):
            return ""

        def read() -> str:
            if user is not None:
                return str(self._runas(user, "logs", runtime_dir=directory)["text"])
            return tagged.tail(Path(directory) / "kernel.log")

        return "\n".join((await self._look(read)).splitlines()[-lines:])

    async def check(self) -> Sequence[Finding]:
        return await self._look(self._check)

    def _check(self) -> list[Finding]:
        agent = Path(self.launchers) / "agent.py"
        findings = []
        try:
            done = subprocess.run(
                [self.python, "-I", "-c", "import sys, zmq; print(sys.version.split()[0], zmq.__version__)"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            fine, said = done.returncode == 0 and agent.is_file(), (done.stdout or done.stderr).strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            fine, said = False, str(error)
        message = f"agent runs with Python and pyzmq {said}" if fine else f"the agent cannot run: {said[-200:]}"
        hint = "" if fine else "set LocalProxy.python to a Python with pyzmq"
        findings.append(Finding("ok" if fine else "error", "local kernels", message, hint))
        root = Path(self.runtime_root)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(root, os.W_OK)
        except OSError:
            writable = False
        findings.append(
            Finding("ok", "runtime directory", f"{root} is writable")
            if writable
            else Finding("error", "runtime directory", f"{root} is not writable", "set LocalProxy.runtime_root")
        )
        findings += self._check_user_root()
        return findings

    def _check_user_root(self) -> list[Finding]:
        """What everybody may write to, and is not sticky, gives anybody everybody's directories."""
        root = Path(self.user_runtime_root)
        if not _open_to_all(root):
            return []
        if not root.stat().st_mode & stat.S_ISVTX:
            message = f"{root} is open to all without the sticky bit: users can take away each other's directories"
            return [Finding("error", "runtime directory of users", message, f"chmod +t {root}")]
        if self._is_root():
            message = f"{root} is open to all; a directory that only root may write to is better"
            return [Finding("warning", "runtime directory of users", message, "unset LocalProxy.user_runtime_root")]
        return []

    # Helpers

    def _directory(self, gateway_id: str, kernel_id: str, user: str | None) -> Path:
        # Hashed: kernel ids may come from clients, and the path must be short and the kernel's alone.
        name = hashlib.sha256(f"{gateway_id}/{kernel_id}".encode()).hexdigest()[:16]
        if user is None:
            return Path(self.runtime_root) / name
        root = Path(self.user_runtime_root)
        if not _open_to_all(root):
            return root / user / name
        return self._unguessable(root, user) / name

    def _recorded_directory(self, state: State, user: str | None) -> Path:
        """Where a kernel's files are: where a launch has recorded that they are, or else where they would be now."""
        recorded = state.get("runtime_dir")
        if user is not None and isinstance(recorded, str):
            return Path(recorded)
        return self._directory(str(state["gateway_id"]), str(state["kernel_id"]), user)

    def _unguessable(self, root: Path, user: str) -> Path:
        """The user's directory where everybody may make one.

        A name that was seen once, and is free again (after a restart of the node), may be taken by somebody else: then
        it is the next one.
        """
        uid = self._uid(user)
        for number in range(NAMES):
            path = root / self._names.name(user, f"{user}/{number}")
            try:
                if path.lstat().st_uid == uid:
                    return path
            except FileNotFoundError:
                return path
        raise LaunchFailed(
            f"The kernel of {user} has no place for its files on the gateway's node; ask the administrator.",
            hint=f"somebody else has made {NAMES} directories of that user in {root}; see who owns them",
        )

    @cached_property
    def _names(self) -> DirectoryNames:
        return DirectoryNames(getattr(self.parent, "state_dir", ""))

    def _provide(self, parent: Path, user: str) -> None:
        """Make the user's directory in one that only root may write to."""
        if not self._is_root() or _open_to_all(parent.parent):
            return
        account = pwd.getpwnam(user)
        try:
            with contextlib.suppress(FileExistsError):
                parent.parent.mkdir()
                parent.parent.chmod(0o755)  # whatever the umask says
            parent.mkdir(mode=0o700, exist_ok=True)
            os.chown(parent, account.pw_uid, account.pw_gid, follow_symlinks=False)
        except OSError as error:
            raise LaunchFailed(
                f"The kernel of {user} has no place for its files on the gateway's node: {error.strerror}.",
                hint=f"{parent} cannot be made; see LocalProxy.user_runtime_root",
            ) from error

    @staticmethod
    def _other_user(name: object) -> str | None:
        """The unix user to act as; None where it is this process's own."""
        if not isinstance(name, str) or name == pwd.getpwuid(os.getuid()).pw_name:
            return None
        return name

    @staticmethod
    def _uid(user: str | None) -> int:
        """The id of a unix user, -1 of one that does not exist any more."""
        try:
            return os.getuid() if user is None else pwd.getpwnam(user).pw_uid
        except KeyError:
            return -1

    def _is_root(self) -> bool:
        """Whether this gateway may become any user by itself."""
        return os.geteuid() == 0

    def _runas(self, user: str, action: str, **request: Any) -> dict[str, Any]:
        prefix = [] if self._is_root() else [word.replace("{user}", user) for word in self.sudo_command]
        command = [*prefix, self.python, "-I", str(Path(self.launchers) / "runas.py")]
        return runas.call(command, {"user": user, "action": action, **request})


def _open_to_all(directory: Path) -> bool:
    """Whether everybody may make files in a directory."""
    try:
        return bool(directory.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False


def _usable(directory: str | None) -> str | None:
    return directory if directory and Path(directory).is_dir() and os.access(directory, os.X_OK) else None


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """The first line that the agent prints, or what came until it ended or the time was over."""
    assert process.stdout is not None
    fd, deadline, got = process.stdout.fileno(), time.monotonic() + LINE_SECONDS, b""
    while b"\n" not in got:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(fd, 65536) if ready else b""
        if not part:
            break
        got += part
    return got.split(b"\n", 1)[0]
