"""As whom kernels run: rules, what no rule can turn off, and names that were made to get through."""

from __future__ import annotations

import os
import pwd
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets import TraitError

from hub_gateway.auth.base import Caller
from hub_gateway.auth.people import GroupInfo
from hub_gateway.errors import Forbidden, Unavailable
from hub_gateway.identity.mapper import Identity, IdentityMapper
from hub_gateway.identity.unix import UnixUsers
from hub_gateway.proxies.base import IdentityNeed

PATTERN = {"name": "company", "pattern": r"([^@]+)@example\.com", "case": "lower"}
RULES = [
    {"name": "robots", "pattern": "svc-.*", "refuse": "Names that begin with svc- are kept for services."},
    {**PATTERN, "principal": "$1@EXAMPLE.TEST", "unix_user": "$1"},
    {
        "name": "partners",
        "pattern": r"(?P<user>[^@]+)@partner\.example",
        "principal": "${user}@PARTNER.TEST",
        "unix_user": "p_$1",
    },
    {"name": "plain", "pattern": "([^@/]+)", "principal": "$1", "unix_user": "$1", "case": "lower"},
]
REALMS: dict[str, Any] = {"default_realm": "EXAMPLE.TEST", "allowed_realms": ["PARTNER.TEST"]}


def mapper(rules: list[Any] = RULES, **traits: Any) -> IdentityMapper:
    return IdentityMapper(rules=rules, **{**REALMS, "require_unix_user": False, **traits})


async def mapped(name: str, *groups: str, using: IdentityMapper | None = None, **more: Any) -> Identity:
    return await (using or mapper()).map(Caller(name, groups=frozenset(groups)), **more)


async def outcome(name: str, using: IdentityMapper) -> str:
    """`principal unix_user`, or the sentence of the refusal."""
    try:
        found = await mapped(name, using=using)
    except Forbidden as error:
        return error.message
    return f"{found.principal} {found.unix_user}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alice", "alice@EXAMPLE.TEST alice"),
        ("Alice", "alice@EXAMPLE.TEST alice"),
        ("alice@example.com", "alice@EXAMPLE.TEST alice"),
        ("ALICE@example.com", "alice@EXAMPLE.TEST alice"),
        ("bob@partner.example", "bob@PARTNER.TEST p_bob"),
        ("alice.smith", "alice.smith@EXAMPLE.TEST alice.smith"),
        ("_x", "_x@EXAMPLE.TEST _x"),
        ("Bob@partner.example", "Bob@PARTNER.TEST [refused]"),  # case is kept there, and no unix user has capitals
        ("ALICE@EXAMPLE.COM", "No rule"),  # only what matched is folded, not what the pattern is compared with
        ("eve@evil.test", "No rule"),
        ("alice@EXAMPLE.TEST", "No rule"),
        ("alice/admin", "slash"),
        ("hdfs/nn1", "slash"),
        ("../x", "slash"),
        ("root", "system"),
        ("Root", "system"),
        ("ROOT@example.com", "system"),
        ("hdfs", "system"),
        ("krbtgt", "system"),
        ("svc-x", "kept for services"),
        ("", "it is empty"),
        ("root ", "spaces"),
        (" alice", "spaces"),
        ("alice & id", "spaces"),
        ("-u root", "spaces"),
        ("alice\n", "spaces"),
        ("alice\0", "spaces"),
        ("alice\u00a0", "spaces"),
        ("alice\u200b", "spaces"),
        ("alice\u202e", "spaces"),
        ("alice\ufeff", "spaces"),
        ("alice\ud800", "spaces"),
        ("a" * 129, "longer"),
        ("a" * 40, "unix user"),
        ("'#0'", "cannot be a principal"),
        ("#0", "cannot be a principal"),
        ("-u", "cannot be a principal"),
        ("--help", "cannot be a principal"),
        ("$1", "cannot be a principal"),
        ("alice$", "cannot be a principal"),
        ("alice\\x", "cannot be a principal"),
        ("alice+x@example.com", "cannot be a principal"),
        ("a;id", "cannot be a principal"),
        ("`id`", "cannot be a principal"),
        ("1001", "unix user"),
        ("älice", "cannot be a principal"),
        ("\u0430lice", "cannot be a principal"),  # a Cyrillic a
        ("al\u0131ce", "cannot be a principal"),  # a dotless i
        ("\uff41lice", "cannot be a principal"),  # full width: NFKC would make it alice
        ("\ufb01le", "cannot be a principal"),  # a ligature: NFKC would make it file
        ("\u2167", "cannot be a principal"),  # VIII in one letter
        ("\u017fam", "cannot be a principal"),  # a long s, whose upper case is S
        ("\u212aim", "composed"),  # the Kelvin sign, whose lower case is k
        ("a\u0301lice", "composed"),
        ("a@b@example.com", "No rule"),
    ],
)
async def test_names(name: str, expected: str) -> None:
    found = await outcome(name, mapper())
    if expected.endswith("[refused]"):
        assert "unix user" in found
    else:
        assert expected in found
    if " alice" not in expected and "@" not in expected:
        assert found.endswith(".") and "\n" not in found


