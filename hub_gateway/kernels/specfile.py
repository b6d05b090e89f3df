"""A kernelspec's `kernel.json`, read as Jupyter reads it, with a sentence where that cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from traitlets import TraitError

from hub_gateway.errors import BadRequest

__all__ = ["NAME", "filled", "loaded", "read_document"]

NAME = re.compile(r"(?!\.+\Z)[a-z0-9._-]+")
"""What Jupyter takes for a kernelspec's name, of dots alone excepted; it reads capital letters as small ones."""


def read_document(directory: Path) -> dict[str, Any]:
    """The JSON of a kernelspec's folder. Raises `BadRequest`."""
    file = directory / "kernel.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{file} is not encoded in UTF-8.") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"{file} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error
    if not isinstance(found, dict):
        raise BadRequest(f"{file} does not hold an object.")
    return found


def loaded(directory: Path) -> dict[str, Any]:
    """The kernelspec of a folder, with Jupyter's defaults where it says nothing. Raises `BadRequest`."""
    return filled(read_document(directory), str(directory))


def filled(document: dict[str, Any], directory: str) -> dict[str, Any]:
    """A document with Jupyter's defaults where it says nothing. Raises `BadRequest`."""
    known = {key: value for key, value in document.items() if key in KernelSpec.class_trait_names()}
    try:
        made: dict[str, Any] = KernelSpec(**{**known, "resource_dir": directory}).to_dict()
    except TraitError as error:
        raise BadRequest(f"Jupyter cannot load it: {_first_line(error)}") from error
    return made


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith(".") else f"{text}."
