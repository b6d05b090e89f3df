"""As whom the kernels of a Hub user run: ordered rules, hard checks of what comes out, and claims."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session as Transaction
from traitlets import Bool, Dict, Float, List, TraitError, Unicode, validate
from traitlets.config import LoggingConfigurable

from hub_gateway.audit import append
from hub_gateway.auth.base import Caller
from hub_gateway.db.engine import Database
from hub_gateway.errors import Forbidden, GatewayError, Unavailable
from hub_gateway.identity import claims
from hub_gateway.identity.decide import SERVICES, Decider, Decision
from hub_gateway.identity.names import shown
from hub_gateway.identity.rules import Rule, Subject, read_rules
from hub_gateway.identity.threads import BlockingCalls
from hub_gateway.identity.types import Identity, Step
from hub_gateway.identity.unix import UnixUsers
from hub_gateway.proxies.base import IdentityNeed

if TYPE_CHECKING:
    from hub_gateway.auth.people import People
    from hub_gateway.identity.credentials import Credentials

__all__ = ["Identity", "IdentityMapper", "Step"]

SYSTEM_NAMES = (
    *("root", "nobody", "daemon", "bin", "sys", "krbtgt", "kadmin"),
    *("kiprop", "host", "http", "nfs", "hdfs"),
    *("yarn", "mapred", "httpfs", "hive", "spark", "hbase", "kafka", "zookeeper"),
    *("impala", "oozie", "livy", "knox", "hue", "ranger", "solr", "postgres"),
)


class IdentityMapper(LoggingConfigurable):
    """Maps callers to identities, and fails closed.

    `db` is for claims and the audit trail. `people` tells cost centres of groups, and `hints_of` a user's auth_state;
    both may be None. `proxies` are those whose credentials `explain` speaks of.
    """

    rules = List(
        Dict(),
        help="""Ordered rules: the first one that says something of a Hub user decides; after the last one, nobody.

        With no rules, kernels run as the unix user of their owner's name where `UnixUsers.impersonate` is set, and
        else as the gateway's own. Each rule is a dict with one of `table`, `pattern` and `hook`::

            c.IdentityMapper.rules = [
                # A YAML file of Hub users, read again when it changes:
                #     alice: alice@EXAMPLE.COM
                #     bob: {principal: bob@EXAMPLE.COM, unix_user: bob, cost_center: "4711"}
                #     eve: {refuse: Your account is closed; write to help@example.com.}
                {"name": "exceptions", "table": "/etc/hub-gateway/identities.yaml"},
                # A regular expression for the whole name. $1 is its first group, ${name} a named one, $0 all of it.
                {"name": "robots", "pattern": "svc-.*", "refuse": "Names that begin with svc- are kept for services."},
                {"name": "staff", "pattern": r"([^@]+)@example\\.com", "case": "lower",
                 "principal": "$1@EXAMPLE.COM", "unix_user": "$1"},
                # The unix user by the rules of krb5.conf.
                {"name": "partners", "pattern": r"([^@]+)@partner\\.example", "principal": "$1@PARTNER.EXAMPLE",
                 "auth_to_local": [r"RULE:[1:$1@$0](.*@PARTNER\\.EXAMPLE)s/@.*//s/^/p_/"]},
                # def map_user(name, groups, hints): a dict as in the table, or None
                {"name": "site", "hook": "our_site.identity:map_user"},
            ]

        Every rule may have `groups` (it is for members of one of them only), `cost_center`, and `shared`: several Hub
        users may then have the same principal and unix user, who can read and stop each other's work.
        `case` (keep, lower, upper) is of ASCII letters and changes what groups matched. A pattern is put to
        `"on": "auth_state.KEY"` instead of the name where `auth_state_keys` lists the key.

        Whatever a rule says: results are plain ASCII, principals have a realm that is allowed, system users and the
        gateway's own account are refused, and who comes second to a principal or unix user is refused.
        """,
    ).tag(config=True)
    services = Dict(
        help="""As whom services of the Hub launch kernels with their own tokens; other services may not.

        Example: `{"ci": {"principal": "ci@EXAMPLE.COM", "unix_user": "ci", "cost_center": "4711"}}`. The owner of
        the kernels is `services/ci`.
        """
    ).tag(config=True)
    default_realm = Unicode(help="The Kerberos realm of principals that are written without one.").tag(config=True)
    allowed_realms = List(
        Unicode(), help="Realms that principals may be of, besides the default one. In capitals, as they are written."
    ).tag(config=True)
    refused_names = List(
        Unicode(),
        default_value=list(SYSTEM_NAMES),
        help="Names that neither a unix user nor the first part of a principal may have, whatever their case.",
    ).tag(config=True)
    require_unix_user = Bool(
        True,
        help="""Whether unix users must exist on the gateway's own node.

        Without this, uids are checked only where the kernels run: by the launcher on each node.
        """,
    ).tag(config=True)
    auth_state_keys = List(
        Unicode(),
        help="""Keys of a user's auth_state on the Hub that rules may look at.

        The gateway's role on the Hub then needs the scope `admin:auth_state`. All other keys are thrown away at once.
        """,
    ).tag(config=True)
    timeout = Float(
        10.0, help="How long (seconds) name services, tables and hooks may take for one user; then 503."
    ).tag(config=True)

    def __init__(
        self,
        *,
        db: Database | None = None,
        unix_users: UnixUsers | None = None,
        credentials: Credentials | None = None,
        people: People | None = None,
        hints_of: Callable[[str], Awaitable[Mapping[str, Any] | None]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.db = db
        self.unix_users = unix_users or UnixUsers(parent=self)
        self.credentials = credentials
        self.people = people
        self.hints_of = hints_of
        self.proxies: Mapping[str, IdentityNeed] = {}
        self.tickets: Mapping[str, IdentityNeed] = {}
        """What kernels on these proxies get of their owner's, where that is anything."""
        self.ways: Mapping[str, Callable[[str | None, str | None], str]] = {}
        """`ProcessProxy.says` of the proxies."""
        self._rules = self._read(self.rules)
        self.observe(self._changed, ["rules", "default_realm", "auth_state_keys"])
        self._claims = claims.Claims()
        self._calls = BlockingCalls("The directory of users", limit=8, timeout=self.timeout)

    @validate("services")
    def _services(self, proposal: Any) -> Any:
        for name, entry in proposal["value"].items():
            known = {"owner", "principal", "unix_user", "cost_center", "shared"}
            if not isinstance(entry, dict) or not set(entry) <= known or "/" in name:
                raise TraitError(f"IdentityMapper.services[{name!r}] must be a dict with {', '.join(sorted(known))}.")
            if entry.get("owner", SERVICES + name) != SERVICES + name:
                raise TraitError(f"The owner of what the service {name!r} launches is {SERVICES}{name}.")
        return proposal["value"]

    def _read(self, rules: Sequence[Any]) -> tuple[Rule, ...]:
        try:
            return read_rules(rules, default_realm=self.default_realm, hints=self.auth_state_keys)
        except ValueError as error:
            raise TraitError(str(error)) from error

    def _changed(self, _change: Any) -> None:
        self._rules = self._read(self.rules)

    # Deciding

    async def map(
        self,
        caller: Caller,
        hints: Mapping[str, Any] | None = None,
        need: IdentityNeed = IdentityNeed.NONE,
        tickets: IdentityNeed = IdentityNeed.NONE,
    ) -> Identity:
        """As whom the caller's kernels run, where a proxy has that need, and they get these tickets.

        Raises `Forbidden`, which the audit trail then has, and `Unavailable`.
        """
        decision = await self._decide(caller.name, caller.kind == "service", caller.groups, hints)
        for each in (need, tickets):
            if decision.identity is not None:
                decision = self._decider().suit(decision, each)
        if decision.identity is None:
            await self._write_refusal(caller, decision)
            raise Forbidden(decision.refusal, hint=decision.hint)
        return await self._with_cost_center(decision.identity)

    def claim(self, tx: Transaction, identity: Identity) -> None:
        """Take principal and unix user for their owner, in the transaction that admits the kernel.

        Raises `hub_gateway.identity.claims.Taken` (a `LaunchRefused`) where another Hub user has them; the audit trail
        has the decision if the transaction is committed.
        """
        self._claims.claim(tx, identity)

    async def release(self, hub_user: str, actor: str) -> bool:
        """Give back everything that a Hub user holds; whether that was anything. Raises `Conflict`."""
        assert self.db is not None
        return bool(await self.db.write(lambda tx: claims.release(tx, hub_user, actor)))

    async def explain(
        self,
        name: str,
        groups: Collection[str],
        hints: Mapping[str, Any] | None = None,
        *,
        name_holders: bool = False,
        attempt: bool = True,
    ) -> list[Step]:
        """Each step of the mapping of a Hub user (or `services/NAME`), and which credential would be used.

        With `name_holders` it names who has what would be theirs; with `attempt` it finds out whether kernels' tickets
        can be had now. Nothing is claimed and nothing written. Raises `Unavailable`.
        """
        service = name.startswith(SERVICES)
        decision = await self._decide(name.removeprefix(SERVICES) if service else name, service, groups, hints)
        steps = list(decision.steps)
        identity = decision.identity
        if identity is None:
            return [*steps, Step("result", decision.rule, "refused", decision.refusal)]
        identity = await self._with_cost_center(identity)
        db = self.db
        if db is not None:
            steps += await db.read(lambda tx: _claim_steps(tx, identity, name_holders))
        for proxy, need in sorted(self.proxies.items()):
            steps.append(self._credential_step(proxy, need, decision))
            if (tickets := self.tickets.get(proxy, IdentityNeed.NONE)) is not IdentityNeed.NONE:
                steps.append(await self._tickets_step(proxy, tickets, decision, attempt))
        taken = any(step.stage == "claim" and step.outcome == "refused" for step in steps)
        result = "No kernel would start, for what the mapping gives belongs to somebody else." if taken else ""
        steps.append(Step("result", identity.rule, "refused" if taken else "ok", result or _said(identity)))
        return steps

    async def _decide(
        self, name: str, service: bool, groups: Collection[str], hints: Mapping[str, Any] | None
    ) -> Decision:
        if hints is None and self.auth_state_keys and self.hints_of is not None and not service:
            hints = await self.hints_of(name)
        kept = {key: value for key, value in (hints or {}).items() if key in self.auth_state_keys}
        # The rest of auth_state (tokens, often) goes no further.
        subject = Subject(name, frozenset(groups), {key: text for key, text in kept.items() if isinstance(text, str)})
        decider = self._decider()
        return await self._calls.run(lambda: decider.decide(subject, service))

    def _decider(self) -> Decider:
        credentials = self.credentials
        return Decider(
            rules=self._rules,
            services=self.services,
            unix_users=self.unix_users,
            realms=frozenset((*self.allowed_realms, self.default_realm)) - {""},
            default_realm=self.default_realm,
            refused=frozenset(name.lower() for name in self.refused_names),
            own_principals=frozenset() if credentials is None else credentials.own_principals,
            require_unix_user=self.require_unix_user,
        )

    async def _with_cost_center(self, identity: Identity) -> Identity:
        """With the property `cost_center` of the first of its groups (by name) that has one, if the rule gave none."""
        if identity.cost_center or self.people is None or not identity.groups:
            return identity
        try:
            groups = await self.people.last_known_groups()
        except Unavailable as error:
            # Billed to no cost centre rather than not started; its entry in the ledger can be moved to one.
            self.log.warning("The kernel of %s gets no cost centre: %s", identity.owner, error.message)
            return identity
        for group in sorted(groups, key=lambda one: one.name):
            found = group.properties.get("cost_center")
            if group.name in identity.groups and isinstance(found, str | int) and found != "":
                return replace(identity, cost_center=str(found)[:255])
        return identity

    async def _write_refusal(self, caller: Caller, decision: Decision) -> None:
        self.log.warning("No identity for %s: %s %s", shown(caller.name), decision.refusal, decision.hint)
        if self.db is None:
            return
        who = SERVICES + caller.name if caller.kind == "service" else caller.name
        who = who.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
        detail = {"rule": decision.rule, "reason": decision.refusal, "hint": decision.hint}
        detail["groups"] = sorted(caller.groups)  # type: ignore[assignment]
        try:
            await self.db.write(
                lambda tx: append(
                    tx, actor=who, action="identity.refused", subject=who, outcome="refused", detail=detail
                )
            )
        except GatewayError as error:
            self.log.error("The audit trail lacks the refusal of %s: %s", shown(who), error.message)

    def _credential_step(self, proxy: str, need: IdentityNeed, decision: Decision, where: str = "") -> Step:
        where = where or f"On {proxy}"
        suited = self._decider().suit(decision, need)
        if suited.identity is None:
            return Step("credential", decision.rule, "refused", f"{where}: {suited.refusal}")
        if self.credentials is None:
            return Step("credential", decision.rule, "skipped", f"{where}: no credential is handed out.")
        served, sentence = self.credentials.says(suited.identity, need)
        if need is IdentityNeed.UNIX_USER and (way := self.ways.get(proxy)) is not None:
            sentence = way(suited.identity.unix_user, suited.identity.principal) or sentence
        return Step("credential", decision.rule, "ok" if served else "unavailable", f"{where}: {sentence}")

    async def _tickets_step(self, proxy: str, need: IdentityNeed, decision: Decision, attempt: bool) -> Step:
        """What kernels get, and whether it can be had at the moment."""
        step = self._credential_step(proxy, need, decision, f"On {proxy}, for the kernels themselves")
        if step.outcome != "ok" or self.credentials is None or decision.identity is None or not attempt:
            return step
        try:
            await self.credentials.attempt(decision.identity, need)
        except GatewayError as error:
            sentence = f"{step.sentence} They cannot be had now. {error.message}"
            return replace(step, outcome="unavailable", sentence=sentence)
        return step


