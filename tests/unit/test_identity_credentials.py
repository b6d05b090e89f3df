"""Tickets: where they are kept, how they are renewed, and what a KDC that does not answer does not stop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hub_gateway.errors import Forbidden, NotFound, Unavailable
from hub_gateway.identity import ccachefile, kerberos, s4u
from hub_gateway.identity.ccaches import CredentialStore
from hub_gateway.identity.credentials import Credentials, KeytabCredential
from hub_gateway.identity.mapper import IdentityMapper
from hub_gateway.identity.types import Identity
from hub_gateway.identity.usertgt import UserTgtCredential
from hub_gateway.proxies.base import IdentityNeed
from tests.engines.kdc import Kdc
from tests.harness.waiting import eventually

REALM = b"\0\0\0\x0cEXAMPLE.TEST"
NAME = b"\0\0\0\x01\0\0\0\x01" + REALM + b"\0\0\0\x05alice"
TGS = b"\0\0\0\x02\0\0\0\x02" + REALM + b"\0\0\0\x06krbtgt" + REALM
CCACHE = b"".join(
    (
        *(b"\x05\x04\0\0", NAME, NAME, TGS),
        b"\0\x12\0\0\0\x04keyx",  # the session key
        *(number.to_bytes(4, "big") for number in (1, 1, 2000, 3000)),
        b"\0\x40\x80\0\0" + bytes(8) + b"\0\0\0\x03abc" + bytes(4),
    )
)
"""A credential cache with one TGT, as the library writes it."""
ALICE = Identity("alice", "alice", "rule", "alice@EXAMPLE.TEST", "alice", 1234)


class Source:
    """Tickets of `life` seconds with a number in them; `error` is raised in their place."""

    def __init__(self, life: float = 1000.0) -> None:
        self.life = life
        self.asked = self.fetched = 0
        self.error: Exception | None = None
        self.held: threading.Event | None = None

    def fetch(self, ccache: Path) -> float:
        self.asked += 1
        if self.held is not None:
            self.held.wait(20)
        # Read once: the test takes it away while a thread is here.
        if (error := self.error) is not None:
            ccache.write_text("half")
            raise error
        self.fetched += 1
        ccache.write_text(f"tickets {self.fetched}")
        return time.time() + self.life


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CredentialStore]:
    made = CredentialStore(state_dir=tmp_path)
    made.start()
    yield made
    await made.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


# The store


async def test_only_the_gateway_can_read_tickets(store: CredentialStore) -> None:
    before = os.umask(0)
    try:
        path = await store.keep("k1", Source())
    finally:
        os.umask(before)
    assert (mode(path), mode(path.parent), mode(store.path)) == (0o600, 0o700, 0o700)
    assert path.read_text() == "tickets 1" == (await store.read("k1")).decode()
    assert [found.name for found in path.parent.iterdir()] == ["ccache"]


async def test_tickets_are_renewed_at_a_quarter_of_their_life_and_replaced_as_a_whole(store: CredentialStore) -> None:
    source = Source(life=8.0)
    path = await store.keep("k1", source)
    first, began = path.stat().st_ino, time.time()
    with path.open() as reading:
        await eventually(lambda: path.read_text() == "tickets 2", "renewed and in place", timeout=10)
        assert 1.9 < time.time() - began < 7.0
        assert path.stat().st_ino != first and reading.read() == "tickets 1"
    # The file is there a moment before the store has heard of it.
    await eventually(lambda: (store.ends("k1") or 0) > began + 8.0, "the new end is known")


@pytest.mark.parametrize("error", [Unavailable("No KDC."), RuntimeError("a fault")], ids=["kdc", "fault"])
async def test_a_failed_renewal_leaves_the_tickets_and_is_tried_again(store: CredentialStore, error: Exception) -> None:
    source = Source(life=2.0)
    path = await store.keep("k1", source)
    source.error = error
    await eventually(lambda: source.asked >= 3, "tried twice more", timeout=10)
    assert path.read_text() == "tickets 1"
    source.error = None
    await eventually(lambda: path.read_text() != "tickets 1", "renewed after all", timeout=10)
    assert len(list(path.parent.iterdir())) == 1


async def test_tickets_that_have_ended_are_asked_for_ever_more_rarely(
    store: CredentialStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their owner may be locked at the KDC for as long as the kernel lives, and that may be months."""
    real, pauses, source = asyncio.sleep, list[float](), Source(life=-5.0)

    async def sleep(seconds: float) -> None:
        await real(0 if seconds >= 0.5 else seconds)
        if seconds >= 0.5:
            pauses.append(seconds)

    await store.keep("k1", source)
    source.error = Unavailable("The account is locked.")
    store.retry_seconds = 30.0
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await eventually(lambda: len(pauses) > 7, "tried several times", timeout=20)
    assert pauses[1:8] == [60.0, 120.0, 240.0, 480.0, 600.0, 600.0, 600.0]


