"""What is asked of a swarm's manager, and changed there while others change it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError

from hub_gateway.errors import Unavailable
from hub_gateway.proxies.docker_client import DockerDaemon, fault_of_logins
from hub_gateway.proxies.swarm_manager import SwarmManager

OVERTAKEN = "rpc error: code = Unknown desc = update out of sequence"


class Api:
    """A manager of one service, whose task was started anew `attempt` times. It refuses updates, then takes them."""

    def __init__(self, attempt: int, *refusals: str) -> None:
        self.attempt = attempt
        self.refusals = list(refusals)

    def inspect_service(self, service: str) -> dict[str, Any]:
        return {"Version": {"Index": 7}, "Spec": {"TaskTemplate": {"ForceUpdate": self.attempt, "Kept": True}}}

    def update_service(self, service: str, version: int, *, task_template: dict[str, Any], **_: Any) -> None:
        if self.refusals:
            raise APIError(self.refusals.pop(0))
        assert task_template["Kept"]
        self.attempt = task_template["ForceUpdate"]


def manager_of(api: Api) -> SwarmManager:
    daemon = DockerDaemon("unix:///nonexistent", timeout=1, threads=1)
    daemon._api = api
    return SwarmManager(daemon)


@pytest.mark.parametrize(
    ("refusals", "attempt", "then"),
    [
        pytest.param((), 0, 1, id="at-once"),
        pytest.param((OVERTAKEN, OVERTAKEN), 0, 1, id="the-swarm-wrote-in-between"),
        pytest.param((), 1, 1, id="somebody-else-has-done-it"),
    ],
)
async def test_a_task_is_started_anew_once(refusals: tuple[str, ...], attempt: int, then: int) -> None:
    """Whoever is late must not end the kernel that another gateway has started by now."""
    api = Api(attempt, *refusals)
    assert await manager_of(api).again("s1", 0) == then
    assert api.attempt == then


async def test_a_refusal_is_no_fault_of_the_kernels() -> None:
    with pytest.raises(Unavailable, match=r"^The swarm does not answer; try again"):
        await manager_of(Api(0, "context deadline exceeded")).again("s1", 0)
    with pytest.raises(Unavailable, match=r"^The swarm does not answer; try again"):
        await manager_of(Api(0, *[OVERTAKEN] * 9)).again("s1", 0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"auths": {"registry.example": {"auth": "dXNlcjpwYXNzd29yZA=="}}}, ""),
        ({"auths": {"registry.example": {"auth": "user:password"}}}, "has a login that cannot be read"),
        ([], "has not the form"),
    ],
)
def test_a_file_of_logins_is_looked_at_before_it_is_used(tmp_path: Path, found: Any, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found))
    path.chmod(0o600)
    said = fault_of_logins(str(path))
    assert words in said and bool(words) == bool(said)
    assert "password" not in said
