"""Profiles: one kernelspec, several sizes, each an entry of its own for those whose groups may have it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.errors import BadRequest, Forbidden, LaunchRefused, NotFound
from hub_gateway.kernels.profiles import KEYS, Entry, entries_of
from hub_gateway.kernels.resources import bounds_of, wished
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.kernels.types import CreateKernel, KernelStatus, Resources
from hub_gateway.quotas.policies import PolicyStore
from hub_gateway.quotas.service import QuotaService
from hub_gateway.quotas.types import Counts, ObjectKind, Policy, Resource, SubjectKind
from tests.contract.mini import MiniGateway, Setup
from tests.harness.web import WebServer

GIB = 2**30
LARGE = {"name": "large", "display_name": "Sleep, large", "resources": {"cpu": 8}, "groups": ["analysts"]}
SPEC: dict[str, Any] = {
    "argv": ["/bin/sleep", "600", "{connection_file}"],
    "display_name": "Sleep",
    "language": "none",
    "env": {"SIZE": "usual", "KEPT": "yes"},
    "metadata": {
        "process_proxy": {"name": "local", "config": {"image_name": "small:1", "network": "kernels"}},
        "hub_gateway": {
            "resources": {"cpu": 1, "memory": "2G"},
            "resources_max": {"cpu": 4, "memory": "16G"},
            "cull_idle_timeout": 600,
            "profiles": [
                LARGE,
                {"name": "other", "image": "other:2", "env": {"SIZE": "other"}, "config": {"network": "else"}},
                {"name": "odd", "resources": {"cpu": "many"}},
                {"name": "typo", "resorces": {"cpu": 2}},
                {"display_name": "no name"},
            ],
        },
    },
}
OFFERED = {"sleep", "sleep--large", "sleep--other"}


class Grouped(Authenticator):
    """A token `alice-token` is alice's; alice is an analyst."""

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        name = token.removesuffix("-token")
        groups = frozenset({"analysts"}) if name == "alice" else frozenset[str]()
        return Caller(name, groups=groups) if name != token else None


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def write(state_dir: Path, spec: Mapping[str, Any], name: str = "sleep") -> Path:
    folder = state_dir / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    return folder


def setup_of(state_dir: Path, url: str | None) -> Setup:
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    return Setup(str(state_dir), url or f"sqlite:///{state_dir}/g.sqlite", (str(state_dir / "kernels"),), config)


@pytest.fixture
async def gateway(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[MiniGateway]:
    (write(state_dir, SPEC) / "logo-64x64.png").write_bytes(b"png")
    async with MiniGateway(setup_of(state_dir, db_url())) as made:
        yield made
        local = made.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(made.gateway_id)))


@pytest.fixture
async def server(gateway: MiniGateway) -> AsyncIterator[WebServer]:
    quotas = QuotaService(
        db=gateway.db,
        admitter=gateway.service.store.admitter,
        specs=gateway.service.specs,
        proxies=gateway.proxies,
        half_life=86400.0,
    )
    async with WebServer(gateway.service, db=gateway.db, authenticator=Grouped(), quotas=quotas) as made:
        yield made


@pytest.fixture
async def alice(server: WebServer) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client("alice") as client:
        yield client


@pytest.fixture
async def bob(server: WebServer) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client("bob") as client:
        yield client


async def limit(gateway: MiniGateway, policy: Policy) -> None:
    await gateway.db.write(lambda tx: PolicyStore().put(tx, policy, "admin"))


async def names(client: httpx.AsyncClient) -> set[str]:
    return set((await client.get("/api/kernelspecs")).json()["kernelspecs"])


