"""The scopes by which the Hub says who may administer the gateway; loaded by managed.py and external.py.

Give them to people and groups in `c.JupyterHub.load_roles`. Each may be limited to some people: with
`custom:hub-gateway:quotas:write!group=analysts` the lead of a group sets the limits of that group, and of nobody else.
This file is made from hub_gateway/auth/scopes.py, and a test holds it equal to that.
"""

c = get_config()

c.JupyterHub.custom_scopes = {
    "custom:hub-gateway:admin": {
        "description": "Everything that an administrator of the gateway does",
        "subscopes": [
            "custom:hub-gateway:kernels:read",
            "custom:hub-gateway:kernels:stop",
            "custom:hub-gateway:quotas:read",
            "custom:hub-gateway:quotas:write",
            "custom:hub-gateway:usage:read",
            "custom:hub-gateway:audit:read",
            "custom:hub-gateway:identity:read",
            "custom:hub-gateway:identity:write",
            "custom:hub-gateway:ledger:write",
            "custom:hub-gateway:maintenance:write",
        ],
    },
    "custom:hub-gateway:kernels:read": {
        "description": "See everybody's remote kernels",
    },
    "custom:hub-gateway:kernels:stop": {
        "description": "Stop everybody's remote kernels",
        "subscopes": [
            "custom:hub-gateway:kernels:read",
        ],
    },
    "custom:hub-gateway:quotas:read": {
        "description": "See policies, the queue, requests for more, and what everybody holds of their limits",
    },
    "custom:hub-gateway:quotas:write": {
        "description": "Set policies, answer requests for more and give temporary grants",
        "subscopes": [
            "custom:hub-gateway:quotas:read",
        ],
    },
    "custom:hub-gateway:usage:read": {
        "description": "See reports of what everybody used and what it cost",
    },
    "custom:hub-gateway:audit:read": {
        "description": "Read the audit trail, and check that it is whole",
    },
    "custom:hub-gateway:identity:read": {
        "description": "See as which principal and unix user everybody's kernels run, and why",
    },
    "custom:hub-gateway:identity:write": {
        "description": "Release a principal or unix user from the user who has it",
        "subscopes": [
            "custom:hub-gateway:identity:read",
        ],
    },
    "custom:hub-gateway:ledger:write": {
        "description": "Set prices, close months and correct the ledger",
        "subscopes": [
            "custom:hub-gateway:usage:read",
        ],
    },
    "custom:hub-gateway:maintenance:write": {
        "description": "Turn maintenance mode on and off",
    },
}
