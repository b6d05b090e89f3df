"""auth_to_local means what it means to MIT Kerberos: the same cases are put to its own library."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hub_gateway.identity.auth_to_local import AuthToLocal
from hub_gateway.identity.names import Principal, parse_principal

REALM = "EXAMPLE.TEST"
PARTNER = r"RULE:[1:$1@$0](.*@PARTNER\.TEST)s/@.*//s/^/p_/"

CASES: list[tuple[Sequence[str], str, str | None]] = [
    ([], "alice@EXAMPLE.TEST", "alice"),
    (["DEFAULT"], "Alice@EXAMPLE.TEST", "Alice"),
    (["DEFAULT"], "alice@EVIL.TEST", None),
    (["DEFAULT"], "alice/admin@EXAMPLE.TEST", None),
    (["DEFAULT"], "alice/EXAMPLE.TEST@EXAMPLE.TEST", "alice"),
    ([PARTNER, "DEFAULT"], "bob@PARTNER.TEST", "p_bob"),
    ([PARTNER, "DEFAULT"], "bob@EXAMPLE.TEST", "bob"),
    ([PARTNER, "DEFAULT"], "bob@PARTNERxTEST", None),
    ([PARTNER], "bob@EXAMPLE.TEST", None),
    ([r"RULE:[2:$1;$2](^.*;admin$)s/;admin$//"], "bob/admin@EXAMPLE.TEST", "bob"),
    ([r"RULE:[2:$1;$2](^.*;admin$)s/;admin$//"], "bob/root@EXAMPLE.TEST", None),
    (["RULE:[1:$1@$0](ali)s/@.*//"], "alice@EXAMPLE.TEST", None),  # the whole string must match
    (["RULE:[1:$1]s/a/b/"], "aaa@EXAMPLE.TEST", "baa"),
    (["RULE:[1:$1]s/a/b/g"], "aaa@EXAMPLE.TEST", "bbb"),
    (["RULE:[1:$1]s/^a//g"], "aab@EXAMPLE.TEST", "b"),  # ^ matches again at what is left
    (["RULE:[1:$1]s/a$/x/g"], "aba@EXAMPLE.TEST", "abx"),
    (["RULE:[1:$1]s/a|ab|abc/x/"], "abcd@EXAMPLE.TEST", "xd"),  # the longest alternative, not the first
    (["RULE:[1:$1]s/[[:upper:]]/x/g"], "aBC@EXAMPLE.TEST", "axx"),
    (["RULE:[1:$1]s/[^a-c]//g"], "a1b2@EXAMPLE.TEST", "ab"),
    (["RULE:[1:$1]s/b{2}/-/ s/a/c/"], "abb@EXAMPLE.TEST", "c-"),
    (["RULE:(bob)s/b/r/"], "bob@EVIL.TEST", "rob"),
    (["RULE:"], "bob/x@EVIL.TEST", "bob/x"),
    (["RULE:[1:fixed]"], "bob@EVIL.TEST", "fixed"),
    (["RULE:[1:$1-$0]"], "bob@EXAMPLE.TEST", "bob-EXAMPLE.TEST"),
]


@pytest.mark.parametrize(("rules", "principal", "expected"), CASES)
def test_rules(rules: Sequence[str], principal: str, expected: str | None) -> None:
    found = AuthToLocal(rules, REALM).map(parse_principal(principal))
    assert (found and found.name) == expected


def test_hadoops_lower_case() -> None:
    for rule in ("RULE:[1:$1]/L", "RULE:[1:$1](.*)/L", "RULE:[1:$1@$0](.*)s/@.*///L", "RULE:[1:$1@$0]s/@.*//g/L"):
        found = AuthToLocal([rule], REALM).map(parse_principal("BoB@EXAMPLE.TEST"))
        assert found is not None and found.name == "bob", rule


def test_whether_a_rule_looked_at_the_realm() -> None:
    for rule, seen in (("RULE:[1:$1@$0]s/@.*//", True), ("RULE:[1:$1]", False), ("RULE:", False), ("DEFAULT", True)):
        found = AuthToLocal([rule], REALM).map(parse_principal("bob@EXAMPLE.TEST"))
        assert found is not None and found.realm_seen is seen, rule


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "RULES:[1:$1]",
        "DB:/etc/passwd",
        "RULE:[1:$2]",
        "RULE:[1:$x]",
        "RULE:[0:x]",
        "RULE:[1:$1",
        "RULE:[1:$1](a",
        "RULE:[1:$1](*)",
        "RULE:[1:$1](a++)",
        "RULE:[1:$1]([a)",
        r"RULE:[1:$1](\d)",
        "RULE:[1:$1](?i:a)",
        "RULE:[1:$1]s/a/",
        "RULE:[1:$1]s/a/b/x",
        "RULE:[1:$1]s/a*/b/g",
        "RULE:[1:$1]s/ä/a/",
    ],
)
def test_a_bad_rule_is_refused_when_it_is_read(rule: str) -> None:
    with pytest.raises(ValueError, match=r"auth_to_local|DEFAULT"):
        AuthToLocal([rule], REALM)


# What MIT's library says


class _Mit:
    """`krb5_aname_to_localname` of the library on this machine."""

    def __init__(self, path: str, directory: Path) -> None:
        self.lib = ctypes.CDLL(path)
        self.conf = directory / "krb5.conf"
        self.lib.profile_init_path.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
        pointer = ctypes.c_void_p
        self.lib.krb5_init_context_profile.argtypes = [pointer, ctypes.c_int32, ctypes.POINTER(pointer)]
        self.lib.krb5_parse_name.argtypes = [pointer, ctypes.c_char_p, ctypes.POINTER(pointer)]
        self.lib.krb5_aname_to_localname.argtypes = [pointer, pointer, ctypes.c_int, ctypes.c_char_p]
        for name, arguments in (("krb5_free_principal", 2), ("krb5_free_context", 1), ("profile_release", 1)):
            getattr(self.lib, name).argtypes = [pointer] * arguments
            getattr(self.lib, name).restype = None

    def __call__(self, rules: Sequence[str], principal: str) -> str | None:
        lines = "".join(f"    auth_to_local = {rule}\n" for rule in rules)
        self.conf.write_text(f"[libdefaults]\n  default_realm = {REALM}\n[realms]\n  {REALM} = {{\n{lines}  }}\n")
        profile, context, name = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        assert self.lib.profile_init_path(str(self.conf).encode(), ctypes.byref(profile)) == 0
        assert self.lib.krb5_init_context_profile(profile, 0, ctypes.byref(context)) == 0
        self.lib.profile_release(profile)
        try:
            assert self.lib.krb5_parse_name(context, principal.encode(), ctypes.byref(name)) == 0
            result = ctypes.create_string_buffer(1024)
            code = self.lib.krb5_aname_to_localname(context, name, len(result), result)
            self.lib.krb5_free_principal(context, name)
            return result.value.decode() if code == 0 else None
        finally:
            self.lib.krb5_free_context(context)


@pytest.fixture(scope="module")
def mit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str], str], str | None]:
    path = ctypes.util.find_library("krb5")
    if path is None:
        pytest.skip("MIT's libkrb5 is not installed (Debian: apt-get install libkrb5-3)")
    try:
        return _Mit(path, tmp_path_factory.mktemp("mit"))
    except (OSError, AttributeError) as error:
        pytest.skip(f"libkrb5 is not MIT's: {error}")


@pytest.mark.parametrize(("rules", "principal", "expected"), CASES)
def test_mits_library_says_the_same(
    mit: Callable[[Sequence[str], str], str | None], rules: Sequence[str], principal: str, expected: str | None
) -> None:
    assert mit(rules, principal) == expected


_names = st.text("abAB1.-", min_size=1, max_size=6).filter(lambda text: text[0] not in ".-")
_principals = st.builds(
    lambda components, realm: Principal(tuple(components), realm),
    st.lists(_names, min_size=1, max_size=3),
    st.sampled_from([REALM, "PARTNER.TEST", "A", "B.A"]),
)
_atoms = st.sampled_from(
    ["a", "b", "A", "1", ".", "@", r"\.", "[ab]", "[^a]", "[a-b1]", "[[:upper:]]", "[]a]", "a|ab", "^", "$", "(a|ab)"]
)
_pieces = st.builds(
    lambda atom, times: atom + ("" if atom in "^$" else times), _atoms, st.sampled_from(["", "*", "+", "?", "{1,2}"])
)
_patterns = st.lists(_pieces, min_size=1, max_size=4).map("".join)
_substitutions = st.builds(
    lambda pattern, text, flag: f"s/{pattern}/{text}/{flag}",
    _patterns.filter(lambda text: "/" not in text),
    st.sampled_from(["", "x", "a", "p_"]),
    st.sampled_from(["", "g"]),
)
_rules = st.builds(
    lambda head, match, rest: f"RULE:{head}{match}{''.join(rest)}",
    st.sampled_from(["", "[1:$1]", "[1:$1@$0]", "[2:$1;$2]", "[2:$2$0]", "[3:$3.$1]", "[1:fixed]"]),
    st.one_of(st.just(""), _patterns.filter(lambda text: ")" not in text).map(lambda text: f"({text})")),
    st.lists(_substitutions, max_size=2),
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules=st.lists(st.one_of(_rules, st.just("DEFAULT")), min_size=1, max_size=3), principal=_principals)
def test_mits_library_says_the_same_of_any_rule(
    mit: Callable[[Sequence[str], str], str | None], rules: list[str], principal: Principal
) -> None:
    try:
        ours = AuthToLocal(rules, REALM)
    except ValueError:
        assume(False)
        return
    found = ours.map(principal)
    assert (found and found.name) == mit(rules, str(principal))
