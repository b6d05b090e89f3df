"""Logging in to hosts by Kerberos as the gateway's own principal: a real KDC, real sshd, a k5login for each user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench, bench_of
from tests.contract.ssh_case import USERS, SshCase, distributed, prepare_nodes
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_ssh import gateway_with, refused, trouble
from tests.engines.kdc import Kdc
from tests.engines.ssh import LOGIN
from tests.harness.waiting import eventually

pytestmark = marks_of("ssh", "kerberos", "kerberos-headers")

PRINCIPAL = "hub-gateway/localhost"
SSHD = """\
GSSAPIAuthentication yes
GSSAPIStrictAcceptorCheck no
PubkeyAuthentication no
"""
K5LOGIN = """\
[libdefaults]
    k5login_directory = {directory}
    k5login_authoritative = true
"""


@pytest.fixture
def kdc(tmp_path: Path) -> Iterator[Kdc]:
    pytest.importorskip("gssapi")
    made = Kdc(tmp_path / "kdc").start()
    yield made
    made.stop()


@pytest.fixture
def bench(kdc: Kdc, db_url: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Hosts that let the gateway's principal in as alice and as the login, but not as bob."""

    def prepare(state_dir: Path) -> dict[str, object]:
        monkeypatch.setenv("KRB5_CONFIG", str(kdc.krb5_conf))
        allowed = state_dir / "k5login"
        allowed.mkdir()
        for user in (LOGIN, USERS[0]):
            (allowed / user).write_text(f"{PRINCIPAL}@{kdc.realm}\n")
        # Files in one variable: the hosts' own settings before those of the realm.
        hosts_conf = state_dir / "hosts.conf"
        hosts_conf.write_text(K5LOGIN.format(directory=allowed))
        environment = {
            "KRB5_CONFIG": f"{hosts_conf}:{kdc.krb5_conf}",
            "KRB5_KTNAME": str(kdc.keytab("hosts", "host/node.example.test")),
            "KRB5RCACHENAME": "none:",
        }
        nodes = prepare_nodes(state_dir, "127.0.0.2", more=SSHD, environment=environment)
        config = dict(distributed(nodes, state_dir))
        nodes.drop_sudo_rule()
        config["DistributedProxy"] = {
            **config["DistributedProxy"],
            "login_as_owner": True,
            "gss_keytab": str(kdc.keytab("gateway", PRINCIPAL)),
            "gss_principal": f"{PRINCIPAL}@{kdc.realm}",
            "gss_names": {nodes.hosts[0]: "node.example.test"},
        }
        return config

    yield from bench_of(SshCase("ssh-k5login", 2, prepare, USERS, impersonates=True), db_url())


async def test_life(bench: Bench) -> None:
    """A kernel as its owner, with neither a key nor a rule of sudo."""
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        client = await gateway.connect(bench.alice, record.id)
        code = "import getpass, os; print(getpass.getuser(), [name for name in os.environ if name.startswith('KRB5')])"
        assert await client.execute(code) == f"{bench.alice.name} []\n"  # nothing is delegated
        await gateway.service.shutdown(bench.alice, record.id)
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_who_has_no_k5login(bench: Bench) -> None:
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.bob)
        assert record.status is KernelStatus.FAILED
        assert f"does not let {bench.bob.name} log in" in record.message
        assert await reserved(gateway) == set()


async def test_no_tickets(bench: Bench, kdc: Kdc) -> None:
    """A keytab that is not the principal's any more, then a KDC that is down."""
    kdc.run("kadmin.local", "-r", kdc.realm, "cpw", "-randkey", PRINCIPAL)
    async with bench.gateway() as gateway:
        assert "nothing to log in with" in await refused(bench, gateway)
        assert "k5login" in (await trouble(gateway))[0].hint
    kdc.stop()
    async with bench.gateway() as gateway:
        assert "nothing to log in with" in await refused(bench, gateway)


async def test_another_name_of_the_host(bench: Bench) -> None:
    async with gateway_with(bench, gss_names={}) as gateway:
        assert "no Kerberos ticket for host/127.0.0.2" in await refused(bench, gateway)
