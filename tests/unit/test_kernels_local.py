"""What the local proxy takes for its own processes, and what it leaves alone."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from traitlets.config import Configurable

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


class Sudo(LocalProxy):
    """As a gateway that is not root has it."""

    def _is_root(self) -> bool:
        return False


def to_fifo(mark: Path) -> None:
    mark.unlink()
    os.mkfifo(mark)


def to_link(mark: Path) -> None:
    mark.rename(mark.with_name("elsewhere"))
    mark.symlink_to("elsewhere")


def to_linked_directory(mark: Path) -> None:
    mark.parent.rename(mark.parent.parent / "hidden" / "k")
    mark.parent.symlink_to("hidden/k")


def to_large(mark: Path) -> None:
    mark.write_text(mark.read_text() + " " * tagged.MARK_BYTES)


def to_somebody_elses(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 65534, -1)


def to_somebody_elses_directory(mark: Path) -> None:
    to_somebody_elses(mark.parent)


@pytest.mark.parametrize(
    "change", [to_fifo, to_link, to_linked_directory, to_large, to_somebody_elses, to_somebody_elses_directory]
)
def test_only_marks_of_ones_own_are_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "hidden").mkdir()
    for kernel_id in ("good", "bad"):
        (tmp_path / kernel_id).mkdir()
        tagged.mark(tmp_path / kernel_id, "g", kernel_id, 4)
    change(tmp_path / "bad" / tagged.MARK)
    assert list(tagged.marked(tmp_path, "g")) == [(tmp_path / "good", "good", 4)]


async def test_nobody_can_take_the_place_of_another_users_kernels(tmp_path: Path) -> None:
    """With sudo all users' directories lie in one to which everybody may write: bob makes what alice is to have."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    parent = Configurable()
    parent.state_dir = str(tmp_path)  # type: ignore[attr-defined]
    user = pwd.getpwuid(os.getuid()).pw_name
    local = Sudo(parent=parent, user_runtime_root=str(tmp_path / "tmp"))
    first = local._directory("g", "k1", user)
    assert first.parent.name != f"hub-gateway-{user}"
    assert Sudo(parent=parent, user_runtime_root=str(tmp_path / "tmp"))._directory("g", "k1", user) == first
    first.mkdir(parents=True)
    assert local._directory("g", "k1", user) == first, "it is the user's own"
    if os.getuid() == 0:
        os.chown(first.parent, 65534, 65534)
        second = local._directory("g", "k1", user)
        assert second.parent != first.parent and second.name == first.name
    # What was launched is where it was.
    state: State = {"gateway_id": "g", "kernel_id": "k1", "runtime_dir": str(first)}
    assert local._recorded_directory(state, user) == first
    await local.close()


@pytest.mark.skipif(os.getuid() != 0, reason="acting as other unix users takes root")
async def test_root_makes_the_users_directories_where_nobody_else_can(tmp_path: Path) -> None:
    root = tmp_path / "run"
    local = LocalProxy(user_runtime_root=str(root))
    directory = local._directory("g", "k1", "nobody")
    local._provide(directory.parent, "nobody")
    assert directory.parent == root / "nobody"
    assert (root.stat().st_uid, stat.S_IMODE(root.stat().st_mode)) == (0, 0o755)
    assert (directory.parent.stat().st_uid, stat.S_IMODE(directory.parent.stat().st_mode)) == (
        pwd.getpwnam("nobody").pw_uid,
        0o700,
    )
    await local.close()


@pytest.mark.parametrize(("mode", "level"), [(0o777, "error"), (0o1777, "warning"), (0o755, None)])
async def test_the_doctor_looks_at_the_users_directories(tmp_path: Path, mode: int, level: str | None) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / "users").chmod(mode)
    local = LocalProxy(runtime_root=str(tmp_path / "run"), user_runtime_root=str(tmp_path / "users"))
    found = {finding.what: finding.level for finding in await local.check()}.get("runtime directory of users")
    assert found == (level if level == "error" or os.getuid() == 0 else None)
    await local.close()
