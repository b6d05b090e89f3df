"""/api/audit, /api/identity: who did what, and as whom kernels run."""

from __future__ import annotations

from hub_gateway.auth.scopes import AUDIT_READ, IDENTITY_READ, IDENTITY_WRITE, powers, require
from hub_gateway.errors import NotFound
from hub_gateway.web.plain import plain
from hub_gateway.web.tenancy import TenancyHandler, cursor, read_cursor

__all__ = ["AuditHandler", "IdentityHandler", "ReleaseHandler", "VerifyHandler"]


class AuditHandler(TenancyHandler):
    """The audit trail, the newest first."""

    async def get(self) -> None:
        query = self.query("actor", "subject", "action", "after", "limit")
        require(self.caller, AUDIT_READ)
        key, limit = read_cursor(query.text("after"), int), query.number("limit", 100, 1, 1000)
        audit = self.audit
        wanted = {name: query.text(name) for name in ("actor", "subject", "action")}
        before = None if key is None else key[0]
        found = await self.services.db.read(
            lambda tx: list(audit.query(tx, **wanted, before_id=before, limit=limit + 1))
        )
        entries = [plain(entry) for entry in found[:limit]]
        self.write_json({"entries": entries, "next": cursor(found[limit - 1].id) if len(found) > limit else None})


class VerifyHandler(TenancyHandler):
    """Whether the audit trail is whole."""

    async def get(self) -> None:
        self.query()
        require(self.caller, AUDIT_READ)
        self.write_json(plain(await self.services.db.read(self.audit.verify)))


class IdentityHandler(TenancyHandler):
    """As whom somebody's kernels run, by which rule, and why by none of the others."""

    async def get(self) -> None:
        query = self.query("user")
        person = await self.authority().person(IDENTITY_READ, query.text("user"))
        # Whose name somebody else goes by is for those who may look at everybody.
        everything = powers(self.caller, IDENTITY_READ).everything
        steps = await self.identity.explain(person.name, person.groups, name_holders=everything)
        self.write_json({"user": person.name, "groups": sorted(person.groups), "steps": plain(steps)})


class ReleaseHandler(TenancyHandler):
    """Release a principal and unix user from who has them."""

    async def delete(self, user: str) -> None:
        self.query()
        authority = await self.privileged()
        power = require(self.caller, IDENTITY_WRITE)
        missing = f"Nothing is held for a user {user[:100]!r} whom you may release."
        if not await authority.covers(power, user):
            raise NotFound(missing)
        if not await self.identity.release(user, self.caller.name):
            raise NotFound(missing)
        self.set_status(204)
