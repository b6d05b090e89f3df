"""Who a kernel runs as on a node: the unix user of its owner's name."""

from __future__ import annotations

import pwd
import re

from traitlets import Bool, Integer, List, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.errors import Forbidden

__all__ = ["UnixUsers"]

# What useradd accepts; no option, no path, nothing that a tool could take for something else.
_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}\Z")


class UnixUsers(LoggingConfigurable):
    """Maps Hub users to unix users, and fails closed."""

    impersonate = Bool(
        False,
        help="""Whether kernels run as the unix user that has their owner's name.

        The gateway must be root, or have a sudo rule for its launcher (see LocalProxy). By default kernels
        run as the gateway's own user, whose files every kernel can then read.
        """,
    ).tag(config=True)
    minimum_uid = Integer(
        1000, help="Users with a lower uid (root and system accounts) never get a kernel of their own."
    ).tag(config=True)
    refused_users = List(
        Unicode(), default_value=["root", "nobody"], help="Unix users that never get a kernel, whatever their uid."
    ).tag(config=True)

    def map(self, owner: str) -> str | None:
        """The unix user for an owner; None for the gateway's own. Raises `Forbidden`. May block (NSS)."""
        if not self.impersonate:
            return None
        if not _NAME.match(owner) or owner in self.refused_users:
            raise Forbidden(
                f"{owner!r} has no unix user that kernels may run as; ask the administrator of the gateway."
            )
        try:
            entry = pwd.getpwnam(owner)
        except KeyError as error:
            raise Forbidden(
                f"There is no unix user {owner!r} on the gateway's node, so no kernel can run as that user; "
                "ask the administrator of the gateway."
            ) from error
        if entry.pw_name != owner or entry.pw_uid < self.minimum_uid or entry.pw_uid in (0, 65534):
            raise Forbidden(f"The unix user {owner!r} is a system account, and kernels never run as one.")
        return owner
