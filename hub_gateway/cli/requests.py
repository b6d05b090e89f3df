"""`jupyter hubgateway quota ask|requests|answer`: asking for more, and the answers."""

from __future__ import annotations

import json
from typing import Any

from traitlets import Bool, Unicode

from hub_gateway.cli.client import Client

__all__ = ["QuotaAnswer", "QuotaAsk", "QuotaRequests"]


def _number(text: str) -> float | str:
    try:
        found = float(text)
    except ValueError:
        return text
    return int(found) if found.is_integer() else found


class QuotaAsk(Client):
    """Ask for more of a limit of yours: `quota ask bob-one --amount 3 --until 2030-01-31 --reason "a deadline"`."""

    name = "jupyter-hubgateway-quota-ask"
    description = __doc__
    takes_arguments = True
    aliases = {
        **Client.aliases,
        **{name: f"QuotaAsk.{name}" for name in ("amount", "until", "reason")},
    }
    amount = Unicode(help="How much you need in all; memory with its unit (64G).").tag(config=True)
    until = Unicode(help="Until when you need it: a date, or a date and time.").tag(config=True)
    reason = Unicode(help="What for.").tag(config=True)

    def run(self) -> int:
        """Open the request."""
        policy = self.argument("the name of a limit, see `quota limits`")
        body = {"policy": policy, "amount": _number(self.amount), "until": self.until, "reason": self.reason}
        found = self.ask("api/requests", "POST", body)
        print(json.dumps(found, indent=2) if self.as_json else f"request {found['id']} is open")
        return 0


class QuotaRequests(Client):
    """List requests for more: yours, and those that you may answer."""

    name = "jupyter-hubgateway-quota-requests"
    description = __doc__
    aliases = {**Client.aliases, "state": "QuotaRequests.state"}
    state = Unicode("open", help="open, granted, refused, withdrawn; all is all.").tag(config=True)

    def run(self) -> int:
        """A table."""
        state = None if self.state == "all" else self.state
        found = self.ask("api/requests", state=state, limit=200)
        following = found.pop("next")
        while following is not None:
            page = self.ask("api/requests", state=state, limit=200, after=following)
            found["requests"] += page["requests"]
            following = page["next"]
        names = ("id", "owner", "policy", "amount", "until", "state", "reason", "answer")
        self.show(found, {name: name for name in names}, found["requests"], "No requests.")
        return 0


class QuotaAnswer(Client):
    """Answer a request: `quota answer 7 --grant`, or `quota answer 7 --text "why not"`."""

    name = "jupyter-hubgateway-quota-answer"
    description = __doc__
    takes_arguments = True
    aliases = {
        **Client.aliases,
        **{name: f"QuotaAnswer.{name}" for name in ("amount", "until", "text")},
    }
    flags = {**Client.flags, "grant": ({"QuotaAnswer": {"grant": True}}, "Grant it.")}
    grant = Bool(False, help="Grant it; without this it is refused.").tag(config=True)
    amount = Unicode(help="How much to grant; by default what was asked for.").tag(config=True)
    until = Unicode(help="Until when; by default as was asked for.").tag(config=True)
    text = Unicode(help="What to say to the user.").tag(config=True)

    def run(self) -> int:
        """Answer it."""
        body: dict[str, Any] = {"grant": self.grant, "text": self.text}
        if self.amount:
            body["amount"] = _number(self.amount)
        if self.until:
            body["until"] = self.until
        number = self.argument("the number of a request")
        if not (number.isascii() and number.isdigit()):
            self.fail(f"{number!r} is no number of a request", "see `quota requests`")
        found = self.ask(f"api/requests/{number}/answer", "POST", body)
        print(json.dumps(found, indent=2) if self.as_json else f"request {number}: {found['state']}")
        return 0
