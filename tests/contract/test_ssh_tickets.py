"""Kernels on hosts that get Kerberos tickets of their owners for some services, whichever way the gateway logs in."""

from __future__ import annotations

import base64
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_gateway.identity import ccachefile
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from tests.contract.client import KernelClient
from tests.contract.conftest import Bench, bench_of
from tests.contract.kerberos_case import KDCS, PRINCIPAL, SERVICES, WAYS, KerberosCase, with_services
from tests.contract.ssh_case import NODES, USERS
from tests.contract.suite import marks_of
from tests.contract.test_conformance_ssh import gateway_with, refused, trouble
from tests.engines.kdc import Kdc
from tests.engines.kdc_ldap import LdapKdc
from tests.harness.waiting import eventually

pytestmark = marks_of("ssh", "sudo", "kerberos", "kerberos-headers", "kerberos-ldap")
LIFE = 16

TOKEN = """
import base64, os
os.environ["KRB5_CONFIG"] = {conf!r}
import gssapi
name = gssapi.Name({service!r}, gssapi.NameType.kerberos_principal)
try:
    print(base64.b64encode(gssapi.SecurityContext(name=name, usage="initiate").step()).decode())
except gssapi.exceptions.GSSError as error:
    print("refused:", error)
"""


@pytest.fixture
def bench(request: pytest.FixtureRequest, db_url: Callable[[], str | None]) -> Iterator[Bench]:
    """One host; the parameter is the way to log in, and perhaps how long tickets live."""
    way, _, life = getattr(request, "param", "s4u").partition(" ")
    yield from bench_of(KerberosCase(f"ssh-{way}-services", 2, with_services(way, life or "1h"), USERS), db_url())


def kdc_of(bench: Bench) -> LdapKdc:
    found = KDCS[bench.state_dir]
    assert isinstance(found, LdapKdc)
    return found


def ccache_of(record: KernelRecord) -> Path:
    return Path(str(record.proxy_state["runtime_dir"])) / "krb5cc"


def ends(path: Path) -> int:
    return min(ticket.ends for ticket in ccachefile.parse(path.read_bytes()).tickets)


async def whom_the_service_sees(bench: Bench, client: KernelClient, service: str) -> str:
    """What a kernel's cell sends to a service is accepted there, as whose."""
    import gssapi

    kdc = KDCS[bench.state_dir]
    said = await client.execute(TOKEN.format(conf=str(kdc.krb5_conf), service=service))
    if said.startswith("refused"):
        return said
    accepting = gssapi.Credentials(usage="accept", store={"keytab": f"FILE:{kdc.directory}/services.keytab"})
    context = gssapi.SecurityContext(creds=accepting, usage="accept")
    context.step(base64.b64decode(said))
    return str(context.initiator_name)


async def running(bench: Bench, gateway: Any) -> tuple[KernelRecord, KernelClient]:
    record = await gateway.start(bench.alice)
    assert record.status is KernelStatus.RUNNING, record.message
    return record, await gateway.connect(bench.alice, record.id)


@pytest.mark.parametrize("bench", list(WAYS), indirect=True)
async def test_services_see_the_owner(bench: Bench) -> None:
    """The services that are listed, and no other: nothing that the kernel has makes it anybody else."""
    kdc = kdc_of(bench)
    async with bench.gateway() as gateway:
        record, client = await running(bench, gateway)
        for service in SERVICES:
            assert await whom_the_service_sees(bench, client, service) == f"{USERS[0]}@{kdc.realm}"
        assert (await whom_the_service_sees(bench, client, f"krbtgt/{kdc.realm}")).startswith("refused")
        path = ccache_of(record)
        assert await client.execute("print(os.environ['KRB5CCNAME'])") == f"FILE:{path}\n"
        facts = path.stat()
        assert stat.S_IMODE(facts.st_mode) == 0o600 and path.owner() == USERS[0]
        found = ccachefile.parse(path.read_bytes())
        assert {one.server for one in found.tickets} == {f"{service}@{kdc.realm}" for service in SERVICES}
        assert {one.client for one in found.tickets} == {found.principal} == {f"{USERS[0]}@{kdc.realm}"}
        assert PRINCIPAL.encode() not in path.read_bytes() and b"krbtgt" not in path.read_bytes()
        listed = kdc.run("klist", "-C", "-c", str(path))  # as the library itself reads it
        assert "krbtgt" not in listed and "impersonator" not in listed and SERVICES[0] in listed
        theirs = await gateway.start(bench.bob)
        client = await gateway.connect(bench.bob, theirs.id)
        assert await whom_the_service_sees(bench, client, SERVICES[0]) == f"{USERS[1]}@{kdc.realm}"
        assert await client.execute(f"print(os.access({str(path)!r}, os.R_OK))") == "False\n"
        await gateway.service.shutdown(bench.alice, record.id)
        await gateway.service.shutdown(bench.bob, theirs.id)
        assert not path.exists()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("bench", [f"s4u {LIFE}s", f"sudo {LIFE}s"], indirect=True)
