"""The gateway as a managed service of a real Hub behind its real proxy."""

from __future__ import annotations

import signal
import uuid

import httpx
import psutil

from tests.harness.hub import RealHub
from tests.harness.notebook import Notebook
from tests.harness.waiting import until


def api(hub: RealHub, user: str) -> httpx.Client:
    return httpx.Client(
        base_url=hub.gateway_url, headers={"Authorization": f"token {hub.user_token(user)}"}, timeout=60
    )


def test_who_you_are_is_what_the_hub_says(hub: RealHub) -> None:
    """A kernel runs as the owner of the token, whatever KERNEL_USERNAME says."""
    with api(hub, "alice") as client:
        refused = client.post("/api/kernels", json={"name": "python", "env": {"KERNEL_USERNAME": "bob"}})
        assert refused.status_code == 403
        assert "KERNEL_USERNAME" in refused.json()["message"]
        kernel = client.post("/api/kernels", json={"name": "python", "env": {"KERNEL_FOO": "bar"}}).json()
        with Notebook("ws" + hub.gateway_url.removeprefix("http"), kernel["id"], dict(client.headers)) as notebook:
            shown = notebook.execute("import os; print(os.environ['KERNEL_USERNAME'], os.environ['KERNEL_FOO'])").text
            assert shown == "alice bar\n"
            leaked = notebook.execute("print(sorted(k for k in os.environ if 'JUPYTERHUB' in k or 'TOKEN' in k))").text
            assert leaked == "[]\n"
        assert client.delete(f"/api/kernels/{kernel['id']}").status_code == 204


def test_users_see_nothing_of_each_other(hub: RealHub) -> None:
    """Somebody else's kernel answers exactly as one that never was."""
    with api(hub, "alice") as alice, api(hub, "bob") as bob:
        kernel = alice.post("/api/kernels", json={"name": "python"}).json()["id"]
        never = str(uuid.uuid4())
        assert [k["id"] for k in alice.get("/api/kernels").json()] == [kernel]
        assert bob.get("/api/kernels").json() == []
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/interrupt"),
            ("POST", "/restart"),
            ("GET", "/channels"),
        ):
            foreign = bob.request(method, f"/api/kernels/{kernel}{path}")
            unknown = bob.request(method, f"/api/kernels/{never}{path}")
            assert foreign.status_code == unknown.status_code
            assert foreign.text.replace(kernel, "K") == unknown.text.replace(never, "K")
        assert alice.delete(f"/api/kernels/{kernel}").status_code == 204


def test_browser_logs_in_with_oauth(hub: RealHub) -> None:
    """A browser that knows only the Hub's password ends on its own page."""
    session, page = hub.browser("alice")
    assert page.status_code == 200, page.text
    assert page.url.path.endswith("/services/hub-gateway/home")
    assert "alice" in page.text
    # A cookie alone must not open a kernel or change anything.
    assert session.post(f"{hub.gateway_url}/api/kernels", json={"name": "python"}).status_code in (401, 403)


def test_a_single_user_server_sees_its_owners_kernelspecs(hub: RealHub) -> None:
    """From Lab's own server, through the proxy, with the server's own token."""
    server = hub.start_server("carol")
    token = hub.user_token("carol")
    with httpx.Client(base_url=server, headers={"Authorization": f"token {token}"}, timeout=60) as client:
        assert "python" in client.get("/api/kernelspecs").json()["kernelspecs"]
        opened = client.post(
            "/api/sessions", json={"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": {"name": "python"}}
        )
        assert opened.status_code == 201, opened.text
        kernel = opened.json()["kernel"]["id"]
        ws_url = "ws" + server.removeprefix("http")
        with Notebook(ws_url, kernel, {"Authorization": f"token {token}"}) as notebook:
            assert notebook.execute("print(6 * 7)").text == "42\n"
            # The Hub hears of the kernel's work, so that its idle-culler spares the server.
            before = hub.admin.get("/users/carol").json()["servers"][""]["last_activity"]
            notebook.execute("import time; time.sleep(0.2)")
        until(
            lambda: hub.admin.get("/users/carol").json()["servers"][""]["last_activity"] > before,
            "the kernel's activity at the Hub",
            timeout=90,
        )


def test_kernels_survive_hub_proxy_and_service(hub: RealHub) -> None:
    """The Hub restarts (and its managed service with it), then the proxy, then the Hub dies by kill -9."""
    with api(hub, "dave") as client:
        kernel = client.post("/api/kernels", json={"name": "python"}).json()["id"]
        ws_url = "ws" + hub.gateway_url.removeprefix("http")
        with Notebook(ws_url, kernel, dict(client.headers), session="s") as notebook:
            notebook.execute("x = 1")

        def still_there(step: str) -> None:
            until(
                lambda: client.get(f"/api/kernels/{kernel}").status_code == 200, f"the kernel after {step}", timeout=60
            )
            with Notebook(ws_url, kernel, dict(client.headers), session="s") as notebook:
                assert notebook.execute("x += 1; print(x)").status == "ok"

        before = hub.gateway_pid
        hub.stop_hub()
        hub.start_hub()
        assert hub.gateway_pid != before
        still_there("a Hub restart")

        assert hub.proxy is not None
        hub.proxy.kill()
        hub.proxy.wait(10)
        hub.start_proxy()
        # The Hub restores the routes of a proxy that lost them.
        still_there("a proxy restart")

        assert hub.hub is not None
        orphan = hub.gateway_pid
        hub.hub.send_signal(signal.SIGKILL)
        hub.hub.wait(10)
        until(lambda: not psutil.pid_exists(orphan), "the orphaned service to end", timeout=30)
        hub.start_hub()
        still_there("a kill of the Hub")
        with Notebook(ws_url, kernel, dict(client.headers)) as notebook:
            assert notebook.execute("print(x)").text == "4\n"
