"""`jupyter hubgateway demo`: start it, say what to try, and end it again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select
from traitlets import Bool, Integer, Unicode, default

from hub_gateway import __version__
from hub_gateway.cli.strict import StrictApp
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel
from hub_gateway.demo.drive import drive, step
from hub_gateway.demo.processes import Processes, end, find_proxy
from hub_gateway.demo.state import Demonstration, Settings
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies.registry import Proxies
from hub_gateway.statedir import StateDir

__all__ = ["Demo"]

ENDED = (KernelStatus.STOPPED.value, KernelStatus.FAILED.value)


class Demo(StrictApp):
    """Run a JupyterHub with the gateway on this machine: alice, bob and admin, JupyterLab, local kernels.

    It listens on the loopback interface only, and needs neither root nor Docker. Ctrl-C ends it. Kernels
    go on, as they do when a gateway is restarted, and the next demonstration finds them.
    """

    name = "jupyter-hubgateway-demo"
    version = __version__
    description = __doc__
    examples = """
    jupyter hubgateway demo                   # then open the address that it prints
    jupyter hubgateway demo --check           # drive it once without a browser: `demo: ok`
    jupyter hubgateway demo --stop-kernels    # end the kernels that it left
    """
    aliases = {"directory": "Demo.directory", "port": "Demo.port"}
    flags = {
        "check": (
            {"Demo": {"check": True}},
            "Do what a user would do, in a directory that is removed afterwards; exit code 1 at the first thing wrong.",
        ),
        "stop-kernels": (
            {"Demo": {"stop_kernels": True}},
            "End the kernels of earlier demonstrations, and nothing else.",
        ),
    }

    directory = Unicode(
        help="""Where it keeps users' homes, databases and logs. By default `.demo` in a checkout, else
        `hub-gateway/demo` in Jupyter's data directory."""
    ).tag(config=True)
    port = Integer(8000, help="Port of the Hub's proxy; another one where it is taken.").tag(config=True)
    check = Bool(False, help="Do what a user would do, and end.").tag(config=True)
    stop_kernels = Bool(False, help="End the kernels of earlier demonstrations, and nothing else.").tag(config=True)

    @default("directory")
    def _default_directory(self) -> str:
        return str(Path(self.data_dir) / "hub-gateway" / "demo")

    def start(self) -> None:
        """Run it to its end; the process ends with its exit code."""
        super().start()
        try:
            sys.exit(asyncio.run(self._run()))
        except GatewayError as error:
            sys.exit(f"demo: {error.message}")

    async def _run(self) -> int:
        if self.check:
            # A short path: kernels' sockets lie below it.
            directory = Path(tempfile.mkdtemp(prefix="hub-gateway-demo-"))
            try:
                return await self._serve(Demonstration(directory), self._drive, port=0)
            finally:
                await _end_kernels(Demonstration(directory))
                shutil.rmtree(directory, ignore_errors=True)
        demonstration = Demonstration(Path(self.directory).expanduser().absolute())
        if self.stop_kernels:
            ended = await _end_kernels(demonstration)
            print("1 kernel was ended." if ended == 1 else f"{ended} kernels were ended.")
            return 0
        return await self._serve(demonstration, self._wait, port=self.port)

    async def _serve(self, demonstration: Demonstration, inside: Any, *, port: int) -> int:
        """Start everything, run `inside`, and end everything but kernels, whatever happens."""
        find_proxy()
        demonstration.create()
        lock = StateDir(demonstration.path)
        if not lock.try_lock():
            raise _Running(f"A demonstration runs in {demonstration.path} already (pid {lock.lock_holder()}).")
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, stop.set)
        await asyncio.to_thread(end, demonstration.left_over(), 10.0)
        processes = Processes(demonstration, demonstration.settings(port))
        try:
            work = loop.create_task(inside(processes))
            stopped = loop.create_task(stop.wait())
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return int(work.result())
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return 130 if self.check else 0
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(signum, _patience)
            if not self.check:
                print("\nStopping the Hub, its proxy, servers and the gateway ...", flush=True)
            await processes.stop()
            if not self.check:
                _say_what_is_left(demonstration)
            lock.unlock()

    async def _start(self, processes: Processes) -> str | None:
        processes.start_proxy()
        processes.start_hub()
        await processes.ready()
        return None

    async def _wait(self, processes: Processes) -> int:
        print("Starting JupyterHub and the gateway ...", flush=True)
        try:
            await self._start(processes)
        except GatewayError:
            print(processes.tail("jupyterhub"))
            raise
        print(_banner(processes.settings, processes.demonstration), flush=True)
        while True:
            processes.check_alive()
            await asyncio.sleep(1.0)

    async def _drive(self, processes: Processes) -> int:
        def say(text: str) -> None:
            print(text, flush=True)

        started = time.monotonic()
        try:
            await step(say, "JupyterHub, its proxy and the gateway start", self._start(processes))
            await drive(processes.settings, say)
            await step(say, "everything stops", processes.stop())
        except GatewayError as error:
            print(f"demo: FAILED: {error.message}", flush=True)
            print(f"\nThe end of JupyterHub's log:\n{processes.tail('jupyterhub', 6000)}", flush=True)
            return 1
        print(f"{time.monotonic() - started:7.2f} s  in all\ndemo: ok", flush=True)
        return 0


