"""Agents that call back: only who was launched by this gateway registers, and only once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.conftest import KERNELSPECS
from tests.harness.gateway import GatewayProcess
from tests.harness.notebook import Notebook

CALLING = {**KERNELSPECS["python"], "metadata": {"process_proxy": {"name": "posting"}}}
CONFIG = 'c.Proxies.extra_proxies = {"posting": "tests.harness.posting_proxy.PostingProxy"}\n'


def registration(gateway: GatewayProcess, kernel_id: str) -> dict[str, object]:
    """What the kernel's agent said of itself."""
    for file in Path(gateway.state).rglob("agent.json"):
        found: dict[str, object] = json.loads(file.read_text())
        if found["kernel_id"] == kernel_id:
            return found
    raise AssertionError("no agent.json for this kernel")


def test_an_agent_that_calls_back_registers_once(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway(config=CONFIG, kernelspecs={"calling": CALLING}).start()
    with gateway.client("alice") as client:
        kernel_id = client.post("/api/kernels", json={"name": "calling"}).json()["id"]
    with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
        assert notebook.execute("print('registered')").text == "registered\n"
        payload = registration(gateway, kernel_id)
        launch = f"{gateway.url}/api/launch/{kernel_id}"
        # Nobody has a user's token here: agents have none.
        replayed = httpx.post(launch, json=payload)
        assert (replayed.status_code, replayed.json()["code"]) == (409, "conflict")
        forged = httpx.post(launch, json={**payload, "port": 1})
        assert (forged.status_code, forged.json()["code"]) == (403, "forbidden")
        never = str(uuid.uuid4())
        elsewhere = httpx.post(f"{gateway.url}/api/launch/{never}", json={**payload, "kernel_id": never})
        assert elsewhere.status_code == 404
        garbage = httpx.post(launch, content=b"\x00" * 100)
        assert garbage.status_code == 400
        large = httpx.post(launch, content=b" " * 200_000)
        assert large.status_code == 413
        assert notebook.execute("print('still here')").text == "still here\n"
