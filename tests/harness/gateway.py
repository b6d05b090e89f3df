"""A real gateway process, stand-alone, with a token file: start it, kill it, start it again."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from tests.harness.waiting import until

__all__ = ["ROOT", "GatewayProcess", "kernels_of"]

ROOT = Path(__file__).resolve().parents[2]


def kernels_of(gateway_id: str) -> list[psutil.Process]:
    """The agent processes on this machine that carry this gateway's tag."""
    found = []
    for process in psutil.process_iter():
        try:
            argv = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
        if gateway_id in argv and "--kernel-id" in argv:
            found.append(process)
    return found


class GatewayProcess:
    """One stand-alone gateway with its own state directory, users and tokens.

    `start`, `stop` (SIGTERM) and `kill` (SIGKILL) may follow each other at will: the address and the
    state stay. `close` also ends every kernel that the gateway left.
    """

    def __init__(
        self,
        root: Path,
        *,
        users: Sequence[str] = ("alice", "bob"),
        admins: Sequence[str] = ("admin",),
        config: str = "",
        kernelspecs: Mapping[str, Mapping[str, object]] | None = None,
        db_url: str | None = None,
        env: Mapping[str, str] | None = None,
        base_url: str = "/",
    ) -> None:
        # Unix sockets need short paths, and pytest's are long.
        self.state = Path(tempfile.mkdtemp(prefix="hgt-"))
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.tokens = {user: secrets.token_hex(16) for user in (*users, *admins)}
        self.token_file = root / "tokens.json"
        self.write_tokens(admins)
        self.db_url = db_url or f"sqlite:///{self.state / 'hub-gateway.sqlite'}"
        self.base_url = base_url
        self.extra_env = dict(env or {})
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root / "gateway.log"
        specs = root / "kernels"
        for name, spec in (kernelspecs or {}).items():
            (specs / name).mkdir(parents=True, exist_ok=True)
            (specs / name / "kernel.json").write_text(json.dumps(spec))
        self.config_file = root / "config.py"
        self.config_file.write_text(
            "c = get_config()\n"
            f"c.KernelSpecManager.kernel_dirs = [{str(specs)!r}]\n"
            f"c.HubGateway.token_file = {str(self.token_file)!r}\n"
            f"c.HubGateway.state_dir = {str(self.state)!r}\n"
            + (f"c.HubGateway.db_url = {db_url!r}\n" if db_url else "")
            + config
        )

    def write_tokens(self, admins: Sequence[str] = ()) -> None:
        """Write the token file: hashes only, as an operator would keep it."""
        entries = [
            {
                "sha256": hashlib.sha256(token.encode()).hexdigest(),
                "user": user,
                "groups": [],
                "admin": user in admins,
            }
            for user, token in self.tokens.items()
        ]
        self.token_file.write_text(json.dumps({"tokens": entries}))
        self.token_file.chmod(0o600)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.base_url.rstrip('/')}"

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http")

    @property
    def gateway_id(self) -> str:
        found: str = json.loads((self.state / "gateway.json").read_text())["gateway_id"]
        return found

    def agents(self) -> list[psutil.Process]:
        """The agents of this gateway that live on this machine."""
        return kernels_of(self.gateway_id)

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "hub_gateway",
            f"--config={self.config_file}",
            f"--port={self.port}",
            f"--HubGateway.base_url={self.base_url}",
        ]

    def spawn(self, env: Mapping[str, str] | None = None) -> None:
        """Start the process and return at once."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "HUB_GATEWAY_", "KERNEL_"))}
        environment |= {"PYTHONPATH": str(ROOT), **self.extra_env, **(env or {})}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> GatewayProcess:
        """Start it and wait until it is ready; a process that ends before that fails with its log."""
        (self.state / "gateway.json").unlink(missing_ok=True)
        self.spawn(env)

        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}:\n{self.tail()}")
            try:
                self.port = json.loads((self.state / "gateway.json").read_text())["port"]
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            except (OSError, ValueError, KeyError, httpx.HTTPError):
                return False

        until(ready, f"gateway ready; its log:\n{self.tail()}", timeout=timeout)
        return self

    def tail(self, size: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the process to end by itself; its exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, as a service manager does it; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def close(self) -> None:
        """End the gateway and every kernel it left, and remove its state."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        if (self.state / "gateway.json").exists():
            agents = self.agents()
            for agent in agents:
                agent.terminate()
            _, alive = psutil.wait_procs(agents, timeout=10)
            for agent in alive:
                agent.kill()
        shutil.rmtree(self.state, ignore_errors=True)

    def headers(self, user: str) -> dict[str, str]:
        return {"Authorization": f"token {self.tokens[user]}"}

    def client(self, user: str) -> httpx.Client:
        """An HTTP client that carries the user's token."""
        return httpx.Client(base_url=self.url, headers=self.headers(user), timeout=60)
