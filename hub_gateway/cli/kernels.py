"""`jupyter hubgateway kernels`: what a user can do without a browser, over the gateway's REST interface."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from traitlets import Bool

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client, print_table

__all__ = ["Kernels", "KernelsList", "KernelsShow", "KernelsStop"]


class KernelsList(Client):
    """List your kernels."""

    name = "jupyter-hubgateway-kernels-list"
    description = __doc__

    def run(self) -> int:
        """Print a table, or JSON."""
        kernels = self.ask("api/kernels")
        if self.as_json:
            print(json.dumps(kernels, indent=2))
            return 0
        if not kernels:
            print("No kernels.")
            return 0
        names = ("id", "name", "execution_state", "connections", "last_activity")
        rows = [["kernel", "kernelspec", "state", "clients", "last activity"]]
        rows += [[_shown(name, kernel.get(name)) for name in names] for kernel in kernels]
        print_table(rows)
        return 0


class KernelsShow(Client):
    """Show one kernel: `jupyter hubgateway kernels show ID`."""

    name = "jupyter-hubgateway-kernels-show"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """Print what the gateway tells of it, one fact a line, or JSON."""
        kernel = self.ask(f"api/kernels/{quote(self.argument('the id of a kernel'), safe='')}")
        if self.as_json:
            print(json.dumps(kernel, indent=2))
        else:
            for name, value in kernel.items():
                print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
        return 0


class KernelsStop(Client):
    """Stop kernels: `jupyter hubgateway kernels stop ID...`, or `--all` of yours."""

    name = "jupyter-hubgateway-kernels-stop"
    description = __doc__
    takes_arguments = True
    flags = {
        **Client.flags,
        "all": ({"KernelsStop": {"all_mine": True}}, "Stop all of your kernels."),
    }

    all_mine = Bool(False, help="Stop all of your kernels.").tag(config=True)

    def run(self) -> int:
        """Stop them, one after the other."""
        wanted = [kernel["id"] for kernel in self.ask("api/kernels")] if self.all_mine else list(self.extra_args)
        if not wanted and not self.all_mine:
            self.fail("which kernel?", "give its id, or --all")
        for kernel_id in wanted:
            self.ask(f"api/kernels/{quote(kernel_id, safe='')}", method="DELETE")
            print(f"stopped {kernel_id}")
        return 0


class Kernels(Group):
    """Your kernels on the gateway."""

    name = "jupyter-hubgateway-kernels"
    description = __doc__
    subcommands = {
        "list": (KernelsList, KernelsList.__doc__),
        "show": (KernelsShow, KernelsShow.__doc__),
        "stop": (KernelsStop, KernelsStop.__doc__),
    }


def _shown(name: str, value: Any) -> str:
    if name != "last_activity" or not isinstance(value, str):
        return "" if value is None else str(value)
    moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    seconds = max(0, int((datetime.now(timezone.utc) - moment).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
