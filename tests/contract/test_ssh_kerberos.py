"""Logging in to hosts by Kerberos as the gateway's own principal: a real KDC, real sshd, a k5login for each user."""

from __future__ import annotations

import pytest

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench
from tests.contract.kerberos_case import HOST, KDCS, PRINCIPAL, SSH_K5LOGIN
from tests.contract.ssh_case import NODES
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_ssh import gateway_with, refused, trouble
from tests.harness.waiting import eventually

pytestmark = [*marks_of(*SSH_K5LOGIN.needs), pytest.mark.parametrize("bench", [SSH_K5LOGIN.name], indirect=True)]


async def test_no_ticket_reaches_the_kernel(bench: Bench) -> None:
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
    allowed = bench.state_dir / "k5login" / bench.bob.name
    allowed.unlink()
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.bob)
        assert record.status is KernelStatus.FAILED
        assert f"does not let {bench.bob.name} log in" in record.message
        assert await reserved(gateway) == set()


async def test_no_tickets(bench: Bench) -> None:
    """A keytab that is not the principal's any more, then a KDC that is down."""
    kdc = KDCS[bench.state_dir]
    kdc.run("kadmin.local", "-r", kdc.realm, "cpw", "-randkey", PRINCIPAL)
    async with bench.gateway() as gateway:
        assert "nothing to log in with" in await refused(bench, gateway)
        assert "k5login" in (await trouble(gateway))[0].hint
    kdc.stop()
    async with bench.gateway() as gateway:
        assert "no KDC of the realm answers" in await refused(bench, gateway)


async def test_another_name_of_the_host(bench: Bench) -> None:
    async with gateway_with(bench, hosts=NODES[bench.state_dir].hosts[:1], gss_names={}) as gateway:
        message = await refused(bench, gateway)
        assert "no Kerberos ticket for host/127.0.0.2: the KDC does not know the service" in message
        assert f"host/{HOST}" not in message
