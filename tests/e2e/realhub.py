"""A real JupyterHub with configurable-http-proxy and the gateway as its managed service: what `make demo` runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from hub_gateway._paths import kernelspecs_dir
from hub_gateway.demo.browser import Browser
from hub_gateway.demo.processes import Processes
from hub_gateway.demo.state import Demonstration, Settings
from tests.harness.gateway import ROOT, kernels_of

__all__ = ["RealHub"]


class RealHub:
    """One Hub with users alice, bob and admin. `start`, `stop_hub`, `start_hub`, `stop_proxy` may follow each other.

    `close` ends everything that it started, kernels too, by process id, and removes its directory.
    """

    def __init__(
        self,
        *,
        kernelspecs: Mapping[str, Mapping[str, Any]] | None = None,
        hub_config: Path | None = None,
        gateway_config: str = "",
        db_url: str | None = None,
    ) -> None:
        # Unix sockets need short paths, and pytest's are long.
        self.demonstration = Demonstration(Path(tempfile.mkdtemp(prefix="hgh-")))
        self.demonstration.create()
        self.settings: Settings = self.demonstration.settings(port=0)
        specs = self.demonstration.path / "kernelspecs"
        for name, spec in (kernelspecs or {}).items():
            (specs / name).mkdir(parents=True)
            (specs / name / "kernel.json").write_text(json.dumps(spec))
        added = f"c.KernelSpecManager.kernel_dirs = {[str(kernelspecs_dir()), str(specs)]!r}\n" + gateway_config
        if db_url is not None:
            added += f"c.HubGateway.db_url = {db_url!r}\n"
        # The managed service, the servers and the Hub itself: all find the package of this checkout.
        os.environ["PYTHONPATH"] = str(ROOT)
        self.processes = Processes(self.demonstration, self.settings, hub_config=hub_config, gateway_config=added)

    @property
    def url(self) -> str:
        """The Hub's proxy, without a slash at the end."""
        return self.settings.public_url.rstrip("/")

    @property
    def service(self) -> str:
        """The gateway, through the Hub's proxy."""
        return self.settings.service_url

    @property
    def ws_service(self) -> str:
        return "ws" + self.service.removeprefix("http")

    def start(self) -> RealHub:
        """Start proxy and Hub, and wait until the gateway answers through the proxy."""
        self.start_proxy()
        self.start_hub()
        return self

    def start_proxy(self) -> None:
        self.processes.start_proxy()

    def stop_proxy(self) -> None:
        asyncio.run(self.processes.stop_proxy())

    def start_hub(self) -> None:
        """Start the Hub, and wait until the gateway answers through the proxy."""
        self.processes.start_hub()
        self.ready()

    def stop_hub(self) -> None:
        """SIGTERM to the Hub, which ends gateway and servers; kernels stay."""
        asyncio.run(self.processes.stop_hub())

    def ready(self) -> None:
        """Wait until the gateway answers through the proxy."""
        asyncio.run(self.processes.ready())

    def close(self) -> None:
        asyncio.run(self.processes.stop())
        agents = self.agents()
        for agent in agents:
            agent.terminate()
        _, alive = psutil.wait_procs(agents, timeout=10)
        for agent in alive:
            agent.kill()
        shutil.rmtree(self.demonstration.path, ignore_errors=True)

    def agents(self) -> list[psutil.Process]:
        """The agents of this gateway's kernels."""
        try:
            facts = json.loads((self.demonstration.gateway_state / "gateway.json").read_text())
        except (OSError, ValueError):
            return []
        return kernels_of(facts["gateway_id"])

    def password(self, name: str) -> str:
        return self.settings.admin_password if name == "admin" else self.settings.user_password

    @asynccontextmanager
    async def browser(self, name: str | None) -> AsyncIterator[Browser]:
        """A browser in which `name` is logged in at the Hub (None: nobody)."""
        browser = Browser(self.settings.public_url)
        try:
            if name is not None:
                await browser.log_in(name, self.password(name))
            yield browser
        finally:
            await browser.close()

    def token(self, name: str, scopes: list[str] | None = None) -> str:
        """A new API token of a user; by default one that opens the gateway and nothing else."""

        async def mint() -> str:
            async with self.browser(name) as browser:
                await browser.page("/hub/home")
                wanted = scopes if scopes is not None else ["access:services!service=hub-gateway"]
                answer = await browser.api("POST", f"/hub/api/users/{name}/tokens", {"note": "test", "scopes": wanted})
                return str(answer["token"])

        return asyncio.run(mint())

    def client(self, token: str) -> httpx.Client:
        """An HTTP client of the gateway, through the Hub's proxy, with that token."""
        return httpx.Client(base_url=self.service, headers={"Authorization": f"token {token}"}, timeout=60)
