"""Kernels on hosts that get a copy of their owner's own TGT, which their agents renew for as long as the KDC allows."""

from __future__ import annotations

import base64
import json
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hub_gateway.identity import ccachefile
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from tests.contract.client import KernelClient
from tests.contract.conftest import PYTHON, Bench, bench_of
from tests.contract.kerberos_case import KDCS, SERVICES, KerberosCase, with_tgt
from tests.contract.mini import MiniGateway
from tests.contract.ssh_case import USERS
from tests.contract.suite import marks_of
from tests.contract.test_conformance import killed_at
from tests.contract.test_conformance_ssh import gateway_with, refused, trouble
from tests.contract.test_ssh_tickets import ccache_of, ends, whom_the_service_sees
from tests.harness.waiting import eventually

pytestmark = marks_of("ssh", "sudo", "kerberos", "kerberos-headers")
LIFE = 16


@pytest.fixture
def bench(request: pytest.FixtureRequest, db_url: Callable[[], str | None]) -> Iterator[Bench]:
    """One host, where the owners have tickets of the life that the parameter says."""
    way, _, life = getattr(request, "param", "sudo").partition(" ")
    yield from bench_of(KerberosCase(f"ssh-{way}-tgt", 2, with_tgt(way, life or "1h"), USERS), db_url())


def ticket(bench: Bench, user: str = USERS[0], *options: str, of: str = "") -> Path:
    """A ticket of a user, where the gateway looks for it; perhaps that of somebody else."""
    kdc = KDCS[bench.state_dir]
    return kdc.kinit(of or user, bench.state_dir / "tickets" / user, *options)


async def running(bench: Bench, gateway: MiniGateway, **env: str) -> tuple[KernelRecord, KernelClient]:
    """A kernel whose host knows the realm."""
    kdc = KDCS[bench.state_dir]
    spec = {"argv": PYTHON, "display_name": "Python", "language": "python", "env": {"KRB5_CONFIG": str(kdc.krb5_conf)}}
    (bench.state_dir / "kernels" / "python" / "kernel.json").write_text(json.dumps(spec))
    record = await gateway.start(bench.alice, env=env)
    assert record.status is KernelStatus.RUNNING, record.message
    return record, await gateway.connect(bench.alice, record.id)


@pytest.mark.parametrize("bench", ["sudo", "k5login"], indirect=True)
async def test_a_kernel_reaches_what_its_owner_reaches(bench: Bench) -> None:
    """By a copy of the TGT alone, of which the gateway keeps none."""
    kdc = KDCS[bench.state_dir]
    source = ticket(bench, USERS[0], "-r", "1h")
    kdc.run("kvno", "-c", f"FILE:{source}", SERVICES[0])  # another ticket in the cache, which is not asked for
    async with bench.gateway() as gateway:
        record, client = await running(bench, gateway)
        assert await whom_the_service_sees(bench, client, SERVICES[1]) == f"{USERS[0]}@{kdc.realm}"
        path = ccache_of(record)
        facts = path.stat()
        assert stat.S_IMODE(facts.st_mode) == 0o600 and path.owner() == USERS[0]
        assert not list((bench.state_dir / "credentials").glob("*"))
        until = float(str(record.proxy_state["credentials_until"]))
        assert until == ccachefile.parse(source.read_bytes()).tickets[0].renew_till
        shown = gateway.service.kernel_model(await gateway.service.get(bench.alice, record.id))
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(until))
        assert shown["credentials_valid_until"] == f"{moment}.000000Z"
        await gateway.service.shutdown(bench.alice, record.id)
        assert not path.exists() and source.exists()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("bench", [f"sudo {LIFE}s"], indirect=True)
async def test_the_agent_renews_it_without_a_gateway(bench: Bench) -> None:
    """Longer than the ticket that came with it would have lasted; then it ends, and the kernel does not."""
    ticket(bench, USERS[0], "-l", f"{LIFE}s", "-r", f"{3 * LIFE}s")
    async with bench.gateway() as gateway:
        record, _ = await running(bench, gateway)
        path = ccache_of(record)
        first = ends(path)
    await eventually(lambda: ends(path) > first, "it was renewed", timeout=60)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.owner() == USERS[0]
    await eventually(lambda: time.time() > first, "the first one has ended", timeout=60)
    async with bench.gateway() as gateway:
        client = await gateway.connect(bench.alice, record.id)
        assert await whom_the_service_sees(bench, client, SERVICES[0]) == f"{USERS[0]}@EXAMPLE.TEST"
        until = float(str(record.proxy_state["credentials_until"]))

        async def last() -> bool:
            logs = await gateway.proxies.get(record.proxy).logs(dict(record.proxy_state))
            return "renewed for the last time" in logs

        await eventually(last, "it can be renewed no more", timeout=90)
        assert until - 2 <= ends(path) <= until
        assert await client.execute("print('alive')") == "alive\n"
        await gateway.service.shutdown(bench.alice, record.id)
        assert not path.exists()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@asynccontextmanager
