"""What a reply of an OpenAI-compatible endpoint means: the judge's text, or why there is none and whether to ask again.

Servers differ (OpenAI, Azure, OpenRouter, vLLM, Ollama, LM Studio): errors come with any status, content as text or as parts,
and a reply may be anything at all. It sends nothing: see `judging`.
"""

import json
import re
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from medv.evaluation.judge import parse_scores

PASSING = (408, 409, 425, 429)
"""Client errors that pass, as those from 500 do; others mean that the request will never do."""
REFUSED = (401, 402, 403, 404, 405)
"""Errors that hold for every question: nothing more is asked."""
_FINAL = re.compile(
    r"insufficient[_ ](?:quota|balance|credit|fund)|exceeded_current_quota|billing_(?:hard_limit|not_active)"
    r"|invalid_api_key|model_not_found|not a valid model|model .{0,80}(?:not found|does not exist)",
    re.IGNORECASE,
)
"""What errors say, whatever their status, that hold for every question."""
_FLAGGED = re.compile(r"content_filter|content_policy|moderation|flagged", re.IGNORECASE)
_TORN = ("length", "content_filter")
"""Ends of a text that may tear its last word."""


@dataclass(eq=False)
class Failure(Exception):
    """No scores: `reason`, and `reply`, the judge's text, if there was one. again: another try may help; stops: it holds for
    every question; holds: nobody should ask before the next try; wait: the seconds until then, if the endpoint says so.
    """

    reason: str
    reply: str | None = None
    again: bool = True
    stops: bool = False
    holds: bool = False
    wait: float | None = None

    def __str__(self) -> str:
        return self.reason


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
        parse_scores(text.rpartition("\n")[0] if end in _TORN else text)
    except ValueError as error:
        words = f"the judge's reply has no scores: {error}" if text.strip() else "the judge's reply has no text"
        words += "" if end == "stop" else f" (it ended by {end!r})"
        raise Failure(words, reply=text or None, again=temperature != 0) from None
    return text


def _refusal(status: int, headers: Mapping[str, str], error: Any, body: str, temperature: float | None) -> Failure:
    """What a reply without a completion means; `error` is what it says of it, in any form."""
    fields = error if isinstance(error, dict) else {}
    said = " ".join(str(fields.get("message") or fields.get("detail") or error or body).split())[:300]
    failure = Failure(f"the endpoint answers {status} ({said!r})")
    if status == 200:
        status = {str(code): code for code in range(400, 600)}.get(str(fields.get("code")), 500)
    final = status in REFUSED or _FINAL.search(body[:4000]) is not None
    if 300 <= status < 400:
        final = True
        failure.reason += ": redirects are not followed, so give the address itself as the base URL"
    elif status in (400, 422) and "temperature" in said and temperature is not None:
        final = True
        failure.reason += ": leave the temperature out with --temperature none"
    if final or (status not in PASSING and status < 500):
        failure.again, failure.stops = False, final and not _FLAGGED.search(body[:4000])
    else:
        failure.wait = _retry_after(headers)
        failure.holds = status == 429 or failure.wait is not None
    return failure


def broken(error: Exception) -> Failure:
    """What a connection that failed means."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    tls, name, connection = (
        next((cause for cause in causes if isinstance(cause, kind)), None)
        for kind in (ssl.SSLError, socket.gaierror, httpx2.ConnectError | httpx2.ProxyError)
    )
    if tls or name or connection:
        words = f"the endpoint cannot be reached ({tls or name or connection}): is the base URL right?"
        return Failure(words, again=not tls and (not name or name.errno == socket.EAI_AGAIN), stops=True)
    return Failure(f"the connection broke ({type(causes[min(1, len(causes) - 1)]).__name__})")


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


def _error_in(value: Any) -> Any:
    """The error that a reply carries, whatever its status."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    return value.get("error") or first.get("error") or (value if value.get("object") == "error" else None)


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
        raise Failure(f"the judge refuses ({str(refused)[:160]!r})", again=False)
    text = content if isinstance(content, str) else ""
    # a lone surrogate could not be written
    return text.encode("utf-8", "replace").decode("utf-8"), str(choice.get("finish_reason") or "stop")[:40]
