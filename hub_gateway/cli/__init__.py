"""Subcommands of `jupyter hubgateway`. The classes are imported when they are asked for."""

from __future__ import annotations

__all__ = ["subcommands"]

subcommands: dict[str, tuple[str, str]] = {
    "check": ("hub_gateway.cli.check.Check", "Say what is wrong with this set-up, and what to do about it."),
    "kernels": ("hub_gateway.cli.kernels.Kernels", "List, show and stop your kernels."),
    "db": ("hub_gateway.cli.db.DB", "Upgrade the database, or say its revision; rotate the keys of its secrets."),
    "token": ("hub_gateway.cli.token.Token", "Add a user to the token file of a gateway without a Hub."),
    "demo": ("hub_gateway.demo.app.Demo", "Run a JupyterHub with the gateway on this machine."),
}
