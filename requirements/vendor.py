#!/usr/bin/env python3
"""Copy what the console's pages carry from npm's packages: `make vendor`.

The versions are those of package-lock.json, whose hashes npm checks. Beside the files lies `vendored.json`: from which
package each one is, and its SHA-256, to which a test holds them. They are kept in the repository, so that neither
a build nor a page needs npm or another host.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "hub_gateway" / "web" / "static" / "vendor"
FILES = {
    "htmx.org": {"dist/htmx.min.js": "htmx.min.js", "LICENSE": "htmx.LICENSE"},
    "uplot": {
        "dist/uPlot.iife.min.js": "uPlot.iife.min.js",
        "dist/uPlot.min.css": "uPlot.min.css",
        "LICENSE": "uPlot.LICENSE",
    },
}
"""Package -> its file -> its name here."""


def main() -> None:
    """Fetch the packages into a temporary directory, copy the files, and write down what they are."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("vendor.py: there is no npm on this machine; on Debian: apt-get install npm")
    with tempfile.TemporaryDirectory() as directory:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / name, directory)
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
        done = subprocess.run([npm, "ci", "--include=dev", *quiet], cwd=directory, check=False)
        if done.returncode != 0:
            sys.exit(f"vendor.py: `npm ci` failed with exit code {done.returncode}")
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir(parents=True)
        written = {}
        for package, files in FILES.items():
            source = Path(directory, "node_modules", package)
            version = json.loads((source / "package.json").read_text())["version"]
            for path, name in files.items():
                content = (source / path).read_bytes()
                (TARGET / name).write_bytes(content)
                sha256 = hashlib.sha256(content).hexdigest()
                written[name] = {"package": package, "version": version, "sha256": sha256}
                print(f"{name}: {package} {version}")
        (TARGET / "vendored.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
