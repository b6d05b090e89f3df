"""The few files that pages need, read once."""

from __future__ import annotations

import mimetypes
from functools import lru_cache
from pathlib import Path

from jupyterhub._data import DATA_FILES_PATH

from hub_gateway.errors import NotFound
from hub_gateway.web.base import BaseHandler

__all__ = ["StaticHandler", "static_files"]


@lru_cache(maxsize=1)
def static_files() -> dict[str, bytes]:
    """Every file by its name; `hub.css` is the Hub's own style sheet, as jupyterhub is installed with it."""
    own = {file.name: file.read_bytes() for file in (Path(__file__).parent / "static").iterdir() if file.is_file()}
    hub = Path(DATA_FILES_PATH) / "static" / "css" / "style.min.css"
    return {"hub.css": hub.read_bytes() if hub.is_file() else b"", **own}


class StaticHandler(BaseHandler):
    """A style sheet or picture. No name is ever looked up on the disk."""

    def get(self, name: str) -> None:
        found = static_files().get(name)
        if found is None:
            raise NotFound("There is nothing at this address of the gateway.")
        self.set_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        self.set_header("Cache-Control", "public, max-age=3600")
        self.finish(found)
