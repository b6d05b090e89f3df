"""The console, at a real Hub: who sees which page, forms, and limits that change by them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

import httpx
import pytest

from hub_gateway.demo.forms import forms_of
from tests.harness.hub import RealHub
from tests.harness.waiting import until

ADMIN = ("kernels", "policies", "policies/bob-one", "requests", "queue", "usage", "audit?verify=yes", "maintenance")


@pytest.fixture(scope="module")
def hub(console_hub: RealHub) -> RealHub:
    return console_hub


@pytest.fixture
def admin(hub: RealHub) -> Iterator[httpx.Client]:
    session, _ = hub.browser("admin")
    yield session
    session.close()


def launch(hub: RealHub, token: str) -> httpx.Response:
    headers = {"Authorization": f"token {token}"}
    body = {"name": "python", "env": {"JPY_SESSION_NAME": "/home/bob/<b>report.ipynb"}}
    return httpx.post(f"{hub.gateway_url}/api/kernels", headers=headers, json=body, timeout=30)


def fill(session: httpx.Client, address: str, wanted: str, **changes: str) -> httpx.Response:
    """Fill in the form of a page that has the field `wanted`, and send it."""
    form = next(form for form in forms_of(session.get(address).text) if wanted in form.fields)
    target = httpx.URL(address).join(form.action)
    return session.post(target, data={**form.fields, **changes}, headers={"Referer": address})


def test_bob_meets_his_limit_asks_and_gets_more(hub: RealHub, admin: httpx.Client) -> None:
    assert (
        "Price list 1 holds" in fill(admin, f"{hub.gateway_url}/admin/ledger", "kernel_hour", kernel_hour="3600").text
    )
    token = hub.user_token("bob")
    assert launch(hub, token).status_code == 201
    refused = launch(hub, token)
    assert refused.status_code == 403 and "bob-one" in refused.json()["message"]
    bob, page = hub.browser("bob", f"{hub.gateway_url}/limits")
    assert "You hold 1 kernel of 1 kernel." in page.text
    assert "&lt;b&gt;report" in page.text and "<b>report" not in page.text
    asked = fill(bob, f"{hub.gateway_url}/limits", "reason", amount="2", reason="a paper is due")
    assert "Your request is sent" in asked.text
    answered = fill(admin, f"{hub.gateway_url}/admin/requests", "text", answer="grant", text="good luck")
    assert "Request 1 is granted." in answered.text
    assert launch(hub, token).status_code == 201
    assert "good luck" in bob.get(f"{hub.gateway_url}/limits").text
    report = admin.get(f"{hub.gateway_url}/admin/usage").text
    assert ">bob<" in report
    billed = csv.DictReader(admin.get(f"{hub.gateway_url}/admin/usage?by=user&format=csv").text.splitlines())
    bob_used = next(row for row in billed if row["user"] == "bob")
    assert (int(bob_used["kernels"]), float(bob_used["kernel_hours"]) > 0) == (2, True)
    seconds = float(bob_used["kernel_hours"]) * 3600
    assert float(bob_used["cost"]) == pytest.approx(seconds, rel=0.01, abs=0.01), "a second of a kernel costs one unit"
    too_long = admin.get(f"{hub.gateway_url}/admin/usage?from=2000-01-01")
    assert too_long.status_code == 400 and "ten years at most" in too_long.text
    for kernel in httpx.get(f"{hub.gateway_url}/api/kernels", headers={"Authorization": f"token {token}"}).json():
        assert kernel["id"] in admin.get(f"{hub.gateway_url}/admin/kernels").text


def test_an_entry_of_the_ledger_is_found_and_corrected(hub: RealHub, admin: httpx.Client) -> None:
    """By the number that the page shows; the correction is an entry of its own, which says why."""
    token = hub.user_token("alice")
    kernel = launch(hub, token).json()["id"]
    headers = {"Authorization": f"token {token}"}
    assert httpx.delete(f"{hub.gateway_url}/api/kernels/{kernel}", headers=headers, timeout=30).status_code == 204
    address = f"{hub.gateway_url}/admin/ledger?user=alice"

    def number() -> str:
        found = re.search(r'<tr><th scope="row">(\d+)</th><td class="name">alice</td>', admin.get(address).text)
        return found[1] if found else ""

    entry = until(number, "the entry of a kernel that has ended")
    mine = httpx.get(f"{hub.gateway_url}/api/ledger/entries", headers=headers).json()["entries"]
    assert [(one["id"], one["kernel_id"]) for one in mine] == [(int(entry), kernel)]
    done = fill(admin, address, "entry", entry=entry, seconds="60", note="the <b>Hub</b> was away")
    assert f"Entry {entry} is corrected by entry" in done.text
    shown = admin.get(address).text
    assert f"corrects {entry}: the &lt;b&gt;Hub&lt;/b&gt; was away" in shown


def test_a_policy_is_previewed_saved_and_not_overwritten(hub: RealHub, admin: httpx.Client) -> None:
    address = f"{hub.gateway_url}/admin/policies/everyone"
    preview = fill(admin, address, "hard", hard="5", soft="4", do="preview")
    assert "of the last 30 days" in preview.text or "no launches" in preview.text
    other = forms_of(admin.get(address).text)[0]
    assert "is set" in fill(admin, address, "hard", hard="6", soft="5").text
    stale = admin.post(address, data={**other.fields, "hard": "20"})
    assert stale.status_code == 409 and 'value="20"' in stale.text
    assert fill(admin, address, "hard", hard="-1").status_code == 400
    assert fill(admin, address, "hard", hard="4").status_code == 400  # below its soft limit


def test_pages_are_for_whom_they_are_for(hub: RealHub, admin: httpx.Client) -> None:
    bob, _ = hub.browser("bob")
    lea, _ = hub.browser("lea")
    for page in ADMIN:
        address = f"{hub.gateway_url}/admin/{page}"
        found = admin.get(address)
        assert found.status_code == 200 and "style=" not in found.text, page
        assert not re.search(r"<script(?![^>]* src=)|<script[^>]*>[^<]|\son[a-z]+=", found.text), page
        assert "default-src 'none'" in found.headers["Content-Security-Policy"]
        assert bob.get(address).status_code == 404, page
    for page, status in (("kernels", 200), ("policies", 200), ("usage", 404), ("audit", 404), ("maintenance", 404)):
        assert lea.get(f"{hub.gateway_url}/admin/{page}").status_code == status, page
    about_all = fill(lea, f"{hub.gateway_url}/admin/policies/everyone", "hard", hard="99", soft="9")
    assert about_all.status_code == 403 and "analysts" in about_all.text


def test_forged_forms_change_nothing(hub: RealHub, admin: httpx.Client) -> None:
    address = f"{hub.gateway_url}/admin/maintenance"
    form = forms_of(admin.get(address).text)[0].fields
    wrong = {**form, "sentence": "x", "_xsrf": form["_xsrf"][:-4] + "0000"}
    for data in ({**form, "sentence": "x", "_xsrf": ""}, wrong):
        answer = admin.post(address, data=data)
        assert answer.status_code == 403 and "nothing was changed" in answer.text
    bob, _ = hub.browser("bob")
    own = forms_of(bob.get(f"{hub.gateway_url}/limits").text)
    assert bob.post(address, data={**own[0].fields, "on": "yes", "sentence": "x"}).status_code == 403
    assert "Kernels are started as usual" in admin.get(address).text
    assert "No kernels are started now" in fill(admin, address, "on", sentence="An upgrade until noon.").text
    refused = launch(hub, hub.user_token("alice"))
    assert refused.status_code == 403 and "An upgrade until noon." in refused.json()["message"]
    assert "started again" in fill(admin, address, "on").text


def test_the_administrator_stops_a_kernel_with_a_word(hub: RealHub, admin: httpx.Client) -> None:
    token = hub.user_token("alice")
    kernel_id = launch(hub, token).json()["id"]
    address = f"{hub.gateway_url}/admin/kernels"
    assert "being stopped" in fill(admin, address, "message", id=kernel_id, message="The node is needed.").text
    found = httpx.get(f"{hub.gateway_url}/api/kernels/{kernel_id}", headers={"Authorization": f"token {token}"}).json()
    assert "The node is needed." in found["reason"]
    assert "The node is needed." in hub.browser("alice")[1].text
