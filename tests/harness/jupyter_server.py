"""A stock jupyter_server in the place of a single-user server: its gateway environment is all it knows of us."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.harness.waiting import until

__all__ = ["JupyterServer"]


class JupyterServer:
    """One jupyter_server process; `arguments` are further command line options."""

    exactly_once = False
    """Whether its connection class names the last number it saw."""

    def __init__(
        self,
        root: Path,
        *,
        gateway_url: str | None,
        gateway_token: str = "",
        arguments: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.root = root
        self.token = secrets.token_hex(16)
        self.runtime = root / "runtime"
        (root / "work").mkdir(parents=True, exist_ok=True)
        self.log = root / "jupyter_server.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KERNEL_"))}
        environment |= {
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTER_DATA_DIR": str(root / "data"),
            "JUPYTER_CONFIG_DIR": str(root / "config"),
            "HOME": str(root),
            # Read from the environment, so that it stands in nobody's process list.
            "JUPYTER_TOKEN": self.token,
        }
        if gateway_url is not None:
            environment |= {
                "JUPYTER_GATEWAY_URL": gateway_url,
                "JUPYTER_GATEWAY_WS_URL": "ws" + gateway_url.removeprefix("http"),
                "JUPYTER_GATEWAY_AUTH_TOKEN": gateway_token,
            }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    "-m",
                    "jupyter_server",
                    "--ServerApp.port=0",
                    "--no-browser",
                    "--allow-root",
                    f"--ServerApp.root_dir={root / 'work'}",
                    *arguments,
                ],
                env={**environment, **(env or {})},
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.url = until(self._address, f"jupyter_server up: {self.log}", timeout=60)

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        for file in self.runtime.glob("jpserver-*.json"):
            try:
                url: str = json.loads(file.read_text())["url"].rstrip("/")
                if httpx.get(f"{url}/api/status", headers=self.headers, timeout=5).status_code == 200:
                    return url
            except (OSError, ValueError, KeyError, httpx.HTTPError):
                continue
        return None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=90)

    def open_notebook(self, kernel: str, path: str = "a.ipynb") -> str:
        """Open a notebook session as JupyterLab does; the kernel's id."""
        with self.client() as client:
            answer = client.post(
                "/api/sessions", json={"path": path, "name": path, "type": "notebook", "kernel": {"name": kernel}}
            )
            assert answer.status_code == 201, answer.text
            kernel_id: str = answer.json()["kernel"]["id"]
            return kernel_id

    def close(self) -> None:
        """End it at once: a single-user server that the Hub kills says goodbye to nobody."""
        self.process.kill()
        self.process.wait(15)
