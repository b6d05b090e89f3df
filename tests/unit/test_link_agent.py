"""A real agent, real kernels, and the gateway's side of the link."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import signal
import socket
import stat
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from hub_gateway.errors import Conflict, LaunchFailed, PayloadTooLarge, Unavailable
from hub_gateway.kernels.types import ExecutionState
from hub_gateway.link import Dialect, codec, relay
from hub_gateway.link.sinks import Delivery
from hub_gateway.proxies.tagged import tail
from tests.harness import waiting
from tests.harness.link import (
    FLOOD,
    IPYTHON,
    PUBLIC,
    SECRET,
    STOCK_IPYTHON,
    Collector,
    Gateway,
    RunningAgent,
    eventually,
    finished,
    load_agent,
)
from tests.harness.pythons import agent_python


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Gateway]]:
    """Starts an agent with a kernel, or another gateway on one; ends all of them."""
    agents: list[RunningAgent] = []
    gateways: list[Gateway] = []

    def make(argv: list[str] = FLOOD, *, to: RunningAgent | None = None, **settings: Any) -> Gateway:
        names = ("backlog_bytes", "queue_bytes", "request_bytes", "ping_seconds", "lost_seconds")
        options = {name: settings.pop(name) for name in names if name in settings}
        if to is None:
            to = RunningAgent(argv, **settings)
            agents.append(to)
        gateways.append(Gateway(to, **options))
        return gateways[-1]

    yield make
    for gateway in gateways:
        gateway.close()
    for agent in agents:
        agent.close()


Start = Callable[..., Gateway]


def numbers(sink: Collector) -> list[int]:
    """The first word of each line of output."""
    return [int(line.split()[0]) for line in sink.text().splitlines() if line]


# -- a kernel and its agent


async def test_what_a_client_sends_early_is_executed_once_the_kernel_is_up(start: Start) -> None:
    gateway = start(IPYTHON)
    sink = gateway.attach(Collector())
    msg_id = gateway.send(sink, "print(6 * 7)")
    await gateway.connect(ready=False)
    await eventually(lambda: sink.finished(msg_id), "the cell to finish")
    assert sink.text() == "42\n"
    assert sink.of(msg_id, "execute_reply")[0]["content"]["status"] == "ok"
    assert sink.states()[0] == "starting"
    assert not [m for m in sink.messages if m["header"]["msg_type"] == "iopub_welcome"]
    assert gateway.event("ready") and gateway.relay.ready


async def test_a_call_that_is_cancelled_as_its_answer_comes_ends(start: Start) -> None:
    """Else a loop that asks kernels would go on, and the gateway that it belongs to never end."""
    gateway = await start().connect()
    link = gateway.relay._link
    assert link is not None
    asking = asyncio.ensure_future(link.call("ping", 20.0))
    await asyncio.sleep(0)
    (answer,) = link._calls.values()
    answer.set_result({"ok": True})
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize("early", [True, False])
async def test_what_is_sent_twice_runs_once(start: Start, early: bool) -> None:
    """A gateway that takes over cannot know what the one before has sent. It makes no difference who sends it."""
    gateway = await start(IPYTHON).connect(ready=not early)
    sink = gateway.attach(Collector())
    first = gateway.send(sink, "n = globals().get('n', 0) + 1")
    link = gateway.relay._link
    assert link is not None
    header = {"msg_id": first, "msg_type": "execute_request", "session": sink.session, "username": "", "version": "5.3"}
    other = await start(to=gateway.agent).connect(epoch=2)
    parts = [json.dumps(header).encode(), b"{}", b"{}", json.dumps({"code": "n = 100", "silent": False}).encode()]
    other.relay.restore([("k", codec.encode_request(sink.session.encode(), 0, sink.session.encode(), parts))])
    await eventually(lambda: not other.relay.pending.kept, "the agent to have it")
    await eventually(lambda: sink.finished(first), "the cell to end")
    again = gateway.attach(Collector())
    await gateway.execute(again, "print(n)")
    assert again.text() == "1\n"
    assert (await gateway.relay.ping())["counters"]["repeated_requests"] == 1


async def test_an_answer_waits_for_a_client_that_is_not_back_yet(start: Start) -> None:
    """Of a request that an earlier gateway was given, to an agent that has never heard of its session."""
    gateway = await start(IPYTHON).connect()
    settled: list[str] = []
    gateway.relay.pending.on_settled = settled.extend
    header = {"msg_id": "m1", "msg_type": "execute_request", "session": "away", "username": "", "version": "5.3"}
    parts = [json.dumps(header).encode(), b"{}", b"{}", json.dumps({"code": "print(6 * 7)", "silent": False}).encode()]
    gateway.relay.restore([("k", codec.encode_request(b"away", 0, b"away", parts))])
    await eventually(lambda: settled == ["k"], "the agent to have it")
    await gateway.execute(gateway.attach(Collector()), "pass")
    sink = gateway.attach(Collector("away"))
    await eventually(lambda: sink.finished("m1"), "its end")
    assert sink.text() == "42\n" and sink.of("m1", "execute_reply")


@pytest.mark.parametrize("argv", [IPYTHON, STOCK_IPYTHON], ids=["ours", "stock"])
async def test_a_busy_cell_is_interrupted(start: Start, argv: list[str]) -> None:
    gateway = await start(argv).connect()
    sink = gateway.attach(Collector())
    msg_id = gateway.send(sink, "print('go', flush=True)\nimport time; time.sleep(60)")
    await eventually(lambda: "go" in sink.text(), "the cell to run")
    await eventually(lambda: gateway.relay.execution_state is ExecutionState.BUSY, "busy to be told")
    await gateway.relay.interrupt()
    await eventually(lambda: sink.finished(msg_id), "the cell to end")
    assert sink.of(msg_id, "error")[0]["content"]["ename"] == "KeyboardInterrupt"
    await eventually(lambda: gateway.relay.execution_state is ExecutionState.IDLE, "idle to be told")


async def test_interrupt_by_message(start: Start) -> None:
    gateway = await start(IPYTHON, interrupt_mode="message").connect()
    sink = gateway.attach(Collector())
    msg_id = gateway.send(sink, "print('go', flush=True)\nimport time; time.sleep(60)")
    await eventually(lambda: "go" in sink.text(), "the cell to run")
    await gateway.relay.interrupt()
    await eventually(lambda: sink.finished(msg_id), "the cell to end")
    assert sink.of(msg_id, "error")
    assert not [m for m in sink.messages if m["header"]["msg_type"] == "interrupt_reply"]


async def test_input_is_asked_of_the_session_that_runs_the_cell(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink, other = gateway.attach(Collector()), gateway.attach(Collector())
    msg_id = gateway.request(
        sink, "execute_request", {"code": "print(input('name? ') * 2)", "silent": False, "allow_stdin": True}
    )
    await eventually(lambda: sink.of(msg_id, "input_request"), "the question")
    gateway.request(sink, "input_reply", {"value": "ab"}, channel="stdin")
    await eventually(lambda: sink.finished(msg_id), "the cell to finish")
    assert sink.text() == "abab\n" == other.text()
    assert not other.of(msg_id, "input_request") and not other.of(msg_id, "execute_reply")


async def last_activity(gateway: Gateway) -> datetime:
    await gateway.relay.ping()
    return gateway.relay.last_activity


@pytest.mark.parametrize("there", [True, False], ids=["seen", "unseen"])
async def test_output_between_cells_is_activity(start: Start, there: bool) -> None:
    """A kernel whose threads work and report is not idle, though it is at its prompt and nobody looks."""
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector(keep=False))
    work = "def work():\n    while True:\n        print('on it', flush=True)\n        time.sleep(0.02)"
    await gateway.execute(sink, f"import threading, time\n{work}\nthreading.Thread(target=work, daemon=True).start()")
    await eventually(lambda: gateway.relay.execution_state is ExecutionState.IDLE, "the prompt")
    if not there:
        gateway.relay.detach(sink)
    before = await last_activity(gateway)
    deadline = time.monotonic() + 20
    while await last_activity(gateway) - before < timedelta(seconds=1):
        assert time.monotonic() < deadline, "no activity was told"


async def test_what_a_client_sends_is_activity(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    before = await last_activity(gateway)
    deadline = time.monotonic() + 20
    while await last_activity(gateway) - before < timedelta(seconds=0.5):
        gateway.request(sink, "input_reply", {"value": "nobody asked"}, channel="stdin")  # no kernel says busy to it
        assert time.monotonic() < deadline, "no activity was told"


async def test_a_kernel_that_nobody_uses_has_no_activity(start: Start) -> None:
    """What gateways and agents do by themselves is none."""
    gateway = await start().connect()
    before = await last_activity(gateway)
    for _ in range(100):
        await gateway.relay.ping()
    # The age is told, not the moment: it varies by the way it took.
    assert await last_activity(gateway) - before < timedelta(seconds=0.2)


async def test_a_restart_keeps_link_and_sessions(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "x = 1")
    old = gateway.relay.welcome["pid"]
    busy = gateway.send(sink, "import time; print('go', flush=True); time.sleep(60)")
    await eventually(lambda: "go" in sink.text(), "the cell to run")
    await gateway.relay.restart()
    assert not psutil.pid_exists(old)
    assert gateway.relay.ready and gateway.relay.execution_state is ExecutionState.IDLE
    assert sink.finished(busy)
    msg_id = await gateway.execute(sink, "print('x' in globals())")
    assert sink.text() == "go\nFalse\n" and sink.of(msg_id, "execute_reply")
    # JupyterLab takes that for a kernel that died, and tells the user so.
    assert "restarting" not in sink.states()
    assert (await gateway.relay.ping())["counters"]["restarts"] == 1


async def test_a_killed_kernel_says_why_and_comes_back(start: Start, tmp_path: Path) -> None:
    gateway = await start(IPYTHON).connect()
    sink, other = gateway.attach(Collector()), gateway.attach(Collector())
    await gateway.execute(sink, "import os, signal; os.write(2, b'about to run out of memory\\n')")
    await eventually(lambda: "about to run" in gateway.agent.log.read_text(), "the agent to have read stderr")
    now = tmp_path / "now"
    code = f"while not os.path.exists({str(now)!r}): pass\nos.kill(os.getpid(), signal.SIGKILL)"
    msg_id, queued = gateway.send(sink, code), gateway.send(sink, "print('never')")
    await gateway.relay.ping()  # it is answered in its turn: both cells are at the kernel that is going to die
    now.touch()
    await eventually(lambda: sink.finished(msg_id) and sink.finished(queued), "both cells to end")
    error = "\n".join(sink.of(msg_id, "error")[0]["content"]["traceback"])
    assert "exit code 137 (SIGKILL; often out of memory)" in error and "about to run out of memory" in error
    assert sink.of(msg_id, "execute_reply")[0]["content"]["status"] == "error"
    assert sink.of(queued, "execute_reply")[0]["content"]["status"] == "aborted"
    assert not other.of(msg_id, "execute_reply") and other.of(msg_id, "error")
    exited = await eventually(lambda: gateway.event("exited"), "the exit to be told")
    assert (exited["code"], exited["signal"], exited["while"], exited["will_restart"]) == (137, 9, "running", True)
    assert "about to run out of memory" in exited["stderr_tail"]
    await gateway.execute(sink, "print('back')")
    assert sink.text() == "back\n" and "restarting" in sink.states()


async def test_a_client_that_comes_while_a_dead_kernel_comes_back_is_not_told_that_it_died(
    start: Start, tmp_path: Path
) -> None:
    """JupyterLab opens its websocket again at each `restarting`, and tells the user each time."""
    argv = ["/bin/sh", "-c", HANGS_ONCE_TOLD, "{connection_file}"]
    gateway = await start(argv, cwd=str(tmp_path), start_seconds=1.0, restart_limit=1).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "flood 1 10")  # from here on it gets everything
    (tmp_path / "hang").touch()
    os.kill(gateway.relay.welcome["pid"], signal.SIGKILL)
    await eventually(lambda: "restarting" in sink.states(), "the kernel to be restarted")
    assert sink.confirms == 1, "whether it has that is asked at once"
    gateway.relay.detach(sink)
    again, new = gateway.attach(Collector(sink.session)), gateway.attach(Collector())
    await eventually(lambda: gateway.relay.linked and "dead" in new.states(), "the restart to be given up")
    for one in (again, new):
        assert one.states()[0] == "starting" and "restarting" not in one.states()


async def test_a_cell_that_kills_its_kernel_at_once_is_told_why(start: Start) -> None:
    """Also where the kernel is gone before it could say that it is busy."""
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    msg_id = await gateway.execute(sink, "import os; os.kill(os.getpid(), 9)")
    assert "exit code 137" in sink.of(msg_id, "error")[0]["content"]["evalue"]
    assert sink.of(msg_id, "execute_reply")[0]["content"]["status"] == "error"


async def test_what_a_kernel_had_sent_before_it_died_is_read_to_its_end(start: Start, tmp_path: Path) -> None:
    """Also where the agent had no time meanwhile; and the cell that killed the kernel is the one that is told so."""
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "import os, time")
    now, kernel = tmp_path / "now", psutil.Process(gateway.relay.welcome["pid"])
    first = gateway.send(sink, f"while not os.path.exists({str(now)!r}): pass\nfor i in range(3000): print(i)")
    # What ZeroMQ had not handed to the system yet would die with the kernel.
    second = gateway.send(sink, "print('second')\ntime.sleep(0.5)\nos.kill(os.getpid(), 9)")
    third = gateway.send(sink, "print('never')")
    await gateway.relay.ping()  # it is answered in its turn: all cells are at the kernel that is going to die
    gateway.agent.process.send_signal(signal.SIGSTOP)
    try:
        now.touch()
        await eventually(lambda: kernel.status() == psutil.STATUS_ZOMBIE, "the kernel to die")
        late = gateway.send(sink, "print('late')")
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)
    cells = (first, second, third, late)
    await eventually(lambda: all(sink.finished(cell) for cell in cells), "all cells to end")
    assert [sink.of(cell, "execute_reply")[0]["content"]["status"] for cell in cells] == [
        *("ok", "error", "aborted", "aborted")
    ]
    assert sink.text() == "".join(f"{i}\n" for i in range(3000)) + "second\n"
    assert [bool(sink.of(cell, "error")) for cell in cells] == [False, True, False, False]
    await gateway.execute(sink, "print('back')")
    assert sink.text().endswith("second\nback\n")


async def test_what_was_sent_before_the_restart_was_told_is_not_run_by_the_new_kernel(start: Start) -> None:
    """Cells that followed the one that killed the kernel, and were still on their way to the agent."""
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    kernel = gateway.relay.welcome["pid"]
    link = gateway.relay._link
    assert link is not None and link._socket is not None
    # The gateway's loop is busy: it has not heard yet that the kernel died, and sends a cell.
    link._loop.remove_reader(link._socket.fileno())
    os.kill(kernel, signal.SIGKILL)
    await eventually(lambda: "ended: exit code 137" in gateway.agent.log.read_text(), "the agent to restart it")
    late = gateway.request(sink, "execute_request", {"code": "print('late')"})
    info = gateway.request(sink, "kernel_info_request", {})
    link._loop.add_reader(link._socket.fileno(), link._drain)
    await eventually(lambda: sink.finished(late) and sink.finished(info), "both to end")
    assert sink.of(late, "execute_reply")[0]["content"]["status"] == "aborted" and not sink.of(late, "error")
    assert sink.of(info, "kernel_info_reply")[0]["content"]["status"] == "ok"
    await gateway.execute(sink, "print('back')")
    assert sink.text() == "back\n"


async def test_a_kernel_whose_child_holds_its_sockets_is_restarted_all_the_same(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(20)\n    os._exit(0)\nos._exit(3)"
    msg_id = await gateway.execute(sink, code, timeout=10)
    assert "exit code 3" in sink.of(msg_id, "error")[0]["content"]["evalue"]
    await gateway.execute(sink, "print('back')", timeout=15)


async def test_what_a_kernel_writes_besides_its_cells_does_not_fill_the_disk(start: Start, tmp_path: Path) -> None:
    """Its stdout and stderr go to a log, often beside the database; the newest of it is kept."""
    flood = "head -c 2000000 /dev/zero | tr '\\0' o; head -c 2000000 /dev/zero | tr '\\0' e >&2"
    once = f"test -e again || ({flood}; echo last out; echo last err >&2); touch again"
    argv = ["/bin/sh", "-c", f"{once}; exec {' '.join(FLOOD[:-1])} $0", "{connection_file}"]
    gateway = await start(argv, cwd=str(tmp_path), log_bytes=400_000).connect()
    files = [gateway.agent.log, gateway.agent.log.with_name("kernel.log.1")]
    assert sum(file.stat().st_size for file in files) <= 400_000 + 2 * 65536
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    for last in ("last out\n", "last err\n"):
        await eventually(lambda last=last: last in tail(gateway.agent.log), last)  # type: ignore[misc]
    await gateway.execute(gateway.attach(Collector()), "exit 3")
    await eventually(lambda: "ended: exit code 3" in gateway.agent.log.read_text(), "the agent's own word")


async def test_a_kernel_that_dies_again_and_again_is_left_dead(start: Start) -> None:
    gateway = await start(restart_limit=2).connect()
    sink = gateway.attach(Collector())
    for _ in range(3):
        await eventually(lambda: gateway.relay.ready, "the kernel to be ready")
        await gateway.execute(sink, "exit 3")
    last = await eventually(lambda: "dead" in sink.states(), "the kernel to be given up") and gateway.event("exited")
    assert last is not None and (last["code"], last["will_restart"]) == (3, False)
    msg_id = await gateway.execute(sink, "pass")
    assert "exit code 3" in sink.of(msg_id, "error")[0]["content"]["evalue"]
    await gateway.relay.restart()
    await gateway.execute(sink, "flood 1 10")
    assert numbers(sink) == [0]


HANGS_ONCE_TOLD = (
    f"if test -e hang; then echo 'waiting for the file server' >&2; exec sleep 600; fi; exec {' '.join(FLOOD[:-1])} $0"
)


async def test_a_restart_that_hangs_ends_and_may_be_tried_again(start: Start, tmp_path: Path) -> None:
    argv = ["/bin/sh", "-c", HANGS_ONCE_TOLD, "{connection_file}"]
    gateway = await start(argv, cwd=str(tmp_path), start_seconds=1.0, shutdown_seconds=0.5).connect()
    sink = gateway.attach(Collector())
    (tmp_path / "hang").touch()
    with pytest.raises(LaunchFailed, match=r"did not answer within 1 s and was killed\. Last .*\nwaiting for the file"):
        await gateway.relay.restart()
    await eventually(lambda: "dead" in sink.states(), "the kernel to be given up")
    exited = gateway.event("exited")
    assert exited is not None and not exited["will_restart"] and "did not answer within" in exited["stderr_tail"]
    (tmp_path / "hang").unlink()
    await gateway.relay.restart()
    await gateway.execute(sink, "flood 3 20")
    assert numbers(sink) == [0, 1, 2]


async def test_a_restart_that_the_node_cannot_do_now_may_be_tried_again(start: Start) -> None:
    """As where its disk is full: the agent lives on, and says what is wrong."""
    gateway = await start().connect()
    sink = gateway.attach(Collector())
    (connection_file,) = Path(gateway.agent.runtime_dir).glob("kernel-*.json")
    connection_file.unlink()
    connection_file.mkdir()
    with pytest.raises(LaunchFailed, match=r"^The kernel cannot be started on its node: Is a directory\."):
        await gateway.relay.restart()
    await eventually(lambda: "dead" in sink.states(), "the kernel to be given up")
    assert [entry.name for entry in Path(gateway.agent.runtime_dir).glob("kernel-*")] == [connection_file.name]
    connection_file.rmdir()
    await gateway.relay.restart()
    await gateway.execute(sink, "flood 3 20")
    assert numbers(sink) == [0, 1, 2]


async def test_a_restart_that_is_overtaken_by_a_shutdown_has_failed(start: Start, tmp_path: Path) -> None:
    argv = ["/bin/sh", "-c", HANGS_ONCE_TOLD, "{connection_file}"]
    gateway = await start(argv, cwd=str(tmp_path), shutdown_seconds=0.5).connect()
    (tmp_path / "hang").touch()
    restart = asyncio.ensure_future(gateway.relay.restart())
    await eventually(lambda: gateway.event("restarting"), "the restart to begin")
    again = asyncio.ensure_future(gateway.relay.shutdown())
    with pytest.raises(Conflict, match="being shut down"):
        await restart
    await again
    assert gateway.agent.process.wait(10) == 0


@pytest.mark.parametrize("known", ["before the cell is there", "while it waits"])
async def test_a_kernel_that_dies_at_start_is_reported_and_answered_for(
    start: Start, known: str, tmp_path: Path
) -> None:
    reason = "libcudart.so.12: cannot open shared object file"
    script = f"until test -e die; do sleep 0.01; done; echo '{reason}' >&2; exit 3"
    gateway = start(["/bin/sh", "-c", script, "{connection_file}"], cwd=str(tmp_path))
    sink, idle = gateway.attach(Collector()), gateway.attach(Collector())
    early = known == "before the cell is there"
    if early:
        (tmp_path / "die").touch()
        await eventually(lambda: "ended: " in gateway.agent.log.read_text(), "the kernel to end")
    msg_id = gateway.send(sink, "1 + 1")
    info = gateway.request(idle, "kernel_info_request", {})
    await gateway.connect(ready=False)
    if not early:
        await gateway.relay.ping()  # the requests are at the agent, too: they went before
        (tmp_path / "die").touch()
    await eventually(lambda: sink.finished(msg_id) and idle.finished(info), "the requests to end")
    assert "libcudart.so.12" in "\n".join(sink.of(msg_id, "error")[0]["content"]["traceback"])
    exited = gateway.event("exited") or gateway.relay.welcome["exited"]
    assert (exited["code"], exited["while"], exited["will_restart"]) == (3, "starting", False)
    assert "libcudart.so.12" in exited["stderr_tail"]
    await eventually(lambda: "dead" in sink.states(), "the one who knows why to hear that it is dead")
    gateway.relay.fail("It has ended.", [])
    assert len(sink.of(msg_id, "error")) == 1 and "dead" not in idle.states()


async def test_cells_end_with_the_reason_when_the_agent_is_killed(start: Start) -> None:
    gateway = await start().connect()
    sink, other = gateway.attach(Collector()), gateway.attach(Collector())
    done = await gateway.execute(sink, "flood 1 10")
    running, waiting = gateway.send(sink, "sleep 60"), gateway.send(sink, "flood 1 10")
    await eventually(lambda: "busy" in sink.states()[-1:], "the cell to run")
    gateway.agent.process.kill()
    gateway.relay.fail("The kernel ended with its agent.", [])
    for msg_id in (running, waiting):
        assert sink.finished(msg_id)
        assert sink.of(msg_id, "error")[0]["content"]["ename"] == "DeadKernelError"
    assert not sink.of(done, "error") and sink.states()[-1] == "dead" and "dead" not in other.states()


@pytest.mark.parametrize(
    ("argv", "cwd", "sentence"),
    [
        (["/nonexistent/interpreter", "{connection_file}"], None, "program /nonexistent/interpreter cannot be started"),
        (FLOOD, "/nonexistent/folder", "working directory /nonexistent/folder cannot be entered"),
    ],
)
async def test_what_cannot_be_executed_is_said_in_a_sentence(
    start: Start, argv: list[str], cwd: str | None, sentence: str
) -> None:
    gateway = await start(argv, cwd=cwd, linger_seconds=0.5).connect(ready=False)
    exited = gateway.event("exited") or gateway.relay.welcome["exited"]
    assert sentence in exited["stderr_tail"] and exited["code"] == 127
    await eventually(lambda: gateway.agent.process.poll() is not None, "the agent to end by itself")


async def test_shutdown_leaves_nothing(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "import subprocess; child = subprocess.Popen(['sleep', '600'])")
    kernel = psutil.Process(gateway.relay.welcome["pid"])
    family = [kernel, *kernel.children(recursive=True)]
    assert len(family) >= 2
    await gateway.relay.shutdown()
    assert gateway.agent.process.wait(10) == 0
    await eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), "all to be gone")
    assert {p.name for p in Path(gateway.agent.runtime_dir).iterdir()} <= {"kernel.log", "ipython"}


async def test_the_kernel_does_not_survive_its_agent(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    kernel = psutil.Process(gateway.relay.welcome["pid"])
    gateway.agent.process.kill()
    await eventually(lambda: not kernel.is_running() or kernel.status() == "zombie", "the kernel to end")


async def test_sigterm_ends_agent_and_kernel(start: Start) -> None:
    gateway = await start().connect()
    kernel = psutil.Process(gateway.relay.welcome["pid"])
    gateway.agent.process.terminate()
    assert gateway.agent.process.wait(10) == 0
    assert not kernel.is_running()


async def test_without_a_gateway_it_ends_itself(start: Start) -> None:
    gateway = await start(orphan_seconds=1.0).connect()
    kernel = psutil.Process(gateway.relay.welcome["pid"])
    await asyncio.sleep(0)
    gateway.throw_away()
    await eventually(lambda: gateway.agent.process.poll() is not None, "the agent to end")
    assert not kernel.is_running()
    assert "no gateway for" in gateway.agent.log.read_text()


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
async def test_the_agent_runs_on_the_pythons_of_old_and_new_nodes(start: Start, version: str) -> None:
    """The kernel has its own; the agent takes what the node has."""
    gateway = await start(FLOOD, python=agent_python(version), log_bytes=20_000).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "flood 2000 100")
    await gateway.execute(sink, "large 3 200000")
    assert numbers(sink)[:2000] == list(range(2000))
    await gateway.relay.restart()
    await gateway.execute(sink, "flood 1 10")
    msg_id = await gateway.execute(sink, "exit 3")
    assert "exit code 3" in sink.of(msg_id, "error")[0]["content"]["evalue"]
    await eventually(lambda: gateway.relay.ready, "the kernel to come back")
    gateway.throw_away()
    other = await start(to=gateway.agent).connect(epoch=2)
    again = other.attach(Collector(sink.session))
    await other.execute(again, "flood 1 10")
    await other.relay.shutdown()
    assert gateway.agent.process.wait(10) == 0
    assert "Traceback" not in gateway.agent.log.read_text()


async def test_the_agent_runs_as_containers_start_it(start: Start) -> None:
    """There the interpreter has looked through site-packages already."""
    gateway = await start(FLOOD, flags="-I").connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "flood 10 10")
    assert numbers(sink) == list(range(10))


# -- the registration, the port


async def test_the_registration_is_proven_and_private(start: Start) -> None:
    agent = start().agent
    said = agent.said
    text = "|".join(str(said[name]) for name in ("kernel_id", "epoch", "host", "port", "public_key"))
    assert said["proof"] == hmac.new(b"token", text.encode(), hashlib.sha256).hexdigest()
    for name in ("agent.json", f"kernel-{agent.kernel_id}.json"):
        path = Path(agent.runtime_dir, name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(os.stat(agent.runtime_dir).st_mode) == 0o700
    assert json.loads(Path(agent.runtime_dir, "agent.json").read_text()) == said
    command = " ".join(psutil.Process(agent.process.pid).cmdline())
    assert agent.kernel_id in command and "token" not in command


def stranger(agent: RunningAgent, *, plain: bool = False) -> zmq.Socket[bytes]:
    """A peer that knows the agent's public key, but is not the gateway."""
    sock = zmq.Context.instance().socket(zmq.DEALER)
    sock.linger = 0
    if not plain:
        sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
        sock.curve_serverkey = agent.registration.public_key.encode()
    sock.connect(f"tcp://{agent.registration.host}:{agent.registration.port}")
    sock.send_multipart([b"\x12", b'{"op": "hello", "epoch": 99}'])
    return sock


