"""A kernel outlives its gateway: real processes, real kill -9."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from hub_gateway.db.engine import Database
from hub_gateway.db.models import WaitingRequest
from tests.harness.gateway import ROOT, GatewayProcess
from tests.harness.jupyter_server import JupyterServer
from tests.harness.notebook import Message, Notebook
from tests.harness.output import printed, repeated
from tests.harness.waiting import until

LINES = 20_000
ONE_BATCH = 512
"""Messages in one link frame: what was written and not yet reported when the gateway died may come again."""
ONE_AT_A_TIME = """
policies:
- name: one
  subject: everyone
  hard: 1
  action: queue
"""
PRINT = """
import os
for i in range({lines}):
    print(i, flush=True)
    while i == 19_000 and not os.path.exists({go!r}):
        pass
open({ended!r}, "w").close()
"""


COMPANION = "--ServerApp.kernel_websocket_connection_class=hub_gateway.companion.NumberedGatewayConnection"


@pytest.fixture(params=["stock", "companion"])
def server(gateway: GatewayProcess, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JupyterServer]:
    """A jupyter_server in front of the gateway, as alice's single-user server: stock, or with our connection class."""
    jupyter = JupyterServer(
        tmp_path / "server",
        gateway_url=gateway.url,
        gateway_token=gateway.tokens["alice"],
        arguments=(COMPANION,) if request.param == "companion" else (),
        env={"PYTHONPATH": str(ROOT)},
    )
    jupyter.exactly_once = request.param == "companion"
    yield jupyter
    jupyter.close()


def start_kernel(gateway: GatewayProcess, user: str = "alice", name: str = "python") -> str:
    with gateway.client(user) as client:
        answer = client.post("/api/kernels", json={"name": name})
        assert answer.status_code == 201, answer.text
        kernel_id: str = answer.json()["id"]
        return kernel_id


def test_no_output_is_lost_when_the_gateway_is_killed(
    gateway: GatewayProcess, server: JupyterServer, tmp_path: Path
) -> None:
    """The single-user server's own client reconnects; every line, every idle and every variable is there."""
    kernel_id = server.open_notebook("python")
    go, ended = tmp_path / "go", tmp_path / "ended"
    # Numbers are for the v1 form, which JupyterLab speaks; the stock class knows the old one only.
    with Notebook(server.ws_url, kernel_id, server.headers, v1=server.exactly_once) as notebook:
        notebook.execute("secret = 42")
        running = run_cell(notebook, PRINT.format(lines=LINES, go=str(go), ended=str(ended)))
        messages: list[Message] = []
        lines = 0
        while lines < 3000:
            messages.append(notebook.receive())
            lines += printed(messages[-1:]).count("\n")
        gateway.kill()
        assert not ended.exists(), "the cell was at its end before the gateway was killed"
        go.touch()
        gateway.start()
        result = notebook.collect(running, timeout=120)
        assert result.status == "ok"
        again = repeated(printed(messages + result.messages), LINES)
        allowed = 0 if server.exactly_once else ONE_BATCH
        assert again <= allowed, f"{again} lines came twice; at most {allowed} may"
        assert notebook.execute("print(secret)").text == "42\n"
    assert len(gateway.agents()) == 1


def test_a_notebook_that_opens_its_websocket_twice_gets_its_replies(server: JupyterServer) -> None:
    """As JupyterLab does where it is not given the subprotocol that it asks for: it closes the first at once."""
    kernel_id = server.open_notebook("python")
    for number in range(40):
        session = f"twice-{number}"
        Notebook(server.ws_url, kernel_id, server.headers, session=session, v1=server.exactly_once).close()
        with Notebook(server.ws_url, kernel_id, server.headers, session=session, v1=server.exactly_once) as notebook:
            assert notebook.execute(f"print({number})").text == f"{number}\n"


def waiting_requests(gateway: GatewayProcess) -> list[str]:
    """What is stored of requests that wait for a kernel."""
    db = Database(gateway.db_url)
    try:
        with db.engine.connect() as connection:
            return list(connection.execute(select(WaitingRequest.frames)).scalars())
    finally:
        db.engine.dispose()


