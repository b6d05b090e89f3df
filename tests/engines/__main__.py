"""Install what is missing, where this runs as root on Debian; say in one line what is missing elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.engines import ENGINES, missing

# Neither questions, nor a database cluster and a service that nobody asked for: the tests make their own.
ENVIRONMENT = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}


def apt(*arguments: str) -> bool:
    """Run apt-get; False, with the end of what it said, where it failed."""
    command = ["apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0", *arguments]
    print("+", " ".join(command), flush=True)
    done = subprocess.run(
        command, env=ENVIRONMENT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-8:]))
    return done.returncode == 0


def main() -> int:
    """Bring the engines that this machine can have. What stays missing is no error here: the tests decide."""
    wanted = [name for name in ENGINES if missing(name)]
    if wanted and os.geteuid() == 0 and shutil.which("apt-get") and not os.environ.get("HUB_GATEWAY_NO_APT"):
        packages = {name: ENGINES[name].packages for name in wanted}
        everything = [package for some in packages.values() for package in some]
        if apt("update") and not apt("install", "--no-install-recommends", *everything):
            for some in packages.values():  # one that this system does not have keeps no other engine away
                apt("install", "--no-install-recommends", *some)
    for name in wanted:
        if reason := missing(name):
            print(f"engines: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
