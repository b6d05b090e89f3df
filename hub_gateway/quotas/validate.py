"""Whether a policy makes sense, by itself and beside the others: said when it is set, with the names of both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.resolve import covers, slot
from hub_gateway.quotas.types import Action, Counts, ObjectKind, Origin, Policy, Resource, SubjectKind, WindowKind

__all__ = ["Problem", "SpecFacts", "check", "check_all"]

ENFORCED = {Resource.CPU: "cpu", Resource.MEMORY: "memory", Resource.GPU: "gpu"}
STATED = {Resource.CPU: "cpu", Resource.CORE_HOURS: "cpu", Resource.MEMORY: "memory"}
MAX_WINDOW = 366 * 86400
ONE = (SubjectKind.USER, SubjectKind.SERVICE)


@dataclass(frozen=True)
class SpecFacts:
    """What policies are held against of a kernelspec: its process proxy, queue and resources."""

    proxy: str
    queue: str
    usual: Resources


@dataclass(frozen=True)
class Problem:
    """Something about a policy. An `error` keeps it from being set, a `warning` is for its author to think about."""

    level: Literal["error", "warning"]
    policy: str
    sentence: str


def check(
    policy: Policy,
    others: Iterable[Policy],
    *,
    known_groups: Collection[str] | None = None,
    proxies: Mapping[str, frozenset[str]] | None = None,
    specs: Mapping[str, SpecFacts] | None = None,
    now: datetime | None = None,
) -> list[Problem]:
    """What is wrong with a policy. `others` are all the others; `proxies` says what each can enforce.

    `specs` are the kernelspecs, by name.
    """
    found = [Problem("error", policy.name, sentence) for sentence in _errors(policy)]
    found += _unenforced(policy, proxies or {}, specs or {})
    found += _unstated(policy, specs or {})
    if policy.subject_kind is SubjectKind.GROUP and known_groups is not None and policy.subject not in known_groups:
        sentence = f"The Hub knows no group {policy.subject}; the policy {policy.name} is about nobody until it does."
        found.append(Problem("warning", policy.name, sentence))
    if policy.valid_until is not None and now is not None and policy.valid_until <= now:
        found.append(Problem("warning", policy.name, f"The policy {policy.name} has ended already."))
    for other in others:
        if other.name != policy.name:
            found += _together(policy, other)
            found += _overlapping(policy, other, proxies or {}, specs or {})
            found += _never(policy, other)
    return found


def check_all(policies: Collection[Policy], **known: object) -> list[Problem]:
    """The same for all policies of a file; a contradiction is told once."""
    found: dict[str, Problem] = {}
    for policy in policies:
        for problem in check(policy, policies, **known):  # type: ignore[arg-type]
            found.setdefault(problem.sentence, problem)
    return list(found.values())


def _errors(policy: Policy) -> Iterable[str]:
    yield from _amounts(policy)
    yield from _times(policy)
    yield from _meaning(policy)


def _amounts(policy: Policy) -> Iterable[str]:
    name = policy.name
    for earlier, later in (("soft", "hard"), ("hard", "burst")):
        low, high = getattr(policy, earlier), getattr(policy, later)
        if low is not None and high is not None and low > high:
            yield f"The policy {name} has a {earlier} limit of {low:g} above its {later} limit of {high:g}."
    if policy.burst is None:
        return
    if policy.hard is None or not policy.burst_seconds:
        yield f"The policy {name} has a burst without a hard limit or without a time; give `hard` and `burst_seconds`."
    if policy.resource.timed:
        yield f"The policy {name} has a burst of something that is used up over time; raise its hard limit instead."


def _times(policy: Policy) -> Iterable[str]:
    name, resource = policy.name, policy.resource
    if resource.timed and policy.window is WindowKind.NOW:
        yield f"The policy {name} limits {resource.value}, which needs a window: rolling or calendar."
    if not resource.timed and policy.window is not WindowKind.NOW:
        yield f"The policy {name} limits {resource.value}, which is held at one instant; leave the window out."
    if policy.window is WindowKind.ROLLING and not 0 < (policy.window_seconds or 0) <= MAX_WINDOW:
        yield f"The rolling window of the policy {name} needs `window_seconds` from 1 to {MAX_WINDOW}."
    if policy.window is WindowKind.CALENDAR and policy.period is None:
        yield f"The calendar window of the policy {name} needs a `period`: day, week or month."
    if policy.valid_from and policy.valid_until and policy.valid_from >= policy.valid_until:
        yield f"The policy {name} ends before it begins."
    try:
        ZoneInfo(policy.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield f"The policy {name} names the time zone {policy.timezone!r}, which is unknown; write one such as UTC."


def _meaning(policy: Policy) -> Iterable[str]:
    name = policy.name
    if policy.counts is Counts.KERNEL and policy.resource not in ENFORCED:
        yield f"The policy {name} limits one kernel, so it must be about cpu, memory or gpu."
    if policy.counts is Counts.KERNEL and policy.action is Action.QUEUE:
        yield f"The policy {name} limits one kernel; waiting would not make it smaller, so its action is reject."
    if policy.gpu_model and policy.resource not in (Resource.GPU, Resource.GPU_HOURS):
        yield f"The policy {name} names a GPU model and limits {policy.resource.value}; leave the model out."
    if policy.queue_seconds is not None and policy.action is not Action.QUEUE:
        yield f"The policy {name} has a deadline for waiting, but launches do not wait; set the action to queue."
    if policy.origin is Origin.GRANT and (policy.subject_kind not in ONE or policy.valid_until is None):
        yield f"The grant {name} must be for one user or service, and have an end."


def _unenforced(
    policy: Policy, proxies: Mapping[str, frozenset[str]], specs: Mapping[str, SpecFacts]
) -> Iterable[Problem]:
    if policy.resource not in ENFORCED or policy.hard is None:
        return
    needed, name = ENFORCED[policy.resource], policy.name
    if policy.object_kind is ObjectKind.PROXY:
        about = {one for one in proxies if fnmatchcase(one, policy.object)}
        if about and not any(needed in proxies[one] for one in about):
            yield Problem(
                "error",
                name,
                f"The policy {name} limits {needed} of {_listed(about)}, which cannot enforce it; limit the number of "
                "kernels there.",
            )
            return
    else:
        about = {specs[one].proxy for one in _specs_of(policy, specs)} & set(proxies) if specs else set(proxies)
    loose = {one for one in about if needed not in proxies[one]}
    if loose:
        yield Problem(
            "warning",
            name,
            f"The policy {name} limits {needed}, which {_listed(loose)} cannot enforce: kernels there count by what "
            "they reserve, and may take more; limit the number of kernels there, too.",
        )


def _unstated(policy: Policy, specs: Mapping[str, SpecFacts]) -> Iterable[Problem]:
    """Kernelspecs that do not say what a policy limits."""
    what = STATED.get(policy.resource)
    if what is None or policy.hard is None or policy.counts is Counts.KERNEL or not policy.enabled:
        return
    silent = [one for one in _specs_of(policy, specs) if not getattr(specs[one].usual, what)]
    if silent:
        one = len(silent) == 1
        yield Problem(
            "warning",
            policy.name,
            f"The kernelspec{'' if one else 's'} {_listed(silent)} {'states' if one else 'state'} no {what}, which the "
            f"policy {policy.name} limits: launches of {'it' if one else 'them'} are refused; write "
            f"metadata.hub_gateway.resources into kernel.json, or set KernelSpecs.default_resources.",
        )


def _specs_of(policy: Policy, specs: Mapping[str, SpecFacts]) -> list[str]:
    """The kernelspecs that a policy is about."""
    return sorted(name for name, one in specs.items() if covers(policy, name, one.proxy, one.queue))


def _listed(names: Iterable[str]) -> str:
    words = sorted(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _together(policy: Policy, other: Policy) -> Iterable[Problem]:
    """What is odd about two policies side by side."""
    same_subject = (policy.subject_kind, policy.subject) == (other.subject_kind, other.subject)
    if not same_subject or slot(policy) != slot(other) or not (policy.enabled and other.enabled):
        return
    if Origin.GRANT in (policy.origin, other.origin) or not _same_time(policy, other):
        return
    first, second = sorted((policy.name, other.name))
    if policy.counts is Counts.TOGETHER:
        if policy.hard != other.hard:
            sentence = f"{first} and {second} limit the same; both apply, so the lower limit decides."
            yield Problem("warning", policy.name, f"The policies {sentence}")
        return
    if policy.priority != other.priority:
        return
    level: Literal["error", "warning"] = "error" if policy.hard != other.hard else "warning"
    yield Problem(
        level,
        policy.name,
        f"The policies {first} and {second} say different things about the same subject, object and resource at the "
        "same time with the same priority; delete one, or give one a higher priority."
        if level == "error"
        else f"The policies {first} and {second} say the same; delete one.",
    )


def _overlapping(
    policy: Policy, other: Policy, proxies: Mapping[str, frozenset[str]], specs: Mapping[str, SpecFacts]
) -> Iterable[Problem]:
    """Two globs that are about the same kernelspecs or proxies: none replaces the other, which is easily overlooked."""
    kind = policy.object_kind
    if kind not in (ObjectKind.KERNELSPEC, ObjectKind.PROXY) or policy.object == other.object:
        return
    same_subject = (policy.subject_kind, policy.subject) == (other.subject_kind, other.subject)
    if not same_subject or slot(replace(policy, object=other.object)) != slot(other):
        return
    if not (policy.enabled and other.enabled and _same_time(policy, other)):
        return
    known = specs if kind is ObjectKind.KERNELSPEC else proxies
    both = [one for one in known if fnmatchcase(one, policy.object) and fnmatchcase(one, other.object)]
    if both:
        first, second = sorted((policy.name, other.name))
        yield Problem(
            "warning",
            policy.name,
            f"The policies {first} and {second} are both about {kind.value} {_listed(both)}; a launch must fit into "
            "both, so the lower limit decides.",
        )


def _never(policy: Policy, other: Policy) -> Iterable[Problem]:
    """A policy in whose place another one counts whenever it could; whichever of the two is set last."""
    for loser, winner in ((policy, other), (other, policy)):
        if slot(loser) != slot(winner) or Counts.TOGETHER is loser.counts or not (loser.enabled and winner.enabled):
            continue
        same = (loser.subject_kind, loser.subject) == (winner.subject_kind, winner.subject)
        if winner.subject_kind is not SubjectKind.EVERYONE and not same:
            continue
        if loser.priority >= winner.priority or not _always(winner, loser):
            continue
        yield Problem(
            "warning",
            policy.name,
            f"The policy {loser.name} never counts: {winner.name}, with the priority {winner.priority} above "
            f"{loser.priority}, counts in its place; give {loser.name} a higher priority, or delete it.",
        )


def _always(winner: Policy, loser: Policy) -> bool:
    """Whether one holds whenever the other does."""
    if winner.weekly and (winner.weekly, winner.timezone) != (loser.weekly, loser.timezone):
        return False
    begins, ends = winner.valid_from, winner.valid_until
    early = begins is None or (loser.valid_from is not None and begins <= loser.valid_from)
    return early and (ends is None or (loser.valid_until is not None and loser.valid_until <= ends))


def _same_time(one: Policy, other: Policy) -> bool:
    """Whether there may be a moment at which both hold. Weekly times that differ are taken for apart."""
    starts = [policy.valid_from for policy in (one, other) if policy.valid_from is not None]
    ends = [policy.valid_until for policy in (one, other) if policy.valid_until is not None]
    if starts and ends and max(starts) >= min(ends):
        return False
    return one.weekly == other.weekly or not (one.weekly and other.weekly)