def run_cell(notebook: Notebook, code: str) -> str:
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    return notebook.send("execute_request", content)


def killed(gateway: GatewayProcess) -> None:
    gateway.kill()
    gateway.start()


def stopped(gateway: GatewayProcess) -> None:
    assert gateway.stop(timeout=60) == 0  # it first waits for what a launch is doing
    gateway.start()


@pytest.mark.parametrize(("end", "later"), [(killed, False), (killed, True), (stopped, False)])
def test_a_cell_that_waits_for_its_kernel_survives_the_gateway(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path, end: Callable[[GatewayProcess], None], later: bool
) -> None:
    """It runs once, and its client gets all of it, whether it comes back before the cell runs or after it."""
    slow, go, ran = tmp_path / "python", tmp_path / "go", tmp_path / "ran"
    slow.write_text(f'#!/bin/sh\nwhile ! test -e {go}; do sleep 0.05; done\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    gateway = make_gateway(config=f"c.LocalProxy.python = {str(slow)!r}\n").start()
    kernel_id = start_kernel(gateway)
    code = f"print('this ran', open({str(ran)!r}, 'a').write('x'))"
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        first, second = run_cell(notebook, code), run_cell(notebook, "print('second')")
        stored = until(lambda: (waiting_requests(gateway) or [""])[1:] and waiting_requests(gateway), "both to be kept")
    assert len(stored) == 2 and not any("this ran" in one for one in stored), "what users run is nobody's business"
    end(gateway)

    def back() -> Notebook:
        return Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True)

    if later:
        go.touch()
        until(ran.exists, "the cell to run")
    with back() as notebook:
        go.touch()
        result, after = notebook.collect(first), notebook.collect(second)
        assert (result.status, result.text) == ("ok", "this ran 1\n")
        assert (after.status, after.text) == ("ok", "second\n")
        assert notebook.execute("print('third')").text == "third\n"
    assert ran.read_text() == "x"
    until(lambda: not waiting_requests(gateway), "nothing to be kept any more")
    assert len(gateway.agents()) == 1


@pytest.mark.parametrize("end", [killed, stopped])
def test_a_cell_of_a_queued_kernel_survives_the_gateway(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path, end: Callable[[GatewayProcess], None]
) -> None:
    policies = tmp_path / "policies.yaml"
    policies.write_text(ONE_AT_A_TIME)
    gateway = make_gateway(config=f"c.QuotaService.initial_policies = {str(policies)!r}\n").start()
    holder = start_kernel(gateway)
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        cell = run_cell(notebook, "print('at last')")
        until(lambda: waiting_requests(gateway), "it to be kept")
    end(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        with gateway.client("alice") as client:
            assert client.delete(f"/api/kernels/{holder}").status_code == 204
        result = notebook.collect(cell)
        assert (result.status, result.text) == ("ok", "at last\n")


def test_a_cell_whose_kernel_never_comes_is_told_so_after_a_restart(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    """Also where the kernel fails before its client is back."""
    slow, go = tmp_path / "python", tmp_path / "go"
    slow.write_text(f"#!/bin/sh\nwhile ! test -e {go}; do sleep 0.05; done\necho no such module >&2\nexit 1\n")
    slow.chmod(0o755)
    gateway = make_gateway(config=f"c.LocalProxy.python = {str(slow)!r}\n").start()
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        cell = run_cell(notebook, "print('never')")
        until(lambda: waiting_requests(gateway), "it to be kept")
    killed(gateway)
    go.touch()

    def dead() -> bool:
        with gateway.client("alice") as client:
            return bool(client.get(f"/api/kernels/{kernel_id}").json().get("execution_state") == "dead")

    until(dead, "the kernel to have failed")
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        result = notebook.collect(cell)
        assert result.status == "error" and "no such module" in str(result.of_type("error")[0]["content"])
    until(lambda: not waiting_requests(gateway), "nothing to be kept any more")


def test_a_client_whose_kernel_was_lost_with_the_gateway_is_not_left_waiting(gateway: GatewayProcess) -> None:
    """Its cell ran, and nobody is left who knows of it; JupyterLab would show it as running for ever."""
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        notebook.execute("import time")
        run_cell(notebook, "time.sleep(600)")
    agents = gateway.agents()
    gateway.kill()
    for agent in agents:
        agent.kill()
    gateway.start()
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="s", v1=True) as notebook:
        until(lambda: notebook.receive()["content"].get("execution_state") == "dead", "to be told", timeout=60)


def test_output_waits_for_a_client_that_is_away(gateway: GatewayProcess, tmp_path: Path) -> None:
    """What a kernel prints while its gateway is dead and nobody listens is kept, buffers too."""
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="kept", v1=True) as notebook:
        notebook.execute("from comm import create_comm; import os")
        killed, written = tmp_path / "killed", tmp_path / "written"
        code = (
            f"while not os.path.exists({str(killed)!r}): pass\n"
            "c = create_comm(target_name='t', data={'n': 1}, buffers=[b'\\x00\\xff' * 1000])\n"
            "print('done', flush=True)\n"
            f"open({str(written)!r}, 'w').close()"
        )
        request = {"code": code, "silent": False, "user_expressions": {}, "allow_stdin": False}
        running = notebook.send("execute_request", request)
        until(
            lambda: any(m["content"].get("execution_state") == "busy" for m in [notebook.receive()]), "the cell to run"
        )
    gateway.kill()
    killed.touch()
    until(written.exists, "the output to be written while nobody is there")
    gateway.start()
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice"), session="kept", v1=True) as notebook:
        result = notebook.collect(running)
        opened = result.of_type("comm_open")
        assert [bytes(b) for b in opened[0]["buffers"]] == [b"\x00\xff" * 1000]
        assert result.text == "done\n"


