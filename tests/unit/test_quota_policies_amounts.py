"""Amounts: what is understood, and what is refused in a sentence; wishes within a kernelspec's bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_gateway.errors import BadRequest, LaunchRefused
from hub_gateway.kernels.resources import bounds_of, wished
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.amounts import LARGEST, amount, cores, devices, memory, shown
from hub_gateway.quotas.types import Resource

GIB = 2**30


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("4G", 4 * GIB),
        ("4Gi", 4 * GIB),
        ("4GiB", 4 * GIB),
        ("4 GB", 4 * GIB),
        ("512M", GIB // 2),
        ("1.5G", 3 * GIB // 2),
        ("1024k", 2**20),
        (4 * GIB, 4 * GIB),
        (float(GIB), GIB),
        (0, 0),
        ("0", 0),
    ],
)
def test_memory(value: object, size: int) -> None:
    assert memory("memory", value) == size


@pytest.mark.parametrize("value", [4, "4", 4.0, "4B", 2**20 - 1, "1k", 0.5])
def test_memory_without_a_unit(value: object) -> None:
    with pytest.raises(BadRequest, match="a unit is missing; write it as 512M or 4G"):
        memory("memory", value)


ODD: list[Any] = [
    *("", "x", "-1", "+1", "1e3", "0x10", "1,5", "٤", "4GG", "4 4", "nan", "inf", "4G\n4", "1_000"),
    *(-1, -0.001, float("nan"), float("inf"), float("-inf"), True, False, None, [], {}, b"4", 10**400, LARGEST * 2),
    *("9" * 400, "9" * 400 + "G", "-4G"),
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_what_is_no_amount(value: object) -> None:
    for parse in (memory, cores, devices):
        with pytest.raises(BadRequest) as caught:
            parse("hard", value)
        assert caught.value.message.startswith("hard ") and len(caught.value.message) < 200


@pytest.mark.parametrize("resource", Resource)
def test_limits_of_every_resource(resource: Resource) -> None:
    for value in (-1, float("nan"), 2.0**60, True, "many", None):
        with pytest.raises(BadRequest):
            amount(resource, "hard", value)
    assert amount(resource, "hard", 2**20) == 2**20
    assert amount(resource, "hard", 0) == 0


def test_half_a_kernel() -> None:
    for resource in (Resource.KERNELS, Resource.STARTING, Resource.GPU):
        with pytest.raises(BadRequest, match="whole number"):
            amount(resource, "hard", 1.5)
    assert amount(Resource.CPU, "hard", 1.5) == 1.5


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary()))
def test_nothing_else_than_an_amount_or_a_sentence(value: object) -> None:
    for parse in (memory, cores, devices):
        try:
            found = parse("hard", value)
        except BadRequest as error:
            assert error.message
        else:
            assert 0 <= found <= LARGEST


@pytest.mark.parametrize(
    ("resource", "value", "text"),
    [
        (Resource.KERNELS, 1, "1 kernel"),
        (Resource.GPU, 4, "4 a100 GPUs"),
        (Resource.MEMORY, 16 * GIB, "16 GiB"),
        (Resource.CORE_HOURS, 2.5, "2.5 core-hours"),
        (Resource.CPU, 0.1 + 0.2, "0.3 cores"),
        (Resource.KERNELS, 10_000, "10000 kernels"),
    ],
)
def test_as_people_read_it(resource: Resource, value: float, text: str) -> None:
    assert shown(resource, value, "a100" if resource is Resource.GPU else "") == text


BOUNDS = bounds_of(
    {
        "resources": {"cpu": 2, "memory": "4G", "gpu": 1, "gpu_model": "a100", "queue": "research"},
        "resources_max": {"cpu": 8, "memory": "16G"},
        "resources_min": {"cpu": 1},
        "gpu_models": ["a100", "h100"],
        "queues": ["teaching"],
    }
)


def test_wishes_within_bounds() -> None:
    assert wished(BOUNDS, "spec", {}) == (Resources(2, 4 * GIB, 1, "a100"), "research")
    wish = {"KERNEL_CPUS": "8", "KERNEL_MEMORY": "16Gi", "KERNEL_GPUS": "0", "KERNEL_QUEUE": "teaching"}
    assert wished(BOUNDS, "spec", wish) == (Resources(8, 16 * GIB, 0, "a100"), "teaching")
    assert wished(BOUNDS, "spec", {"KERNEL_GPU_MODEL": "h100"})[0].gpu_model == "h100"


@pytest.mark.parametrize(
    ("name", "wish", "said"),
    [
        ("KERNEL_CPUS", "9", "may have 8 cores at most"),
        ("KERNEL_CPUS", "0.5", "needs 1 core at least"),
        ("KERNEL_MEMORY", "17G", "may have 16 GiB at most"),
        ("KERNEL_GPUS", "2", "may have 1 a100 GPU at most|may have 1 GPU at most"),
        ("KERNEL_GPU_MODEL", "rtx", "possible: a100, h100"),
        ("KERNEL_QUEUE", "vip", "possible: research, teaching"),
        # Nothing at all would count for no limit, and be taken for as much as there is.
        ("KERNEL_CPUS", "0", "no kernel of spec can run"),
        ("KERNEL_CPUS", "0.0001", "no kernel of spec can run"),
        ("KERNEL_MEMORY", "0", "no kernel of spec can run"),
    ],
)
def test_wishes_beyond_bounds(name: str, wish: str, said: str) -> None:
    with pytest.raises(LaunchRefused, match=said):
        wished(BOUNDS, "spec", {name: wish})


@pytest.mark.parametrize("name", ["KERNEL_CPUS", "KERNEL_MEMORY", "KERNEL_GPUS"])
@pytest.mark.parametrize("wish", ["many", "-1", "nan", "1e9", "9" * 400])
def test_wishes_that_are_no_amounts(name: str, wish: str) -> None:
    with pytest.raises(BadRequest, match=name):
        wished(BOUNDS, "spec", {name: wish})


def test_beyond_a_kernelspec_that_allows_no_wishes() -> None:
    bounds = bounds_of({"resources": {"cpu": 2}})
    assert wished(bounds, "spec", {"KERNEL_CPUS": "1"})[0].cpu == 1
    for wish in ({"KERNEL_CPUS": "3"}, {"KERNEL_MEMORY": "1G"}, {"KERNEL_GPUS": "1"}, {"KERNEL_QUEUE": "vip"}):
        with pytest.raises(LaunchRefused):
            wished(bounds, "spec", wish)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resources": {"cpus": 2}}, "has no cpus"),
        ({"resources": []}, None),
        ({"resources": 3}, "not an object"),
        ({"resources": {"cpu": 4}, "resources_max": {"cpu": 2}}, "must ascend"),
        ({"resources": {"cpu": 1}, "resources_min": {"cpu": 2}}, "must ascend"),
        ({"resources": {"memory": 4}}, "a unit is missing"),
        ({"resources": {"gpu": 0.5}}, "whole number"),
        ({"resources": {"cpu": float("nan")}}, "cpu of resources must be a number"),
        ({"gpu_models": "a100"}, "not a list"),
    ],
)
def test_kernelspecs_that_are_wrong(options: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert bounds_of(options) == bounds_of({})
        return
    with pytest.raises(BadRequest, match=said):
        bounds_of(options)
