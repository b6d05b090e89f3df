"""A real dockerd from nothing, beside any other: own socket, data, bridge, cgroup. It takes root, and a second."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import docker
import psutil
import pytest
from docker.errors import DockerException

from tests.engines import SYSTEM_PATH, missing
from tests.engines.images import root_archive
from tests.harness.waiting import until

__all__ = ["IMAGE", "NO_PYTHON", "NO_PYZMQ", "SWARM_PORT", "Dockerd", "docker_engine", "run", "swarm_engine"]

IMAGE = "localhost/hub-gateway-test/python:latest"
"""Debian with Python, pyzmq and ipykernel. Of `localhost`, so that no daemon ever asks a registry for it."""
NO_PYTHON = "localhost/hub-gateway-test/empty:latest"
NO_PYZMQ = "localhost/hub-gateway-test/no-pyzmq:latest"
SWARM_PORT = 2377
"""At the daemon's own address."""
PREFIX = "hgt-docker-"
ENVIRONMENT = {"PATH": SYSTEM_PATH, "LANG": "C"}


class Dockerd:
    """One daemon in a directory of its own. `live_restore`: containers outlive it, and it can be no swarm."""

    def __init__(self, *, live_restore: bool) -> None:
        if reason := missing("docker"):
            pytest.skip(reason)
        if os.geteuid() != 0:
            pytest.skip("dockerd takes root")
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))  # short: unix sockets lie below it
        (self.directory / "owner").write_text(str(os.getpid()))
        self.name = f"hgt{self.directory.name[-8:]}"
        self.bridge = f"hgt{secrets.token_hex(4)}"
        (self.directory / "bridge").write_text(self.bridge)
        self.url = f"unix://{self.directory}/docker.sock"
        self.log = self.directory / "dockerd.log"
        self.address = ""
        """Where the machine is in the daemon's own network."""
        self._live_restore = live_restore
        self._process: subprocess.Popen[bytes] | None = None
        self._client: docker.DockerClient | None = None

    @property
    def client(self) -> docker.DockerClient:
        """The SDK at this daemon."""
        if self._client is None:
            self._client = docker.DockerClient(base_url=self.url, version="auto", timeout=60)
        return self._client

    def start(self) -> Dockerd:
        """Serve; where it cannot, the test is skipped with dockerd's own reason."""
        if not self.directory.exists():
            pytest.skip("dockerd did not come up before")
        if not self.address:
            try:
                self.address, network = self.make_network()
                (self.directory / "network").write_text(network)
            except RuntimeError as error:
                self.remove()
                pytest.skip(f"no bridge can be made here: {' '.join(str(error).split())[-300:]}")
        command = [
            *("dockerd", "--host", self.url, "--bridge", self.bridge, "--exec-opt", "native.cgroupdriver=cgroupfs"),
            *("--fixed-cidr", (self.directory / "network").read_text()),
            *("--data-root", f"{self.directory}/data", "--exec-root", f"{self.directory}/exec"),
            *("--pidfile", f"{self.directory}/dockerd.pid", "--cgroup-parent", f"/{self.name}"),
            # Another daemon of this machine keeps its rules; what is published goes through docker-proxy.
            *("--iptables=false", "--ip6tables=false", "--ip-masq=false"),
            *("--config-file", f"{self.directory}/none.json", "--default-address-pool", "base=10.214.0.0/16,size=24"),
        ]
        if self._live_restore:
            command.append("--live-restore")
        (self.directory / "none.json").write_text("{}")
        # After a kill its containerd may be a zombie that nobody reaps, for which the next dockerd would wait.
        (self.directory / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(shutil.which(command[0], path=SYSTEM_PATH)), *command[1:]],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=self.before_exec,
            )
        process = self._process
        until(lambda: process.poll() is not None or self.answers(), "dockerd answers", timeout=60)
        if process.poll() is not None:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.remove()
            pytest.skip(f"dockerd does not run here: {' '.join(last)[-300:]}")
        return self

    def before_exec(self) -> None:
        """What the daemon's process is to be, before it is dockerd."""
        end_with_parent()

    def make_network(self) -> tuple[str, str]:
        """A bridge for containers: its address, and those that containers get."""
        return make_bridge(self.bridge)

    def answers(self) -> bool:
        try:
            return bool(docker.APIClient(base_url=self.url, version="1.41", timeout=5).ping())
        except (DockerException, OSError):
            return False

    def images(self) -> None:
        """Make the images that the tests run."""
        api = self.client.api
        path = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", "LABEL test=hub-gateway"]
        with tempfile.TemporaryDirectory() as empty:
            nothing = Path(empty) / "empty.tar"
            run("tar", "-C", empty, "--exclude=./empty.tar", "-cf", str(nothing), ".")
            for image, archive in ((IMAGE, root_archive()), (NO_PYTHON, nothing)):
                repository, tag = image.split(":")
                api.import_image_from_file(str(archive), repository=repository, tag=tag, changes=path)
        maker = self.client.containers.create(
            IMAGE, ["rm", "-rf", "/usr/local/lib/python3.11/dist-packages/zmq"], network_mode="none"
        )
        maker.start()
        maker.wait()
        maker.commit(*NO_PYZMQ.split(":"), changes=path)
        maker.remove()

    def swarm(self) -> None:
        """Be a swarm of one node."""
        # Its name is fixed, its bridge is not: another swarm of this machine keeps its own.
        self.client.networks.create("docker_gwbridge", options=GATEWAY_BRIDGE | {NAME: f"{self.bridge[:-1]}w"})
        # An address that nobody else has: its ports are free, and other nodes reach them.
        self.client.swarm.init(
            advertise_addr=self.address,
            listen_addr=f"{self.address}:{SWARM_PORT}",
            default_addr_pool=["10.215.0.0/16"],
            data_path_addr=self.address,
        )

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Answer no more; with `live_restore` the containers go on."""
        if self._process is not None:
            served = members(self.directory, "containerd")
            self._process.send_signal(signum)
            self._process.wait(60)
            self._process = None
            if signum == signal.SIGKILL:  # its containerd goes with it, the shims of containers do not
                psutil.wait_procs([one for one in served if "shim" not in one.name()], timeout=10)

    def remove(self) -> None:
        """Leave nothing behind."""
        if self._client is not None:
            with contextlib.suppress(DockerException, OSError):
                for container in self._client.containers.list(all=True):
                    container.remove(force=True, v=True)
            self._client.close()
        self.stop()
        demolish(self.directory)


NAME = "com.docker.network.bridge.name"
GATEWAY_BRIDGE = {
    "com.docker.network.bridge.enable_icc": "false",
    "com.docker.network.bridge.enable_ip_masquerade": "false",
}


def docker_engine() -> Dockerd:
    """The daemon of this session, with its images."""
    return _usable(_serve(swarm=False))


def swarm_engine() -> Dockerd:
    """The swarm of this session: a daemon of its own, as live-restore and swarms exclude each other."""
    return _usable(_serve(swarm=True))


def _usable(found: Dockerd | str) -> Dockerd:
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _serve(*, swarm: bool) -> Dockerd | str:
    """A daemon, or why there is none: it is not tried again by each test."""
    try:
        daemon = Dockerd(live_restore=not swarm)
        atexit.register(daemon.remove)
        daemon.start()
    except pytest.skip.Exception as error:
        return str(error)
    daemon.images()
    if swarm:
        daemon.swarm()
    return daemon


def run(*command: str) -> str:
    """Run a program of the system; what it says. Raises `RuntimeError`."""
    program = shutil.which(command[0], path=SYSTEM_PATH)
    done = subprocess.run(
        [program or command[0], *command[1:]], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def end_with_parent() -> None:
    """Have Linux end the forked child when the test run is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def make_bridge(name: str, *within: str) -> tuple[str, str]:
    """Make a bridge, `within` a network namespace (`-n`, its name): its address, and the network for containers."""
    network = free_network()
    # With an address of its own, or it would change with each container, and stall connections.
    mac = ":".join(("02", *(f"{byte:02x}" for byte in secrets.token_bytes(5))))
    run("ip", *within, "link", "add", name, "address", mac, "type", "bridge")
    run("ip", *within, "addr", "add", f"{network[1]}/{network.prefixlen}", "dev", name)
    run("ip", *within, "link", "set", name, "up")
    # The upper half is for other nodes.
    return str(network[1]), str(next(network.subnets()))


