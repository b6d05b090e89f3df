"""Who a kernel runs as on a node: which unix users may be anybody's, and the simplest mapping, by the same name."""

from __future__ import annotations

import os
import pwd

from traitlets import Bool, Integer, List, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.errors import Forbidden
from hub_gateway.identity.names import shown, unix_name_problem

__all__ = ["UnixUsers"]


class UnixUsers(LoggingConfigurable):
    """Maps Hub users to unix users, and fails closed."""

    impersonate = Bool(
        False,
        help="""Whether kernels run as the unix user that has their owner's name.

        The gateway must be root, or have a sudo rule for its launcher (see LocalProxy). By default kernels
        run as the gateway's own user, whose files every kernel can then read. Where `IdentityMapper.rules`
        has rules, these decide in place of this.
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
        self.uid(owner)
        return owner

    def uid(self, name: str, *, required: bool = True) -> int | None:
        """The uid of a unix user that kernels may run as. Raises `Forbidden`. May block (NSS).

        None where the gateway's node does not know the user and `required` is false.
        """
        if unix_name_problem(name) or name in self.refused_users:
            raise Forbidden(
                f"{shown(name)} has no unix user that kernels may run as; ask the administrator of the gateway."
            )
        try:
            entry = pwd.getpwnam(name)
        except KeyError as error:
            if not required:
                return None
            raise Forbidden(
                f"There is no unix user {name!r} on the gateway's node, so no kernel can run as that user; "
                "ask the administrator of the gateway."
            ) from error
        # A name service that ignores case, or knows aliases, answers for names that are not the user's.
        if entry.pw_name != name or entry.pw_uid < self.minimum_uid or entry.pw_uid in (0, 65534):
            raise Forbidden(f"The unix user {name!r} is a system account, and kernels never run as one.")
        if entry.pw_uid == os.geteuid():
            raise Forbidden(
                f"The unix user {name!r} is the gateway's own account, and nobody's kernels run as that; "
                "ask the administrator of the gateway."
            )
        return entry.pw_uid
