"""Subcommands of `jupyter hubgateway`. The classes are imported when they are asked for."""

from __future__ import annotations

__all__ = ["subcommands"]

subcommands: dict[str, tuple[str, str]] = {
    "check": ("hub_gateway.cli.check.Check", "Say what is wrong with this set-up, and what to do about it."),
    "kernels": ("hub_gateway.cli.kernels.Kernels", "List, show and stop your kernels."),
    "kernelspec": (
        "hub_gateway.cli.kernelspec.Kernelspec",
        "Kernelspecs: list, create, install and check what kernels are started from.",
    ),
    "quota": ("hub_gateway.cli.quota.Quota", "Limits: yours, and those of users and groups."),
    "usage": ("hub_gateway.cli.usage.Usage", "Report what was used and what it cost; prices, months, corrections."),
    "audit": ("hub_gateway.cli.audit.Audit", "Read the audit trail, and check that it is whole."),
    "identity": ("hub_gateway.cli.identity.Identity", "Say as whom kernels run, and why."),
    "maintenance": ("hub_gateway.cli.maintenance.Maintenance", "Start no new kernels for a while."),
    "db": ("hub_gateway.cli.db.DB", "Upgrade the database, or say its revision; rotate the keys of its secrets."),
    "token": ("hub_gateway.cli.token.Token", "Add a user to the token file of a gateway without a Hub."),
    "demo": ("hub_gateway.demo.app.Demo", "Run a JupyterHub with the gateway on this machine."),
}
