"""What a demonstration keeps between two runs: its directory, its passwords, its addresses, its processes."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Demonstration", "Settings", "free_port"]


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else a port that the system chooses. Loopback."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("there is no free port on 127.0.0.1")


@dataclass(frozen=True)
class Settings:
    """What demo.py of jupyterhub_config/ reads."""

    directory: str
    public_url: str
    hub_url: str
    proxy_api_url: str
    gateway_url: str
    """Where the gateway listens, without its prefix."""
    user_password: str
    admin_password: str

    @property
    def service_url(self) -> str:
        """The gateway, as users and their servers reach it."""
        return f"{self.public_url}services/hub-gateway"


class Demonstration:
    """The directory of one demonstration. Mode 0700: it holds passwords."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "settings.json"
        self.gateway_config = path / "jupyter_hubgateway_config.py"
        self.gateway_state = path / "gateway"
        self._processes_file = path / "processes.json"

    def create(self) -> None:
        """Make the directory, closed to others."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        (self.path / "homes").mkdir(exist_ok=True)

    def settings(self, port: int) -> Settings:
        """The settings for a run: passwords and addresses of the last one, where they are still free."""
        before = self._read(self.settings_file)

        def address(name: str, wanted: int = 0) -> str:
            last = str(before.get(name, "")).rstrip("/").rpartition(":")[2]
            return f"http://127.0.0.1:{free_port(int(last) if last.isdigit() and not wanted else wanted)}"

        settings = Settings(
            directory=str(self.path),
            public_url=address("public_url", port) + "/",
            hub_url=address("hub_url"),
            proxy_api_url=address("proxy_api_url"),
            gateway_url=address("gateway_url"),
            user_password=str(before.get("user_password") or secrets.token_hex(6)),
            admin_password=str(before.get("admin_password") or secrets.token_hex(20)),
        )
        self._write(self.settings_file, asdict(settings))
        return settings

    def record(self, processes: list[psutil.Process]) -> None:
        """Note the processes of this run, for a later one that has to end them."""
        self._write(self._processes_file, {"processes": [[p.pid, p.create_time()] for p in processes]})

    def left_over(self) -> list[psutil.Process]:
        """Processes of an earlier run that was killed; told apart from newer ones with the same id."""
        found = []
        for pid, created in self._read(self._processes_file).get("processes", []):
            try:
                process = psutil.Process(pid)
                if abs(process.create_time() - created) < 0.1:
                    found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        aside = path.with_suffix(f".{os.getpid()}")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(content, file, indent=1)
        aside.replace(path)
