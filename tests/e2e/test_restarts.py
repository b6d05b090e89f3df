"""The Hub, and with it its managed service, is restarted; so is the proxy. Kernels and notebooks go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ONCE
from tests.harness.hub import RealHub
from tests.harness.jupyter_server import JupyterServer
from tests.harness.notebook import Message, Notebook
from tests.harness.output import printed, repeated

pytestmark = ONCE

SECONDS = 40
IN_FLIGHT = 10


@pytest.fixture
def server(own_hub: RealHub, tmp_path: Path) -> Iterator[JupyterServer]:
    """A stock jupyter_server that is no child of the Hub, and so outlives it, as one in a container does."""
    jupyter = JupyterServer(
        tmp_path / "server", gateway_url=own_hub.gateway_url, gateway_token=own_hub.user_token("alice")
    )
    yield jupyter
    jupyter.close()


def start_counting(notebook: Notebook) -> tuple[str, list[Message]]:
    """A cell that prints for a while; its request, and the first of its output."""
    notebook.execute("secret = 42; import time")
    code = f"for i in range({SECONDS * 10}): print(i, flush=True); time.sleep(0.1)"
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    request = notebook.send("execute_request", content)
    messages: list[Message] = []
    while len([m for m in messages if m["header"]["msg_type"] == "stream"]) < 5:
        messages.append(notebook.receive())
    return request, messages


def check_all_of_it(notebook: Notebook, request: str, messages: list[Message]) -> None:
    """Nothing of the cell's output is lost or out of order; no more than was in flight came twice, in one run."""
    result = notebook.collect(request, timeout=SECONDS * 3)
    assert result.status == "ok"
    again = repeated(printed([*messages, *result.messages]), SECONDS * 10)
    # A line each tenth of a second, and a ping after each: what has no pong yet is little.
    assert again <= IN_FLIGHT, f"{again} lines came twice; at most {IN_FLIGHT} may"
    assert notebook.execute("print(secret)").text == "42\n"


def test_the_hub_and_the_gateway_restart_under_a_running_cell(own_hub: RealHub, server: JupyterServer) -> None:
    kernel_id = server.open_notebook("python")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        request, messages = start_counting(notebook)
        before = own_hub.gateway_pid
        own_hub.stop_hub()
        # The proxy keeps the route: a 404 would make jupyter_server forget the kernel.
        assert httpx.get(f"{own_hub.gateway_url}/api/kernels/{kernel_id}").status_code == 503
        own_hub.start_hub()
        assert own_hub.gateway_pid != before
        check_all_of_it(notebook, request, messages)


def test_the_proxy_restarts_under_a_running_cell(own_hub: RealHub, server: JupyterServer) -> None:
    kernel_id = server.open_notebook("python")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        request, messages = start_counting(notebook)
        assert own_hub.proxy is not None
        own_hub.proxy.kill()
        own_hub.proxy.wait(10)
        own_hub.start_proxy()
        check_all_of_it(notebook, request, messages)
