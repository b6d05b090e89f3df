"""A kernel's environment is made from an allow-list."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_gateway.errors import BadRequest, Forbidden, GatewayError, PayloadTooLarge
from hub_gateway.kernels.environment import MAX_VALUE, client_environment, kernel_environment


def from_client(env: object, allowed: tuple[str, ...] = ()) -> dict[str, str]:
    return client_environment(env, allowed=allowed, username="alice")


def test_only_kernel_names_and_allowed_ones_pass() -> None:
    given_ = {"KERNEL_X": "1", "AWS_PROFILE": "a", "PATH": "/evil", "kernel_y": "2"}
    assert from_client(given_) == {"KERNEL_X": "1"}
    assert from_client(given_, ("AWS_PROFILE",)) == {"KERNEL_X": "1", "AWS_PROFILE": "a"}
    assert from_client(given_, ("*",)) == given_


def test_identity_is_the_tokens() -> None:
    assert from_client({"KERNEL_USERNAME": "alice"})
    assert from_client({"KERNEL_USERNAME": ""})
    with pytest.raises(Forbidden, match="'bob'"):
        from_client({"KERNEL_USERNAME": "bob"})
    env = kernel_environment({"KERNEL_USERNAME": "root"}, {}, kernel_id="k", username="alice")
    assert env == {"KERNEL_ID": "k", "KERNEL_USERNAME": "alice", "KERNEL_GATEWAY": "1"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ([], "object"),
        ("x", "object"),
        (None, "object"),
        ({"KERNEL_X": 1}, "string"),
        ({"KERNEL_X": None}, "string"),
        ({"A=B": "1"}, "not a name"),
        ({"": "1"}, "not a name"),
        ({"KERNEL_X\n": "1"}, "not a name"),
        ({"KERNEL_X": "a\0b"}, "control"),
        ({"KERNEL_X": "\x1b[2J"}, "control"),
        ({"KERNEL_X": "a\rb"}, "control"),
        ({"KERNEL_X": "\ud800"}, "Unicode"),
    ],
)
def test_bad_environments_are_refused_with_a_sentence(env: object, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        from_client(env)


def test_limits() -> None:
    assert from_client({"KERNEL_X": "x" * MAX_VALUE})
    with pytest.raises(PayloadTooLarge, match="KERNEL_X"):
        from_client({"KERNEL_X": "x" * (MAX_VALUE + 1)})
    with pytest.raises(PayloadTooLarge, match="256 KiB"):
        from_client({f"KERNEL_{n}": "x" * MAX_VALUE for n in range(5)})


def test_the_kernelspec_is_filled_from_itself_and_the_client_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_GATEWAY", "hunter2")
    spec = {
        "SPARK_HOME": "/opt/spark",
        "OPTS": "--home ${SPARK_HOME} --name ${KERNEL_ID} --user ${KERNEL_USERNAME} $KERNEL_QUEUE",
        "LEAK": "${SECRET_OF_THE_GATEWAY} ${PATH} ${KERNEL_ID:-none}",
        "NUMBER": 3,
    }
    env = kernel_environment(spec, {"KERNEL_QUEUE": "research"}, kernel_id="k", username="alice")
    assert env["OPTS"] == "--home /opt/spark --name k --user alice research"
    assert env["LEAK"] == "${SECRET_OF_THE_GATEWAY} ${PATH} ${KERNEL_ID:-none}"
    assert env["NUMBER"] == "3"
    assert not set(env) & set(os.environ)


def test_the_client_overrides_the_kernelspec_but_not_the_gateway() -> None:
    client = {"KERNEL_QUEUE": "mine", "KERNEL_GATEWAY": "0", "KERNEL_ID": "other"}
    env = kernel_environment({"KERNEL_QUEUE": "default"}, client, kernel_id="k", username="alice")
    assert env == {"KERNEL_QUEUE": "mine", "KERNEL_GATEWAY": "1", "KERNEL_ID": "k", "KERNEL_USERNAME": "alice"}


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=50) | st.integers() | st.none(), max_size=5))
def test_whatever_comes_is_refused_or_safe(env: dict[str, object]) -> None:
    try:
        kept = from_client(env, ("*",))
    except GatewayError:
        return
    for name, value in kept.items():
        assert name.isidentifier() and name.isascii()
        value.encode()
        assert "\0" not in value
