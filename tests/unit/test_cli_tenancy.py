"""The commands for limits, usage, the audit trail and identities, against the REST interface."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hub_gateway.cli import subcommands
from hub_gateway.cli.quota import number, seconds
from hub_gateway.db.models import utcnow
from hub_gateway.quotas.types import Origin, Policy, SubjectKind
from tests.harness.tenancy import Audit, Identity, Quotas, Reports, Tokens
from tests.harness.web import AnsweringDatabase, WebServer
from tests.unit.test_cli import command


class Database(AnsweringDatabase):
    """Transactions of parts that need none."""

    async def read(self, fn: Callable[[Any], Any]) -> Any:
        return fn(None)

    write = read


@pytest.fixture
def quotas() -> Quotas:
    return Quotas({"all": Policy("all", SubjectKind.EVERYONE, hard=10, soft=8, version=1, note="kept", priority=3)})


@pytest.fixture
async def server(quotas: Quotas) -> AsyncIterator[WebServer]:
    parts = {"quotas": quotas, "identity": Identity(), "audit": Audit(), "reports": Reports()}
    async with WebServer(None, authenticator=Tokens(), db=Database(), **parts) as made:
        yield made


Run = Callable[..., Any]


@pytest.fixture
def run(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`await run("quota", "show", ...)`: exit code, standard output, standard error."""
    monkeypatch.setenv("HUB_GATEWAY_URL", server.url)

    def call(words: tuple[str, ...]) -> tuple[int, str, str]:
        module, _, name = subcommands[words[0]][0].rpartition(".")
        cls = getattr(importlib.import_module(module), name).subcommands[words[1]][0]
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                app = cls()
                app.initialize(list(words[2:]))
                app.start()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        return code, out.getvalue(), err.getvalue()

    async def made(*words: str, who: str = "admin") -> tuple[int, str, str]:
        monkeypatch.setenv("HUB_GATEWAY_TOKEN", f"{who}-token")
        return await asyncio.to_thread(call, words)

    return made


async def test_a_limit_is_set_shown_changed_and_deleted(run: Run, quotas: Quotas) -> None:
    given = ("--subject", "user:bob", "--resource=kernels", "--hard", "1", "--action=queue", "--queue-seconds=10min")
    code, out, err = await run("quota", "set", "bob-one", *given, "--note", "why not")
    assert (code, err) == (0, "") and out == "bob-one: set\n"
    made = quotas.kept["bob-one"]
    assert (made.subject, made.hard, made.queue_seconds, made.note) == ("bob", 1, 600, "why not")
    code, out, _ = await run("quota", "show")
    assert code == 0 and out.splitlines()[0].split()[:2] == ["policy", "whom"]
    assert any(line.split()[:2] == ["bob-one", "user:bob"] for line in out.splitlines())
    await run("quota", "set", "all", "--hard=12")
    changed = quotas.kept["all"]
    assert (changed.hard, changed.soft, changed.note, changed.priority) == (12, 8, "kept", 3), "the rest is as it was"
    await run("quota", "set", "all", "--soft=none", "--disabled")
    assert quotas.kept["all"].soft is None and not quotas.kept["all"].enabled
    await run("quota", "set", "all", "--hard=13")
    assert quotas.kept["all"].hard == 13 and not quotas.kept["all"].enabled, "it stays switched off"
    await run("quota", "set", "all", "--enabled")
    assert quotas.kept["all"].enabled and not quotas.kept["all"].delegated
    await run("quota", "set", "all", "--delegated")
    assert quotas.kept["all"].delegated
    await run("quota", "set", "all", "--not-delegated")
    assert not quotas.kept["all"].delegated
    shown = json.loads((await run("quota", "show", "bob-one", "--json"))[1])
    assert shown["hard"] == 1 and shown["version"] == 1
    assert (await run("quota", "delete", "bob-one"))[0] == 0 and "bob-one" not in quotas.kept
    code, _, err = await run("quota", "show", "bob-one")
    assert code == 1 and "There is no policy 'bob-one'" in err and "Traceback" not in err


async def test_refusals_are_the_gateways_own_sentence(run: Run, quotas: Quotas) -> None:
    code, out, err = await run("quota", "set", "x", "--subject=user:bob", "--hard=1", who="bob")
    assert code == 1 and out == "" and "custom:hub-gateway:quotas:" in err
    code, _, err = await run("quota", "set", "x", "--subject=user:bob", "--resource=memory", "--hard=4")
    assert code == 1 and "4G" in err
    code, _, err = await run("quota", "set", "x", "--subject=user:bob", "--queue-seconds=soon")
    assert code == 1 and "soon" in err
    code, _, err = await run("quota", "set", "x", "--subject=user:bob", "--weekly=[")
    assert code == 1 and "JSON" in err
    assert (await run("quota", "set"))[0] == 1
    assert set(quotas.kept) == {"all"}


async def test_a_dry_run_changes_nothing(run: Run, quotas: Quotas) -> None:
    code, out, _ = await run("quota", "set", "x", "--subject=everyone", "--hard=1", "--dry-run")
    assert code == 0 and "nothing was changed" in out and "x" not in quotas.kept


async def test_grants(run: Run, quotas: Quotas) -> None:
    assert (await run("quota", "grant", "bob", "--hard=3"))[0] == 1, "it needs an end"
    for name in ("grant-bob-gpu", "grant-bob-gpu-2"):
        code, out, err = await run("quota", "grant", "bob", "--resource=gpu", "--hard=3", "--until=2039-01-01")
        assert code == 0 and name in out, err
        made = quotas.kept[name]
        assert made.origin is Origin.GRANT and made.priority == 1000 and made.approver == "admin"