async def test_each_is_offered_what_their_groups_may_have(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    assert await names(alice) == OFFERED
    assert await names(bob) == OFFERED - {"sleep--large"}
    large = (await alice.get("/api/kernelspecs/sleep--large")).json()
    assert large["name"] == "sleep--large" and large["spec"]["display_name"] == "Sleep, large"
    other = (await bob.get("/api/kernelspecs/sleep--other")).json()["spec"]
    assert other["display_name"] == "Sleep (other)" and other["env"] == {"SIZE": "other", "KEPT": "yes"}
    assert other["metadata"]["process_proxy"]["config"] == {"image_name": "other:2", "network": "else"}
    text = (await bob.get("/api/kernelspecs")).text
    assert "analysts" not in text and "large" not in text, "who gets what is nobody's business"
    file, none = await bob.get("/kernelspecs/sleep/kernel.json"), await bob.get("/kernelspecs/sleep/none.json")
    assert file.status_code == none.status_code == 404
    assert file.json()["message"].replace("kernel.json", "none.json") == none.json()["message"]


async def test_a_profile_that_one_may_not_have_is_unknown(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    """Word for word, whatever is asked."""
    for path in ("/api/kernelspecs/{}", "/kernelspecs/{}/logo-64x64.png", "/api/quota/explain?kernelspec={}"):
        found, none = await bob.get(path.format("sleep--large")), await bob.get(path.format("sleep--never"))
        assert found.status_code == none.status_code == 404, path
        assert found.json()["message"].replace("large", "never") == none.json()["message"]
        assert (await alice.get(path.format("sleep--large"))).status_code == 200
    found = await bob.post("/api/kernels", json={"name": "sleep--large"})
    none = await bob.post("/api/kernels", json={"name": "sleep--never"})
    assert found.status_code == none.status_code == 404
    assert found.json()["message"].replace("large", "never") == none.json()["message"]
    assert "sleep--other" in found.json()["message"]


async def test_its_files_are_the_kernelspecs(alice: httpx.AsyncClient) -> None:
    one = (await alice.get("/api/kernelspecs/sleep--large")).json()
    assert one["resources"] == {"logo-64x64": "/kernelspecs/sleep--large/logo-64x64.png"}
    assert (await alice.get(one["resources"]["logo-64x64"])).content == b"png"


async def test_a_launch_has_what_the_profile_says(gateway: MiniGateway, alice: httpx.AsyncClient) -> None:
    made = (await alice.post("/api/kernels", json={"name": "sleep--large"})).json()
    assert made["name"] == "sleep--large"
    record = await gateway.service.store.get(made["id"])
    assert record is not None and record.kernelspec == "sleep--large"
    assert record.resources == Resources(8, 2 * GIB) and record.cull_idle_timeout == 600
    row = (await gateway.db.read(lambda tx: tx.execute(select(Reservation)).scalars().all()))[0]
    assert (row.kernelspec, row.cpu) == ("sleep--large", 8)
    other = (await alice.post("/api/kernels", json={"name": "sleep--other"})).json()
    plan, _, _ = await gateway.service.store.plan(other["id"])
    assert plan.env["SIZE"] == "other" and plan.env["KEPT"] == "yes"
    assert plan.config == {"image_name": "other:2", "network": "else"}


async def test_a_size_cannot_be_wished_larger(alice: httpx.AsyncClient) -> None:
    wish = {"name": "sleep--large", "env": {"KERNEL_CPUS": "9"}}
    refused = await alice.post("/api/kernels", json=wish)
    assert refused.status_code == 403 and "sleep--large" in refused.json()["message"]
    # What it does not set stays as the kernelspec has it.
    assert (await alice.post("/api/kernels", json={**wish, "env": {"KERNEL_MEMORY": "16G"}})).status_code == 201


async def test_policies_are_about_the_entry(gateway: MiniGateway, alice: httpx.AsyncClient) -> None:
    about = {"object_kind": ObjectKind.KERNELSPEC, "object": "sleep--*", "counts": Counts.KERNEL}
    await limit(gateway, Policy("sizes", SubjectKind.EVERYONE, resource=Resource.CPU, hard=6, **about))  # type: ignore[arg-type]
    made = (await alice.post("/api/kernels", json={"name": "sleep--large"})).json()
    record = await gateway.service.store.get(made["id"])
    assert record is not None and record.resources.cpu == 6, "cut down, as a kernelspec's would be"
    none = {"object_kind": ObjectKind.KERNELSPEC, "object": "sleep--large"}
    await limit(gateway, Policy("no-large", SubjectKind.EVERYONE, resource=Resource.KERNELS, hard=0, **none))  # type: ignore[arg-type]
    refused = await alice.post("/api/kernels", json={"name": "sleep--large"})
    assert refused.status_code == 403 and "no-large" in refused.json()["message"]
    shown = (await alice.get("/api/kernelspecs")).json()["kernelspecs"]
    assert shown["sleep--large"]["spec"]["display_name"] == "Sleep, large (no room)"
    assert shown["sleep"]["spec"]["display_name"] == "Sleep"
    assert (await alice.post("/api/kernels", json={"name": "sleep"})).status_code == 201


async def test_what_is_broken_is_left_out_and_said(
    gateway: MiniGateway, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (state_dir / "kernels" / "sleep--other").mkdir()
    write(state_dir, {**SPEC, "display_name": "A folder", "metadata": {}}, "sleep--other")
    write(state_dir, {**SPEC, "metadata": {"hub_gateway": {"profiles": {"large": {}}}}}, "wrong")
    (state_dir / "kernels" / "torn").mkdir()
    (state_dir / "kernels" / "torn" / "kernel.json").write_text("{")
    specs = gateway.service.specs
    with caplog.at_level(logging.WARNING):
        await specs.refresh()
        found, broken = await specs.everything()
    assert set(found) == {"sleep", "sleep--large", "sleep--other", "wrong"}
    assert found["sleep--other"].model["spec"]["display_name"] == "A folder"  # type: ignore[call-overload,index]
    assert set(broken) == {"sleep--odd", "sleep--typo", "sleep--5", "sleep--other", "wrong--?", "torn"}
    assert "resorces" in broken["sleep--typo"] and "cpu" in broken["sleep--odd"] and "line 1" in broken["torn"]
    for name, why in broken.items():
        assert f"The kernelspec {name} is left out: {why}" in caplog.text


async def test_a_name_is_of_one_kernelspec_alone(state_dir: Path) -> None:
    """Two kernelspecs must not make the same entry, one of which is for everybody; nor what a folder is called."""

    def profiles(*found: dict[str, Any]) -> dict[str, Any]:
        return {**SPEC, "metadata": {"hub_gateway": {"profiles": list(found)}}}

    write(state_dir, profiles({"name": "b--c", "groups": ["x"]}), "a")
    write(state_dir, profiles({"name": "c"}), "a--b")
    write(state_dir, profiles({"name": "p"}), "k")
    (write(state_dir, SPEC, "k--p") / "kernel.json").write_text("{")
    specs = KernelSpecs()
    specs.manager.kernel_dirs, specs.manager.ensure_native_kernel = [str(state_dir / "kernels")], False
    found, broken = await specs.everything()
    assert set(found) == {"a", "a--b", "a--b--c", "k"} and found["a--b--c"].groups is None
    assert set(broken) == {"a--1", "k--p"} and "two hyphens" in broken["a--1"]
    assert "line 1" in broken["k--p"] and "A folder" in broken["k--p"]


async def test_a_profile_outlives_the_gateway_and_its_own_end(
    state_dir: Path, db_url: Callable[[], str | None]
) -> None:
    """What was started as a profile is started again as that, though its file says something else by now."""
    write(state_dir, {**SPEC, "argv": ["/bin/false", "{connection_file}"]})
    setup, alice = setup_of(state_dir, db_url()), Caller("alice", groups=frozenset({"analysts"}))
    async with MiniGateway(setup) as gateway:
        made = await gateway.service.create(alice, CreateKernel(name="sleep--large"))
        assert (await gateway.settled(made.id)).status is KernelStatus.FAILED
    write(state_dir, {**SPEC, "metadata": {}})
    async with MiniGateway(setup) as gateway:
        assert (await gateway.service.get(alice, made.id)).kernelspec == "sleep--large"
        with pytest.raises(NotFound):
            await gateway.service.specs.get("sleep--large", "alice", alice.groups)
        identity = await gateway.service.identity.map(alice)
        again = await gateway.service.store.revive(made.id, identity, lambda tx: None)
        assert again.record.resources == Resources(8, 2 * GIB) and again.record.kernelspec == "sleep--large"
        rows = await gateway.db.read(lambda tx: tx.execute(select(Kernel.kernelspec)).scalars().all())
        assert rows == ["sleep--large"]


async def test_who_has_left_its_groups_does_not_start_a_profile_again(
    state_dir: Path, db_url: Callable[[], str | None]
) -> None:
    write(state_dir, {**SPEC, "argv": ["/bin/false", "{connection_file}"]})
    async with MiniGateway(setup_of(state_dir, db_url())) as gateway:
        made = await gateway.service.create(
            Caller("alice", groups=frozenset({"analysts"})), CreateKernel(name="sleep--large")
        )
        assert (await gateway.settled(made.id)).status is KernelStatus.FAILED
        with pytest.raises(Forbidden, match=r"^The kernelspec sleep--large is not offered to you any more; start"):
            await gateway.service.restart(Caller("alice"), made.id)
        assert (await gateway.settled(made.id)).status is KernelStatus.FAILED


async def test_which_may_be_used_at_all(state_dir: Path) -> None:
    write(state_dir, SPEC)
    for allowed, there in ((["sleep"], OFFERED), (["sleep--large"], {"sleep--large"}), (["none"], set[str]())):
        specs = KernelSpecs(allowed_kernelspecs=allowed)
        specs.manager.kernel_dirs, specs.manager.ensure_native_kernel = [str(state_dir / "kernels")], False
        found, _ = await specs.everything()
        assert set(found) == there


async def test_the_kernelspec_itself_may_be_for_some(state_dir: Path) -> None:
    """Then its profiles are too, unless they say otherwise; and who asks for none in particular gets what is theirs."""
    options = {"groups": ["ml"], "profiles": [{"name": "a"}, {"name": "b", "groups": ["analysts"]}]}
    write(state_dir, {**SPEC, "metadata": {"hub_gateway": options}})
    specs = KernelSpecs(default_kernelspec="sleep")
    specs.manager.kernel_dirs, specs.manager.ensure_native_kernel = [str(state_dir / "kernels")], False
    assert set((await specs.catalogue("x", {"ml"}))["kernelspecs"]) == {"sleep", "sleep--a"}
    assert await specs.catalogue("x", {"analysts"}) == {
        "default": "sleep--b",
        "kernelspecs": {"sleep--b": (await specs.get("sleep--b", "x", {"analysts"})).model},
    }
    assert (await specs.get(None, "x", {"analysts"})).name == "sleep--b"
    with pytest.raises(NotFound):
        await specs.get("sleep", "x")
    assert await specs.catalogue("x") == {"default": "", "kernelspecs": {}}, "not even its name"


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"name": "Large"}, "lower-case"),
        ({"name": "a/b"}, "lower-case"),
        ({"name": "a--b"}, "two hyphens"),
        ({"name": "x" * 300}, "longer"),
        ({"name": "a", "groups": "analysts"}, "list"),
        ({"name": "a", "groups": []}, "nobody"),
        ({"name": "a", "image": 3}, "image"),
        ({"name": "a", "env": {"A": 1}}, "strings"),
        ({"name": "a", "config": []}, "object"),
        ({"name": "a", "display_name": " "}, "display_name"),
    ],
)
def test_bad_profiles(profile: dict[str, Any], said: str) -> None:
    first, second, third = entries_of("s", {"metadata": {"hub_gateway": {"profiles": [profile, {"name": "good"}]}}})
    assert not first.profile and said in second.why_not
    assert third.profile == "good" and not third.why_not


