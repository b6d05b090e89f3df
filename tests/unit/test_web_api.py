"""The REST interface over HTTP, on real rows."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from hub_gateway.errors import TooManyRequests, Unavailable
from hub_gateway.kernels.types import ExecutionState
from hub_gateway.metrics import LINK_COUNTS, METRICS
from hub_gateway.web.application import make_application
from tests.contract.mini import MiniGateway, Setup
from tests.harness.gateway import ROOT
from tests.harness.web import AnsweringDatabase, FixedTokens, WebServer, settings

SLEEP = {"argv": ["/bin/sleep", "600", "{connection_file}"], "display_name": "Sleep", "language": "none"}
SPECS: dict[str, dict[str, Any]] = {"sleep": SLEEP, "other one": {**SLEEP, "display_name": "Other"}}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def mini(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[MiniGateway]:
    for name, spec in SPECS.items():
        (state_dir / "kernels" / name.replace(" ", "_")).mkdir(parents=True)
        (state_dir / "kernels" / name.replace(" ", "_") / "kernel.json").write_text(json.dumps(spec))
    (state_dir / "kernels" / "sleep" / "logo-64x64.png").write_bytes(b"\x89PNG")
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    async with MiniGateway(Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)) as made:
        yield made
        local = made.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(made.gateway_id)))


@pytest.fixture
async def server(mini: MiniGateway) -> AsyncIterator[WebServer]:
    async with WebServer(mini.service, db=mini.db, web=settings(max_body_bytes=100_000)) as made:
        yield made


@pytest.fixture
async def alice(server: WebServer) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client("alice") as client:
        yield client


def is_error(answer: httpx.Response, status: int) -> dict[str, str]:
    """The body of an error, which must be a sentence in JSON."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"].startswith("application/json"), answer.headers
    body: dict[str, str] = answer.json()
    assert set(body) == {"reason", "message", "code"}
    assert body["message"].endswith((".", ")")) and len(body["message"]) > 20, body
    assert not answer.history and "Location" not in answer.headers
    return body


# -- kernels