async def test_an_unknown_peer_is_refused_and_counted(start: Start) -> None:
    gateway = await start().connect()
    strangers = [stranger(gateway.agent), stranger(gateway.agent, plain=True)]

    async def counted() -> bool:
        counters = (await gateway.relay.ping())["counters"]
        return bool(counters["refused_peers"] >= 1 and counters["failed_handshakes"] >= 2)

    await waiting.eventually(counted, "both to be counted")
    for sock in strangers:
        assert not sock.poll(0)
        sock.close(0)
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "pass")


async def test_garbage_on_the_port_does_not_disturb_a_cell(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    code = "import time\nfor i in range(300):\n    print(i, flush=True)\n    time.sleep(0.005)"
    msg_id = gateway.send(sink, code)
    address = (gateway.agent.registration.host, gateway.agent.registration.port)
    rubbish = [os.urandom(3000), b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03", b"\x00" * 5000, b""]

    def flood() -> None:
        for round_ in range(200):
            with socket.create_connection(address, timeout=5) as sock:
                try:
                    sock.sendall(rubbish[round_ % len(rubbish)])
                except OSError:
                    continue  # refused in the middle of it

    await asyncio.gather(*(asyncio.to_thread(flood) for _ in range(3)))
    await eventually(lambda: sink.finished(msg_id), "the cell to finish")
    assert numbers(sink) == list(range(300))
    assert (await gateway.relay.ping())["counters"]["failed_handshakes"] > 0


async def test_bad_frames_of_a_gateway_are_counted(start: Start) -> None:
    gateway = await start().connect()
    link = gateway.relay._link
    assert link is not None
    for frames in ([b"\x10", b"s"], [b"\x99"], [b"\x11", b"123"], [b"\x12", b"not json"], [b"\x12", b'{"op": 1}']):
        link.send(frames)
    assert (await gateway.relay.ping())["counters"]["bad_frames"] == 5
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "pass")


async def test_a_stale_epoch_is_refused(start: Start) -> None:
    first = start()
    second = start(to=first.agent)
    await first.connect(epoch=5)
    with pytest.raises(Conflict):
        await second.connect(epoch=4)
    await second.connect(epoch=6)
    with pytest.raises(Conflict, match="taken this kernel over"):
        await first.relay.restart()


async def test_an_agent_that_is_not_there_is_unavailable(start: Start) -> None:
    gateway = start()
    gateway.agent.process.kill()
    with pytest.raises(Unavailable):
        await gateway.relay.connect(gateway.agent.registration, SECRET, PUBLIC, 1, timeout=0.3)
    with pytest.raises(Unavailable):
        await gateway.relay.interrupt()


# -- sessions, replay, slow clients


async def test_nothing_is_lost_when_the_gateway_is_thrown_away(start: Start) -> None:
    first = await start(IPYTHON).connect()
    sink = first.attach(Collector("the notebook"))
    msg_id = first.send(sink, "secret = 42\nfor i in range(5000): print(i, flush=True)")
    await eventually(lambda: len(numbers(sink)) > 500, "some output")
    first.throw_away()
    second = start(to=first.agent)
    again = second.attach(Collector("the notebook"))
    await second.connect(epoch=2)
    await eventually(lambda: again.finished(msg_id), "the rest")
    both = numbers(sink) + numbers(again)
    twice = len(both) - 5000
    assert 0 <= twice <= 512
    assert numbers(again) == list(range(5000 - len(numbers(again)), 5000))
    await second.execute(again, "print(secret)")


async def test_a_client_that_names_its_last_number_gets_everything_exactly_once(start: Start) -> None:
    first = await start().connect()
    sink = first.attach(Collector("s", dialect=Dialect.NUMBERED))
    sink.on_flushed = None  # it names what it has when it comes back, and confirms nothing
    msg_id = first.send(sink, "flood 20000 20")
    await eventually(lambda: len(sink.messages) > 1000, "some output")
    first.throw_away()
    seen = sink.messages[: len(sink.messages) - 100]  # the connection broke before the last ones arrived
    second = start(to=first.agent)
    again = second.attach(Collector("s", dialect=Dialect.NUMBERED, after=seen[-1]["number"]))
    await second.connect(epoch=2)
    await eventually(lambda: finished(seen + again.messages, msg_id), "the rest")  # the reply may have been seen
    stream = [m["content"]["text"] for m in seen + again.messages if m["header"]["msg_type"] == "stream"]
    assert [int(text.split()[0]) for text in stream] == list(range(20000))


@pytest.mark.parametrize("dialect", [Dialect.V1, Dialect.NUMBERED])
async def test_a_websocket_that_stayed_open_is_served_by_a_new_agent(start: Start, dialect: Dialect) -> None:
    """Which numbers from 1 again: a kernel that failed and was revived."""
    gateway = await start().connect()
    sink = gateway.attach(Collector("s", dialect=dialect))
    await gateway.execute(sink, "flood 1000 20")
    gateway.relay.disconnect()
    revived = start()
    await gateway.relay.connect(revived.agent.registration, SECRET, PUBLIC, 1, timeout=20)
    await eventually(lambda: gateway.relay.ready, "the new kernel to be ready")
    await gateway.execute(sink, "flood 10 20", timeout=10)
    assert numbers(sink) == [*range(1000), *range(10)]


async def test_a_pong_for_what_an_earlier_agent_sent_acknowledges_nothing(start: Start) -> None:
    gateway = await start().connect()
    sink = gateway.attach(Collector("s", held=True))
    msg_id = gateway.send(sink, "flood 1000 20")
    await eventually(lambda: sink.finished(msg_id), "the output")
    gateway.relay.disconnect()
    revived = start()
    await gateway.relay.connect(revived.agent.registration, SECRET, PUBLIC, 1, timeout=20)
    await eventually(lambda: gateway.relay._clients[b"s"].state is Delivery.LIVE, "the attachment")
    before = gateway.relay._clients[b"s"].served
    sink.release()
    assert gateway.relay._clients[b"s"].served == before
    await gateway.execute(sink, "flood 10 20", timeout=10)


async def test_a_last_number_of_another_ring_is_passed_over(start: Start) -> None:
    first = await start().connect()
    sink = first.attach(Collector("s", dialect=Dialect.NUMBERED))
    await first.execute(sink, "flood 3 20")
    last = sink.messages[-1]["number"]
    second = await start().connect()
    found = second.attach(Collector("s", dialect=Dialect.NUMBERED))
    await second.execute(found, "flood 100 20")
    second.relay.detach(found)
    other = second.attach(Collector())
    await second.execute(other, "flood 10 20")
    for after in (last, 10**15):  # of another ring; of a form that names no ring, and higher than this one's numbers
        back = second.attach(Collector("s", dialect=Dialect.NUMBERED, after=after, held=True))
        await eventually(lambda sink=back: numbers(sink)[-10:] == list(range(10)), "what was missed")
        assert len(numbers(back)) < 100
        second.relay.detach(back)


async def test_output_waits_for_a_session_that_is_away(start: Start) -> None:
    gateway = await start().connect()
    sink, other = gateway.attach(Collector("away")), gateway.attach(Collector("here"))
    await gateway.execute(sink, "pass")
    await eventually(lambda: len(other.messages) >= 2, "both to be served")
    seen = sink.messages[-1]["header"]["msg_id"]
    gateway.relay.detach(sink)
    await gateway.execute(other, "flood 100 20")
    back = gateway.attach(Collector("away"))
    await eventually(lambda: len(numbers(back)) == 100, "what was missed")
    assert seen not in [m["header"]["msg_id"] for m in back.messages]
    fresh = gateway.attach(Collector("new here"))
    await gateway.execute(fresh, "pass")
    assert not numbers(fresh)


async def test_a_session_that_does_not_keep_its_place_starts_afresh(start: Start) -> None:
    gateway = await start().connect()
    sink, other = gateway.attach(Collector("s", keep=False)), gateway.attach(Collector())
    await gateway.execute(sink, "pass")
    gateway.relay.detach(sink)
    await gateway.execute(other, "flood 100 20")
    back = gateway.attach(Collector("s", keep=False))
    await gateway.execute(back, "pass")
    assert not numbers(back)


@pytest.mark.parametrize("arrived", [1, 3])
async def test_a_websocket_where_nobody_is_takes_nothing_from_one_that_was_heard(
    start: Start, arrived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jupyter_server's gateway client finishes what JupyterLab has closed meanwhile, and never closes it: we do."""
    monkeypatch.setattr(relay, "STANDBY_SECONDS", 0.5)
    gateway = await start().connect()
    ours = gateway.attach(Collector("s", arrived=2))
    asked = gateway.request(ours, "kernel_info_request", {})
    left = gateway.attach(Collector("s", arrived=arrived))
    await eventually(lambda: ours.finished(asked), "the reply")
    await gateway.execute(ours, "flood 10 20")
    assert numbers(ours) == list(range(10))
    assert not left.messages
    await eventually(lambda: left.dismissed, "it to be closed")
    gateway.relay.detach(left)
    await gateway.execute(ours, "pass")
    assert not ours.dismissed


async def test_a_websocket_that_is_heard_is_served(start: Start) -> None:
    """The one where nobody is may have come before it, or after it."""
    gateway = await start().connect()
    ours = gateway.attach(Collector("s", arrived=1))
    gateway.attach(Collector("s", arrived=2))
    await gateway.execute(ours, "flood 10 20")
    assert numbers(ours) == list(range(10))


async def test_a_websocket_that_does_not_answer_gives_way_to_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client lost the network, and is back; it need not say anything."""
    gateway = await start().connect()
    gone = gateway.attach(Collector("s", arrived=1))
    await gateway.execute(gone, "pass")
    gone.there = False
    monkeypatch.setattr(relay, "STANDBY_SECONDS", 0.2)
    back = gateway.attach(Collector("s", arrived=2))
    other = gateway.attach(Collector())
    await eventually(lambda: gateway.counts.get("replaced") == 1, "the change")
    await gateway.execute(other, "flood 10 20")
    await eventually(lambda: numbers(back) == list(range(10)), "the output")
    await eventually(lambda: gone.dismissed, "what is left of the first to be closed")
    assert not back.dismissed


async def test_a_session_goes_on_at_the_youngest_websocket_that_is_open(start: Start) -> None:
    gateway = await start().connect()
    first = gateway.attach(Collector("s", arrived=1))
    second = gateway.attach(Collector("s", arrived=2))
    third = gateway.attach(Collector("s", arrived=3))
    gateway.relay.detach(third)
    await gateway.execute(second, "flood 10 20")
    assert numbers(second) == list(range(10))
    gateway.relay.detach(first)
    gateway.relay.detach(second)
    assert gateway.relay.connections == 0


async def test_a_websocket_that_took_over_and_is_never_heard_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else what JupyterLab left behind would count as somebody at the kernel for ever."""
    monkeypatch.setattr(relay, "STANDBY_SECONDS", 0.5)
    gateway = await start().connect()
    ours = gateway.attach(Collector("s", arrived=1))
    await gateway.execute(ours, "pass")
    left = gateway.attach(Collector("s", arrived=2))
    gateway.relay.detach(ours)
    await eventually(lambda: left.dismissed, "it to be closed")


async def test_two_gateways_at_once(start: Start) -> None:
    first = await start().connect()
    second = await start(to=first.agent).connect()
    one, two = first.attach(Collector()), second.attach(Collector())
    await second.execute(two, "pass")
    msg_id = await first.execute(one, "flood 5000 20")
    await eventually(lambda: len(numbers(two)) == 5000, "the output at the other gateway")
    assert numbers(one) == numbers(two) == list(range(5000))
    assert one.of(msg_id, "execute_reply") and not two.of(msg_id, "execute_reply")


async def test_a_session_may_move_from_one_gateway_to_another(start: Start) -> None:
    first = await start().connect()
    second = await start(to=first.agent).connect()
    sink = first.attach(Collector("s"))
    await first.execute(sink, "flood 10 20")
    await eventually(lambda: not first.relay._acknowledging.scheduled, "the agent to be told how far the session is")
    await first.relay.ping()  # it has heard it, too
    moved = second.attach(Collector("s"))
    await second.execute(moved, "flood 10 20")
    assert numbers(moved) == list(range(10)) == numbers(sink)
    await eventually(lambda: first.relay._clients[b"s"].state is Delivery.MOVED, "the first one to be told")
    first.relay.attach(Collector("s", arrived=-1))
    first.relay.detach(sink)
    await second.execute(moved, "pass")  # what is left there does not take it back


async def test_a_session_is_at_the_gateway_where_somebody_speaks(start: Start) -> None:
    """Whichever of two gateways a client that was left behind has come to last."""
    first = await start().connect()
    second = await start(to=first.agent).connect()
    ours = first.attach(Collector("s"))
    await first.execute(ours, "pass")
    second.attach(Collector("s"))
    await eventually(lambda: first.relay._clients[b"s"].state is Delivery.MOVED, "the session to have moved")
    await first.execute(ours, "flood 10 20")
    assert numbers(ours) == list(range(10))


async def test_a_kernel_that_was_lost_and_is_started_again_is_not_called_dead(start: Start) -> None:
    gateway = start()
    gateway.relay.fail("The kernel was lost.", [], ran=True)
    gateway.relay.renew()
    early = gateway.attach(Collector())
    asked = gateway.send(early, "pass")
    assert "dead" not in early.states() and not early.of(asked, "error"), "it waits"
    await gateway.connect()
    await eventually(lambda: early.finished(asked), "the reply")
    late = gateway.attach(Collector())
    await gateway.execute(late, "pass")
    assert "dead" not in early.states() + late.states()


@pytest.mark.parametrize("command", ["flood 60000 200", "data 120 200000"])
async def test_a_slow_client_is_bounded_and_holds_up_nobody(start: Start, command: str) -> None:
    gateway = await start(backlog_bytes=2**20).connect()
    slow, fast = gateway.attach(Collector(held=True)), gateway.attach(Collector())
    msg_id = await gateway.execute(fast, command)
    assert slow.most < 2**20 + 600_000
    assert gateway.counts["paused"] >= 1

    def drain() -> bool:
        slow.release(held=True)
        return bool(slow.of(msg_id, "status")) and slow.of(msg_id, "status")[-1]["content"]["execution_state"] == "idle"

    await eventually(drain, "the slow one to get the rest")
    assert slow.most < 2**20 + 600_000
    assert slow.text() == fast.text()
    assert [m["buffers"] for m in slow.messages] == [m["buffers"] for m in fast.messages if m["channel"] == "iopub"]


async def test_overflow_is_joined_and_the_rest_comes_in_order(start: Start) -> None:
    gateway = await start(ring_messages=1000).connect()
    away, here = gateway.attach(Collector("away")), gateway.attach(Collector("here"))
    await gateway.execute(away, "pass")
    gateway.relay.detach(away)
    await gateway.execute(here, "flood 20000 20")
    await gateway.execute(here, "pass")
    counters = (await gateway.relay.ping())["counters"]
    assert counters["joined_messages"] > 10_000 and counters["dropped_messages"] == 0
    back = gateway.attach(Collector("away"))
    await eventually(lambda: len(numbers(back)) == 20_000, "everything")
    assert numbers(back) == list(range(20_000)) and len(back.messages) < 2000


# -- what is said in the kernel's place


async def test_progress_is_shown_in_place_and_goes_away(start: Start) -> None:
    gateway = start()
    sink = gateway.attach(Collector())
    msg_id = gateway.send(sink, "flood 1 10")
    gateway.relay.announce("Waiting in queue research.")
    gateway.relay.announce("Pulling the image.")
    [shown], [updated] = sink.of(msg_id, "display_data"), sink.of(msg_id, "update_display_data")
    assert shown["content"]["data"]["text/plain"] == "Waiting in queue research."
    assert updated["content"]["data"]["text/plain"] == "Pulling the image."
    assert shown["content"]["transient"] == updated["content"]["transient"]
    await gateway.connect()
    await eventually(lambda: sink.finished(msg_id), "the cell to finish")
    assert sink.of(msg_id, "clear_output") and numbers(sink) == [0]


async def test_a_start_that_failed_is_explained_in_every_cell(start: Start) -> None:
    gateway = start()
    sink, idle = gateway.attach(Collector()), gateway.attach(Collector())
    msg_id = gateway.send(sink, "1")
    gateway.relay.fail("The image could not be pulled: no such tag.", ["first line", "second line"])
    assert sink.finished(msg_id)
    # JupyterLab shows nothing of an error but its traceback.
    text = "The image could not be pulled: no such tag."
    shown = sink.of(msg_id, "error")[0]["content"]["traceback"]
    assert shown == [text, "Last lines of stderr:", "first line", "second line"]
    # JupyterLab sends nothing to a kernel that it knows to be dead: who has not asked must not know.
    assert sink.states()[-1] == "dead" and "dead" not in idle.states()
    later = gateway.attach(Collector())
    info = gateway.request(later, "kernel_info_request", {})
    assert later.finished(info) and "dead" not in later.states()
    again = gateway.send(later, "2")
    assert later.of(again, "error")[0]["content"]["evalue"].startswith("The image could not")
    assert later.states()[-1] == "dead"


async def test_what_waits_for_the_link_is_bounded(start: Start) -> None:
    gateway = start(queue_bytes=10_000)
    sink = gateway.attach(Collector())
    with pytest.raises(PayloadTooLarge):
        gateway.send(sink, "#" * 20_000)
    msg_id = gateway.send(sink, "flood 1 10")
    await gateway.connect()
    await eventually(lambda: sink.finished(msg_id), "the cell that fitted")


async def test_what_an_agent_does_not_take_is_bounded(start: Start) -> None:
    gateway = await start(request_bytes=2**20).connect()
    sink = gateway.attach(Collector())
    gateway.agent.process.send_signal(signal.SIGSTOP)
    try:
        cells = [gateway.send(sink, f"pass {'#' * 300_000}") for _ in range(3)]
        with pytest.raises(PayloadTooLarge, match="1 MB wait for it already"):
            gateway.send(sink, f"pass {'#' * 300_000}")
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)
    await eventually(lambda: all(sink.finished(cell) for cell in cells), "the cells that fitted")
    for _ in range(10):
        await gateway.execute(sink, f"pass {'#' * 300_000}")
    await gateway.execute(sink, "pass " + "#" * 3 * 2**20)  # alone it may be larger


async def test_what_is_sent_to_a_silent_agent_waits_until_it_is_back(start: Start) -> None:
    gateway = await start(ping_seconds=0.1, lost_seconds=0.5, queue_bytes=10_000).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "pass")
    gateway.agent.process.send_signal(signal.SIGSTOP)
    try:
        await eventually(lambda: gateway.event("lost"), "the silence to be noticed")
        assert not gateway.relay.linked
        with pytest.raises(PayloadTooLarge):
            gateway.send(sink, "#" * 20_000)
        with pytest.raises(Unavailable):
            await gateway.relay.interrupt()
        msg_id = gateway.send(sink, "flood 3 20")
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)
    await eventually(lambda: sink.finished(msg_id), "the cell that waited")
    assert gateway.relay.linked and gateway.event("back") and numbers(sink) == [0, 1, 2]


