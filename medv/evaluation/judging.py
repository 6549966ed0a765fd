"""`medv judge`: every answer to a judge behind an OpenAI-compatible endpoint, until each is judged or has a reason why not.

Replies are kept by the hash of what was asked, each as soon as it arrives, so that a killed run asks only for the rest. The key
comes from the environment and is blotted out of whatever is written. Table 1's judge is GPT-4.1 mini; another judge gives other
numbers. How a reply is read and counted is in `judge`.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from tqdm.auto import tqdm

from medv.artifacts import fingerprint, write_json, write_text
from medv.data.rows import read_rows
from medv.evaluation.judge import JudgeScores, collect, judge_messages, parse_scores
from medv.reading import DataError

OPENAI = "https://api.openai.com/v1"
KEYS = ("MEDV_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first one that is set."""
LARGEST = 1 << 20
"""Bytes of a reply that are read; a judgement has a few thousand."""
PASSING = (408, 409, 425, 429)
"""Client errors that pass; all others but these mean that the request will never do."""
REFUSED = (401, 403, 404)
"""Answers that hold for every question: nothing more is asked."""
WAITING = "not asked yet"


def key_from_environment() -> str | None:
    """The key that the environment holds, if any; raises ValueError for one that cannot be sent as a header."""
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the key in {name} has characters that no key has: set it again")
    return key


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how it is asked. timeout: seconds for one request in all; delay: the first wait after a failure,
    doubled each time (seconds); patience: the longest wait that an endpoint may ask for (seconds).
    """

    base_url: str = OPENAI
    model: str = "gpt-4.1-mini"
    key: str | None = field(default=None, repr=False)
    concurrency: int = 4
    attempts: int = 6
    timeout: float = 120.0
    delay: float = 1.0
    patience: float = 300.0

    def __post_init__(self):
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"the base URL is not an address ({error}): give one like {OPENAI}") from None
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError(f"the base URL must be like {OPENAI}, without user name, query or key")
        if not self.key and url.host == httpx.URL(OPENAI).host:
            raise ValueError(f"{url.host} needs a key: set {' or '.join(KEYS)} in the environment")
        if min(self.concurrency, self.attempts) < 1 or self.timeout <= 0 or min(self.delay, self.patience) < 0:
            raise ValueError("concurrency and attempts are at least 1, the timeout is positive, waits are not negative")

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The JSON of one request; temperature 0, as in the official run."""
        return {"model": self.model, "temperature": 0, "messages": list(messages)}

    def content_hash(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The sha256 of everything that decides a reply: address, model, temperature, messages."""
        return fingerprint(self.base_url.rstrip("/"), self.body(messages))

    def blot(self, text: str) -> str:
        """The text without the key, should a reply repeat it."""
        return text.replace(self.key, "[key]") if self.key else text


class GaveUp(Exception):
    """No scores from this question; `reply` is the last text of the judge, if there was one."""

    def __init__(self, reason: str, reply: str | None = None):
        super().__init__(reason)
        self.reply = reply


class _Passing(Exception):
    """A failure worth another try, after `wait` seconds if the endpoint says so; `holds`: everybody should wait."""

    def __init__(self, reason: str, *, reply: str | None = None, wait: float | None = None, holds: bool = False):
        super().__init__(reason)
        self.reply, self.wait, self.holds = reply, wait, holds


class Judge:
    """A judge that several threads may ask at once. A rate limit that one of them meets makes all of them wait."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._stop, self._refused, self._not_before = threading.Event(), "", 0.0
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._client = httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)

    @contextmanager
    def at_work(self) -> Iterator["Judge"]:
        """Close the connections, and end the waiting of threads, when the block ends."""
        try:
            yield self
        finally:
            self._stop.set()
            self._client.close()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The judge's text, with two scores that can be read. Raises GaveUp, in words, after the last attempt."""
        chance = random.Random(self.endpoint.content_hash(messages))
        failure = _Passing(WAITING)
        for attempt in range(self.endpoint.attempts):
            if attempt:
                own = self.endpoint.delay * 2 ** (attempt - 1) * (0.5 + chance.random())
                self._pause(own if failure.wait is None else failure.wait, failure)
            self._stop.wait(max(0.0, self._not_before - time.monotonic()))
            if self._refused or self._stop.is_set():
                raise GaveUp(self._refused or "the run was stopped", failure.reply)
            try:
                return self._attempt(messages)
            except _Passing as error:
                failure = error
        raise GaveUp(f"{failure}, {self.endpoint.attempts} times tried", failure.reply)

    def _pause(self, seconds: float, failure: _Passing) -> None:
        if seconds > self.endpoint.patience:
            raise GaveUp(f"{failure} and asks to wait {seconds:.0f} s, which is too long", failure.reply)
        if failure.holds:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        else:
            self._stop.wait(seconds)

    def _attempt(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            status, headers, body = self._send(messages)
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError):
                raise _Passing("the endpoint cannot be reached") from None
            raise _Passing(f"the connection broke ({type(error).__name__})") from None
        if status != 200:
            said = f"the endpoint answers {status} ({self.endpoint.blot(body)[:160].strip()!r})"
            if status in PASSING or status >= 500:
                raise _Passing(said, wait=_retry_after(headers), holds=status == 429)
            if status in REFUSED:
                self._refused = said
            raise GaveUp(said)
        text = self.endpoint.blot(_content(body))
        try:
            parse_scores(text)
        except ValueError as error:
            raise _Passing(f"the judge's reply has no scores: {error}", reply=text) from None
        return text

    def _send(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, httpx.Headers, str]:
        """One request. httpx limits the wait for each piece of a reply; the clock here limits them together."""
        deadline, pieces, size = time.monotonic() + self.endpoint.timeout, [], 0
        url, body = f"{self.endpoint.base_url.rstrip('/')}/chat/completions", self.endpoint.body(messages)
        with self._client.stream("POST", url, content=json.dumps(body)) as response:
            for piece in response.iter_bytes():
                pieces.append(piece)
                size += len(piece)
                if time.monotonic() > deadline:
                    raise _Passing(f"no whole reply in {self.endpoint.timeout:g} s")
                if size > LARGEST:
                    raise _Passing(f"the reply has more than {LARGEST} bytes")
            return response.status_code, response.headers, b"".join(pieces).decode("utf-8", "replace")


