"""`jupyter hubgateway quota`: limits of users and groups, over the gateway's REST interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from traitlets import Bool, Integer, Unicode

from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client, cell, print_table
from hub_gateway.cli.documents import QuotaApply, QuotaDiff, QuotaExport, QuotaImport, QuotaSimulate
from hub_gateway.cli.outline import outline
from hub_gateway.cli.requests import QuotaAnswer, QuotaAsk, QuotaRequests

__all__ = ["Quota"]

NUMBERS = ("priority",)
AMOUNTS = ("hard", "soft", "burst")
SECONDS = ("burst_seconds", "queue_seconds", "grace_seconds", "window_seconds")
WORDS = (
    "subject",
    "object",
    "resource",
    "gpu_model",
    "counts",
    "window",
    "period",
    "timezone",
    "action",
    "valid_from",
    "valid_until",
    "note",
)
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
COLUMNS = {
    "name": "policy",
    "subject": "whom",
    "object": "of what",
    "resource": "resource",
    "counts": "counts",
    "window": "window",
    "soft": "soft",
    "hard": "hard",
    "action": "else",
    "priority": "priority",
    "valid_until": "until",
}


def address(name: str) -> str:
    """Where a policy is."""
    return f"api/quota/policies/{quote(name, safe='')}"


def number(text: str) -> float | str | None:
    """An amount as JSON: a number where it is one, None for "none", otherwise as it is written (4G)."""
    if text.lower() == "none":
        return None
    try:
        found = float(text)
    except ValueError:
        return text
    return int(found) if found.is_integer() else found


def seconds(text: str, fail: Any) -> int | None:
    """A duration such as 90, 30min, 12h, 7d; None for "none"."""
    if text.lower() == "none":
        return None
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :] or "s"
    if not digits.isascii() or not digits.isdigit() or unit not in UNITS:
        fail(f"{text!r} is no duration", f"write 90, or a number with one of {', '.join(UNITS)}")
    return int(digits) * UNITS[unit]


class _Policy(Client):
    """A command that says what a policy is to be."""

    aliases = {
        **Client.aliases,
        **{name.replace("_", "-"): f"_Policy.{name}" for name in (*WORDS, *AMOUNTS, *SECONDS, *NUMBERS)},
        "from": "_Policy.valid_from",
        "until": "_Policy.valid_until",
        "weekly": "_Policy.weekly",
    }
    flags = {
        **Client.flags,
        "disabled": ({"_Policy": {"enabled": False}}, "Keep the policy, but do not apply it."),
        "enabled": ({"_Policy": {"enabled": True}}, "Apply a policy again that was disabled."),
        "delegated": (
            {"_Policy": {"delegated": True}},
            "Have it hold beside administrators' limits, as a lead's: lower, if anything. Leads may change it.",
        ),
        "not-delegated": ({"_Policy": {"delegated": False}}, "Make a limit of administrators of it."),
        "dry-run": ({"_Policy": {"dry_run": True}}, "Only say what is wrong with it."),
    }

    subject = Unicode(help="Whom it is about: user:NAME, group:NAME, service:NAME or everyone.").tag(config=True)
    object = Unicode(help="Of what: any, kernelspec:GLOB, proxy:GLOB or queue:GLOB.").tag(config=True)
    resource = Unicode(help="kernels, starting, cpu, memory, gpu, kernel_hours, core_hours, gpu_hours or cost.").tag(
        config=True
    )
    gpu_model = Unicode(help="A GPU model; empty is all of them together.").tag(config=True)
    counts = Unicode(help="What is compared with it: each (user), together, or (one) kernel.").tag(config=True)
    window = Unicode(help="Over which time: now, rolling (--window-seconds) or calendar (--period).").tag(config=True)
    window_seconds = Unicode(help="Length of a rolling window: 12h, 7d.").tag(config=True)
    period = Unicode(help="Of a calendar window: day, week or month.").tag(config=True)
    timezone = Unicode(help="Of calendar windows and weekly times, such as Europe/Berlin.").tag(config=True)
    hard = Unicode(help="The limit: a number, for memory with its unit (64G); none is no limit.").tag(config=True)
    soft = Unicode(help="From which amount on notices are sent; none is none.").tag(config=True)
    burst = Unicode(help="How far above the limit one may go for --burst-seconds.").tag(config=True)
    burst_seconds = Unicode(help="For how long: 30min.").tag(config=True)
    action = Unicode(help="What happens to a launch that does not fit: reject or queue.").tag(config=True)
    queue_seconds = Unicode(help="For how long it may wait in the queue; none is for ever.").tag(config=True)
    grace_seconds = Unicode(
        help="After how long above the limit kernels are stopped; none (the default) stops nobody."
    ).tag(config=True)
    priority = Integer(None, allow_none=True, help="The highest one wins.").tag(config=True)
    valid_from = Unicode(help="From when on it holds: 2030-01-31, or with a time; none.").tag(config=True)
    valid_until = Unicode(help="Until when it holds; none.").tag(config=True)
    weekly = Unicode(
        help="""Times of the week at which it holds, as JSON:

            [{"days": [0, 1, 2, 3, 4], "begin": "08:00", "end": "18:00"}]

        Days count from Monday, which is 0. none is always.
        """
    ).tag(config=True)
    note = Unicode(help="Why it is there.").tag(config=True)
    enabled = Bool(
        None, allow_none=True, help="Whether it is applied; by default as it is, and yes for a new one."
    ).tag(config=True)
    delegated = Bool(
        None, allow_none=True, help="Whether it is a lead's; by default as it is, and for a new one as who sets it."
    ).tag(config=True)
    dry_run = Bool(False, help="Only say what is wrong with it.").tag(config=True)

    def asked(self) -> dict[str, Any]:
        """The fields that the options give."""
        found: dict[str, Any] = {}
        for name in (*WORDS, *AMOUNTS, *SECONDS):
            text = getattr(self, name)
            if text == "":
                continue
            if name in AMOUNTS:
                found[name] = number(text)
            elif name in SECONDS:
                found[name] = seconds(text, self.fail)
            else:
                found[name] = None if text.lower() == "none" else text
        if self.weekly:
            try:
                found["weekly"] = [] if self.weekly.lower() == "none" else json.loads(self.weekly)
            except ValueError:
                self.fail("--weekly is not JSON", self.name + " --help")
        if self.priority is not None:
            found["priority"] = self.priority
        for name in ("enabled", "delegated"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def put(self, name: str, body: Mapping[str, Any]) -> int:
        """Send it; the exit code."""
        found = self.ask(address(name), "PUT", body, dry_run="true" if self.dry_run else None)
        if self.as_json:
            print(json.dumps(found, indent=2))
            return 0
        for problem in found["problems"]:
            print(f"{problem['level']}: {problem['sentence']}")
        print(f"{name}: {'nothing was changed (--dry-run)' if self.dry_run else 'set'}")
        return 0


class QuotaSet(_Policy):
    """Set or change a policy: `quota set bob-one --subject user:bob --resource kernels --hard 1`.

    Of a policy that exists only what is given is changed.
    """

    name = "jupyter-hubgateway-quota-set"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """Read it as it is, and send it with its version, so that nobody else's change is lost."""
        name = self.argument("the name of a policy")
        listed = self.ask("api/quota/policies", limit=1000, q=name)["policies"]
        before: dict[str, Any] = next((one for one in listed if one["name"] == name), {})
        kept = {key: value for key, value in before.items() if value is not None}
        return self.put(name, {**kept, **self.asked()})


