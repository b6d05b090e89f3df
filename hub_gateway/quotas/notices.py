"""Notices about limits to a webhook and by e-mail; none of them can fail anything else.

What is shown in notebooks is `hub_gateway.kernels.notices`.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
from collections.abc import Mapping
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest
from tornado.simple_httpclient import HTTPTimeoutError
from traitlets import Bool, Float, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.metrics import METRICS

__all__ = ["Notifier"]


class Notifier(LoggingConfigurable):
    """Sends notices, once: of a process that is killed while it sends one nobody sends it again."""

    webhook_url = Unicode(
        help="""Where notices are posted, as JSON: `{"user", "policy", "event", "sentence"}`. Empty: nowhere.

        `event` is `soft` (above a soft limit), `over` (above a hard limit, with a grace) or `stopped`.
        """
    ).tag(config=True)
    webhook_token_file = Unicode(
        help="File with a token that is sent to the webhook as `Authorization: Bearer ...`."
    ).tag(config=True)
    smtp_server = Unicode(help="`host:port` of a mail server for notices by e-mail. Empty: no e-mail.").tag(config=True)
    smtp_starttls = Bool(True, help="Whether the connection to the mail server must be encrypted (STARTTLS).").tag(
        config=True
    )
    mail_from = Unicode("hub-gateway@localhost", help="Sender of e-mails.").tag(config=True)
    mail_to = Unicode(
        "{user}", help="Recipient of e-mails; `{user}` is the Hub user's name, as in `{user}@example.org`."
    ).tag(config=True)
    timeout = Float(10.0, help="How long (seconds) webhook and mail server may take.").tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sending: set[asyncio.Task[None]] = set()

    def tell(self, owner: str, policy: str, event: str, sentence: str) -> None:
        """Tell an owner something about a limit; returns at once."""
        found = {"user": owner, "policy": policy, "event": event, "sentence": sentence}
        if self.webhook_url:
            self._start(self._post(found))
        if self.smtp_server:
            self._start(self._mail(owner, policy, sentence))

    async def close(self) -> None:
        """Let what is under way end."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=self.timeout)

    def _start(self, sending: Any) -> None:
        task = asyncio.ensure_future(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _post(self, found: Mapping[str, str]) -> None:
        try:
            headers = {"Content-Type": "application/json"}
            if self.webhook_token_file:
                token = await asyncio.to_thread(Path(self.webhook_token_file).read_text)
                headers["Authorization"] = f"Bearer {token.strip()}"
            request = HTTPRequest(
                self.webhook_url,
                method="POST",
                headers=headers,
                body=json.dumps(found),
                request_timeout=self.timeout,
                connect_timeout=self.timeout,
                follow_redirects=False,
            )
            await AsyncHTTPClient().fetch(request)
        except (HTTPError, HTTPTimeoutError, OSError, ValueError) as error:
            self._failed("webhook", error)
        else:
            METRICS.notices.labels("webhook", "sent").inc()

    async def _mail(self, owner: str, policy: str, sentence: str) -> None:
        try:
            message = EmailMessage()
            message["Subject"] = f"Your remote kernels: limit {policy}"
            message["From"] = self.mail_from
            message["To"] = self.mail_to.replace("{user}", owner)
            message.set_content(f"{sentence}\n")
            await asyncio.to_thread(self._send, message)
        except (OSError, smtplib.SMTPException, ValueError) as error:
            self._failed("email", error)
        else:
            METRICS.notices.labels("email", "sent").inc()

    def _send(self, message: EmailMessage) -> None:
        host, _, port = self.smtp_server.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=self.timeout) as server:
            if self.smtp_starttls:
                server.starttls()
            server.send_message(message)

    def _failed(self, channel: str, error: Exception) -> None:
        METRICS.notices.labels(channel, "failed").inc()
        self.log.warning("A notice could not be sent by %s: %s", channel, error)
