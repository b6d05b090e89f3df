"""A real MIT KDC whose principals lie in OpenLDAP: with that database it has constrained delegation (S4U2Proxy)."""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.engines.kdc import REALM, Kdc
from tests.engines.ssh import die_with_parent
from tests.harness.waiting import until

__all__ = ["LdapKdc"]

ADMIN, PASSWORD = "cn=admin,dc=test", "secret"
SCHEMA = Path("/usr/share/doc/krb5-kdc-ldap")

_SLAPD_CONF = """\
include /etc/ldap/schema/core.schema
include {directory}/kerberos.schema
modulepath /usr/lib/ldap
moduleload back_mdb
database mdb
suffix dc=test
rootdn {admin}
rootpw {password}
directory {directory}
maxsize 67108864
index krbPrincipalName eq
"""
_ROOT = """\
dn: dc=test
objectClass: dcObject
objectClass: organization
o: test
dc: test
"""
_DATABASE = """\
        database_module = ldap
"""
_MODULE = """\
[dbmodules]
    ldap = {{
        db_library = kldap
        ldap_kerberos_container_dn = cn=krb,dc=test
        ldap_kdc_dn = {admin}
        ldap_kadmind_dn = {admin}
        ldap_service_password_file = {directory}/password
        ldap_servers = {url}
    }}
"""


class LdapKdc(Kdc):
    """A realm with constrained delegation; slapd listens on a socket in a directory of its own, and on no port."""

    engines = ("kerberos", "kerberos-ldap")

    def __init__(self, directory: Path, *, life: str = "1h") -> None:
        self._slapd: subprocess.Popen[bytes] | None = None
        self._place: tempfile.TemporaryDirectory[str] | None = None
        super().__init__(directory, life=life)

    @property
    def url(self) -> str:
        assert self._place is not None
        return f"ldapi://{quote(f'{self._place.name}/ldapi', safe='')}"

    def delegates(self, principal: str, *targets: str) -> None:
        """Let a principal act for users towards these services, and no others (krbAllowedToDelegateTo)."""
        lines = [
            f"dn: krbPrincipalName={principal}@{REALM},cn={REALM},cn=krb,dc=test",
            "changetype: modify",
            "replace: krbAllowedToDelegateTo",
            *(f"krbAllowedToDelegateTo: {target}" for target in targets),
        ]
        self._ldap("ldapmodify", "\n".join(lines) + "\n")

    def stop(self) -> None:
        super().stop()
        if self._slapd is not None:
            self._slapd.terminate()
            self._slapd.wait(20)
            self._slapd = None
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def _create(self) -> None:
        try:
            self._serve_directory()
            how = ["-subtrees", "dc=test", "-r", REALM, "-s", "-P", "master"]
            self._run("kdb5_ldap_util", "-D", ADMIN, "-w", PASSWORD, "create", *how)
        except BaseException:
            self.stop()
            raise

    def _serve_directory(self) -> None:
        # Its socket's path must be short.
        place = self._place = tempfile.TemporaryDirectory(prefix="hgt-ldap-")
        packed = SCHEMA / "kerberos.schema.gz"
        schema = gzip.decompress(packed.read_bytes()) if packed.exists() else (SCHEMA / packed.stem).read_bytes()
        (Path(place.name) / "kerberos.schema").write_bytes(schema)
        facts = {"directory": place.name, "admin": ADMIN, "password": PASSWORD}
        (Path(place.name) / "slapd.conf").write_text(_SLAPD_CONF.format(**facts))
        log = self.directory / "slapd.log"
        with log.open("ab") as output:
            process = self._slapd = subprocess.Popen(
                [self._program("slapd"), "-f", f"{place.name}/slapd.conf", "-h", self.url, "-d", "0"],
                env=self.environment,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )

        def settled() -> bool:
            asked = [self._program("ldapwhoami"), "-x", "-H", self.url]
            answers = subprocess.run(asked, capture_output=True, check=False, env=self.environment).returncode == 0
            return answers or process.poll() is not None

        until(settled, "slapd is up")
        if process.poll() is not None:
            pytest.skip(f"slapd does not start here: {log.read_text()[-300:]}")
        self._ldap("ldapadd", _ROOT)
        # As `kdb5_ldap_util stashsrvpw` writes it, which asks for a terminal.
        password = self.directory / "password"
        password.write_text(f"{ADMIN}#{{HEX}}{PASSWORD.encode().hex()}\n")
        password.chmod(0o600)
        self._configure(0)

    def _kdc_conf(self, port: int) -> str:
        written = super()._kdc_conf(port).replace(f"        database_name = {self.directory}/principal\n", _DATABASE)
        if self._place is None:
            return written
        return written + _MODULE.format(admin=ADMIN, directory=self.directory, url=self.url)

    def _ldap(self, name: str, entries: str) -> None:
        command = [self._program(name), "-x", "-H", self.url, "-D", ADMIN, "-w", PASSWORD]
        done = subprocess.run(command, input=entries, capture_output=True, text=True, check=False, env=self.environment)
        assert done.returncode == 0, f"{name}: {done.stderr}"
