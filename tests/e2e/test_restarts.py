"""The Hub, and with it its managed service, is restarted; so is the proxy. Kernels and notebooks go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.realhub import RealHub
from tests.harness.jupyter_server import JupyterServer
from tests.harness.notebook import Message, Notebook
from tests.harness.waiting import until

SECONDS = 40


@pytest.fixture
def server(own_hub: RealHub, tmp_path: Path) -> Iterator[JupyterServer]:
    """A stock jupyter_server that is no child of the Hub, and so outlives it, as one in a container does."""
    jupyter = JupyterServer(tmp_path / "server", gateway_url=own_hub.service, gateway_token=own_hub.token("alice"))
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
    """Nothing of the cell's output is lost; what came twice came in one run (the batch in flight)."""
    result = notebook.collect(request, timeout=SECONDS * 3)
    assert result.status == "ok"
    streams = [m for m in [*messages, *result.messages] if m["header"]["msg_type"] == "stream"]
    numbers = [int(line) for m in streams for line in m["content"]["text"].split()]
    assert list(dict.fromkeys(numbers)) == list(range(SECONDS * 10))
    assert notebook.execute("print(secret)").text == "42\n"


def test_the_hub_and_the_gateway_restart_under_a_running_cell(own_hub: RealHub, server: JupyterServer) -> None:
    kernel_id = server.open_notebook("python")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        request, messages = start_counting(notebook)
        agents = {agent.pid for agent in own_hub.agents()}
        own_hub.stop_hub()
        # The proxy keeps the route: a 404 would make jupyter_server forget the kernel.
        assert httpx.get(f"{own_hub.service}/api/kernels/{kernel_id}").status_code == 503
        own_hub.start_hub()
        check_all_of_it(notebook, request, messages)
    assert {agent.pid for agent in own_hub.agents()} == agents


def test_the_proxy_restarts_under_a_running_cell(own_hub: RealHub, server: JupyterServer) -> None:
    kernel_id = server.open_notebook("python")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        request, messages = start_counting(notebook)
        own_hub.stop_proxy()
        own_hub.start_proxy()
        own_hub.ready()  # the Hub has given its routes to the new proxy
        check_all_of_it(notebook, request, messages)


def test_a_login_that_was_under_way_survives_the_restart(own_hub: RealHub) -> None:
    """The OAuth state of a browser at the login page is in the database, not in the memory of the old process."""
    with httpx.Client(headers={"Sec-Fetch-Mode": "navigate"}, timeout=30) as browser:
        first = browser.get(f"{own_hub.service}/home")
        assert first.status_code == 302
        authorize = browser.get(httpx.URL(own_hub.url).join(first.headers["location"]))
        login = httpx.URL(own_hub.url).join(authorize.headers["location"])
        assert login.path == "/hub/login"
        own_hub.stop_hub()
        own_hub.start_hub()
        page = browser.get(login)
        form = {
            "username": "alice",
            "password": own_hub.password("alice"),
            "_xsrf": browser.cookies.get("_xsrf", path="/hub/") or "",
        }
        browser.follow_redirects = True
        answer = browser.post(page.url, data=form)
        assert answer.status_code == 200, answer.text[:2000]
        assert answer.url.path == "/services/hub-gateway/home"
        assert "alice" in answer.text


def test_no_second_kernel_exists_after_a_hub_that_was_killed(own_hub: RealHub) -> None:
    """kill -9 of the Hub orphans its service: it must make way for the next Hub's."""
    token = own_hub.token("alice")
    with own_hub.client(token) as client:
        kernel_id = client.post("/api/kernels", json={"name": "python"}).json()["id"]
    with Notebook(own_hub.ws_service, kernel_id, {"Authorization": f"token {token}"}) as notebook:
        notebook.execute("x = 1")
    hub = own_hub.processes.hub
    assert hub is not None
    hub.kill()
    hub.wait()
    own_hub.start_hub()
    assert len(own_hub.agents()) == 1

    def alive() -> bool:
        with own_hub.client(token) as client:
            answer = client.get(f"/api/kernels/{kernel_id}")
            return answer.status_code == 200 and answer.json()["execution_state"] == "idle"

    until(alive, "the kernel to be idle at the new gateway")
    with Notebook(own_hub.ws_service, kernel_id, {"Authorization": f"token {token}"}) as notebook:
        assert notebook.execute("print(x)").text == "1\n"