class _Running(GatewayError):
    """Another demonstration holds the directory."""


def _patience() -> None:
    print("It is being stopped; a few seconds.", flush=True)


def _banner(settings: Settings, demonstration: Demonstration) -> str:
    left = _kernels(demonstration)
    found = "\n".join(f"    {kernel_id}  {owner}, {kernelspec}" for kernel_id, owner, kernelspec in left)
    return f"""
JupyterHub is at   {settings.public_url}

    alice, bob     password {settings.user_password}
    admin          password {settings.admin_password}

To try:
  - Log in as alice, open a notebook with the kernel "Python 3 (gateway's machine)", run something long.
  - Stop this with Ctrl-C while it runs, and start it again: the kernel is still there.
  - {settings.service_url}/home lists your kernels and your limits. Log in as bob in a private window: he sees none
    of alice's, and his second kernel is refused.
  - Log in as admin in another one: {settings.service_url}/admin/policies/bob-one raises his limit.
  - In a terminal of JupyterLab: jupyter hubgateway kernels list

Logs, homes and databases are in {demonstration.path}
{f"Still running from before:{chr(10)}{found}" if left else "No kernel is left from before."}

Ctrl-C stops it. Kernels go on; `jupyter hubgateway demo --stop-kernels` (make demo ARGS=--stop-kernels) ends them."""


def _kernels(demonstration: Demonstration) -> list[tuple[str, str, str]]:
    """Id, owner and kernelspec of what the gateway's database says is running."""
    file = demonstration.gateway_state / "hub-gateway.sqlite"
    if not file.exists():
        return []
    db = Database(f"sqlite:///{file}", pool_size=1)
    query = select(Kernel.id, Kernel.owner, Kernel.kernelspec).where(Kernel.status.not_in(ENDED)).order_by(Kernel.id)
    return db.read_sync(lambda session: [(row[0], row[1], row[2]) for row in session.execute(query)])


def _say_what_is_left(demonstration: Demonstration) -> None:
    left = len(_kernels(demonstration))
    if left:
        how_many = "1 kernel goes on" if left == 1 else f"{left} kernels go on"
        print(f"Stopped. {how_many}; to end what is left: jupyter hubgateway demo --stop-kernels")
    else:
        print("Stopped.")


async def _end_kernels(demonstration: Demonstration) -> int:
    """End what the gateway's kernels left on this machine, found by their tags; how many there were."""
    gateway_id = str(StateDir(demonstration.gateway_state).read_address().get("gateway_id") or "")
    if not gateway_id:
        return 0
    proxies = Proxies(state_dir=str(demonstration.gateway_state))
    try:
        local = proxies.get("local")
        found = await local.owned(gateway_id)
        for kernel in found:
            await local.terminate(kernel.state)
    finally:
        await proxies.close()
    return len(found)