@given(st.text(max_size=40))
async def test_whatever_the_name_the_result_is_plain(name: str) -> None:
    try:
        found = await mapped(name)
    except Forbidden as error:
        assert error.message.isprintable()
        return
    assert found.unix_user is not None and found.principal is not None
    assert found.principal.count("@") == 1 and not found.principal.endswith("@")
    assert unicodedata.normalize("NFC", name) == name
    assert set(found.unix_user) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")


async def test_upper_case_makes_no_foreign_letter_ours() -> None:
    rules = [{"pattern": "(.*)", "case": "upper", "principal": "$1"}]
    assert (await mapped("sam", using=mapper(rules))).principal == "SAM@EXAMPLE.TEST"
    with pytest.raises(Forbidden):
        await mapped("\u017fam", using=mapper(rules))


async def test_a_case_insensitive_pattern_takes_ascii_only() -> None:
    rules = [{"pattern": "(?i)(sam|kim)", "principal": "sam", "unix_user": "sam"}]
    assert (await mapped("SAM", using=mapper(rules))).unix_user == "sam"
    assert "No rule" in await outcome("\u017fam", mapper(rules))


# Realms


@pytest.mark.parametrize(
    ("principal", "expected"),
    [
        ("$1@OTHER.TEST", "the realm OTHER.TEST is not allowed"),
        ("$1@example.test", "the realm example.test is not allowed"),
        ("$1@", "has no realm"),
        ("$1@EXAMPLE.TEST@PARTNER.TEST", "realm is not a domain"),
        ("$1/admin", "a service's principal"),
        ("host/$1", "a service's principal"),
        ("host", "a system's principal"),
    ],
)
async def test_principals_that_no_rule_can_give(principal: str, expected: str) -> None:
    assert expected in await outcome("alice", mapper([{"pattern": "(.*)", "principal": principal}]))


async def test_without_a_default_realm_a_principal_must_have_one() -> None:
    rules = [{"pattern": "(.*)", "principal": "$1"}]
    assert "has no realm" in await outcome("alice", mapper(rules, default_realm="", allowed_realms=["EXAMPLE.TEST"]))


async def test_auth_to_local_gives_the_unix_user() -> None:
    rule = {"pattern": "(.+)@.*", "principal": "$1@PARTNER.TEST"}
    asked = r"RULE:[1:$1@$0](.*@PARTNER\.TEST)s/@.*//s/^/p_/"
    assert (await mapped("bob@x", using=mapper([{**rule, "auth_to_local": [asked]}]))).unix_user == "p_bob"
    assert "unix user ''" in await outcome("bob@x", mapper([{**rule, "auth_to_local": ["DEFAULT"]}]))


async def test_auth_to_local_never_drops_a_realm() -> None:
    rule = {"pattern": "(.+)@.*", "principal": "$1@PARTNER.TEST", "auth_to_local": ["RULE:[1:$1]"]}
    using = mapper([rule])
    assert "unix user ''" in await outcome("alice@x", using)
    steps = await using.explain("alice@x", ())
    assert "would drop the realm PARTNER.TEST" in " ".join(step.sentence for step in steps)


# Unix users


