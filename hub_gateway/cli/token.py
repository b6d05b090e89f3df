"""`jupyter hubgateway token`: who may use a gateway without a Hub."""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from traitlets import Bool, Float, List, Unicode

from hub_gateway.cli.base import Command
from hub_gateway.cli.files import write_file
from hub_gateway.errors import BadRequest

__all__ = ["Token", "add_entry"]


class Token(Command):
    """Add a user to the token file, print the new token once, and store its hash."""

    name = "jupyter-hubgateway-token"
    description = __doc__
    takes_arguments = True
    examples = """
    jupyter hubgateway token alice --file=tokens.yaml
    jupyter hubgateway token ci --file=tokens.yaml --group=robots --days=30
    """
    aliases = {
        **Command.aliases,
        "file": "Token.file",
        "group": "Token.groups",
        "days": "Token.days",
    }
    flags = {
        **Command.flags,
        "admin": ({"Token": {"admin": True}}, "The user may see and stop everybody's kernels."),
    }

    file = Unicode(help="The token file. By default `HubGateway.token_file`. Made, with mode 0600, if missing.").tag(
        config=True
    )
    groups = List(Unicode(), help="Groups of the user; the option may be repeated.").tag(config=True)
    days = Float(0.0, help="For how many days the token is good; 0 is for ever.").tag(config=True)
    admin = Bool(False, help="Whether the user may see and stop everybody's kernels.").tag(config=True)

    def run(self) -> int:
        """Add the entry and print the token: the only time that it can be seen."""
        user = self.argument("the user's name")
        path = self.file or self.gateway().token_file
        if not path:
            self.fail("no token file was named", "use --file=tokens.yaml")
        expires = datetime.now(timezone.utc) + timedelta(days=self.days) if self.days else None
        token = secrets.token_urlsafe(32)
        add_entry(Path(path).expanduser(), token, user, groups=self.groups, admin=self.admin, expires=expires)
        print(token)
        return 0


def add_entry(
    path: Path,
    token: str,
    user: str,
    *,
    groups: list[str] | None = None,
    admin: bool = False,
    expires: datetime | None = None,
) -> None:
    """Add a token's hash to a YAML or JSON token file, keeping its other entries. Raises `BadRequest`."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,255}", user):
        raise BadRequest(f"{user!r} is not a user name: letters, digits and . _ @ - only.")
    entries = _entries(path)
    entry: dict[str, Any] = {"sha256": sha256(token.encode()).hexdigest(), "user": user, "groups": list(groups or [])}
    if admin:
        entry["admin"] = True
    if expires is not None:
        entry["expires"] = expires.isoformat(timespec="seconds")
    document = {"tokens": [*entries, entry]}
    if path.suffix == ".json":
        text = json.dumps(document, indent=2) + "\n"
    else:
        text = yaml.safe_dump(document, sort_keys=False)
    write_file(path, text.encode(), 0o600)


def _entries(path: Path) -> list[Any]:
    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"{path} is neither YAML nor JSON; nothing was changed.") from error
    if found is None:
        return []
    if not isinstance(found, dict) or not isinstance(found.get("tokens"), list):
        raise BadRequest(f"{path} holds no list `tokens`; nothing was changed.")
    return list(found["tokens"])
