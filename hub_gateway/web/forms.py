"""Forms that are carried out once: a double click, the back button or a recorded request does nothing a second time.

Each form that a page shows has a number of its own, signed, with who it is for. When it is carried out its number is
written to the database, where every replica sees it; a form that was refused, or only asked what would be, may be sent
again.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Table, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as Transaction
from tornado.web import HTTPError

from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import SentForm
from hub_gateway.errors import Conflict, Forbidden, GatewayError, Unavailable

if TYPE_CHECKING:
    from hub_gateway.db.engine import Database
    from hub_gateway.web.console import ConsoleHandler

__all__ = ["FIELD", "MAX_AGE", "number_of", "once", "signed_number"]

LOG = logging.getLogger("hub_gateway.web")
FIELD = "form_number"
MAX_AGE = timedelta(hours=12)
"""How long a page may lie open before its forms are too old."""
_TABLE = cast(Table, SentForm.__table__)
_CARRIED_OUT = 303


def signed_number(handler: ConsoleHandler) -> str:
    """A new number, for a form that who looks may send."""
    value = f"{secrets.token_hex(16)} {handler.caller.name}"
    return handler.create_signed_value(FIELD, value).decode("ascii")


def number_of(handler: ConsoleHandler) -> str:
    """The number of the form that was sent. Raises `Forbidden` where it has none of ours, or somebody else's."""
    sent = handler.get_body_argument(FIELD, "")
    found = handler.get_secure_cookie(FIELD, sent, max_age_days=MAX_AGE / timedelta(days=1)) if sent else None
    number, _, name = (found or b"").decode("utf-8").partition(" ")
    if not number or name != handler.caller.name:
        raise Forbidden(
            "This form was not sent from a page of the gateway, or has grown old, and nothing was changed; open "
            "the page again and repeat it."
        )
    return number


async def take(db: Database, number: str) -> None:
    """Remember that a form is carried out. Raises `Conflict` where it was before."""
    now = utcnow()

    def write(tx: Transaction) -> None:
        tx.connection().execute(delete(_TABLE).where(_TABLE.c.until < now))
        if tx.connection().execute(select(_TABLE.c.number).where(_TABLE.c.number == number)).first() is not None:
            raise _again()
        tx.connection().execute(_TABLE.insert().values(number=number, until=now + 2 * MAX_AGE))

    try:
        await db.write(write)
    except IntegrityError as error:
        # At the same moment, through another replica.
        raise _again() from error


async def give_back(db: Database, number: str) -> None:
    """Let a form that changed nothing be sent again."""
    await db.write(lambda tx: tx.connection().execute(delete(_TABLE).where(_TABLE.c.number == number)))


def once(post: Callable[..., Awaitable[None] | None]) -> Callable[..., Awaitable[None]]:
    """A `post` that carries each form out once: what it answers with a redirect has changed something, nothing else."""

    @functools.wraps(post)
    async def carried_out(handler: ConsoleHandler, *args: Any) -> None:
        handler.check_form()
        db, number = handler.services.db, number_of(handler)
        await take(db, number)
        try:
            # Who has the answer may send the form again at once.
            with handler.held_back():
                answering = post(handler, *args)
                if answering is not None:
                    await answering
                if handler.get_status() != _CARRIED_OUT:
                    await _let_again(db, number)
        except (GatewayError, HTTPError) as error:
            # Where the gateway itself failed nobody knows what was done.
            if getattr(error, "status", getattr(error, "status_code", 500)) < 500:
                await give_back(db, number)
            raise

    return carried_out


async def _let_again(db: Database, number: str) -> None:
    try:
        await give_back(db, number)
    except Unavailable as error:
        # The page that is sent has a number of its own.
        LOG.warning("A form cannot be sent again: %s", error.message)


def _again() -> Conflict:
    return Conflict(
        "This form was sent before, and is not carried out a second time; look at what it has done, and open the page "
        "anew for another change."
    )