async def test_asking_and_answering(run: Run, quotas: Quotas) -> None:
    until = (utcnow() + timedelta(days=3)).strftime("%Y-%m-%d")
    code, out, err = await run("quota", "ask", "all", "--amount=20", f"--until={until}", "--reason=big", who="bob")
    assert (code, out) == (0, "request 1 is open\n"), err
    assert "big" in (await run("quota", "requests"))[1]
    code, out, _ = await run("quota", "answer", "1", "--grant", "--text=well then")
    assert (code, out) == (0, "request 1: granted\n")
    assert (await run("quota", "requests"))[1] == "No requests.\n"
    assert "well then" in (await run("quota", "requests", "--state=all"))[1]
    assert (await run("quota", "answer", "x"))[0] == 1


async def test_what_is_told_of_limits(run: Run, quotas: Quotas) -> None:
    code, out, _ = await run("quota", "limits", who="bob")
    assert code == 0 and "all" in out and "10" in out
    assert (await run("quota", "queue", who="bob"))[1] == "Nothing waits.\n"
    assert "user: bob" in (await run("quota", "explain", "bob"))[1]
    assert json.loads((await run("quota", "explain", "--json", who="bob"))[1])["user"] == "bob"
    quotas.sentence = "Closed until 18:00."
    assert "Closed until 18:00." in (await run("quota", "limits", who="bob"))[1]


async def test_files_of_policies(run: Run, quotas: Quotas, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    assert (await run("quota", "export"))[1] == "policies: []\n"
    file.write_text("policies: []\n")
    code, out, _ = await run("quota", "diff", str(file))
    assert (code, out) == (3, "+ x\n")
    file.write_text("")
    assert (await run("quota", "diff", str(file)))[0] == 0
    assert "nothing was changed" in (await run("quota", "apply", str(file), "--dry-run"))[1]
    assert (await run("quota", "import", str(file)))[0] == 0
    assert quotas.calls == [("apply", "admin", True, False), ("apply", "admin", False, True)]
    code, out, _ = await run("quota", "simulate", str(file), "--days=7")
    assert code == 0 and out.splitlines()[0] == "It would have refused 4." and "bob" in out
    code, _, err = await run("quota", "diff", str(tmp_path / "absent"))
    assert code == 1 and "absent" in err and "Traceback" not in err


async def test_usage(run: Run, server: WebServer) -> None:
    reports: Any = server.services.reports
    assert (await run("usage", "report", "--by=group", "--from=2030-01-01", "--to=2030-02-01"))[1] == "key  kernels\n"
    assert reports.asked[-1].by == "group"
    assert (await run("usage", "report", "--format=csv"))[1].splitlines()[1] == "'=1+1,2"
    assert json.loads((await run("usage", "report", "--json"))[1])["by"] == "user"
    assert "2030-01" in (await run("usage", "close", "2030-01"))[1]
    assert "0.5" in (await run("usage", "prices"))[1]
    assert "2" in (await run("usage", "prices", "--core-hour=0.1", '--gpu-models={"a100": 2}'))[1]
    code, out, _ = await run("usage", "correct", "7", "--seconds=-60", "--note=a mistake")
    assert (code, out) == (0, "entry 7: corrected by -60 s\n")
    code, out, _ = await run("usage", "correct", "7", "--cost-center=4711", "--note=the Hub was away")
    assert (code, out) == (0, "entry 7: corrected by 0 s, billed to 4711\n")
    assert [entry[0] for entry in reports.written] == ["close", "prices", "correct", "correct"]
    assert (await run("usage", "close", "2030-01", who="bob"))[0] == 1


async def test_audit_identity_and_maintenance(run: Run, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    audit: Any = server.services.audit
    audit.append(None, actor="\x1b[31mbob", action="login", subject="bob", outcome="ok", detail={"a": 1})
    code, out, _ = await run("audit", "list", "--limit=5")
    assert code == 0 and "login" in out and "\x1b" not in out, "names cannot steer a terminal"
    assert (await run("audit", "verify"))[:2] == (0, f"The audit trail is whole.\nHash of the last line: {'0' * 64}\n")
    broken = {"ok": False, "entries": 1, "first_bad": 1, "sentence": "Line 1 was changed.", "head": "0" * 64}
    monkeypatch.setattr(audit, "verify", lambda tx: broken)
    assert (await run("audit", "verify"))[:2] == (1, f"Line 1 was changed.\nHash of the last line: {'0' * 64}\n")
    assert "runs as bob" in (await run("identity", "explain", "bob"))[1]
    assert (await run("identity", "release", "bob"))[:2] == (0, "bob: released\n")
    assert (await run("identity", "release", "zoe"))[0] == 1
    assert (await run("maintenance", "on", "Closed until 18:00."))[1] == "on: Closed until 18:00.\n"
    assert (await run("maintenance", "show", who="bob"))[1] == "on: Closed until 18:00.\n"
    assert (await run("maintenance", "off"))[1].startswith("off")


def test_amounts_and_durations() -> None:
    assert [number(text) for text in ("4", "0.5", "4G", "none")] == [4, 0.5, "4G", None]

    def fail(message: str, hint: str) -> None:
        raise ValueError(message)

    assert [seconds(text, fail) for text in ("90", "30min", "12h", "7d", "none")] == [90, 1800, 43200, 604800, None]
    for wrong in ("", "1y", "-1", "h", "1.5h", "٣"):
        with pytest.raises(ValueError, match="duration"):
            seconds(wrong, fail)


def test_the_commands_are_there() -> None:
    done = command("--help")
    for name in ("quota", "usage", "audit", "identity", "maintenance"):
        assert f"\n{name}\n" in done.stdout
    assert command("quota").returncode == 2
