"""Whether the numbers that a cell printed came all, in order, and how many of them twice."""

from __future__ import annotations

from tests.harness.notebook import Message

__all__ = ["numbers", "repeated"]


def numbers(messages: list[Message]) -> list[int]:
    """The numbers that the cell printed, in the order in which they came."""
    text = "".join(m["content"]["text"] for m in messages if m["header"]["msg_type"] == "stream")
    return [int(line) for line in text.split()]


def repeated(found: list[int], lines: int) -> int:
    """How many numbers came twice; fails if any is missing or out of order beyond one repeated run."""
    position, again = 0, 0
    for number in found:
        if number == position:
            position += 1
        else:
            assert number < position, f"{number} came before {position}: output was lost"
            again += 1
    assert position == lines, f"only {position} of {lines} lines came"
    return again
