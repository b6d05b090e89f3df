"""What the Hub, load balancers and Prometheus ask. None of it needs a token, and none of it tells anything of anybody."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from hub_gateway import __version__
from hub_gateway.errors import Unavailable
from hub_gateway.kernels.types import ExecutionState
from hub_gateway.metrics import CONTENT_TYPE_LATEST, METRICS
from hub_gateway.web.base import APIHandler, BaseHandler

__all__ = [
    "APIRootHandler",
    "HealthHandler",
    "MetricsHandler",
    "ReadyHandler",
    "RootHandler",
    "SpecHandler",
    "load_spec",
]

READY_SECONDS = 3.0


class RootHandler(BaseHandler):
    """The service's root: the Hub waits for it at start, without a token."""

    def get(self) -> None:
        self.finish({"service": "hub-gateway", "version": __version__})

    def head(self) -> None:
        self.set_status(200)


class HealthHandler(RootHandler):
    """The process lives and its event loop turns."""


class ReadyHandler(BaseHandler):
    """Whether requests are best sent here: kernels are taken over, and the database answers."""

    async def get(self) -> None:
        if not self.services.ready or self.services.draining:
            state = "is stopping" if self.services.draining else "is starting"
            raise Unavailable(f"This gateway {state}; try again in a few seconds.", retry_after=1)
        try:
            await asyncio.wait_for(self.services.db.check(), READY_SECONDS)
        except asyncio.TimeoutError as error:
            raise Unavailable("The gateway's database does not answer.") from error
        await self.finish({"ready": True})


class MetricsHandler(BaseHandler):
    """Prometheus metrics; no label names a user or a kernel."""

    def get(self) -> None:
        states = Counter(relay.execution_state.value for _, relay in self.services.kernels.controller.links)
        for state in ExecutionState:
            METRICS.kernels.labels(state.value).set(states[state.value])
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(METRICS.expose())


class APIRootHandler(APIHandler):
    """The version."""

    def get(self) -> None:
        self.write_json({"version": __version__, "gateway_version": __version__})


@lru_cache(maxsize=1)
def load_spec() -> dict[str, Any]:
    """The OpenAPI description of everything served here."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "openapi.yaml").read_text())
    found["info"]["version"] = __version__
    return found


class SpecHandler(BaseHandler):
    """The OpenAPI description, as JSON or YAML."""

    def get(self, form: str) -> None:
        if form == "yaml":
            self.set_header("Content-Type", "application/yaml")
            self.finish(yaml.safe_dump(load_spec(), sort_keys=False))
        else:
            self.set_header("Content-Type", "application/json; charset=UTF-8")
            self.finish(json.dumps(load_spec()))
