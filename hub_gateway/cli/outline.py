"""JSON as a text for people."""

from __future__ import annotations

from typing import Any

from hub_gateway.cli.client import cell

__all__ = ["outline"]


def outline(value: Any, indent: int = 0) -> None:
    """Print objects and lists as an indented outline; what is empty is left out."""
    space = "  " * indent
    items = value.items() if isinstance(value, dict) else (("-", one) for one in value)
    for name, item in items:
        label = name.replace("_", " ") + ("" if name == "-" else ":")
        if isinstance(item, dict | list) and item:
            print(f"{space}{label}")
            outline(item, indent + 1)
        elif item not in (None, "", [], {}):
            print(f"{space}{label} {cell(item)}")
