"""The OpenAPI description is held against the handlers, and the handlers against it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hub_gateway import __version__
from hub_gateway.audit import AuditLog, Line, Verification
from hub_gateway.db.models import utcnow
from hub_gateway.identity.mapper import IdentityMapper
from hub_gateway.identity.types import Step
from hub_gateway.proxies.base import Finding
from hub_gateway.quotas.document import Diff
from hub_gateway.quotas.explain import LimitView, PolicyView, Refusal
from hub_gateway.quotas.holders import Holding
from hub_gateway.quotas.ledger import Closed
from hub_gateway.quotas.prices import Prices
from hub_gateway.quotas.queue import QueueEntry
from hub_gateway.quotas.reports import Reports, Row
from hub_gateway.quotas.requests import Request
from hub_gateway.quotas.service import QuotaService
from hub_gateway.quotas.simulate import Simulation, UserOutcome
from hub_gateway.quotas.validate import Problem
from hub_gateway.web.application import ROUTES, pages
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.health import load_spec
from hub_gateway.web.kerneltable import KernelRow
from tests.contract.mini import MiniGateway, Setup
from tests.harness.tenancy import Tokens
from tests.harness.web import WebServer

SPEC = load_spec()
SAME = ("HEAD", "OPTIONS")


def described() -> dict[str, dict[str, Any]]:
    """Operations by path, with every parameter in braces made equal."""
    return {re.sub(r"\{[^}]+\}", "{}", path): operations for path, operations in SPEC["paths"].items()}


def served() -> dict[str, set[str]]:
    """Methods by path, without the pages for people: their forms are no interface."""
    found: dict[str, set[str]] = {}
    for path, handler in (*ROUTES, *pages()):
        if issubclass(handler, ConsoleHandler):
            continue
        methods = {method.lower() for method in handler.allowed() if method not in SAME}
        for form in ("json", "yaml"):
            plain = path.replace(r"swagger\.(json|yaml)", f"swagger.{form}")
            found[re.sub(r"\([^)]+\)", "{}", plain) or "/"] = methods
    return found


def test_every_address_and_method_is_described() -> None:
    methods = {
        path: {name for name in operations if name in ("get", "post", "put", "patch", "delete")}
        for path, operations in described().items()
    }
    assert methods == served()


def test_every_operation_says_what_it_needs_and_answers() -> None:
    names = []
    for path, operations in SPEC["paths"].items():
        for method, operation in operations.items():
            if method == "parameters":
                continue
            names.append(operation["operationId"])
            assert operation["summary"].endswith("."), path
            answers = set(operation["responses"])
            page = "pages" in operation["tags"]
            if operation.get("security") != [] and not page:
                assert {"401", "403", "429", "503"} <= answers, (method, path)
            if "requestBody" in operation:
                assert {"400", "413"} <= answers, (method, path)
            if "{kernel_id}" in path or "{session_id}" in path:
                assert "404" in answers, (method, path)
    assert len(names) == len(set(names))


async def test_it_is_served_in_both_forms() -> None:
    async with WebServer(None, base_url="/x/") as server, server.client() as nobody:
        found = await nobody.get("/api/swagger.json")
        assert found.headers["Content-Type"].startswith("application/json")
        assert found.json()["info"]["version"] == __version__
        assert yaml.safe_load((await nobody.get("/api/swagger.yaml")).text) == found.json()
        assert (await nobody.get("/api/swagger.xml")).status_code == 404


SHOWN: dict[str, type] = {
    "AuditLine": Line,
    "ClosedMonth": Closed,
    "Difference": Diff,
    "ExplainedPolicy": PolicyView,
    "Finding": Finding,
    "Holding": Holding,
    "IdentityStep": Step,
    "KernelRow": KernelRow,
    "Limit": LimitView,
    "Prices": Prices,
    "Problem": Problem,
    "QueueEntry": QueueEntry,
    "Refusal": Refusal,
    "ReportRow": Row,
    "Request": Request,
    "Simulation": Simulation,
    "UserOutcome": UserOutcome,
    "Verification": Verification,
}
"""What is shown field by field, as the gateway has it."""


@pytest.mark.parametrize("name", SHOWN)
def test_an_answer_is_described_as_the_type_that_it_shows(name: str) -> None:
    schema = SPEC["components"]["schemas"][name]
    hints = get_type_hints(SHOWN[name])
    names = [field.name for field in dataclasses.fields(SHOWN[name])]
    assert list(schema["properties"]) == names == schema["required"]
    wrong = {
        one for one in names if (type(None) in get_args(hints[one])) != schema["properties"][one].get("nullable", False)
    }
    assert not wrong, "what may be null"


# -- fuzzing


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def server(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[WebServer]:
    (state_dir / "kernels" / "dies").mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Dies", "language": "none"}
    (state_dir / "kernels" / "dies" / "kernel.json").write_text(json.dumps(spec))
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    url = db_url() or f"sqlite:///{state_dir}/g.sqlite"
    setup = Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)
    async with MiniGateway(setup) as mini:
        authenticator, store = Tokens(), mini.service.store
        people = authenticator.people
        quotas = QuotaService(
            db=mini.db,
            admitter=store.admitter,
            specs=mini.service.specs,
            proxies=mini.proxies,
            half_life=86400.0,
            people=people,
        )
        identity = IdentityMapper(
            db=mini.db,
            people=people,
            rules=[{"pattern": ".*", "principal": "$0@EXAMPLE.COM"}],
            default_realm="EXAMPLE.COM",
        )
        tenancy: dict[str, Any] = {"quotas": quotas, "identity": identity, "audit": AuditLog(), "reports": Reports()}
        async with WebServer(mini.service, authenticator=authenticator, db=mini.db, **tenancy) as made:
            await fill(made)
            yield made
        local = mini.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(mini.gateway_id)))


async def fill(server: WebServer) -> None:
    """Something of everything, so that answers are not empty."""
    limit = {"subject": "user:admin", "resource": "memory", "hard": "2G", "soft": "1G", "timezone": "Europe/Berlin"}
    weekly = [{"days": [0, 6], "begin": "22:00", "end": "24:00"}]
    hours = {"subject": "everyone", "resource": "kernel_hours", "window": "calendar", "period": "week", "hard": 0}
    queue = {"subject": "group:analysts", "counts": "together", "action": "queue", "hard": 1, "weekly": weekly}
    more = {"policy": "limit", "amount": "4G", "until": (utcnow() + timedelta(days=2)).isoformat(), "reason": "a model"}
    async with server.client("admin") as admin, server.client("bob") as bob:
        sent = [
            await admin.put("/api/quota/policies/limit", json=limit),
            await admin.put("/api/quota/policies/hours", json=hours),
            await admin.put("/api/quota/policies/queue", json=queue),
            await admin.post("/api/prices", json={"core_hour": 0.5, "gpu_models": {"A100": 2}}),
            await admin.post("/api/requests", json=more),
        ]
        assert [answer.status_code for answer in sent] == [201] * len(sent), [answer.text for answer in sent]
        refused = await bob.post("/api/kernels", json={"name": "dies"})
        assert refused.status_code == 403, refused.text


OPERATIONS = [
    (path, [name for name in operations if name != "parameters"])
    for path, operations in SPEC["paths"].items()
    if "channels" not in path
    and all("pages" not in operation["tags"] for name, operation in operations.items() if name != "parameters")
]
MANY = ("kernels", "kernelspecs", "sessions", "service")
"""Tags of what clients of many kinds use: tried harder."""


@pytest.mark.parametrize(("path", "methods"), OPERATIONS, ids=[path for path, _ in OPERATIONS])
async def test_whatever_is_sent_the_answer_is_as_described(server: WebServer, path: str, methods: list[str]) -> None:
    """No 500, no other status or form of answer than is written, whatever schemathesis thinks of."""
    described = json.loads(json.dumps(SPEC))
    described["servers"] = [{"url": server.url}]
    for method in methods:
        examples = 40 if set(SPEC["paths"][path][method]["tags"]) & set(MANY) else 12
        if method == "post" and path == "/api/kernels":
            examples = 15
        operation = schemathesis.openapi.from_dict(described)[path][method.upper()]

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy())
        def fuzz(case: Any) -> None:
            answer = case.call(base_url=server.url, headers={"Authorization": "token admin-token"}, timeout=30)
            # What a schema cannot say (names of environment variables, proofs) may still be refused.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])
            assert answer.status_code < 500 or answer.status_code == 503, answer.text

        await asyncio.to_thread(fuzz)
