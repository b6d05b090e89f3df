"""The gateways under test, as real processes of their own: ours, and Enterprise Gateway from its own venv."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.client import Channels, Endpoint, Http
from tests.harness.gateway import ROOT, GatewayProcess
from tests.harness.waiting import until

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EnterpriseGateway", "Gateway", "HubGateway", "kernelspecs"]

MONITOR = Path(__file__).with_name("monitor.py")


def kernelspecs() -> dict[str, dict[str, Any]]:
    """The kernels of all measures: the same command for direct, ours and Enterprise Gateway."""
    flood = str(ROOT / "tests" / "harness" / "flood_kernel.py")
    common = {"language": "python", "metadata": {}}
    return {
        # Not "python": jupyter_client takes that name for the ipykernel of the gateway's own environment.
        "ipykernel": {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python",
            **common,
        },
        "flood": {"argv": [sys.executable, flood, "-f", "{connection_file}"], "display_name": "Flood", **common},
    }


class Gateway(abc.ABC):
    """A running gateway process and the requests that the measures make to it."""

    name = ""
    user = "bench"
    endpoint: Endpoint
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """End the gateway and its kernels."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def create(self, spec: str) -> str:
        """POST a kernel; its id."""
        with Http(self.endpoint) as http:
            status, body = http.request("POST", "/api/kernels", {"name": spec, "env": {"KERNEL_USERNAME": self.user}})
        if status != 201:
            raise RuntimeError(f"{self.name} answered {status}: {body[:500]!r}")
        return str(json.loads(body)["id"])

    def delete(self, kernel_id: str) -> None:
        with Http(self.endpoint) as http:
            http.request("DELETE", f"/api/kernels/{kernel_id}")

    def channels(self, kernel_id: str, *, v1: bool, receive_buffer: int | None = None) -> Channels:
        return Channels(self.endpoint, kernel_id, v1=v1, receive_buffer=receive_buffer)

    def start(self, spec: str) -> str:
        """A kernel that has answered; its id."""
        kernel_id = self.create(spec)
        with self.channels(kernel_id, v1=True) as channels:
            channels.kernel_info()
        return kernel_id

    def concurrent_starts(self, spec: str, count: int) -> tuple[float, int]:
        """Seconds from the first POST to the last kernel_info_reply of `count` kernels, and failed starts."""
        started = time.perf_counter()

        def one(_: int) -> float | None:
            try:
                self.start(spec)
            except (OSError, RuntimeError):
                return None
            return time.perf_counter() - started

        with ThreadPoolExecutor(count) as pool:
            succeeded = [seconds for seconds in pool.map(one, range(count)) if seconds is not None]
        self.delete_all()
        return max(succeeded, default=math.nan), count - len(succeeded)

    def kernels(self) -> list[str]:
        with Http(self.endpoint) as http:
            return [str(kernel["id"]) for kernel in json.loads(http.request("GET", "/api/kernels")[1])]

    def delete_all(self) -> None:
        """Delete every kernel and wait until its processes are gone."""
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(self.delete, self.kernels()))
        until(lambda: not self.children(), f"{self.name}: kernels gone", timeout=60)

    def children(self) -> list[psutil.Process]:
        """The processes below the gateway that live: agents and kernels."""
        alive = []
        for child in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child)
        return alive

    def cpu(self) -> float:
        """CPU seconds that the gateway process has used."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def children_cpu(self, having: str) -> float:
        """CPU seconds of the children whose command line holds `having`."""
        total = 0.0
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(having in word for word in child.cmdline()):
                    times = child.cpu_times()
                    total += times.user + times.system
        return total

    def descriptors(self) -> int:
        return psutil.Process(self.pid).num_fds()

    def rss(self) -> float:
        """Resident memory now, in MB."""
        return float(psutil.Process(self.pid).memory_info().rss) / 1e6

    def reset_peak(self) -> None:
        """Let the kernel's own record of the highest resident memory begin anew (Linux)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak(self) -> float:
        """Highest resident memory since `reset_peak`, in MB: exact, not sampled."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise RuntimeError("no VmHWM")

    def stalls(self, output: Path) -> list[dict[str, Any]]:
        """What the loop monitor has seen; only for a gateway that was started with it."""
        output.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR2)
        until(output.exists, "the loop monitor's answer")
        found: list[dict[str, Any]] = json.loads(output.read_text())
        return found


class HubGateway(Gateway):
    """Ours: `python -m hub_gateway` with a token file and its defaults."""

    name = "Hub Gateway"

    def __init__(
        self,
        root: Path,
        monitor: Path | None = None,
        env: Mapping[str, str] | None = None,
        *,
        users: Sequence[str] = ("bench",),
        specs: Mapping[str, Mapping[str, Any]] | None = None,
        config: str = "",
    ) -> None:
        class Monitored(GatewayProcess):
            def command(self) -> list[str]:
                command = super().command()
                return command if monitor is None else [command[0], str(MONITOR), str(monitor), *command[2:]]

        self.user = users[0]
        self.gateway = Monitored(
            root, users=users, admins=(), kernelspecs=specs or kernelspecs(), env=env, config=config
        )
        self.gateway.start()
        assert self.gateway.process is not None
        self.process = self.gateway.process
        self.endpoint = Endpoint("127.0.0.1", self.gateway.port, self.gateway.headers(self.user))

    def close(self) -> None:
        for agent in self.gateway.agents():
            agent.terminate()
        self.gateway.close()


class EnterpriseGateway(Gateway):
    """Enterprise Gateway with its defaults; `list_kernels` lets it list, KERNEL_USERNAME lets root run it."""

    name = "Enterprise Gateway"

    def __init__(self, root: Path, python: str, monitor: Path | None = None) -> None:
        specs = root / "kernels"
        for name, spec in kernelspecs().items():
            (specs / name).mkdir(parents=True, exist_ok=True)
            (specs / name / "kernel.json").write_text(json.dumps(spec))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        module = ["-m"] if monitor is None else [str(MONITOR), str(monitor)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "EG_", "KERNEL_", "PYTHON"))}
        environment |= {"JUPYTER_PATH": str(root), "JUPYTER_NO_CONFIG": "1", "EG_LIST_KERNELS": "True"}
        with (root / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen(
                [python, *module, "enterprise_gateway", "--ip=127.0.0.1", f"--port={port}", "--port_retries=0"],
                env=environment,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.endpoint = Endpoint("127.0.0.1", port, {})
        until(self.answers, f"Enterprise Gateway; see {root / 'gateway.log'}", timeout=60)

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"Enterprise Gateway ended with {self.process.returncode}")
        try:
            with Http(self.endpoint) as http:
                return http.request("GET", "/api")[0] == 200
        except OSError:
            return False

    def close(self) -> None:
        children = self.children() if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()


def in_parallel(count: int, work: Callable[[int], str]) -> Sequence[str]:
    """The results of `work` for 0 to count - 1, five at a time."""
    with ThreadPoolExecutor(5) as pool:
        return list(pool.map(work, range(count)))
