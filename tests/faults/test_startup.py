"""A gateway that cannot start says why, in one line, and changes nothing."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.harness.gateway import ROOT, GatewayProcess
from tests.harness.waiting import until

MakeGateway = Callable[..., GatewayProcess]


def refused(gateway: GatewayProcess) -> str:
    """Start a gateway that must end by itself with exit code 1; its last line."""
    gateway.spawn()
    assert gateway.wait(60) == 1, gateway.tail()
    last = gateway.tail().strip().splitlines()[-1]
    assert "The gateway does not start" in last, gateway.tail()
    assert "Traceback" not in gateway.tail()
    return last


def test_a_busy_port(make_gateway: MakeGateway) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        gateway = make_gateway()
        gateway.port = taken.getsockname()[1]
        assert "cannot be bound" in refused(gateway)


MISSING = "/proc/no/file"  # where nothing can be made, not even by root
BROKEN = "{root}/broken"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (f"c.HubGateway.certfile = '{MISSING}'", (MISSING, "HubGateway.certfile")),
        (f"c.HubGateway.certfile = '{BROKEN}'", (BROKEN, "HubGateway.certfile")),
        ("c.HubGateway.state_dir = '/proc/no/state'", ("/proc/no/state", "HubGateway.state_dir")),
        (f"c.HubGateway.cookie_secret_file = '{MISSING}'", (MISSING, "HubGateway.cookie_secret_file")),
        (f"c.HubGateway.cookie_secret_file = '{BROKEN}'", (BROKEN, "HubGateway.cookie_secret_file")),
        (f"c.HubGateway.secret_keys_file = '{MISSING}'", (MISSING, "key file")),
        (f"c.QuotaService.initial_policies = '{MISSING}'", (MISSING, "QuotaService.initial_policies")),
        ("c.HubGateway.ip = 'no.such.host.invalid'", ("no.such.host.invalid", "HubGateway.ip")),
    ],
)
def test_options_that_cannot_be_followed(make_gateway: MakeGateway, config: str, said: tuple[str, ...]) -> None:
    """One line, which names the file or address and the option."""
    gateway = make_gateway()
    (gateway.root / "broken").write_text("what is this?")
    gateway.config_file.write_text(gateway.config_file.read_text() + config.format(root=gateway.root) + "\n")
    last = refused(gateway)
    for words in said:
        assert words.format(root=gateway.root) in last
    assert "another gateway" not in last


def test_a_port_that_cannot_be(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.port = 99999
    gateway.spawn()
    assert gateway.wait(60) == 1
    assert "99999" in gateway.tail() and "65535" in gateway.tail() and "Traceback" not in gateway.tail()


def test_a_second_gateway_with_the_same_state(gateway: GatewayProcess, make_gateway: MakeGateway) -> None:
    second = make_gateway(config=f"c.HubGateway.state_dir = {str(gateway.state)!r}\nc.HubGateway.lock_timeout = 0.5\n")
    assert f"another gateway (pid {gateway.process.pid}) still holds" in refused(second)
    with gateway.client("alice") as client:
        assert client.get("/api/kernels").json() == []


def test_a_database_of_a_newer_version(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(db_url=None).start()
    gateway.stop()
    with sqlite3.connect(gateway.state / "hub-gateway.sqlite") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "newer version" in refused(gateway)


def test_a_damaged_database(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(db_url=None)
    path = gateway.state / "hub-gateway.sqlite"
    path.write_bytes(b"garbage" * 1000)
    said = refused(gateway)
    assert str(path) in said and "damaged" in said and "backup" in said


def test_an_address_of_ip_version_6(make_gateway: MakeGateway) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("not applicable: this machine has no IPv6")
    gateway = make_gateway(config="c.HubGateway.ip = '::1'\n")
    gateway.spawn()

    def ready() -> bool:
        assert gateway.process is not None and gateway.process.poll() is None, gateway.tail()
        try:
            said = json.loads((gateway.state / "gateway.json").read_text())
        except (OSError, ValueError):
            return False
        assert said["url"] == f"http://[::1]:{said['port']}/"
        return httpx.get(f"{said['url']}readyz", timeout=5).status_code == 200

    until(ready, "it serves")


def test_nobody_to_say_who_is_calling(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTERHUB")} | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "hub_gateway", f"--state-dir={tmp_path / 'state'}", "--port=0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "--token-file" in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("base_url", ["/Services/gw", "/services/http-gw"])
def test_prefixes_that_jupyter_server_would_garble(make_gateway: MakeGateway, base_url: str) -> None:
    gateway = make_gateway(base_url=base_url)
    gateway.spawn()
    assert gateway.wait(60) == 1
    assert "websocket address" in gateway.tail()
