"""Which cases are put to the conformance suite, and to how much of it."""

from __future__ import annotations

import os

import pytest

from tests.contract.cases import LOCAL, OTHER_USER, SUDO, ProxyCase
from tests.contract.docker_case import DOCKER, SWARM
from tests.contract.kerberos_case import SSH_K5LOGIN, SSH_S4U, SSH_TGT
from tests.contract.ssh_case import SSH_OWN_USER, SSH_SUDO

__all__ = ["CASES", "case_named", "marks_of", "params"]

CASES = (LOCAL, OTHER_USER, SSH_SUDO, SSH_K5LOGIN, SSH_S4U, SSH_TGT, DOCKER, SWARM)
PARTLY = (SUDO, SSH_OWN_USER)
"""Differ from others in one thing, so they are put to a part of the suite only."""
ONCE = pytest.mark.skip(reason="not applicable: what a cluster does is put to the test once, on SQLite")


def case_named(name: str) -> ProxyCase:
    """The case of that name."""
    return next(case for case in (*CASES, *PARTLY) if case.name == name)


def marks_of(*engines: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that drives these engines."""
    remote = {"docker", "ssh"} & set(engines)
    again = [ONCE] if remote and os.environ.get("HUB_GATEWAY_TEST_DB") == "postgresql" else []
    return [pytest.mark.needs(*engines), *again]


def params(*, partly: bool = False) -> list[object]:
    """The cases, as parameters that are skipped where their engines are missing; `partly` is for all of them."""
    cases = (*CASES, *PARTLY) if partly else CASES
    return [pytest.param(case.name, marks=marks_of(*case.needs), id=case.name) for case in cases]
