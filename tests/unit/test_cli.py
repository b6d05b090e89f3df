"""The commands of `jupyter hubgateway`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from hub_gateway.auth.scopes import SERVICE_SCOPES
from hub_gateway.auth.tokenfile import read_entries
from hub_gateway.cli.probes import clock, identity, token_file, websocket_url_trap
from hub_gateway.cli.token import add_entry
from hub_gateway.errors import BadRequest
from tests.harness.gateway import ROOT, GatewayProcess
from tests.harness.waiting import until


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `jupyter hubgateway ...` as a user would."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "HUB_GATEWAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "hub_gateway", *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), **(env or {})},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["tokens.yaml", "tokens.json"])
def test_a_token_file_that_was_made_by_the_command_is_read_by_the_gateway(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    add_entry(path, "first", "alice", groups=["a"], admin=True)
    add_entry(path, "second", "bob", expires=datetime(2030, 1, 1, tzinfo=timezone.utc))
    assert path.stat().st_mode & 0o777 == 0o600
    assert "first" not in path.read_text()
    alice, bob = read_entries(path)
    assert alice.sha256 == hashlib.sha256(b"first").hexdigest()
    assert (alice.caller.name, alice.caller.groups, alice.caller.admin) == ("alice", {"a"}, True)
    assert (bob.caller.name, bob.caller.admin) == ("bob", False)
    assert bob.expires == datetime(2030, 1, 1, tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize("content", ["[1, 2]", "tokens: {", "users: []"])
def test_a_file_that_is_no_token_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(content)
    with pytest.raises(BadRequest):
        add_entry(path, "token", "alice")
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("url", "ws_url", "level"),
    [
        ("http://hub.example.org/services/hub-gateway", "", "ok"),
        ("https://hub.example.org/services/hub-gateway", "wss://hub.example.org/services/hub-gateway", "ok"),
        ("https://hub.example.org/Base/services/hub-gateway", "", "error"),
        ("https://httpd.example.org/services/hub-gateway", "", "error"),
        ("https://httpd.example.org/services/hub-gateway", "wss://httpd.example.org/services/hub-gateway", "ok"),
        ("https://hub.example.org/services/hub-gateway", "wss://hub.example.org/", "error"),
        ("hub.example.org", "", "error"),
    ],
)
def test_the_address_that_jupyter_server_would_use_for_websockets(url: str, ws_url: str, level: str) -> None:
    assert websocket_url_trap("JUPYTER_GATEWAY_URL", url, ws_url).level == level


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (-20, "warning"), (3600, "error")])
def test_clocks_that_differ(seconds: int, level: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert clock(format_datetime(now, usegmt=True), now.timestamp() + seconds).level == level


def test_a_token_that_is_not_the_services() -> None:
    nobody = {"kind": "user", "name": "alice", "scopes": []}
    assert [f.level for f in identity(nobody, "")] == ["error", "warning", "warning"]
    ours = {"kind": "service", "name": "hub-gateway", "scopes": ["users:activity!group=x"]}
    assert [f.level for f in identity(ours, "hub-gateway")] == ["ok", "ok", "warning"]
    assert "list:groups" in list(identity(ours, "hub-gateway"))[-1].message
    ours["scopes"] = list(SERVICE_SCOPES)
    assert [f.level for f in identity(ours, "other")] == ["error", "ok", "ok"]


def test_a_token_file_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    assert [f.level for f in token_file(path)] == ["error"]
    add_entry(path, "token", "alice")
    assert [f.level for f in token_file(path)] == ["ok"]
    path.chmod(0o644)
    assert [f.level for f in token_file(path)] == ["warning"]


def test_the_doctor_names_what_is_missing(tmp_path: Path) -> None:
    done = command("check", f"--state-dir={tmp_path / 'state'}")
    assert done.returncode == 1
    (hub,) = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert "JUPYTERHUB_API_URL" in hub
    assert "->" in hub, "what to do"
    assert not [path for path in (tmp_path / "state").rglob("*") if path.is_file()], "it makes neither data nor keys"
    unreachable = {"JUPYTERHUB_API_URL": "http://127.0.0.1:9/hub/api", "JUPYTERHUB_API_TOKEN": "x"}
    found = json.loads(command("check", f"--state-dir={tmp_path / 'state'}", "--json", env=unreachable).stdout)
    assert [f["what"] for f in found if f["level"] == "error"] == ["hub"]


def test_database_commands(tmp_path: Path) -> None:
    option = f"--state-dir={tmp_path / 'state'}"
    assert command("db", "revision", option).returncode == 1
    assert "none (empty)" in command("db", "upgrade", option).stdout
    assert command("db", "revision", option).returncode == 0
    assert "already" in command("db", "upgrade", option).stdout
    assert "0 kernels" in command("db", "rotate-keys", option).stdout


def test_kernels_from_the_command_line(gateway: GatewayProcess, tmp_path: Path) -> None:
    with gateway.client("alice") as client:
        kernel_id = client.post("/api/kernels", json={"name": "python"}).json()["id"]
        until(lambda: client.get(f"/api/kernels/{kernel_id}").json()["execution_state"] == "idle", "the kernel's start")
    alice = {"HUB_GATEWAY_URL": gateway.url, "HUB_GATEWAY_TOKEN": gateway.tokens["alice"]}
    listed = command("kernels", "list", env=alice).stdout
    assert kernel_id in listed
    assert "idle" in listed
    assert json.loads(command("kernels", "show", kernel_id, "--json", env=alice).stdout)["name"] == "python"
    token = tmp_path / "token"
    token.write_text(gateway.tokens["bob"] + "\n")
    bob = ("--url=" + gateway.url, f"--token-from={token}")
    assert command("kernels", "list", *bob).stdout == "No kernels.\n"
    refused = command("kernels", "stop", kernel_id, *bob)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert command("kernels", "stop", "--all", env=alice).stdout == f"stopped {kernel_id}\n"
    assert command("kernels", "list", env=alice).stdout == "No kernels.\n"
    down = command("kernels", "list", "--url=http://127.0.0.1:9", env={"HUB_GATEWAY_TOKEN": "x"})
    assert down.returncode == 1
    assert "cannot be reached" in down.stderr
