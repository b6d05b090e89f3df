"""Limits as a person meets them in JupyterLab: refused with a reason, raised in the console, waiting for a turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.conftest import KERNELSPECS
from tests.e2e.conftest import COMPANION, POLICIES, TENANCY
from tests.e2e.test_browser import ARGUMENTS, Lab
from tests.harness.hub import PASSWORD, RealHub

pytestmark = pytest.mark.needs("chromium")


@pytest.fixture(scope="module")
def hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    made = RealHub(
        kernelspecs={"python": KERNELSPECS["python"]},
        extra=TENANCY,
        gateway_config=POLICIES,
        spawner_args=(COMPANION,),
        db_url=new_database(),
    )
    yield made
    made.close()


@pytest.fixture
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


def window(browser: Browser) -> Page:
    """A window of somebody else: it shares no login."""
    context: BrowserContext = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    return context.new_page()


def in_lab(browser: Browser, hub: RealHub, user: str) -> Lab:
    lab = Lab(window(browser), hub, user)
    lab.log_in()
    return lab


def console(browser: Browser, hub: RealHub, user: str, path: str) -> Page:
    """A page of the gateway, by the Hub's login."""
    page = window(browser)
    page.goto(f"{hub.gateway_url}/{path}")
    page.locator("#username_input").fill(user)
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    return page


def test_bob_meets_his_limit_and_it_is_raised(browser: Browser, hub: RealHub) -> None:
    bob = in_lab(browser, hub, "bob")
    bob.new_notebook("Python")
    expect(bob.output(bob.run("print('one', 'kernel')"))).to_contain_text("one kernel", timeout=60_000)

    bob.launcher().locator(".jp-LauncherCard[data-category='Notebook']").first.click()
    dialog = bob.page.locator(".jp-Dialog")
    expect(dialog).to_contain_text("bob-one")
    expect(dialog).to_contain_text("Untitled.ipynb")
    expect(dialog).to_contain_text("/limits")
    bob.shot("limit-refused")
    dialog.get_by_role("button").last.click()

    # As if opened anew: the notebook without a kernel would ask for one again.
    bob.page.goto(f"{hub.url}/user/bob/lab?reset")
    expect(bob.launcher().locator(".jp-LauncherCard[title='Python (no room)']").first).to_be_visible(timeout=60_000)
    bob.shot("limit-launcher")

    admin = console(browser, hub, "admin", "admin/policies/bob-one")
    admin.get_by_label(re.compile("^Hard limit")).fill("2")
    admin.get_by_role("button", name=re.compile("^Save")).click()
    expect(admin.get_by_role("status")).to_contain_text("is set")

    bob.page.goto(f"{hub.url}/user/bob/lab?reset")
    bob.new_notebook("Python")
    expect(bob.output(bob.run("print('the', 'second')"))).to_contain_text("the second", timeout=60_000)
    bob.shot("limit-raised")
    admin.goto(f"{hub.gateway_url}/admin/usage")
    expect(admin.get_by_role("rowheader", name="bob", exact=True)).to_be_visible()


def test_who_waits_sees_for_what_and_gets_a_turn(browser: Browser, hub: RealHub) -> None:
    headers = {"Authorization": f"token {hub.user_token('admin')}"}
    policy = {"subject": "group:leads", "resource": "kernels", "counts": "together", "hard": 1, "action": "queue"}
    set_ = httpx.put(f"{hub.gateway_url}/api/quota/policies/research", headers=headers, json=policy)
    assert set_.status_code in (200, 201), set_.text
    with hub.admin as api:
        api.post("/users/carl").raise_for_status()
        api.post("/groups/leads/users", json={"users": ["carl"]}).raise_for_status()
    lea = {"Authorization": f"token {hub.user_token('lea')}"}
    first = httpx.post(f"{hub.gateway_url}/api/kernels", headers=lea, json={"name": "python"}, timeout=30)
    assert first.status_code == 201, first.text

    carl = in_lab(browser, hub, "carl")
    carl.new_notebook("Python (queue)")
    cell = carl.run("print('my', 'turn')")
    waits = "1st in the queue of research: lea holds 1 of 1 kernel"
    expect(carl.output(cell)).to_contain_text(waits, timeout=60_000)
    carl.shot("queue-waiting")
    httpx.delete(f"{hub.gateway_url}/api/kernels/{first.json()['id']}", headers=lea, timeout=60).raise_for_status()
    expect(carl.output(cell)).to_contain_text("my turn", timeout=60_000)
    expect(carl.output(cell)).not_to_contain_text("queue")
    carl.shot("queue-turn")
