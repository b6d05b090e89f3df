"""What `make engines` says works when it is typed, and is gone afterwards."""

from __future__ import annotations

import os
import subprocess

import psutil
import pytest

from tests.engines import hand, missing
from tests.engines.ssh import LOGIN
from tests.harness.waiting import until


def test_what_is_said_works_until_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("an sshd that lets several users in takes root")
    for engine in ("ssh", "kerberos", "kerberos-ldap"):
        if reason := missing(engine):
            pytest.skip(reason)
    before = {one.pid for one in psutil.process_iter()}
    answers: list[str] = []

    def typed() -> None:
        for line in capsys.readouterr().out.splitlines():
            name, _, command = line.partition(": ")
            if command.startswith("ssh "):
                command += " whoami"
            elif name not in ("kerberos", "s4u") or "kinit" not in command:
                continue
            else:
                # As whoever types it would, into a cache of their own.
                command = f"KRB5CCNAME=MEMORY: {command} && echo tickets"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, (command, done.stderr)
            answers.append(done.stdout.strip())

    assert hand.main(["ssh", "kerberos", "s4u"], forever=typed) == 0
    assert answers == [LOGIN, LOGIN, LOGIN, "tickets", "tickets"]
    engines = {"sshd", "krb5kdc", "slapd"}

    def left() -> list[int]:
        return [
            one.pid for one in psutil.process_iter(["name"]) if one.pid not in before and one.info["name"] in engines
        ]

    until(lambda: not left(), "the engines are gone")
    with pytest.raises(SystemExit):
        hand.main(["no-such-engine"])
    assert "ssh, kerberos, s4u, docker, swarm" in capsys.readouterr().err
