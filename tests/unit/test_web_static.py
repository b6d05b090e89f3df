"""Static files: what is carried from elsewhere is what it is said to be, and other contents have other addresses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hub_gateway.web.static import static_files, versioned

ROOT = Path(__file__).parent.parent.parent
VENDOR = ROOT / "hub_gateway" / "web" / "static" / "vendor"


def test_what_is_vendored_is_as_it_was_published() -> None:
    """`make vendor` writes both; npm has checked what it took against the hashes of package-lock.json."""
    recorded = json.loads((VENDOR / "vendored.json").read_text())
    here = {file.name for file in VENDOR.iterdir()} - {"vendored.json"}
    assert here == set(recorded)
    locked = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    wanted = json.loads((ROOT / "package.json").read_text())["devDependencies"]
    for name, entry in recorded.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == entry["sha256"], name
        version = locked[f"node_modules/{entry['package']}"]["version"]
        assert entry["version"] == version == wanted[entry["package"]], f"run `make vendor`: {name}"
    assert {entry["package"] for entry in recorded.values()} == set(wanted)
    for package in wanted:
        files = [name for name, entry in recorded.items() if entry["package"] == package]
        assert any(name.endswith(".LICENSE") for name in files), f"{package} comes with its licence"


def test_every_file_is_served_under_the_hash_of_its_content() -> None:
    for name, content in static_files().items():
        assert versioned(name) == f"{name}?v={hashlib.sha256(content).hexdigest()[:16]}"


def test_the_hubs_style_sheet_asks_for_nothing_that_is_not_here() -> None:
    style = static_files()["hub.css"]
    assert b".navbar" in style
    assert b"@import" not in style
    assert all(part.lstrip(b"\"'").startswith(b"data:") for part in style.split(b"url(")[1:])
