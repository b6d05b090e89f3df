"""Logging in as kernels' owners by constrained delegation: what the KDC refuses is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_gateway.auth.base import Caller
from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench, bench_of
from tests.contract.kerberos_case import HOST, KDCS, PRINCIPAL, SSH_S4U, KerberosCase, kerberized
from tests.contract.mini import MiniGateway
from tests.contract.ssh_case import NODES, USERS
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_ssh import gateway_with, refused, trouble
from tests.engines.clock import clock_ahead
from tests.engines.kdc import Kdc
from tests.engines.kdc_ldap import LdapKdc

pytestmark = [*marks_of(*SSH_S4U.needs), pytest.mark.parametrize("bench", [SSH_S4U.name], indirect=True)]


def kdc_of(bench: Bench) -> LdapKdc:
    found = KDCS[bench.state_dir]
    assert isinstance(found, LdapKdc)
    return found


def one_host(bench: Bench, **traits: object) -> MiniGateway:
    return gateway_with(bench, hosts=NODES[bench.state_dir].hosts[:1], **traits)


async def test_the_host_sees_the_owner(bench: Bench) -> None:
    """Not the gateway: sshd lets in the owner's principal, and no ticket goes with it."""
    async with one_host(bench) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        client = await gateway.connect(bench.alice, record.id)
        code = "import getpass, os; print(getpass.getuser(), [name for name in os.environ if name.startswith('KRB5')])"
        assert await client.execute(code) == f"{bench.alice.name} []\n"
        await gateway.service.shutdown(bench.alice, record.id)
    log = NODES[bench.state_dir].nodes[0].log.read_text()
    assert f"Authorized to {bench.alice.name}, krb5 principal {bench.alice.name}@EXAMPLE.TEST" in log
    assert f"Authorized to {bench.alice.name}, krb5 principal {PRINCIPAL}" not in log


def not_allowed(kdc: LdapKdc) -> None:
    kdc.keytab("elsewhere", "host/elsewhere.example.test")
    kdc.delegates(PRINCIPAL, "host/elsewhere.example.test")


def no_transition(kdc: LdapKdc) -> None:
    kdc.change(PRINCIPAL, "-ok_to_auth_as_delegate")


def sensitive(kdc: LdapKdc) -> None:
    kdc.change(USERS[0], "-allow_forwardable")


def locked(kdc: LdapKdc) -> None:
    kdc.change(USERS[0], "-allow_tix")


def unknown(kdc: LdapKdc) -> None:
    kdc.run("kadmin.local", "-r", kdc.realm, "delprinc", "-force", USERS[0])


