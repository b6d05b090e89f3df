"""The few files that pages need, read once."""

from __future__ import annotations

import hashlib
import mimetypes
import re
from functools import lru_cache
from pathlib import Path

from jupyterhub._data import DATA_FILES_PATH

from hub_gateway.errors import NotFound
from hub_gateway.web.base import BaseHandler

__all__ = ["StaticHandler", "static_files", "versioned"]

_IMPORT = re.compile(rb"@import[^;]*;")
FOR_EVER = "public, max-age=31536000, immutable"
FOR_AN_HOUR = "public, max-age=3600"


@lru_cache(maxsize=1)
def static_files() -> dict[str, bytes]:
    """Every file by its path below static/; `hub.css` is the Hub's own style sheet, as jupyterhub has it installed."""
    root = Path(__file__).parent / "static"
    own = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    hub = Path(DATA_FILES_PATH) / "static" / "css" / "style.min.css"
    # It imports fonts of icons, from beside itself: no page here has one.
    style = _IMPORT.sub(b"", hub.read_bytes()) if hub.is_file() else b""
    return {"hub.css": style, **own}


@lru_cache(maxsize=100)
def _version(name: str) -> str:
    return hashlib.sha256(static_files()[name]).hexdigest()[:16]


def versioned(name: str) -> str:
    """The address of a file below static/, with its hash: another content has another address."""
    return f"{name}?v={_version(name)}"


class StaticHandler(BaseHandler):
    """A style sheet or script. No name is ever looked up on the disk."""

    def get(self, name: str) -> None:
        found = static_files().get(name)
        if found is None:
            raise NotFound("There is nothing at this address of the gateway.")
        self.set_header("Content-Type", mimetypes.guess_type(name)[0] or "text/plain; charset=UTF-8")
        lasts = self.get_query_argument("v", "") == _version(name)
        self.set_header("Cache-Control", FOR_EVER if lasts else FOR_AN_HOUR)
        self.finish(found)