async def test_a_kernel_from_beginning_to_end(server: WebServer, alice: httpx.AsyncClient) -> None:
    made = await alice.post("/api/kernels", json={"name": "sleep", "env": {"KERNEL_USERNAME": "alice"}})
    assert made.status_code == 201
    model = made.json()
    assert made.headers["Location"] == f"/api/kernels/{model['id']}"
    assert model["name"] == "sleep" and model["execution_state"] == "starting" and model["connections"] == 0
    found = (await alice.get(f"/api/kernels/{model['id']}")).json()
    assert found["id"] == model["id"]
    for name in ("last_activity", "created_at"):
        # What jupyter_server's gateway client parses; it fails without the microseconds.
        datetime.strptime(found[name], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert [one["id"] for one in (await alice.get("/api/kernels/")).json()] == [model["id"]]
    head = await alice.head(f"/api/kernels/{model['id']}")
    assert head.status_code == 200 and not head.content and int(head.headers["Content-Length"]) > 100
    gone = await alice.delete(f"/api/kernels/{model['id']}")
    assert gone.status_code == 204 and not gone.content
    is_error(await alice.get(f"/api/kernels/{model['id']}"), 404)
    assert (await alice.get("/api/kernels")).json() == []


async def test_what_is_somebody_elses_does_not_exist(server: WebServer, alice: httpx.AsyncClient) -> None:
    """To the last letter: also headers say nothing."""
    kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]
    session = (await alice.post("/api/sessions", json={"path": "a.ipynb", "kernel": {"id": kernel}})).json()["id"]
    unknown = str(uuid.uuid4())
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }

    def shown(answer: httpx.Response, of: str) -> tuple[int, str, dict[str, str]]:
        headers = {k: v for k, v in answer.headers.items() if k not in ("x-request-id", "date", "etag")}
        return answer.status_code, answer.text.replace(of, "K"), headers

    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        (method, f"/api/kernels/{{}}{path}", kernel, more)
        for method, path, more in (
            ("GET", "", {}),
            ("HEAD", "", {}),
            ("DELETE", "", {}),
            ("POST", "/interrupt", {}),
            ("POST", "/restart", {"json": {}}),
            ("GET", "/channels", {}),
            ("GET", "/channels", {"headers": upgrade}),
        )
    ]
    cases += [
        (method, "/api/sessions/{}", session, more)
        for method, more in (("GET", {}), ("PATCH", {"json": {"path": "b.ipynb"}}), ("DELETE", {}))
    ]
    async with server.client("bob") as bob:
        assert (await bob.get("/api/kernels")).json() == [] == (await bob.get("/api/sessions")).json()
        for method, path, theirs, more in cases:
            foreign = shown(await bob.request(method, path.format(theirs), **more), theirs)
            never = shown(await bob.request(method, path.format(unknown), **more), unknown)
            assert foreign == never and foreign[0] == 404, (method, path)
        taken = await bob.post("/api/sessions", json={"path": "x", "kernel": {"id": kernel}})
        missing = await bob.post("/api/sessions", json={"path": "x", "kernel": {"id": unknown}})
        assert shown(taken, kernel) == shown(missing, unknown) and taken.status_code == 404
    assert (await alice.get(f"/api/kernels/{kernel}")).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b"[" * 50_000, 400, "JSON"),
        (b"[]", 400, "object"),
        (b'"sleep"', 400, "object"),
        (b"null", 400, "object"),
        (b'{"name": 7}', 400, "`name`"),
        (b'{"name": "a\\u0001b"}', 400, "`name`"),
        (b'{"name": "a\\u0000b"}', 400, "control characters"),
        (b'{"name": "\\ud800"}', 400, "halves"),
        (b'{"name": "\\uDFFF"}', 400, "halves"),
        (b'{"whatever": [{"\\udc00": 1}]}', 400, "halves"),
        (b'{"path": ["a"]}', 400, "`path`"),
        (b'{"env": "PATH=/"}', 400, "`env`"),
        (b'{"env": ["A"]}', 400, "`env`"),
        (b'{"env": {"KERNEL_X": 1}}', 400, "`env`"),
        (b'{"env": {"KERNEL_X": null}}', 400, "`env`"),
        (b'{"env": {"KERNEL_X": "a\\u0000b"}}', 400, "control characters"),
        (b'{"env": {"KERNEL_X": "a\\u001bb"}}', 400, "control characters"),
        (b'{"env": {"A=B": "x"}}', 400, "name"),
        (b'{"env": {"KERNEL_X": "' + b"x" * 70_000 + b'"}}', 413, "KERNEL_X"),
        (b'{"env": {"KERNEL_USERNAME": "bob"}}', 403, "bob"),
        (b'{"kernel_id": "../../etc/passwd"}', 400, "UUID"),
        (b'{"name": "no-such-kernelspec"}', 404, "no-such-kernelspec"),
    ],
)
async def test_bad_launches(alice: httpx.AsyncClient, content: bytes, status: int, said: str) -> None:
    body = is_error(await alice.post("/api/kernels", content=content), status)
    assert said in body["message"], body
    assert (await alice.get("/api/kernels")).json() == [], "and nothing was started"


async def test_the_default_kernelspec_and_null_fields(alice: httpx.AsyncClient) -> None:
    made = await alice.post("/api/kernels", json={"name": None, "env": None, "path": None, "kernel_id": None})
    assert made.status_code == 201
    assert (await alice.post("/api/kernels")).status_code == 201, "also without any body"


async def test_what_a_starting_kernel_cannot_do(alice: httpx.AsyncClient) -> None:
    kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]
    is_error(await alice.post(f"/api/kernels/{kernel}/interrupt", content=b"{}"), 409)


# -- bodies


async def test_bodies_over_the_limit(server: WebServer, alice: httpx.AsyncClient) -> None:
    body = is_error(await alice.post("/api/kernels", content=b" " * 100_001), 413)
    assert "100000" in body["message"]

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 10_000

    is_error(await alice.post("/api/kernels", content=chunks()), 413)
    assert is_error(await alice.post("/api/launch/x", content=b" " * 20_000), 413)
    is_error(await alice.post("/nowhere", content=b" " * 100_001), 413)
    assert (await alice.get("/api/kernels")).status_code == 200, "the connection can be used again"


async def test_a_body_that_is_announced_and_never_sent(server: WebServer) -> None:
    for length in (200_000_000_000, 10**17):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"POST /api/kernels HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 413 ") and b'"payload_too_large"' in answer
        assert answer.count(b"HTTP/1.1") == 1
        writer.close()


# -- errors on every path


