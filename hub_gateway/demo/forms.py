"""Reads the forms of a page, as a browser does before it sends one."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

__all__ = ["Form", "forms_of"]


@dataclass
class Form:
    """One form: where it is sent, and what it would send if nobody changed anything."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self._form: Form | None = None
        self._select = ""
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name, value = given.get("name") or "", given.get("value")
        if tag == "form":
            self._form = Form(given.get("action") or "")
            if (given.get("method") or "").lower() == "post":
                self.forms.append(self._form)
        elif self._form is None:
            return
        elif tag == "input" and name:
            unchecked = given.get("type") in ("checkbox", "radio") and "checked" not in given
            if not unchecked and given.get("type") != "submit":
                self._form.fields[name] = value if value is not None else "on"
        elif tag == "select":
            self._select = name
        elif tag == "option" and self._select and ("selected" in given or self._select not in self._form.fields):
            self._form.fields[self._select] = value or ""
        elif tag == "textarea":
            self._text = name
            self._form.fields[name] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._select = ""
        elif tag == "textarea":
            self._text = ""

    def handle_data(self, data: str) -> None:
        if self._form is not None and self._text:
            self._form.fields[self._text] += data


def forms_of(page: str) -> list[Form]:
    """The forms of a page that are posted."""
    reader = _Reader()
    reader.feed(page)
    return reader.forms