def test_a_stock_kernelspec_drops_nothing(gateway: GatewayProcess) -> None:
    """ipykernel's own launcher would give up messages beyond a thousand that wait, without a word."""
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        notebook.execute("from ipykernel.kernelapp import IPKernelApp")
        shown = notebook.execute("print(IPKernelApp.instance().iopub_thread.socket.sndhwm)")
        assert shown.text == "0\n"


def test_kernels_are_listed_and_usable_after_a_restart(gateway: GatewayProcess) -> None:
    """SIGTERM is not a reason to stop a kernel either."""
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        notebook.execute("x = 'still here'")
    assert gateway.stop() == 0
    gateway.start()
    with gateway.client("alice") as client:
        assert [k["id"] for k in client.get("/api/kernels").json()] == [kernel_id]
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        assert notebook.execute("print(x)").text == "still here\n"
    assert len(gateway.agents()) == 1


def test_a_kernel_that_was_killed_while_the_gateway_was_down_is_not_a_ghost(gateway: GatewayProcess) -> None:
    """The node died with the kernel: the row must say dead and give its reservation back."""
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        notebook.execute("pass")
    agents = gateway.agents()
    gateway.kill()
    for agent in agents:
        for child in agent.children(recursive=True):
            child.kill()
        agent.kill()
    gateway.start()
    with gateway.client("alice") as client:

        def state() -> str:
            answer = client.get(f"/api/kernels/{kernel_id}")
            return "gone" if answer.status_code == 404 else str(answer.json()["execution_state"])

        until(lambda: state() in ("dead", "gone"), "the kernel to be reported dead", timeout=40)


def test_orphaned_kernels_end_themselves(make_gateway: Callable[..., GatewayProcess]) -> None:
    """An agent that no gateway has spoken to for its limit ends itself and its kernel."""
    gateway = make_gateway(config="c.Controller.orphan_seconds = 2.0\n").start()
    kernel_id = start_kernel(gateway)
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        pid = int(notebook.execute("import os; print(os.getpid())").text)
    agents = gateway.agents()
    assert agents
    gateway.kill()
    import psutil

    until(lambda: not psutil.pid_exists(pid) and not gateway.agents(), "agent and kernel to end", timeout=20)