def _retry_after(headers: httpx.Headers) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None where it is absent or makes no sense."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None


def _content(body: str) -> str:
    """The text of a completion; raises _Passing for a body of another form."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _Passing("the endpoint's reply is not a chat completion") from None
    if not isinstance(text, str):
        raise _Passing("the endpoint's reply has no text")
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate could not be written


# --- A file of answers ---


def judge_file(
    questions: Path, answers: Path, out: Path, endpoint: Endpoint, *, cache: Path | None = None, quiet: bool = False
) -> JudgeScores:
    """Judge an answer file; `out` gets one row per question in order: the question, both answers, and the judge's text in
    `result`, or a `reason` where there are no scores. Returns the scores.

    `out` is whole at any moment. `cache` (default: `judge_cache` beside `out`) keeps every reply that has scores; what it holds
    is not asked again. Raises DataError for questions that cannot be judged or answers that belong to none.
    """
    cache = cache or out.parent / "judge_cache"
    rows, asked = _board(questions, answers, endpoint)
    for place, messages in asked.items():
        text = _recall(cache / f"{endpoint.content_hash(messages)}.json")
        _fill(rows[place], text, None if text else WAITING)
    write = _Writer(out, rows)
    write.now()
    left = {place: messages for place, messages in asked.items() if rows[place].get("reason")}
    with (
        Judge(endpoint).at_work() as judge,
        tqdm(total=len(asked), initial=len(asked) - len(left), desc="judged", unit="question", disable=quiet) as bar,
    ):
        pool = ThreadPoolExecutor(endpoint.concurrency)
        try:
            jobs = {pool.submit(_ask, judge, messages, cache): place for place, messages in left.items()}
            for job in as_completed(jobs):
                _fill(rows[jobs[job]], *job.result())
                write.soon()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            write.now()
    return collect((str(row["question_id"]), row) for row in rows)


class _Writer:
    """Writes the rows whole, now or at most once a second."""

    def __init__(self, out: Path, rows: Sequence[Mapping[str, Any]]):
        self.out, self.rows, self.last = out, rows, 0.0

    def now(self) -> None:
        write_text(self.out, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.last = time.monotonic()

    def soon(self) -> None:
        if time.monotonic() - self.last > 1.0:
            self.now()


def _ask(judge: Judge, messages: Sequence[Mapping[str, str]], cache: Path) -> tuple[str | None, str | None]:
    """The judge's text and why it is of no use, if it is not."""
    try:
        text = judge.ask(messages)
    except GaveUp as error:
        return error.reply, str(error)
    write_json(cache / f"{judge.endpoint.content_hash(messages)}.json", {"result": text})
    return text, None


def _recall(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["result"]
        parse_scores(text)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # spoiled from outside: it is asked for again
    return text


def _fill(row: dict[str, Any], text: str | None, reason: str | None) -> None:
    row.pop("reason", None)
    row |= {"result": text} | ({"reason": reason} if reason else {})


def _board(
    questions: Path, answers: Path, endpoint: Endpoint
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, str]]]]:
    """One row per question, and the messages of those that have an answer, by place."""
    told = _answers_by_id(answers)
    rows, asked = [], {}
    for place, question in enumerate(read_rows(questions)):
        name = str(question.get("question_id", place))
        row = {key: question.get(key) for key in ("type", "domain", "text")} | {"ans1": question.get("gpt4_answer")}
        answer = told.pop(name, None)
        rows.append({"question_id": question.get("question_id", place), **row, "ans2": answer, "judge": endpoint.model})
        if answer is None:
            rows[-1] |= {"result": None, "reason": f"{answers.name} has no answer to it"}
        else:
            asked[place] = _messages(question, answer)
    _unique([str(row["question_id"]) for row in rows], questions)
    if told:
        raise DataError(f"{answers} answers question {next(iter(told))}, which {questions} does not ask")
    return rows, asked


def _messages(question: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    try:
        return judge_messages(question, answer)
    except ValueError as error:
        raise DataError(str(error)) from None


def _answers_by_id(path: Path) -> dict[str, str]:
    rows = read_rows(path)
    names = [str(row.get("question_id", row.get("id", place))) for place, row in enumerate(rows)]
    _unique(names, path)
    texts = [next((row[key] for key in ("text", "answer") if row.get(key) is not None), None) for row in rows]
    bad = next((name for name, text in zip(names, texts, strict=True) if not isinstance(text, str)), None)
    if bad is not None:
        raise DataError(f"{path}: the answer to question {bad} is no text; give it in 'text' (or 'answer')")
    return dict(zip(names, texts, strict=True))


def _unique(names: Sequence[str], path: Path) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} has question {twice} twice: every id must be unique")