async def test_tickets_go_with_their_kernel(store: CredentialStore) -> None:
    before = asyncio.all_tasks()
    path = await store.keep("k1", Source())
    assert asyncio.all_tasks() != before
    await store.drop("k1")
    await store.drop("k1")
    assert not path.parent.exists() and store.ends("k1") is None
    assert asyncio.all_tasks() == before
    with pytest.raises(NotFound):
        await store.read("k1")


async def test_what_could_not_be_fetched_leaves_nothing(store: CredentialStore) -> None:
    source = Source()
    source.error = Unavailable("No KDC.")
    with pytest.raises(Unavailable):
        await store.keep("k1", source)
    assert list(store.path.iterdir()) == []


async def test_the_start_purges_all_but_live_kernels(store: CredentialStore, tmp_path: Path) -> None:
    for key in ("live", "ended"):
        await store.keep(key, Source())
    (store.path / "live" / ".1234").write_text("half")
    (store.path / "stray").write_text("x")
    (store.path / "link").symlink_to(tmp_path)
    (tmp_path / "bystander").write_text("x")
    await store.close()
    again = CredentialStore(state_dir=tmp_path)
    again.start(["live", "link"])
    assert sorted(str(found.relative_to(again.path)) for found in again.path.rglob("*")) == ["live", "live/ccache"]
    assert (tmp_path / "bystander").exists()


async def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "credentials").symlink_to(tmp_path / "theirs")
    with pytest.raises(Unavailable, match="no safe place"):
        CredentialStore(state_dir=tmp_path).start()
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o755)
    CredentialStore(state_dir=tmp_path, directory=str(wide)).start()
    assert mode(wide) == 0o700


