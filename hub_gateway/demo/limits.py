"""The part of `make demo CHECK=1` about limits: bob meets one, the administrator raises it, the report bills both."""

from __future__ import annotations

import csv
import re
from typing import Any

from hub_gateway.demo.browser import Browser, StepFailed
from hub_gateway.demo.forms import forms_of

__all__ = ["billed", "open_notebook", "priced", "raised", "refused"]

SERVICE = "/services/hub-gateway"
POLICY = "bob-one"
PRICE = "60"


async def open_notebook(browser: Browser, name: str) -> dict[str, Any]:
    """Open a notebook with a kernel of its own, as JupyterLab does; the session."""
    wanted = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python_local"}}
    found: dict[str, Any] = await browser.api("POST", f"/user/{browser.name}/api/sessions", wanted)
    return found


async def refused(browser: Browser, name: str) -> str:
    """One kernel more is refused, in a sentence; the sentence."""
    try:
        await open_notebook(browser, name)
    except StepFailed as error:
        found = re.search(r"There is no room [^\]\"]*", " ".join(error.message.replace(r"\n", "\n").split()))
        if found is None or POLICY not in found[0] or "first.ipynb" not in found[0]:
            raise StepFailed(f"The refusal does not say what the limit is and who holds it: {error.message}") from None
        return found[0].split(";")[0]
    raise StepFailed("The kernel above the limit was started.")


async def raised(admin: Browser, limit: int) -> str:
    """Raise the limit in the policy editor."""
    address = f"{SERVICE}/admin/policies/{POLICY}"
    page = await admin.page(address)
    form = next((form for form in forms_of(page.text) if "hard" in form.fields), None)
    if form is None:
        raise StepFailed("The page of the policy has no form to change it.")
    after = await admin.submit(address, form.action, {**form.fields, "hard": str(limit)})
    if POLICY not in after.text:
        raise StepFailed("The policy is not on the page that answers.")
    return f"{POLICY}: {form.fields['hard']} to {limit}"


async def priced(admin: Browser) -> str:
    """Set a price list, unless an earlier demonstration has."""
    address = f"{SERVICE}/admin/ledger"
    page = await admin.page(address)
    form = next((form for form in forms_of(page.text) if "kernel_hour" in form.fields), None)
    if form is None:
        raise StepFailed("The page of the ledger has no form for prices.")
    if float(form.fields["kernel_hour"] or 0) > 0:
        return f"{form.fields['kernel_hour']} a kernel and hour already"
    await admin.submit(address, form.action, {**form.fields, "kernel_hour": PRICE})
    return f"{PRICE} a kernel and hour"


async def billed(admin: Browser, names: tuple[str, ...]) -> str:
    """The report of use has hours and cost of everybody who had a kernel."""
    page = await admin.page(f"{SERVICE}/admin/usage?by=user&format=csv")
    rows = {row["user"]: row for row in csv.DictReader(page.text.splitlines())}
    found = []
    for name in names:
        hours, cost = (float(rows.get(name, {}).get(column, 0)) for column in ("kernel_hours", "cost"))
        if hours <= 0 or cost <= 0:
            raise StepFailed(f"The report bills {name} {hours:g} hours and {cost:g} units.")
        found.append(f"{name} {cost:.2f}")
    return ", ".join(found)