async def taken_up(bench: Bench, *options: str) -> AsyncIterator[KernelRecord]:
    """A kernel that the next gateway finds, as the first was killed too early; its owner has another ticket by then."""
    assert killed_at(bench, "launch.2.yielded")
    ticket(bench, USERS[0], *options)
    async with bench.gateway() as gateway:
        (record,) = await gateway.service.list(bench.alice)
        record = await gateway.settled(record.id)
        assert record.status is KernelStatus.RUNNING, record.message
        yield record
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("bench", ["sudo"], indirect=True)
async def test_a_launch_that_is_taken_up_again_keeps_the_ticket_that_its_agent_renews(bench: Bench) -> None:
    """A newer one in its place would be renewed too late: the agent goes by the end of the first one."""
    ticket(bench, USERS[0], "-l", "30min", "-r", "1h")
    async with taken_up(bench, "-l", "10min", "-r", "40min") as record:
        assert ends(ccache_of(record)) > time.time() + 20 * 60
        assert float(str(record.proxy_state["credentials_until"])) > time.time() + 50 * 60


@pytest.mark.parametrize("bench", ["sudo"], indirect=True)
async def test_a_launch_that_is_taken_up_again_gets_the_newer_ticket_where_none_is_renewed(bench: Bench) -> None:
    ticket(bench, USERS[0], "-l", "10min")
    async with taken_up(bench, "-l", "30min", "-r", "1h") as record:
        there = ends(ccache_of(record))
        assert there > time.time() + 20 * 60 and float(str(record.proxy_state["credentials_until"])) == there


def absent(bench: Bench) -> None:
    pass


def somebody_elses(bench: Bench) -> None:
    ticket(bench, USERS[0], of=USERS[1])


def ended(bench: Bench) -> None:
    """As it is in a cache that lies there for long: its times stand in it in clear."""
    path = ticket(bench)
    found = ccachefile.parse(path.read_bytes()).tickets[0]
    old = found.ends.to_bytes(4, "big")
    path.write_bytes(path.read_bytes().replace(old, (found.ends - 7200).to_bytes(4, "big")))


def damaged(bench: Bench) -> None:
    path = ticket(bench)
    path.write_bytes(path.read_bytes()[:-20])


def open_to_all(bench: Bench) -> None:
    ticket(bench).chmod(0o644)


def linked(bench: Bench) -> None:
    path = ticket(bench)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def no_tgt(bench: Bench) -> None:
    ticket(bench, USERS[0], "-S", f"{SERVICES[0]}")


FAULTS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "absent": (absent, "cannot be read (No such file or directory)"),
    "somebody-elses": (somebody_elses, f"has tickets of '{USERS[1]}@EXAMPLE.TEST', not of {USERS[0]}@EXAMPLE.TEST"),
    "ended": (ended, "has a ticket that ended at"),
    "damaged": (damaged, "is damaged"),
    "open": (open_to_all, "is open to everybody"),
    "link": (linked, "cannot be read"),
    "no-tgt": (no_tgt, "has no TGT"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
async def test_what_is_no_ticket(bench: Bench, fault: str) -> None:
    """Nothing is started, and the owner is told what is wrong with the ticket, as is the doctor."""
    break_it, words = FAULTS[fault]
    break_it(bench)
    async with gateway_with(bench, check_user=USERS[0]) as gateway:
        message = await refused(bench, gateway)
        assert words in message and "get a new one" in message
        (found,) = await trouble(gateway)
        assert found.what == "tickets" and words in found.message


async def test_it_comes_from_the_client_or_the_hub(bench: Bench) -> None:
    """Where the administrator has it so, and never into an environment."""
    path = ticket(bench)
    offered = base64.b64encode(path.read_bytes()).decode()
    path.unlink()
    config: Any = bench.setup.config
    config["UserTgtCredential"] = {"ccache_file": f"{bench.state_dir}/tickets/{{user}}"}
    async with bench.gateway() as gateway:  # nobody has said that clients may
        record = await gateway.start(bench.alice, env={"KERNEL_KRB5_CCACHE": offered})
        assert record.status is KernelStatus.FAILED and "cannot be read" in record.message
        assert offered[:40] not in str(record)
    config["UserTgtCredential"] = {"accept_offered": True}
    async with bench.gateway() as gateway:
        record, client = await running(bench, gateway, KERNEL_KRB5_CCACHE=offered)
        assert await whom_the_service_sees(bench, client, SERVICES[0]) == f"{USERS[0]}@EXAMPLE.TEST"
        assert await client.execute("print('KERNEL_KRB5_CCACHE' in os.environ)") == "False\n"
        await gateway.service.shutdown(bench.alice, record.id)
        record = await gateway.start(bench.bob, env={"KERNEL_KRB5_CCACHE": offered})
        assert f"has tickets of '{USERS[0]}@EXAMPLE.TEST', not of" in record.message
    config["UserTgtCredential"] = {"auth_state_key": "krb5_ccache"}

    async def auth_state(name: str) -> dict[str, str]:
        return {"krb5_ccache": offered} if name == USERS[0] else {}

    gateway = bench.gateway()
    gateway.credentials.auth_state = auth_state
    async with gateway:
        record, client = await running(bench, gateway)
        assert await whom_the_service_sees(bench, client, SERVICES[0]) == f"{USERS[0]}@EXAMPLE.TEST"
        await gateway.service.shutdown(bench.alice, record.id)
        record = await gateway.start(bench.bob)
        assert "the Hub's auth_state has none (krb5_ccache)" in record.message


async def test_a_ticket_that_cannot_be_renewed(bench: Bench) -> None:
    """What is shown is when it ends."""
    source = ticket(bench, USERS[0], "-l", "10m")
    async with bench.gateway() as gateway:
        record, _ = await running(bench, gateway)
        assert record.proxy_state["credentials_until"] == ends(source)
        await gateway.service.shutdown(bench.alice, record.id)
