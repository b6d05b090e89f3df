"""What the SSH servers of the tests leave on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engines.ssh import sweep_sudo_rules


def test_rules_of_killed_tests_are_removed(tmp_path: Path) -> None:
    """And no other: neither those of tests that run, nor what an administrator has written."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(20)
    kept = {"README", "hgt-mine", f"hgt-{os.getpid()}-tmp-hgt-a-ssh"}
    for name in (*kept, f"hgt-{dead.pid}-tmp-hgt-b-ssh"):
        (tmp_path / name).touch()
    sweep_sudo_rules(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
