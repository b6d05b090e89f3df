"""What the local proxy takes for its own processes, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hub_gateway.errors import Unavailable
from hub_gateway.proxies import tagged
from hub_gateway.proxies.base import Phase, State
from hub_gateway.proxies.local import LocalProxy

SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*SLEEP, *words], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_only_kernels_are_killed_with_their_directory(tmp_path: Path) -> None:
    """Whoever reads a file of a kernel, or names it in a command, goes on."""
    local = LocalProxy(runtime_root=str(tmp_path))
    state: State = {"kernel_id": "k1", "gateway_id": "g"}
    directory = local._directory("g", "k1", None)
    directory.mkdir()
    file = directory / "kernel-k1.json"
    with ExitStack() as stack:
        kernels = [stack.enter_context(running(*words)) for words in (["-f", str(file)], [f"--f={file}"])]
        others = [
            stack.enter_context(running(*words))
            for words in (
                [str(directory / "kernel.log")],
                [f"less {file}"],
                [f"{file}.bak"],
                [str(directory / "kernel-k2.json")],
            )
        ]
        await local.terminate(state)
        assert [process.wait(5) for process in kernels] == [-9, -9]
        assert [process.poll() for process in others] == [None] * len(others)
        assert not directory.exists()
        with running("-f", str(file)) as somebody_elses:
            assert tagged.kernels(str(file), os.getuid() + 1) == []
            assert [one.pid for one in tagged.kernels(str(file), os.getuid())] == [somebody_elses.pid]
    await local.close()


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"name": "elsewhere", "boot": "b"}, Phase.UNKNOWN),
        ({"boot": "b"}, Phase.GONE),  # this node, before it was started anew
        ({"name": "elsewhere"}, Phase.GONE),  # a container of this node, made anew
        ({}, Phase.GONE),
    ],
)
async def test_kernels_of_another_node_are_not_gone(tmp_path: Path, change: dict[str, str], phase: Phase) -> None:
    local = LocalProxy(runtime_root=str(tmp_path))
    state: State = {"kernel_id": "k1", "gateway_id": "g", "pid": 2**22 - 1, "node": {**tagged.node(), **change}}
    assert (await local.poll({"k1": state}))["k1"].phase is phase
    directory = local._directory("g", "k1", None)
    directory.mkdir()
    if phase is Phase.UNKNOWN:
        for call in (local.terminate(state), local.signal(state, 2)):
            with pytest.raises(Unavailable, match="elsewhere"):
                await call
        assert directory.exists()
    else:
        await local.terminate(state)
        assert not directory.exists()
    await local.close()


async def test_logs_go_back_beyond_the_newest_file(tmp_path: Path) -> None:
    """The agent may just have begun it."""
    (tmp_path / "kernel.log.1").write_text("older\n" * 3)
    (tmp_path / "kernel.log").write_text("newer\n")
    local = LocalProxy(runtime_root=str(tmp_path))
    state: State = {"kernel_id": "k1", "gateway_id": "g", "runtime_dir": str(tmp_path)}
    assert await local.logs(state, 3) == "older\nolder\nnewer"
    await local.close()
