"""Every page of the console for everybody: what axe finds, light and dark, on a desk and on a telephone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hub_gateway.db.models import utcnow
from hub_gateway.web.console import ADMIN
from tests.conftest import KERNELSPECS
from tests.e2e.conftest import ARTEFACTS, ONCE, POLICIES, TENANCY
from tests.e2e.test_browser import ARGUMENTS
from tests.harness.gateway import ROOT
from tests.harness.hub import PASSWORD, RealHub

pytestmark = [pytest.mark.needs("chromium"), ONCE]

PAGES = ("home", "limits", "history", *(address for address, _, _ in ADMIN), "admin/policies/everyone", "nowhere")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
HOSTILE = "/home/<img src=x onerror=document.title='taken'>.ipynb"


@pytest.fixture(scope="module")
def hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    """A Hub on whose pages there is something: kernels, one that waits, an open request."""
    made = RealHub(
        kernelspecs={"python": KERNELSPECS["python"]}, extra=TENANCY, gateway_config=POLICIES, db_url=new_database()
    )
    as_admin = api(made, "admin")
    as_admin("PUT", "quota/policies/research", subject="group:analysts", counts="together", hard=1, action="queue")
    for name in ("bob", "alice"):
        api(made, name)("POST", "kernels", name="python", env={"JPY_SESSION_NAME": HOSTILE})
    api(made, "bob")(
        "POST",
        "requests",
        policy="bob-one",
        amount=3,
        until=(utcnow() + timedelta(days=30)).isoformat(),
        reason="<b>a paper</b>",
    )
    as_admin("POST", "kernels", name="python")
    yield made
    made.close()


def api(hub: RealHub, user: str) -> Callable[..., Any]:
    """The REST API, as a user."""
    headers = {"Authorization": f"token {hub.user_token(user)}"}

    def call(method: str, path: str, **body: Any) -> Any:
        answer = httpx.request(method, f"{hub.gateway_url}/api/{path}", headers=headers, json=body, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    return call


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


def findings(page: Page) -> list[str]:
    """What axe finds on the page as it is, a line each."""
    # By the browser's own tools, which no Content-Security-Policy keeps out.
    page.evaluate((ROOT / "node_modules" / "axe-core" / "axe.min.js").read_text())
    found = page.evaluate(f"() => axe.run(document, {json.dumps(RULES)})")
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_for_everybody(hub: RealHub, browser: Browser, scheme: Any, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    page.goto(f"{hub.gateway_url}/home")
    page.locator("#username_input").fill("admin")
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    wrong = []
    for path in PAGES:
        page.goto(f"{hub.gateway_url}/{path}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        wrong += [f"{path}: {line}" for line in findings(page)]
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if beyond > 0:
            wrong.append(f"{path}: {beyond} pixels wider than the window")
        if "taken" in page.title():
            wrong.append(f"{path}: a name ran as a script")
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(ARTEFACTS / f"{path.replace('/', '-')}-{width}-{scheme}.png"), full_page=True)
    context.close()
    assert not wrong, "\n".join(wrong)
