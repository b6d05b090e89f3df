"""A throw-away PostgreSQL server: its own cluster, on a unix socket only, as an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.harness.waiting import until

__all__ = ["PostgresServer", "find_postgres"]

PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt")
SETTINGS = {
    "listen_addresses": "",
    # Nothing of it is needed after a crash of the machine.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "autovacuum": "off",
}


def find_postgres() -> Path:
    """The directory of initdb and postgres, the newest version first."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(
        (path for place in PLACES for path in Path(place).glob("*/bin") if (path / "initdb").exists()),
        key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdigit()],
    )
    if not versions:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql, or put initdb on PATH")
    return versions[-1]


class PostgresServer:
    """Starts on construction; `close` ends it and removes its files. `durable` has it wait for the disk."""

    def __init__(self, *, durable: bool = False) -> None:
        binaries = find_postgres()
        self.root = Path(tempfile.mkdtemp(prefix="hgt-pg-"))
        # PostgreSQL refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam(self.user)
            os.chown(self.root, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        data = self.root / "data"
        environment = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "HOME": str(self.root)}
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "gateway", "--auth=trust", "--no-sync", "-E", "UTF8"],
            check=True,
            capture_output=True,
            env=environment,
            cwd=self.root,
            **self._as,
        )
        settings = {name: "on" if durable and value == "off" else value for name, value in SETTINGS.items()}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with open(self.root / "log", "wb") as log:
            self.process = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-k", self.root, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.root,
                **self._as,
            )
        until(self._answers, "PostgreSQL to accept connections", timeout=30)

    def _connect(self) -> Any:
        import psycopg

        return psycopg.connect(host=str(self.root), user="gateway", dbname="postgres", autocommit=True)

    def _answers(self) -> bool:
        import psycopg

        if self.process.poll() is not None:
            raise AssertionError(f"PostgreSQL ended: {(self.root / 'log').read_text()[-2000:]}")
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def create_database(self, name: str) -> str:
        """Make an empty database; its URL."""
        with self._connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://gateway@/{name}?host={quote(str(self.root))}"

    def stop(self) -> None:
        """End the server; its data stay."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # "fast": connections are closed
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def close(self) -> None:
        """End the server and remove everything."""
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)
