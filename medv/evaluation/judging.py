"""`medv judge`: every answer to a judge behind an OpenAI-compatible endpoint, until each is judged or has a reason why not.

Replies are kept by the hash of what was asked, each as soon as it arrives, so that a killed run asks only for the rest. The key
comes from the environment and is blotted out of whatever is written. Table 1's judge is GPT-4.1 mini; another judge gives other
numbers. What a reply means is in `replies`, how its scores are counted in `judge`.
"""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import openai
from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

from medv.artifacts import fingerprint, write_json, write_text
from medv.data.rows import Row, by_id, read_rows
from medv.evaluation.judge import NEEDED, JudgeScores, collect, judge_messages, parse_scores
from medv.evaluation.replies import Failure, broken, read_reply
from medv.ownership import RUN_KEY, claim_file, hold, owned
from medv.reading import DataError, read_json, read_lines

OPENAI = "https://api.openai.com/v1"
KEYS = ("MEDV_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first one that is set."""
LARGEST = 1 << 20
"""Bytes of a reply that are read; a judgement has a few thousand."""
WAITING = "not asked yet"
MADE_BY = "medv judge"


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
    """Where the judge is and how it is asked. temperature: 0 as in the official run, None to leave it out of the request;
    timeout: seconds for one request in all; delay: the first wait after a failure, doubled each time (seconds); patience: the
    longest wait (seconds).
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

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The JSON of one request; it sets no limit of tokens."""
        warmth = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, **warmth, "messages": list(messages)}

    def content_hash(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The sha256 of everything that decides a reply: address, model, temperature, messages."""
        return fingerprint(self.base_url.rstrip("/"), self.body(messages))

    def blot(self, text: str) -> str:
        """The text without the key, should a reply repeat it."""
        return text.replace(self.key, "[key]") if self.key else text


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
                event_hooks={"request": [self._authorize], "response": [_bound]},
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

    async def _authorize(self, request: httpx2.Request) -> None:
        request.headers.pop("Authorization", None)  # the client sends one even where there is no key
        if self.endpoint.key:
            request.headers["Authorization"] = f"Bearer {self.endpoint.key}"

    async def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The judge's text, with two scores that can be read. Raises Failure, in words, after the last attempt."""
        chance = random.Random(self.endpoint.content_hash(messages))
        blot, attempt = self.endpoint.blot, 0
        while True:
            attempt += 1
            while not self.stopped and (left := self._not_before - time.monotonic()) > 0:
                await self._sleep(left)
            if self.stopped:
                raise Failure(self.stopped)
            try:
                return blot(await self._attempt(messages))
            except Failure as failure:
                failure = replace(failure, reason=blot(failure.reason), reply=blot(failure.reply or "") or None)
                own = self.endpoint.delay * 2 ** min(attempt - 1, 30) * (0.5 + chance.random())
                await self._settle(failure, attempt, min(own, self.endpoint.patience))

    async def _settle(self, failure: Failure, attempt: int, own: float) -> None:
        """Wait for the next attempt; raises the failure where there is none."""
        seconds = own if failure.wait is None else failure.wait
        if failure.again and seconds > self.endpoint.patience:
            words = f"{failure} and asks to wait {seconds:.0f} s, which is too long"
            failure = replace(failure, reason=words, again=False, stops=True)
        elif failure.again and attempt == self.endpoint.attempts:
            failure = replace(failure, reason=f"{failure}, {attempt} times tried", again=False)
        if not failure.again:
            if failure.stops and not self.stopped:
                self.stopped = failure.reason
                self._stop.set()
            raise failure
        if failure.holds:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        else:
            await self._sleep(seconds)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _attempt(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                sent = self.client.chat.completions.with_raw_response.create(**self.endpoint.body(messages))
                response = (await sent).http_response
        except TimeoutError:
            raise Failure(f"no whole reply in {self.endpoint.timeout:g} s") from None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            raise broken(error) from None
        body = self.endpoint.blot(response.content.decode("utf-8", "replace"))
        return read_reply(response.status_code, response.headers, body, self.endpoint.temperature)


class _Bounded(httpx2.AsyncByteStream):
    """The body of a reply, as long as it is not too large."""

    def __init__(self, stream: httpx2.AsyncByteStream):
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self.stream:
            size += len(piece)
            if size > LARGEST:
                raise Failure(f"the reply has more than {LARGEST} bytes")
            yield piece

    async def aclose(self) -> None:
        await self.stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Failure("the endpoint sends a compressed reply, though none was asked for")
    response.stream = _Bounded(response.stream)


# --- A file of answers ---


def judge_file(
    questions: Path, answers: Path, out: Path, endpoint: Endpoint, *, cache: Path | None = None, quiet: bool = False
) -> JudgeScores:
    """Judge an answer file; `out` gets one row per question in order: the question, both answers, and the judge's text in
    `result`, or a `reason` where there are no scores. Returns the scores.

    `out` is whole at any moment, and says in each row what it was made of; it goes on where all that is equal. `cache`
    (default: `judge_cache` beside `out`) keeps every reply that has scores; what it holds is not asked again. Raises DataError
    for questions that cannot be judged or answers that belong to none, and ValueError for an `out` of something else.
    """
    cache = cache or out.parent / "judge_cache"
    rows, asked = _board(questions, answers)
    run = {
        "made_by": MADE_BY,
        "judge": endpoint.model,
        "temperature": endpoint.temperature,
        "base_url": fingerprint(endpoint.base_url.rstrip("/")),
        "prompt": fingerprint(judge_messages(dict.fromkeys(NEEDED, "?"), "?")),
        "questions": fingerprint(questions),
        "answers": fingerprint(answers),
    }
    judge = Judge(endpoint)
    _forget_nothing(out)
    with claim_file(out, run, inputs=[questions, answers]):
        cache.mkdir(parents=True, exist_ok=True)
        for place, messages in asked.items():
            text = _recall(_kept(cache, endpoint, messages))
            _fill(rows[place], text, None if text else WAITING)
        write = _Writer(out, run, rows)
        write.now()
        left = {place: messages for place, messages in asked.items() if rows[place].get("reason")}
        done = len(asked) - len(left)
        with tqdm(total=len(asked), initial=done, desc="judged", unit="question", disable=quiet) as bar:

            def keep(place: int, text: str | None, reason: str | None) -> None:
                if reason is None:
                    write_json(_kept(cache, endpoint, left[place]), {"result": text})
                _fill(rows[place], text, reason)
                write.soon()
                bar.update()

            try:
                with start_blocking_portal() as portal:  # a notebook has a loop of its own already
                    portal.call(_ask_all, judge, left, keep)
            finally:
                write.now()
    scores = collect((str(row["question_id"]), row) for row in rows)
    return replace(scores, stopped=judge.stopped)


def _forget_nothing(out: Path) -> None:
    """Remove a file of ours in which nothing is judged, so that what stopped it (a temperature) may be changed."""
    if out.is_file():
        with hold(out), suppress(DataError):
            rows = [row if isinstance(row, dict) else {} for _, row in read_lines(out)]
            runs = [row[RUN_KEY] if isinstance(row.get(RUN_KEY), dict) else {} for row in rows]
            ours = rows and all(run.get("made_by") == MADE_BY for run in runs)
            if ours and all(row.get("result") is None for row in rows):
                out.unlink()


async def _ask_all(
    judge: Judge, left: Mapping[int, Sequence[Mapping[str, str]]], keep: Callable[[int, str | None, str | None], None]
) -> None:
    """Ask every question, a few at once; `keep` gets its place, the judge's text and why it is of no use, if it is not."""
    waiting = iter(left.items())

    async def work() -> None:
        for place, messages in waiting:
            try:
                keep(place, await judge.ask(messages), None)
            except Failure as failure:
                keep(place, failure.reply, str(failure))

    async with judge.client:
        await asyncio.gather(*(work() for _ in range(min(judge.endpoint.concurrency, len(left)))))


class _Writer:
    """Writes the rows whole, now or at most once a second."""

    def __init__(self, out: Path, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]):
        self.out, self.run, self.rows, self.last = out, run, rows, 0.0

    def now(self) -> None:
        write_text(self.out, "".join(json.dumps(owned(self.run, row)) + "\n" for row in self.rows))
        self.last = time.monotonic()

    def soon(self) -> None:
        if time.monotonic() - self.last > 1.0:
            self.now()


def _kept(cache: Path, endpoint: Endpoint, messages: Sequence[Mapping[str, str]]) -> Path:
    return cache / f"{endpoint.content_hash(messages)}.json"


def _recall(path: Path) -> str | None:
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # absent, or spoiled from outside
        text = read_json(path)["result"]
        parse_scores(text)
        return text
    return None


def _fill(row: dict[str, Any], text: str | None, reason: str | None) -> None:
    row.pop("reason", None)
    row |= {"result": text} | ({"reason": reason} if reason else {})


def _board(questions: Path, answers: Path) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, str]]]]:
    """One row per question, and the messages of those that have an answer, by place."""
    told = {name: _answer(row) for name, row in by_id(read_rows(answers), "question_id", "id").items()}
    rows, asked = [], {}
    for place, (name, question) in enumerate(by_id(read_rows(questions), "question_id").items()):
        row = {key: question.get(key) for key in ("type", "domain", "text")} | {"ans1": question.get("gpt4_answer")}
        answer = told.pop(name, None)
        rows.append({"question_id": question.get("question_id", place), **row, "ans2": answer})
        if answer is None:
            rows[-1] |= {"result": None, "reason": f"{answers.name} has no answer to it"}
            continue
        try:
            asked[place] = judge_messages(question, answer)
        except ValueError as error:
            raise question.error(str(error)) from None
    if told:
        raise DataError(f"{answers} answers question {next(iter(told))}, which {questions} does not ask")
    return rows, asked


def _answer(row: Row) -> str:
    row.text("text", "answer", empty=True)
    return row[row.key("text", "answer")]