FAULTS: dict[str, tuple[Callable[[LdapKdc], None], str]] = {
    "not-allowed": (not_allowed, f"does not let {PRINCIPAL}@EXAMPLE.TEST delegate to host/{HOST}"),
    "no-transition": (no_transition, "set ok_to_auth_as_delegate of that principal"),
    "sensitive": (sensitive, f"has {USERS[0]}@EXAMPLE.TEST marked as somebody for whom nobody may act"),
    "locked": (locked, f"{USERS[0]}@EXAMPLE.TEST is locked"),
    "unknown": (unknown, f"the KDC does not know {USERS[0]}@EXAMPLE.TEST"),
    "down": (lambda kdc: Kdc.stop(kdc), "no KDC of the realm answers"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
async def test_what_the_kdc_refuses(bench: Bench, fault: str) -> None:
    """The owner and the doctor are told which of all the reasons it is, though the KDC has one answer for most."""
    break_it, words = FAULTS[fault]
    break_it(kdc_of(bench))
    async with one_host(bench, check_user=USERS[0]) as gateway:
        assert words in await refused(bench, gateway)
        (found,) = await trouble(gateway)
        assert words in found.message and (fault == "down" or words in found.hint)


async def test_one_sensitive_user_keeps_nobody_else_away(bench: Bench) -> None:
    sensitive(kdc_of(bench))
    async with one_host(bench) as gateway:
        await refused(bench, gateway)
        record = await gateway.start(bench.bob)
        assert record.status is KernelStatus.RUNNING, record.message
        await gateway.service.shutdown(bench.bob, record.id)


@pytest.mark.parametrize("timesync", [0, 1], ids=["gateway", "host"])
async def test_clocks_are_apart(bench: Bench, timesync: int) -> None:
    """Those of the KDC and the gateway, which notices itself, or has its library make up for it; then the host does."""
    kdc = kdc_of(bench)
    Kdc.stop(kdc)
    kdc.start(ahead=3600)
    kdc.krb5_conf.write_text(kdc.krb5_conf.read_text().replace("[realms]", f"    kdc_timesync = {timesync}\n[realms]"))
    async with one_host(bench) as gateway:
        assert "the clocks of this machine, the KDC and the host are too far apart" in await refused(bench, gateway)
        assert "are too far apart" in (await trouble(gateway))[0].message


async def test_the_clock_of_a_host_is_wrong(bench: Bench) -> None:
    """Its Kerberos says so, in a token that only the library reads."""
    (node,) = NODES[bench.state_dir].nodes[:1]
    node.stop()
    node.environment = {**node.environment, **clock_ahead(bench.state_dir, 3600 * 24)}
    node.start()
    async with one_host(bench) as gateway:
        assert f"does not let {USERS[0]} log in (gssapi-with-mic -> the clocks of" in await refused(bench, gateway)


async def test_nobody_gets_a_service(bench: Bench) -> None:
    """The KDC would give the gateway tickets of hosts and of HDFS, too."""
    kdc = kdc_of(bench)
    kdc.keytab("robot", "ci/nn.example.test")
    mapping = {
        "default_realm": kdc.realm,
        "services": {"ci": {"principal": f"ci/nn.example.test@{kdc.realm}", "unix_user": USERS[0]}},
    }
    bench.setup.config["IdentityMapper"] = mapping  # type: ignore[index]
    async with one_host(bench) as gateway:
        record = await gateway.start(Caller("ci", kind="service"))
        assert record.status is KernelStatus.FAILED
        assert "is a service's principal and no person's" in record.message
        assert await reserved(gateway) == set()
    assert "ci/nn" not in NODES[bench.state_dir].nodes[0].log.read_text()


async def test_the_mapping_says_whose_ticket(bench: Bench) -> None:
    """A unix user need not have the principal's name; who is not that principal is not let in."""
    kdc = kdc_of(bench)
    kdc.person("ada.lovelace")
    rules = [{"name": "staff", "pattern": USERS[0], "principal": "ada.lovelace", "unix_user": USERS[0]}]
    bench.setup.config["IdentityMapper"] = {"default_realm": kdc.realm, "rules": rules}  # type: ignore[index]
    async with one_host(bench) as gateway:
        assert f"does not let {USERS[0]} log in" in await refused(bench, gateway)
        allowed = bench.state_dir / "k5login" / USERS[0]
        allowed.write_text(f"ada.lovelace@{kdc.realm}\n")
    async with one_host(bench) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
    async with one_host(bench) as gateway:  # which knows of the principal by the kernel's record alone
        await gateway.service.shutdown(bench.alice, record.id)
        assert not bench.leftovers(gateway)


def in_db2(state_dir: Path) -> dict[str, object]:
    kdc = Kdc(state_dir / "kdc")
    config = kerberized(state_dir, kdc, owner_login="s4u")
    kdc.person(USERS[0])
    kdc.change(PRINCIPAL, "+ok_to_auth_as_delegate")
    return dict(config)


async def test_a_database_without_delegation(bench: Bench, db_url: Callable[[], str | None]) -> None:
    case = KerberosCase("ssh-s4u-db2", 2, in_db2, USERS)
    for other in bench_of(case, db_url()):
        async with one_host(other) as gateway:
            assert "MIT's own database (db2) has none" in await refused(other, gateway)


async def test_nothing_secret_is_said(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in logs nor in what is recorded of a kernel stands a key or a ticket."""
    async with one_host(bench) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        state = json.dumps(dict(record.proxy_state))
        assert f"{bench.alice.name}" in state and "krbtgt" not in state + caplog.text
        await gateway.service.shutdown(bench.alice, record.id)