async def test_unix_users_of_the_system_are_refused() -> None:
    rules = [{"pattern": "(.*)", "unix_user": "$1"}]
    using = mapper(rules, require_unix_user=True, refused_names=[], unix_users=UnixUsers(refused_users=[]))
    for entry in pwd.getpwall():
        if entry.pw_uid < 1000 or entry.pw_uid == 65534:
            assert ", and" in await outcome(entry.pw_name, using)
    assert "There is no unix user 'no-such-user'" in await outcome("no-such-user", using)
    assert (await mapped("no-such-user", using=mapper(rules))).uid is None


async def test_the_gateways_own_account_and_aliases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "me": SimpleNamespace(pw_name="me", pw_uid=os.geteuid() or 4321),
        "alias": SimpleNamespace(pw_name="alice", pw_uid=4322),
        "fine": SimpleNamespace(pw_name="fine", pw_uid=4323),
        "toor": SimpleNamespace(pw_name="toor", pw_uid=0),
    }
    monkeypatch.setattr(pwd, "getpwnam", entries.__getitem__)
    monkeypatch.setattr(os, "geteuid", lambda: entries["me"].pw_uid)
    using = mapper([{"pattern": "(.*)", "unix_user": "$1"}], unix_users=UnixUsers(minimum_uid=1))
    assert "the gateway's own account" in await outcome("me", using)
    assert "a system account" in await outcome("alias", using)
    assert "a system account" in await outcome("toor", using)
    assert (await mapped("fine", using=using)).uid == 4323


async def test_nobody_becomes_the_gateways_user_by_a_gap_in_a_rule() -> None:
    using = mapper([{"name": "hadoop", "pattern": "(.*)", "principal": "$1"}])
    assert (await mapped("alice", using=using, need=IdentityNeed.PROXY_USER)).unix_user is None
    with pytest.raises(Forbidden, match="The rule hadoop gives you no unix user"):
        await mapped("alice", using=using, need=IdentityNeed.UNIX_USER)
    for name in ("alice", "hdfs"):  # by a name that no rule has looked at, nobody acts on a cluster
        with pytest.raises(Forbidden, match="no unix user and no principal"):
            await mapped(name, using=mapper([]), need=IdentityNeed.PROXY_USER)
    foreign = mapper([{"pattern": "(.*)", "principal": "$1@PARTNER.TEST"}])
    with pytest.raises(Forbidden, match=r"no principal of the realm EXAMPLE\.TEST"):
        await mapped("alice", using=foreign, need=IdentityNeed.PROXY_USER)
    only_unix = mapper([{"pattern": "(.*)", "unix_user": "$1"}])
    with pytest.raises(Forbidden, match="no Kerberos principal"):
        await mapped("alice", using=only_unix, need=IdentityNeed.SERVICE_TICKET)


async def test_without_rules_it_is_the_unix_user_of_the_same_name_or_the_gateways() -> None:
    found = await mapped("any body/at all", using=mapper([]), need=IdentityNeed.UNIX_USER)
    assert (found.unix_user, found.principal, found.claimed) == (None, None, ())
    strict = mapper([], unix_users=UnixUsers(impersonate=True))
    for name in ("root", "no-such-user", "Root", "a b", "\u0430lice"):
        with pytest.raises(Forbidden):
            await mapped(name, using=strict)


# Rules


async def test_the_first_rule_that_says_something_decides() -> None:
    using = mapper(
        [
            {
                "name": "table",
                "table": {"alice": {"unix_user": "al", "cost_center": "7"}, "eve": {"refuse": "Closed."}},
            },
            {"name": "analysts", "groups": ["analysts"], "pattern": "(.*)", "unix_user": "a_$1", "shared": True},
            {"name": "rest", "pattern": "(.)(.*)", "unix_user": "$2$1", "cost_center": "common"},
        ]
    )
    first = await mapped("alice", "analysts", using=using)
    assert (first.unix_user, first.rule, first.cost_center, first.shared) == ("al", "table", "7", False)
    assert await outcome("eve", using) == "Closed."
    second = await mapped("bob", "analysts", using=using)
    assert (second.unix_user, second.rule, second.shared) == ("a_bob", "analysts", True)
    third = await mapped("bob", using=using)
    assert (third.unix_user, third.rule, third.cost_center) == ("obb", "rest", "common")