async def test_errors_are_json_on_every_path(server: WebServer, alice: httpx.AsyncClient) -> None:
    for path in ("/nowhere", "/api/nowhere", "/api/kernels/a/b", "/api/%00", "/home", "/favicon.ico"):
        for method in ("GET", "POST", "DELETE"):
            is_error(await alice.request(method, path), 404)
    for path in ("/api/kernels/%00", "/api/kernels/a%0Ab", "/api/sessions/%7F", "/api/kernelspecs/%1B"):
        is_error(await alice.get(path), 404)
    is_error(await alice.get("/api/kernels/%FF"), 400)
    is_error(await alice.get("/api/kernelspecs/none"), 404)
    is_error(await alice.get("/kernelspecs/sleep/kernel.json/x"), 404)
    is_error(await alice.get("/kernelspecs/sleep/..%2f..%2fgateway.sqlite"), 404)
    kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]
    assert "websocket" in is_error(await alice.get(f"/api/kernels/{kernel}/channels"), 400)["message"]


async def test_methods_that_are_not_there(alice: httpx.AsyncClient) -> None:
    for path, allowed in (
        ("/", "GET, HEAD, OPTIONS"),
        ("/api", "GET, HEAD, OPTIONS"),
        ("/api/kernels", "GET, HEAD, POST, OPTIONS"),
        ("/api/kernels/x", "GET, HEAD, DELETE, OPTIONS"),
        ("/api/kernels/x/interrupt", "POST, OPTIONS"),
        ("/api/sessions/x", "GET, HEAD, DELETE, PATCH, OPTIONS"),
        ("/api/launch/x", "POST, OPTIONS"),
        ("/api/kernelspecs", "GET, HEAD, OPTIONS"),
    ):
        options = await alice.options(path)
        assert options.status_code == 204 and options.headers["Allow"] == allowed, path
        assert not any(name.lower().startswith("access-control") for name in options.headers)
        for method in METHODS:
            if method not in allowed.split(", "):
                answer = await alice.request(method, path)
                assert answer.status_code == 405 and answer.headers["Allow"] == allowed, (method, path)
                if method != "HEAD":
                    assert is_error(answer, 405)["code"] == "method_not_allowed"
    assert (await alice.request("PROPFIND", "/api/kernels")).status_code == 405


async def test_options_need_no_token(server: WebServer) -> None:
    async with server.client() as nobody:
        assert (await nobody.options("/api/kernels")).status_code == 204
        assert (await nobody.options(f"/api/kernels/{uuid.uuid4()}/channels")).status_code == 204


async def test_nobody_gets_nothing(server: WebServer) -> None:
    async with server.client() as nobody:
        for method, path in (
            ("GET", "/api"),
            ("GET", "/api/kernels"),
            ("POST", "/api/kernels"),
            ("GET", "/api/kernelspecs"),
            ("GET", "/kernelspecs/sleep/logo-64x64.png"),
            ("GET", "/api/sessions"),
            ("DELETE", "/api/kernels/x"),
            ("GET", "/api/kernels/x/channels"),
        ):
            answer = await nobody.request(
                method, path, headers={"Cookie": "service-hub-gateway=x", "Accept": "text/html"}
            )
            is_error(answer, 401)
            assert answer.headers["WWW-Authenticate"] == "token"
    # What jupyter_server sends when it has no token: a scheme, and nothing behind it.
    request = HTTPRequest(f"{server.url}/api/kernels", headers={"Authorization": "token "})
    assert (await AsyncHTTPClient().fetch(request, raise_error=False)).code == 401


async def test_unsure_is_not_gone(server: WebServer, mini: MiniGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server.client("alice") as alice:
        kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]

        async def down(*_: object, **__: object) -> Any:
            raise Unavailable("The database cannot be reached at the moment; try again in a few seconds.")

        with monkeypatch.context() as patch:
            for name in ("list", "get"):
                patch.setattr(mini.service.store, name, down)
            for path in ("/api/kernels", f"/api/kernels/{kernel}", f"/api/kernels/{kernel}/channels", "/api/sessions"):
                is_error(await alice.get(path), 503)
        authenticator = server.services.authenticator
        assert isinstance(authenticator, FixedTokens)
        authenticator.error = Unavailable("The JupyterHub cannot be asked who you are at the moment.")
        for path in ("/api/kernels", f"/api/kernels/{kernel}", "/api/kernelspecs"):
            is_error(await alice.get(path), 503)
        authenticator.error = TooManyRequests("Too many invalid tokens came from your address.", retry_after=12.3)
        answer = await alice.get("/api/kernels")
        is_error(answer, 429)
        assert answer.headers["Retry-After"] == "13"
        authenticator.error = None
        assert (await alice.get(f"/api/kernels/{kernel}")).status_code == 200


