"""`jupyter hubgateway kernels`: what a user can do without a browser, over the gateway's REST interface."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from traitlets import Bool, Unicode

from hub_gateway.cli.base import Command, Group
from hub_gateway.statedir import StateDir

__all__ = ["Kernels", "KernelsList", "KernelsShow", "KernelsStop"]

URLS = ("HUB_GATEWAY_URL", "JUPYTER_GATEWAY_URL")
TOKENS = ("HUB_GATEWAY_TOKEN", "JUPYTER_GATEWAY_AUTH_TOKEN", "JUPYTERHUB_API_TOKEN")


class Client(Command):
    """A command that asks a running gateway, with the user's own token."""

    aliases = {**Command.aliases, "url": "Client.url", "token-from": "Client.token_from"}
    flags = {
        **Command.flags,
        "json": ({"Client": {"as_json": True}}, "Print JSON, for programs."),
    }

    url = Unicode(
        help=f"""The gateway's address, prefix included, for example `https://hub.example.org/services/hub-gateway`.

        By default what {" or ".join(URLS)} says (in a terminal of a single-user server it does), or the
        gateway that runs in `HubGateway.state_dir`.
        """
    ).tag(config=True)
    token_from = Unicode(
        help=f"""A file that holds the token. By default it is read from {", ".join(TOKENS)}.

        There is no option for the token itself: the command lines of processes can be read by other users.
        """
    ).tag(config=True)
    as_json = Bool(False, help="Print JSON, for programs.").tag(config=True)

    def address(self) -> str:
        """Where the gateway is."""
        found = self.url or next((os.environ[name] for name in URLS if os.environ.get(name)), "")
        if not found:
            facts = StateDir(self.gateway().state_dir).read_address()
            found = str(facts.get("url") or "")
        if not found:
            self.fail("where is the gateway?", f"use --url, or set {URLS[0]}")
        return found.rstrip("/")

    def token(self) -> str:
        """The user's token."""
        if self.token_from:
            try:
                return Path(self.token_from).expanduser().read_text().strip()
            except OSError as error:
                self.fail(f"the token cannot be read from {self.token_from}: {error.strerror}")
        found = next((os.environ[name] for name in TOKENS if os.environ.get(name)), "")
        if not found:
            self.fail("there is no token", f"set {TOKENS[0]}, or use --token-from=FILE")
        return found

    def ask(self, path: str, method: str = "GET") -> Any:
        """The JSON answer of the gateway; a refusal ends the command with the gateway's own sentence."""
        address = self.address()
        request = HTTPRequest(
            f"{address}/{path}",
            method=method,
            headers={"Authorization": f"token {self.token()}", "Accept": "application/json"},
            request_timeout=60,
        )

        async def fetch() -> bytes:
            answer = await AsyncHTTPClient().fetch(request)
            return answer.body or b""

        try:
            body = asyncio.run(fetch())
        except HTTPClientError as error:
            self.fail(_sentence(error))
        except (OSError, ValueError) as error:
            self.fail(f"{address} cannot be reached: {error}", "does the gateway run? is the address right?")
        return json.loads(body) if body else None


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
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return 0


class KernelsShow(Client):
    """Show one kernel: `jupyter hubgateway kernels show ID`."""

    name = "jupyter-hubgateway-kernels-show"
    description = __doc__

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


def _sentence(error: HTTPClientError) -> str:
    """What the gateway says of its refusal."""
    try:
        found = json.loads(error.response.body) if error.response is not None else {}
    except ValueError:
        found = {}
    message = found.get("message") if isinstance(found, dict) else None
    return str(message or f"the gateway answers {error.code} {error.message}")


def _shown(name: str, value: Any) -> str:
    if name != "last_activity" or not isinstance(value, str):
        return "" if value is None else str(value)
    moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    seconds = max(0, int((datetime.now(timezone.utc) - moment).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