async def test_a_table_is_read_again_when_it_changes_and_fails_closed(tmp_path: Path) -> None:
    path = tmp_path / "identities.yaml"
    using = mapper([{"name": "t", "table": str(path)}, {"pattern": ".*", "unix_user": "guest", "shared": True}])
    broken = "the rule t fails"
    assert broken in await outcome("alice", using)
    for number, (text, expected) in enumerate(
        [
            ("alice: alice@EXAMPLE.TEST\n", "alice@EXAMPLE.TEST None"),
            ("alice: {principal: al@PARTNER.TEST, unix_user: al}\n", "al@PARTNER.TEST al"),
            ("bob: {unix_user: bob}\n", "None guest"),
            ("", "None guest"),
            ("alice: {unix_user: a}\nalice: {unix_user: b}\n", broken),
            ("alice: {unix_user: a, uid: 0}\n", broken),
            ("alice: {shared: true}\n", broken),
            ("alice: {unix_user: 7}\n", broken),
            ("alice: {unix_user: a, shared: yes please}\n", broken),
            ("1001: {unix_user: a}\n", broken),
            ("- alice\n", broken),
            ("alice: !!python/object/apply:os.system [id]\n", broken),
            ("alice: {", broken),
            ("alice: {unix_user: root}\n", "kernels never run as a system's user"),
            ('{"alice": {"unix_user": "al"}}', "None al"),
        ]
    ):
        path.write_text(text)
        os.utime(path, (number, number))
        assert expected in await outcome("alice", using), text
    path.chmod(0o666)
    os.utime(path, (99, 99))
    assert broken in await outcome("alice", using)


def site_hook(name: str, groups: frozenset[str], hints: Mapping[str, str]) -> Any:
    """As an administrator would write it."""
    if name == "boom":
        raise RuntimeError("no directory")
    answers = {"alice": {"unix_user": "al"}, "odd": {"uid": 0}, "text": "t@EXAMPLE.TEST", "list": ["x"], "0": 0}
    return answers.get(name)


@pytest.mark.parametrize("hook", [site_hook, f"{__name__}:site_hook"])
async def test_a_hook_is_a_rule_like_any(hook: Any) -> None:
    using = mapper([{"name": "site", "hook": hook}, {"pattern": "(bob)", "unix_user": "$1"}])
    assert (await mapped("alice", using=using)).unix_user == "al"
    assert (await mapped("text", using=using)).principal == "t@EXAMPLE.TEST"
    assert (await mapped("bob", using=using)).unix_user == "bob"
    for name in ("boom", "odd", "list", "0"):
        assert "the rule site fails" in await outcome(name, using)


async def test_only_listed_keys_of_auth_state_are_seen() -> None:
    asked: list[str] = []

    async def hints_of(name: str) -> Mapping[str, Any]:
        asked.append(name)
        return {"krb": f"{name}@EXAMPLE.TEST", "access_token": "secret", "number": 7}

    seen: list[Mapping[str, str]] = []
    rules = [
        {"name": "spy", "hook": lambda name, groups, hints: seen.append(hints)},
        {"pattern": "(.*)@EXAMPLE\\.TEST", "on": "auth_state.krb", "principal": "$1"},
    ]
    using = mapper(rules, auth_state_keys=["krb", "number"], hints_of=hints_of)
    assert (await mapped("alice", using=using)).principal == "alice@EXAMPLE.TEST"
    assert (asked, seen) == (["alice"], [{"krb": "alice@EXAMPLE.TEST"}])
    assert "No rule" in await outcome("alice", mapper(rules, auth_state_keys=["krb"]))
    with pytest.raises(TraitError, match="auth_state_keys"):
        mapper(rules)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"pattern": "("},
        {"pattern": ".*"},
        {"pattern": ".*", "unix_user": "$1"},
        {"pattern": ".*", "unix_user": "${x}"},
        {"pattern": ".*", "unix_user": "a$"},
        {"pattern": ".*", "unix_user": "x", "case": "title"},
        {"pattern": ".*", "unix_user": "x", "local": "y"},
        {"pattern": ".*", "unix_user": "x", "shared": "no"},
        {"pattern": ".*", "unix_user": "x", "groups": "analysts"},
        {"pattern": ".*", "unix_user": "x", "on": "groups"},
        {"pattern": ".*", "principal": "$0", "unix_user": "x", "auth_to_local": []},
        {"pattern": ".*", "principal": "$0", "auth_to_local": ["RULE"]},
        {"pattern": ".*", "table": {}},
        {"table": {"alice": 7}},
        {"table": {"alice": {}}},
        {"hook": "no-module"},
        {"hook": "no.module:here"},
        {"hook": 7},
    ],
)
def test_a_bad_rule_is_refused_at_the_start(rule: Any) -> None:
    with pytest.raises(TraitError, match=r"Rule .* of IdentityMapper.rules cannot be used: .+\."):
        mapper([rule])


