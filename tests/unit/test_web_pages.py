"""Pages behind the Hub's OAuth: logins, cookies, XSRF, and a Hub that is away."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from traitlets.config import Config, Configurable

from hub_gateway.auth.base import Caller
from hub_gateway.auth.hub import HubService
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus, KernelTarget
from tests.harness.fake_hub import FakeHub
from tests.harness.waiting import eventually
from tests.harness.web import WebServer, settings

BASE_URL = "/services/hub-gateway/"
NAVIGATE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none"}
FETCH = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"}
COOKIE = "service-hub-gateway"
NOW = datetime.now(timezone.utc)


class Kernels:
    """One kernel each, whose message is what a user could have put there."""

    async def list(self, caller: Caller) -> list[KernelRecord]:
        return [
            KernelRecord(
                id=f"kernel-of-{caller.name}",
                owner=caller.name,
                kernelspec="python",
                proxy="local",
                status=KernelStatus.FAILED,
                target=KernelTarget.RUNNING,
                execution_state=ExecutionState.DEAD,
                created_at=NOW,
                last_activity=NOW,
                epoch=1,
                message="<script>alert(1)</script>",
            )
        ]


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHub]:
    made = FakeHub()
    await made.start()
    for name, value in made.environment(BASE_URL).items():
        monkeypatch.setenv(name, value)
    yield made
    await made.stop()


def replica(secret: bytes = b"c" * 32) -> WebServer:
    """A gateway of this Hub; all replicas share the cookie secret."""
    config = Config({"HubAuthenticator": {"cache_seconds": 0.0, "hub_timeout": 2.0}})
    service = HubService(cookie_secret=secret, base_url=BASE_URL, parent=Configurable(config=config))
    return WebServer(Kernels(), hub=service, authenticator=service.authenticator, base_url=BASE_URL, web=settings())


@pytest.fixture
async def server(hub: FakeHub) -> AsyncIterator[WebServer]:
    async with replica() as made:
        yield made
    await made.services.authenticator.close()


@pytest.fixture
async def browser(server: WebServer) -> AsyncIterator[httpx.AsyncClient]:
    """A browser: it follows redirects by itself only where the test does so."""
    async with server.client(headers=NAVIGATE) as client:
        yield client


async def begin(browser: httpx.AsyncClient, path: str = "home") -> httpx.URL:
    """Ask for a page; the Hub's address to which the login leads."""
    first = await browser.get(path)
    assert first.status_code == 302, first.text
    return httpx.URL(first.headers["Location"])


async def at_hub(hub: FakeHub, address: httpx.URL) -> str:
    """Log in at the Hub; where the browser is sent with the code."""
    async with httpx.AsyncClient() as other:
        answer = await other.get(httpx.URL(hub.url).copy_with(raw_path=address.raw_path))
        assert answer.status_code == 302, answer.text
        return str(answer.headers["Location"])


async def log_in(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient, path: str = "home") -> httpx.Response:
    """All of it; the page at the end."""
    callback = await at_hub(hub, await begin(browser, path))
    done = await browser.get(f"http://127.0.0.1:{server.port}{callback}")
    assert done.status_code == 302, done.text
    return await browser.get(f"http://127.0.0.1:{server.port}{done.headers['Location']}")


