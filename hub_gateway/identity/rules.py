"""The ordered rules by which a Hub user becomes a principal and a unix user, read from configuration.

A rule says what it makes of a user, that it refuses them, or nothing; the first one that says something decides.
What it makes is only a proposal, which `hub_gateway.identity.mapper` checks.
"""

from __future__ import annotations

import abc
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hub_gateway.identity.auth_to_local import AuthToLocal
from hub_gateway.identity.names import lower, parse_principal, upper
from hub_gateway.identity.table import Entry, Table, read_entries

__all__ = ["Proposal", "Rule", "RuleBroken", "Subject", "read_rules"]

_COMMON = {"name", "groups", "shared", "cost_center"}
_PATTERN = {"pattern", "on", "case", "principal", "unix_user", "auth_to_local", "refuse"}
_VARIABLE = re.compile(r"\$(?:(\$)|([0-9])|\{([A-Za-z_][A-Za-z0-9_]*)\}|(.?))")
_CASES: dict[str, Callable[[str], str]] = {"keep": str, "lower": lower, "upper": upper}
_HINT = "auth_state."


class RuleBroken(Exception):
    """A rule cannot be asked (its file or its hook fails); nobody is let through to the next one."""


@dataclass(frozen=True)
class Subject:
    """Whom the rules are asked about: what the Hub says of them. `hints` are keys of auth_state that may be used."""

    name: str
    groups: frozenset[str] = frozenset()
    hints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """What a rule makes of a subject. `refuse` is not empty where it refuses them."""

    principal: str | None = None
    unix_user: str | None = None
    cost_center: str = ""
    shared: bool = False
    refuse: str = ""
    note: str = ""
    """How it came about, for `explain`."""


class Rule(abc.ABC):
    """One rule. `propose` may block."""

    def __init__(self, config: Mapping[str, Any], number: int) -> None:
        self.name = _text(config, "name", f"rule-{number}")
        self.groups = _texts(config, "groups")
        self.shared = config.get("shared", False)
        if not isinstance(self.shared, bool):
            raise ValueError("`shared` must be True or False")
        self.cost_center = _text(config, "cost_center", "")

    def applies(self, subject: Subject) -> str:
        """Why the rule is not about this subject; empty where it is."""
        if self.groups and not self.groups & subject.groups:
            return f"it is for the groups {', '.join(sorted(self.groups))}"
        return ""

    @abc.abstractmethod
    def propose(self, subject: Subject) -> Proposal | str:
        """What it makes of a subject, or why it says nothing. Raises `RuleBroken`."""


class TableRule(Rule):
    """An explicit table, in a file or in the configuration itself."""

    def __init__(self, config: Mapping[str, Any], number: int) -> None:
        super().__init__(config, number)
        source = config["table"]
        self._file = Table(source) if isinstance(source, str) and source else None
        self._entries = {} if self._file else read_entries(source)

    def propose(self, subject: Subject) -> Proposal | str:
        try:
            entries = self._entries if self._file is None else self._file.entries()
        except ValueError as error:
            raise RuleBroken(f"{self._file.path if self._file else 'the table'}: {error}") from error
        found: Entry | None = entries.get(subject.name)
        if found is None:
            return "the table has no entry for this name"
        return Proposal(
            found.principal,
            found.unix_user,
            found.cost_center or self.cost_center,
            found.shared or self.shared,
            found.refuse,
            "the table's entry",
        )


