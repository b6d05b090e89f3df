"""`column IN names`, for any number of names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, String, bindparam, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session as Transaction

__all__ = ["among"]


def among(tx: Transaction, column: Any, names: Iterable[str]) -> ColumnElement[bool]:
    """`column IN names`, however many they are: one parameter. At most once in a statement."""
    listed = list(names)
    if tx.get_bind().dialect.name == "sqlite":
        # IN (?, ?, ...) has a limit of parameters, and every length is a statement of its own.
        table = text("SELECT value FROM json_each(:hg_names)").bindparams(hg_names=json.dumps(listed))
        found: ColumnElement[bool] = column.in_(table.columns(value=String).scalar_subquery())
    else:
        found = column == func.any(bindparam("hg_names", listed, type_=ARRAY(String)))
    return found
