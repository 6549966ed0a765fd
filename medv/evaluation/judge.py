"""The judge of open conversation (Table 1): its prompt, its scores, and their aggregation, as LLaVA-Med v1.0.0 has them.

A judge reads a caption, a question, the reference answer of GPT-4 and a candidate's answer, and scores both from 1 to 10.
A group's score is the mean over its questions of candidate / reference x 100 (not a ratio of means); groups are all
questions, the two question types and the five image domains, the first that is flagged. Prompt and aggregation are the
official ones; reading accepts a few more forms (`parse_scores`), is strict about the range, and reports every line that it
cannot use.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from medv import limits
from medv.data.readers import DATASETS
from medv.data.rows import as_id, found, read_rows
from medv.reading import DataError, read_lines

TYPES = ("conversation", "detailed_description")
DOMAINS = DATASETS["qa50"].domains
GROUPS = ("overall", *TYPES, *DOMAINS)
LOWEST, HIGHEST = 1.0, 10.0
NEEDED = ("text", "gpt4_answer", "fig_label", "fig_caption", "in_text_mention")  # fields of the qa50 file

# The official system message begins with this stray quotation mark.
SYSTEM = "'You are a helpful and precise assistant for checking the quality of the answer."
INSTRUCTION = """\
We would like to request your feedback on the performance of two AI assistants in response to the user question displayed \
above. The user asks the question on observing an image. For your reference, the visual content in the image is represented \
with caption describing the same image.
    Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an overall \
score on a scale of 1 to 10, where a higher score indicates better overall performance.
    Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, respectively. \
The two scores are separated by a space. In the subsequent line, please provide a comprehensive explanation of your \
evaluation, avoiding any potential bias and ensuring that the order in which the responses were presented does not affect \
your judgment."""
_IMAGE = "\n<image>"
_NUMBER, _OF_TEN = r"(-?[0-9]+(?:\.[0-9]+)?)", r" ?/ ?10"
_FORMS = (r"(?:scores?:\s?)?{0} ?[,;|]? (?:and )?{0}", r"assistant 1:\s?{0} ?[,;]?\s?assistant 2:\s?{0}")
_SCORES = re.compile(
    "|".join(rf"(?:{form.format(number)})\.?" for form in _FORMS for number in (_NUMBER, _NUMBER + _OF_TEN)), re.IGNORECASE
)
_FENCE = re.compile(r"(?:```\w*)?")
_THINKING = r"(?:think|thinking|thought|reasoning)>"
_THINK_END, _THINK_START = (re.compile(rf"{begin}{_THINKING}", re.IGNORECASE) for begin in ("</", r"\s*<"))


def judge_messages(question: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    """The two messages that a judge gets about `answer`; `question` is a row of the qa50 file (the fields of `NEEDED`).

    The figure's mentions are printed as a Python list, as in the official prompt. Raises ValueError for a question that lacks a
    field, or has no text in one.
    """
    if missing := [name for name in NEEDED if name not in question]:
        raise ValueError(f"question {question.get('question_id', '?')} has no {', '.join(missing)}, which a judge needs")
    for name in NEEDED[:-1]:
        if not isinstance(question[name], str) or not question[name].strip():
            raise ValueError(f"question {question.get('question_id', '?')}: {name!r} is not a text: a judge needs it")
    content = (
        f"[Context]\nFigure Caption:\n{question['fig_label']}: {question['fig_caption']}\n\n"
        f"Figure Context:\n\t- {question['in_text_mention']}\n\n"
        f"[Question]\n{str(question['text']).removesuffix(_IMAGE)}\n\n"
        f"[Assistant 1]\n{question['gpt4_answer']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{INSTRUCTION}\n\n"
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def parse_scores(reply: str) -> tuple[float, float]:
    """The scores of the reference and of the candidate, from the first line of a judge's reply that is not blank.

    The official form is "8 7". Also read are "8, 7" (or a semicolon, bar or "and" between), "8/10 7/10", "Scores: 8 7" and
    "Assistant 1: 8, Assistant 2: 7" (the labelled ones also over two lines), in bold or in a code fence or plain, after one
    `<think>...</think>` or none. Raises ValueError, with the line, for anything else (such as "8/10", "8,7" and "8-7") and for
    scores outside 1 to 10: nothing is guessed or clipped.
    """
    text = _after_thinking(reply)
    lines = [" ".join(line.replace("**", "").split()) for line in text.splitlines()]  # one space: patterns stay linear
    lines = [line.strip("*_`# ") for line in lines if not _FENCE.fullmatch(line)]
    match = _SCORES.fullmatch("\n".join(lines[:1])) or _SCORES.fullmatch("\n".join(lines[:2]))
    first = f"its first line is {lines[0][:80] if lines else ''!r}"
    if match is None:
        raise ValueError(f"{first}: two scores are needed")
    reference, candidate = (float(number) for number in match.groups() if number)
    if not (LOWEST <= reference <= HIGHEST and LOWEST <= candidate <= HIGHEST):
        raise ValueError(f"{first}: scores lie between {LOWEST:g} and {HIGHEST:g}")
    return reference, candidate


def _after_thinking(reply: str) -> str:
    """The reply without the thoughts of a reasoning model. Raises ValueError where their end is unclear."""
    if not _THINK_END.search(reply):
        if _THINK_START.match(reply):
            raise ValueError("it ends within <think>: its first line is missing")
        return reply
    thought, *rest = _THINK_END.split(reply)
    if len(rest) > 1 or not (_THINK_START.match(thought) or _SCORES.fullmatch(thought.strip().split("\n")[0]) is None):
        raise ValueError("the end of its thinking is unclear: its first line is unknown")
    return rest[0]


@dataclass(frozen=True)
class Judgement:
    """The scores of the reference and of the candidate, from any judge with a positive scale; type and domain if known."""

    id: str
    reference: float
    candidate: float
    type: str | None = None
    domain: str | None = None

    @property
    def relative(self) -> float:
        """The candidate's score in percent of the reference's."""
        return self.candidate / self.reference * 100.0


@dataclass(frozen=True)
class JudgeScores:
    """The scores of a set of questions. unjudged: (id, reason) of those without; they stand in no mean. stopped: the reason
    why a judge could not be asked any more, if there was one.
    """

    judged: tuple[Judgement, ...]
    unjudged: tuple[tuple[str, str], ...] = ()
    stopped: str = ""

    def relative(self, group: str = "overall") -> np.ndarray:
        """The relative scores (percent) of one of `GROUPS`, in order; for `bootstrap_interval`."""
        limits.named("group", group, GROUPS)
        return np.array([item.relative for item in self.judged if group in ("overall", item.type, item.domain)])

    def to_dict(self) -> dict[str, Any]:
        """Each group's score (None where it has no question), `counts` by group, and `unjudged`: question id and reason."""
        values = {group: self.relative(group) for group in GROUPS}
        means = {group: fmean(part) if len(part) else None for group, part in values.items()}
        unjudged = [{"question_id": name, "reason": reason} for name, reason in self.unjudged]
        return {**means, "counts": {group: len(part) for group, part in values.items()}, "unjudged": unjudged}


