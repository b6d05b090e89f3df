"""The console in a real browser: pages that refresh themselves, plots, downloads, and a policy that nothing breaks."""

from __future__ import annotations

import csv
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sqlalchemy import create_engine, insert

from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import LedgerEntry
from tests.e2e.conftest import ONCE
from tests.harness.hub import PASSWORD, RealHub

pytestmark = [pytest.mark.needs("chromium"), ONCE]

REFRESH = "htmx.trigger(document.getElementById('live'), 'refresh')"
DRAWN = """element => [...element.querySelectorAll("canvas")].map(canvas => {
    const seen = new Set();
    const found = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 0; i < found.length; i += 4) if (found[i + 3] === 255) seen.add(found.slice(i, i + 3).join());
    return { width: canvas.clientWidth, colours: [...seen] };
})"""
LONG = "a-rather-long-name-as-some-identity-providers-give-them@department.university.example"


def used(owner: str, days: int, price_version: int) -> list[dict[str, Any]]:
    """Entries of the ledger: four hours on each of the last days."""
    begin = time.time() // 86400 * 86400
    same: dict[str, Any] = {"kind": "kernel", "principal": None, "unix_user": None, "proxy": "local", "queue": ""}
    rest: dict[str, Any] = {"cpu": 2.0, "memory": 2**32, "gpu": 0, "gpu_model": "", "corrects": None, "actor": None}
    return [
        {
            **same,
            **rest,
            "kernel_id": str(uuid.uuid4()),
            "owner": owner,
            "groups": "",
            "cost_center": "",
            "kernelspec": "python",
            "started": begin - day * 86400 + 3600,
            "stopped": begin - day * 86400 + 5 * 3600,
            "seconds": 4 * 3600.0,
            "price_version": price_version,
            "note": "",
            "recorded_at": utcnow(),
        }
        for day in range(1, days + 1)
    ]


@pytest.fixture(scope="module")
def hub(console_hub: RealHub) -> RealHub:
    """The Hub, where some people have a past, and prices are set."""
    headers = {"Authorization": f"token {console_hub.user_token('admin')}"}
    prices = httpx.post(f"{console_hub.gateway_url}/api/prices", headers=headers, json={"core_hour": 2})
    prices.raise_for_status()
    version = prices.json()["version"]
    engine = create_engine(console_hub.db_url)
    with engine.begin() as connection:
        people = [("paula", 20), (LONG, 3), *((f"u{number}", 1) for number in range(40))]
        rows = [row for owner, days in people for row in used(owner, days, version)]
        connection.execute(insert(LedgerEntry), rows)
    engine.dispose()
    return console_hub


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@contextmanager
def open_as(browser: Browser, hub: RealHub, name: str, **options: Any) -> Iterator[Page]:
    """A page at home, of somebody who has logged in. Whatever the browser complains about fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{hub.gateway_url}/")
    page.locator("#username_input").fill(name)
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    page.wait_for_url("**/services/hub-gateway/home")
    said.clear()  # the Hub's own pages
    yield page
    context.close()
    assert not said


class Kernels:
    """Somebody's kernels, by the REST API."""

    def __init__(self, hub: RealHub, owner: str) -> None:
        self.address = f"{hub.gateway_url}/api/kernels"
        self.headers = {"Authorization": f"token {hub.user_token(owner)}"}

    def start(self, notebook: str) -> str:
        body = {"name": "python", "env": {"JPY_SESSION_NAME": f"/home/{notebook}"}}
        made = httpx.post(self.address, headers=self.headers, json=body, timeout=30)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    def stop(self, kernel_id: str) -> None:
        httpx.delete(f"{self.address}/{kernel_id}", headers=self.headers, timeout=30).raise_for_status()


def test_my_kernels_appear_and_go_without_a_reload(hub: RealHub, browser: Browser) -> None:
    kernels = Kernels(hub, "carol")
    with open_as(browser, hub, "carol") as page:
        page.evaluate("window.same = true")
        expect(page.get_by_text("You have no kernels")).to_be_visible()
        kernel = kernels.start("first.ipynb")
        expect(page.locator(f"#k-{kernel}")).to_contain_text("first.ipynb", timeout=20_000)
        expect(page.locator("#live-news")).to_have_text("1 kernel, 0 waiting.")
        page.locator(f"#stop-{kernel}").focus()
        other = kernels.start("second.ipynb")
        page.evaluate(REFRESH)
        expect(page.locator(f"#k-{other}")).to_be_visible(timeout=20_000)
        expect(page.locator(f"#stop-{kernel}")).to_be_focused()
        kernels.stop(kernel)
        page.evaluate(REFRESH)
        expect(page.locator(f"#k-{kernel}")).to_have_count(0, timeout=20_000)
        expect(page.locator("#live")).to_be_focused()
        assert page.evaluate("window.same"), "the page was never loaded anew"
        page.locator(f"#stop-{other}").click()
        expect(page.get_by_text("The kernel is shut down.")).to_be_visible()
        expect(page.locator(f"#k-{other}")).to_have_count(0, timeout=20_000)


