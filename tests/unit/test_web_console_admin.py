"""Pages for administrators over real parts: nothing typed is lost, nothing is done twice, and names stay names."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import func, insert, select
from traitlets.config import Config, Configurable

from hub_gateway import audit
from hub_gateway.audit import AuditLog
from hub_gateway.auth.hub import HubService
from hub_gateway.auth.scopes import ADMIN, IDENTITY_WRITE, KERNELS_READ, LEDGER_WRITE, QUOTAS_WRITE
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import IdentityClaim, LedgerMonth, QuotaRequest, SentForm
from hub_gateway.demo.forms import Form, forms_of
from hub_gateway.errors import LaunchRefused, Unavailable
from hub_gateway.identity.mapper import IdentityMapper
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.kernels.store import KernelStore
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.reports import Reports
from hub_gateway.quotas.service import QuotaService
from hub_gateway.quotas.types import (
    Action,
    Counts,
    ObjectKind,
    Origin,
    Period,
    Policy,
    Resource,
    SubjectKind,
    Weekly,
    WindowKind,
)
from hub_gateway.web import policyform
from tests.harness.fake_hub import ACCESS, FakeHub
from tests.harness.quotas import new, put
from tests.harness.web import WebServer, settings

BASE = "/services/hub-gateway"
NAVIGATE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none"}
LATER = datetime(2100, 1, 1, 12, 30, tzinfo=timezone.utc)
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "=cmd()",
    "аlice",
    "x" * 200,
    "\"><script>alert('1')</script>",
    "{{ handler }}",
)
GROUP = "a\"b'c<i>"
PAGES = ("people", "groups", "identity", "policies", "clusters", "kernels", "requests", "queue", "audit", "ledger")


class Console:
    """A gateway with everything but kernels, and browsers that have logged in."""

    def __init__(self, hub: FakeHub, store: KernelStore, server: WebServer) -> None:
        self.hub, self.store, self.server = hub, store, server
        self._open: list[httpx.AsyncClient] = []

    async def login(self, name: str, *scopes: str, server: WebServer | None = None) -> httpx.AsyncClient:
        """A browser of somebody whose login has these scopes."""
        at = server or self.server
        self.hub.visitor = name
        browser = at.client(headers=NAVIGATE, follow_redirects=False)
        self._open.append(browser)
        first = await browser.get("home")
        async with httpx.AsyncClient() as other:
            there = httpx.URL(self.hub.url).copy_with(raw_path=httpx.URL(first.headers["Location"]).raw_path)
            callback = (await other.get(there)).headers["Location"]
        known = set(self.hub.tokens)
        await browser.get(f"http://127.0.0.1:{at.port}{callback}")
        for token in set(self.hub.tokens) - known:
            self.hub.tokens[token]["scopes"] = [ACCESS, *scopes]
        return browser

    async def close(self) -> None:
        for browser in self._open:
            await browser.aclose()


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHub]:
    made = FakeHub()
    made.groups = {"analysts": ["bob", "lea"], "others": ["carol"]}
    await made.start()
    for name, value in made.environment(f"{BASE}/").items():
        monkeypatch.setenv(name, value)
    yield made
    await made.stop()


def replica(store: KernelStore, tmp_path: Path) -> WebServer:
    """A gateway on this database."""
    config = Config({"HubAuthenticator": {"cache_seconds": 0.0}, "HubPeople": {"cache_seconds": 0.0}})
    service = HubService(cookie_secret=b"c" * 32, base_url=f"{BASE}/", parent=Configurable(config=config))
    people = service.authenticator.people
    proxies, specs = Proxies(state_dir=str(tmp_path)), KernelSpecs()

    async def kernelspecs(_caller: Any) -> dict[str, Any]:
        return {"kernelspecs": {"python": {}, "<b>spec": {}}}

    return WebServer(
        SimpleNamespace(controller=SimpleNamespace(proxies=proxies, links={}), kernelspecs=kernelspecs),
        hub=service,
        authenticator=service.authenticator,
        base_url=f"{BASE}/",
        web=settings(),
        db=store.db,
        quotas=QuotaService(
            db=store.db, admitter=store.admitter, specs=specs, proxies=proxies, half_life=86400.0, people=people
        ),
        identity=IdentityMapper(
            db=store.db,
            people=people,
            rules=[{"name": "<b>all", "pattern": "bob|carol|lea", "principal": "$0@EXAMPLE.COM"}],
            default_realm="EXAMPLE.COM",
        ),
        audit=AuditLog(),
        reports=Reports(),
    )


@pytest.fixture
async def console(hub: FakeHub, quota_store: KernelStore, tmp_path: Path) -> AsyncIterator[Console]:
    async with replica(quota_store, tmp_path) as server:
        made = Console(hub, quota_store, server)
        yield made
        await made.close()
        await server.services.authenticator.close()


async def form_of(browser: httpx.AsyncClient, page: str, wanted: str) -> Form:
    """The form of a page that has the field `wanted`."""
    found = await browser.get(page)
    assert found.status_code == 200, found.text
    return next(form for form in forms_of(found.text) if wanted in form.fields or form.action.endswith(wanted))


async def send(browser: httpx.AsyncClient, form: Form, **changes: str) -> httpx.Response:
    """The form, filled in, as a browser sends it."""
    address = browser.base_url.join(form.action)
    return await browser.post(address, data={**form.fields, **changes})


async def test_a_login_is_in_the_audit_trail(console: Console) -> None:
    await console.login("lea")
    (line,) = await console.store.db.read(lambda tx: list(audit.query(tx, action="login")))
    assert (line.actor, line.subject, line.outcome, line.detail) == ("lea", "lea", "ok", {"address": "127.0.0.1"})


FULL = Policy(
    name="full",
    subject_kind=SubjectKind.GROUP,
    subject="analysts",
    object_kind=ObjectKind.KERNELSPEC,
    object="spark_*",
    resource=Resource.MEMORY,
    counts=Counts.TOGETHER,
    timezone="Europe/Berlin",
    hard=3.0 * 2**30 + 512,
    soft=2.0**30,
    burst=4.0 * 2**30,
    burst_seconds=5400,
    action=Action.QUEUE,
    queue_seconds=90,
    grace_seconds=0,
    priority=-7,
    enabled=False,
    valid_from=datetime(2030, 1, 31, 12, 0, 0, 123456, tzinfo=timezone.utc),
    valid_until=LATER,
    weekly=(Weekly((0, 1, 4), 480, 1440), Weekly((6,), 1380, 60)),
    note="two\nlines & a <tag>",
)
WINDOWED = Policy(
    name="windowed",
    subject_kind=SubjectKind.USER,
    subject="bob",
    resource=Resource.GPU_HOURS,
    gpu_model="a100",
    window=WindowKind.CALENDAR,
    period=Period.WEEK,
    hard=2.5,
)
ROLLING = Policy(
    name="rolling",
    subject_kind=SubjectKind.SERVICE,
    subject="ci",
    resource=Resource.KERNEL_HOURS,
    window=WindowKind.ROLLING,
    window_seconds=7 * 86400,
    hard=None,
)
GRANT = Policy(
    name="granted",
    subject_kind=SubjectKind.USER,
    subject="bob",
    origin=Origin.GRANT,
    approver="admin",
    valid_until=LATER,
    hard=9,
    priority=1000,
)


@pytest.mark.parametrize("policy", [FULL, WINDOWED, ROLLING, GRANT], ids=lambda policy: policy.name)
async def test_every_field_of_a_policy_survives_an_edit(console: Console, policy: Policy) -> None:
    before = await put(console.store, policy)
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, f"admin/policies/{policy.name}", "hard")
    answer = await send(admin, form)
    assert answer.status_code == 303, answer.text
    after = await console.server.services.quotas.policy(policy.name)  # type: ignore[union-attr]
    assert after is not None and after.version == before.version + 1
    assert policyform.typed(after).values == policyform.typed(before).values
    for name in policy.__dataclass_fields__:
        if name not in ("version", "updated_at", "updated_by"):
            assert getattr(after, name) == getattr(before, name), name


BAD = [
    ("hard", "-1", "Hard limit must"),
    ("hard", "4G", "Hard limit must"),
    ("soft", "nan", "Soft limit must"),
    ("burst", "1e300", "Burst must"),
    ("window_seconds", "a week", "Rolling window must be a duration"),
    ("queue_seconds", "-5", "Waits at most must be a duration"),
    ("priority", "high", "Priority must be a whole number"),
    ("valid_until", "tomorrow", "must be a date"),
    ("week0_begin", "8", "needs at least one day"),
    ("timezone", "Mars/Olympus", "time zone"),
    ("subject", "bob", "Whom must be"),
    ("resource", "souls", "Resource must be one of"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), BAD)
async def test_a_bad_value_is_told_and_nothing_typed_is_lost(
    console: Console, field: str, value: str, sentence: str
) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/policies/all", "hard")
    typed = {**form.fields, "note": "what I wrote", "week1_2": "on", "week1_begin": "08:00", "week1_end": "09:30"}
    typed = {**typed, field: value}
    answer = await send(admin, Form(form.action, typed))
    assert answer.status_code == 400 and sentence in html.unescape(answer.text), answer.text
    again = next(form for form in forms_of(answer.text) if "hard" in form.fields)
    assert again.fields["note"].strip() == "what I wrote" and "week0_begin" in again.fields
    kept = [again.fields.get(f"week{number}_begin") for number in range(3)]
    assert "08:00" in kept
    if not field.startswith("week") and field != "resource":
        assert again.fields[field] == value
    same = await console.server.services.quotas.policy("all")  # type: ignore[union-attr]
    assert same is not None and same.version == 1


async def test_the_preview_says_what_changes_who_is_met_and_changes_nothing(console: Console) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    await put(console.store, Policy("bob-two", SubjectKind.USER, "bob", hard=2))
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/policies/all", "hard")
    page = await send(admin, form, hard="5", do="preview", explain="bob", days="7")
    assert page.status_code == 200, page.text
    assert "<del>2</del>" in page.text and "<ins>5</ins>" in page.text and "bob-two counts" in page.text
    assert "all does not count. The policy bob-two counts in its place" in page.text
    for days in ("0", "many", "9" * 30):
        assert (await send(admin, form, do="preview", days=days)).status_code == 400
    new_one = await form_of(admin, "admin/policies/+new", "hard")
    page = await send(admin, new_one, name="other", hard="7", do="save")
    assert page.status_code == 400 and "The policies all and other say different things" in page.text
    assert (await send(admin, new_one, name="all", hard="7")).status_code == 409
    same = await console.server.services.quotas.policy("all")  # type: ignore[union-attr]
    assert same is not None and same.hard == 2


async def test_a_policy_is_deleted_by_who_is_sure_and_has_seen_it(console: Console) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    admin = await console.login("admin", ADMIN)
    page = await admin.get("admin/policies/all")
    edit, delete = forms_of(page.text)
    assert (await send(admin, delete)).status_code == 400
    assert (await send(admin, edit, hard="3")).status_code == 303
    assert (await send(admin, delete, confirm="yes")).status_code == 409
    _, delete = forms_of((await admin.get("admin/policies/all")).text)
    assert (await send(admin, delete, confirm="yes")).status_code == 303
    assert (await admin.get("admin/policies/all")).status_code == 404


async def test_policies_as_a_file(console: Console) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    await put(console.store, Policy("gone", SubjectKind.USER, "bob", hard=2))
    admin = await console.login("admin", ADMIN)
    assert "name: all" in (await admin.get("admin/policies/+file?download=yes")).text
    form = await form_of(admin, "admin/policies/+file", "text")
    bad = await send(admin, form, text="policies: [{name: <b>, subject: everyone}]")
    assert bad.status_code == 400 and "&lt;b&gt;" in bad.text
    text = "policies:\r\n- {name: all, subject: everyone, hard: 4}\r\n- {name: more, subject: 'user:lea', hard: 1}\r\n"
    compared = await send(admin, form, text=text)
    assert compared.status_code == 200 and "1 added, 1 changed, 1 deleted" in compared.text
    assert ">-  hard: 2.0</del>" in compared.text and ">+  hard: 4.0</ins>" in compared.text
    apply = next(form for form in forms_of(compared.text) if "seen" in form.fields)
    await put(console.store, Policy("late", SubjectKind.USER, "carol", hard=1))
    assert (await send(admin, apply)).status_code == 409
    compared = await send(admin, await form_of(admin, "admin/policies/+file", "text"), text=text, keep="on")
    apply = next(form for form in forms_of(compared.text) if "seen" in form.fields)
    assert (await send(admin, apply)).status_code == 303
    names = [policy.name for policy in await console.server.services.quotas.policies()]  # type: ignore[union-attr]
    assert names == ["all", "gone", "late", "more"]
    lead = await console.login("lea", f"{QUOTAS_WRITE}!group=analysts")
    assert (await lead.get("admin/policies/+file")).status_code == 404


async def test_a_form_is_carried_out_once_whatever_replica_gets_it(console: Console, tmp_path: Path) -> None:
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/maintenance", "sentence")
    refused = await send(admin, form, sentence="")
    assert refused.status_code == 400, "what was refused may be sent again"
    answers = await asyncio.gather(*(send(admin, form, sentence="An upgrade.") for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [303, 409, 409, 409, 409]
    again = next(answer for answer in answers if answer.status_code == 409)
    assert "sent before" in again.text
    assert (await send(admin, await form_of(admin, "admin/maintenance", "on"), on="no")).status_code == 303
    async with replica(console.store, tmp_path) as other:
        there = httpx.URL(f"{other.url}/admin/maintenance")
        replayed = await admin.post(there, data={**form.fields, "sentence": "An upgrade."})
        assert replayed.status_code == 409
        await other.services.authenticator.close()
    assert await console.server.services.quotas.maintenance() is None  # type: ignore[union-attr]


async def test_a_form_of_which_nobody_knows_what_it_did_is_not_sent_again(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/maintenance", "sentence")

    async def gone(*_: Any) -> None:
        raise Unavailable("The gateway cannot reach its database; try again in a moment.")

    with monkeypatch.context() as patch:
        patch.setattr(console.server.services.quotas, "set_maintenance", gone)
        assert (await send(admin, form, sentence="x")).status_code == 503
    assert (await send(admin, form, sentence="x")).status_code == 409
    assert (await send(admin, await form_of(admin, "admin/maintenance", "sentence"), sentence="x")).status_code == 303


async def test_the_page_of_a_service_is_found_whatever_its_name(console: Console) -> None:
    await put(console.store, Policy("ci-one", SubjectKind.SERVICE, "ci", hard=1))
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/people/services%2Fci", "amount")
    assert (await send(admin, form, amount="3", reason="A release.")).status_code == 303
    grant = next(one for one in await quotas_of(console) if one.origin is Origin.GRANT)
    assert (grant.subject_kind, grant.subject, grant.hard) == (SubjectKind.SERVICE, "ci", 3)


async def test_forms_without_a_number_or_with_somebody_elses_change_nothing(console: Console) -> None:
    admin, other = await console.login("admin", ADMIN), await console.login("eve", ADMIN)
    form = await form_of(admin, "admin/maintenance", "sentence")
    theirs = (await form_of(other, "admin/maintenance", "sentence")).fields["form_number"]
    old = form.fields["form_number"].replace("2|1:0|10:", "2|1:0|10:1", 1)
    for number in ("", "x", theirs, old, "2|1:0|10:1|11:form_number|0:|", "\x00"):
        answer = await send(admin, form, sentence="x", form_number=number)
        assert answer.status_code == 403 and "nothing was changed" in answer.text, number
    assert await console.server.services.quotas.maintenance() is None  # type: ignore[union-attr]


async def test_numbers_of_forms_are_forgotten_when_their_pages_are_too_old(console: Console) -> None:
    old = utcnow() - timedelta(seconds=1)
    await console.store.db.write(lambda tx: tx.add(SentForm(number="old", until=old)))
    admin = await console.login("admin", ADMIN)
    await send(admin, await form_of(admin, "admin/maintenance", "sentence"), sentence="x")
    kept = await console.store.db.read(lambda tx: list(tx.scalars(select(SentForm.number))))
    assert len(kept) == 1 and "old" not in kept


async def populate(console: Console) -> None:
    """Everything with names that would rather be something else."""
    console.hub.groups = {"analysts": ["bob", *HOSTILE], GROUP: [*HOSTILE], "others": ["carol"]}
    console.hub.properties = {GROUP: {"cost_center": "<u>4711"}}
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=1, note="<s>note"))
    await put(
        console.store, Policy("group", SubjectKind.GROUP, GROUP, hard=1, object_kind=ObjectKind.QUEUE, object="<q>")
    )
    for number, name in enumerate(HOSTILE):
        await put(console.store, Policy(f"p{number}", SubjectKind.USER, name, hard=2, note=name))
        await console.store.admit(new(number, name, kernelspec="<b>spec", path=f"/{name}"))

        def write(tx: Any, name: str = name) -> None:
            detail = {"sentence": f"No room for {name}.", "kernelspec": "<b>spec", "policy": "all"}
            audit.append(tx, actor=name, action="kernel.refused", subject=name, outcome="refused", detail=detail)
            tx.add(IdentityClaim(kind="unix_user", name=name[:100], hub_user=name, rule="<b>all", claimed_at=utcnow()))

        await console.store.db.write(write)


def clean(page: httpx.Response) -> None:
    """No name has become markup, and no script is in the page."""
    text = page.text
    assert page.status_code in (200, 400, 409), text
    for bad in ("<img", "<script>", "<i>", "<u>", "<s>", "<q>", "<b>", "onerror=alert(1)>", "style="):
        assert bad not in text, bad
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


async def test_names_stay_names_on_every_page(console: Console) -> None:
    await populate(console)
    admin = await console.login("admin", ADMIN)
    for page in (
        *PAGES,
        "people?q=img",
        f"people?group={quote(GROUP, safe='')}",
        "identity?q=%3Cimg",
        "clusters?check=local",
    ):
        clean(await admin.get(f"admin/{page}"))
    for name in HOSTILE:
        person = await admin.get(f"admin/people/{quote(name, safe='')}?kernelspec=")
        clean(person)
        assert f"No room for {name}." in html.unescape(person.text)
        clean(await admin.get(f"admin/identity?user={quote(name, safe='')}"))
        form = await form_of(admin, f"admin/people/{quote(name, safe='')}", "amount")
        clean(await send(admin, form, amount="<b>4", reason=name))
        given = await send(admin, form, policy=form.fields["policy"], amount="5", reason=name)
        assert given.status_code == 303, given.text
        clean(await admin.get(httpx.URL(console.server.url).join(given.headers["Location"])))
    for policy in ("p0", "group", "+new?subject=%22%3E%3Cscript%3Ealert(1)%3C/script%3E"):
        clean(await admin.get(f"admin/policies/{policy}"))
    form = await form_of(admin, "admin/policies/p0", "hard")
    clean(await send(admin, form, do="preview", explain=HOSTILE[0]))
    clean(await send(admin, form, hard="<img src=x>"))
    clean(await send(admin, await form_of(admin, "admin/policies/+new", "hard"), name="<img src=x>"))


async def test_a_lead_sees_and_grants_to_their_own_people_alone(console: Console) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=1))
    await put(console.store, Policy("carol-two", SubjectKind.USER, "carol", hard=2))
    filtered = [f"{scope}!group=analysts" for scope in (QUOTAS_WRITE, IDENTITY_WRITE, KERNELS_READ, LEDGER_WRITE)]
    lead = await console.login("lea", *filtered)
    for page in ("people", "people?q=carol", "groups", "identity", "policies"):
        found = await lead.get(f"admin/{page}")
        assert found.status_code == 200, page
        # What was looked for stands in its field.
        assert "carol" not in found.text.replace('value="carol"', "") and "others" not in found.text, page
    assert "bob" in (await lead.get("admin/people")).text
    for page in ("people/carol", "people?group=others", "identity?user=carol", "people/nobody", "ledger"):
        assert (await lead.get(f"admin/{page}")).status_code == 404, page
    assert (await lead.get("admin/people/carol")).text.replace("carol", "nobody") == (
        await lead.get("admin/people/nobody")
    ).text, "who is out of reach is like who does not exist"
    assert "amount" not in [
        field for one in forms_of((await lead.get("admin/people/bob")).text) for field in one.fields
    ], "what administrators have set is not a lead's to raise"
    await put(console.store, Policy("team", SubjectKind.GROUP, "analysts", hard=1, delegated=True))
    form = await form_of(lead, "admin/people/bob", "amount")
    refused = await send(lead, form, policy="all", amount="4", reason="x")
    assert refused.status_code == 403 and "The limit all is an administrator" in refused.text
    elsewhere = Form(form.action.replace("bob", "carol"), form.fields)
    assert (await send(lead, elsewhere, amount="4", reason="x")).status_code == 404
    assert "amount" not in [
        field for one in forms_of((await lead.get("admin/people/lea")).text) for field in one.fields
    ]
    own = Form(form.action.replace("bob", "lea"), form.fields)
    assert (await send(lead, own, amount="4", reason="x")).status_code == 403
    given = await send(lead, form, amount="4", reason="A paper is due.")
    assert given.status_code == 303
    made = next(one for one in await quotas_of(console) if one.origin is Origin.GRANT)
    assert (made.subject, made.hard, made.approver, made.delegated) == ("bob", 4, "lea", True)
    person = await lead.get("admin/people/bob")
    assert "bob has more of team until" in person.text and made.name in person.text
    preview = await form_of(lead, f"admin/policies/{made.name}", "hard")
    assert (await send(lead, preview, do="preview", explain="carol")).status_code == 404
    previewed = await send(lead, preview, do="preview", explain="bob")
    assert previewed.status_code == 200 and "of your people" in previewed.text
    nobody = await console.login("bob")
    for name in PAGES:
        assert (await nobody.get(f"admin/{name}")).status_code == 404, name


async def test_a_lead_divides_what_administrators_give_and_lifts_nothing(console: Console) -> None:
    """Whatever the priority and the dates, and although the lead is one of the group."""
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    await put(console.store, Policy("room", SubjectKind.GROUP, "analysts", hard=3))
    lead = await console.login("lea", f"{QUOTAS_WRITE}!group=analysts")
    form = await form_of(lead, "admin/policies/+new", "hard")
    policy = {"subject": "group:analysts", "resource": "kernels", "counts": "each", "do": "save", "enabled": "on"}
    made = await send(lead, form, **policy, name="lifted", hard="", priority="999999")
    assert made.status_code == 303, made.text
    assert (await send(lead, await form_of(lead, "admin/policies/room", "hard"), hard="9")).status_code == 403
    for number in range(3):
        await console.store.admit(new(number, "lea", groups=("analysts",)))
    with pytest.raises(LaunchRefused, match="policy room"):
        await console.store.admit(new(3, "lea", groups=("analysts",)))
    lifted = await form_of(lead, "admin/policies/lifted", "hard")
    assert (await send(lead, lifted, hard="1")).status_code == 303
    await console.store.admit(new(4, "bob", groups=("analysts",)))
    with pytest.raises(LaunchRefused, match="policy lifted"):
        await console.store.admit(new(5, "bob", groups=("analysts",)))
    admin = await console.login("admin", ADMIN)
    assert (await send(admin, await form_of(admin, "admin/policies/lifted", "hard"), hard="2")).status_code == 303
    assert [one.delegated for one in await quotas_of(console) if one.name == "lifted"] == [True], "it stays a lead's"


async def test_requests_are_paged_and_the_oldest_is_answered(console: Console) -> None:
    """A lead's people are looked for in the database: others who ask a lot hide nobody."""
    await put(console.store, Policy("team", SubjectKind.GROUP, "analysts", hard=1, delegated=True))
    until = utcnow() + timedelta(days=1)
    service = console.server.services.quotas
    assert service is not None
    await service.open_request("bob", ["analysts"], "team", 3, until, "A deadline.")
    row = {"groups": [], "policy": "team", "amount": 2.0, "until": until, "reason": "", "created_at": until}
    many = [{**row, "owner": "carol", "state": "open", "answer": ""} for _ in range(510)]
    await console.store.write(lambda tx: tx.execute(insert(QuotaRequest), many) and None)
    admin, page = await console.login("admin", ADMIN), "admin/requests?state=open"
    for _ in range(5):
        found = await admin.get(page)
        assert found.status_code == 200 and "A deadline." not in found.text
        page = f"admin/requests{html.unescape(re.findall('href=.([^ ]*before=[0-9]+)', found.text)[-1])}"
    assert "A deadline." in (await admin.get(page)).text
    lead = await console.login("lea", f"{QUOTAS_WRITE}!group=analysts")
    form = await form_of(lead, "admin/requests", "text")
    assert (await send(lead, form, answer="grant", text="good luck")).status_code == 303
    assert [one.subject for one in await quotas_of(console) if one.origin is Origin.GRANT] == ["bob"]


