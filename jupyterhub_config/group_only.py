"""Only some groups have the gateway; everybody else keeps kernels in their own server.

Load it after managed.py or external.py:

    load_subconfig("/etc/jupyterhub/hub_gateway/managed.py")
    load_subconfig("/etc/jupyterhub/hub_gateway/group_only.py")

Taking the permission away is not enough: a server whose JUPYTER_GATEWAY_URL names a gateway that refuses it has no
kernels at all. So the environment is taken away too, from whoever is in none of the groups.
"""

c = get_config()

NAME = "hub-gateway"
GROUPS = {"analysts", "gateway-admins"}

# Whoever is not in one of these groups may not use it ...
c.JupyterHub.extra_user_scopes = set()
c.JupyterHub.load_roles.append(
    {
        "name": "hub-gateway-user",
        "groups": sorted(GROUPS),
        "scopes": [f"access:services!service={NAME}"],
    }
)


# ... and gets a server that does not look for it.
def gateway_for_members(spawner):
    """Take the gateway out of the server's settings for users outside of the groups."""
    configured = spawner.config.Spawner  # not the spawner's own values: its user may join or leave between two starts
    member = bool(GROUPS & {group.name for group in spawner.user.groups})
    spawner.environment = {
        name: value
        for name, value in configured.environment.items()
        if member or not name.startswith(("JUPYTER_GATEWAY_", "KERNEL_"))
    }
    spawner.args = [word for word in configured.args if member or "kernel_websocket_connection_class" not in word]


c.Spawner.pre_spawn_hook = gateway_for_members