class QuotaGrant(_Policy):
    """Give one user more for a time: `quota grant bob --resource kernels --hard 3 --until 2030-01-31`."""

    name = "jupyter-hubgateway-quota-grant"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """A grant's name says whom it is for and of what."""
        user = self.argument("the name of a user")
        body = {**self.asked(), "subject": f"user:{user}", "origin": "grant"}
        if not self.valid_until or not self.hard:
            self.fail("how much, and until when?", "give --hard and --until")
        resource = str(body.get("resource") or "kernels")
        name = f"grant-{''.join(c if c.isalnum() and c.isascii() else '-' for c in user)}-{resource}"
        listed = self.ask("api/quota/policies", limit=1000, q=name)["policies"]
        taken = {one["name"] for one in listed}
        free = next(wanted for wanted in (name, *(f"{name}-{n}" for n in range(2, 2000))) if wanted not in taken)
        return self.put(free, body)


class QuotaDelete(Client):
    """Delete a policy: `quota delete NAME`."""

    name = "jupyter-hubgateway-quota-delete"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """What it limited is limited by the next one, or not at all."""
        name = self.argument("the name of a policy")
        self.ask(address(name), "DELETE")
        print(f"{name}: deleted")
        return 0


class QuotaShow(Client):
    """Show all policies, or one: `quota show [NAME]`."""

    name = "jupyter-hubgateway-quota-show"
    description = __doc__
    takes_arguments = True

    def run(self) -> int:
        """A table, or one fact a line."""
        if self.extra_args:
            found = self.ask(address(self.argument("the name of a policy")))
            if self.as_json:
                print(json.dumps(found, indent=2))
            else:
                print_table([[name, cell(value)] for name, value in found.items()])
            return 0
        policies: list[dict[str, Any]] = []
        after = None
        while True:
            page = self.ask("api/quota/policies", limit=1000, after=after)
            policies += page["policies"]
            after = page["next"]
            if after is None:
                break
        self.show(policies, COLUMNS, policies, "No policies.")
        return 0


