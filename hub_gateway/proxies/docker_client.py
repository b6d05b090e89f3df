"""One Docker daemon: its API, called in a bounded pool of threads, and its errors as sentences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from hub_gateway.deadlines import within
from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies.threads import to_its_end

if TYPE_CHECKING:
    from docker.errors import APIError

__all__ = ["DockerDaemon", "errors", "fault_of_logins", "last_words", "refusal", "said"]

T = TypeVar("T")
PROGRESS_SECONDS = 2.0
SILENT_SECONDS = 10.0
"""After so long without news of an image it is said that it is still waited for."""
PULLS = 8
"""How many images are fetched at once."""


def errors() -> Any:
    """docker's exceptions. To import it takes time and 15 MB, which a gateway without Docker saves."""
    import docker.errors

    return docker.errors


class DockerDaemon:
    """Calls a daemon. `timeout` (seconds) is how long it may be silent, `threads` how many calls run at once.

    `logins` is the file of logins for registries; empty: that of the process's own account.

    What the daemon itself refuses is raised as docker's `APIError`; where it does not answer, `Unavailable`.
    """

    def __init__(
        self, url: str, *, timeout: float, threads: int, tls: Mapping[str, str] | None = None, logins: str = ""
    ) -> None:
        self.url = url
        self._logins = logins
        self._timeout = timeout
        self._tls = dict(tls or {})
        self._most = threads + PULLS + 1
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        # A pull takes minutes; it must not hold the place of what takes milliseconds.
        self._pulls = ThreadPoolExecutor(PULLS, thread_name_prefix="docker-pull")
        self._pulling: dict[str, _Pull] = {}
        self._lock = threading.Lock()
        self._api: Any = None

    def close(self) -> None:
        """Let go of connections and threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pulls.shutdown(wait=False, cancel_futures=True)
        if self._api is not None:
            self._api.close()

    def connect(self) -> Any:
        """docker's low-level client, its version agreed with the daemon. Blocks. Raises `Unavailable`."""
        import docker

        with self._lock, self._heard():
            if self._api is None:
                tls = (
                    docker.tls.TLSConfig(
                        client_cert=(self._tls["cert"], self._tls["key"]), ca_cert=self._tls["ca"], verify=True
                    )
                    if self._tls
                    else None
                )
                # A connection for each call that may run at once; beyond that they would be made anew each time.
                self._api = docker.api.client.APIClient(
                    base_url=self.url,
                    version="auto",
                    timeout=self._timeout,
                    tls=tls or False,
                    max_pool_size=self._most,
                )
            return self._api

    async def change(self, call: Callable[[Any], T]) -> T:
        """Call what changes something, to its end: a call that is cancelled has still done what it was doing."""
        return await to_its_end(asyncio.get_running_loop().run_in_executor(self._threads, self._call, call))

    async def ask(self, call: Callable[[Any], T]) -> T:
        """Call what changes nothing; one that is cancelled goes on by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, call)

    def _call(self, call: Callable[[Any], T]) -> T:
        api = self.connect()
        with self._heard():
            return call(api)

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except errors().APIError:
            raise
        except OSError as error:  # also all that requests raises
            raise self._unavailable(error) from error
        except errors().DockerException as error:  # among others, it wraps what went wrong at the first call
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(
            "Docker cannot be reached at the moment, so nothing is known of its kernels; try again in a minute, "
            "or tell the administrator.",
            hint=f"{self.url}: {error}",
        )

    def connect_with_logins(self) -> Any:
        """As `connect`, for what fetches an image: with the logins as they are now. Raises `LaunchFailed`."""
        api = self.connect()
        if self._logins:
            if fault := fault_of_logins(self._logins):
                raise LaunchFailed(
                    "The gateway's logins for image registries cannot be used; ask the administrator.", hint=fault
                )
            api.reload_config(self._logins)
        return api

    # What takes more than one call

    async def start(self, container: str, document: bytes) -> None:
        """Start a container and give it a document on standard input, to its end."""

        def start(api: Any) -> None:
            stream = api.attach_socket(container, params={"stdin": 1, "stream": 1})
            raw: socket.socket = getattr(stream, "_sock", stream)
            try:
                api.start(container)
                raw.settimeout(self._timeout)
                raw.sendall(document)
                raw.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    raw.recv(1)  # the daemon ends the connection when all of it has been passed on
            finally:
                stream.close()

        await self.change(start)

    async def pull(self, image: str, seconds: float) -> AsyncGenerator[str, None]:
        """Fetch an image; sentences of how far it is, every few seconds. Raises `LaunchFailed`.

        Whoever wants one that is being fetched already waits for it, too.
        """
        pull = self._pulling.get(image)
        if pull is None:
            pull = self._pulling[image] = _Pull(image, asyncio.get_running_loop())
            pull.task = pull.loop.run_in_executor(self._pulls, self._fetch, pull)
            pull.task.add_done_callback(lambda _: self._ended(pull))
        news = pull.join()
        try:
            ends = pull.loop.time() + seconds
            while not pull.task.done() or not news.empty():
                try:
                    sentence = await within(news.get(), SILENT_SECONDS)
                except asyncio.TimeoutError:
                    sentence = (
                        f"The image {image} is still waited for; its registry says nothing, or others come first."
                    )
                if sentence is None:
                    break
                if pull.loop.time() > ends:
                    raise LaunchFailed(
                        f"The image {image} was not there after {seconds:.0f} seconds of fetching it; try again, "
                        "or ask the administrator to fetch it beforehand."
                    )
                yield sentence
            await asyncio.shield(pull.task)
        finally:
            pull.leave(news)
            if not pull.wanted:
                self._forget(pull)

    def _ended(self, pull: _Pull) -> None:
        self._forget(pull)
        pull.end()

    def _forget(self, pull: _Pull) -> None:
        """Whoever wants the image from now on has it fetched anew."""
        if self._pulling.get(pull.image) is pull:
            del self._pulling[pull.image]

    def _fetch(self, pull: _Pull) -> None:
        """Fetch it, in a thread."""
        told = time.monotonic()
        layers: dict[str, tuple[bool, int, int]] = {}
        repository, tag = _split(pull.image)
        try:
            with self._heard():
                for event in self.connect_with_logins().pull(repository, tag=tag, stream=True, decode=True):
                    now = time.monotonic()
                    if not pull.wanted:
                        return
                    if "error" in event:
                        raise pull_refusal(pull.image, str(event["error"]))
                    _note(layers, event)
                    if layers and now - told > PROGRESS_SECONDS:
                        told = now
                        pull.tell(_progress(pull.image, layers))
        except errors().APIError as error:
            raise pull_refusal(pull.image, said(error)) from error


class _Pull:
    """An image that is being fetched, for as many as wait for it."""

    task: asyncio.Future[None]

    def __init__(self, image: str, loop: asyncio.AbstractEventLoop) -> None:
        self.image = image
        self.loop = loop
        self._waiting: set[asyncio.Queue[str | None]] = set()
        self.wanted = True

    def join(self) -> asyncio.Queue[str | None]:
        """What one who waits for it hears: sentences, None at the end."""
        news = asyncio.Queue[str | None]()
        self._waiting.add(news)
        return news

    def leave(self, news: asyncio.Queue[str | None]) -> None:
        """Wait no more; what nobody waits for is fetched no further."""
        self._waiting.discard(news)
        self.wanted = bool(self._waiting)

    def tell(self, sentence: str) -> None:
        """Have everybody hear it who waits; from a thread."""
        with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
            self.loop.call_soon_threadsafe(self._tell, sentence)

    def end(self) -> None:
        """Have everybody hear that it has ended, in whatever way."""
        if not self.task.cancelled():
            self.task.exception()  # perhaps nobody waits for it any more
        self._tell(None)

    def _tell(self, sentence: str | None) -> None:
        for news in self._waiting:
            news.put_nowait(sentence)


def _split(image: str) -> tuple[str, str]:
    import docker

    name, tag = docker.utils.utils.parse_repository_tag(image)
    return str(name), str(tag or "latest")


def _note(layers: dict[str, tuple[bool, int, int]], event: Mapping[str, Any]) -> None:
    layer, status = event.get("id"), str(event.get("status", ""))
    if not layer or status.startswith(("Pulling from", "Digest")):
        return
    detail = event.get("progressDetail") or {}
    _, current, total = layers.get(layer, (False, 0, 0))
    if status == "Downloading":
        current, total = int(detail.get("current") or current), int(detail.get("total") or total)
    layers[layer] = (status in ("Pull complete", "Already exists"), current, total)


def _progress(image: str, layers: Mapping[str, tuple[bool, int, int]]) -> str:
    done = sum(complete for complete, _, _ in layers.values())
    current, total = sum(one[1] for one in layers.values()), sum(one[2] for one in layers.values())
    amount = f", {current / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else ""
    return f"Fetching the image {image}: {done} of {len(layers)} layers{amount}."


# Errors as sentences


def said(error: APIError) -> str:
    """What the daemon says, on one line."""
    text = str(error.explanation or error)
    with contextlib.suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message", text))
    return " ".join(text.split())[:500].rstrip(".")


def pull_refusal(image: str, text: str) -> LaunchFailed:
    """Why an image cannot be fetched."""
    text = " ".join(text.split())[:500].rstrip(".")
    if "denied" in text:
        why = "there is none of this name, or the gateway's login may not have it"
    elif re.search(r"unauthorized|no basic auth|docker login", text):
        why = "its registry asks for a login, and the gateway has none that it takes"
    elif re.search(r"manifest unknown|not found", text):
        why = "its registry has none of this name and tag"
    else:
        why = "its registry cannot be asked for it"
    return LaunchFailed(
        f"The image {image} is not on the Docker host and cannot be fetched, as {why}; "
        f"check its name, or ask the administrator. Docker says: {text}.",
        hint="logins for registries: `registry_logins` of the proxy, or `docker login` of the gateway's account",
    )


def fault_of_logins(path: str) -> str:
    """What is wrong with a file of logins, as `docker login` writes it; empty: nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            open_to_all = os.fstat(file.fileno()).st_mode & 0o007
            found = json.load(file)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except ValueError:
        return f"{path} is not JSON"
    if not isinstance(found, dict) or not isinstance(found.get("auths", {}), dict):
        return f"{path} has not the form that `docker login` writes"
    if open_to_all:
        return f"every user of this machine may use {path}; chmod 600 it"
    try:
        _read_logins(path)
    except (ValueError, errors().DockerException):
        return f"{path} has a login that cannot be read; write it anew by `docker login`"
    return ""