class PatternRule(Rule):
    """A regular expression that must match the whole name, and what is made of its groups."""

    def __init__(self, config: Mapping[str, Any], number: int, default_realm: str, hints: Sequence[str]) -> None:
        super().__init__(config, number)
        try:
            # ASCII: \w and case-insensitive matching must not take a foreign letter for one of ours.
            self._pattern = re.compile(_text(config, "pattern", ".*"), re.ASCII)
        except re.error as error:
            raise ValueError(f"`pattern` is no regular expression: {error}") from error
        self._on = _text(config, "on", "name")
        if self._on != "name" and not (self._on.startswith(_HINT) and self._on.removeprefix(_HINT) in hints):
            raise ValueError(f"`on` must be name, or {_HINT}KEY with a KEY that IdentityMapper.auth_state_keys lists")
        case = _text(config, "case", "keep")
        if case not in _CASES:
            raise ValueError(f"`case` must be one of {', '.join(_CASES)}")
        self._case = _CASES[case]
        self._principal = self._template(config, "principal")
        self._unix_user = self._template(config, "unix_user")
        self._refuse = _text(config, "refuse", "")
        self._default_realm = default_realm
        local = config.get("auth_to_local")
        self._to_local: AuthToLocal | None = None
        if local is not None:
            if self._principal is None or self._unix_user is not None:
                raise ValueError(
                    "`auth_to_local` makes a unix user of `principal`, so it stands in place of `unix_user`"
                )
            self._to_local = AuthToLocal(_texts_in_order(config, "auth_to_local"), default_realm)
        if not self._refuse and self._principal is None and self._unix_user is None:
            raise ValueError("it must have `principal`, `unix_user` or `refuse`")

    def _template(self, config: Mapping[str, Any], key: str) -> str | None:
        if config.get(key) is None:
            return None
        text = _text(config, key, "")
        for dollar, number, name, _ in _VARIABLE.findall(text):
            if (number and int(number) > self._pattern.groups) or (name and name not in self._pattern.groupindex):
                raise ValueError(f"`{key}` uses ${number or name}, which `pattern` has no group for")
            if not (dollar or number or name):
                raise ValueError(f"`{key}` has a $ without a group; write $$ for the sign itself")
        return text

    def propose(self, subject: Subject) -> Proposal | str:
        if self._on == "name":
            text: str | None = subject.name
        else:
            text = subject.hints.get(self._on.removeprefix(_HINT))
            if text is None:
                return f"the Hub told no {self._on}"
        assert text is not None
        found = self._pattern.fullmatch(text)
        if found is None:
            return f"{'the name' if self._on == 'name' else self._on} does not match {self._pattern.pattern}"
        note = f"{'the name' if self._on == 'name' else self._on} matches {self._pattern.pattern}"
        if self._refuse:
            return Proposal(refuse=self._refuse, note=note)
        principal, unix_user = self._filled(self._principal, found), self._filled(self._unix_user, found)
        if self._to_local is not None and principal is not None:
            unix_user, how = self._local(self._to_local, principal)
            note = f"{note}, then {how}"
        return Proposal(principal, unix_user, self.cost_center, self.shared, note=note)

    def _filled(self, template: str | None, found: re.Match[str]) -> str | None:
        if template is None:
            return None

        def value(variable: re.Match[str]) -> str:
            dollar, number, name, _ = variable.groups()
            return dollar or self._case(found[int(number) if number else name] or "")

        return _VARIABLE.sub(value, template)

    def _local(self, rules: AuthToLocal, text: str) -> tuple[str, str]:
        try:
            principal = parse_principal(text, self._default_realm)
        except ValueError:
            return "", "auth_to_local was not asked, for what came out is no principal"
        found = rules.map(principal)
        if found is None:
            return "", f"no rule of auth_to_local maps {principal}"
        if not found.realm_seen and principal.realm != self._default_realm:
            return "", f"auth_to_local's {found.rule} would drop the realm {principal.realm}"
        return found.name, f"auth_to_local's {found.rule}"


class HookRule(Rule):
    """A function of the administrator's own: `hook(name, groups, hints) -> {...} | None`, as an entry of a table."""

    def __init__(self, config: Mapping[str, Any], number: int) -> None:
        super().__init__(config, number)
        hook = config["hook"]
        self._name = hook if isinstance(hook, str) else getattr(hook, "__qualname__", repr(hook))
        self._hook: Callable[..., Any] = _imported(hook) if isinstance(hook, str) else hook
        if not callable(self._hook):
            raise ValueError("`hook` must be a function, or `package.module:function`")

    def propose(self, subject: Subject) -> Proposal | str:
        try:
            found = self._hook(subject.name, subject.groups, dict(subject.hints))
            entry = None if found is None else read_entries({subject.name: found})[subject.name]
        except Exception as error:  # it is somebody else's code; whatever it raises, nobody is mapped
            raise RuleBroken(f"{self._name}: {type(error).__name__}: {error}") from error
        if entry is None:
            return f"{self._name} says nothing of this name"
        return Proposal(
            entry.principal,
            entry.unix_user,
            entry.cost_center or self.cost_center,
            entry.shared or self.shared,
            entry.refuse,
            f"{self._name} says so",
        )


def read_rules(config: Sequence[Any], *, default_realm: str = "", hints: Sequence[str] = ()) -> tuple[Rule, ...]:
    """The rules of a configuration. Raises `ValueError` with a sentence that names the rule."""
    made: list[Rule] = []
    for number, one in enumerate(config, 1):
        try:
            if not isinstance(one, Mapping):
                raise ValueError("it must be a dict")
            made.append(_rule(one, number, default_realm, hints))
            if made[-1].name in {rule.name for rule in made[:-1]}:
                raise ValueError("another rule has this name already")
        except ValueError as error:
            name = one.get("name", number) if isinstance(one, Mapping) else number
            raise ValueError(f"Rule {name} of IdentityMapper.rules cannot be used: {error}.") from error
    return tuple(made)


def _rule(config: Mapping[str, Any], number: int, default_realm: str, hints: Sequence[str]) -> Rule:
    kinds = [kind for kind in ("table", "hook", "pattern") if kind in config]
    kind = kinds[0] if kinds else "pattern"
    known: dict[str, set[str]] = {"table": {"table"}, "hook": {"hook"}, "pattern": _PATTERN}
    if len(kinds) > 1:
        raise ValueError(f"it must have only one of {', '.join(kinds)}")
    if odd := set(config) - _COMMON - known[kind]:
        raise ValueError(f"a rule with a {kind} has no {', '.join(sorted(map(str, odd)))}")
    if kind == "table":
        return TableRule(config, number)
    if kind == "hook":
        return HookRule(config, number)
    return PatternRule(config, number, default_realm, hints)


def _text(config: Mapping[str, Any], key: str, default: str) -> str:
    value = config.get(key, default)
    if not isinstance(value, str) or (key in config and not value):
        raise ValueError(f"`{key}` must be a text, and not empty")
    return value


def _texts_in_order(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key, [])
    if isinstance(value, str) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"`{key}` must be a list of texts")
    return list(value)


def _texts(config: Mapping[str, Any], key: str) -> frozenset[str]:
    return frozenset(_texts_in_order(config, key))


def _imported(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError("`hook` must be written `package.module:function`")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`hook` cannot be imported: {error}") from error
