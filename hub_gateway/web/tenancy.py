"""What the handlers of quotas, usage, audit and identity share: powers, and strict reading of what is asked."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from hub_gateway.errors import BadRequest, NotFound, Unauthenticated
from hub_gateway.quotas.fields import Body, moment_of
from hub_gateway.web.authority import Authority
from hub_gateway.web.base import APIHandler, json_body, token_of

if TYPE_CHECKING:
    from hub_gateway.web.parts import AuditPart, IdentityPart, QuotaPart, ReportsPart

__all__ = ["Query", "TenancyHandler", "cursor", "read_cursor"]

T = TypeVar("T")
MAX_TEXT = 255
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class TenancyHandler(APIHandler):
    """A handler of the REST API whose callers need powers."""

    def authority(self) -> Authority:
        """The rules for the caller, as their token was known at most some seconds ago: good enough for looking."""
        return Authority(self.services, self.caller)

    async def privileged(self) -> Authority:
        """The rules for the caller, whose token is looked up anew at the Hub: for everything that changes something.

        Raises `Unauthenticated` for one that was revoked meanwhile, and `Unavailable`.
        """
        caller = await self.services.authenticator.authenticate(
            token_of(self.request) or "", remote_ip=self.request.remote_ip or "", fresh=True
        )
        if caller is None:
            raise Unauthenticated("The token has been revoked or has expired; log in again.")
        self.caller = caller
        return Authority(self.services, caller, fresh=True)

    @property
    def quotas(self) -> QuotaPart:
        """The part that knows policies and limits."""
        return _there(self.services.quotas)

    @property
    def identity(self) -> IdentityPart:
        """The part that maps users to principals."""
        return _there(self.services.identity)

    @property
    def audit(self) -> AuditPart:
        """The audit trail."""
        return _there(self.services.audit)

    @property
    def reports(self) -> ReportsPart:
        """The ledger's reports."""
        return _there(self.services.reports)

    def query(self, *names: str) -> Query:
        """The arguments of the address, which must be among these."""
        return Query(self, names)

    def fields(self, *names: str) -> Body:
        """The body, whose fields must be among these."""
        return Body(json_body(self), names)


def _there(part: T | None) -> T:
    if part is None:
        raise NotFound("This gateway is set up without this part.")
    return part


class Query:
    """Arguments of an address: each at most once, none that is not known, and no control characters."""

    def __init__(self, handler: APIHandler, names: Sequence[str]) -> None:
        self._found: dict[str, str] = {}
        for name, values in handler.request.query_arguments.items():
            if name not in names:
                known = ", ".join(names) or "none"
                raise BadRequest(f"The argument `{_short(name)}` is not known here; known are: {known}.")
            if len(values) != 1:
                raise BadRequest(f"The argument `{name}` is given {len(values)} times; give it once.")
            # Not tornado's own reading, which makes blanks of control characters.
            self._found[name] = handler.decode_argument(values[0], name)

    def text(self, name: str, *, size: int = MAX_TEXT) -> str | None:
        """A string, None where it is missing or empty."""
        value = self._found.get(name)
        if value is not None and (len(value) > size or _UNPRINTABLE.search(value)):
            raise BadRequest(f"The argument `{name}` must be one line of at most {size} characters.")
        return value or None

    def needed(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise BadRequest(f"The argument `{name}` is missing; add `?{name}=...` to the address.")
        return value

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in a range."""
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,18}", value) or not low <= int(value) <= high:
            raise BadRequest(f"The argument `{name}` must be a whole number from {low} to {high}.")
        return int(value)

    def choice(self, name: str, allowed: Iterable[str], default: str | None = None) -> str | None:
        """One of some words."""
        value = self.text(name)
        if value is None:
            return default
        words = tuple(allowed)
        if value not in words:
            raise BadRequest(f"The argument `{name}` must be one of {', '.join(words)}.")
        return value

    def flag(self, name: str) -> bool:
        """Yes or no; missing is no."""
        return self.choice(name, ("true", "false", "1", "0"), "false") in ("true", "1")

    def moment(self, name: str) -> datetime | None:
        """A date (its first instant, UTC) or a date and time."""
        value = self.text(name)
        return None if value is None else moment_of(name, value)


def cursor(*key: Any) -> str:
    """Where a page ends, for `after` of the next one: the sort key of its last row."""
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).decode().rstrip("=")


def read_cursor(text: str | None, *kinds: type | tuple[type, ...]) -> list[Any] | None:
    """The sort key again; each part must be of its type. Raises `BadRequest`."""
    if text is None:
        return None
    try:
        found = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise _bad_cursor() from error
    if not isinstance(found, list) or len(found) != len(kinds):
        raise _bad_cursor()
    for part, kind in zip(found, kinds, strict=True):
        if (
            not isinstance(part, kind)
            or isinstance(part, bool)
            or (isinstance(part, float) and not math.isfinite(part))
        ):
            raise _bad_cursor()
        if isinstance(part, str) and (len(part) > 1024 or _UNPRINTABLE.search(part)):
            raise _bad_cursor()
        if isinstance(part, int) and abs(part) >= 2**63:
            raise _bad_cursor()
    return found


def _bad_cursor() -> BadRequest:
    return BadRequest("The argument `after` is not one that this gateway gave; begin again at the first page.")


def _short(name: str) -> str:
    return _UNPRINTABLE.sub("?", name)[:60]
