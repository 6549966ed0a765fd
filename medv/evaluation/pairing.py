"""Reference answers and predicted answers from files, and which prediction belongs to which question.

References are the official annotation files; predictions are JSON lines with `text` (or `answer`). Published prediction files
often carry ids of their own numbering (LLaVA-Med's `question_id` is not VQA-RAD's `qid`, though the two ranges overlap), so ids
alone are not trusted across differently named fields.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medv.data.example import Example
from medv.data.readers import DATASETS
from medv.data.rows import read_rows
from medv.reading import DataError

_ID_KEYS = ("question_id", "qid", "id")
_FORM = re.compile(r"(|.*[a-zA-Z](?:.*[^\d.])?)(\d+)(?:\.0+)?", re.ASCII)  # a whole number, after a word or nothing


@dataclass(frozen=True)
class Reference:
    """A right answer and its type, "OPEN" or "CLOSED"; id and question serve to pair predictions.

    `id_key` is the field that the id came from: ids of unlike fields ("qid", "question_id") may number different things.
    """

    answer: str
    answer_type: str
    id: str | None = None
    id_key: str | None = None
    question: str | None = None

    def __post_init__(self):
        if self.answer_type not in ("OPEN", "CLOSED"):
            raise ValueError(f"answer_type {self.answer_type!r} of question {self.id}: it must be 'OPEN' or 'CLOSED'")

    @classmethod
    def of(cls, example: Example) -> "Reference":
        """The reference of a question-answering example; raises ValueError for an example without an answer type."""
        return cls(example.answer, example.answer_type or "", example.id, example.meta.get("id_key"), example.question)


@dataclass(frozen=True)
class Prediction:
    """A predicted answer, with the id and the prompt that its file gives, if any."""

    text: str
    id: str | None = None
    id_key: str | None = None
    prompt: str | None = None


def read_references(path: str | Path) -> list[Reference]:
    """The references of an annotation file as shipped: VQA-RAD, SLAKE (English), PathVQA or LLaVA-Med's VQA files.

    All rows are kept, in file order. Raises DataError for a file of another kind.
    """
    fields = read_rows(path)[0]
    scored = [dataset for dataset in DATASETS.values() if dataset.fields]
    dataset = next((one for one in scored if any(names <= fields.keys() for names in one.fields)), None)
    if dataset is None:
        *titles, last = (one.title for one in scored)
        raise DataError(f"{path} is no annotation file of {', '.join(titles)} or {last} (its rows have {', '.join(fields)})")
    return [Reference.of(example) for example in dataset.read(path, all_rows=True)]


def read_predictions(path: str | Path) -> list[Prediction]:
    """The answers of a JSON-lines file: `text` (or `answer`) in each row, and an id and a `prompt` if present."""
    predictions = []
    for row in read_rows(path):
        ids = {key: row.identity(key) for key in _ID_KEYS if key in row}
        if len({*ids.values()}) > 1:
            raise row.error(f"{' and '.join(map(repr, ids))} differ: keep the id that the annotation file has")
        id_key, identity = next(iter(ids.items()), (None, None))
        prompt = row.get("prompt")
        predictions.append(Prediction(row.answer(), identity, id_key, prompt if isinstance(prompt, str) else None))
    return predictions


def pair(references: Sequence[Reference], predictions: Sequence[Prediction]) -> tuple[list[Reference], list[str]]:
    """The references in their order and the predicted text for each: by id where both sides have ids, else by order.

    Ids that differ in their form alone (zeros or one prefix in front, "12.0") are the same. Where they are of two numberings
    (not the same ids, or of unlike fields, and a prompt asks something else), the order counts only if each prediction
    carries a prompt with its reference's question in it; without ids the counts must agree, and so must the prompts there
    are. Raises DataError for anything else: nothing is paired by chance.
    """
    if len(references) != len(predictions):
        raise DataError(
            f"{len(references)} questions but {len(predictions)} predictions: every question needs exactly one prediction"
            + _ids_missing(references, predictions)
        )
    wanted, given = [row.id for row in references], [row.id for row in predictions]
    if None not in wanted and set(given) != {None}:
        if None in given:
            raise DataError("some predictions have an id and others have none: give every prediction its id, or none")
        for ids, side in ((wanted, "references"), (given, "predictions")):
            if repeated := [identity for identity, count in Counter(ids).items() if count > 1]:
                raise DataError(f"the {side} repeat id {repeated[0]} ({len(repeated)} ids in all): every id must be unique")
        if set(wanted) != set(given) and set(bare := _numbers(wanted)) == set(numbers := _numbers(given)) != set():
            wanted, given = bare, numbers
        one_numbering = references[0].id_key is not None and references[0].id_key == predictions[0].id_key
        if set(wanted) == set(given):
            of_id = dict(zip(given, predictions, strict=True))
            paired = [of_id[name] for name in wanted]
            if one_numbering or not any(map(_unlike, references, paired)):
                return list(references), [prediction.text for prediction in paired]
        if one_numbering or not (all(row.prompt for row in predictions) and all(row.question for row in references)):
            raise DataError(
                f"the ids of questions and predictions do not match{_ids_missing(references, predictions)}: "
                "mend the ids, or remove them from the predictions to pair by order"
            )
    for number, (reference, prediction) in enumerate(zip(references, predictions, strict=True), start=1):
        if _unlike(reference, prediction):
            raise DataError(
                f"prediction {number} answers {prediction.prompt!r}, but question {number} is {reference.question!r}: "
                "the two files are not in the same order"
            )
    return list(references), [prediction.text for prediction in predictions]


def _numbers(ids: Sequence[str]) -> list[str]:
    """The different numbers of ids like "12", "0012", "12.0" or "q12" under one prefix; none where one is of another form."""
    found = [_FORM.fullmatch(name) for name in ids]
    if not all(found) or len({match[1] for match in found}) > 1:
        return []
    numbers = [str(int(match[2])) for match in found]
    return numbers if len(set(numbers)) == len(numbers) else []


def _ids_missing(references: Sequence[Reference], predictions: Sequence[Prediction]) -> str:
    wanted, given = {row.id for row in references} - {None}, {row.id for row in predictions} - {None}
    if not wanted & given:
        return ""
    unanswered = [row.id for row in references if row.id not in given]
    unknown = [row.id for row in predictions if row.id not in wanted]
    named = {"unanswered": unanswered, "unknown": unknown}
    parts = [f"{len(ids)} {kind} (first: {ids[0]})" for kind, ids in named.items() if ids]
    return f" ({', '.join(parts)})" if parts else ""


def _unlike(reference: Reference, prediction: Prediction) -> bool:
    """Whether the prediction has a prompt in which the reference's question does not stand."""
    asked, prompt = reference.question, prediction.prompt
    return bool(asked and prompt) and _letters(asked) not in _letters(prompt)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())
