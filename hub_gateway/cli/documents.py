"""`jupyter hubgateway quota export|import|diff|apply|simulate`: policies as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from traitlets import Bool, Integer

from hub_gateway.cli.client import Client, cell, text_of

__all__ = ["QuotaApply", "QuotaDiff", "QuotaExport", "QuotaImport", "QuotaSimulate"]

DIFFERS = 3


class _File(Client):
    """A command that reads a file of policies."""

    takes_arguments = True

    def document(self) -> str:
        """Its text."""
        return text_of(self.argument("a file of policies, or - for standard input"))


class QuotaSimulate(_File):
    """Say what the launches of the last days would have met under the policies of a file: `quota simulate FILE`."""

    name = "jupyter-hubgateway-quota-simulate"
    description = __doc__
    aliases = {**Client.aliases, "days": "QuotaSimulate.days"}
    days = Integer(30, help="How many days to look back.").tag(config=True)

    def run(self) -> int:
        """The sentence, and a table of users."""
        found = self.ask("api/quota/simulate", "POST", {"text": self.document(), "days": self.days})
        if not self.as_json:
            print(found["sentence"])
        rows = found["by_user"]
        columns = {name: name for name in (rows[0] if rows else ())}
        if columns or self.as_json:
            self.show(found, columns, rows, "")
        return 0


class QuotaExport(Client):
    """Print all policies as a file (YAML)."""

    name = "jupyter-hubgateway-quota-export"
    description = __doc__

    def run(self) -> int:
        """As it came."""
        print(self.fetch("api/quota/export").decode(), end="")
        return 0


class QuotaDiff(_File):
    """Say how a file of policies differs from those that hold: exit code 0 for not at all, 3 where it does."""

    name = "jupyter-hubgateway-quota-diff"
    description = __doc__

    def run(self) -> int:
        """The differences."""
        found = self.ask("api/quota/diff", "POST", {"text": self.document()})
        return print_diff(self, found)


class QuotaApply(_File):
    """Make the policies those of a file: what is not in it is deleted. Try it with --dry-run first."""

    name = "jupyter-hubgateway-quota-apply"
    description = __doc__
    flags = {
        **Client.flags,
        "dry-run": ({"QuotaApply": {"dry_run": True}}, "Only say what would change, and what is wrong with it."),
    }
    dry_run = Bool(False, help="Only say what would change.").tag(config=True)
    keep = False

    def run(self) -> int:
        """What was changed."""
        query = {"dry_run": "true" if self.dry_run else None, "keep": "true" if self.keep else None}
        found = self.ask("api/quota/apply", "POST", {"text": self.document()}, **query)
        print_diff(self, found)
        if not self.as_json:
            print("nothing was changed (--dry-run)" if self.dry_run else "done")
        return 0


class QuotaImport(QuotaApply):
    """Add the policies of a file, or change them to what it says; all others stay as they are."""

    name = "jupyter-hubgateway-quota-import"
    description = __doc__
    keep = True


def print_diff(command: Client, found: Mapping[str, Any]) -> int:
    """Additions, changes and deletions, by name; the exit code."""
    kinds = {"added": "+", "changed": "~", "removed": "-"}
    if command.as_json:
        print(json.dumps(found, indent=2))
    else:
        for problem in found.get("problems") or ():
            print(f"{problem['level']}: {problem['sentence']}")
        for kind, sign in kinds.items():
            for one in found.get(kind) or ():
                print(f"{sign} {cell(one if isinstance(one, str) else one.get('name') or one)}")
    return DIFFERS if any(found.get(kind) for kind in kinds) else 0
