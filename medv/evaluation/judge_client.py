"""A judge behind an OpenAI-compatible endpoint: one question, asked until there are scores or a reason why there are none.

Servers differ (OpenAI, Azure, OpenRouter, vLLM, Ollama, LM Studio): errors come with any status, content as text or as parts,
and a reply may be anything at all. The key comes from the environment and is removed from every text.
"""

import asyncio
import json
import math
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai

from medv.artifacts import fingerprint
from medv.evaluation.judge import parse_scores

OPENAI = "https://api.openai.com/v1"
KEYS = ("MEDV_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables that may hold the key, the first one that is set
LARGEST = 1 << 20  # bytes of a reply that are read; a judgement has a few thousand
TRANSIENT = (408, 409, 425, 429)  # client errors that are worth another try, as those from 500 are
FATAL = (401, 402, 403, 404, 405)  # errors that hold for every question: nothing more is asked
_FATAL_TEXT = re.compile(  # of errors that hold for every question, whatever their status
    r"insufficient[_ ](?:quota|balance|credit|fund)|exceeded_current_quota|billing_(?:hard_limit|not_active)"
    r"|invalid_api_key|model_not_found|not a valid model|model .{0,80}(?:not found|does not exist)",
    re.IGNORECASE,
)
_FLAGGED = re.compile(r"content_filter|content_policy|moderation|flagged", re.IGNORECASE)
_TRUNCATED = ("length", "content_filter")  # finish reasons of a text whose last word may be cut

Messages = Sequence[Mapping[str, str]]


def key_from_environment() -> str | None:
    """The key that the environment holds, if any; raises ValueError for one that cannot be sent as a header."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"the key in {name} has characters that no key has: set it again")
            return key
    return None


@dataclass(frozen=True)
class Endpoint:
    """Address and settings of a judge. temperature: 0 as in the official run, None to leave it out of the request; timeout:
    seconds for one request in all; delay: the first wait after a failure, doubled each time (seconds); patience: the longest
    wait (seconds).
    """

    base_url: str = OPENAI
    model: str = "gpt-4.1-mini"
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0
    concurrency: int = 4
    attempts: int = 6
    timeout: float = 120.0
    delay: float = 1.0
    patience: float = 300.0

    def __post_init__(self):
        try:
            url = httpx2.URL(self.base_url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"the base URL is not an address ({error}): give one like {OPENAI}") from None
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError(f"the base URL must be like {OPENAI}, without user name, query or key")
        if url.port is not None and not 0 < url.port < 1 << 16:
            raise ValueError(f"the base URL has port {url.port}, but ports go from 1 to 65535")
        if not self.key and url.host == httpx2.URL(OPENAI).host:
            raise ValueError(f"{url.host} needs a key: set {' or '.join(KEYS)} in the environment")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"the judge's temperature is {self.temperature}, but must be from 0 to 2, or none")
        waits = (self.timeout, self.delay, self.patience)
        if min(self.concurrency, self.attempts) < 1 or self.timeout <= 0 or not all(0 <= w < math.inf for w in waits):
            raise ValueError("concurrency and attempts are at least 1, the timeout is positive, waits are not negative")

    def body(self, messages: Messages) -> dict[str, Any]:
        """The JSON of one request; it sets no limit of tokens."""
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, **temperature, "messages": list(messages)}

    def content_hash(self, messages: Messages) -> str:
        """The sha256 of everything that decides a reply: address, model, temperature, messages."""
        return fingerprint(self.base_url.rstrip("/"), self.body(messages))

    def without_key(self, text: str) -> str:
        """The text with "[key]" in place of the key."""
        return text.replace(self.key, "[key]") if self.key else text


@dataclass(eq=False)
class Failure(Exception):
    """A request without scores. reply: the judge's text, if there was one; retry: another try may help; fatal: it holds for
    every question; shared: no question is asked before the next try; wait: seconds until then, if the endpoint says so.
    """

    reason: str
    reply: str | None = None
    retry: bool = True
    fatal: bool = False
    shared: bool = False
    wait: float | None = None

    def __str__(self) -> str:
        return self.reason


class Judge:
    """A judge that several tasks may ask at once. A rate limit that one of them meets makes all of them wait.

    `stopped` is the reason why no question can be judged any more, once there is one. Raises ValueError where the
    environment's settings of proxies or certificates cannot be used.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.stopped, self._not_before = endpoint, "", 0.0
        self._stop = asyncio.Event()
        try:
            web = openai.DefaultAsyncHttpxClient(
                timeout=None,
                follow_redirects=False,  # the key and the questions go to no other address
                event_hooks={"response": [_read_bounded]},
            )
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            raise ValueError(
                f"the environment's proxy or certificate settings cannot be used ({error}): mend or unset ALL_PROXY, "
                "HTTP_PROXY, HTTPS_PROXY, NO_PROXY or SSL_CERT_FILE"
            ) from None
        self.client = openai.AsyncOpenAI(
            api_key=endpoint.key or "none",
            base_url=endpoint.base_url,
            http_client=web,
            timeout=None,  # the clock in `_attempt` counts all parts of a request together
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},
        )

    async def ask(self, messages: Messages) -> str:
        """The judge's text, with two scores that can be read. Raises Failure after the last attempt."""
        endpoint, chance = self.endpoint, random.Random(self.endpoint.content_hash(messages))
        attempt = 0
        while True:
            attempt += 1
            while not self.stopped and (left := self._not_before - time.monotonic()) > 0:
                await self._sleep(left)
            if self.stopped:
                raise Failure(self.stopped)
            try:
                return endpoint.without_key(await self._attempt(messages))
            except Failure as caught:
                failure = caught
            failure.reason = endpoint.without_key(failure.reason)
            failure.reply = endpoint.without_key(failure.reply or "") or None
            backoff = min(endpoint.delay * 2 ** min(attempt - 1, 30) * (0.5 + chance.random()), endpoint.patience)
            seconds = backoff if failure.wait is None else failure.wait
            if failure.retry and seconds > endpoint.patience:
                failure.reason += f" and asks to wait {seconds:.0f} s, which is too long"
                failure.retry, failure.fatal = False, True
            elif failure.retry and attempt == endpoint.attempts:
                failure.reason += f", {attempt} times tried"
                failure.retry = False
            if not failure.retry:
                if failure.fatal and not self.stopped:
                    self.stopped = failure.reason
                    self._stop.set()
                raise failure
            if failure.shared:
                self._not_before = max(self._not_before, time.monotonic() + seconds)
            else:
                await self._sleep(seconds)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _attempt(self, messages: Messages) -> str:
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                headers = {} if self.endpoint.key else {"Authorization": openai.Omit()}
                create = self.client.chat.completions.with_raw_response.create
                response = (await create(**self.endpoint.body(messages), extra_headers=headers)).http_response
        except TimeoutError:
            raise Failure(f"no whole reply in {self.endpoint.timeout:g} s") from None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            raise _connection_failure(error) from None
        body = self.endpoint.without_key(response.content.decode("utf-8", "replace"))
        return read_reply(response.status_code, response.headers, body, self.endpoint.temperature)


