"""A stock jupyter_server that knows nothing of us but its gateway environment runs a notebook from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ONCE
from tests.harness.hub import RealHub
from tests.harness.jupyter_server import JupyterServer
from tests.harness.notebook import Notebook

pytestmark = ONCE

LINES = 20_000


@pytest.fixture
def server(hub: RealHub, tmp_path: Path) -> Iterator[JupyterServer]:
    """As in a single-user server: the gateway's address through the Hub's proxy, and alice's token."""
    jupyter = JupyterServer(tmp_path / "server", gateway_url=hub.gateway_url, gateway_token=hub.user_token("alice"))
    yield jupyter
    jupyter.close()


def test_a_notebook_from_end_to_end(server: JupyterServer) -> None:
    kernel_id = server.open_notebook("python")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        result = notebook.execute(f"for i in range({LINES}): print(i, flush=True)", timeout=180)
        assert result.status == "ok"
        assert result.text.split() == [str(number) for number in range(LINES)]
        asked = notebook.execute("print('got', input('what? '))", answer=lambda message: message["content"]["prompt"])
        assert asked.text == "got what? \n"
        failed = notebook.execute("1 / 0")
        assert failed.status == "error"
        assert failed.of_type("error")[0]["content"]["ename"] == "ZeroDivisionError"
    with server.client() as client:
        assert client.post(f"/api/kernels/{kernel_id}/restart").status_code == 200
        assert client.delete(f"/api/kernels/{kernel_id}").status_code == 204


def test_a_kernel_that_dies_at_start_says_why_in_the_cell(server: JupyterServer) -> None:
    kernel_id = server.open_notebook("dies", "dies.ipynb")
    with Notebook(server.ws_url, kernel_id, server.headers) as notebook:
        result = notebook.execute("1")
        said = " ".join([result.text, *(str(m["content"]) for m in result.of_type("error"))])
        assert "libcudart.so.12" in said, "the last line of the kernel's stderr"
        assert "3" in said, "its exit code"
