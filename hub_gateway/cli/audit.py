"""`jupyter hubgateway audit`: who did what, and whether the trail is whole."""

from __future__ import annotations

import json
from typing import Any

from traitlets import Integer, Unicode

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client

__all__ = ["Audit"]


class AuditList(Client):
    """List the latest entries of the audit trail."""

    name = "jupyter-hubgateway-audit-list"
    description = __doc__
    aliases = {
        **Client.aliases,
        **{name: f"AuditList.{name}" for name in ("actor", "subject", "action", "limit")},
    }
    actor = Unicode(help="Only what this user did.").tag(config=True)
    subject = Unicode(help="Only what was done to this user, policy or kernel.").tag(config=True)
    action = Unicode(help="Only this action, such as policy.set or kernel.refused.").tag(config=True)
    limit = Integer(50, help="How many entries at most.").tag(config=True)

    def run(self) -> int:
        """A table, the newest first."""
        query: dict[str, Any] = {name: getattr(self, name) or None for name in ("actor", "subject", "action", "limit")}
        found = self.ask("api/audit", **query)
        names = ("id", "at", "actor", "action", "subject", "outcome", "detail")
        self.show(found, {name: name for name in names}, found["entries"], "No entries.")
        return 0


class AuditVerify(Client):
    """Check that no entry of the audit trail was changed or taken out: exit code 1 where one was."""

    name = "jupyter-hubgateway-audit-verify"
    description = __doc__

    def run(self) -> int:
        """The gateway's sentence."""
        found = self.ask("api/audit/verify")
        if self.as_json:
            print(json.dumps(found, indent=2))
        else:
            print(found["sentence"])
            print(f"Hash of the last line: {found['head'] or '-'}")
        return 0 if found["ok"] else 1


class Audit(Group):
    """The audit trail."""

    name = "jupyter-hubgateway-audit"
    description = __doc__
    subcommands = {
        "list": (AuditList, AuditList.__doc__),
        "verify": (AuditVerify, AuditVerify.__doc__),
    }