def test_what_is_ticked_or_typed_survives_a_refresh(hub: RealHub, browser: Browser) -> None:
    kernels = Kernels(hub, "carol")
    first = kernels.start("ticked.ipynb")
    with open_as(browser, hub, "admin") as page:
        page.goto(f"{hub.gateway_url}/admin/kernels")
        page.locator(f"#choose-{first}").check()
        page.locator("#message").fill("The node is needed.")
        second = kernels.start("other.ipynb")
        page.evaluate(REFRESH)
        expect(page.locator(f"#k-{second}")).to_be_visible()
        expect(page.locator(f"#choose-{first}")).to_be_checked()
        expect(page.locator(f"#choose-{second}")).not_to_be_checked()
        page.get_by_role("button", name="Stop the chosen ones").click()
        expect(page.get_by_text("1 kernel is being stopped.")).to_be_visible()
        page.goto(f"{hub.gateway_url}/limits")
        asking = page.locator("details", has_text="Ask for more").first
        asking.locator("summary").click()
        asking.locator("[name=reason]").fill("half a sent")
        with page.expect_request(lambda request: "hx-request" in request.headers) as refreshed:
            asking.locator("[name=reason]").fill("")
            page.evaluate(REFRESH)
        response = refreshed.value.response()
        assert response is not None and response.status == 200
        expect(asking.locator("[name=reason]")).to_be_visible()  # what is open stays open
        asking.locator("[name=reason]").fill("half a sent")
        page.evaluate(REFRESH)
        expect(page.locator("#live-said")).to_have_text("Not refreshed while you write.")
        expect(asking.locator("[name=reason]")).to_have_value("half a sent")
    kernels.stop(second)


def test_nothing_is_asked_for_by_a_page_that_is_hidden_or_paused(hub: RealHub, browser: Browser) -> None:
    with open_as(browser, hub, "carol") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "hx-request" in request.headers else None)
        page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true })")
        page.evaluate(f"window.away = true; {REFRESH}")
        assert not asked
        with page.expect_response(lambda response: "hx-request" in response.request.headers):
            page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        page.get_by_role("button", name="Pause").click()
        before = len(asked)
        page.evaluate(REFRESH)
        expect(page.locator("#live-said")).to_have_text("Refreshing is paused.")
        assert len(asked) == before
        with page.expect_response(lambda response: "hx-request" in response.request.headers):
            page.get_by_role("button", name="Go on").click()


def test_what_goes_wrong_leaves_the_page_as_it_is(hub: RealHub, browser: Browser) -> None:
    kernels = Kernels(hub, "carol")
    kernel = kernels.start("kept.ipynb")
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{hub.gateway_url}/home")
    page.locator("#username_input").fill("carol")
    page.locator("#password_input").fill(PASSWORD)
    page.locator("#login_submit").click()
    expect(page.locator(f"#k-{kernel}")).to_be_visible()
    page.wait_for_load_state()  # its scripts come after what it shows
    page.route("**/home", lambda route: route.abort())
    page.evaluate(REFRESH)
    expect(page.locator("#live-said")).to_contain_text("the gateway cannot be reached")
    page.unroute("**/home")
    page.evaluate(REFRESH)
    expect(page.locator("#live-said")).to_have_text("Refreshed every 5 seconds.")
    context.new_page().goto(f"{hub.url}/hub/logout")
    page.evaluate(REFRESH)
    expect(page.locator("#live-said")).to_contain_text("Your login has ended", timeout=20_000)
    expect(page.locator(f"#k-{kernel}")).to_be_visible()
    page.get_by_role("link", name="Open the page again").click()
    page.wait_for_url("**/hub/login**")
    context.close()
    kernels.stop(kernel)


