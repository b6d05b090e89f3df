"""Two users of one gateway see nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import websocket

from tests.e2e.realhub import RealHub
from tests.harness.notebook import Notebook


@pytest.fixture
def alice(real_hub: RealHub) -> Iterator[httpx.Client]:
    with real_hub.client(real_hub.token("alice")) as client:
        yield client
        for kernel in client.get("/api/kernels").json():
            client.delete(f"/api/kernels/{kernel['id']}")


@pytest.fixture
def bob(real_hub: RealHub) -> Iterator[httpx.Client]:
    with real_hub.client(real_hub.token("bob")) as client:
        yield client


def test_kernels_of_others_look_as_if_they_did_not_exist(
    real_hub: RealHub, alice: httpx.Client, bob: httpx.Client
) -> None:
    session = alice.post(
        "/api/sessions",
        json={"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "python"}},
    )
    assert session.status_code == 201, session.text
    kernel_id = session.json()["kernel"]["id"]
    missing = kernel_id[:-4] + ("0000" if not kernel_id.endswith("0000") else "1111")

    assert bob.get("/api/kernels").json() == []
    assert bob.get("/api/sessions").json() == []
    for method, path in (
        ("GET", "/api/kernels/{}"),
        ("DELETE", "/api/kernels/{}"),
        ("POST", "/api/kernels/{}/interrupt"),
        ("POST", "/api/kernels/{}/restart"),
    ):
        foreign, absent = (bob.request(method, path.format(kernel)) for kernel in (kernel_id, missing))
        assert foreign.status_code == absent.status_code == 404, (method, path, foreign.text)
        assert foreign.json()["message"].replace(kernel_id, "") == absent.json()["message"].replace(missing, "")
    foreign = bob.get(f"/api/sessions/{session.json()['id']}")
    assert foreign.status_code == 404
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        Notebook(real_hub.ws_service, kernel_id, {"Authorization": bob.headers["Authorization"]})
    assert refused.value.status_code == 404

    # ... and alice's kernel has noticed nothing of it.
    with Notebook(real_hub.ws_service, kernel_id, {"Authorization": alice.headers["Authorization"]}) as notebook:
        assert notebook.execute("import os; print(os.environ['KERNEL_USERNAME'])").text == "alice\n"


def test_a_client_cannot_choose_who_it_is(alice: httpx.Client) -> None:
    claimed = alice.post("/api/kernels", json={"name": "python", "env": {"KERNEL_USERNAME": "bob"}})
    assert claimed.status_code == 403
    assert "bob" in claimed.json()["message"]


def test_the_same_token_sees_its_own(alice: httpx.Client) -> None:
    made = alice.post("/api/kernels", json={"name": "python"})
    assert made.status_code == 201
    assert made.json()["id"] in {kernel["id"] for kernel in alice.get("/api/kernels").json()}
