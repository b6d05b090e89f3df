"""Commands that ask a running gateway over its REST interface, as the user whose token they have."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from traitlets import Bool, Unicode

from hub_gateway.cli.base import Command
from hub_gateway.errors import BadRequest
from hub_gateway.statedir import StateDir

__all__ = ["Client", "cell", "print_table", "text_of"]

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

    def ask(self, path: str, method: str = "GET", body: Mapping[str, Any] | None = None, **query: Any) -> Any:
        """The JSON answer of the gateway; a refusal ends the command with the gateway's own sentence."""
        found = self.fetch(path, method, body, **query)
        return json.loads(found) if found else None

    def fetch(self, path: str, method: str = "GET", body: Mapping[str, Any] | None = None, **query: Any) -> bytes:
        """The answer as it came. What of `query` is None is left out."""
        address = self.address()
        asked = urlencode({name: value for name, value in query.items() if value is not None})
        request = HTTPRequest(
            f"{address}/{path}{f'?{asked}' if asked else ''}",
            method=method,
            headers={"Authorization": f"token {self.token()}", "Content-Type": "application/json"},
            body=None if body is None else json.dumps(body),
            request_timeout=60,
            user_agent="jupyter-hubgateway",
        )

        async def ask() -> bytes:
            answer = await AsyncHTTPClient().fetch(request)
            return answer.body or b""

        try:
            return asyncio.run(ask())
        except HTTPClientError as error:
            self.fail(_sentence(error))
        except (OSError, ValueError) as error:
            self.fail(f"{address} cannot be reached: {error}", "does the gateway run? is the address right?")

    def show(self, found: Any, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], none: str) -> None:
        """Print JSON, or a table: `columns` maps a row's fields to headings; `none` stands for no rows."""
        if self.as_json:
            print(json.dumps(found, indent=2))
            return
        lines = [list(columns.values()), *([cell(row.get(name)) for name in columns] for row in rows)]
        if len(lines) == 1:
            print(none)
            return
        print_table(lines)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Columns, as wide as their widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def cell(value: Any) -> str:
    """A value in a table, on one line; what could steer a terminal is made visible."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return ", ".join(cell(one) for one in value) or "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(char if char.isprintable() else "?" for char in text)


def text_of(path: str) -> str:
    """A file's text; `-` is standard input. Raises `BadRequest`."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _sentence(error: HTTPClientError) -> str:
    """What the gateway says of its refusal."""
    try:
        found = json.loads(error.response.body) if error.response is not None else {}
    except ValueError:
        found = {}
    message = found.get("message") if isinstance(found, dict) else None
    return str(message or f"the gateway answers {error.code} {error.message}")
