"""The explicit table of identities: a YAML (or JSON) file of Hub users and who they are."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Entry", "Table", "read_entries"]

MAX_BYTES = 16 * 2**20
_KEYS = {"principal", "unix_user", "cost_center", "shared", "refuse"}


@dataclass(frozen=True)
class Entry:
    """What the table says of one Hub user. `refuse` is the sentence with which they are refused, where it is one."""

    principal: str | None = None
    unix_user: str | None = None
    cost_center: str = ""
    shared: bool = False
    refuse: str = ""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the later one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} is no text; put it in quotes")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_entries(found: object) -> dict[str, Entry]:
    """The entries of a parsed table. Raises `ValueError` with a reason that names the Hub user."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError("it must be a mapping of Hub users to principals or to objects")
    return {_text(name, "a Hub user"): _entry(str(name), value) for name, value in found.items()}


def _entry(name: str, value: object) -> Entry:
    if isinstance(value, str):
        return Entry(principal=value)
    if not isinstance(value, Mapping) or not value or not set(value) <= _KEYS:
        raise ValueError(f"{name!r} must have a principal, or an object with {', '.join(sorted(_KEYS))}")
    if not isinstance(value.get("shared", False), bool):
        raise ValueError(f"`shared` of {name!r} must be true or false")
    texts = {key: _text(value[key], f"`{key}` of {name!r}") for key in _KEYS - {"shared"} if key in value}
    if "refuse" not in texts and not {"principal", "unix_user"} & set(texts):
        raise ValueError(f"{name!r} has neither a principal nor a unix user, and is not refused either")
    return Entry(shared=value.get("shared", False), **texts)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text, and not empty")
    return value


class Table:
    """The entries of a file, read again when it has changed. `entries` blocks: call it in a thread.

    A file that cannot be read, or that everybody may write, holds nobody back silently: `entries` raises `ValueError`,
    and whoever would be looked up is refused.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._known: tuple[tuple[int, int, int], dict[str, Entry]] | None = None

    def entries(self) -> Mapping[str, Entry]:
        """What the file says now."""
        try:
            with self.path.open("rb") as file:
                facts = self.path.stat()
                version = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
                if self._known is not None and self._known[0] == version:
                    return self._known[1]
                if facts.st_mode & stat.S_IWOTH:
                    raise ValueError("everybody may write it; take that right away (chmod o-w)")
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"it cannot be read: {error.strerror}") from error
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        try:
            found = read_entries(yaml.load(content, _Loader))  # noqa: S506 (a SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"it is no YAML: {' '.join(str(error).split())[:300]}") from error
        self._known = version, found
        return found
