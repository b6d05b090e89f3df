"""A real registry for images on loopback, with a login if wished. Of 127.0.0.0/8 dockerd asks for no TLS."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import bcrypt
import pytest

from tests.engines import ADMIN_PATH, missing
from tests.engines.docker import ENVIRONMENT
from tests.engines.ssh import die_with_parent
from tests.harness.waiting import until

__all__ = ["Registry"]


class Registry:
    """Serves what lies in `storage`, which several may share. `login`: who is let in, and by which password."""

    def __init__(self, directory: Path, storage: Path, login: tuple[str, str] | None = None) -> None:
        if reason := missing("registry"):
            pytest.skip(reason)
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "info", "formatter": "json"},
            "storage": {"filesystem": {"rootdirectory": str(storage)}},
            "http": {"addr": "127.0.0.1:0"},
        }
        if login is not None:
            user, password = login
            made = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
            (directory / "htpasswd").write_text(f"{user}:{made}\n")
            config["auth"] = {"htpasswd": {"realm": "hub-gateway-test", "path": str(directory / "htpasswd")}}
        (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> Registry:
        """Serve at `address`."""
        log = self.directory / "log"
        with log.open("wb") as output:
            program = str(shutil.which("docker-registry", path=ADMIN_PATH))
            self._process = subprocess.Popen(
                [program, "serve", str(self.directory / "config.yml")],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,  # also while it is paused
            )
        found = until(lambda: re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text()), "the registry listens")
        self.address = found[1]
        return self

    def pause(self) -> None:
        """Take questions, and answer none."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer them."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Serve no more."""
        if self._process is not None:
            self.go_on()
            self._process.terminate()
            self._process.wait(20)
