"""Stand-alone authentication by a file of hashed tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hub_gateway.auth.tokenfile import TokenFile
from hub_gateway.errors import BadRequest
from tests.harness.waiting import eventually


def entry(token: str, user: str, **more: Any) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(token.encode()).hexdigest(), "user": user, **more}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"tokens": list(entries)}))
    path.chmod(0o600)
    return path


async def test_tokens_stand_for_users(tmp_path: Path) -> None:
    file = write(
        tmp_path / "tokens.json",
        entry("a", "alice", groups=["x"], scopes=["s"]),
        entry("b", "bob", admin=True, expires="2100-01-01T00:00:00Z"),
        entry("c", "carol", expires="2020-01-01"),
    )
    tokens = TokenFile(str(file))
    await tokens.start()
    alice, bob = await tokens.authenticate("a"), await tokens.authenticate("b")
    assert alice is not None and bob is not None
    assert (alice.name, alice.groups, alice.scopes, alice.admin) == ("alice", {"x"}, {"s"}, False)
    assert bob.admin
    assert await tokens.authenticate("c") is None, "expired"
    assert await tokens.authenticate("d") is None
    assert await tokens.authenticate(entry("a", "")["sha256"]) is None, "the file's contents open nothing"


async def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens.json", entry("a", "alice"))
    tokens = TokenFile(str(file), reload_seconds=0.0)
    await tokens.start()
    assert await tokens.authenticate("a")
    file.write_text("tokens: [broken")
    assert await tokens.authenticate("a")
    write(file, entry("bb", "bob"))

    async def changed() -> bool:
        return await tokens.authenticate("bb") is not None and await tokens.authenticate("a") is None

    await eventually(changed, "the new file")
    file.unlink()
    assert await tokens.authenticate("bb")


async def test_yaml_is_read_and_openness_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(f"tokens:\n- sha256: {entry('a', 'x')['sha256']}\n  user: alice\n  expires: 2100-01-01T00:00:00Z\n")
    file.chmod(0o644)
    tokens = TokenFile(str(file))
    tokens.log = logging.getLogger("tokens")
    await tokens.start()
    assert await tokens.authenticate("a")
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "`tokens`"),
        ("[]", "`tokens`"),
        ("{", "neither YAML nor JSON"),
        ('{"tokens": [{"user": "a"}]}', "Entry 1"),
        ('{"tokens": [7]}', "Entry 1"),
        (json.dumps({"tokens": [entry("a", "alice"), entry("b", "a/b")]}), "Entry 2"),
        (json.dumps({"tokens": [entry("a", "alice", groups="x")]}), "`groups`"),
        (json.dumps({"tokens": [entry("a", "alice", expires="soon")]}), "`expires`"),
    ],
)
async def test_a_file_that_is_wrong_at_the_start_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(text)
    with pytest.raises(BadRequest, match=said):
        await TokenFile(str(file)).start()


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"absent\.json"):
        await TokenFile(str(tmp_path / "absent.json")).start()
