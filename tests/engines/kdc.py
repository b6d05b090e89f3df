"""A real MIT Kerberos KDC from nothing, on a free port of 127.0.0.1, in a second; it needs no root."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from tests.engines import KRB5_PATH, missing
from tests.engines.clock import clock_ahead
from tests.harness.waiting import until

__all__ = ["Kdc"]

REALM = "EXAMPLE.TEST"

_KRB5_CONF = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
    udp_preference_limit = 1
    forwardable = true
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
"""
_KDC_CONF = """\
[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {directory}/principal
        key_stash_file = {directory}/stash
        acl_file = {directory}/acl
        max_life = {life}
        max_renewable_life = 1d
    }}
"""


class Kdc:
    """A realm and its KDC. `environment` is what its clients need, and nothing else of ours.

    `life` is the longest life of a ticket, as Kerberos writes it (`12s`).
    """

    realm = REALM
    engines: ClassVar[tuple[str, ...]] = ("kerberos",)

    def __init__(self, directory: Path, *, life: str = "1h") -> None:
        for engine in self.engines:
            if reason := missing(engine):
                pytest.skip(reason)
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.krb5_conf = directory / "krb5.conf"
        self.log = directory / "kdc.log"
        self.environment = {
            "PATH": KRB5_PATH,
            "KRB5_CONFIG": str(self.krb5_conf),
            "KRB5_KDC_PROFILE": str(directory / "kdc.conf"),
            "KRB5RCACHENAME": "none:",
            "LANG": "C",
        }
        self._life = life
        self._process: subprocess.Popen[bytes] | None = None
        self._configure(0)
        self._create()

    def start(self, *, ahead: int = 0) -> Kdc:
        """Serve, with a clock that is so many seconds ahead of ours."""
        environment = {**self.environment, **(clock_ahead(self.directory, ahead) if ahead else {})}
        for _ in range(3):  # somebody else may take the port first
            self._configure(_free_port())
            pid_file = self.directory / "kdc.pid"
            pid_file.unlink(missing_ok=True)
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [self._program("krb5kdc"), "-n", "-r", REALM, "-P", str(pid_file)],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            if self._is_up(self._process, pid_file):
                return self
        raise AssertionError(f"the KDC ended at once: {self.log.read_text()}")

    @staticmethod
    def _is_up(process: subprocess.Popen[bytes], pid_file: Path) -> bool:
        """Whether it came up, or ended."""

        def settled() -> bool:
            return process.poll() is not None or (pid_file.exists() and pid_file.stat().st_size > 0)

        until(settled, "the KDC is up")
        return process.poll() is None

    def keytab(self, name: str, *principals: str) -> Path:
        """Principals with random keys, and a keytab of them."""
        path = self.directory / f"{name}.keytab"
        for principal in principals:
            self._run("kadmin.local", "-r", REALM, "addprinc", "-randkey", principal)
            self._run("kadmin.local", "-r", REALM, "ktadd", "-norandkey", "-k", str(path), principal)
        return path

    def person(self, name: str, *options: str) -> Path:
        """A principal of somebody, with the options of `addprinc`, and a keytab in place of a password."""
        self._run("kadmin.local", "-r", REALM, "addprinc", "-randkey", *options, name)
        path = self.directory / f"{name}.person.keytab"
        self._run("kadmin.local", "-r", REALM, "ktadd", "-norandkey", "-k", str(path), name)
        return path

    def kinit(self, name: str, ccache: Path, *options: str) -> Path:
        """A ticket of somebody whom `person` made, in a file."""
        keytab = self.directory / f"{name}.person.keytab"
        self._run("kinit", *options, "-k", "-t", str(keytab), "-c", f"FILE:{ccache}", name)
        return ccache

    def change(self, principal: str, *options: str) -> None:
        """Change a principal, with the options of `modprinc`."""
        self._run("kadmin.local", "-r", REALM, "modprinc", *options, principal)

    def run(self, *command: str, **environment: str) -> str:
        """What a Kerberos program says on its output."""
        return self._run(*command, **environment)

    def stop(self) -> None:
        """Answer no more."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def _create(self) -> None:
        """Make the realm's database."""
        self._run("kdb5_util", "create", "-W", "-s", "-r", REALM, "-P", "master")

    def _configure(self, port: int) -> None:
        self.krb5_conf.write_text(_KRB5_CONF.format(realm=REALM, port=port))
        (self.directory / "kdc.conf").write_text(self._kdc_conf(port))

    def _kdc_conf(self, port: int) -> str:
        return _KDC_CONF.format(realm=REALM, port=port, directory=self.directory, life=self._life)

    def client_conf(self, path: Path, port: int) -> Path:
        """A krb5.conf that takes another port of 127.0.0.1 for the KDC, where perhaps nobody answers."""
        path.write_text(_KRB5_CONF.format(realm=REALM, port=port))
        return path

    def _program(self, name: str) -> str:
        found = shutil.which(name, path=KRB5_PATH)
        assert found is not None, f"{name} is not there"
        return found

    def _run(self, name: str, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [self._program(name), *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{name} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
