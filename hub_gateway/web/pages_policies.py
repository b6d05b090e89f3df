"""The policies: a list, and an editor that says what a change would do before it is made."""

from __future__ import annotations

from typing import Any

from tornado.web import authenticated

from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, powers
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.errors import BadRequest, Conflict, NotFound
from hub_gateway.quotas.document import NAME, policy_json, policy_of
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.types import Action, Counts, Period, Policy, Resource, SubjectKind, WindowKind
from hub_gateway.web.authority import Authority
from hub_gateway.web.console import ConsoleHandler

__all__ = ["PoliciesHandler", "PolicyHandler"]

DAYS = 30
NEW = "+new"
NUMBERS = ("window_seconds", "burst_seconds", "queue_seconds", "grace_seconds", "priority")
TEXTS = ("subject", "object", "resource", "gpu_model", "counts", "window", "period", "timezone", "action", "note")
MOMENTS = ("valid_from", "valid_until")
AMOUNTS = ("hard", "soft", "burst")
FIELDS = (*TEXTS, *AMOUNTS, *NUMBERS, *MOMENTS)
CHOICES: dict[str, tuple[str, ...]] = {
    "resource": tuple(one.value for one in Resource),
    "counts": tuple(one.value for one in Counts),
    "window": tuple(one.value for one in WindowKind),
    "period": ("", *(one.value for one in Period)),
    "action": tuple(one.value for one in Action),
}


class PoliciesHandler(ConsoleHandler):
    """All policies that one may see."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        readable = await self.authority().may_read()
        found = [policy for policy in await self.quotas.policies() if readable(policy)]
        writes = bool(powers(self.caller, QUOTAS_WRITE))
        documents = {policy.name: policy_json(policy) for policy in found}
        self.page(
            "admin_policies.html", "Policies", "admin/policies", policies=found, documents=documents, writes=writes
        )


class PolicyHandler(ConsoleHandler):
    """One policy, or (`+new`) one to be made."""

    @authenticated
    async def get(self, name: str) -> None:
        self.require(QUOTAS_READ)
        policy = await self._known(self.authority(), name)
        if policy is None and name != NEW:
            raise NotFound(f"There is no policy {name[:100]!r} that you may see.")
        shown = policy or Policy("", SubjectKind.EVERYONE)
        values = {field: _written(policy_json(shown)[field]) for field in FIELDS}
        self._editor(name, values, enabled=shown.enabled, version=shown.version)

    async def post(self, name: str) -> None:
        self.check_form()
        authority = await self.privileged()
        require_scope(self.caller, QUOTAS_WRITE)
        target = self.field("name") if name == NEW else name
        if not NAME.fullmatch(target):
            raise BadRequest(
                "The name of a policy has letters, digits and the signs `.`, `_`, `@`, `-`, and begins with a letter "
                "or a digit."
            )
        before = await self._known(authority, target)
        if before is not None:
            await authority.check_policy(before)
        if self.field("do") == "delete":
            await self.quotas.delete(target, self.caller.name)
            self.done("admin/policies", f"The policy {target} is deleted.")
            return
        values = {field: self.field(field) for field in FIELDS}
        enabled, version = self.field("enabled") == "on", int(self.field("version") or 0)
        try:
            wanted = policy_of(target, Body(_document(values, enabled), (*FIELDS, "enabled")), version=version)
            await authority.check_policy(wanted)
            result = await self.quotas.put(wanted, self.caller.name, dry_run=self.field("do") == "preview")
        except (BadRequest, Conflict) as error:
            # What was typed stays, beside the reason.
            self.set_status(error.status)
            self._editor(name, values, enabled=enabled, version=version, sentence=error.message, target=target)
            return
        if self.field("do") == "preview":
            others = [policy for policy in await self.quotas.policies() if policy.name != target]
            simulated = await self.quotas.simulate([*others, wanted], DAYS)
            self._editor(
                name,
                values,
                enabled=enabled,
                version=version,
                problems=result.problems,
                simulated=simulated,
                target=target,
            )
            return
        self.done("admin/policies", f"The policy {target} is set.")

    async def _known(self, authority: Authority, name: str) -> Policy | None:
        policy = await self.quotas.policy(name) if NAME.fullmatch(name) else None
        if policy is None:
            return None
        if not (await authority.may_read())(policy):
            raise NotFound(f"There is no policy {name[:100]!r} that you may see.")
        return policy

    def _editor(
        self,
        name: str,
        values: dict[str, str],
        *,
        enabled: bool,
        version: int,
        sentence: str = "",
        problems: Any = (),
        simulated: Any = None,
        target: str = "",
    ) -> None:
        self.page(
            "admin_policy.html",
            "New policy" if name == NEW else f"Policy {name}",
            "admin/policies",
            name=name,
            target=target,
            values=values,
            enabled=enabled,
            version=version,
            sentence=sentence,
            problems=problems,
            simulated=simulated,
            choices=CHOICES,
            new=name == NEW,
            writes=bool(powers(self.caller, QUOTAS_WRITE)),
        )


def _written(value: Any) -> str:
    """A value of a policy as its field shows it."""
    if value is None:
        return ""
    # Whole numbers of any size without an exponent: they are read again.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _document(values: dict[str, str], enabled: bool) -> dict[str, Any]:
    """The fields of a form as a policy's document. Raises `BadRequest`."""
    found: dict[str, Any] = {name: value for name, value in values.items() if value}
    for name in NUMBERS:
        if name in found:
            try:
                found[name] = int(found[name])
            except ValueError as error:
                raise BadRequest(f"{name} must be a whole number.") from error
    return {**found, "enabled": enabled}
