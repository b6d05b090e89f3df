"""People, identities, clusters, the ledger and the policy editor, as an administrator works them in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import ARTEFACTS
from tests.e2e.test_browser import ARGUMENTS
from tests.e2e.test_console_access import findings
from tests.harness.hub import PASSWORD, RealHub

pytestmark = pytest.mark.needs("chromium")


@pytest.fixture(scope="module")
def hub(console_hub: RealHub) -> RealHub:
    """The Hub, where dora has two kernels."""
    token = console_hub.user_token("dora")
    for _ in range(2):
        httpx.post(
            f"{console_hub.gateway_url}/api/kernels",
            headers={"Authorization": f"token {token}"},
            json={"name": "python", "env": {"JPY_SESSION_NAME": "/home/dora/<i>x.ipynb"}},
            timeout=30,
        )
    return console_hub


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield made
        made.close()


@contextmanager
def open_as(browser: Browser, hub: RealHub, name: str, **options: Any) -> Iterator[Page]:
    """A page of somebody who has logged in. What a script or the Content-Security-Policy says fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{hub.gateway_url}/home")
    page.locator("#username_input").fill(name)
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    expect(page.get_by_role("heading", level=1, name="My kernels")).to_be_visible()
    said.clear()  # the Hub's own pages
    yield page
    context.close()
    assert not [one for one in said if "status of 40" not in one]


def delete(page: Page, hub: RealHub, policy: str) -> None:
    """By hand, as it takes two steps."""
    page.goto(f"{hub.gateway_url}/admin/policies/{policy}")
    page.get_by_text("Delete this policy").click()
    page.get_by_label(re.compile("I am sure")).check()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text(f"The policy {policy} is deleted.")).to_be_visible()


def test_times_of_the_week_are_typed_previewed_and_kept(hub: RealHub, browser: Browser) -> None:
    with open_as(browser, hub, "admin") as page:
        page.goto(f"{hub.gateway_url}/admin/policies/+new")
        page.get_by_label("Name", exact=True).fill("office-hours")
        page.get_by_label("Whom").fill("user:dora")
        page.get_by_label("Hard limit").fill("many")
        page.get_by_label("Time zone").fill("Europe/Berlin")
        first = page.get_by_role("group", name="Time of the week 1")
        for day in ("Mon", "Fri"):
            first.get_by_label(day).check()
        first.get_by_label("From").fill("08:00")
        first.get_by_label("Until").fill("18:00")
        page.get_by_role("button", name="Another time").click()
        second = page.get_by_role("group", name="Time of the week 2")
        second.get_by_label("Sun").check()
        second.get_by_label("From").fill("22:00")
        second.get_by_label("Until").fill("02:00")
        page.get_by_role("button", name="Preview").last.click()
        expect(page.locator("#hard-help")).to_contain_text("must be a number")
        expect(page.get_by_label("Hard limit")).to_have_value("many")
        expect(page.get_by_role("group", name="Time of the week 2").get_by_label("Until")).to_have_value("02:00")
        page.get_by_label("Hard limit").fill("3")
        page.get_by_label("Explain for the user").fill("dora")
        page.keyboard.press("Enter")
        expect(page.locator("#preview")).to_contain_text("office-hours")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("The policy office-hours is set.")).to_be_visible()
        page.get_by_role("link", name="office-hours").click()
        expect(page.get_by_role("group", name="Time of the week 1").get_by_label("Fri")).to_be_checked()
        expect(page.get_by_role("group", name="Time of the week 2").get_by_label("From")).to_have_value("22:00")
        page.get_by_label("Hard limit").fill("4")
        page.get_by_role("button", name="Save").click()
        page.get_by_role("link", name="office-hours").click()
        expect(page.get_by_role("group", name="Time of the week 2").get_by_label("Sun")).to_be_checked()
        delete(page, hub, "office-hours")


def test_a_grant_is_given_once_whoever_sends_its_form_again(hub: RealHub, browser: Browser) -> None:
    with open_as(browser, hub, "admin") as page:
        page.goto(f"{hub.gateway_url}/admin/people?q=dora")
        page.get_by_role("link", name="Grant more to dora").click()
        expect(page.get_by_role("heading", level=1, name="User dora")).to_be_visible()
        page.get_by_label("How much then").fill("17")
        page.get_by_label("Why").fill("A paper <b>is</b> due.")
        with page.expect_request(lambda request: request.method == "POST") as sent:
            page.get_by_role("button", name="Grant").click()
        expect(page.get_by_text("dora has more of")).to_be_visible()
        grant = page.get_by_role("link", name=re.compile("^grant-dora-")).first.inner_text()
        recorded = sent.value
        headers = {"Content-Type": recorded.headers["content-type"], "Sec-Fetch-Mode": "navigate"}
        for _ in range(2):
            again = page.request.post(recorded.url, headers=headers, data=recorded.post_data or "")
            assert again.status == 409 and "sent before" in again.text()
        page.goto(f"{hub.gateway_url}/admin/policies?q=grant-dora")
        expect(page.locator("#policies tbody tr")).to_have_count(1)
        delete(page, hub, grant)


def test_policies_are_changed_by_a_file(hub: RealHub, browser: Browser) -> None:
    with open_as(browser, hub, "admin") as page:
        page.goto(f"{hub.gateway_url}/admin/policies/+file")
        before = page.get_by_label("Policies (YAML)").input_value()
        for text, added in ((f"{before}- {{name: from-a-file, subject: 'user:dora', hard: 5}}\n", 1), (before, 0)):
            page.goto(f"{hub.gateway_url}/admin/policies/+file")
            page.get_by_label("Policies (YAML)").fill(text)
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#diff")).to_contain_text(f"{added} added, 0 changed, {1 - added} deleted.")
            expect(page.locator("#diff pre")).to_contain_text("name: from-a-file")
            page.get_by_role("button", name="Apply the file").click()
            expect(page.get_by_text("The file is applied")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_beside_the_menu_are_for_everybody(hub: RealHub, browser: Browser, scheme: Any, width: int) -> None:
    wrong: list[str] = []

    def look(page: Page, name: str) -> None:
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        wrong.extend(f"{name}: {line}" for line in findings(page))
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if beyond > 0:
            wrong.append(f"{name}: {beyond} pixels wider than the window")
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(ARTEFACTS / f"admin-{name}-{width}-{scheme}.png"), full_page=True)

    with open_as(browser, hub, "admin", color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        for name in (
            "people/dora",
            "groups",
            "identity?user=dora",
            "clusters?check=*",
            "policies/+file",
            "policies/+new",
        ):
            page.goto(f"{hub.gateway_url}/admin/{name}")
            look(page, re.sub(r"\W+", "-", name))
        page.goto(f"{hub.gateway_url}/admin/policies/everyone")
        page.get_by_label("Hard limit").fill("9")
        page.get_by_label("Explain for the user").fill("dora")
        page.get_by_role("button", name="Preview").last.click()
        expect(page.locator("#preview")).to_be_visible()
        page.get_by_text("Delete this policy").click()
        look(page, "preview")
        page.get_by_label("Hard limit").fill("-1")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#hard-help")).to_contain_text("must be")
        look(page, "typed-wrong")
        page.goto(f"{hub.gateway_url}/admin/policies/+file")
        page.get_by_label("Policies (YAML)").fill("policies: []")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#diff")).to_be_visible()
        look(page, "diff")
        page.goto(f"{hub.gateway_url}/admin/ledger")
        page.get_by_text("A new price list").click()
        look(page, "ledger-prices")
    assert not wrong, "\n".join(wrong)