def first_domain(flags: Any) -> str | None:
    """The first domain that is flagged, in the official order; a name stands for itself."""
    if isinstance(flags, Mapping):
        return next((name for name in DOMAINS if flags.get(name)), None)
    return flags if flags in DOMAINS else None


def read_judgements(path: str | Path) -> JudgeScores:
    """The scores in a file of judgements: JSON lines with `question_id`, `type`, `domain` and the judge's text in `result`.

    A line that cannot be used is among the `unjudged`, by its question id (by its number where it has none).
    """
    try:
        return collect((row.place, row) for row in read_rows(path))
    except DataError:  # not all lines can be read
        return collect((f"line {number}", row) for number, row in read_lines(path))


def collect(rows: Iterable[tuple[str, Any]]) -> JudgeScores:
    """The scores of rows as `read_judgements` reads them: pairs of a name and a row, or an error in its place."""
    judged: dict[str, Judgement] = {}
    unjudged = []
    for name, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise ValueError(row if isinstance(row, DataError) else f"it is {found(row)}, not an object with named fields")
            given = as_id(row.get("question_id", name))
            name = given or name
            if given is None:
                raise ValueError(f"'question_id' is {found(row['question_id'])}, but an id is a string or a whole number")
            if row.get("reason"):
                raise ValueError(row["reason"])
            text = next((row[key] for key in ("result", "gpt_eval") if row.get(key) is not None), None)
            if not isinstance(text, str):
                raise ValueError("it has no text of a judge in 'result'")
            reference, candidate = parse_scores(text)
            if name in judged:
                raise ValueError("it is judged a second time: the first judgement counts")
            about = {"type": row.get("type"), "domain": first_domain(row.get("domain"))}
            judged[name] = Judgement(name, reference, candidate, **about)
        except ValueError as error:
            unjudged.append((name, str(error)))
    return JudgeScores(tuple(judged.values()), tuple(unjudged))
