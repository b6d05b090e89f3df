"""Profiles of a kernelspec: several sizes or images of one folder, each an entry of its own in the launcher.

They stand in `metadata.hub_gateway.profiles`, a list of objects. Such an entry is the kernelspec with what the profile
says in its place, so that everything behind it (limits, the ledger, process proxies) knows kernelspecs alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import JSON

__all__ = ["KEYS", "OPTIONS", "SEPARATOR", "Entry", "clash", "entries_of", "groups_of", "shown"]

SEPARATOR = "--"
LONGEST = 255
"""What the database holds of a kernelspec's name."""

SIZES = ("resources", "resources_max", "resources_min")
OPTIONS = (*SIZES, "gpu_models", "queues", "groups", "cull_idle_timeout", "launch_timeout")
KEYS = ("name", "display_name", "image", "config", "env", *OPTIONS)
"""What a profile may say."""

CHOICES = (("gpu_model", "gpu_models"), ("queue", "queues"))
"""What of `resources` a user may choose, and from which list."""

SAME = (frozenset({"image_name", "image"}), frozenset({"hosts", "remote_hosts"}))
"""Keys of `config` that mean the same: a profile's word for it must not lose against the kernelspec's."""

# Lower case alone, as Jupyter reads the names of folders: two entries never differ by case only.
# No separator in it: the last one of an entry's name says of which kernelspec it is, and no two make the same name.
_NAME = re.compile(r"(?!.*--)[a-z0-9][a-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Entry:
    """One entry of the launcher, as a `kernel.json` would have it; or why there is none."""

    name: str
    document: Mapping[str, Any]
    profile: str = ""
    """Empty for the kernelspec itself."""
    why_not: str = ""


def entries_of(name: str, document: Mapping[str, Any]) -> Iterator[Entry]:
    """The kernelspec, then its profiles, also those that are broken."""
    yield Entry(name, document)
    profiles = _part(_part(document, "metadata"), "hub_gateway").get("profiles")
    if profiles is None:
        return
    if not isinstance(profiles, list):
        yield Entry(f"{name}{SEPARATOR}?", {}, "?", "metadata.hub_gateway.profiles is not a list.")
        return
    seen: set[str] = set()
    for number, profile in enumerate(profiles, 1):
        called = _name_of(profile)
        entry, label = f"{name}{SEPARATOR}{called or number}", called or str(number)
        try:
            if called is None:
                raise BadRequest(
                    f"Profile {number} of metadata.hub_gateway.profiles is no object with a `name` of lower-case "
                    "letters, digits and . _ -, without two hyphens in a row."
                )
            if called in seen:
                raise BadRequest(f"There are two profiles {called!r}; the first one is used.")
            if len(entry) > LONGEST:
                raise BadRequest(f"{entry[:40]}... is longer than {LONGEST} characters; shorten the profile's name.")
            made = _overridden(document, called, profile)
        except BadRequest as error:
            yield Entry(entry, {}, label, error.message)
        else:
            seen.add(called)
            yield Entry(entry, made, called)


def clash(entry: Entry, taken: Collection[str]) -> str:
    """Why a profile cannot have its name, beside those that are taken; empty where it can.

    A folder takes its name also where its `kernel.json` is torn: what has that name must not become something else.
    """
    if not entry.profile or entry.name not in taken:
        return ""
    return f"A folder or an earlier profile has the name {entry.name}, so the profile is not used; rename one of them."


def groups_of(options: Mapping[str, Any]) -> frozenset[str] | None:
    """The groups to which an entry is offered; None is everybody. Raises `BadRequest`."""
    found = options.get("groups")
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise BadRequest("groups is not a list of names.")
    if not found:
        raise BadRequest("groups is empty, so that nobody would be offered it; leave it out for everybody.")
    return frozenset(found)


def shown(document: Mapping[str, Any]) -> dict[str, JSON]:
    """A kernelspec as users may see it: not who else gets which profiles."""
    metadata = _part(document, "metadata")
    options = metadata.get("hub_gateway")
    if not isinstance(options, Mapping) or not {"profiles", "groups"} & set(options):
        return dict(document)
    kept = {key: value for key, value in options.items() if key not in ("profiles", "groups")}
    return {**document, "metadata": {**metadata, "hub_gateway": kept}}


def _overridden(document: Mapping[str, Any], called: str, profile: Mapping[str, Any]) -> dict[str, Any]:
    """The kernelspec with what a profile says in its place. Raises `BadRequest`."""
    if unknown := sorted(set(profile) - set(KEYS)):
        raise BadRequest(f"The profile {called} has no {', '.join(map(str, unknown))}; it has {', '.join(KEYS)}.")
    metadata = _part(document, "metadata")
    options, stanza = _part(metadata, "hub_gateway"), _part(metadata, "process_proxy")
    own = _object(profile, "config", called)
    if (image := profile.get("image")) is not None:
        if not isinstance(image, str) or not image:
            raise BadRequest(f"image of the profile {called} is not the name of an image.")
        own["image_name"] = image
    replaced = {word for words in SAME if words & set(own) for word in words}
    config = {**{key: value for key, value in _part(stanza, "config").items() if key not in replaced}, **own}
    display = profile.get("display_name", f"{document.get('display_name') or called} ({called})")
    if not isinstance(display, str) or not display.strip():
        raise BadRequest(f"display_name of the profile {called} is not a text.")
    proxy = {"process_proxy": {**stanza, "config": config}} if config else {}
    return {
        **document,
        "display_name": display,
        "env": {**_part(document, "env"), **_environment(profile, called)},
        "metadata": {**metadata, **proxy, "hub_gateway": _options(options, called, profile)},
    }


def _options(options: Mapping[str, Any], called: str, profile: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in options.items() if key != "profiles"}
    made |= {key: profile[key] for key in OPTIONS if key in profile}
    for size in SIZES:
        if own := _object(profile, size, called):
            made[size] = {**_part(options, size), **own}
    # A size is a size: what the profile sets cannot be wished higher or otherwise, unless it says so itself.
    own = _object(profile, "resources", called)
    fixed = set(own) - set(_object(profile, "resources_max", called))
    made["resources_max"] = {key: value for key, value in _part(made, "resources_max").items() if key not in fixed}
    for one, several in CHOICES:
        if one in own and several not in profile:
            made.pop(several, None)
    groups_of(made)
    return {**made, "profile": called}


def _environment(profile: Mapping[str, Any], called: str) -> dict[str, Any]:
    env = _object(profile, "env", called)
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or not isinstance(value, str):
            raise BadRequest(f"env of the profile {called} does not map names of variables to strings: {name[:100]!r}.")
    return env


def _name_of(profile: object) -> str | None:
    name = profile.get("name") if isinstance(profile, Mapping) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def _object(profile: Mapping[str, Any], key: str, called: str) -> dict[str, Any]:
    found = profile.get(key)
    if found is not None and not isinstance(found, dict):
        raise BadRequest(f"{key} of the profile {called} is not an object.")
    return dict(found or {})


def _part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object within an object; what is none is told where the kernelspec itself is read."""
    part = found.get(key)
    return part if isinstance(part, Mapping) else {}
