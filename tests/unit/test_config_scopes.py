"""jupyterhub_config/scopes.py says what auth/scopes.py says, for a Hub that has no hub_gateway to import."""

from __future__ import annotations

from traitlets.config import PyFileConfigLoader

from hub_gateway._paths import jupyterhub_config_dir
from hub_gateway.auth.scopes import SERVICE_SCOPES, client_scopes, custom_scopes


def test_the_recipe_defines_the_scopes() -> None:
    found = PyFileConfigLoader("managed.py", path=str(jupyterhub_config_dir())).load_config()
    assert found.JupyterHub.custom_scopes == custom_scopes()
    assert set(found.JupyterHub.services[0]["oauth_client_allowed_scopes"]) == set(client_scopes())
    roles = {role["name"]: role for role in found.JupyterHub.load_roles}
    assert set(roles["hub-gateway"]["scopes"]) == set(SERVICE_SCOPES)
