"""`make demo CHECK=1`: what a person would do with the demonstration, step by step, without a terminal."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hub_gateway.deadlines import within
from hub_gateway.demo import limits
from hub_gateway.demo.browser import Browser, Message, Notebook, StepFailed
from hub_gateway.demo.processes import until
from hub_gateway.demo.state import Settings

__all__ = ["Say", "drive", "step"]

Say = Callable[[str], None]
STEP_SECONDS = 120.0

PICTURE = """\
%matplotlib inline
import matplotlib.pyplot as plt
plt.plot([1, 4, 9, 16]); plt.show()
"""
WIDGET = """\
import ipywidgets
ipywidgets.Image(value=bytes(range(256)) * 64, format='png')
"""


async def step(say: Say, what: str, doing: Awaitable[str | None]) -> None:
    """One step: its line, with the time it took. Raises `StepFailed` where it takes too long."""
    started = time.monotonic()
    try:
        more = await within(doing, STEP_SECONDS)
    except asyncio.TimeoutError:
        raise StepFailed(f"{what}: not done within {STEP_SECONDS:.0f} s.") from None
    say(f"{time.monotonic() - started:7.2f} s  {what}{f': {more}' if more else ''}")


async def drive(settings: Settings, say: Say) -> None:
    """Log in as alice, start her server, run a notebook on the gateway, put everything back. Raises `StepFailed`."""
    async with _browser(settings) as admin:
        await step(say, "the administrator logs in at the Hub", admin.log_in("admin", settings.admin_password))
        await step(say, "and says what kernels cost", limits.priced(admin))
    async with _browser(settings) as browser:
        await step(say, "alice logs in at the Hub", browser.log_in("alice", settings.user_password))
        await step(say, "her server starts", start_server(browser))
        await step(say, "JupyterLab opens", _lab(browser))
        await step(say, "the gateway's kernelspecs are there", _kernelspecs(browser))
        session = await _timed_session(browser, say)
        kernel_id = str(session["kernel"]["id"])
        notebook = await browser.notebook(kernel_id)
        try:
            await step(say, "a cell prints text", _text(notebook))
            await step(say, "a cell draws a matplotlib picture", _picture(notebook))
            await step(say, "a cell shows an ipywidget with a binary buffer", _widget(notebook))
            await step(say, "a cell asks for input()", _input(notebook))
        finally:
            notebook.close()
        await step(say, "the gateway's own page knows her by the Hub's login", _own_page(browser))
        await step(say, "the notebook is closed, its kernel ends", _close(browser, session))
        await step(say, "her server stops", browser.api("DELETE", "/hub/api/users/alice/server"))
    await _limits(settings, say)


async def _limits(settings: Settings, say: Say) -> None:
    """Bob meets his limit, the administrator raises it, his next kernel starts, the report bills both."""
    async with _browser(settings) as bob, _browser(settings) as admin:
        await step(say, "bob logs in", bob.log_in("bob", settings.user_password))
        await step(say, "his server starts", start_server(bob))
        await step(say, "JupyterLab opens for him, too", _lab(bob))
        sessions: list[Message] = []

        async def opened(name: str) -> str:
            sessions.append(await limits.open_notebook(bob, name))
            return f"kernel {sessions[-1]['kernel']['id']}"

        await step(say, "his first notebook opens", opened("first.ipynb"))
        await step(say, "a second one is refused", limits.refused(bob, "second.ipynb"))
        await step(say, "the administrator logs in", admin.log_in("admin", settings.admin_password))
        await step(say, "and raises the limit in the console", limits.raised(admin, 2))
        await step(say, "bob's second notebook opens", opened("second.ipynb"))
        for session in sessions:
            await step(say, "a notebook of his is closed", _close(bob, session))
        await step(say, "the report bills both", limits.billed(admin, ("alice", "bob")))
        await step(say, "his server stops", bob.api("DELETE", "/hub/api/users/bob/server"))


@asynccontextmanager
async def _browser(settings: Settings) -> AsyncIterator[Browser]:
    browser = Browser(settings.public_url)
    try:
        yield browser
    finally:
        await browser.close()


async def start_server(browser: Browser) -> str | None:
    """Start the user's server, and wait until it answers."""
    await browser.page("/hub/home")
    await browser.api("POST", f"/hub/api/users/{browser.name}/server")

    async def ready() -> bool:
        user = await browser.api("GET", f"/hub/api/users/{browser.name}")
        return bool(user["servers"].get("", {}).get("ready"))

    await until(ready, f"the start of the server of {browser.name}", STEP_SECONDS)
    return None


