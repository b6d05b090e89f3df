"""What the launcher on a host believes: nothing of what other users put in its way."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_gateway._paths import launchers_dir
from hub_gateway.proxies import tagged
from hub_gateway.proxies.ssh_node import BOOTSTRAP

SLEEP = "import sys; sys.stdin.read()"


def find(root: Path) -> Any:
    """The answer of `node.py` to the question of what there is of the gateway `g`."""
    request = {"action": "find", "user": None, "gateway_id": "g", "host": "h", "runtime_root": str(root)}
    answer = asked("node.py", request)
    assert answer["ok"], answer
    return answer


def asked(program: str, request: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, "-I", f"{launchers_dir()}/{program}"],
        input=json.dumps(request).encode() + b"\n",
        capture_output=True,
        timeout=20,
        check=True,
    )
    return json.loads(done.stdout)


def folder(root: Path, more: str = "-0123456789abcdef") -> Path:
    made = root / f"hub-gateway-{pwd.getpwuid(os.getuid()).pw_name}{more}"
    made.mkdir(mode=0o700, exist_ok=True)
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


def to_writable(file: Path) -> None:
    file.chmod(0o777)


def test_a_folder_is_found_by_whose_it_is(tmp_path: Path) -> None:
    """Every replica of a gateway has names of its own, and earlier versions had one that was known."""
    for kernel_id, more in (("k1", ""), ("k2", "-0123456789abcdef"), ("k3", "-fedcba9876543210"), ("no", "-other")):
        marked(folder(tmp_path, more) / kernel_id)
    assert sorted(left["kernel_id"] for left in find(tmp_path)["directories"]) == ["k1", "k2", "k3"]
    to_writable(folder(tmp_path, ""))
    assert sorted(left["kernel_id"] for left in find(tmp_path)["directories"]) == ["k2", "k3"]


def shelve(root: Path, names: list[str]) -> Any:
    """The answer of `shelve.py`, which stands before its request in the same stream."""
    program = (launchers_dir() / "shelve.py").read_bytes()
    text = "TEXT = 1\n"
    hashes = {"agent.py": hashlib.sha256(text.encode()).hexdigest()}
    request = {"root": str(root), "names": names, "digest": "d", "files": {"agent.py": text}, "hashes": hashes}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BOOTSTRAP],
        input=b"%d\n%s%s\n" % (len(program), program, json.dumps(request).encode()),
        capture_output=True,
        timeout=20,
        check=True,
    )
    return json.loads(done.stdout)


FIRST, SECOND = "hub-gateway-hub-0000000000000001", "hub-gateway-hub-0000000000000002"


def test_launchers_lie_where_only_the_login_writes(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    for root in (closed, tmp_path / "new"):
        assert shelve(root, [FIRST])["directory"] == str(root / "d")
    tmp_path.chmod(0o1777)
    assert shelve(tmp_path, [FIRST])["directory"] == str(tmp_path / FIRST / "d")
    # Another gateway, with other names, finds what is there.
    assert shelve(tmp_path, [SECOND])["directory"] == str(tmp_path / FIRST / "d")
    tmp_path.chmod(0o777)
    assert "lacks the sticky bit" in shelve(tmp_path, [FIRST])["error"]


@pytest.mark.parametrize("change", ["linked", "writable", "somebody else's"])
def test_launchers_do_not_lie_where_somebody_else_could_change_them(tmp_path: Path, change: str) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / FIRST).mkdir()
    changes = {"linked": to_link, "writable": to_writable, "somebody else's": to_somebody_elses}
    changes[change](tmp_path / FIRST)
    assert shelve(tmp_path, [FIRST, SECOND])["directory"] == str(tmp_path / SECOND / "d")
    shutil.rmtree(tmp_path / SECOND)
    answer = shelve(tmp_path, [FIRST])
    assert not answer["ok"] and "somebody else has made" in answer["error"]


@pytest.mark.parametrize("change", [to_fifo, to_link, to_somebody_elses])
def test_only_logs_of_ones_own_are_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """A pipe in the place of one would be waited for, with a thread of the gateway."""
    log = tmp_path / "kernel.log"
    log.write_text("mine")
    assert log_text(log) == "mine"
    change(log)
    assert log_text(log) == ""


def log_text(log: Path) -> str:
    """What the launcher reads of a log, as the user of these tests."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import runas; print(end=runas.file_text(sys.argv[2], 99))"
    command = [sys.executable, "-I", "-c", program, str(launchers_dir()), str(log)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


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


@pytest.mark.parametrize("lives", [True, False])
def test_tickets_that_come_too_late_are_not_left_behind(tmp_path: Path, lives: bool) -> None:
    """A call that nobody waits for any more goes on, and may meet a kernel that has just been ended."""
    directory = folder(tmp_path) / "k1"
    if lives:
        marked(directory)
    else:
        directory.mkdir()
    directory.chmod(0o700)
    # Not by its protocol: it does nothing for root, as whom tests may run.
    call = (
        f"import os, pwd, sys; sys.path.insert(0, {str(launchers_dir())!r}); import node; "
        "node.tickets({'runtime_dir': sys.argv[1], 'tickets': 'dGlja2V0cw=='}, pwd.getpwuid(os.getuid()))"
    )
    subprocess.run([sys.executable, "-I", "-c", call, str(directory)], check=True, timeout=20)
    if lives:
        assert (directory / "krb5cc").read_bytes() == b"tickets"
    else:
        assert not directory.exists()
