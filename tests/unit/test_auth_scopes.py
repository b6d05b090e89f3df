"""Scopes as data, and what they give whom."""

from __future__ import annotations

import pytest

from hub_gateway.auth.base import Caller
from hub_gateway.auth.scopes import (
    ADMIN,
    AUDIT_READ,
    KERNELS_READ,
    KERNELS_STOP,
    QUOTAS_READ,
    QUOTAS_WRITE,
    SCOPES,
    USAGE_READ,
    client_scopes,
    custom_scopes,
    powers,
    require,
    scope_table,
)
from hub_gateway.errors import Forbidden, NotFound


def caller(*scopes: str, name: str = "lea", **more: object) -> Caller:
    return Caller(name, scopes=frozenset(scopes), **more)  # type: ignore[arg-type]


def test_the_hubs_rules_for_custom_scopes_are_kept() -> None:
    found = custom_scopes()
    assert list(found) == client_scopes() == [scope.name for scope in SCOPES]
    for name, definition in found.items():
        assert name.startswith("custom:") and definition["description"]
        assert all(sub in found for sub in definition.get("subscopes", ()))
    assert set(found[ADMIN]["subscopes"]) == set(found) - {ADMIN}


def test_the_table_for_the_documentation_names_all() -> None:
    lines = scope_table().splitlines()
    assert len(lines) == len(SCOPES) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert all(f"`{scope.name}`" in scope_table() for scope in SCOPES)


@pytest.mark.parametrize(
    ("held", "scope", "everything", "groups", "users"),
    [
        ([], KERNELS_READ, False, [], []),
        (["custom:hub-gateway:unknown", "read:users"], KERNELS_READ, False, [], []),
        ([KERNELS_READ], KERNELS_READ, True, [], []),
        ([KERNELS_READ], KERNELS_STOP, False, [], []),
        ([KERNELS_STOP], KERNELS_READ, True, [], []),
        ([ADMIN], QUOTAS_WRITE, True, [], []),
        ([ADMIN], AUDIT_READ, True, [], []),
        ([f"{ADMIN}!group=analysts"], QUOTAS_READ, False, ["analysts"], []),
        ([f"{ADMIN}!group=analysts"], AUDIT_READ, False, [], []),
        ([f"{QUOTAS_WRITE}!group=analysts", f"{QUOTAS_WRITE}!group=b", f"{QUOTAS_READ}!user=bob"], QUOTAS_READ,
         False, ["analysts", "b"], ["bob"]),
        ([f"{QUOTAS_WRITE}!group=analysts", f"{QUOTAS_READ}!user=bob"], QUOTAS_WRITE, False, ["analysts"], []),
        ([f"{KERNELS_READ}!user"], KERNELS_READ, False, [], ["lea"]),
        ([f"{KERNELS_READ}!user="], KERNELS_READ, False, [], []),
        ([f"{KERNELS_READ}!group="], KERNELS_READ, False, [], []),
        ([f"{KERNELS_READ}!group"], KERNELS_READ, False, [], []),
        ([f"{KERNELS_READ}!server=lea/"], KERNELS_READ, False, [], []),
        ([f"{KERNELS_READ}!"], KERNELS_READ, False, [], []),
        ([f"{KERNELS_READ}!group=a=b"], KERNELS_READ, False, ["a=b"], []),
        ([KERNELS_READ.upper()], KERNELS_READ, False, [], []),
        ([KERNELS_READ, f"{KERNELS_READ}!group=a"], KERNELS_READ, True, ["a"], []),
    ],
)  # fmt: skip
def test_powers(held: list[str], scope: str, everything: bool, groups: list[str], users: list[str]) -> None:
    power = powers(caller(*held), scope)
    assert (power.everything, power.groups, power.users) == (everything, set(groups), set(users))
    assert bool(power) is bool(everything or groups or users)


def test_an_admin_of_the_hub_has_no_powers_by_that_alone() -> None:
    assert not powers(caller(admin=True), KERNELS_READ)
    service = caller(f"{KERNELS_READ}!user", kind="service")
    assert not powers(service, KERNELS_READ), "a service is no user of the same name"


def test_what_is_out_of_reach_is_like_what_does_not_exist() -> None:
    lead = caller(f"{USAGE_READ}!group=analysts")
    require(lead, USAGE_READ, user="bob", groups=["analysts", "others"])
    require(lead, USAGE_READ, group="analysts")
    with pytest.raises(NotFound, match="nothing here"):
        require(lead, USAGE_READ, user="bob", groups=["others"], missing="There is nothing here.")
    with pytest.raises(NotFound):
        require(lead, USAGE_READ, group="others")
    with pytest.raises(NotFound):
        require(lead, USAGE_READ, user="analysts")
    with pytest.raises(Forbidden, match=USAGE_READ):
        require(caller(), USAGE_READ, user="bob", groups=["analysts"])
