"""Browser pages behind the Hub's OAuth, and what cookies and tokens open."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
import websocket

from tests.e2e.conftest import ONCE
from tests.harness.hub import NAVIGATE, PASSWORD, RealHub

pytestmark = ONCE

FETCH = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def alice(hub: RealHub) -> Iterator[httpx.Client]:
    """A browser that has been at the gateway's page."""
    session, page = hub.browser("alice")
    assert "alice" in page.text
    yield session
    session.close()


def service_xsrf(session: httpx.Client) -> str:
    return next(c.value or "" for c in session.cookies.jar if c.name == "_xsrf" and "services" in c.path)


def test_the_page_is_clean_after_the_login(hub: RealHub) -> None:
    session, page = hub.browser("alice", f"{hub.gateway_url}/home?from=a+link")
    assert page.url.path.endswith("/services/hub-gateway/home")
    assert page.url.params.get("from") == "a link", "the browser ends where it wanted to go"
    assert "code" not in page.url.params, "the OAuth code must not stay in the address"
    cookies = {cookie.name: cookie for cookie in session.cookies.jar if "services" in cookie.path}
    assert cookies["service-hub-gateway"].has_nonstandard_attr("HttpOnly")
    session.close()


def test_logging_out_at_the_hub_closes_the_page(hub: RealHub, alice: httpx.Client) -> None:
    alice.get(f"{hub.url}/hub/logout")
    assert alice.get(f"{hub.gateway_url}/home").url.path.endswith("/hub/login")


def test_a_page_is_not_for_scripts_without_the_xsrf_token(hub: RealHub, alice: httpx.Client) -> None:
    alice.follow_redirects = False
    without = alice.get(f"{hub.gateway_url}/home", headers=FETCH)
    assert without.status_code in (302, 403)
    assert "alice" not in without.text
    with_it = alice.get(f"{hub.gateway_url}/home", headers={**FETCH, "X-XSRFToken": service_xsrf(alice)})
    assert with_it.status_code == 200


def test_the_rest_interface_believes_no_cookie(hub: RealHub, alice: httpx.Client) -> None:
    """Pages of every user's server have the gateway's origin: they could send such requests for their visitors."""
    alice.follow_redirects = False
    for headers in (FETCH, {**FETCH, "X-XSRFToken": service_xsrf(alice)}, NAVIGATE):
        answer = alice.post(f"{hub.gateway_url}/api/kernels", json={"name": "python"}, headers=headers)
        assert answer.status_code in (401, 403)
        assert set(answer.json()) >= {"reason", "message"}, "a program gets JSON, never the login page"
    token = hub.user_token("alice")
    headers = {"Authorization": f"token {token}"}
    made = httpx.post(f"{hub.gateway_url}/api/kernels", json={"name": "python"}, headers=headers)
    assert made.status_code == 201, "a token needs no XSRF token"
    kernel = f"{hub.gateway_url}/api/kernels/{made.json()['id']}"
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in alice.cookies.jar)
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(
            "ws" + kernel.removeprefix("http") + "/channels",
            header={"Cookie": cookies, "Sec-Fetch-Mode": "websocket", "Sec-Fetch-Site": "same-origin"},
            origin=str(httpx.URL(hub.url).join("/")).rstrip("/"),
            timeout=20,
        )
    assert refused.value.status_code in (401, 403)
    assert httpx.delete(kernel, headers=headers, timeout=30).status_code == 204


def test_only_tokens_for_this_service_open_it(hub: RealHub) -> None:
    address = f"{hub.gateway_url}/api/kernelspecs"
    fit = hub.user_token("alice", scopes=["access:services!service=hub-gateway"])
    for scheme in ("token", "Bearer"):
        assert httpx.get(address, headers={"Authorization": f"{scheme} {fit}"}).status_code == 200
    narrow = hub.user_token("alice", scopes=["read:users!user=alice"])
    refused = httpx.get(address, headers={"Authorization": f"token {narrow}"})
    assert refused.status_code == 403
    assert refused.json()["message"].endswith(".")
    for headers in ({}, {"Authorization": "token nobody-issued-this"}):
        assert httpx.get(address, headers=headers).status_code in (401, 403)
    assert httpx.get(f"{address}?token={fit}").status_code in (401, 403), "tokens in addresses end up in logs"


def test_the_root_answers_cheaply_to_anybody(hub: RealHub) -> None:
    """The Hub asks it at start, and a load balancer all the time."""
    answer = httpx.get(f"{hub.gateway_url}/")
    assert answer.status_code == 200
    assert not answer.history


def test_a_login_that_was_under_way_survives_a_restart(own_hub: RealHub) -> None:
    """The OAuth state of a browser at the login page travels with the browser, not in the memory of the old process."""
    with httpx.Client(headers=NAVIGATE, timeout=30, follow_redirects=True) as browser:
        login = browser.get(f"{own_hub.gateway_url}/home")
        assert login.url.path == "/hub/login"
        own_hub.stop_hub()
        own_hub.start_hub()
        page = browser.get(login.url)
        xsrf = re.search(r'name="_xsrf" value="([^"]+)"', page.text)
        assert xsrf is not None
        answer = browser.post(page.url, data={"username": "alice", "password": PASSWORD, "_xsrf": xsrf[1]})
        assert answer.status_code == 200, answer.text[:2000]
        assert answer.url.path == "/services/hub-gateway/home"
        assert "alice" in answer.text
