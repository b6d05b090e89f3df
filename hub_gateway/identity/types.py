"""What comes out of a mapping: an identity, and the steps that led to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hub_gateway.identity.names import lower
from hub_gateway.kernels.types import JSON

__all__ = ["Identity", "Step"]


@dataclass(frozen=True)
class Identity:
    """As whom the kernels of a Hub user run. `unix_user` None is the gateway's own."""

    hub_user: str
    owner: str
    """The owner of the kernels; a service's begins with `services/`."""
    rule: str = ""
    principal: str | None = None
    unix_user: str | None = None
    uid: int | None = None
    """Where the unix user is known on the gateway's node."""
    cost_center: str = ""
    shared: bool = False
    """Whether the rule says that several Hub users may have this principal and unix user."""
    groups: tuple[str, ...] = ()
    offered: str = field(default="", repr=False, compare=False)
    """Kerberos tickets that the client has brought along (a credential cache, base64). Secret."""

    @property
    def claimed(self) -> tuple[tuple[str, str], ...]:
        """Kinds and names that belong to one Hub user only."""
        found = (("principal", self.principal), ("unix_user", self.unix_user), ("uid", self.uid))
        return tuple((kind, lower(str(name))) for kind, name in found if name is not None)

    def facts(self) -> dict[str, JSON]:
        """For the audit trail."""
        return {
            "rule": self.rule,
            "principal": self.principal,
            "unix_user": self.unix_user,
            "uid": self.uid,
            "groups": list(self.groups),
            "cost_center": self.cost_center,
        }


@dataclass(frozen=True)
class Step:
    """One step of a mapping, for `explain`. `sentence` may be shown to the user whom it is about."""

    stage: Literal["name", "rule", "check", "claim", "credential", "result"]
    rule: str
    outcome: Literal["ok", "matched", "skipped", "refused", "held", "unavailable"]
    sentence: str
