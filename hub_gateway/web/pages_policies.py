"""The policies: a list, and an editor that says what a change would do before it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tornado.web import authenticated

from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, powers
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, Conflict, Forbidden, GatewayError, NotFound
from hub_gateway.quotas import sentences
from hub_gateway.quotas.document import NAME, policy_json
from hub_gateway.quotas.resolve import active, applicable, concerns, losers, name_of
from hub_gateway.quotas.types import Demand, ObjectKind, Policy, SubjectKind
from hub_gateway.web.authority import Authority, kind_of
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.plain import plain
from hub_gateway.web.policyform import CHOICES, DAYS, LABELS, Typed, Week, changes, field_of, read, typed, wanted
from hub_gateway.web.quota import within_reach

__all__ = ["PoliciesHandler", "PolicyHandler"]

SIMULATED_DAYS = 30
MAX_DAYS = 366
NEW = "+new"
PAGE = 100


@dataclass(frozen=True)
class Preview:
    """What a policy would do, before it is set."""

    changes: list[tuple[str, str, str]]
    problems: Any
    simulated: dict[str, Any]
    user: str = ""
    applies: list[tuple[Policy, bool, str]] | None = None
    """For that user: each policy about the same, whether it would count, and why not."""


class PoliciesHandler(ConsoleHandler):
    """All policies that one may see."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        readable = await self.authority().may_read()
        asked = self.chosen({"q": "", "after": ""})
        text = asked["q"].lower()
        documents = {policy.name: policy_json(policy) for policy in await self.quotas.policies() if readable(policy)}
        found = [
            policy
            for policy in sorted(await self.quotas.policies(), key=lambda one: one.name)
            if policy.name in documents and text in f"{policy.name}\0{documents[policy.name]['subject']}".lower()
        ]
        rest = [policy for policy in found if policy.name > asked["after"]]
        whole = powers(self.caller, QUOTAS_READ).everything
        self.page(
            "admin_policies.html",
            "Policies",
            "admin/policies",
            policies=rest[:PAGE],
            total=len(found),
            following=rest[PAGE - 1].name if len(rest) > PAGE else "",
            asked=asked,
            documents=documents,
            active=active,
            window=sentences.window,
            whole=whole,
            writes=bool(powers(self.caller, QUOTAS_WRITE)),
        )


