"""The files of jupyterhub_config/, as they are, in a real Hub. (managed.py and demo.py: test_wheel.py, `make demo`.)"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from hub_gateway._paths import jupyterhub_config_dir
from hub_gateway.demo.browser import Browser
from hub_gateway.demo.drive import start_server
from hub_gateway.demo.processes import Processes, until
from hub_gateway.demo.state import Demonstration
from tests.e2e.conftest import ONCE

pytestmark = ONCE

CONFIG = f"c = get_config()\nload_subconfig('demo.py', path={str(jupyterhub_config_dir())!r})\n"
SERVICE = "/services/hub-gateway"


@asynccontextmanager
async def running(config: str) -> AsyncIterator[Processes]:
    """The proxy, and a Hub with demo.py and `config`; not waited for."""
    demonstration = Demonstration(Path(tempfile.mkdtemp(prefix="hgc-")))
    demonstration.create()
    file = demonstration.path / "jupyterhub_config.py"
    file.write_text(CONFIG + config)
    processes = Processes(demonstration, demonstration.settings(port=0), hub_config=file)
    try:
        processes.start_proxy()
        processes.start_hub()
        yield processes
    finally:
        await processes.stop()
        shutil.rmtree(demonstration.path, ignore_errors=True)


@asynccontextmanager
async def browser(processes: Processes, name: str) -> AsyncIterator[Browser]:
    opened = Browser(processes.settings.public_url)
    try:
        await opened.log_in(name, processes.settings.user_password)
        yield opened
    finally:
        await opened.close()


async def test_group_only() -> None:
    """Members have the gateway's kernels; everybody else has a server that works without it."""
    config = (
        f"load_subconfig('group_only.py', path={str(jupyterhub_config_dir())!r})\n"
        "c.JupyterHub.load_groups = {'analysts': {'users': ['alice']}}\n"
    )
    async with running(config) as processes:
        await processes.ready()
        async with browser(processes, "alice") as alice:
            await start_server(alice)
            await alice.page("/user/alice/lab")
            assert "python_local" in (await alice.api("GET", "/user/alice/api/kernelspecs"))["kernelspecs"]
        async with browser(processes, "bob") as bob:
            page = await bob.client.get(f"{bob.base}{SERVICE}/home", headers={"Sec-Fetch-Mode": "navigate"})
            assert page.status_code == 403
            await start_server(bob)
            await bob.page("/user/bob/lab")
            assert "python3" in (await bob.api("GET", "/user/bob/api/kernelspecs"))["kernelspecs"]
            opened = await bob.api(
                "POST",
                "/user/bob/api/sessions",
                {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "python3"}},
            )
            notebook = await bob.notebook(opened["kernel"]["id"])
            messages = await notebook.run("print('local')")
            assert "local\n" in [m["content"].get("text") for m in messages]
            notebook.close()


async def test_external(tmp_path: Path) -> None:
    """A gateway that the Hub does not start, with the environment that external.py describes."""
    token = secrets.token_hex(32)
    token_file = tmp_path / "token"
    token_file.write_text(token)
    config = f"load_subconfig('external.py', path={str(jupyterhub_config_dir())!r})\n"
    os.environ["HUB_GATEWAY_TOKEN_FILE"] = str(token_file)
    try:
        async with running(config) as processes:
            settings = processes.settings
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KERNEL_"))},
                "JUPYTERHUB_SERVICE_NAME": "hub-gateway",
                "JUPYTERHUB_SERVICE_PREFIX": f"{SERVICE}/",
                "JUPYTERHUB_SERVICE_URL": settings.gateway_url,
                "JUPYTERHUB_API_URL": f"{settings.hub_url}/hub/api",
                "JUPYTERHUB_API_TOKEN": token,
                "JUPYTERHUB_CLIENT_ID": "service-hub-gateway",
                "JUPYTERHUB_BASE_URL": "/",
            }
            command = [sys.executable, "-m", "hub_gateway"]
            option = f"--config={processes.demonstration.gateway_config}"
            with (tmp_path / "gateway.log").open("wb") as log:
                gateway = subprocess.Popen([*command, option], env=environment, stdout=log, stderr=log)
            try:
                await processes.ready()
                checked = await asyncio.to_thread(
                    subprocess.run,
                    [*command, "check", option, "--json"],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                findings = {(found["level"], found["what"]) for found in json.loads(checked.stdout)}
                assert {("ok", "hub"), ("ok", "token"), ("ok", "scopes"), ("ok", "clock")} <= findings, checked.stdout
                assert checked.returncode == 0, checked.stdout
                async with browser(processes, "alice") as alice:
                    assert "alice" in (await alice.page(f"{SERVICE}/home")).text
                    minted = await alice.api("POST", "/hub/api/users/alice/tokens", {"note": "test"})
                await _a_kernel_comes_and_goes(settings.service_url, minted["token"])
            finally:
                gateway.terminate()
                await asyncio.to_thread(gateway.wait, 30)
    finally:
        del os.environ["HUB_GATEWAY_TOKEN_FILE"]


async def _a_kernel_comes_and_goes(url: str, token: str) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"token {token}"}, timeout=30) as client:
        kernel = f"{url}/api/kernels/{(await client.post(f'{url}/api/kernels', json={})).json()['id']}"

        async def idle() -> bool:
            return bool((await client.get(kernel)).json()["execution_state"] == "idle")

        await until(idle, "the kernel's start")
        assert (await client.delete(kernel)).status_code == 204
