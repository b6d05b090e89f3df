"""How far permissions for one group reach."""

from __future__ import annotations

from traitlets import Integer
from traitlets.config import LoggingConfigurable

__all__ = ["Delegation"]


class Delegation(LoggingConfigurable):
    """How far a permission for one group or some users goes (`...:quotas:write!group=analysts`)."""

    lead_max_priority = Integer(
        100,
        help="""The highest priority of a policy that may be set, changed or deleted with a permission for a group only.

        What such a lead must not touch or override gets a higher one from the administrator. Grants that a lead
        gives have this priority, too, where the administrator's have 1000.
        """,
    ).tag(config=True)