def test_two_of_a_name() -> None:
    _, first, second = entries_of("s", {"metadata": {"hub_gateway": {"profiles": [{"name": "a"}, {"name": "a"}]}}})
    assert not first.why_not and "two profiles" in second.why_not


def test_a_profiles_word_for_it_holds() -> None:
    """Whatever the kernelspec calls the same thing."""
    config = {"image_name": "a", "hosts": ["a"], "network": "a"}
    profiles = [{"name": "b", "config": {"image": "b", "remote_hosts": "b"}}]
    metadata = {"process_proxy": {"config": config}, "hub_gateway": {"profiles": profiles}}
    _, entry = entries_of("s", {"metadata": metadata})
    assert entry.document["metadata"]["process_proxy"]["config"] == {
        "image": "b",
        "remote_hosts": "b",
        "network": "a",
    }


def test_a_model_and_a_queue_that_a_profile_sets_cannot_be_chosen_otherwise() -> None:
    """The kernelspec's lists are for what the kernelspec sets; the profile may have its own."""
    resources = {"cpu": 1, "gpu_model": "t4", "queue": "small"}
    options = {
        "resources": {"gpu": 1},
        "gpu_models": ["t4", "a100"],
        "queues": ["small", "big"],
        "profiles": [
            {"name": "as-it-is"},
            {"name": "set", "resources": resources},
            {"name": "own", "resources": resources, "gpu_models": ["h100"], "queues": ["night"]},
        ],
    }
    bounds = [
        bounds_of(one.document["metadata"]["hub_gateway"])
        for one in entries_of("s", {"metadata": {"hub_gateway": options}})
    ]
    assert [one.gpu_models for one in bounds] == [("t4", "a100"), ("t4", "a100"), (), ("h100",)]
    assert [one.queues for one in bounds] == [("small", "big"), ("small", "big"), (), ("night",)]
    with pytest.raises(LaunchRefused, match="possible: t4"):
        wished(bounds[2], "s--set", {"KERNEL_GPU_MODEL": "a100"})
    with pytest.raises(LaunchRefused, match="possible: small"):
        wished(bounds[2], "s--set", {"KERNEL_QUEUE": "big"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a", "b", "1G"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "cpu", "memory", "gpu", "other"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(profiles=JSON)
def test_no_profile_takes_its_kernelspec_along(profiles: Any) -> None:
    """Whatever stands there: the kernelspec is offered, and of each profile it is known what it is or why it is not."""
    metadata = {"hub_gateway": {"resources": {"cpu": 1}, "profiles": profiles}}
    first, *others = entries_of("s", {"argv": ["x"], "metadata": metadata})
    assert KernelSpecs().spec(first, "/").name == "s"
    for entry in others:
        assert entry.name.startswith("s--")
        if entry.why_not:
            continue
        with contextlib.suppress(BadRequest):
            assert KernelSpecs().spec(entry, "/").profile == entry.profile


def test_how_long_a_launch_may_take(tmp_path: Path) -> None:
    def seconds(**document: Any) -> float | None:
        made = KernelSpecs().spec(Entry("s", {"argv": ["x"], **document}), str(tmp_path))
        return made.launch_seconds

    assert seconds() is None
    assert seconds(metadata={"hub_gateway": {"launch_timeout": 300}}) == 300
    assert seconds(env={"KERNEL_LAUNCH_TIMEOUT": "40"}) == 40
    assert seconds(env={"KERNEL_LAUNCH_TIMEOUT": "${LONG}"}) is None
    with pytest.raises(BadRequest, match="launch_timeout"):
        seconds(metadata={"hub_gateway": {"launch_timeout": 0}})


def test_an_empty_list_of_users_names_nobody(tmp_path: Path) -> None:
    """Enterprise Gateway's kernelspecs have it, and mean everybody."""
    document = {"argv": ["x"], "metadata": {"process_proxy": {"config": {"authorized_users": ""}}}}
    assert KernelSpecs().spec(Entry("s", document), str(tmp_path)).authorized_users == frozenset()
    document["metadata"] = {"process_proxy": {"config": {"authorized_users": 3}}}
    with pytest.raises(BadRequest, match="lists of names"):
        KernelSpecs().spec(Entry("s", document), str(tmp_path))


async def test_a_launch_has_its_own_time(state_dir: Path, db_url: Callable[[], str | None]) -> None:
    silent = ["/bin/sh", "-c", "exec sleep 600", "{connection_file}"]
    write(state_dir, {**SPEC, "argv": silent, "metadata": {"hub_gateway": {"launch_timeout": 1}}})
    async with MiniGateway(setup_of(state_dir, db_url())) as gateway:
        failed = await gateway.start(Caller("alice"), "sleep")
        assert failed.status is KernelStatus.FAILED and "within 1 seconds" in failed.message