async def test_a_login(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    address = await begin(browser, "home?from=a+link")
    assert address.path == "/hub/api/oauth2/authorize"
    assert address.params["code_challenge_method"] == "S256"
    page = await log_in(hub, server, browser, "home?from=a+link")
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    assert page.request.url.params["from"] == "a link"
    assert "alice" in page.text and "analysts" in page.text and "kernel-of-alice" in page.text
    assert "<script>" not in page.text and "&lt;script&gt;" in page.text
    cookie = next(c for c in browser.cookies.jar if c.name == COOKIE)
    assert cookie.path == BASE_URL and cookie.has_nonstandard_attr("HttpOnly")
    assert not any("oauth-state" in c.name for c in browser.cookies.jar), "what belonged to the login is gone"
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    style = await browser.get(f"http://127.0.0.1:{server.port}{BASE_URL}static/gateway.css")
    assert style.status_code == 200 and style.headers["Content-Type"].startswith("text/css")
    assert f"{BASE_URL}static/gateway.css" in page.text
    assert (await browser.get("static/openapi.yaml")).status_code == 404


async def test_static_files_last_as_long_as_their_address_names_their_content(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    page = await log_in(hub, server, browser)
    for address in re.findall(r'(?:src|href)="([^"]+/static/[^"]+)"', page.text):
        found = await browser.get(f"http://127.0.0.1:{server.port}{address}")
        assert found.status_code == 200 and "immutable" in found.headers["Cache-Control"], address
        kind = "javascript" if ".js?" in address else "text/css"
        assert kind in found.headers["Content-Type"], address
        other = await browser.get(found.request.url.copy_with(query=b"v=of+another+version"))
        assert "immutable" not in other.headers["Cache-Control"], address
    for name in ("vendor", "vendor/../../console.py", "vendor/%2e%2e/%2e%2e/console.py", "%2fetc%2fpasswd"):
        assert (await browser.get(f"static/{name}")).status_code == 404, name


async def refresh(browser: httpx.AsyncClient, xsrf: str | None) -> httpx.Response:
    """What htmx asks for, every few seconds."""
    found = {**FETCH, "HX-Request": "true", "Accept": "text/html"}
    return await browser.get("home", headers={**found, **({"X-XSRFToken": xsrf} if xsrf else {})})


async def test_a_page_is_refreshed_in_part(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    page = await log_in(hub, server, browser)
    token = re.search(r"\"X-XSRFToken\": \"([^\"]+)\"", page.text)
    assert token is not None
    part = await refresh(browser, token[1])
    assert part.status_code == 200 and "kernel-of-alice" in part.text
    assert "<html" not in part.text and "<nav" not in part.text
    assert part.headers["Vary"] == "HX-Request"


async def test_a_login_that_ends_puts_no_login_page_into_a_page(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    await log_in(hub, server, browser)
    xsrf = next(c.value for c in browser.cookies.jar if c.name == "_xsrf")
    without = await refresh(browser, None)
    assert without.status_code == 401 and "alice" not in without.text
    hub.tokens.clear()

    async def told() -> bool:
        answer = await refresh(browser, xsrf)
        return answer.status_code == 401 and answer.text.startswith("Your login has ended")

    await eventually(told, "the poll to be told", timeout=5)
    assert "<" not in (await refresh(browser, xsrf)).text


async def test_browsers_find_the_pages_and_programs_find_json(hub: FakeHub, browser: httpx.AsyncClient) -> None:
    person = {**NAVIGATE, "Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    root = await browser.get("", headers=person)
    assert root.status_code == 302 and root.headers["Location"] == f"{BASE_URL}home"
    assert (await browser.get("")).json()["service"] == "hub-gateway"
    for path in ("nothing", "admin/nothing", "api/nothing"):
        page = await browser.get(path, headers=person)
        assert page.status_code == 404, "nobody has to log in to read that there is nothing"
        assert "There is nothing at this address" in page.text and f"{BASE_URL}home" in page.text
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        answer = await browser.get(path)
        assert answer.status_code == 404 and answer.json()["message"].startswith("There is nothing at this address")
    refused = await browser.post("nothing", headers=person)
    assert refused.json()["code"] == "not_found"


async def test_a_login_begun_at_one_replica_ends_at_another(hub: FakeHub, browser: httpx.AsyncClient) -> None:
    """And so does one that a restart comes across."""
    callback = await at_hub(hub, await begin(browser))
    async with replica() as other:
        done = await browser.get(f"http://127.0.0.1:{other.port}{callback}")
        assert done.status_code == 302 and done.headers["Location"] == f"{BASE_URL}home"
        page = await browser.get(f"{other.url}/home")
        assert "alice" in page.text


async def test_the_state_gives_nothing_away(browser: httpx.AsyncClient) -> None:
    address = await begin(browser, "home?secret=x")
    state = address.params["state"]
    import base64

    readable = base64.urlsafe_b64decode(state + "=" * (-len(state) % 4))
    assert b"secret" not in readable and b"verifier" not in readable


async def test_a_login_gone_stale_is_begun_anew_once(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    callback = await at_hub(hub, await begin(browser))
    async with replica(b"other secret" * 4) as other:
        again = await browser.get(f"http://127.0.0.1:{other.port}{callback}")
        assert again.status_code == 302 and again.headers["Location"] == f"{BASE_URL}home"
        twice = await browser.get(f"http://127.0.0.1:{other.port}{callback}")
        assert twice.status_code == 403 and "log in anew" in twice.text
        assert twice.headers["Content-Type"].startswith("text/html")


async def test_somebody_elses_login_does_not_become_mine(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    """An attacker sends a link with a code of their own: the state is not of this browser."""
    async with server.client(headers=NAVIGATE) as attacker:
        callback = await at_hub(hub, await begin(attacker))
    refused = await browser.get(f"http://127.0.0.1:{server.port}{callback}")
    assert refused.status_code == 403
    assert not any(c.name == COOKIE for c in browser.cookies.jar)


async def test_a_code_that_the_hub_does_not_know(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    callback = await at_hub(hub, await begin(browser))
    hub.codes.clear()
    refused = await browser.get(f"http://127.0.0.1:{server.port}{callback}")
    assert refused.status_code == 503 and "could not complete the login" in refused.text
    assert hub.url not in refused.text and "127.0.0.1" not in refused.text


@pytest.mark.parametrize("query", ["", "?code=x", "?state=x", "?code=x&state=x", "?error=access_denied"])
async def test_callbacks_out_of_the_blue(browser: httpx.AsyncClient, query: str) -> None:
    answer = await browser.get(f"oauth_callback{query}")
    assert answer.status_code in (302, 400, 403) and "Traceback" not in answer.text


async def test_scripts_need_the_xsrf_token(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    await log_in(hub, server, browser)
    without = await browser.get("home", headers=FETCH)
    assert without.status_code in (302, 403) and "alice" not in without.text
    xsrf = next(c.value for c in browser.cookies.jar if c.name == "_xsrf")
    assert xsrf is not None
    with_it = await browser.get("home", headers={**FETCH, "X-XSRFToken": xsrf})
    assert with_it.status_code == 200
    wrong = await browser.get("home", headers={**FETCH, "X-XSRFToken": xsrf[:-4] + "0000"})
    assert wrong.status_code in (302, 403)
    cross = await browser.get("home", headers={"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Site": "cross-site"})
    assert cross.status_code in (302, 403)


async def test_the_rest_interface_believes_no_cookie(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    await log_in(hub, server, browser)
    xsrf = next(c.value or "" for c in browser.cookies.jar if c.name == "_xsrf")
    for headers in (NAVIGATE, FETCH, {**FETCH, "X-XSRFToken": xsrf}):
        for method in ("GET", "POST"):
            answer = await browser.request(method, "api/kernels", headers=headers)
            assert answer.status_code == 401 and answer.json()["code"] == "unauthenticated"
            assert "Location" not in answer.headers, "a program gets JSON, never the login page"


async def test_a_token_opens_no_page(hub: FakeHub, browser: httpx.AsyncClient) -> None:
    """Pages look up cookies only, which nobody can guess: they are signed."""
    token = hub.issue("alice")
    before = hub.looked_up
    for headers in ({"Authorization": f"token {token}"}, {"Authorization": "token guess"}):
        assert (await browser.get("home", headers=headers)).status_code == 302
    assert (await browser.get(f"home?token={token}", headers={"Sec-Fetch-Mode": "websocket"})).status_code == 302
    browser.cookies.set(COOKIE, "forged")
    assert (await browser.get("home")).status_code == 302
    assert hub.looked_up == before


async def test_who_has_no_access_is_told_so(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    await log_in(hub, server, browser)
    for model in hub.tokens.values():
        model["scopes"] = ["access:services!service=other"]
    page = await browser.get("home")
    assert page.status_code == 403 and "alice may not use this gateway" in page.text
    assert page.headers["Content-Type"].startswith("text/html")


async def test_a_logout_at_the_hub(hub: FakeHub, server: WebServer, browser: httpx.AsyncClient) -> None:
    await log_in(hub, server, browser)
    hub.tokens.clear()

    async def out() -> bool:
        return (await browser.get("home")).status_code == 302

    await eventually(out, "the page to be closed", timeout=5)
    assert not any(c.name == COOKIE for c in browser.cookies.jar)


async def test_another_session_at_the_hub_is_asked_about_anew(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient
) -> None:
    authenticator: Any = server.services.authenticator
    authenticator.cache_seconds = 100.0
    browser.cookies.set("jupyterhub-session-id", "one", domain="127.0.0.1")
    await log_in(hub, server, browser)
    before = hub.looked_up
    assert (await browser.get("home")).status_code == 200 and hub.looked_up == before
    browser.cookies.delete("jupyterhub-session-id")
    browser.cookies.set("jupyterhub-session-id", "two", domain="127.0.0.1")
    assert (await browser.get("home")).status_code == 200 and hub.looked_up == before + 1


async def test_a_hub_that_is_away(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await log_in(hub, server, browser)
    authenticator: Any = server.services.authenticator
    authenticator.stale_seconds = 0.0
    await hub.stop()
    page = await browser.get("home")
    assert page.status_code == 503 and "JupyterHub cannot be asked" in page.text
    assert "127.0.0.1" not in page.text
    async with server.client(headers=NAVIGATE) as stranger:
        assert (await stranger.get("home")).status_code == 302, "the login page is the Hub's affair"


async def test_a_login_is_not_in_the_log(
    hub: FakeHub, server: WebServer, browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = await begin(browser)
    callback = await at_hub(hub, address)
    code = parse_qs(urlsplit(callback).query)["code"][0]
    await browser.get(f"http://127.0.0.1:{server.port}{callback}")
    mine = [r for r in caplog.records if r.name.startswith("hub_gateway")]
    text = "\n".join(str({**r.__dict__, "msg": r.getMessage()}) for r in mine)
    assert "oauth_callback" in text
    for secret in (code, address.params["state"], *hub.tokens, hub.service_token):
        assert secret not in text
    for token in (*hub.tokens, hub.service_token):
        assert token not in caplog.text


async def test_pages_and_other_addresses_without_a_hub() -> None:
    async with WebServer(Kernels()) as server, server.client("alice") as client:
        for path in ("/home", "/oauth_callback", "/static/gateway.css"):
            assert (await client.get(path)).status_code == 404
