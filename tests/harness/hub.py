"""A real JupyterHub with its real proxy, the gateway as its managed service, and single-user Lab servers."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.harness.gateway import ROOT, kernels_of
from tests.harness.waiting import until

__all__ = ["RealHub", "proxy_command"]

SERVICE = "hub-gateway"
PASSWORD = "correct horse battery"
NAVIGATE = {"Sec-Fetch-Mode": "navigate"}


def proxy_command() -> str | None:
    """configurable-http-proxy as `make` installs it, or as it is on PATH."""
    local = ROOT / "node_modules" / ".bin" / "configurable-http-proxy"
    return str(local) if local.exists() else shutil.which("configurable-http-proxy")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: Hub and proxy must know each other's before they start."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


CONFIG = """
import os, sys
c = get_config()
c.JupyterHub.bind_url = "http://127.0.0.1:{public}{base_url}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api}"
c.ConfigurableHTTPProxy.should_start = False
c.JupyterHub.last_activity_interval = 5  # how soon the Hub gives a restarted proxy its routes again
c.ConfigurableHTTPProxy.auth_token = {proxy_token!r}
c.JupyterHub.cleanup_servers = False
c.JupyterHub.cleanup_proxy = False
c.JupyterHub.db_url = "sqlite:///{root}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{root}/hub_cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {{"admin"}}
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{root}/home/{{username}}"
c.Spawner.args = ["--allow-root", {spawner_args}]
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.start_timeout = 90
c.Spawner.http_timeout = 90
c.Spawner.server_token_scopes = [
    "users:activity!user", "access:servers!server", "access:services!service={service}"]