async def _read_bounded(response: httpx2.Response) -> None:
    """Read the whole body here, as long as it is not too large."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Failure("the endpoint sends a compressed reply, though none was asked for")
    stream, body = response.stream, b""
    async for piece in stream:
        body += piece
        if len(body) > LARGEST:
            raise Failure(f"the reply has more than {LARGEST} bytes")
    await stream.aclose()
    response.stream = httpx2.ByteStream(body)


def read_reply(status: int, headers: Mapping[str, str], body: str, temperature: float | None) -> str:
    """The judge's text, with two scores that can be read; raises Failure for any other reply."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if status != 200 or _error_in(value):
        raise _refusal(status, headers, _error_in(value) or value, body, temperature)
    text, end = _completion(value)
    try:
        parse_scores(text.rpartition("\n")[0] if end in _TRUNCATED else text)
    except ValueError as error:
        reason = f"the judge's reply has no scores: {error}" if text.strip() else "the judge's reply has no text"
        reason += "" if end == "stop" else f" (it ended by {end!r})"
        raise Failure(reason, reply=text or None, retry=temperature != 0) from None
    return text


def _error_in(value: Any) -> Any:
    """The error that a reply carries, whatever its status."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    return value.get("error") or first.get("error") or (value if value.get("object") == "error" else None)


def _refusal(status: int, headers: Mapping[str, str], error: Any, body: str, temperature: float | None) -> Failure:
    """The failure of a reply without a completion; `error` is what it carries, in any form."""
    fields = error if isinstance(error, dict) else {}
    message = " ".join(str(fields.get("message") or fields.get("detail") or error or body).split())[:300]
    failure = Failure(f"the endpoint answers {status} ({message!r})")
    if status == 200:
        status = {str(code): code for code in range(400, 600)}.get(str(fields.get("code")), 500)
    fatal = status in FATAL or _FATAL_TEXT.search(body[:4000]) is not None
    if 300 <= status < 400:
        fatal = True
        failure.reason += ": redirects are not followed, so give the address itself as the base URL"
    elif status in (400, 422) and "temperature" in message and temperature is not None:
        fatal = True
        failure.reason += ": leave the temperature out with --temperature none"
    if fatal or (status not in TRANSIENT and status < 500):
        failure.retry, failure.fatal = False, fatal and not _FLAGGED.search(body[:4000])
    else:
        failure.wait = _retry_after(headers)
        failure.shared = status == 429 or failure.wait is not None
    return failure


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None where it is absent or makes no sense."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
        return seconds if seconds >= 0 else None
    except ValueError:
        with suppress(TypeError, ValueError, OverflowError):
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _completion(value: Any) -> tuple[str, str]:
    """The text of a completion, and why it ended; raises Failure for one of another form."""
    try:
        choice = value["choices"][0]
        message = choice["message"]
        content, refused = message.get("content"), message.get("refusal")
    except (LookupError, TypeError, AttributeError):
        raise Failure("the endpoint's reply is not a chat completion") from None
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        refused = refused or next((part["refusal"] for part in parts if part.get("refusal")), None)
        content = "".join(str(part.get("text", "")) for part in parts if part.get("type") in ("text", "output_text"))
    if refused:
        raise Failure(f"the judge refuses ({str(refused)[:160]!r})", retry=False)
    text = content if isinstance(content, str) else ""
    # a lone surrogate could not be written
    return text.encode("utf-8", "replace").decode("utf-8"), str(choice.get("finish_reason") or "stop")[:40]


def _connection_failure(error: Exception) -> Failure:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    tls, name, connection = (
        next((cause for cause in causes if isinstance(cause, kind)), None)
        for kind in (ssl.SSLError, socket.gaierror, httpx2.ConnectError | httpx2.ProxyError)
    )
    if tls or name or connection:
        reason = f"the endpoint cannot be reached ({tls or name or connection}): is the base URL right?"
        return Failure(reason, retry=not tls and (not name or name.errno == socket.EAI_AGAIN), fatal=True)
    return Failure(f"the connection broke ({type(causes[min(1, len(causes) - 1)]).__name__})")