class PolicyHandler(ConsoleHandler):
    """One policy, or (`+new`) one to be made."""

    @authenticated
    async def get(self, name: str) -> None:
        self.require(QUOTAS_READ)
        policy = await self._seen(self.authority(), name)
        if policy is None and name != NEW:
            raise no_policy(name)
        form = typed(policy or Policy("", SubjectKind.EVERYONE))
        if policy is None:
            subject = self.get_query_argument("subject", "")[:300]
            form = replace(form, values={**form.values, "subject": subject or form.values["subject"]})
        self._editor(name, form, before=policy)

    async def post(self, name: str) -> None:
        self.check_form()
        authority = await self.privileged()
        require_scope(self.caller, QUOTAS_WRITE)
        target = self.field("name") if name == NEW else name
        doing, form = self.field("do"), read(self.field)
        before: Policy | None = None
        try:
            before = await self._changeable(authority, name, target)
            if doing == "delete":
                await self._delete(before, target)
                return
            if doing == "more":
                self._editor(name, replace(form, weeks=(*form.weeks, Week())), target=target, before=before)
                return
            policy = authority.authored(wanted(target, form, before, self.caller.name))
            await authority.check_policy(policy)
            if doing == "preview":
                preview = await self._preview(authority, policy, before)
                self._editor(name, form, target=target, before=before, preview=preview)
                return
            await self.quotas.put(policy, self.caller.name)
        except (BadRequest, Conflict, Forbidden) as error:
            # What was typed stays, beside the reason.
            self.set_status(error.status)
            self._editor(name, form, target=target, before=before, error=error)
            return
        self.done("admin/policies", f"The policy {target} is set.")

    async def _changeable(self, authority: Authority, name: str, target: str) -> Policy | None:
        """The policy of that name as it is, where who asks may change it. Raises what is to be told."""
        if not NAME.fullmatch(target):
            raise BadRequest(
                "The name of a policy has at most 100 letters, digits and the signs `.`, `_`, `@`, `-`, and begins "
                "with a letter or a digit."
            )
        policy = await self.quotas.policy(target)
        if policy is None:
            return None
        if not (await authority.may_read())(policy):
            if name != NEW:
                raise no_policy(name)
            raise Conflict(f"The name {target} is taken; choose another one.")
        await authority.check_policy(policy)
        return policy

    async def _delete(self, before: Policy | None, target: str) -> None:
        if before is None:
            raise no_policy(target)
        if self.field("confirm") != "yes":
            raise BadRequest(f"The policy {target} is deleted when you tick that you are sure; nothing was changed.")
        if self.field("version") != str(before.version):
            raise Conflict(
                f"The policy {target} was changed by {before.updated_by} meanwhile, and is not deleted; open the page "
                "again."
            )
        await self.quotas.delete(target, self.caller.name)
        self.done("admin/policies", f"The policy {target} is deleted.")

    async def _preview(self, authority: Authority, policy: Policy, before: Policy | None) -> Preview:
        result = await self.quotas.put(policy, self.caller.name, dry_run=True)
        text = self.field("days") or str(SIMULATED_DAYS)
        if not text.isdecimal() or not 1 <= int(text[:6]) <= MAX_DAYS:
            raise BadRequest(f"Launches are simulated for 1 to {MAX_DAYS} days; {text[:40]!r} is no such number.")
        others = [one for one in await self.quotas.policies() if one.name != policy.name]
        simulated: Any = plain(await self.quotas.simulate([*others, policy], int(text)))
        if not authority.unlimited(QUOTAS_WRITE):
            simulated = await within_reach(authority, simulated)
        user, applies = self.field("explain"), None
        if user:
            person = await authority.person(QUOTAS_READ, user)
            readable = await authority.may_read()
            applies = beside(policy, [one for one in others if readable(one)], person.name, person.groups)
        return Preview(changes(before, policy), result.problems, simulated, user, applies)

    async def _seen(self, authority: Authority, name: str) -> Policy | None:
        policy = await self.quotas.policy(name) if NAME.fullmatch(name) else None
        if policy is not None and not (await authority.may_read())(policy):
            raise no_policy(name)
        return policy

    def _editor(
        self,
        name: str,
        form: Typed,
        *,
        target: str = "",
        before: Policy | None = None,
        error: GatewayError | None = None,
        preview: Preview | None = None,
    ) -> None:
        where, sentence = ("", "") if error is None else field_of(error.message)
        self.page(
            "admin_policy.html",
            "New policy" if name == NEW else f"Policy {name}",
            "admin/policies",
            name=name,
            target=target,
            form=form,
            weeks=form.weeks if form.weeks and not form.weeks[-1] else (*form.weeks, Week()),
            before=before,
            where=where,
            sentence=sentence,
            preview=preview,
            choices=CHOICES,
            labels=LABELS,
            days=DAYS,
            asked={"days": self.field("days") or str(SIMULATED_DAYS), "explain": self.field("explain")},
            new=name == NEW,
            whole=powers(self.caller, QUOTAS_WRITE).everything,
            writes=bool(powers(self.caller, QUOTAS_WRITE)),
        )


def no_policy(name: str) -> NotFound:
    """The answer for a policy that does not exist, or that the visitor may not see."""
    return NotFound(f"There is no policy {name[:100]!r} that you may see.")


def beside(
    policy: Policy, others: list[Policy], user: str, groups: frozenset[str]
) -> list[tuple[Policy, bool, str]] | None:
    """Which policies would count for a user's launch that the policy is about, and why not the others.

    None where the policy is not about that user.
    """
    kind, now = policy.object_kind, utcnow()
    objects = {one: policy.object if one is kind else "" for one in ObjectKind}
    demand = Demand(
        user,
        kind_of(user),
        groups,
        objects[ObjectKind.KERNELSPEC],
        objects[ObjectKind.PROXY],
        objects[ObjectKind.QUEUE],
    )
    if not concerns(policy, demand):
        return None
    about = [one for one in (policy, *others) if concerns(one, demand) and one.resource is policy.resource]
    why_not = losers(about, demand, now)
    counting = {one.name for one in applicable(about, demand, now)}
    return [
        (one, one.name in counting, "" if one.name in counting else why_not.get(one.name, ""))
        for one in sorted(about, key=lambda one: (one.name not in counting, name_of(one.name)))
    ]
