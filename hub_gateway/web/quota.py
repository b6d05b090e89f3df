"""/api/quota/...: policies, what they do, and what they would do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, require
from hub_gateway.errors import BadRequest, Conflict, Forbidden, NotFound
from hub_gateway.quotas.document import NAME, POLICY_FIELDS, policy_json, policy_of, subject_of
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.grants import GRANT_PRIORITY
from hub_gateway.quotas.types import Origin, Policy, SubjectKind
from hub_gateway.web.authority import Authority, kind_of
from hub_gateway.web.plain import plain
from hub_gateway.web.tenancy import TenancyHandler, cursor, read_cursor

__all__ = [
    "ApplyHandler",
    "DiffHandler",
    "ExplainHandler",
    "ExportHandler",
    "PoliciesHandler",
    "PolicyHandler",
    "PreviewHandler",
    "SimulateHandler",
]

MAX_DOCUMENT = 1_000_000
MAX_DAYS = 366
_ETAG = re.compile(r'(?:W/)?"([0-9]{1,9})"')


def no_policy(name: str) -> NotFound:
    """The answer for a policy that does not exist, or that the caller may not see."""
    return NotFound(f"There is no policy {name[:100]!r} that you may see.")


class _PolicyHandler(TenancyHandler):
    """What the handlers of one policy share."""

    async def known(self, authority: Authority, name: str) -> Policy | None:
        """The policy of that name, whoever may see it."""
        authority.require(QUOTAS_READ)
        return await self.quotas.policy(name) if NAME.fullmatch(name) else None

    async def seen(self, authority: Authority, name: str) -> Policy:
        """The policy of that name. Raises `NotFound` also where the caller may not see it."""
        policy = await self.known(authority, name)
        if policy is None or not (await authority.may_read())(policy):
            raise no_policy(name)
        return policy

    def expected(self, given: int | None = None) -> int | None:
        """The version that the caller has seen: by If-Match, or the field `version`; None where neither is there."""
        header = self.request.headers.get("If-Match")
        if header is None:
            return given
        found = _ETAG.fullmatch(header.strip())
        if found is None or (given is not None and given != int(found[1])):
            raise Conflict("`If-Match` is not the ETag that this policy was read with; read it again.")
        return int(found[1])

    def wanted(self, name: str, body: Body, before: Policy | None) -> Policy:
        """The policy that the body asks for, as the caller's. Raises `BadRequest`, `Conflict`.

        Two administrators do not overwrite each other: a policy that exists is only replaced by who says which
        version of it they have seen, and one that does not exist by who expects none (`version` missing or 0).
        """
        given = body.found.get("version")
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < 10**9):
            raise BadRequest("The field `version` must be a whole number: the one that the policy was read with.")
        version = self.expected(given)
        if before is None and version:
            raise Conflict(f"The policy {name} does not exist any more; leave `version` out to make it anew.")
        if before is not None and version != before.version:
            raise Conflict(
                f"The policy {name} exists, and was last changed by {before.updated_by or 'somebody'} (version "
                f"{before.version}); read it, and send its `version` with your change."
            )
        return policy_of(name, body, version=version or 0)

    async def permitted(self, authority: Authority, wanted: Policy, before: Policy | None) -> Policy:
        """The wanted policy, where the caller may set it: over what it is now, and as it is to be."""
        if before is not None:
            if not (await authority.may_read())(before):
                raise Conflict(f"The name {wanted.name} is taken; choose another one.")
            await authority.check_policy(before)
        await authority.check_policy(wanted)
        return wanted

    def answer(self, policy: Policy, status: int = 200, **more: Any) -> None:
        """The policy, with its version as the ETag."""
        self.set_header("ETag", f'"{policy.version}"')
        self.write_json({**policy_json(policy), **more}, status)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise BadRequest(
            "The name of a policy has at most 100 letters, digits and the signs `.`, `_`, `@` and `-`, and begins with "
            "a letter or a digit."
        )


def grant_of(policy: Policy, body: Body, authority: Authority) -> Policy:
    """A grant, with its approver and the priority that makes it win; other policies as they are."""
    if policy.origin is not Origin.GRANT:
        return policy
    priority = GRANT_PRIORITY if body.found.get("priority") is None else policy.priority
    return replace(policy, approver=authority.caller.name, priority=priority)


class PoliciesHandler(TenancyHandler):
    """All policies that the caller may see."""

    async def get(self) -> None:
        query = self.query("subject", "q", "after", "limit")
        authority = self.authority()
        readable = await authority.may_read()
        subject, text = query.text("subject", size=300), (query.text("q") or "").lower()
        key, limit = read_cursor(query.text("after", size=4096), str), query.number("limit", 200, 1, 1000)
        found = [
            policy
            for policy in sorted(await self.quotas.policies(), key=lambda policy: policy.name)
            if subject in (None, subject_of(policy))
            and (text in policy.name.lower() or text in policy.note.lower())
            and readable(policy)
        ]
        rest = found if key is None else [policy for policy in found if policy.name > key[0]]
        page = rest[:limit]
        following = cursor(page[-1].name) if len(rest) > limit else None
        self.write_json({"policies": [policy_json(one) for one in page], "total": len(found), "next": following})


class PolicyHandler(_PolicyHandler):
    """One policy."""

    async def get(self, name: str) -> None:
        self.query()
        self.answer(await self.seen(self.authority(), name))

    async def put(self, name: str) -> None:
        query = self.query("dry_run")
        body = self.fields(*POLICY_FIELDS)
        authority = await self.privileged()
        authority.require(QUOTAS_WRITE)
        _check_name(name)
        before = await self.known(authority, name)
        if before is not None and not (await authority.may_read())(before):
            raise Conflict(f"The name {name} is taken; choose another one.")
        wanted = authority.authored(grant_of(self.wanted(name, body, before), body, authority))
        wanted = await self.permitted(authority, wanted, before)
        dry = query.flag("dry_run")
        result = await self.quotas.put(wanted, self.caller.name, dry_run=dry)
        self.answer(result.policy, 201 if before is None and not dry else 200, problems=plain(result.problems))

    async def delete(self, name: str) -> None:
        self.query()
        authority = await self.privileged()
        authority.require(QUOTAS_WRITE)
        policy = await self.seen(authority, name)
        await authority.check_policy(policy)
        expected = self.expected()
        if expected is not None and expected != policy.version:
            raise Conflict(f"The policy {name} was changed meanwhile by {policy.updated_by}; read it again.")
        await self.quotas.delete(name, self.caller.name)
        self.set_status(204)


class PreviewHandler(_PolicyHandler):
    """What a policy would do, without setting it: problems, and what it would have refused lately."""

    async def post(self, name: str) -> None:
        body = self.fields("days", *POLICY_FIELDS)
        authority = await self.privileged()
        authority.require(QUOTAS_WRITE)
        _check_name(name)
        days = int(body.number("days", low=1, high=MAX_DAYS, default=30))
        before = await self.known(authority, name)
        asked = policy_of(name, body, version=before.version if before else 0)
        wanted = authority.authored(grant_of(asked, body, authority))
        wanted = await self.permitted(authority, wanted, before)
        result = await self.quotas.put(wanted, self.caller.name, dry_run=True)
        others = [policy for policy in await self.quotas.policies() if policy.name != name]
        simulation = plain(await self.quotas.simulate([*others, wanted], days))
        if not authority.unlimited(QUOTAS_WRITE) and isinstance(simulation, dict):
            simulation = await within_reach(authority, simulation)
        self.write_json(
            {"policy": policy_json(result.policy), "problems": plain(result.problems), "simulation": simulation}
        )


async def within_reach(authority: Authority, simulation: dict[str, Any]) -> dict[str, Any]:
    """As much of a simulation as a lead may see: their own people, and no sums over others."""
    reach = await authority.reach(QUOTAS_READ)
    mine = [one for one in simulation.get("by_user") or [] if reach.over(str(one.get("owner") or one.get("user")))]
    refused, queued = (sum(int(one.get(name) or 0) for one in mine) for name in ("refused", "queued"))
    return {
        "launches": sum(int(one.get("launches") or 0) for one in mine),
        "refused": refused,
        "queued": queued,
        "by_user": mine,
        "sentence": f"It would have refused {refused} launches of your people, and queued {queued}.",
    }


class ExportHandler(TenancyHandler):
    """All policies as a file."""

    async def get(self) -> None:
        self.query()
        _everything(self.authority(), QUOTAS_READ)
        self.set_header("Content-Type", "application/yaml; charset=UTF-8")
        self.set_header("Content-Disposition", 'attachment; filename="policies.yaml"')
        self.write(await self.quotas.export())


class DiffHandler(TenancyHandler):
    """How a file of policies differs from those that hold."""

    async def post(self) -> None:
        body = self.fields("text")
        _everything(await self.privileged(), QUOTAS_READ)
        self.write_json(plain(await self.quotas.diff(_document(body))))


class ApplyHandler(TenancyHandler):
    """Make the policies those of a file."""

    async def post(self) -> None:
        query, body = self.query("dry_run", "keep"), self.fields("text")
        _everything(await self.privileged(), QUOTAS_WRITE)
        found = await self.quotas.apply(
            _document(body), self.caller.name, dry_run=query.flag("dry_run"), keep=query.flag("keep")
        )
        self.write_json(plain(found))


class ExplainHandler(TenancyHandler):
    """What applies to somebody, what wins and why, and why they were refused."""

    async def get(self) -> None:
        query = self.query("user", "kernelspec")
        person = await self.authority().person(QUOTAS_READ, query.text("user"))
        kind = SubjectKind.SERVICE if self.caller.kind == "service" and query.text("user") is None else None
        found = await self.quotas.explain(
            person.name, kind or kind_of(person.name), person.groups, query.text("kernelspec")
        )
        self.write_json({"user": person.name, "groups": sorted(person.groups), **_object(plain(found))})


class SimulateHandler(TenancyHandler):
    """What the launches of the last days would have met under the policies of a file."""

    async def post(self) -> None:
        body = self.fields("text", "days")
        _everything(await self.privileged(), QUOTAS_READ)
        days = int(body.number("days", low=1, high=MAX_DAYS, default=30))
        self.write_json(plain(await self.quotas.simulate(_document(body), days)))


def _everything(authority: Authority, scope: str) -> None:
    """Only for who has the scope without a filter."""
    if not require(authority.caller, scope).everything:
        raise Forbidden(
            f"This is about the policies of everybody, and your permission {scope} is for some only; ask the "
            "administrator of the gateway."
        )


def _document(body: Body) -> str:
    text = body.found.get("text")
    if not isinstance(text, str) or len(text) > MAX_DOCUMENT:
        raise BadRequest(f"The field `text` must be a file of policies (YAML) of at most {MAX_DOCUMENT} characters.")
    return text


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"explanation": value}
