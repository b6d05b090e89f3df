"""A JupyterHub (6 or newer) that starts and stops the gateway itself, as a managed service.

Copy it into your jupyterhub_config.py, or load it from there:

    load_subconfig("/etc/jupyterhub/hub_gateway/managed.py")

and change the three addresses. `make demo` runs this very file (see demo.py).
"""

import os
import sys
from pathlib import Path

c = get_config()

# -- what differs from site to site -------------------------------------------------------------------------

# By which address single-user servers reach the Hub's proxy: c.JupyterHub.bind_url, or what stands before it.
# Keep "localhost" out of it if servers run in containers or on other machines.
PUBLIC_URL = os.environ.get("HUB_GATEWAY_PUBLIC_URL", "http://127.0.0.1:8000/")
# Where the gateway listens. Only the Hub's proxy needs to reach it, and the agents of kernels on other machines.
LISTEN_URL = os.environ.get("HUB_GATEWAY_LISTEN_URL", "http://127.0.0.1:8899")
# The gateway's own configuration.
GATEWAY_CONFIG = os.environ.get("HUB_GATEWAY_CONFIG", "/etc/hub-gateway/jupyter_hubgateway_config.py")

# The service's name is part of every address. Lower case, and without the letters "http": jupyter_server's
# client makes the websocket address by lower-casing the whole URL and replacing each "http" in it.
NAME = "hub-gateway"
URL = f"{PUBLIC_URL.rstrip('/')}/services/{NAME}"

# What may be given to administrators and to leads of groups, see that file.
load_subconfig("scopes.py", path=str(Path(__file__).resolve().parent))

# -- the service ---------------------------------------------------------------------------------------------

c.JupyterHub.services = [
    {
        "name": NAME,
        "url": LISTEN_URL,
        "command": [sys.executable, "-m", "hub_gateway", f"--config={GATEWAY_CONFIG}"],
        # It is part of the deployment: no page that asks each user whether it may know their name.
        "oauth_no_confirm": True,
        # The most that a *browser* login may carry. Without this an administrator's browser has none of the
        # custom scopes, although their API token has them.
        "oauth_client_allowed_scopes": sorted(c.JupyterHub.custom_scopes),
        # How long (seconds) the Hub waits for the gateway's first answer.
        "timeout": 30,
    }
]

# The Hub ends and starts a managed service with itself. Kernels outlive that. What must not happen meanwhile is
# a 404 for the gateway's address: jupyter_server forgets a kernel then. So the proxy runs on its own, and keeps its
# routes while the Hub is away: start `configurable-http-proxy` as a service of its own, with CONFIGPROXY_AUTH_TOKEN
# in both environments (https://jupyterhub.readthedocs.io/en/stable/howto/separate-proxy.html).
c.ConfigurableHTTPProxy.should_start = False
# A proxy that is restarted has lost its routes. The Hub looks for that as often (seconds) as it collects activity;
# jupyter_server gives a lost connection up after 35 seconds, and the default is 300.
c.JupyterHub.last_activity_interval = 10

# -- who may do what -----------------------------------------------------------------------------------------

# Everybody may use the gateway. (For some only: group_only.py.)
c.JupyterHub.extra_user_scopes = {f"access:services!service={NAME}"}

c.JupyterHub.load_roles = [
    {
        # What the gateway may do at the Hub: say that a user's kernels are at work, so that the idle culler does not
        # stop the server of somebody whose computation runs; and know who is in which group, and a group's
        # properties (its cost centre), for the pages of administrators.
        "name": "hub-gateway",
        "services": [NAME],
        "scopes": [
            "users:activity",
            "list:users",
            "read:users:name",
            "read:users:groups",
            "read:users:activity",
            "list:groups",
            "read:groups",
        ],
    },
    {
        # Administrators of the gateway: limits, use and bills of everybody. Being an administrator of the Hub is
        # not enough.
        "name": "hub-gateway-admin",
        "groups": ["gateway-admins"],
        "scopes": ["custom:hub-gateway:admin", f"access:services!service={NAME}"],
    },
    # The lead of a group sees what belongs to that group, and sets limits within those of the administrators:
    # {
    #     "name": "analysts-lead",
    #     "users": ["carol"],
    #     "scopes": [
    #         "custom:hub-gateway:kernels:stop!group=analysts",
    #         "custom:hub-gateway:quotas:write!group=analysts",
    #         "custom:hub-gateway:usage:read!group=analysts",
    #     ],
    # },
]

# -- single-user servers -------------------------------------------------------------------------------------

# A server's own token opens the gateway for it. It holds what stands here *and* what its user may: a user without
# access to the gateway gets a server without it. access:servers!server tells the gateway which server is asking.
c.Spawner.server_token_scopes = [
    "users:activity!user",
    "access:servers!server",
    f"access:services!service={NAME}",
]

c.Spawner.environment = {
    "JUPYTER_GATEWAY_URL": URL,
    # Never left to the default, which is the address above in lower case with each "http" replaced.
    "JUPYTER_GATEWAY_WS_URL": "ws" + URL[len("http") :],
    # A callable is called at each start, when the server's token is made already.
    "JUPYTER_GATEWAY_AUTH_TOKEN": lambda spawner: spawner.api_token,
    "JUPYTER_GATEWAY_AUTH_SCHEME": "token",
    # The name of a kernel's notebook, for the gateway's pages and messages. (It is told no other variable of a server,
    # except those that begin with KERNEL_.)
    "JUPYTER_GATEWAY_ALLOWED_ENVS": "JPY_SESSION_NAME",
    # For how long a request to the gateway may take, and a kernel to start. jupyter_server sends the second one on.
    "JUPYTER_GATEWAY_REQUEST_TIMEOUT": "122",
    "KERNEL_LAUNCH_TIMEOUT": "120",
}

# Better than jupyter_server's own connection to a gateway, and not required: binary messages (widgets, pictures)
# without detours, no output lost or doubled when the gateway is restarted, and no 40 ms in every round trip. It
# needs the package hub-gateway in the environment of the single-user servers.
c.Spawner.args = [
    "--ServerApp.kernel_websocket_connection_class=hub_gateway.companion.NumberedGatewayConnection",
]