def _read_logins(path: str) -> None:
    import docker.auth

    docker.auth.load_config(path)


REFUSALS = (
    (
        r"[Nn]o such image",
        "There is no image {image} on the Docker host; check its name, or ask the administrator to fetch it",
    ),
    (
        r"executable file not found|exec: .*no such file|tini .*exec \S+ failed",
        "The image {image} has no {python}, which the kernel's agent needs; choose an image with Python and pyzmq",
    ),
    (
        r"bind source path does not exist",
        "A directory that the kernel is to have is not there on the Docker host; ask the administrator",
    ),
    (r"device or resource busy", "The Docker host is too busy to start the kernel; try again in a minute"),
    (r"no space left", "The Docker host has no disk space left; ask the administrator, and try again later"),
    (r"could not select device driver|nvidia", "Docker can give no GPU on its host; choose a kernel without GPU"),
    (r"network .*not found", "The network that the kernel is to join does not exist; ask the administrator"),
    (
        r"Range of CPUs|[Mm]inimum memory limit",
        "The Docker host cannot give the kernel the cpu or memory that it asks for; ask for another amount",
    ),
)


def refusal(error: APIError, *, image: str, python: str) -> LaunchFailed:
    """Why a container or a service could not be made or started, with the daemon's own words."""
    return LaunchFailed(refusal_of(said(error), image=image, python=python))


def refusal_of(text: str, *, image: str, python: str) -> str:
    """A sentence of what happened and what to do, by what Docker says."""
    text = text.rstrip(".")
    for pattern, sentence in REFUSALS:
        if re.search(pattern, text):
            return f"{sentence.format(image=image, python=python)}. Docker says: {text}."
    return f"Docker refused to start the kernel; ask the administrator. Docker says: {text}."


def last_words(reason: str, output: str, *, image: str, python: str) -> str:
    """Why an agent ended before it listened, by what became of its container and what it wrote."""
    text = " / ".join(output.split("\n")).strip(" /")
    if "No module named 'zmq'" in text:
        return (
            f"The image {image} has no pyzmq for its {python}, which the kernel's agent needs; choose an image "
            "with it, or ask the administrator."
        )
    if not text or re.search(REFUSALS[1][0], text):
        return refusal_of(text or reason, image=image, python=python)
    return f"The kernel's agent ended before it was up: {reason}. It said: {text}"
