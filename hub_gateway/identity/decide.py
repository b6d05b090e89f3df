"""One mapping, step by step: the name, the rules, and the checks that no rule can turn off. May block (NSS, files)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hub_gateway.errors import Forbidden
from hub_gateway.identity.names import Principal, hub_name_problem, lower, parse_principal, shown, unix_name_problem
from hub_gateway.identity.rules import Proposal, Rule, RuleBroken, Subject
from hub_gateway.identity.types import Identity, Step
from hub_gateway.identity.unix import UnixUsers
from hub_gateway.proxies.base import IdentityNeed

__all__ = ["SERVICES", "Decider", "Decision"]

SERVICES = "services/"
ASK = "ask the administrator of the gateway"
OWN_USER, SAME_NAME = "gateway-user", "same-name"


@dataclass(frozen=True)
class Decision:
    """An identity, or a refusal: a sentence for the user, and a hint for the operator."""

    steps: tuple[Step, ...] = ()
    rule: str = ""
    identity: Identity | None = None
    refusal: str = ""
    hint: str = ""


class _Refused(Exception):
    def __init__(self, sentence: str, hint: str = "", rule: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint
        self.rule = rule


@dataclass(frozen=True)
class Decider:
    """The mapping as it is configured now. `refused` is in lower case."""

    rules: tuple[Rule, ...]
    services: Mapping[str, Mapping[str, Any]]
    unix_users: UnixUsers
    realms: frozenset[str]
    default_realm: str
    refused: frozenset[str]
    own_principals: frozenset[str]
    require_unix_user: bool

    def decide(self, subject: Subject, service: bool) -> Decision:
        """The decision about a user or a service, with every step to it."""
        steps: list[Step] = []
        rule = ""
        try:
            if not service and not self.rules:
                return self._without_rules(subject, steps)
            if problem := hub_name_problem(subject.name):
                name = shown(subject.name)
                sentence = f"The Hub's name {name} cannot be mapped to anybody, because {problem}; {ASK}."
                steps.append(Step("name", "", "refused", sentence))
                raise _Refused(sentence)
            steps.append(Step("name", "", "ok", f"The name {shown(subject.name)} is well-formed."))
            if service:
                rule, proposal = self._service(subject)
                steps.append(Step("rule", rule, "matched", proposal.note))
            else:
                rule, proposal = self._by_rules(subject, steps)
            identity = self._checked(subject, service, rule, proposal)
            steps.append(Step("check", rule, "ok", "The result passes every check."))
            return Decision(tuple(steps), rule, identity)
        except _Refused as error:
            if not steps or steps[-1].outcome != "refused":
                steps.append(Step("check", rule, "refused", error.sentence))
            return Decision(tuple(steps), error.rule or rule, None, error.sentence, error.hint)

    def suit(self, decision: Decision, need: IdentityNeed) -> Decision:
        """The decision for a proxy with that need: an identity that lacks what it takes is refused."""
        identity = decision.identity
        assert identity is not None
        mapped = bool(self.rules) or self.unix_users.impersonate
        lacks = ""
        # As the gateway's own user, a kernel could read everybody's secrets: nobody gets there by a gap in a rule.
        if need is IdentityNeed.UNIX_USER and mapped and identity.unix_user is None:
            lacks = "unix user"
        elif need in (IdentityNeed.SERVICE_TICKET, IdentityNeed.USER_TGT) and identity.principal is None:
            lacks = "Kerberos principal"
        elif need is IdentityNeed.PROXY_USER and identity.unix_user is None and not self._short(identity):
            lacks = f"unix user and no principal of the realm {self.default_realm}"
        if not lacks:
            return decision
        sentence = f"The rule {identity.rule} gives you no {lacks}, which kernels of this kind need; {ASK}."
        return replace(decision, identity=None, refusal=sentence)

    def _short(self, identity: Identity) -> bool:
        """Whether the principal's first component alone says who it is."""
        principal = identity.principal or ""
        return bool(self.default_realm) and principal.endswith(f"@{self.default_realm}") and "/" not in principal

    def _service(self, subject: Subject) -> tuple[str, Proposal]:
        found = self.services.get(subject.name)
        if found is None:
            raise _Refused(
                f"The service {subject.name} has no mapping, and services launch kernels only under one; {ASK}.",
                "add it to IdentityMapper.services",
            )
        return SERVICES + subject.name, Proposal(
            found.get("principal"),
            found.get("unix_user"),
            found.get("cost_center", ""),
            found.get("shared", False),
            note="IdentityMapper.services has the service.",
        )

    def _by_rules(self, subject: Subject, steps: list[Step]) -> tuple[str, Proposal]:
        for rule in self.rules:
            why_not = rule.applies(subject)
            if why_not:
                steps.append(Step("rule", rule.name, "skipped", f"Not applied: {why_not}."))
                continue
            try:
                found = rule.propose(subject)
            except RuleBroken as error:
                sentence = (
                    f"As whom your kernels may run cannot be told now, because the rule {rule.name} fails; {ASK}."
                )
                steps.append(Step("rule", rule.name, "refused", sentence))
                raise _Refused(sentence, str(error), rule.name) from error
            if isinstance(found, str):
                steps.append(Step("rule", rule.name, "skipped", f"Not applied: {found}."))
            elif found.refuse:
                steps.append(Step("rule", rule.name, "refused", f"Refused, for {found.note}."))
                raise _Refused(found.refuse, f"by the rule {rule.name}", rule.name)
            else:
                steps.append(Step("rule", rule.name, "matched", f"Applied, for {found.note}."))
                return rule.name, found
        raise _Refused(f"No rule says as whom kernels of {shown(subject.name)} run, so none is started; {ASK}.")

    def _without_rules(self, subject: Subject, steps: list[Step]) -> Decision:
        rule = SAME_NAME if self.unix_users.impersonate else OWN_USER
        name, groups = subject.name, tuple(sorted(subject.groups))
        if rule == OWN_USER:
            text = "There are no rules, and kernels run as the gateway's own user (UnixUsers.impersonate is off)."
            steps.append(Step("rule", rule, "matched", text))
            return Decision(tuple(steps), rule, Identity(name, name, rule, groups=groups))
        text = "There are no rules, and kernels run as the unix user of their owner's name (UnixUsers.impersonate)."
        steps.append(Step("rule", rule, "matched", text))
        try:
            uid = self.unix_users.uid(name)
        except Forbidden as error:
            raise _Refused(error.message) from error
        return Decision(tuple(steps), rule, Identity(name, name, rule, unix_user=name, uid=uid, groups=groups))

    # What no rule can turn off

    def _checked(self, subject: Subject, service: bool, rule: str, found: Proposal) -> Identity:
        owner = SERVICES + subject.name if service else subject.name
        principal = None if found.principal is None else self._principal(found.principal, service, rule)
        uid = None if found.unix_user is None else self._uid(found.unix_user, rule)
        if principal is None and found.unix_user is None and not service:
            raise _Refused(f"The rule {rule} names nobody as whom your kernels could run; {ASK}.")
        return Identity(
            hub_user=subject.name,
            owner=owner,
            rule=rule,
            principal=None if principal is None else str(principal),
            unix_user=found.unix_user,
            uid=uid,
            cost_center=found.cost_center[:255],
            shared=found.shared,
            groups=tuple(sorted(subject.groups)),
        )

    def _principal(self, text: str, service: bool, rule: str) -> Principal:
        try:
            made = parse_principal(text, self.default_realm)
        except ValueError as error:
            raise _Refused(
                f"The rule {rule} maps you to {shown(text)}, which cannot be a principal, because {error}; {ASK}."
            ) from error
        if made.realm not in self.realms:
            raise _Refused(
                f"The rule {rule} maps you to {made}, and the realm {made.realm} is not allowed here; {ASK}.",
                "see IdentityMapper.allowed_realms",
            )
        if len(made.components) > 1 and not service:
            raise _Refused(f"The rule {rule} maps you to {made}, which is a service's principal; {ASK}.")
        if lower(made.primary) in self.refused or made.key in self.own_principals:
            raise _Refused(f"The rule {rule} maps you to {made}, and kernels never run as a system's principal; {ASK}.")
        return made

    def _uid(self, name: str, rule: str) -> int | None:
        if problem := unix_name_problem(name):
            raise _Refused(f"The rule {rule} maps you to the unix user {shown(name)}, and {problem}; {ASK}.")
        if lower(name) in self.refused:
            raise _Refused(f"The rule {rule} maps you to {name}, and kernels never run as a system's user; {ASK}.")
        try:
            return self.unix_users.uid(name, required=self.require_unix_user)
        except Forbidden as error:
            raise _Refused(error.message, f"by the rule {rule}") from error
