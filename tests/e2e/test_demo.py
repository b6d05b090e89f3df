"""Ctrl-C in the terminal of `make demo` ends all that it started but the kernels, and the next one finds those."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from hub_gateway.demo.browser import Browser
from hub_gateway.demo.drive import start_server
from tests.harness.gateway import ROOT, kernels_of
from tests.harness.notebook import Notebook
from tests.harness.waiting import eventually, until

ONCE = pytest.mark.skipif(
    os.environ.get("HUB_GATEWAY_TEST_DB") == "postgresql",
    reason="not applicable: the demonstration has a database of its own, which is SQLite",
)
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KERNEL_", "HUB_GATEWAY_"))}
PATH = os.pathsep.join([str(ROOT / "node_modules" / ".bin"), CLEAN.get("PATH", os.defpath)])
DEMO = (sys.executable, "-m", "hub_gateway", "demo")
IN_FRONT = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Takes the terminal for its own, then becomes the program that follows."""
KERNELSPEC = {"name": "python_local"}


class Terminal:
    """A demonstration, and the terminal that it was started from: keys go in, text comes out."""

    def __init__(self, directory: Path) -> None:
        self.keyboard, theirs = pty.openpty()
        self.process = subprocess.Popen(
            # A session of its own, whose terminal this is: the terminal's Ctrl-C goes to the processes in front of it.
            [sys.executable, "-c", IN_FRONT, *DEMO, "--port=0", f"--directory={directory}"],
            cwd=directory.parent,
            env={**CLEAN, "PATH": PATH, "PYTHONPATH": str(ROOT)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._text = bytearray()
        # It must be read always, or who writes to it would wait.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.started: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        return self._text.decode(errors="replace").replace("\r\n", "\n")

    def _read(self) -> None:
        try:
            while data := os.read(self.keyboard, 65536):
                self._text += data
        except OSError:  # how Linux tells that nobody has the terminal open any more
            return

    def says(self, what: str, timeout: float = 120) -> None:
        def said() -> bool:
            alive = self.process.poll() is None
            if what not in self.text and not alive:
                self._reader.join(10)
                assert what in self.text, f"it ended with {self.process.returncode}: {self.text}"
            return what in self.text

        until(said, f"the terminal to say {what!r}", timeout=timeout)

    def look(self) -> list[list[str]]:
        """The command lines of what it has running, kernels apart. They are remembered."""
        found = []
        for one in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                if not any("--kernel-id" in each.cmdline() for each in (one, *one.parents())):
                    found.append(one.cmdline())
                    self.started[one.pid] = one
            except psutil.NoSuchProcess:
                continue
        return found

    def runs(self, *words: str) -> Callable[[], bool]:
        """Whether a process with these words in its command line is there."""
        return lambda: any(all(any(word in each for each in argv) for word in words) for argv in self.look())

    def control_c(self) -> int:
        """Press it; the exit code. All that it started must have ended by then."""
        self.look()
        os.write(self.keyboard, b"\x03")
        code = self.process.wait(90)
        self._reader.join(10)
        left = [one for one in self.started.values() if lives(one)]
        assert not left, f"{left} go on; {self.text}"
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.look()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        kill(self.started.values())
        self._reader.join(10)
        os.close(self.keyboard)


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """What a failed test leaves."""
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: kernels' sockets lie below it."""
    root = Path(tempfile.mkdtemp(prefix="hgd-"))
    yield root / "demo"
    kill(one for agent in agents(root / "demo") for one in (agent, *agent.children(recursive=True)))
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[[], Terminal]]:
    """Starts demonstrations in one directory, one after the other."""
    made: list[Terminal] = []

    def make() -> Terminal:
        made.append(Terminal(directory))
        return made[-1]

    yield make
    for terminal in made:
        terminal.close()


def agents(directory: Path) -> list[psutil.Process]:
    """The agents of the demonstration's kernels."""
    try:
        facts = json.loads((directory / "gateway" / "gateway.json").read_text())
    except FileNotFoundError:
        return []
    return kernels_of(facts["gateway_id"])


@asynccontextmanager
async def alice(directory: Path) -> AsyncIterator[Browser]:
    """Her browser, with her server started."""
    settings = json.loads((directory / "settings.json").read_text())
    browser = Browser(settings["public_url"])
    try:
        await browser.log_in("alice", settings["user_password"])
        await start_server(browser)
        await browser.page("/user/alice/lab")
        yield browser
    finally:
        await browser.close()


@ONCE
async def test_ctrl_c_ends_all_but_kernels_and_the_next_demonstration_finds_them(
    start: Callable[[], Terminal], directory: Path
) -> None:
    first = start()
    first.says("Ctrl-C stops it.")
    assert "No kernel is left from before." in first.text
    async with alice(directory) as browser:
        wanted: dict[str, Any] = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": KERNELSPEC}
        session = await browser.api("POST", "/user/alice/api/sessions", wanted)
        kernel_id = str(session["kernel"]["id"])
        notebook = await browser.notebook(kernel_id)
        await notebook.run("x = 41")
        notebook.close()
    for words in (
        ("jupyterhub", "--config="),
        ("configurable-http-proxy",),
        ("singleuser",),
        ("hub_gateway", "--config="),
    ):
        await eventually(first.runs(*words), f"the process of {words}")
    (agent,) = agents(directory)
    kernel = [agent, *agent.children(recursive=True)]
    assert len(kernel) > 1
    assert first.control_c() == 0
    assert "Stopped. 1 kernel goes on" in first.text and "Traceback" not in first.text
    assert all(map(lives, kernel))

    second = start()
    second.says("Ctrl-C stops it.")
    assert re.search(rf"Still running from before:\n\s+{kernel_id}  alice, python_local\n", second.text)
    async with alice(directory) as browser:
        # Through the gateway: her new server shows only kernels that it has started itself.
        assert kernel_id in (await browser.page("/services/hub-gateway/home")).text
        token = (await browser.api("POST", "/hub/api/users/alice/tokens", {}))["token"]
        address = f"ws{browser.base.removeprefix('http')}/services/hub-gateway"
    with Notebook(address, kernel_id, {"Authorization": f"token {token}"}) as client:
        assert client.execute("print(x + 1)").text == "42\n"
    assert second.control_c() == 0
    assert all(map(lives, kernel))

    ended = subprocess.run(
        [*DEMO, f"--directory={directory}", "--stop-kernels"],
        env={**CLEAN, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "1 kernel was ended.\n"), ended.stderr
    await eventually(lambda: not any(map(lives, kernel)), "the end of the kernel")


@ONCE
def test_ctrl_c_before_everything_has_started_leaves_nothing(start: Callable[[], Terminal], directory: Path) -> None:
    terminal = start()
    terminal.says("Starting JupyterHub")
    until(terminal.runs("jupyterhub", "--config="), "the Hub's process")
    assert terminal.control_c() == 0
    assert "Stopped." in terminal.text and "Traceback" not in terminal.text
    again = start()
    again.says("Ctrl-C stops it.")
    assert again.control_c() == 0
