"""`medv judge`: every answer of a file goes to a judge, retrying until each has scores or a recorded error.

Replies are cached by the hash of what was asked, each as soon as it arrives, so that a killed run asks only for the rest.
Table 1's judge is GPT-4.1 mini; another judge gives other numbers.
"""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

from medv.artifacts import fingerprint, write_json, write_text
from medv.data.rows import answers_to, by_id, read_rows
from medv.evaluation.judge import NEEDED, JudgeScores, collect, judge_messages, parse_scores
from medv.evaluation.judge_client import Endpoint, Failure, Judge, Messages
from medv.ownership import RUN_KEY, claim_file, hold, owned
from medv.reading import DataError, read_json, read_lines

WAITING = "not asked yet"
MADE_BY = "medv judge"


def judge_file(
    questions: Path, answers: Path, out: Path, endpoint: Endpoint, *, cache: Path | None = None, quiet: bool = False
) -> JudgeScores:
    """Judge an answer file; `out` gets one row per question in order: the question, both answers, and the judge's text in
    `result`, or a `reason` where there are no scores. Returns the scores.

    `out` is whole at any moment, and each row names what it was made of; the run continues where all that is equal. `cache`
    (default: `judge_cache` beside `out`) keeps every reply that has scores; what it holds is not asked again. Raises DataError
    for questions that cannot be judged or answers that belong to none, and ValueError for an `out` of something else.
    """
    cache = cache or out.parent / "judge_cache"
    rows, asked = _rows_and_messages(questions, answers)
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
    _remove_unjudged(out)

    def write() -> None:
        write_text(out, "".join(json.dumps(owned(run, row)) + "\n" for row in rows))

    async def ask_all() -> None:
        waiting, written = iter(left.items()), time.monotonic()

        async def work() -> None:
            nonlocal written
            for place, messages in waiting:
                try:
                    text, reason = await judge.ask(messages), None
                    write_json(files[place], {"result": text})
                except Failure as failure:
                    text, reason = failure.reply, str(failure)
                _fill(rows[place], text, reason)
                bar.update()
                if time.monotonic() - written > 1.0:
                    write()
                    written = time.monotonic()

        # The bar lives in this thread alone: where its stream is closed, tqdm leaves its lock to the thread that drew it.
        with tqdm(total=len(asked), initial=len(asked) - len(left), desc="judged", unit="question", disable=quiet) as bar:
            async with judge.client:
                await asyncio.gather(*(work() for _ in range(min(endpoint.concurrency, len(left)))))

    with claim_file(out, run, inputs=[questions, answers]):
        cache.mkdir(parents=True, exist_ok=True)
        files = {place: cache / f"{endpoint.content_hash(messages)}.json" for place, messages in asked.items()}
        for place, file in files.items():
            text = _cached(file)
            _fill(rows[place], text, None if text else WAITING)
        write()
        left = {place: messages for place, messages in asked.items() if rows[place].get("reason")}
        try:
            with start_blocking_portal() as portal:  # a notebook has a loop of its own already
                portal.call(ask_all)
        finally:
            write()
    return replace(collect((str(row["question_id"]), row) for row in rows), stopped=judge.stopped)


def _remove_unjudged(out: Path) -> None:
    """Remove a file of ours in which nothing is judged, so that what stopped it (a temperature) may be changed."""
    if out.is_file():
        with hold(out), suppress(DataError):
            rows = [row if isinstance(row, dict) else {} for _, row in read_lines(out)]
            runs = [row[RUN_KEY] if isinstance(row.get(RUN_KEY), dict) else {} for row in rows]
            ours = rows and all(run.get("made_by") == MADE_BY for run in runs)
            if ours and all(row.get("result") is None for row in rows):
                out.unlink()


def _cached(path: Path) -> str | None:
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # absent, or spoiled from outside
        text = read_json(path)["result"]
        parse_scores(text)
        return text
    return None


def _fill(row: dict[str, Any], text: str | None, reason: str | None) -> None:
    row.pop("reason", None)
    row |= {"result": text} | ({"reason": reason} if reason else {})


def _rows_and_messages(questions: Path, answers: Path) -> tuple[list[dict[str, Any]], dict[int, Messages]]:
    """One row per question, and the messages of those that have an answer, by place."""
    wanted = by_id(read_rows(questions), "question_id")
    given = {name: row.answer() for name, row in answers_to(wanted, answers).items()}
    rows, asked = [], {}
    for place, (name, question) in enumerate(wanted.items()):
        about = {key: question.get(key) for key in ("type", "domain", "text")} | {"ans1": question.get("gpt4_answer")}
        answer = given.pop(name, None)
        rows.append({"question_id": question.get("question_id", place), **about, "ans2": answer})
        if answer is None:
            _fill(rows[-1], None, f"{answers.name} has no answer to it")
            continue
        try:
            asked[place] = judge_messages(question, answer)
        except ValueError as error:
            raise question.error(str(error)) from None
    if given:
        raise DataError(f"{answers} answers question {next(iter(given))}, which {questions} does not ask")
    return rows, asked