async def test_a_defect_is_a_sentence_with_a_number(
    server: WebServer, alice: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.services.kernels, "list", broken)
    answer = await alice.get("/api/kernels")
    body = is_error(answer, 500)
    assert "secret detail" not in answer.text and "Traceback" not in answer.text
    assert body["code"] == "internal_error" and answer.headers["X-Request-Id"] in body["message"]
    record = next(record for record in caplog.records if record.message == "Unexpected error")
    assert record.exc_info and record.__dict__["request_id"] == answer.headers["X-Request-Id"]


# -- logs


async def test_logs_name_the_request_and_hold_no_secrets(
    server: WebServer, alice: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await alice.get("/api/kernels", params={"token": "s3cret", "user": "alice", "API_Key": "k3y"})
    assert answer.status_code == 200
    refused = await alice.get("/api/kernels/x?%74oken=s3cret&code=c0de&state=st4te&access_token=t0k")
    assert refused.status_code == 404
    async with server.client() as nobody:
        await nobody.get("/api/kernels?token=s3cret", headers={"Authorization": "token wr0ng-one"})
        await nobody.get("/nowhere?token=s3cret")
    lines = [json.dumps({**record.__dict__, "msg": record.getMessage()}, default=str) for record in caplog.records]
    for secret in ("s3cret", "k3y", "c0de", "st4te", "t0k", "alice-token", "wr0ng"):
        assert not any(secret in line for line in lines if "httpx" not in line), secret
    record = next(
        record for record in caplog.records if record.__dict__.get("request_id") == answer.headers["X-Request-Id"]
    )
    assert record.__dict__["user"] == "alice" and record.__dict__["status"] == 200
    assert record.__dict__["path"].startswith("/api/kernels?") and "user=alice" in record.__dict__["path"]
    assert len({refused.headers["X-Request-Id"], answer.headers["X-Request-Id"]}) == 2


# -- kernelspecs


async def test_kernelspecs(alice: httpx.AsyncClient) -> None:
    found = (await alice.get("/api/kernelspecs", params={"user": "alice"})).json()
    assert set(found["kernelspecs"]) == {"sleep", "other_one"} and found["default"] in found["kernelspecs"]
    one = (await alice.get("/api/kernelspecs/sleep")).json()
    assert one == found["kernelspecs"]["sleep"] and one["spec"]["display_name"] == "Sleep"
    # How jupyter_server asks for one where KERNEL_USERNAME is set.
    for query in ("?user=alice/sleep", "?user=alice%2Fsleep"):
        assert (await alice.get(f"/api/kernelspecs{query}")).json() == one
    is_error(await alice.get("/api/kernelspecs?user=alice/none"), 404)
    logo = await alice.get(one["resources"]["logo-64x64"])
    assert logo.content == b"\x89PNG" and logo.headers["Content-Type"] == "image/png"
    assert (await alice.head(one["resources"]["logo-64x64"])).status_code == 200


# -- sessions


async def test_sessions(alice: httpx.AsyncClient) -> None:
    made = await alice.post(
        "/api/sessions", json={"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": {"name": "sleep"}}
    )
    assert made.status_code == 201
    session = made.json()
    assert made.headers["Location"] == f"/api/sessions/{session['id']}"
    assert session["notebook"]["path"] == "a.ipynb"
    assert [one["id"] for one in (await alice.get("/api/sessions")).json()] == [session["id"]]
    changed = await alice.patch(f"/api/sessions/{session['id']}", json={"path": "b.ipynb", "name": "b"})
    assert changed.status_code == 200 and changed.json()["path"] == "b.ipynb"
    assert changed.json()["kernel"]["id"] == session["kernel"]["id"]
    moved = await alice.patch(f"/api/sessions/{session['id']}", json={"kernel": {"name": "other_one"}})
    assert moved.json()["kernel"]["name"] == "other_one"
    assert [one["id"] for one in (await alice.get("/api/kernels")).json()] == [moved.json()["kernel"]["id"]]
    for content in (b'{"path": "\\ud800"}', b'{"name": "\\u0000"}', b'{"kernel": {"id": "\\u0000"}}'):
        is_error(await alice.post("/api/sessions", content=content), 400)
        is_error(await alice.patch(f"/api/sessions/{session['id']}", content=content), 400)
    pair = await alice.patch(f"/api/sessions/{session['id']}", content=b'{"path": "\\ud83d\\ude00 \\\\u0000"}')
    assert pair.json()["path"] == "\U0001f600 \\u0000", "what only looks like one is let through"
    for body in ({"path": 7}, {"kernel": "sleep"}, {"kernel": {"name": 7}}, {"type": "x" * 100}):
        is_error(await alice.patch(f"/api/sessions/{session['id']}", json=body), 400)
    is_error(await alice.patch(f"/api/sessions/{session['id']}", content=b"{"), 400)
    assert (await alice.delete(f"/api/sessions/{session['id']}")).status_code == 204
    assert (await alice.get("/api/kernels")).json() == []
    is_error(await alice.get(f"/api/sessions/{session['id']}"), 404)


# -- registration of agents


async def test_registrations_must_prove_themselves(alice: httpx.AsyncClient, server: WebServer) -> None:
    kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]
    claim = {
        "version": 1,
        "kernel_id": kernel,
        "gateway_id": "x",
        "epoch": 1,
        "pid": 1,
        "host": "127.0.0.1",
        "port": 9,
        "public_key": "k" * 40,
        "proof": "0" * 64,
    }
    async with server.client() as agent:
        is_error(await agent.post(f"/api/launch/{kernel}", json=claim), 403)
        is_error(await agent.post(f"/api/launch/{uuid.uuid4()}", json=claim), 400)
        is_error(await agent.post(f"/api/launch/{kernel}", json={}), 400)
        is_error(await agent.post(f"/api/launch/{kernel}", content=b"{"), 400)


