"""A JupyterHub (6 or newer) with a gateway that something else starts: systemd, Kubernetes, another machine.

Everything is as in managed.py, except for the service: it has no `command`, and a token that both sides know.

On the gateway's side the environment says what the Hub would have said to a managed service:

    JUPYTERHUB_SERVICE_NAME=hub-gateway
    JUPYTERHUB_SERVICE_PREFIX=/services/hub-gateway/          # with the Hub's base_url before it
    JUPYTERHUB_SERVICE_URL=http://0.0.0.0:8899                # where the gateway listens
    JUPYTERHUB_API_URL=http://hub.example.org:8081/hub/api    # where it reaches the Hub
    JUPYTERHUB_API_TOKEN=...                                  # the token below, from a file that only it can read
    JUPYTERHUB_CLIENT_ID=service-hub-gateway
    JUPYTERHUB_BASE_URL=/
    jupyter hubgateway --config=/etc/hub-gateway/jupyter_hubgateway_config.py

`jupyter hubgateway check`, in that environment, says what is wrong with it.
"""

import os
from pathlib import Path

c = get_config()

# The address as the Hub's proxy reaches it.
GATEWAY_URL = os.environ.get("HUB_GATEWAY_LISTEN_URL", "http://gateway.example.org:8899")
# `openssl rand -hex 32`, in a file with mode 0600.
TOKEN_FILE = os.environ.get("HUB_GATEWAY_TOKEN_FILE", "/etc/jupyterhub/hub-gateway.token")

load_subconfig("managed.py", path=str(Path(__file__).resolve().parent))

api_token = Path(TOKEN_FILE).read_text().strip()

c.JupyterHub.services = [
    {
        "name": "hub-gateway",
        "url": GATEWAY_URL,
        "api_token": api_token,
        "oauth_no_confirm": True,
        "oauth_client_allowed_scopes": sorted(c.JupyterHub.custom_scopes),
        # Only for a managed service can the Hub know that it is one to wait for.
    }
]
