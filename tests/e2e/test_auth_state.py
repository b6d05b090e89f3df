"""What a Hub's authenticator remembers of its users (auth_state), and what the gateway makes of it, on a real Hub."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import httpx
import pytest
from jupyterhub.services.auth import HubAuth

from hub_gateway.auth.hub_people import HubPeople
from tests.conftest import KERNELSPECS
from tests.harness.hub import RealHub

CCACHE = base64.b64encode(b"\x05\x04 of ada").decode()
HUB = f"""
from jupyterhub.auth import DummyAuthenticator
from tests.e2e.conftest import ONCE

pytestmark = ONCE

class Remembering(DummyAuthenticator):
    async def authenticate(self, handler, data):
        name = await super().authenticate(handler, data)
        state = {{"account": name + "-staff", "krb5_ccache": {CCACHE!r}, "access_token": "hunter2"}}
        return name and {{"name": name, "auth_state": state}}

c.JupyterHub.authenticator_class = Remembering
c.Remembering.password = c.DummyAuthenticator.password
c.Authenticator.enable_auth_state = True
c.CryptKeeper.keys = [os.urandom(32)]
for role in c.JupyterHub.load_roles[:2]:
    role["scopes"].append("admin:auth_state")
"""
GATEWAY = """
c.IdentityMapper.auth_state_keys = ["account"]
c.IdentityMapper.default_realm = "EXAMPLE.TEST"
c.IdentityMapper.rules = [
    {"name": "accounts", "on": "auth_state.account", "pattern": "([a-z]+)-staff", "principal": "$1@EXAMPLE.TEST"},
]
"""


@pytest.fixture(scope="module")
def hub(new_database: Callable[[], str | None]) -> Iterator[RealHub]:
    made = RealHub(
        kernelspecs={"python": KERNELSPECS["python"]}, extra=HUB, gateway_config=GATEWAY, db_url=new_database()
    )
    yield made
    made.close()


def test_a_rule_may_look_at_it(hub: RealHub) -> None:
    """Who has logged in is somebody; whom the Hub knows by name alone is nobody."""
    hub.browser("ada")[0].close()
    shown = {
        name: httpx.get(
            f"{hub.gateway_url}/api/identity",
            headers={"Authorization": f"token {hub.user_token(name)}"},
            timeout=60,
        )
        for name in ("ada", "bea")
    }
    assert "ada@EXAMPLE.TEST" in shown["ada"].text and shown["ada"].status_code == 200, shown["ada"].text
    assert "EXAMPLE.TEST" not in shown["bea"].text and "No rule says" in shown["bea"].text, shown["bea"].text
    assert "hunter2" not in shown["ada"].text + hub.log(size=10**6)


async def test_tickets_may_lie_in_it(hub: RealHub) -> None:
    """As `UserTgtCredential.auth_state_key` has them looked up, with the scope that its role must have."""
    hub.browser("ada")[0].close()
    hub.user_token("bea")
    people = HubPeople(HubAuth(api_token=hub.admin_token, api_url=f"{hub.url}/hub/api"))
    assert (await people.auth_state("ada"))["krb5_ccache"] == CCACHE
    assert await people.auth_state("bea") == {}