async def test_who_may_not_come_in_any_more_changes_nothing(console: Console) -> None:
    """Although the page was open, and the login still holds powers of ours."""
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=2))
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/policies/all", "hard")
    authenticator = console.server.services.authenticator
    authenticator.cache_seconds = 60.0  # type: ignore[attr-defined]
    assert (await admin.get("admin/policies")).status_code == 200
    for model in console.hub.tokens.values():
        model["scopes"] = [ADMIN]
    refused = await send(admin, form, hard="9")
    assert refused.status_code == 403 and "may not use this gateway" in refused.text
    assert [one.hard for one in await quotas_of(console)] == [2]


async def quotas_of(console: Console) -> list[Policy]:
    assert console.server.services.quotas is not None
    return list(await console.server.services.quotas.policies())


BAD_GRANTS: list[tuple[Mapping[str, str], str]] = [
    ({"amount": "many"}, "Must be a number"),
    ({"amount": "1"}, "allows as much already"),
    ({"until": "2000-01-01"}, "today or in the next year"),
    ({"until": "soon"}, "must be a date"),
    ({"reason": ""}, "Write why"),
    ({"policy": "none"}, "has no limit"),
]


@pytest.mark.parametrize(("wrong", "sentence"), BAD_GRANTS)
async def test_a_bad_grant_is_told_at_its_field(console: Console, wrong: Mapping[str, str], sentence: str) -> None:
    await put(console.store, Policy("all", SubjectKind.EVERYONE, hard=1))
    admin = await console.login("admin", ADMIN)
    form = await form_of(admin, "admin/people/bob", "amount")
    typed = {"amount": "4", "reason": "because", **wrong}
    answer = await send(admin, form, **typed)
    assert answer.status_code == 400 and sentence in html.unescape(answer.text)
    again = next(form for form in forms_of(answer.text) if "amount" in form.fields)
    assert {name: again.fields[name] for name in typed if name != "policy"} == {
        name: value for name, value in typed.items() if name != "policy"
    }
    assert [policy.name for policy in await quotas_of(console)] == ["all"]


