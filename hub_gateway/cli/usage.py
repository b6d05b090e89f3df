"""`jupyter hubgateway usage`: what was used, what it cost, and what is put right."""

from __future__ import annotations

import json
from typing import Any

from traitlets import CaselessStrEnum, Float, Integer, Unicode

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client

__all__ = ["Usage"]


class UsageReport(Client):
    """Report usage: `usage report --by group --from 2030-01-01 --to 2030-02-01 --format csv`."""

    name = "jupyter-hubgateway-usage-report"
    description = __doc__
    aliases = {
        **Client.aliases,
        **{name: f"UsageReport.{name}" for name in ("by", "to", "format", "user", "group")},
        "from": "UsageReport.since",
    }
    by = Unicode("user", help="user, group, cost_center, kernelspec, proxy or day.").tag(config=True)
    since = Unicode(help="From when on: a date, or a date and time. By default the first of this month.").tag(
        config=True
    )
    to = Unicode(help="Until when, itself not included. By default now.").tag(config=True)
    format = CaselessStrEnum(["table", "csv", "json"], "table", help="How to print it.").tag(config=True)
    user = Unicode(help="Only what this user used.").tag(config=True)
    group = Unicode(help="Only what was billed to this group.").tag(config=True)

    def run(self) -> int:
        """As the gateway writes it."""
        form = "json" if self.as_json else self.format
        query: dict[str, Any] = {name: getattr(self, name) or None for name in ("by", "to", "user", "group")}
        query["from"] = self.since or None
        found = self.fetch("api/usage", format=form, **query).decode()
        print(json.dumps(json.loads(found), indent=2) if form == "json" else found.rstrip("\r\n"))
        return 0


class UsageClose(Client):
    """Close a month, so that nothing is added to it any more: `usage close 2030-01`."""

    name = "jupyter-hubgateway-usage-close"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """The sums that it was closed with."""
        found = self.ask("api/ledger/close", "POST", {"month": self.argument("a month, such as 2030-01")})
        if self.as_json:
            print(json.dumps(found, indent=2))
        else:
            print(f"{found['month']}: closed with {found['entries']} entries")
        return 0


class UsagePrices(Client):
    """Show the price lists, or set a new one by giving prices: `usage prices --core-hour 0.05 --gpu-hour 1.2`."""

    name = "jupyter-hubgateway-usage-prices"
    description = __doc__
    aliases = {
        **Client.aliases,
        **{f"{name}-hour": f"UsagePrices.{name}_hour" for name in ("kernel", "core", "gib", "gpu")},
        "gpu-models": "UsagePrices.gpu_models",
        "from": "UsagePrices.valid_from",
    }
    kernel_hour = Float(None, allow_none=True, help="Cost units for one kernel and hour.").tag(config=True)
    core_hour = Float(None, allow_none=True, help="For one core and hour.").tag(config=True)
    gib_hour = Float(None, allow_none=True, help="For one GiB of memory and hour.").tag(config=True)
    gpu_hour = Float(None, allow_none=True, help="For one GPU and hour.").tag(config=True)
    gpu_models = Unicode(help='For GPUs of some models, as JSON: {"a100": 2.5}.').tag(config=True)
    valid_from = Unicode(help="From when on, for kernels that are started then; by default from now on.").tag(
        config=True
    )

    def run(self) -> int:
        """Old lists stay, for what was started under them."""
        body: dict[str, Any] = {}
        for name in ("kernel_hour", "core_hour", "gib_hour", "gpu_hour"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        if self.gpu_models:
            try:
                body["gpu_models"] = json.loads(self.gpu_models)
            except ValueError:
                self.fail("--gpu-models is not JSON", f"{self.name} --help")
        if body:
            if self.valid_from:
                body["valid_from"] = self.valid_from
            made = self.ask("api/prices", "POST", body)
            print(json.dumps(made, indent=2) if self.as_json else f"price list {made['version']} is set")
            return 0
        found = self.ask("api/prices")
        names = ("version", "valid_from", "kernel_hour", "core_hour", "gib_hour", "gpu_hour", "gpu_models")
        self.show(found, {name: name.replace("_", " ") for name in names}, found["prices"], "No prices.")
        return 0


class UsageEntries(Client):
    """List the latest entries of the ledger, with the numbers by which they are corrected."""

    name = "jupyter-hubgateway-usage-entries"
    description = __doc__
    aliases = {**Client.aliases, **{name: f"UsageEntries.{name}" for name in ("user", "group", "limit")}}
    user = Unicode(help="Only what this user used.").tag(config=True)
    group = Unicode(help="Only what was billed to this group.").tag(config=True)
    limit = Integer(50, help="How many entries at most.").tag(config=True)

    def run(self) -> int:
        """A table, the newest first."""
        query: dict[str, Any] = {name: getattr(self, name) or None for name in ("user", "group", "limit")}
        found = self.ask("api/ledger/entries", **query)
        names = ("id", "owner", "kernelspec", "started", "stopped", "seconds", "cost_center", "corrects", "note")
        self.show(found, {name: name.replace("_", " ") for name in names}, found["entries"], "No entries.")
        return 0


class UsageCorrect(Client):
    """Correct an entry of the ledger by a new one: `usage correct 4711 --seconds=-3600 --note "..."`.

    With --cost-center all of it is billed to another cost centre.
    """

    name = "jupyter-hubgateway-usage-correct"
    description = __doc__
    takes_arguments = True
    aliases = {
        **Client.aliases,
        "seconds": "UsageCorrect.seconds",
        "cost-center": "UsageCorrect.cost_center",
        "note": "UsageCorrect.note",
    }
    seconds = Integer(0, help="How many seconds to add to it; less than zero takes some away.").tag(config=True)
    cost_center = Unicode(help="To which cost centre it is to be billed; by default as it is.").tag(config=True)
    note = Unicode(help="Why.").tag(config=True)

    def run(self) -> int:
        """The entry itself stays as it is."""
        entry = self.argument("the number of an entry")
        if not (entry.isascii() and entry.isdigit()):
            self.fail(f"{entry!r} is no number of an entry", f"{self.name} --help")
        body = {"entry": int(entry), "seconds": self.seconds, "note": self.note}
        if self.cost_center:
            body["cost_center"] = self.cost_center
        found = self.ask("api/ledger/corrections", "POST", body)
        to = f", billed to {self.cost_center}" if self.cost_center else ""
        print(json.dumps(found, indent=2) if self.as_json else f"entry {entry}: corrected by {self.seconds} s{to}")
        return 0


class Usage(Group):
    """What was used, and what it cost."""

    name = "jupyter-hubgateway-usage"
    description = __doc__
    subcommands = {
        "report": (UsageReport, UsageReport.__doc__),
        "close": (UsageClose, UsageClose.__doc__),
        "prices": (UsagePrices, UsagePrices.__doc__),
        "entries": (UsageEntries, UsageEntries.__doc__),
        "correct": (UsageCorrect, UsageCorrect.__doc__),
    }
