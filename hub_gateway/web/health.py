"""What the Hub, load balancers and Prometheus ask: without a token, and it tells nothing of anybody."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from hub_gateway import __version__
from hub_gateway.deadlines import within
from hub_gateway.errors import Unavailable
from hub_gateway.kernels.types import ExecutionState
from hub_gateway.metrics import CONTENT_TYPE_LATEST, METRICS
from hub_gateway.web.base import APIHandler, BaseHandler, wants_page

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
    """The service's root: the Hub waits for it at start, without a token. Browsers are sent to the pages."""

    def get(self) -> None:
        self.set_header("Vary", "Accept")
        if self.services.hub is not None and wants_page(self.request):
            self.redirect(f"{self.services.hub.oauth.base_url}home")
            return
        self.finish({"service": "hub-gateway", "version": __version__})


class HealthHandler(BaseHandler):
    """The process lives and its event loop turns."""

    def get(self) -> None:
        self.finish({"service": "hub-gateway", "version": __version__})


class ReadyHandler(BaseHandler):
    """Whether requests are best sent here: kernels are taken over, and the database answers."""

    async def get(self) -> None:
        if not self.services.ready or self.services.draining:
            state = "is stopping" if self.services.draining else "is starting"
            raise Unavailable(f"This gateway {state}; try again in a few seconds.", retry_after=1)
        try:
            await within(self.services.db.check(), READY_SECONDS)
        except asyncio.TimeoutError as error:
            raise Unavailable("The gateway's database does not answer.") from error
        await self.finish({"ready": True})


class MetricsHandler(BaseHandler):
    """Prometheus metrics; no label names a user or a kernel (but for policies that are named so)."""

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
    """The OpenAPI description of everything served here. Takes a while: not for the event loop."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "openapi.yaml").read_text())
    found["info"]["version"] = __version__
    return found


@lru_cache(maxsize=2)
def written_spec(form: str) -> str:
    """The description as `json` or `yaml`."""
    text = json.dumps(load_spec())
    # By way of JSON, so that what the file shares by anchors is written out.
    return yaml.safe_dump(json.loads(text), sort_keys=False) if form == "yaml" else text


class SpecHandler(BaseHandler):
    """The OpenAPI description, as JSON or YAML."""

    async def get(self, form: str) -> None:
        text = await asyncio.to_thread(written_spec, form)
        kind = "application/yaml" if form == "yaml" else "application/json"
        self.set_header("Content-Type", f"{kind}; charset=UTF-8")
        self.set_header("Cache-Control", "public, max-age=3600")
        await self.finish(text)
