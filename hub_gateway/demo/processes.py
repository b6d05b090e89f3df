"""The processes of a demonstration: the proxy and the Hub, which starts the gateway and the servers."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import httpx
import psutil

from hub_gateway._paths import jupyterhub_config_dir, kernelspecs_dir
from hub_gateway.demo.state import Demonstration, Settings
from hub_gateway.errors import LaunchFailed

__all__ = ["Processes", "end", "find_proxy", "until"]

STOP_SECONDS = 40.0


class NotReady(LaunchFailed):
    """A part of the demonstration does not come up."""


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 90.0) -> None:
    """Wait for a condition. Raises `NotReady` after that many seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            raise NotReady(f"{what} did not happen within {seconds:.0f} s.")
        await asyncio.sleep(0.1)


def find_proxy() -> list[str]:
    """The command of configurable-http-proxy: on PATH, or in node_modules/ of this checkout. Raises `NotReady`."""
    local = jupyterhub_config_dir().parent / "node_modules" / ".bin" / "configurable-http-proxy"
    program = shutil.which("configurable-http-proxy") or (str(local) if local.exists() else None)
    if program is None:
        raise NotReady(
            "configurable-http-proxy, JupyterHub's proxy, was not found; install it (it needs Node.js 20 or newer): "
            "npm install -g configurable-http-proxy"
        )
    if shutil.which("node") is None:
        raise NotReady("configurable-http-proxy needs Node.js 20 or newer, and there is no `node` on PATH.")
    return [program]