@pytest.mark.parametrize(
    ("name", "path", "plots"), [("paula", "history", 2), ("paula", "limits", 1), ("admin", "admin/usage", 1)]
)
def test_plots_are_drawn_light_and_dark_wide_and_narrow(
    hub: RealHub, browser: Browser, name: str, path: str, plots: int
) -> None:
    with open_as(browser, hub, name, color_scheme="light", viewport={"width": 1280, "height": 900}) as page:
        page.goto(f"{hub.gateway_url}/{path}")
        expect(page.locator(".plot canvas")).to_have_count(plots)
        for plot in page.locator(".plot").all():
            assert plot.get_attribute("aria-label")
            table = page.locator(f"#{plot.get_attribute('data-table')}")
            expect(table).to_have_count(1)  # the numbers stand on the page
            wide, light = plot.evaluate(DRAWN)[0].values()
            assert "31,119,180" in light, "bars in the colour of the style sheet"
            assert wide > 400
            page.emulate_media(color_scheme="dark")
            expect(page.locator("html")).to_have_attribute("data-bs-theme", "dark")
            assert "110,168,254" in plot.evaluate(DRAWN)[0]["colours"]
            page.emulate_media(color_scheme="light")
            page.set_viewport_size({"width": 375, "height": 800})
            page.wait_for_function("width => document.querySelector('.plot canvas').clientWidth < width", arg=376)
            narrow = plot.evaluate(DRAWN)[0]
            assert narrow["width"] <= 375 and "31,119,180" in narrow["colours"]
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, "nothing sticks out of the page"
            page.set_viewport_size({"width": 1280, "height": 900})
            page.wait_for_function("width => document.querySelector('.plot canvas').clientWidth > width", arg=400)


def test_usage_is_downloaded_as_it_is_shown(hub: RealHub, browser: Browser, tmp_path: Path) -> None:
    with open_as(browser, hub, "paula") as page:
        page.goto(f"{hub.gateway_url}/history")
        with page.expect_download() as found:
            page.get_by_role("link", name="Download CSV by day").click()
        assert found.value.suggested_filename.startswith("my-usage-by-day-")
        found.value.save_as(tmp_path / "mine.csv")
        rows = list(csv.DictReader((tmp_path / "mine.csv").open()))
        assert len(rows) == 21 and rows[-1]["day"] == "total"
        assert {float(row["kernel_hours"]) for row in rows[:-1]} == {4.0}
        assert {float(row["cost"]) for row in rows[:-1]} == {16.0}
    with open_as(browser, hub, "admin") as page:
        page.goto(f"{hub.gateway_url}/admin/usage?by=user&from={utcnow().year - 1}-01-01")
        with page.expect_download() as found:
            page.get_by_role("button", name="Download CSV").click()
        found.value.save_as(tmp_path / "all.csv")
        users = {row["user"] for row in csv.DictReader((tmp_path / "all.csv").open())}
        assert {"paula", LONG, "u39", "total"} <= users


def test_the_theme_is_the_one_chosen_at_the_hub(hub: RealHub, browser: Browser) -> None:
    with open_as(browser, hub, "carol", color_scheme="light") as page:
        expect(page.locator("html")).to_have_attribute("data-bs-theme", "light")
        page.goto(f"{hub.url}/hub/home")
        page.locator("#dark-theme-toggle").click()
        page.goto(f"{hub.gateway_url}/home")
        expect(page.locator("html")).to_have_attribute("data-bs-theme", "dark")


def test_no_page_breaks_the_policy_or_the_window(hub: RealHub, browser: Browser) -> None:
    """Every page in the navigation, in a narrow window and in a dark one: no complaint, nothing that sticks out."""
    waiting = Kernels(hub, "quentin").start(f"{LONG * 2}.ipynb")
    narrow: dict[str, Any] = {"color_scheme": "dark", "viewport": {"width": 375, "height": 800}}
    for options in (narrow, {"java_script_enabled": False}):
        with open_as(browser, hub, "admin", **options) as page:
            tabs = page.locator("header nav a").all()
            addresses = [str(tab.get_attribute("href")) for tab in tabs]
            assert len(addresses) > 8
            for address in addresses:
                page.goto(str(httpx.URL(hub.url).join(address)))
                expect(page.locator("h1")).to_be_visible()
                if "java_script_enabled" not in options:
                    assert page.evaluate("document.documentElement.scrollWidth") <= 375, address
                for box in page.locator(".table-responsive").all():
                    assert box.get_attribute("tabindex") == "0", f"{address}: wide tables scroll by the keyboard too"
    Kernels(hub, "quentin").stop(waiting)