class QuotaLimits(Client):
    """Show your limits, and what you hold of them; with --user those of somebody else."""

    name = "jupyter-hubgateway-quota-limits"
    description = __doc__
    aliases = {**Client.aliases, "user": "QuotaLimits.user"}
    user = Unicode(help="Whose; by default yours.").tag(config=True)

    def run(self) -> int:
        """A table."""
        found = self.ask("api/limits", user=self.user or None)
        columns = {name: name.replace("_", " ") for name in ("policy", "resource", "object", "counts", "window")}
        columns |= {"used": "used", "soft": "soft", "hard": "hard", "state": "state"}
        self.show(found, columns, [_flat(one) for one in found["limits"]], "No limits.")
        if found["maintenance"] and not self.as_json:
            print(found["maintenance"])
        return 0


class QuotaQueue(Client):
    """Show what waits in the queue."""

    name = "jupyter-hubgateway-quota-queue"
    description = __doc__

    def run(self) -> int:
        """A table."""
        found = self.ask("api/queue")
        columns = {name: name.replace("_", " ") for name in ("queue", "position", "owner", "kernelspec", "reason")}
        self.show(found, columns, found["queue"], "Nothing waits.")
        return 0


class QuotaExplain(Client):
    """Explain which limits apply to you or to a user, and why: `quota explain [USER] [--kernelspec NAME]`."""

    name = "jupyter-hubgateway-quota-explain"
    description = __doc__
    takes_arguments = True
    aliases = {**Client.aliases, "kernelspec": "QuotaExplain.kernelspec"}
    kernelspec = Unicode(help="For which kernelspec; by default for any.").tag(config=True)

    def run(self) -> int:
        """What the gateway says, as an outline."""
        user = self.argument("the name of a user") if self.extra_args else None
        found = self.ask("api/quota/explain", user=user, kernelspec=self.kernelspec or None)
        if self.as_json:
            print(json.dumps(found, indent=2))
        else:
            outline(found)
        return 0


class Quota(Group):
    """Limits of users and groups."""

    name = "jupyter-hubgateway-quota"
    description = __doc__
    subcommands = {
        cls.name.rpartition("-")[2]: (cls, cls.__doc__)
        for cls in (
            QuotaLimits,
            QuotaShow,
            QuotaSet,
            QuotaDelete,
            QuotaExplain,
            QuotaSimulate,
            QuotaExport,
            QuotaImport,
            QuotaDiff,
            QuotaApply,
            QuotaGrant,
            QuotaAsk,
            QuotaRequests,
            QuotaAnswer,
            QuotaQueue,
        )
    }


def _flat(limit: Mapping[str, Any]) -> dict[str, Any]:
    """A limit whose policy may be there as a whole, with the policy's name for it."""
    policy = limit.get("policy")
    return {**policy, **limit, "policy": policy["name"]} if isinstance(policy, dict) else dict(limit)