# -- the service itself


async def test_health_readiness_and_metrics(server: WebServer, alice: httpx.AsyncClient) -> None:
    await alice.post("/api/kernels", json={"name": "sleep"})
    await alice.request("BREW", "/api/kernels")
    async with server.client() as nobody:
        for path in ("/", "/healthz", "/readyz"):
            assert (await nobody.get(path)).status_code == 200
        text = (await nobody.get("/metrics")).text
        assert 'hubgateway_kernels_running{execution_state="idle"} ' in text
        for line in text.splitlines():
            name = line.split(" ")[2] if line.startswith("#") else line
            assert name.startswith("hubgateway_"), line
        assert "alice" not in text and "BREW" not in text
        server.services.draining = True
        is_error(await nobody.get("/readyz"), 503)
        assert (await nobody.get("/healthz")).status_code == 200
        server.services.draining, server.services.ready = False, False
        is_error(await nobody.get("/readyz"), 503)
        server.services.ready = True
        broken = AnsweringDatabase()
        broken.error = Unavailable("The database cannot be reached.")
        server.services.db = broken  # type: ignore[assignment]
        is_error(await nobody.get("/readyz"), 503)


def test_every_count_of_a_link_has_a_metric() -> None:
    """A name that is not known would be counted as an error that was swallowed somewhere."""
    source = "".join(path.read_text() for path in (ROOT / "hub_gateway" / "link").glob("*.py"))
    named = set(re.findall(r'_count\("(\w+)"', source))
    assert len(named) > 5 and named <= set(LINK_COUNTS)


def test_every_label_is_there_from_the_start() -> None:
    text = METRICS.expose().decode()
    for state in ExecutionState:
        assert f'execution_state="{state.value}"' in text
    for wanted in ('method="GET",status="5xx"', 'outcome="refused"', 'result="stale"', 'where="other"'):
        assert wanted in text


async def test_an_answer_tells_browsers_to_do_nothing_with_it(alice: httpx.AsyncClient) -> None:
    answer = await alice.get("/api/kernels")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store" and "Server" not in answer.headers
    missing = await alice.get("/api/kernels/x")
    assert "X-Request-Id" in missing.headers and "Server" not in missing.headers


async def test_below_a_prefix(mini: MiniGateway) -> None:
    async with WebServer(mini.service, base_url="/services/hub-gateway/") as server, server.client("alice") as alice:
        assert (await alice.get("/api/kernels")).status_code == 200
        assert (await alice.get("/")).json()["service"] == "hub-gateway"
        made = await alice.post("/api/kernels", json={"name": "sleep"})
        assert made.headers["Location"].startswith("/services/hub-gateway/api/kernels/")
        root = server.url.removesuffix("/services/hub-gateway")
        assert (await alice.get(f"{root}/services/hub-gateway")).status_code == 200
        is_error(await alice.get(f"{root}/api/kernels"), 404)


async def test_an_application_needs_no_loop(mini: MiniGateway, server: WebServer) -> None:
    """It can be made before anything runs."""
    assert await asyncio.to_thread(make_application, server.services, base_url="/x/")