async def test_an_error_at_one_message_does_not_hold_up_the_next(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ's descriptor signals once for all that has arrived."""
    gateway = await start().connect()
    link = gateway.relay._link
    assert link is not None
    coming: list[Exception | int] = [KeyError("a defect"), ValueError("a bad frame"), 1, zmq.Again(), 1]

    def receive(sock: zmq.Socket[bytes]) -> int:
        one = coming.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    before = dict(gateway.counts)
    with monkeypatch.context() as patch:
        patch.setattr(link, "_receive", receive)
        link._drain()
        assert coming == [1]
        coming[:] = [zmq.ZMQError(zmq.ENOTSOCK), 1]
        link._drain()
        assert coming == [1], "it is not tried again and again"
    assert gateway.counts["link_errors"] == 2 and gateway.counts["bad_frames"] == before.get("bad_frames", 0) + 1


async def test_the_stock_client_is_told_once_what_it_does_not_get(start: Start) -> None:
    gateway = await start().connect()
    sink = gateway.attach(Collector(dialect=Dialect.JSON_TEXT_ONLY))
    msg_id = await gateway.execute(sink, "data 3 1000")
    assert len(sink.of(msg_id, "display_data")) == 3
    assert sink.text("stderr").count("companion") == 1


async def test_buffers_up_to_the_limit_pass_both_ways_and_more_are_told(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    code = (
        "k = get_ipython().kernel\n"
        "for n in (250, 251, 300):\n"
        "    content = {'data': {}, 'metadata': {}, 'transient': {}}\n"
        "    k.session.send(k.iopub_socket, 'display_data', content, parent=k.get_parent(), buffers=[b'x'] * n)"
    )
    msg_id = uuid.uuid4().hex
    header = {"msg_id": msg_id, "msg_type": "execute_request", "session": sink.session, "version": "5.3"}
    parts = [json.dumps(header).encode(), b"{}", b"{}", json.dumps({"code": code}).encode(), *[b"y"] * 250]
    gateway.relay.receive(sink, "shell", parts, sink.session)
    await eventually(lambda: sink.finished(msg_id), "the cell to finish")
    assert [len(found["buffers"]) for found in sink.of(msg_id, "display_data")] == [250, 0, 0]
    [notice] = [found["content"]["text"] for found in sink.of(msg_id, "stream")]
    assert "The 251 binary buffers of a message (display_data) were left out" in notice


@pytest.mark.parametrize(("sockets", "transport"), [(True, "ipc"), (False, "tcp")])
def test_the_agent_finds_out_whether_ipc_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sockets: bool, transport: str
) -> None:
    """Not every network file system has sockets."""
    agent = load_agent()
    document = {
        "version": 1,
        "kernel_id": "k",
        "gateway_id": "g",
        "argv": ["x"],
        "runtime_dir": str(tmp_path / "run"),
        "agent": {"client_public_key": "x", "launch_token": "x"},
    }
    settings = agent.Settings(document)
    if not sockets:
        monkeypatch.setattr(agent, "has_sockets", lambda directory: False)
    directory = agent.make_directories(settings)
    assert settings.transport == transport
    assert agent.has_sockets(directory) is sockets and not list(Path(directory).iterdir())
    os.rmdir(directory)


async def test_loopback_with_curve_where_ipc_is_not_possible(start: Start) -> None:
    gateway = await start(IPYTHON, transport="tcp", kernel_encryption="curve").connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "print(1)")
    assert sink.text() == "1\n"
    path = Path(gateway.agent.runtime_dir, f"kernel-{gateway.agent.kernel_id}.json")
    connection = json.loads(path.read_text())
    plain = zmq.Context.instance().socket(zmq.SUB)
    plain.subscribe(b"")
    plain.connect(f"tcp://127.0.0.1:{connection['iopub_port']}")
    await gateway.execute(sink, "print(2)")
    assert not plain.poll(100)
    plain.close(0)


async def test_signals_reach_the_process_group(start: Start) -> None:
    gateway = await start(IPYTHON).connect()
    sink = gateway.attach(Collector())
    await gateway.execute(sink, "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('got it', flush=True))")
    await gateway.relay.signal(signal.SIGUSR1)
    await eventually(lambda: "got it" in sink.text(), "the handler to run")
    with pytest.raises(Conflict):
        await gateway.relay.signal(9999)
