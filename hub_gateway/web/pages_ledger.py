"""The ledger, for who keeps it: prices, months that are closed, and corrections."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session as Transaction
from tornado.web import authenticated

from hub_gateway.auth.scopes import LEDGER_WRITE
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import LedgerMonth
from hub_gateway.errors import BadRequest, Conflict, GatewayError, NotFound
from hub_gateway.quotas.fields import moment_of
from hub_gateway.quotas.ledger import entries
from hub_gateway.quotas.prices import RATES
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.usage import MAX_PRICE

__all__ = ["ClosePage", "CorrectPage", "LedgerHandler", "PricesPage"]

MONTHS, ENTRIES = 36, 20
TYPED = (*RATES, "gpu_models", "valid_from", "month", "entry", "seconds", "cost_center", "note")


class LedgerHandler(ConsoleHandler):
    """Price lists and months; the forms below it post to pages of their own."""

    @authenticated
    async def get(self) -> None:
        self.require(LEDGER_WRITE)
        await self.ledger()

    async def ledger(self, error: GatewayError | None = None) -> None:
        """The page, beside what went wrong where something did."""
        reports = self.reports
        wanted = self.chosen({"user": ""})["user"]
        prices, months, newest = await self.services.db.read(
            lambda tx: (list(reports.prices(tx)), _months(tx), entries(tx, owner=wanted or None, limit=ENTRIES))
        )
        last = utcnow().replace(day=1) - timedelta(days=1)
        usual = {"month": f"{last:%Y-%m}", **dict.fromkeys(RATES, "0")}
        if prices:
            usual |= {name: f"{getattr(prices[0], name):.12g}" for name in RATES}
            usual["gpu_models"] = "\n".join(f"{model}: {price:.12g}" for model, price in prices[0].gpu_models.items())
        typed = {name: self.field(name, "" if error else usual.get(name, "")) for name in TYPED}
        if error is not None:
            typed = {name: value or usual.get(name, "") for name, value in typed.items()}
        self.page(
            "admin_ledger.html",
            "Ledger",
            "admin/ledger",
            prices=prices,
            months=months,
            entries=newest,
            wanted=wanted,
            typed=typed,
            rates=RATES,
            currency=getattr(reports, "currency", ""),
            sentence="" if error is None else error.message,
        )

    async def keep(self, change: Any) -> Any:
        """Make a change in a transaction, for who may; None where it was refused, and the page has been answered."""
        self.check_form()
        await self.privileged()
        require_scope(self.caller, LEDGER_WRITE)
        try:
            act = change()
            return await self.services.db.write(act)
        except (BadRequest, Conflict, NotFound) as error:
            # What was typed stays, beside the reason.
            self.set_status(error.status)
            await self.ledger(error)
            return None


class PricesPage(LedgerHandler):
    """A new price list."""

    async def post(self) -> None:
        made = await self.keep(self._change)
        if made is not None:
            since = f"{made.valid_from:%Y-%m-%d %H:%M} UTC"
            self.done("admin/ledger", f"Price list {made.version} holds for what is launched from {since} on.")

    def _change(self) -> Any:
        prices: dict[str, Any] = {name: _price(name.replace("_", " "), self.field(name) or "0") for name in RATES}
        models: dict[str, float] = {}
        for line in self.field("gpu_models").splitlines():
            model, colon, price = line.rpartition(":")
            if not line.strip():
                continue
            if not colon or not 0 < len(model.strip()) <= 64 or len(models) >= 100:
                raise BadRequest("Each line of prices of GPU models is a model and its price, such as `a100: 2.5`.")
            models[model.strip()] = _price(f"The price of {model.strip()}", price.strip())
        begins = self.field("valid_from")
        since = moment_of("For launches from", begins) if begins else None
        reports, actor = self.reports, self.caller.name
        return lambda tx: reports.set_prices(tx, actor, **prices, gpu_models=models, valid_from=since)


class ClosePage(LedgerHandler):
    """Close a month."""

    async def post(self) -> None:
        made = await self.keep(self._change)
        if made is not None:
            self.done("admin/ledger", f"The month {made.month} is closed, with {made.entries} entries.")

    def _change(self) -> Any:
        month = self.field("month")
        if not re.fullmatch(r"(19|20|21)\d{2}-(0[1-9]|1[0-2])", month):
            raise BadRequest(f"{month[:40]!r} is no month such as 2030-01.")
        if self.field("confirm") != "yes":
            raise BadRequest("A month is closed for good, so tick that you are sure; nothing was changed.")
        reports, actor = self.reports, self.caller.name
        return lambda tx: reports.close_month(tx, month, actor)


class CorrectPage(LedgerHandler):
    """Put an entry right, by a new one."""

    async def post(self) -> None:
        made = await self.keep(self._change)
        if made is not None:
            self.done("admin/ledger", f"Entry {made['corrects']} is corrected by entry {made['id']}.")

    def _change(self) -> Any:
        entry, seconds, note = self.field("entry"), self.field("seconds"), self.field("note")
        if not re.fullmatch(r"[0-9]{1,15}", entry) or int(entry) == 0:
            raise BadRequest(f"{entry[:40]!r} is no number of an entry of the ledger.")
        seconds, centre = seconds or "0", self.field("cost_center")[:255] or None
        if not re.fullmatch(r"[+-]?[0-9]{1,9}(\.[0-9]{1,6})?", seconds):
            raise BadRequest(f"{seconds[:40]!r} is no number of seconds such as 3600 or -120.")
        if not note:
            raise BadRequest("A correction needs a note that says why.")
        reports, actor = self.reports, self.caller.name
        return lambda tx: reports.correct(tx, int(entry), float(seconds), note, actor, centre)


def _price(what: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,9})?", text) or float(text) > MAX_PRICE:
        raise BadRequest(f"{what[:1].upper()}{what[1:100]} must be a price such as 0.25; {text[:40]!r} is none.")
    return float(text)


def _months(tx: Transaction) -> list[LedgerMonth]:
    found = list(tx.scalars(select(LedgerMonth).order_by(LedgerMonth.month.desc()).limit(MONTHS)))
    for one in found:
        tx.expunge(one)
    return found