async def test_what_somebody_holds_is_released_by_who_is_sure(console: Console) -> None:
    def write(tx: Any) -> None:
        for owner in ("bob", "carol"):
            tx.add(IdentityClaim(kind="principal", name=f"{owner}@x", hub_user=owner, rule="r", claimed_at=utcnow()))

    await console.store.db.write(write)
    lead = await console.login("lea", f"{IDENTITY_WRITE}!group=analysts")
    page = await lead.get("admin/identity?user=bob")
    assert "bob@EXAMPLE.COM" in page.text and "carol@x" not in page.text
    form = next(form for form in forms_of(page.text) if form.action.endswith("/release"))
    assert (await send(lead, form)).status_code == 400
    assert (await send(lead, Form(form.action.replace("bob", "carol"), form.fields), confirm="yes")).status_code == 404
    assert (await send(lead, form, confirm="yes")).status_code == 303
    left = await console.store.db.read(lambda tx: list(tx.scalars(select(IdentityClaim.hub_user))))
    assert left == ["carol"]


async def test_the_ledger_is_kept_on_its_page(console: Console) -> None:
    admin = await console.login("admin", LEDGER_WRITE)
    prices = await form_of(admin, "admin/ledger", "core_hour")
    bad = await send(admin, prices, core_hour="-1", gpu_models="a100: 2.5")
    assert bad.status_code == 400 and "Core hour must be a price" in bad.text and "a100: 2.5" in bad.text
    bad = await send(admin, prices, valid_from="yesterday")
    assert bad.status_code == 400 and 'value="yesterday"' in bad.text
    assert (await send(admin, prices, core_hour="0.25", gpu_models="a100: 2.5\r\n")).status_code == 303
    page = await admin.get("admin/ledger")
    assert "Price list 1 holds" in page.text and "a100: 2.5" in page.text and ">0.25<" in page.text
    close = await form_of(admin, "admin/ledger", "month")
    assert (await send(admin, close)).status_code == 400, "only who is sure"
    assert (await send(admin, close, month="2999-01", confirm="yes")).status_code in (400, 409)
    assert (await send(admin, close, confirm="yes")).status_code == 303
    months = await console.store.db.read(lambda tx: tx.scalar(select(func.count()).select_from(LedgerMonth)))
    assert months == 1
    correct = await form_of(admin, "admin/ledger", "entry")
    answer = await send(admin, correct, entry="77", seconds="-5", note="<b>why")
    assert answer.status_code == 404 and "&lt;b&gt;why" in answer.text
