"""What `make demo` runs: managed.py, with everything that a real site has to decide decided for one machine.

Not for anything but a demonstration: everybody shares one password, servers and kernels are all
processes of the same unix user, and it listens on the loopback interface only.
"""

import json
import os
import sys
from pathlib import Path

c = get_config()

with open(os.environ["HUB_GATEWAY_DEMO"]) as file:
    demo = json.load(file)

load_subconfig("managed.py", path=str(Path(__file__).resolve().parent))

c.JupyterHub.bind_url = demo["public_url"]
c.JupyterHub.hub_bind_url = demo["hub_url"]
c.ConfigurableHTTPProxy.api_url = demo["proxy_api_url"]
c.JupyterHub.db_url = f"sqlite:///{demo['directory']}/jupyterhub.sqlite"
c.JupyterHub.cookie_secret_file = f"{demo['directory']}/jupyterhub_cookie_secret"
c.JupyterHub.template_vars = {"announcement_login": "A demonstration: the passwords are in the terminal that runs it."}

# One password for alice and bob, and another one for the administrator: they are printed by the demo.
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = demo["user_password"]
c.SharedPasswordAuthenticator.admin_password = demo["admin_password"]
c.Authenticator.allowed_users = {"alice", "bob"}
c.Authenticator.admin_users = {"admin"}
c.JupyterHub.load_groups = {
    "gateway-admins": {"users": ["admin"]},
    "analysts": {"users": ["alice", "bob"], "properties": {"cost_center": "4711"}},
}

# Servers as processes of whoever runs the demo, with a home of their own each.
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = f"{demo['directory']}/homes/{{username}}"
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.default_url = "/lab"
c.Spawner.http_timeout = 120
c.Spawner.start_timeout = 120
if os.geteuid() == 0:
    c.Spawner.args.append("--allow-root")
