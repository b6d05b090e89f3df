"""Whether the lines that a cell printed came all, in order, and how many of them twice."""

from __future__ import annotations

from tests.harness.notebook import Message

__all__ = ["printed", "repeated"]

ENOUGH = 24
"""So many characters of consecutive numbers stand in one place only."""


def printed(messages: list[Message]) -> str:
    """What the cell printed, in the order in which it came."""
    return "".join(m["content"]["text"] for m in messages if m["header"]["msg_type"] == "stream")


def repeated(text: str, lines: int) -> int:
    """How many of the lines 0, 1, ... came twice; fails if anything is missing, or out of order but for repeated runs.

    A run may begin and end within a line: a kernel may send a line and its end apart.
    """
    right = "".join(f"{number}\n" for number in range(lines))
    place = at = again = 0
    while at < len(text):
        if place < len(right) and text[at] == right[place]:
            at, place = at + 1, place + 1
            continue
        came = text[at : at + ENOUGH]
        back = right.rfind(came, 0, place + len(came) - 1)
        assert back >= 0, f"after {text[max(0, at - ENOUGH) : at]!r} came {came!r}: output was lost"
        again += right[back:place].count("\n")
        place = back
    assert place == len(right), f"what came ends with {text[-ENOUGH:]!r}: output was lost"
    return again
