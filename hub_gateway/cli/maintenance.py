"""`jupyter hubgateway maintenance`: shut the door for new kernels."""

from __future__ import annotations

import json
from typing import Any

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client

__all__ = ["Maintenance"]


class _Maintenance(Client):
    def say(self, found: dict[str, Any]) -> int:
        """The state, in one line."""
        if self.as_json:
            print(json.dumps(found, indent=2))
        elif found["sentence"]:
            print(f"on: {found['sentence']}")
        else:
            print("off: new kernels may be started")
        return 0


class MaintenanceShow(_Maintenance):
    """Say whether new kernels may be started."""

    name = "jupyter-hubgateway-maintenance-show"
    description = __doc__

    def run(self) -> int:
        """Everybody may know."""
        return self.say(self.ask("api/maintenance"))


class MaintenanceOn(_Maintenance):
    """Start no new kernels, and tell who tries why: `maintenance on "The cluster is upgraded until 18:00."`."""

    name = "jupyter-hubgateway-maintenance-on"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """Kernels that run are left alone."""
        sentence = self.argument("the sentence that users read")
        return self.say(self.ask("api/maintenance", "PUT", {"sentence": sentence}))


class MaintenanceOff(_Maintenance):
    """Let new kernels be started again."""

    name = "jupyter-hubgateway-maintenance-off"
    description = __doc__

    def run(self) -> int:
        """What waits in the queue goes on, too."""
        return self.say(self.ask("api/maintenance", "PUT", {"sentence": None}))


class Maintenance(Group):
    """Maintenance mode: no new kernels."""

    name = "jupyter-hubgateway-maintenance"
    description = __doc__
    subcommands = {
        "show": (MaintenanceShow, MaintenanceShow.__doc__),
        "on": (MaintenanceOn, MaintenanceOn.__doc__),
        "off": (MaintenanceOff, MaintenanceOff.__doc__),
    }