class Processes:
    """Starts, watches and ends them. The Hub and the proxy have sessions of their own: a Ctrl-C in the terminal
    reaches this process alone, which then ends them in the right order."""

    def __init__(
        self,
        demonstration: Demonstration,
        settings: Settings,
        *,
        hub_config: Path | None = None,
        gateway_config: str = "",
    ) -> None:
        """`hub_config` takes the place of demo.py; `gateway_config` is added to the gateway's configuration."""
        self.demonstration = demonstration
        self.settings = settings
        self.hub_config = hub_config or jupyterhub_config_dir() / "demo.py"
        self.gateway_config = gateway_config
        self.proxy_token = secrets.token_hex(32)
        self.proxy: subprocess.Popen[bytes] | None = None
        self.hub: subprocess.Popen[bytes] | None = None

    def log(self, name: str) -> Path:
        """The log file of the proxy or the Hub (with gateway and servers)."""
        return self.demonstration.path / f"{name}.log"

    def start_proxy(self) -> None:
        """Start configurable-http-proxy. Apart from the Hub, so that its routes outlive a restart of the Hub."""
        public, api = (httpx.URL(url) for url in (self.settings.public_url, self.settings.proxy_api_url))
        command = [*find_proxy(), f"--ip={public.host}", f"--port={public.port}"]
        command += [f"--api-ip={api.host}", f"--api-port={api.port}", f"--default-target={self.settings.hub_url}"]
        command += [f"--error-target={self.settings.hub_url}/hub/error"]
        self.proxy = self._spawn("proxy", command, {"CONFIGPROXY_AUTH_TOKEN": self.proxy_token})

    def start_hub(self) -> None:
        """Start JupyterHub, and with it the gateway."""
        self._write_gateway_config()
        command = [sys.executable, "-m", "jupyterhub", f"--config={self.hub_config}"]
        environment = {
            "CONFIGPROXY_AUTH_TOKEN": self.proxy_token,
            "HUB_GATEWAY_DEMO": str(self.demonstration.settings_file),
            "HUB_GATEWAY_PUBLIC_URL": self.settings.public_url,
            "HUB_GATEWAY_LISTEN_URL": self.settings.gateway_url,
            "HUB_GATEWAY_CONFIG": str(self.demonstration.gateway_config),
        }
        self.hub = self._spawn("jupyterhub", command, environment)

    async def ready(self) -> None:
        """Wait until the gateway answers through the proxy. Raises `NotReady` with the end of the Hub's log."""
        # First at its own address: until the route is there, the proxy asks the Hub, whose log that would fill.
        direct = f"{self.settings.gateway_url}{httpx.URL(self.settings.service_url).path}"
        async with httpx.AsyncClient(timeout=5) as client:

            async def answers(url: str) -> bool:
                self.check_alive()
                try:
                    return (await client.get(f"{url}/readyz")).status_code == 200
                except httpx.HTTPError:
                    return False

            await until(lambda: answers(direct), "the gateway's first answer")
            await until(
                lambda: answers(self.settings.service_url), "the gateway's first answer through the Hub's proxy"
            )

    def check_alive(self) -> None:
        """Raise `NotReady`, with the end of its log, where one of them has ended."""
        for name, process in (("proxy", self.proxy), ("jupyterhub", self.hub)):
            if process is not None and process.poll() is not None:
                code = process.returncode
                raise NotReady(f"{name} ended with exit code {code}; its log is {self.log(name)}.")

    async def stop(self) -> None:
        """End the Hub (and with it, in this order, gateway and servers), then the proxy. Kernels stay."""
        await self.stop_hub()
        await self.stop_proxy()

    async def stop_proxy(self) -> None:
        """End the proxy."""
        if self.proxy is not None:
            await asyncio.to_thread(end, _tree(self.proxy.pid), 5.0)
            self.proxy.wait()
            self.proxy = None

    async def stop_hub(self) -> None:
        """End the Hub. It ends the gateway first: servers that say goodbye to their kernels find nobody at home."""
        if self.hub is None:
            return
        tree = _tree(self.hub.pid)
        self.hub.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self.hub.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.hub.kill()
            self.hub.wait()
        # What the Hub should have ended: none, unless it was killed.
        await asyncio.to_thread(end, tree, 5.0)
        self.hub = None

    def tail(self, name: str, size: int = 3000) -> str:
        """The end of a log."""
        try:
            return self.log(name).read_text(errors="replace")[-size:]
        except OSError:
            return ""

    def _spawn(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KERNEL_", "CONFIGPROXY_"))}
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**kept, **environment},
                cwd=self.demonstration.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.demonstration.record([psutil.Process(p.pid) for p in (self.proxy, self.hub, process) if p is not None])
        return process

    def _write_gateway_config(self) -> None:
        base = jupyterhub_config_dir()
        self.demonstration.gateway_config.write_text(
            "# Written by each start of the demonstration.\n"
            "c = get_config()\n"
            f"load_subconfig('gateway_config.py', path={str(base)!r})\n"
            f"c.HubGateway.state_dir = {str(self.demonstration.gateway_state)!r}\n"
            f"c.KernelSpecManager.kernel_dirs = [{str(kernelspecs_dir())!r}]\n"
            "c.KernelSpecs.default_kernelspec = 'python_local'\n"
            "c.KernelSpecs.allowed_kernelspecs = ['python_local']\n"  # the other samples need hosts, or a daemon
            f"c.QuotaService.initial_policies = {str(base / 'demo_policies.yaml')!r}\n" + self.gateway_config
        )


def _tree(pid: int) -> list[psutil.Process]:
    """A process and what it started, except kernels: those have an agent of their own session above them."""
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [member for member in members if not _of_a_kernel(member)]


def _of_a_kernel(process: psutil.Process) -> bool:
    """Whether the process is a kernel's agent, or below one."""
    try:
        return any("--kernel-id" in each.cmdline() for each in (process, *process.parents()))
    except psutil.Error:
        return False


def end(processes: Iterable[psutil.Process], seconds: float) -> None:
    """SIGTERM, and SIGKILL after `seconds`; kernels and their agents are left alone."""
    alive = [process for process in processes if process.is_running() and not _of_a_kernel(process)]
    for process in alive:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(alive, timeout=seconds)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _send(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return