def _claim_steps(tx: Transaction, identity: Identity, name_holders: bool) -> list[Step]:
    steps = []
    found = claims.holders(tx, identity)
    for kind, name in identity.claimed:
        own = any(one.hub_user == identity.owner for one in found if (one.kind, one.name) == (kind, name))
        others = [one for one in found if (one.kind, one.name) == (kind, name) and one.hub_user != identity.owner]
        what = f"the {kind.replace('_', ' ')} {name}"
        if others and not own and not identity.shared:
            who = shown(others[0].hub_user) if name_holders else "another user of the Hub"
            text = (
                f"{what} belongs to {who} since {others[0].claimed_at:%Y-%m-%d}; if that was this user's former name, "
                "release it."
            )
            steps.append(Step("claim", others[0].rule, "refused", text[0].upper() + text[1:]))
        elif others:
            steps.append(Step("claim", identity.rule, "held", f"Shared with other users of the Hub: {what}."))
        else:
            steps.append(Step("claim", identity.rule, "ok", f"{'Held already' if own else 'Free'}: {what}."))
    stale = [one for one in claims.claims_of(tx, identity.owner) if (one.kind, one.name) not in identity.claimed]
    for one in stale:
        text = f"Held from an earlier mapping: the {one.kind.replace('_', ' ')} {one.name}; nobody else gets it."
        steps.append(Step("claim", one.rule, "held", text))
    return steps


def _said(identity: Identity) -> str:
    unix_user = "the gateway's own unix user" if identity.unix_user is None else f"the unix user {identity.unix_user}"
    principal = f" and the principal {identity.principal}" if identity.principal else ""
    centre = f", billed to {identity.cost_center}" if identity.cost_center else ""
    return f"Kernels of {identity.owner} run as {unix_user}{principal}{centre}."
