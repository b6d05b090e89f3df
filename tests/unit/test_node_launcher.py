"""What the launcher on a host believes: nothing of what other users put in its way."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_gateway._paths import launchers_dir
from hub_gateway.proxies import tagged

SLEEP = "import sys; sys.stdin.read()"


def find(root: Path) -> Any:
    """The answer of `node.py` to the question of what there is of the gateway `g`."""
    request = {"action": "find", "user": None, "gateway_id": "g", "host": "h", "runtime_root": str(root)}
    done = subprocess.run(
        [sys.executable, "-I", f"{launchers_dir()}/node.py"],
        input=json.dumps(request).encode() + b"\n",
        capture_output=True,
        timeout=20,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["ok"], answer
    return answer


def folder(root: Path) -> Path:
    made = root / f"hub-gateway-{pwd.getpwuid(os.getuid()).pw_name}"
    made.mkdir(exist_ok=True)
    return made


def marked(directory: Path) -> Path:
    directory.mkdir()
    file = directory / "owner.json"
    file.write_text(json.dumps({"gateway_id": "g", "host": "h", "kernel_id": directory.name, "epoch": 4}))
    return file


def to_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def to_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def to_somebody_elses(file: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(file, 65534, -1)


@pytest.mark.parametrize("change", [to_fifo, to_link, to_somebody_elses])
def test_only_marks_of_ones_own_are_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    marked(folder(tmp_path) / "good")
    change(marked(folder(tmp_path) / "bad"))
    assert [left["kernel_id"] for left in find(tmp_path)["directories"]] == ["good"]


@pytest.mark.parametrize("kind", ["linked", "somebody else's"])
def test_only_a_folder_of_ones_own_is_read(tmp_path: Path, kind: str) -> None:
    marked(folder(tmp_path) / "k1")
    if kind == "linked":
        to_link(folder(tmp_path))
    else:
        to_somebody_elses(folder(tmp_path))
    assert find(tmp_path)["directories"] == []


@pytest.mark.parametrize(("epoch", "read"), [("7", 7), ("²", 0), ("x", 0), ("9" * 5000, 0), ("", 0)])
def test_a_process_with_an_odd_epoch_disturbs_nobody(tmp_path: Path, epoch: str, read: int) -> None:
    """Any user of a machine can start something that looks like an agent."""
    script = tmp_path / "agent.py"
    script.write_text(SLEEP)
    words = ["--kernel-id", "k1", "--gateway-id", "g", "--epoch", epoch]
    for where in (["--host", "h"], []):
        with subprocess.Popen([sys.executable, str(script), *words, *where], stdin=subprocess.PIPE) as process:
            found = find(tmp_path)["agents"] if where else [vars(one) for one in tagged.agents("g")]
            assert [one["epoch"] for one in found] == [read]
            process.kill()