def test_two_rules_of_one_name_are_refused() -> None:
    with pytest.raises(TraitError, match="another rule"):
        mapper([{"name": "a", "pattern": ".*", "refuse": "x"}] * 2)


# Services


async def test_services_launch_only_under_a_mapping() -> None:
    ci = Caller("ci", kind="service")
    for using in (mapper(), mapper([])):
        with pytest.raises(Forbidden, match="The service ci has no mapping"):
            await using.map(ci)
    using = mapper(
        services={"ci": {"principal": "ci/build@EXAMPLE.TEST", "unix_user": "ci"}, "evil": {"unix_user": "root"}}
    )
    found = await using.map(ci)
    assert (found.owner, found.principal, found.unix_user) == ("services/ci", "ci/build@EXAMPLE.TEST", "ci")
    with pytest.raises(Forbidden, match="a system's user"):
        await using.map(Caller("evil", kind="service"))
    # A user of the same name is no service.
    assert (await using.map(Caller("ci"))).owner == "ci"
    with pytest.raises(TraitError, match="services/ci"):
        mapper(services={"ci": {"owner": "alice"}})


async def test_a_service_without_a_unix_user_is_not_the_gateways() -> None:
    for using in (mapper(services={"ci": {}}), mapper([], services={"ci": {}}, unix_users=UnixUsers(impersonate=True))):
        with pytest.raises(Forbidden, match="no unix user"):
            await using.map(Caller("ci", kind="service"), need=IdentityNeed.UNIX_USER)
    found = await mapper([], services={"ci": {}}).map(Caller("ci", kind="service"), need=IdentityNeed.UNIX_USER)
    assert found.unix_user is None


# Cost centres, and what hangs


async def test_the_cost_centre_is_a_groups_property() -> None:
    class People:
        error: Unavailable | None = None

        async def last_known_groups(self) -> Any:
            if self.error:
                raise self.error
            return (GroupInfo("z", properties={"cost_center": 9}), GroupInfo("b", properties={"cost_center": "4711"}))

    people = People()
    using = mapper(people=people)
    assert (await mapped("alice", "b", "z", using=using)).cost_center == "4711"
    assert (await mapped("alice", "z", using=using)).cost_center == "9"
    assert (await mapped("alice", "other", using=using)).cost_center == ""
    people.error = Unavailable("The Hub is away, and nothing is known from before.")
    assert (await mapped("alice", "b", using=using)).cost_center == "", "it is started all the same"


async def test_a_name_service_that_hangs_is_not_waited_for_longer_than_allowed() -> None:
    import threading

    held = threading.Event()
    using = mapper([{"hook": lambda *_: held.wait(20)}], timeout=0.1)
    with pytest.raises(Unavailable, match="The directory of users cannot be asked"):
        await mapped("alice", using=using)
    held.set()


async def test_explain_says_every_step() -> None:
    using = mapper()
    using.proxies = {"local": IdentityNeed.UNIX_USER, "livy": IdentityNeed.USER_TGT}
    steps = await using.explain("bob@partner.example", ["x"])
    assert [(step.stage, step.rule, step.outcome) for step in steps] == [
        ("name", "", "ok"),
        ("rule", "robots", "skipped"),
        ("rule", "company", "skipped"),
        ("rule", "partners", "matched"),
        ("check", "partners", "ok"),
        ("credential", "partners", "skipped"),
        ("credential", "partners", "skipped"),
        ("result", "partners", "ok"),
    ]
    assert steps[-1].sentence == (
        "Kernels of bob@partner.example run as the unix user p_bob and the principal bob@PARTNER.TEST."
    )
    refused = await using.explain("root", [])
    assert (refused[-1].stage, refused[-1].outcome) == ("result", "refused")
    assert (await using.explain("services/ci", []))[-1].outcome == "refused"
