"""Browser pages behind the Hub's OAuth, and what cookies and tokens open."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import pytest
import websocket

from tests.e2e.realhub import RealHub

CORS = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"}
NAVIGATE = {"Sec-Fetch-Mode": "navigate"}
PREFIX = "/services/hub-gateway/"
KERNEL = {"name": "python"}


async def test_a_page_leads_to_the_hubs_login_and_back(real_hub: RealHub) -> None:
    async with real_hub.browser(None) as browser:
        login = await browser.page(f"{PREFIX}home")
        assert login.url.path == "/hub/login"
        token = browser.xsrf("/hub/")
        form = {"username": "alice", "password": real_hub.password("alice"), "_xsrf": token}
        page = await browser.client.post(str(login.url), data=form, headers=NAVIGATE)
        assert page.status_code == 200, page.text
        assert page.url.path == f"{PREFIX}home"
        assert "code=" not in str(page.url), "the OAuth code stays in the address"
        assert "alice" in page.text


async def test_logging_out_at_the_hub_closes_the_page(real_hub: RealHub) -> None:
    async with real_hub.browser("bob") as browser:
        assert "bob" in (await browser.page(f"{PREFIX}home")).text
        await browser.page("/hub/logout")
        assert (await browser.page(f"{PREFIX}home")).url.path == "/hub/login"


async def test_a_cookie_needs_the_xsrf_token_and_a_token_does_not(real_hub: RealHub) -> None:
    async with real_hub.browser("alice") as browser:
        await browser.page(f"{PREFIX}home")
        address = f"{real_hub.service}/api/kernels"
        without = await browser.client.post(address, json=KERNEL, headers=CORS)
        assert without.status_code == 403
        assert "message" in without.json(), "a program gets JSON, never the login page"
        foreign = await browser.client.post(address, json=KERNEL, headers={**CORS, "X-XSRFToken": "2|nonsense"})
        assert foreign.status_code == 403
        xsrf = browser.xsrf(PREFIX)
        assert xsrf
        made = await browser.client.post(address, json=KERNEL, headers={**CORS, "X-XSRFToken": xsrf})
        assert made.status_code == 201, made.text
        gone = await browser.client.delete(f"{address}/{made.json()['id']}", headers={**CORS, "X-XSRFToken": xsrf})
        assert gone.status_code == 204


def test_only_tokens_for_this_service_open_it(real_hub: RealHub) -> None:
    fit, narrow = real_hub.token("alice"), real_hub.token("alice", ["read:users!user=alice"])
    address = f"{real_hub.service}/api/kernelspecs"
    for scheme in ("token", "Bearer"):
        assert httpx.get(address, headers={"Authorization": f"{scheme} {fit}"}).status_code == 200
    refused = httpx.get(address, headers={"Authorization": f"token {narrow}"})
    assert refused.status_code == 403
    assert refused.json()["message"].endswith(".")
    for headers in ({}, {"Authorization": "token nobody-issued-this"}):
        answer = httpx.get(address, headers=headers)
        assert answer.status_code in (401, 403)
        assert set(answer.json()) >= {"reason", "message"}
    assert httpx.get(f"{address}?token={fit}").status_code in (401, 403), "tokens in addresses end up in logs"


async def test_a_cookie_alone_opens_no_kernel(real_hub: RealHub) -> None:
    """Every user's server has the gateway's origin: its pages could open such a websocket for its visitors."""
    async with real_hub.browser("alice") as browser:
        await browser.page(f"{PREFIX}home")
        xsrf = browser.xsrf(PREFIX)
        address = f"{real_hub.service}/api/kernels"
        made = await browser.client.post(address, json=KERNEL, headers={**CORS, "X-XSRFToken": xsrf})
        request = httpx.Request("GET", f"{address}/x")
        browser.client.cookies.set_cookie_header(request)
        headers = {"Cookie": request.headers["Cookie"], "Sec-Fetch-Mode": "websocket", "Sec-Fetch-Site": "same-origin"}
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            websocket.create_connection(
                f"{real_hub.ws_service}/api/kernels/{made.json()['id']}/channels",
                header=headers,
                origin=real_hub.url,
                timeout=20,
            )
        assert refused.value.status_code in (401, 403)
        await browser.client.delete(f"{address}/{made.json()['id']}", headers={**CORS, "X-XSRFToken": xsrf})


async def test_the_root_answers_cheaply_to_anybody(real_hub: RealHub) -> None:
    """The Hub asks it at start, and a load balancer all the time."""
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{real_hub.service}/")
    assert answer.status_code == 200
    assert urlsplit(str(answer.url)).path == PREFIX