c.Spawner.environment = {{
    "JUPYTER_GATEWAY_URL": "http://127.0.0.1:{public}{base_url}services/{service}",
    "JUPYTER_GATEWAY_WS_URL": "ws://127.0.0.1:{public}{base_url}services/{service}",
    "JUPYTER_GATEWAY_AUTH_TOKEN": lambda spawner: spawner.api_token,
    "JUPYTER_GATEWAY_ALLOWED_ENVS": "JPY_SESSION_NAME",
    "PYTHONPATH": {pythonpath!r},
}}
c.JupyterHub.extra_user_scopes = {{"access:services!service={service}"}}
c.JupyterHub.load_roles = [
    {{"name": "hub-gateway-service", "services": ["{service}"], "scopes": [
        "list:users", "read:users:name", "read:users:groups", "read:users:activity",
        "list:groups", "read:groups", "users:activity"]}},
    {{"name": "tests", "services": ["tests"], "scopes": [
        "admin:users", "admin:servers", "admin:groups", "tokens", "read:hub",
        "access:servers", "access:services"]}},
]
c.JupyterHub.services = [
    {{"name": "{service}", "url": "http://127.0.0.1:{gateway}", "oauth_no_confirm": True, "timeout": 60,
      "command": [sys.executable, "-m", "hub_gateway", "--config={root}/gateway_config.py"],
      "environment": {{"PYTHONPATH": {pythonpath!r}, "PYTHONUNBUFFERED": "1"}}}},
    {{"name": "tests", "api_token": {admin_token!r}}},
]
{extra}
"""


class RealHub:
    """Proxy, Hub and gateway as processes of their own, each of which can be killed and started again."""

    def __init__(
        self,
        *,
        kernelspecs: dict[str, dict[str, Any]],
        base_url: str = "/",
        extra: str = "",
        gateway_config: str = "",
        spawner_args: tuple[str, ...] = (),
        db_url: str | None = None,
    ) -> None:
        proxy = proxy_command()
        assert proxy, "configurable-http-proxy is not installed: run `make test`"
        self.root = Path(tempfile.mkdtemp(prefix="hgh-"))
        self.state = self.root / "g"
        self.db_url = db_url or f"sqlite:///{self.state / 'hub-gateway.sqlite'}"
        self.base_url = base_url
        self.admin_token, self.proxy_token = secrets.token_hex(16), secrets.token_hex(16)
        self.public, self.hub_port, self.api, self.gateway_port = free_ports(4)
        for name, spec in kernelspecs.items():
            (self.root / "kernels" / name).mkdir(parents=True)
            (self.root / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
        (self.root / "gateway_config.py").write_text(
            "c = get_config()\n"
            f"c.HubGateway.state_dir = {str(self.state)!r}\n"
            f"c.KernelSpecManager.kernel_dirs = [{str(self.root / 'kernels')!r}]\n"
            + (f"c.HubGateway.db_url = {db_url!r}\n" if db_url else "")
            + gateway_config
        )
        (self.root / "jupyterhub_config.py").write_text(
            CONFIG.format(
                root=self.root,
                public=self.public,
                hub=self.hub_port,
                api=self.api,
                gateway=self.gateway_port,
                base_url=base_url,
                service=SERVICE,
                password=PASSWORD,
                proxy_token=self.proxy_token,
                admin_token=self.admin_token,
                pythonpath=str(ROOT),
                extra=extra,
                spawner_args=", ".join(repr(a) for a in spawner_args),
            )
        )
        self.proxy: subprocess.Popen[bytes] | None = None
        self.hub: subprocess.Popen[bytes] | None = None
        self.start_proxy()
        self.start_hub()

    # -- processes ----------------------------------------------------------------------------------

    def _spawn(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KERNEL_", "HUB_GATEWAY"))}
        with (self.root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env={**environment, "PYTHONPATH": str(ROOT), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_proxy(self) -> None:
        """Start configurable-http-proxy, apart from the Hub, so that routes outlive the Hub."""
        command = proxy_command()
        assert command
        arguments = ["--ip=127.0.0.1", f"--port={self.public}", "--api-ip=127.0.0.1", f"--api-port={self.api}"]
        arguments.append(f"--default-target=http://127.0.0.1:{self.hub_port}")
        self.proxy = self._spawn("proxy", [command, *arguments], {"CONFIGPROXY_AUTH_TOKEN": self.proxy_token})
        until(lambda: self._listens(self.public), f"the proxy to listen: {self.root}/proxy.log")

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def start_hub(self, timeout: float = 90) -> None:
        """Start the Hub and wait until the gateway answers through the proxy."""
        self.hub = self._spawn(
            "hub", [sys.executable, "-m", "jupyterhub", "-f", str(self.root / "jupyterhub_config.py")], {}
        )
        until(self._ready, f"Hub and gateway up: {self.root}/hub.log", timeout=timeout, interval=0.1)

    def _ready(self) -> bool:
        assert self.hub is not None
        assert self.hub.poll() is None, self.log()
        try:
            return httpx.get(f"{self.gateway_url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def log(self, name: str = "hub", size: int = 8000) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")[-size:]

    @property
    def gateway_pid(self) -> int:
        """The process id of the gateway that holds the state directory; 0 while it writes that down."""
        return int((self.state / "gateway.lock").read_text() or 0)

    def agents(self) -> list[psutil.Process]:
        """The agents of this gateway's kernels."""
        return kernels_of(json.loads((self.state / "gateway.json").read_text())["gateway_id"])

    def stop_hub(self) -> None:
        """SIGTERM: the Hub stops its managed service too; single-user servers stay (cleanup_servers is off)."""
        assert self.hub is not None
        self.hub.send_signal(signal.SIGTERM)
        self.hub.wait(40)

    def close(self) -> None:
        """End Hub, gateway, proxy, single-user servers and kernels, by process id."""
        assert self.hub is not None
        assert self.proxy is not None
        servers = [p for p in psutil.process_iter() if self._is_mine(p)]
        if self.hub.poll() is None:
            self.hub.terminate()
            try:
                self.hub.wait(30)
            except subprocess.TimeoutExpired:
                self.hub.kill()
        self.proxy.terminate()
        self.proxy.wait(10)
        agents = self.agents() if (self.state / "gateway.json").exists() else []
        for process in (*servers, *agents):
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs([*servers, *agents], timeout=10)
        for process in alive:
            process.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def _is_mine(self, process: psutil.Process) -> bool:
        """Whether a process is a single-user server or a service of this Hub: it works in this root."""
        try:
            return (
                process.pid != os.getpid() and any(str(self.root) in argument for argument in process.cmdline())
            ) or (process.environ().get("JUPYTERHUB_API_URL", "").startswith(f"http://127.0.0.1:{self.hub_port}/"))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    # -- addresses and people -----------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.public}{self.base_url.rstrip('/')}"

    @property
    def gateway_url(self) -> str:
        return f"{self.url}/services/{SERVICE}"

    @property
    def admin(self) -> httpx.Client:
        """The Hub's REST API, as a service that may administer it."""
        return httpx.Client(
            base_url=f"{self.url}/hub/api", headers={"Authorization": f"token {self.admin_token}"}, timeout=60
        )

    def user_token(self, name: str, **options: Any) -> str:
        """A new API token of a user (made if need be)."""
        with self.admin as hub:
            hub.post(f"/users/{name}")
            answer = hub.post(f"/users/{name}/tokens", json=options)
            answer.raise_for_status()
            token: str = answer.json()["token"]
            return token

    def start_server(self, name: str, timeout: float = 120) -> str:
        """Start a user's default single-user server; its URL."""
        with self.admin as hub:
            hub.post(f"/users/{name}")
            answer = hub.post(f"/users/{name}/server")
            assert answer.status_code in (201, 202, 400), answer.text

            def ready() -> bool:
                return bool(hub.get(f"/users/{name}").json()["servers"].get("", {}).get("ready"))

            until(ready, f"{name}'s server: {self.log()}", timeout=timeout, interval=0.2)
        return f"{self.url}/user/{name}"

    def browser(self, name: str, page: str | None = None) -> tuple[httpx.Client, httpx.Response]:
        """Log in through the Hub's pages as a browser would, on the way to `page`; the session and the page."""
        session = httpx.Client(headers=NAVIGATE, timeout=60, follow_redirects=True)
        answer = session.get(page or f"{self.gateway_url}/home")
        if "/hub/login" in str(answer.url):
            xsrf = re.search(r'name="_xsrf" value="([^"]+)"', answer.text)
            answer = session.post(
                str(answer.url),
                data={"username": name, "password": PASSWORD, "_xsrf": xsrf.group(1) if xsrf else ""},
            )
        return session, answer
