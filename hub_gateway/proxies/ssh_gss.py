"""Logging in by Kerberos (gssapi-with-mic, RFC 4462), which paramiko 5 left out: an `AuthSource` of our own.

It stands on a few methods of paramiko that have an underscore; that is why its version is bounded. Imported where it is
used: paramiko takes a while, and gssapi is optional.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paramiko
from paramiko.auth_handler import AuthOnlyHandler
from paramiko.auth_strategy import AuthSource, AuthStrategy
from paramiko.message import Message
from paramiko.transport import ServiceRequestingTransport

from hub_gateway.identity import kerberos
from hub_gateway.identity.krb5errors import CLOCKS, NoTicket, code_of, reason
from hub_gateway.identity.s4u import ConstrainedDelegation
from hub_gateway.proxies.ssh_pool import Problem, SshError

__all__ = ["delegated_arguments", "gss_arguments", "keytab_arguments"]

KRB5 = bytes([0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x12, 0x01, 0x02, 0x02])
"""The DER of Kerberos's object identifier, 1.2.840.113554.1.2.2."""
REQUEST = bytes([50])
CHOSEN, TOKEN, ERROR, ERROR_TOKEN, MIC = 60, 61, 64, 65, 66
METHOD = "gssapi-with-mic"
NOTHING = "the gateway has nothing to log in with"


def keytab_arguments(keytab: Path, principal: str, name: str, login: str) -> dict[str, Any]:
    """Arguments for `paramiko.SSHClient.connect` that log in with the tickets of a principal.

    `name` is the host's in Kerberos. Blocks. Raises `SshError`, and `Unavailable` without tickets.
    """
    if why := kerberos.missing():
        raise SshError(Problem.REFUSED, why)
    return gss_arguments(login, name, kerberos.KeytabTickets(keytab, principal).acquire())


def delegated_arguments(delegation: ConstrainedDelegation, person: str, name: str, login: str) -> dict[str, Any]:
    """The same with a person's ticket for the host, which the KDC gives the gateway by constrained delegation.

    Blocks. Raises `SshError` with the KDC's reason, and `Unavailable` without tickets of the gateway's own.
    """
    if why := kerberos.missing():
        raise SshError(Problem.REFUSED, why)
    try:
        credentials = delegation.credentials(person, [_host_name(name)])
    except NoTicket as error:
        raise SshError(Problem.REFUSED, f"{NOTHING}: {error.clause}", hint=error.clause) from error
    return gss_arguments(login, name, credentials)


def gss_arguments(login: str, name: str, credentials: Any) -> dict[str, Any]:
    """The same with GSSAPI credentials. Nothing is delegated."""
    strategy = _Strategy(_Source(login, name, credentials))
    return {"auth_strategy": strategy, "transport_factory": _Transport}


def _host_name(name: str) -> Any:
    gssapi = kerberos.gssapi()
    return gssapi.Name(f"host@{name}", gssapi.NameType.hostbased_service)


class _Handler(AuthOnlyHandler):  # type: ignore[misc]
    """Takes the messages of the exchange (RFC 4462, section 3)."""

    @property
    def _client_handler_table(self) -> dict[int, Any]:
        table: dict[int, Any] = dict(super()._client_handler_table)
        if getattr(self, "auth_method", "") == METHOD:
            # After an error comes the refusal itself, as a message of its own.
            table |= {CHOSEN: self._chosen, TOKEN: self._answered, ERROR: _ignored, ERROR_TOKEN: self._objected}
        return table

    def log_in(self, context: Any, login: str) -> Any:
        """Ask for the method, with what goes after that prepared: the KDC may take its time, in the caller's thread."""
        self.context = context
        self.objection = ""
        self.first = context.step()

        def finish(message: Message) -> None:
            message.add_int(1)
            message.add_string(KRB5)

        return self.send_auth_request(login, METHOD, finish)

    def _chosen(self, message: Message) -> None:
        if message.get_string() != KRB5:
            raise paramiko.SSHException("the host wants another mechanism than Kerberos")
        self._send(TOKEN, self.first)

    def _answered(self, message: Message) -> None:
        token = self.context.step(message.get_string())
        if token:
            self._send(TOKEN, token)
        if self.context.complete:
            signed = Message()
            signed.add_string(self.transport.session_id)
            signed.add_byte(REQUEST)
            for text in (self.username, "ssh-connection", METHOD):
                signed.add_string(text)
            self._send(MIC, self.context.get_signature(signed.asbytes()))

    def _objected(self, message: Message) -> None:
        """The host's Kerberos says what is wrong with the ticket, in a token for ours."""
        try:
            self.context.step(message.get_string())
        except kerberos.gssapi().exceptions.GSSError as error:
            # The ticket is good by the KDC's clock: by what clock it is not yet, or no more, is the host's affair.
            of_time = code_of(error) in (32, 33, 37)
            self.objection = CLOCKS if of_time else reason(error, client=self.username)

    def _send(self, kind: int, token: bytes) -> None:
        message = Message()
        message.add_byte(bytes([kind]))
        message.add_string(token)
        self.transport._send_message(message)


def _ignored(message: Message) -> None:
    pass


class _Transport(ServiceRequestingTransport):  # type: ignore[misc]
    def get_auth_handler(self) -> _Handler:
        return _Handler(self)


class _Source(AuthSource):  # type: ignore[misc]
    def __init__(self, login: str, name: str, credentials: Any) -> None:
        super().__init__(login)
        self.name = name
        self.credentials = credentials

    def __repr__(self) -> str:
        return METHOD

    def authenticate(self, transport: Any) -> Any:
        gssapi = kerberos.gssapi()
        transport.ensure_session()
        flags = gssapi.RequirementFlag
        try:
            context = gssapi.SecurityContext(
                name=_host_name(self.name),
                creds=self.credentials,
                mech=gssapi.MechType.kerberos,
                flags=flags.mutual_authentication | flags.integrity,
                usage="initiate",
            )
            return transport.auth_handler.log_in(context, self.username)
        except paramiko.AuthenticationException as error:
            if objection := transport.auth_handler.objection:
                raise paramiko.AuthenticationException(objection) from error
            raise
        except gssapi.exceptions.GSSError as error:
            why = reason(error, client=self.username, service=f"host/{self.name}")
            raise paramiko.AuthenticationException(f"no Kerberos ticket for host/{self.name}: {why}") from error


class _Strategy(AuthStrategy):  # type: ignore[misc]
    def __init__(self, source: _Source) -> None:
        super().__init__(ssh_config=paramiko.SSHConfig())
        self.source = source

    def get_sources(self) -> Any:
        yield self.source