def free_network() -> ipaddress.IPv4Network:
    """A network of which no interface of this machine is."""
    used = [
        ipaddress.ip_network(f"{one['local']}/{one['prefixlen']}", strict=False)
        for link in json.loads(run("ip", "-j", "-4", "addr"))
        for one in link["addr_info"]
    ]
    for number in range(256):
        network = ipaddress.ip_network(f"10.213.{number}.0/24")
        if not any(network.overlaps(one) for one in used):
            return network
    raise RuntimeError("no network is free for a bridge")


# Tear-down, also of what a killed run left


def sweep() -> None:
    """Remove the daemons of runs that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int((directory / "owner").read_text())):
                demolish(directory)


def demolish(directory: Path) -> None:
    """End every process, mount, bridge and cgroup of a daemon's directory, and remove it."""
    dockerd = members(directory, "dockerd")
    for process in dockerd:
        process.terminate()
    psutil.wait_procs(dockerd, timeout=20)
    family = members(directory)
    for process in list(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=20)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in sorted((one for one in mounts if one.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", path], env=ENVIRONMENT, capture_output=True, check=False)
    bridge = (directory / "bridge").read_text() if (directory / "bridge").exists() else ""
    for name in (bridge, f"{bridge[:-1]}w") if bridge else ():
        subprocess.run(["ip", "link", "delete", name], env=ENVIRONMENT, capture_output=True, check=False)
    if (directory / "namespace").exists():
        name = (directory / "namespace").read_text()
        subprocess.run(["ip", "netns", "delete", name], env=ENVIRONMENT, capture_output=True, check=False)
    for cgroup in sorted(Path("/sys/fs/cgroup").glob(f"**/hgt{directory.name[-8:]}/**/"), reverse=True):
        with contextlib.suppress(OSError):
            cgroup.rmdir()
    shutil.rmtree(directory, ignore_errors=True)


def members(directory: Path, name: str = "") -> list[psutil.Process]:
    """The processes with a path of that directory in their command lines, and (with a name) of that name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(f"{directory}/" in word for word in words) and name in process.name():
                found.append(process)
    return found
