"""Notices about limits to a webhook and by e-mail; none of them can fail anything else.

What is shown in notebooks is `hub_gateway.kernels.notices`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import smtplib
from collections.abc import Awaitable, Callable, Mapping
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest
from tornado.simple_httpclient import HTTPTimeoutError
from traitlets import Bool, Float, List, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.deadlines import within
from hub_gateway.metrics import METRICS

__all__ = ["Notifier"]

PASSING = (408, 425, 429)
"""Answers 4xx that say: later. (Tornado says 599 where there was no answer.)"""


class Notifier(LoggingConfigurable):
    """Sends notices: of a process that is killed before one is sent nobody else sends it."""

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
    retry_seconds = List(
        Float(),
        [5.0, 60.0, 600.0],
        help="How long (seconds) to wait before what could not be sent is tried again, each time. What was refused "
        "for good (an SMTP code 5xx, an HTTP status 3xx or 4xx except 408, 425 and 429) is not.",
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sending: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    def tell(self, owner: str, policy: str, event: str, sentence: str) -> None:
        """Tell an owner something about a limit; returns at once."""
        found = {"user": owner, "policy": policy, "event": event, "sentence": sentence}
        if self.webhook_url:
            self._start("webhook", lambda: self._post(found))
        if self.smtp_server:
            self._start("email", lambda: self._mail(owner, policy, sentence))

    async def close(self) -> None:
        """Let what is under way end; what waits to be tried again is tried now, for the last time."""
        self._closing.set()
        if self._sending:
            await asyncio.wait(self._sending, timeout=self.timeout)

    def _start(self, channel: str, send: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(self._try(channel, send))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _try(self, channel: str, send: Callable[[], Awaitable[None]]) -> None:
        """Send it, again after a while where that may help."""
        for wait in (*self.retry_seconds, None):
            try:
                await send()
            except (HTTPError, HTTPTimeoutError, OSError, smtplib.SMTPException, ValueError) as error:
                if wait is None or self._closing.is_set() or _for_good(error):
                    METRICS.notices.labels(channel, "failed").inc()
                    self.log.warning("A notice could not be sent by %s: %s", channel, error)
                    return
                self.log.info("A notice is sent by %s again in %.0f s: %s", channel, wait, error)
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(self._closing.wait(), wait)
            else:
                METRICS.notices.labels(channel, "sent").inc()
                return

    async def _post(self, found: Mapping[str, str]) -> None:
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

    async def _mail(self, owner: str, policy: str, sentence: str) -> None:
        message = EmailMessage()
        message["Subject"] = f"Your remote kernels: limit {policy}"
        message["From"] = self.mail_from
        message["To"] = self.mail_to.replace("{user}", owner)
        message.set_content(f"{sentence}\n")
        await asyncio.to_thread(self._send, message)

    def _send(self, message: EmailMessage) -> None:
        host, _, port = self.smtp_server.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=self.timeout) as server:
            if self.smtp_starttls:
                server.starttls()
            server.send_message(message)


def _for_good(error: Exception) -> bool:
    """Whether the same notice would be refused again."""
    if isinstance(error, HTTPError) and error.code not in PASSING:
        return error.code < 500
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= 500 for code, _ in error.recipients.values())
    if isinstance(error, smtplib.SMTPResponseException):
        return error.smtp_code >= 500
    return isinstance(error, ValueError | smtplib.SMTPNotSupportedError)
