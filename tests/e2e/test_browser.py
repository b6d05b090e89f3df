"""What a person sees in JupyterLab, in a real browser. Screenshots are kept under `.artefacts`."""

from __future__ import annotations

import os
import re
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.e2e.conftest import ARTEFACTS, ONCE
from tests.harness.hub import PASSWORD, RealHub
from tests.harness.waiting import until

pytestmark = [pytest.mark.needs("chromium"), ONCE]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Lab:
    """JupyterLab, as a person works it."""

    def __init__(self, page: Page, hub: RealHub, user: str) -> None:
        self.page, self.hub, self.user = page, hub, user
        self._token = ""

    def shot(self, name: str) -> None:
        """Keep a screenshot."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(ARTEFACTS / f"{name}.png"))

    def log_in(self) -> None:
        """Log in at the Hub and wait for Lab's launcher."""
        self.page.goto(f"{self.hub.url}/hub/login?next={self.hub.base_url}hub/spawn")
        self.page.locator("#username_input").fill(self.user)
        self.page.locator("#password_input").fill(PASSWORD)
        self.page.locator("#login_submit").click()
        expect(self.page.locator("#jupyterlab-splash")).to_be_hidden(timeout=120_000)
        expect(self.page.locator(".jp-Launcher").first).to_be_visible(timeout=60_000)

    def launcher(self) -> Locator:
        """The launcher, opened if it is not."""
        expect(self.page.locator("#jupyterlab-splash")).to_be_hidden(timeout=60_000)
        launcher = self.page.locator(".jp-Launcher:visible")
        if not launcher.count():
            self.page.get_by_role("button", name=re.compile("^New Launcher")).first.click()
        return launcher.first

    def new_notebook(self, kernel: str) -> None:
        """Pick the kernel in the launcher."""
        self.launcher().locator(f".jp-LauncherCard[data-category='Notebook'][title='{kernel}']").first.click()
        expect(self.notebook).to_be_visible(timeout=30_000)
        expect(self.cells.last).to_be_visible()
        # Lab passes over cells that are run before the notebook has its kernel.
        state = re.compile(re.escape(kernel) + r" \| (?!Connecting|Initializing)")
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text(state, timeout=60_000)

    def kernels(self) -> Any:
        """The user's kernels, as the gateway lists them."""
        if not self._token:
            self._token = self.hub.user_token(self.user)
        return httpx.get(
            f"{self.hub.gateway_url}/api/kernels", headers={"Authorization": f"token {self._token}"}
        ).json()

    @property
    def notebook(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @property
    def cells(self) -> Locator:
        return self.notebook.locator(".jp-CodeCell")

    def run(self, code: str) -> Locator:
        """Type into the last cell and run it; the cell."""
        index = self.cells.count() - 1
        cell = self.cells.nth(index)
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Shift+Enter")
        return cell

    @staticmethod
    def output(cell: Locator) -> Locator:
        return cell.locator(".jp-OutputArea")

    def console_beside(self) -> None:
        """Open a console on the kernel of the notebook, beside it; the notebook stays the one to type in."""
        self.cells.last.click(button="right")
        self.page.get_by_role("menuitem", name="New Console for Notebook").click()
        expect(self.page.locator(".jp-ConsolePanel .jp-CodeConsole-promptCell")).to_be_visible()
        until(lambda: [one["connections"] for one in self.kernels()] == [2], "the console to have its kernel")

    def command(self, menu: str, entry: str) -> None:
        """Choose an entry of Lab's menu."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile(entry)).first.click()


@pytest.fixture
def page(chromium: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of a browser of its own; how it looked at the end is kept."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(30_000)
        yield opened
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        opened.screenshot(path=str(ARTEFACTS / f"{request.node.name}-end.png"))
        browser.close()


@pytest.fixture
def lab(page: Page, lab_hub: RealHub, request: pytest.FixtureRequest) -> Lab:
    # A user each: Lab restores what its user had open.
    opened = Lab(page, lab_hub, f"user{zlib.crc32(request.node.name.encode())}")
    opened.log_in()
    return opened


def test_a_day_in_a_notebook(lab: Lab) -> None:
    """Run cells, see text, a figure and a slider; interrupt a loop; restart the kernel."""
    lab.shot("launcher")
    lab.new_notebook("Python")
    expect(lab.output(lab.run("print('hello from', 6 * 7)"))).to_contain_text("hello from 42", timeout=60_000)

    figure = lab.run("import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()")
    expect(figure.locator(".jp-OutputArea img")).to_be_visible(timeout=60_000)

    slider = lab.run(
        "import ipywidgets\nw = ipywidgets.IntSlider(value=3, max=10)\nseen = ipywidgets.Label()\n"
        "ipywidgets.dlink((w, 'value'), (seen, 'value'), 'the kernel has {}'.format)\nipywidgets.VBox([w, seen])"
    )
    handle = slider.locator(".noUi-handle")
    expect(handle).to_be_visible(timeout=60_000)
    handle.focus()
    lab.page.keyboard.press("ArrowRight")
    lab.page.keyboard.press("ArrowRight")
    # The second step waits in the browser until the first one is through: a cell that is run now may overtake it.
    expect(lab.output(slider)).to_contain_text("the kernel has 5")
    expect(lab.output(lab.run("print('slider at', w.value)"))).to_contain_text("slider at 5")
    lab.shot("outputs")

    loop = lab.run("import time\nwhile True: time.sleep(0.1)")
    expect(loop.locator(".jp-InputPrompt")).to_contain_text("*")
    lab.command("Kernel", "Interrupt Kernel")
    expect(lab.output(loop)).to_contain_text("KeyboardInterrupt")
    lab.shot("interrupted")

    lab.command("Kernel", r"^Restart Kernel…")
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    expect(lab.output(lab.run("print('w' in globals())"))).to_contain_text("False", timeout=60_000)
    lab.shot("restarted")


def test_a_kernel_that_dies_at_start_says_why(lab: Lab) -> None:
    """The last lines of stderr and the exit code stand in the notebook."""
    lab.new_notebook("Dies at start")
    # However long it has been dead when the cell is run.
    until(lambda: [one["execution_state"] for one in lab.kernels()] == ["dead"], "the kernel to have died")
    cell = lab.run("1 + 1")
    expect(lab.output(cell)).to_contain_text("libcudart.so.12", timeout=60_000)
    expect(lab.output(cell)).to_contain_text("exit code 3")
    lab.shot("dies-at-start")


@pytest.mark.parametrize("connection", ["lab_hub", "hub"], ids=["companion", "stock"])
def test_a_kernel_that_dies_is_told_once(
    page: Page, connection: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Notebook and console each open their websocket again, once; the notebook says it, once; and all goes on."""
    hub = request.getfixturevalue(connection)
    lab = Lab(page, hub, f"user{zlib.crc32(request.node.name.encode())}")
    lab.log_in()
    lab.new_notebook("Python")
    expect(lab.output(lab.run("print('first')"))).to_contain_text("first", timeout=60_000)
    lab.console_beside()
    # What ZeroMQ had not handed to the system yet would die with the kernel.
    now = tmp_path / "now"
    wait = f"while not os.path.exists({str(now)!r}): pass"
    fatal = lab.run(f"import os; print('last words', flush=True)\n{wait}\nos.kill(os.getpid(), 9)")
    expect(lab.output(fatal)).to_contain_text("last words", timeout=60_000)
    # What was opened before has been told by now. (Each stock one was opened twice: it has no subprotocol.)
    opened: list[str] = []
    page.on("websocket", lambda websocket: opened.append(websocket.url))
    now.touch()
    dialogs = page.locator(".jp-Dialog", has_text="Kernel Restarting")
    expect(dialogs).to_be_visible(timeout=60_000)
    until(lambda: [one["execution_state"] for one in lab.kernels()] == ["idle"], "the kernel to be back")
    lab.shot(f"died-{request.node.callspec.id}")
    told = 0
    while dialogs.count():
        # Lab shows the next one when the one before is gone.
        dialogs.first.get_by_role("button").last.click()
        told += 1
    expect(lab.output(lab.run("print('back', 'fatal' in globals())"))).to_contain_text("back False", timeout=60_000)
    while dialogs.count():
        dialogs.first.get_by_role("button").last.click()
        told += 1
    channels = [url for url in opened if "/channels" in url]
    assert (told, len(channels)) == (1, 2), channels
    text = lab.output(fatal).inner_text()
    assert text.count("last words") == 1 and text.count("exit code 137") == 1, text
    lab.shot(f"died-{request.node.callspec.id}-back")


def test_a_cell_ends_when_the_agent_is_killed(lab: Lab) -> None:
    """The cells that run and wait say why; nothing is left at [*]."""
    lab.new_notebook("Python")
    running = lab.run("import time\nprint('go', flush=True)\ntime.sleep(600)")
    waiting = lab.run("print('never')")
    expect(lab.output(running)).to_contain_text("go", timeout=60_000)
    (kernel,) = lab.kernels()
    (agent,) = [one for one in lab.hub.agents() if kernel["id"] in one.cmdline()]
    agent.kill()
    for cell in (running, waiting):
        expect(lab.output(cell)).to_contain_text("The kernel ended with its agent", timeout=60_000)
        expect(cell.locator(".jp-InputPrompt")).not_to_contain_text("*")
    assert lab.output(running).inner_text().count("ended with its agent") == 1
    lab.shot("agent-killed")


def test_the_output_completes_when_the_gateway_is_killed(lab: Lab) -> None:
    """kill -9 during a cell: the Hub starts the gateway again, and nothing is missing."""
    lab.new_notebook("Python")
    cell = lab.run("import time\nfor i in range(60):\n    print('line', i, flush=True); time.sleep(0.1)")
    expect(lab.output(cell)).to_contain_text("line 5\n", timeout=60_000)
    gateway = lab.hub.gateway_pid
    os.kill(gateway, signal.SIGKILL)
    # The Hub looks after its services every 30 seconds at most.
    until(lambda: lab.hub.gateway_pid not in (0, gateway), "the Hub to start the gateway again", timeout=60)
    expect(lab.output(cell)).to_contain_text("line 59", timeout=60_000)
    text = lab.output(cell).inner_text()
    assert [int(n) for n in re.findall(r"line (\d+)", text)] == list(range(60))
    expect(lab.output(lab.run("print('variables', i)"))).to_contain_text("variables 59", timeout=60_000)
    lab.shot("after-kill")
