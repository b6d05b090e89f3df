"""`jupyter hubgateway identity`: as whom kernels run, and why."""

from __future__ import annotations

import json
from urllib.parse import quote

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client
from hub_gateway.cli.outline import outline

__all__ = ["Identity"]


class IdentityExplain(Client):
    """Say as which principal and unix user your kernels run, or a user's, and why: `identity explain [USER]`."""

    name = "jupyter-hubgateway-identity-explain"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """Every rule that was tried, and what came out."""
        user = self.argument("the name of a user") if self.extra_args else None
        found = self.ask("api/identity", user=user)
        if self.as_json:
            print(json.dumps(found, indent=2))
        else:
            outline(found)
        return 0


class IdentityRelease(Client):
    """Release the principal and unix user of a Hub user who left, so that somebody else may have them."""

    name = "jupyter-hubgateway-identity-release"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """It is in the audit trail."""
        user = self.argument("the name of a user")
        self.ask(f"api/identity/{quote(user, safe='')}", "DELETE")
        print(f"{user}: released")
        return 0


class Identity(Group):
    """As whom kernels run."""

    name = "jupyter-hubgateway-identity"
    description = __doc__
    subcommands = {
        "explain": (IdentityExplain, IdentityExplain.__doc__),
        "release": (IdentityRelease, IdentityRelease.__doc__),
    }