async def _lab(browser: Browser) -> str | None:
    page = await browser.page(f"/user/{browser.name}/lab")
    if "jupyter-config-data" not in page.text:
        raise StepFailed("What should be JupyterLab is another page.")
    return None


async def _kernelspecs(browser: Browser) -> str:
    found = await browser.api("GET", f"/user/{browser.name}/api/kernelspecs")
    if list(found["kernelspecs"]) != ["python_local"]:
        raise StepFailed(f"The launcher is to show python_local: {', '.join(found['kernelspecs']) or 'nothing'} found.")
    return ", ".join(sorted(found["kernelspecs"]))


async def _timed_session(browser: Browser, say: Say) -> Message:
    found: Message = {}

    async def opened() -> str:
        wanted = {"path": "first.ipynb", "name": "first.ipynb", "type": "notebook", "kernel": {"name": "python_local"}}
        found.update(await browser.api("POST", f"/user/{browser.name}/api/sessions", wanted))
        return f"kernel {found['kernel']['id']}"

    await step(say, "a notebook opens", opened())
    return found


async def _text(notebook: Notebook) -> str:
    messages = await notebook.run("import os\nprint('hello from', os.environ['KERNEL_USERNAME'])")
    text = "".join(m["content"]["text"] for m in messages if m["header"]["msg_type"] == "stream")
    if text != "hello from alice\n":
        raise StepFailed(f"The cell printed {text!r} and should have printed 'hello from alice'.")
    return text.strip()


async def _picture(notebook: Notebook) -> str:
    messages = await notebook.run(PICTURE)
    pictures = [m["content"]["data"]["image/png"] for m in messages if "image/png" in m["content"].get("data", {})]
    if not pictures:
        raise StepFailed("The cell brought no picture.")
    data = base64.b64decode(pictures[0])
    if not data.startswith(b"\x89PNG\r\n"):
        raise StepFailed("The picture is no PNG.")
    return f"{len(data)} bytes of PNG"


async def _widget(notebook: Notebook) -> str:
    messages = await notebook.run(WIDGET)
    wanted = bytes(range(256)) * 64
    buffers = [bytes(b) for m in messages if m["header"]["msg_type"] == "comm_open" for b in m["buffers"]]
    if wanted not in buffers:
        raise StepFailed(f"The widget's buffer did not arrive; {len(buffers)} buffers came.")
    if not any("application/vnd.jupyter.widget-view+json" in m["content"].get("data", {}) for m in messages):
        raise StepFailed("The cell's result is no widget.")
    return f"{len(wanted)} bytes, every one right"


async def _input(notebook: Notebook) -> str:
    messages = await notebook.run("print('it was', input('which? '))", answer="this one")
    prompts = [m["content"]["prompt"] for m in messages if m["header"]["msg_type"] == "input_request"]
    text = "".join(m["content"]["text"] for m in messages if m["header"]["msg_type"] == "stream")
    if prompts != ["which? "] or text != "it was this one\n":
        raise StepFailed(f"input() asked {prompts!r} and the cell printed {text!r}.")
    return text.strip()


async def _own_page(browser: Browser) -> str | None:
    page = await browser.page("/services/hub-gateway/home")
    if browser.name not in page.text:
        raise StepFailed("The gateway's page does not name the user who is logged in.")
    return None


async def _close(browser: Browser, session: Message) -> str | None:
    await browser.api("DELETE", f"/user/{browser.name}/api/sessions/{session['id']}")

    async def gone() -> bool:
        kernels = await browser.api("GET", f"/user/{browser.name}/api/kernels")
        return session["kernel"]["id"] not in {kernel["id"] for kernel in kernels}

    await until(gone, "the end of the kernel", 30.0)
    return None
