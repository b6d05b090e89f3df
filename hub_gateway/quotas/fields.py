"""Strict reading of what somebody sends: none but known fields, each of its type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timezone
from typing import Any

from hub_gateway.errors import BadRequest

__all__ = ["Body", "moment_of"]

MAX_TEXT = 255
MAX_NOTE = 2000
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNPRINTABLE_NOTE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Body:
    """The fields of a document: none that is not known, each of its type."""

    def __init__(self, found: Mapping[str, Any], names: Sequence[str]) -> None:
        for name in found:
            if name not in names:
                raise BadRequest(
                    f"The field `{_short(name)}` is not known here; known are: {', '.join(names) or 'none'}."
                )
        self.found = found

    def text(self, name: str, *, size: int = MAX_TEXT, needed: bool = False) -> str:
        """One line of text, "" where it is missing."""
        value = self.found.get(name)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or len(value) > size or _UNPRINTABLE.search(value) or (needed and not value):
            raise BadRequest(f"The field `{name}` must be a string: one line of at most {size} characters.")
        return value

    def note(self, name: str, *, needed: bool = False) -> str:
        """Some lines of text, "" where they are missing."""
        value = self.found.get(name)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or len(value) > MAX_NOTE or _UNPRINTABLE_NOTE.search(value):
            raise BadRequest(f"The field `{name}` must be a text of at most {MAX_NOTE} characters.")
        if needed and not value.strip():
            raise BadRequest(f"The field `{name}` must not be empty; write a sentence.")
        return value.strip()

    def number(self, name: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite number in a range."""
        value = self.found.get(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high:  # which NaN is not either
            raise BadRequest(f"The field `{name}` must be a number from {low:g} to {high:g}.")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.found.get(name, default)
        if not isinstance(value, bool):
            raise BadRequest(f"The field `{name}` must be true or false.")
        return value

    def moment(self, name: str) -> datetime | None:
        """A date or a date and time, None where it is missing."""
        value = self.text(name)
        return moment_of(name, value) if value else None

    def names(self, name: str, most: int) -> list[str]:
        """A list of strings, none of them twice."""
        value = self.found.get(name)
        if (
            not isinstance(value, list)
            or not 0 < len(value) <= most
            or not all(isinstance(one, str) and 0 < len(one) <= MAX_TEXT for one in value)
            or any(_UNPRINTABLE.search(one) for one in value)
        ):
            raise BadRequest(f"The field `{name}` must be a list of 1 to {most} strings.")
        return list(dict.fromkeys(value))


def moment_of(name: str, value: str) -> datetime:
    """A date (its first instant) or a date and time; without a zone it is UTC. Raises `BadRequest`."""
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
            found = datetime.combine(date.fromisoformat(value), time(), timezone.utc)
        elif re.fullmatch(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?", value):
            found = datetime.fromisoformat(_six_digits(value.replace("Z", "+00:00")))
        else:
            raise ValueError(value)
        found = found if found.tzinfo else found.replace(tzinfo=timezone.utc)
        # The outermost years have no equal in every zone.
        if not 1971 <= found.year <= 9000:
            raise ValueError(value)
        return found.astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise BadRequest(
            f"`{name}` must be a date or a date and time, such as 2030-01-31 or 2030-01-31T12:00:00Z."
        ) from error


def _six_digits(value: str) -> str:
    """Fractions of a second as Python 3.10 reads them."""
    return re.sub(r"\.(\d{1,6})", lambda found: "." + found[1].ljust(6, "0"), value)


def _short(name: str) -> str:
    return _UNPRINTABLE.sub("?", name)[:60]