@pytest.mark.parametrize("key", ["", "..", "../x", "a/b", ".x", "x" * 65, "k\n"])
async def test_a_key_is_no_path(store: CredentialStore, key: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        await store.keep(key, Source())


async def test_a_source_that_hangs_is_not_waited_for(store: CredentialStore) -> None:
    store.calls.timeout = 0.2
    source = Source()
    source.held = threading.Event()
    with pytest.raises(Unavailable, match=r"The Kerberos service \(KDC\) cannot be asked"):
        await store.keep("k1", source)
    source.held.set()
    await eventually(lambda: source.fetched == 1 and "identity" not in threads(), "it came back")
    assert not (store.path / "k1").exists()  # what comes too late is thrown away


async def test_a_few_that_hang_do_not_take_a_thread_each(tmp_path: Path) -> None:
    store = CredentialStore(state_dir=tmp_path, timeout=0.2, max_calls=2)
    store.start()
    source = Source()
    source.held = threading.Event()
    before = threading.active_count()
    found = await asyncio.gather(*(store.keep(f"k{n}", source) for n in range(8)), return_exceptions=True)
    assert all(isinstance(one, Unavailable) for one in found)
    assert threading.active_count() - before <= 2
    source.held.set()


# Providers


def test_the_gateway_runs_without_kerberos() -> None:
    code = (
        "import sys; sys.modules['gssapi'] = sys.modules['krb5'] = None\n"
        "import hub_gateway.identity.mapper, hub_gateway.identity.credentials, hub_gateway.app\n"
        "from hub_gateway.identity import kerberos; print(kerberos.missing())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'hub-gateway[kerberos]'" in done.stdout


async def test_each_need_has_its_credential(store: CredentialStore) -> None:
    credentials = Credentials(store=store)
    assert (await credentials.obtain(ALICE, IdentityNeed.NONE, "k1")).kind == "none"
    became = await credentials.obtain(ALICE, IdentityNeed.UNIX_USER, "k1")
    assert (became.kind, became.unix_user, became.ccache) == ("sudo", "alice", None)
    hints = {IdentityNeed.SERVICE_TICKET: "KeytabCredential.keytab", IdentityNeed.USER_TGT: "UserTgtCredential"}
    for need, hint in hints.items():
        with pytest.raises(Unavailable) as without:
            await credentials.obtain(ALICE, need, "k1")
        assert f"set {hint}" in without.value.hint
    with pytest.raises(Unavailable) as unset:
        await credentials.obtain(ALICE, IdentityNeed.PROXY_USER, "k1")
    assert "set KeytabCredential.keytab" in unset.value.hint
    assert list(store.path.iterdir()) == []


async def test_explain_says_which_credential(store: CredentialStore) -> None:
    from traitlets.config import Config, Configurable

    config = Config({"KeytabCredential": {"keytab": "/etc/gw.keytab", "principal": "gw/host@EXAMPLE.TEST"}})
    credentials = Credentials(parent=Configurable(config=config), store=store)
    rules = [{"name": "all", "pattern": "(.*)", "unix_user": "$1", "principal": "$1"}]
    mapper = IdentityMapper(rules=rules, default_realm="EXAMPLE.TEST", require_unix_user=False, credentials=credentials)
    mapper.proxies = {"local": IdentityNeed.UNIX_USER, "ssh": IdentityNeed.USER_TGT, "yarn": IdentityNeed.PROXY_USER}
    said = {step.sentence: step.outcome for step in await mapper.explain("alice", ()) if step.stage == "credential"}
    assert said == {
        "On local: the gateway becomes the unix user alice, as root or by its rule of sudo.": "ok",
        "On ssh: set UserTgtCredential.auth_state_key, ccache_file or accept_offered": "unavailable",
        "On yarn: the gateway's own tickets (gw/host@EXAMPLE.TEST) from its keytab, acting for alice.": "ok",
    }
    mapper.ways = {"local": lambda user, principal: f"as {user} by a way of its own."}
    said = {step.sentence: step.outcome for step in await mapper.explain("alice", ()) if step.stage == "credential"}
    assert said["On local: as alice by a way of its own."] == "ok"
    mapper.tickets = {"ssh": IdentityNeed.SERVICE_TICKET}
    told = [step.sentence for step in await mapper.explain("alice", ()) if step.stage == "credential"]
    assert "On ssh, for the kernels themselves: set S4UCredential.services" in told
    services = ["HTTP/rm.example.test"]
    config.S4UCredential = Config({"services": services})
    mapper.credentials = Credentials(parent=Configurable(config=config), store=store)
    told = [step.sentence for step in await mapper.explain("alice", ()) if step.stage == "credential"]
    assert (
        "On ssh, for the kernels themselves: tickets of alice@EXAMPLE.TEST for HTTP/rm.example.test alone, by "
        "constrained delegation (S4U). They cannot be had now. The gateway cannot get Kerberos tickets; ask its "
        "administrator."
    ) in told
    steps = await mapper.explain("alice", (), attempt=False)
    assert not any("They cannot be had now" in step.sentence for step in steps), "a page of twenty people asks no KDC"
    mapper.services = {"gw": {"principal": "GW/host@EXAMPLE.TEST"}}
    assert "a system's principal" in (await mapper.explain("services/gw", ()))[-1].sentence


async def test_a_users_own_ticket_is_that_users(store: CredentialStore, tmp_path: Path) -> None:
    """Names make no path outside of the directory, and what is offered is taken only where that is wanted."""
    provider = UserTgtCredential(store=store, ccache_file=str(tmp_path / "{user}" / "{unix_user}"))
    assert provider.says(ALICE) == f"a copy of the TGT of alice@EXAMPLE.TEST, from {tmp_path}/alice/alice."
    assert "{user}" in provider.says(replace(ALICE, hub_user=".."))
    for name in ("../etc", "..", "", "a b"):
        with pytest.raises(Forbidden, match="none for a file"):
            await provider.obtain(replace(ALICE, hub_user=name), "k1")
    fresh = (int(time.time()) + 3600).to_bytes(4, "big")
    offered = base64.b64encode(CCACHE.replace((2000).to_bytes(4, "big"), fresh)).decode()
    with pytest.raises(Unavailable, match="cannot be read"):
        await provider.obtain(replace(ALICE, offered=offered), "k1")
    assert not provider.takes_offered()
    provider.accept_offered = True
    assert provider.takes_offered()
    in_lines = base64.encodebytes(base64.b64decode(offered)).decode()
    found = await provider.obtain(replace(ALICE, offered=in_lines), "k1")
    assert found.ccache is not None and mode(found.ccache) == 0o600 and found.renew_till == found.ends
    with pytest.raises(Unavailable, match=r"is not in base64; .* cannot be read"):
        await provider.obtain(replace(ALICE, offered="?"), "k2")
    with pytest.raises(Unavailable, match=r"not of eve@EXAMPLE\.TEST"):
        await provider.obtain(replace(ALICE, principal="eve@EXAMPLE.TEST", offered=offered), "k2")
    assert offered not in repr(replace(ALICE, offered=offered))


# What a ticket is, to a program


def test_a_cache_that_is_none_is_refused() -> None:
    whole = CCACHE
    parsed = ccachefile.parse(whole)
    assert parsed.principal == "alice@EXAMPLE.TEST" and parsed.only(parsed.tickets) != b""
    assert [(one.server, one.ends) for one in parsed.tickets] == [("krbtgt/EXAMPLE.TEST@EXAMPLE.TEST", 2000)]
    times = b"".join(number.to_bytes(4, "big") for number in (1, 0, 2000, 3000))
    (without_start,) = ccachefile.parse(whole.replace(times[:4] * 2 + times[8:], times)).tickets
    assert without_start.begins == 1, "the time of the authentication stands in for it (RFC 4120, section 5.3)"
    for broken in (b"", b"\x05\x03", whole[:-3], whole[:40], whole.replace(b"\x00\x00\x00\x05alice", b"\xff" * 9)):
        with pytest.raises(ValueError, match=r"version 4|in the middle"):
            ccachefile.parse(broken)


@pytest.mark.parametrize("name", ["host/node.example.test", "hdfs/nn@EXAMPLE.TEST", "", "a b", "x@Y@Z", "gw\\@x", "GW"])
def test_nobody_but_a_person_is_impersonated(name: str) -> None:
    with pytest.raises(Forbidden, match="gets no tickets of"):
        s4u.person(name, "EXAMPLE.TEST", "gw@EXAMPLE.TEST")


def test_the_realm_of_a_person_is_the_gateways() -> None:
    assert s4u.person("alice", "EXAMPLE.TEST") == "alice@EXAMPLE.TEST"


# A real KDC


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kdc]:
    if reason := kerberos.missing():
        pytest.skip(reason)
    made = Kdc(tmp_path_factory.mktemp("kdc"), life="12s").start()
    yield made
    made.stop()


@pytest.fixture
def kdc(realm: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    for name in ("KRB5_CONFIG", "KRB5RCACHENAME"):
        monkeypatch.setenv(name, realm.environment[name])
    monkeypatch.delenv("KRB5CCNAME", raising=False)
    return realm


def keytab_of(store: CredentialStore, keytab: Path, principal: str) -> KeytabCredential:
    return KeytabCredential(store=store, keytab=str(keytab), principal=principal)


async def test_tickets_of_12_seconds_are_renewed(kdc: Kdc, store: CredentialStore) -> None:
    principal = f"gw/localhost@{kdc.realm}"
    provider = keytab_of(store, kdc.keytab("gw", principal), principal)
    found = await provider.obtain(ALICE, "k1")
    assert (found.acts_for, found.principal, found.unix_user) == ("alice", principal, None)
    assert found.ccache is not None and found.ends is not None and found.ends - time.time() < 13
    assert mode(found.ccache) == 0o600
    first = kdc.run("klist", "-c", str(found.ccache))
    assert f"Default principal: {principal}" in first and "krbtgt/" in first
    ends = found.ends
    await eventually(lambda: (store.ends("gateway") or 0) > ends + 1, "renewed before they end", timeout=10)
    assert time.time() < ends
    assert kdc.run("klist", "-c", str(found.ccache)) != first
    assert (await provider.obtain(ALICE, "k2")).ccache == found.ccache


async def test_a_token_opens_a_conversation_with_a_service(kdc: Kdc, store: CredentialStore) -> None:
    import gssapi

    client, service = f"client/localhost@{kdc.realm}", f"HTTP/localhost@{kdc.realm}"
    provider = keytab_of(store, kdc.keytab("client", client), client)
    http = kdc.keytab("http", service)
    token = await provider.token(service)
    accepting = gssapi.Credentials(usage="accept", store={"keytab": f"FILE:{http}"})
    context = gssapi.SecurityContext(creds=accepting, usage="accept")
    context.step(token)
    assert str(context.initiator_name) == client
    with pytest.raises(Unavailable) as unknown:
        await provider.token(f"HTTP/nowhere@{kdc.realm}")
    assert "not found in Kerberos database" in unknown.value.hint


async def test_a_keytab_that_is_no_use_is_said_to_the_operator(kdc: Kdc, store: CredentialStore) -> None:
    good = kdc.keytab("other", f"other/localhost@{kdc.realm}")
    wrong = keytab_of(store, good, f"nobody/localhost@{kdc.realm}")
    with pytest.raises(Unavailable, match="cannot get a Kerberos ticket") as refused:
        await wrong.ccache()
    assert "nobody/localhost" in refused.value.hint and "nobody" not in refused.value.message
    good.chmod(0o644)
    with pytest.raises(Unavailable) as open_to_all:
        await keytab_of(store, good, f"other/localhost@{kdc.realm}").ccache()
    assert "everybody may read the keytab" in open_to_all.value.hint
    missing = keytab_of(store, good.with_name("gone"), f"other/localhost@{kdc.realm}")
    with pytest.raises(Unavailable) as gone:
        await missing.ccache()
    assert "No such file" in gone.value.hint


async def test_a_kdc_that_does_not_answer_does_not_stop_the_event_loop(
    kdc: Kdc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    principal = f"late/localhost@{kdc.realm}"
    keytab = kdc.keytab("late", principal)
    with socket.create_server(("127.0.0.1", 0)) as hole:  # it takes connections, and says nothing
        conf = kdc.client_conf(tmp_path / "krb5.conf", hole.getsockname()[1])
        monkeypatch.setenv("KRB5_CONFIG", str(conf))
        store = CredentialStore(state_dir=tmp_path, timeout=1.0)
        store.start()
        lags: list[float] = []

        async def watch() -> None:
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                lags.append(time.monotonic() - began - 0.01)

        watching = asyncio.ensure_future(watch())
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no answer within 1 seconds"):
            await keytab_of(store, keytab, principal).ccache()
        assert 0.9 < time.monotonic() - began < 3
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        assert len(lags) > 20 and max(lags) < 0.5
        await store.close()