async def test_a_long_kernel_has_tickets_that_have_not_ended(bench: Bench) -> None:
    """They are replaced before they end, by whichever gateway the kernel has."""
    async with bench.gateway() as gateway:
        record, client = await running(bench, gateway)
        path = ccache_of(record)
        first = ends(path)
        assert first <= time.time() + LIFE + 2
        await eventually(lambda: ends(path) > first, "newer tickets are there", timeout=60)
        assert time.time() < first, "they came when the old ones had ended"
    second = ends(path)
    async with bench.gateway() as gateway:
        await eventually(lambda: ends(path) > second, "the next gateway goes on", timeout=60)
        await eventually(lambda: time.time() > second, "what the first one gave has ended", timeout=60)
        client = await gateway.connect(bench.alice, record.id)
        assert await whom_the_service_sees(bench, client, SERVICES[0]) == f"{USERS[0]}@EXAMPLE.TEST"
        await gateway.service.shutdown(bench.alice, record.id)
        assert not path.exists()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("bench", [f"sudo {LIFE}s"], indirect=True)
async def test_a_kernel_outlives_its_tickets(bench: Bench) -> None:
    """Where nobody can get newer ones it works on, without; and with, as soon as the KDC is there again."""
    kdc = kdc_of(bench)
    async with bench.gateway() as gateway:
        record, client = await running(bench, gateway)
        Kdc.stop(kdc)
        last = ends(ccache_of(record))
        await eventually(lambda: time.time() > last, "they have ended", timeout=60)
        assert await client.execute("print('alive')") == "alive\n"
        kdc.start()
        await eventually(lambda: ends(ccache_of(record)) > last, "newer tickets are there", timeout=90)
        await gateway.service.shutdown(bench.alice, record.id)


async def test_a_service_that_is_not_allowed(bench: Bench) -> None:
    kdc = kdc_of(bench)
    kdc.delegates(PRINCIPAL, "host/node.example.test", SERVICES[0])
    async with gateway_with(bench, check_user=USERS[0]) as gateway:
        words = f"does not let {PRINCIPAL}@{kdc.realm} delegate to {SERVICES[1]}"
        message = await refused(bench, gateway)
        assert words in message and "cannot get the Kerberos tickets" in message
        found = next(one for one in await trouble(gateway) if one.what == "tickets")
        assert words in found.message
        mapper = gateway.service.identity
        mapper.credentials = gateway.credentials
        mapper.proxies = {name: proxy.identity for name, proxy in gateway.proxies.all()}
        mapper.tickets = {name: proxy.tickets for name, proxy in gateway.proxies.all()}
        mapper.ways = {name: proxy.says for name, proxy in gateway.proxies.all()}
        said = {one.sentence: one.outcome for one in await mapper.explain(USERS[0], ()) if "On distr" in one.sentence}
        login, tickets = said
        assert f"logs in as {USERS[0]} with a ticket of {USERS[0]}@{kdc.realm} by constrained" in login
        assert words in tickets and said[tickets] == "unavailable"


async def test_who_has_no_principal_gets_no_kernel(bench: Bench) -> None:
    """Rather than one without the tickets that it counts on."""
    rules = [{"name": "bare", "pattern": ".*", "unix_user": "$0"}]
    bench.setup.config["IdentityMapper"] = {"default_realm": "EXAMPLE.TEST", "rules": rules}  # type: ignore[index]
    async with bench.gateway() as gateway:
        with pytest.raises(Exception, match="The rule bare gives you no Kerberos principal"):
            await gateway.start(bench.alice)


async def test_tickets_are_nowhere_else(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Not in command lines, environments or logs, nor in what is recorded of the kernel."""
    import psutil

    async with bench.gateway() as gateway:
        record, _ = await running(bench, gateway)
        secret = base64.b64encode(ccache_of(record).read_bytes()).decode()[40:120]
        agent = psutil.Process(int(str(record.proxy_state["pid"])))
        family = [agent, *agent.children(recursive=True)]
        said = [str((one.cmdline(), one.environ())) for one in family]
        places = [*said, caplog.text, str(record), NODES[bench.state_dir].nodes[0].log.read_text()]
        assert not any(secret in place for place in places)
        await gateway.service.shutdown(bench.alice, record.id)
