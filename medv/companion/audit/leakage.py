"""What of a question-answering set can be answered without learning from its images (`medv audit`).

Counted from the files: images and questions that the test split shares with the training split, the highest score that a
choice among the training answers can reach, and the scores of answers that see no image, under every variant of the metrics.
The scores that Tables 2 and 4 print stand beside that ceiling: a classifier over the training answers cannot score higher,
unless it has seen other rows. Answers are the same if they are so in lower case; for the ceiling their words have to be (runs
of letters, digits and underscores).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from medv.companion.audit.controls import majority_answers, nearest_answers
from medv.companion.audit.findings import counts_that_give
from medv.companion.audit.gaming import all_metrics, constant_answers
from medv.data.example import Example
from medv.data.readers import data_set, read_dataset
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import normalize, token_scores
from medv.paper import table


def audit_dataset(name: str, folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables "overlap", "blind" and, for a data set of Tables 2 and 4, "printed" of a data set's folder.

    Raises DataError where a split cannot be read, ValueError where training lacks a type of question.
    """
    name = data_set(name).name
    test, trainings = read_dataset(name, folder, "test"), {"": read_dataset(name, folder, "train")}
    if data_set(name).reworded:  # the training file re-words test questions, which read_dataset leaves out by default
        trainings["with re-worded test questions"] = read_dataset(name, folder, "train", all_rows=True)
    found = {}
    for key, measure in (("overlap", overlap), ("blind", blind_scores)):
        frames = [measure(train, test).assign(training=_named(label, train)) for label, train in trainings.items()]
        found[key] = pd.concat(frames)
    scores = {f"{name}_closed_accuracy": "closed", f"{name}_open_recall": "open"}
    tables = [table("table2"), table("table4").assign(model=lambda rows: rows["model"] + ", zero-shot")]
    printed = [frame.rename(columns=scores) for frame in tables if set(scores) <= set(frame)]
    if printed:
        printed = pd.concat([frame[["model", "closed", "open"]].dropna() for frame in printed])
        found["printed"] = beside_ceilings(printed, trainings.values(), test)
    return {key: frame.reset_index(drop=True) for key, frame in found.items()}


def _named(label: str, train: Sequence[Example]) -> str:
    return f"{len(train)} rows{', ' if label else ''}{label}"


def overlap(train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """What the test questions share with training: measure, count, of, percent."""
    images, questions = ({key(example) for example in train} for key in (_image, _question))
    pairs = {(_image(example), _question(example)) for example in train}
    opened, closed = ([e for e in test if e.answer_type == kind] for kind in ("OPEN", "CLOSED"))
    known = {(_image(example), _answer(example)) for example in train}
    answers, shown = {tuple(_words(example.answer)) for example in train}, {_image(example) for example in test}
    same_answer = sum((_image(e), _answer(e)) in known for e in opened)
    ceiling = sum(tuple(_words(e.answer)) in answers for e in opened)
    other = sum(normalize(e.answer) not in ("yes", "no") for e in closed)
    rows = [
        ("test images that are training images", len(shown & images), len(shown)),
        ("test questions about a training image", sum(_image(e) in images for e in test), len(test)),
        ("test questions that training asks in the same words", sum(_question(e) in questions for e in test), len(test)),
        ("the same about the same image", sum((_image(e), _question(e)) in pairs for e in test), len(test)),
        ("open test questions whose image and answer are in training", same_answer, len(opened)),
        ("open test answers that are training answers: the ceiling of a classifier", ceiling, len(opened)),
        ("closed test answers that are neither yes nor no", other, len(closed)),
    ]
    frame = pd.DataFrame(rows, columns=["measure", "count", "of"])
    return frame.assign(percent=100 * frame["count"] / frame["of"].where(frame["of"] > 0))  # of none: no share


def blind_scores(train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Answers that see no image, and the reference itself, under every metric (percent): answer, COLUMNS, "open words" (set
    recall of the plain words, without the official normalization), "open exact"; n closed and n open.
    """
    references = [Reference.of(example) for example in test]
    blind = majority_answers(train, test)
    plain = [(r, set(_words(r.answer))) for r in references]
    answers = {"reference": [reference.answer for reference in references], "nearest question": nearest_answers(train, test)}
    answers |= {"question only": blind.lookup, "majority": blind.majority}
    answers |= {label: [text] * len(test) for label, text in constant_answers(train).items() if label.startswith('"')}
    rows = []
    for label, texts in answers.items():
        row = all_metrics(references, texts)
        pairs = [(r, words, text) for (r, words), text in zip(plain, texts, strict=True) if r.answer_type == "OPEN"]
        own = {"open words": [len(words & set(_words(text))) / max(len(words), 1) for _, words, text in pairs]}
        own["open exact"] = [reference.answer.strip().lower() == text.strip().lower() for reference, _, text in pairs]
        row |= {name: 100 * sum(values) / len(values) if values else float("nan") for name, values in own.items()}
        rows.append({"answer": label} | row)
    frame = pd.DataFrame(rows)
    counts = ["n closed", "n open"]
    return frame[[*frame.columns.drop(counts), *counts]]


def beside_ceilings(printed: pd.DataFrame, trainings: Iterable[Sequence[Example]], test: Sequence[Example]) -> pd.DataFrame:
    """Printed scores (model, closed, open; percent), the number of right answers to the closed questions that gives the first,
    and which of the second no classifier over the training answers can reach.

    The ceiling of open recall takes for every question the training answer with the highest recall, as the official evaluation
    counts it: over all open questions, a repeated word as often as it is said. Generated answers are not bound by it.
    """
    frame, closed = printed.copy(), sum(example.answer_type == "CLOSED" for example in test)
    if closed:
        frame[f"right of {closed} closed"] = [_right(score, closed) for score in frame["closed"]]
    wanted = [normalize(example.answer).split() for example in test if example.answer_type == "OPEN"]
    for train in trainings if wanted else ():  # no open question, no ceiling
        holding: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # the training answers by each of their words
        for answer in {tuple(normalize(example.answer).split()) for example in train}:
            for word in answer:
                holding[word].add(answer)
        best = [
            max((token_scores(r, a)[0] for a in set().union(*map(holding.get, {*r} & {*holding}))), default=0) for r in wanted
        ]
        percent = 100 * sum(best) / len(best)
        sums = f"{sum(best):.1f} / {len(best)} = {percent:.1f}"
        name = f"open above {sums}, the best choice among the answers of {len(train)} rows"
        frame[name] = ["yes" if score > percent else "no" for score in frame["open"]]
    return frame


def _right(percent: float, n: int) -> str:
    """The numbers of right answers out of n that give a printed score; of one that ends in 0 also by its first decimal."""
    if counts := counts_that_give(percent, n):
        return ", ".join(map(str, counts))
    rounded = counts_that_give(percent, n, places=1) if f"{percent:.2f}".endswith("0") else []
    return f"{', '.join(map(str, rounded))}, rounded" if rounded else "no number"


def _image(example: Example) -> str:
    return example.meta["image"]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _answer(example: Example) -> str:
    return example.answer.strip().lower()


def _question(example: Example) -> str:
    return normalize(example.question)


def render_audit(found: dict[str, pd.DataFrame], console: Console) -> None:
    """Print the tables of `audit_dataset`, those of each training set apart."""
    for training, part in found["overlap"].groupby("training", sort=False):
        grid = Table(title=f"training: {training}", title_justify="left")
        grid.add_column("shared with the test split")
        grid.add_column("count", justify="right")
        grid.add_column("%", justify="right")
        for row in part.itertuples():
            grid.add_row(row.measure, f"{row.count} of {row.of}", f"{row.percent:.1f}" if row.of else "-")
        console.print(grid)
        scores = found["blind"][found["blind"]["training"] == training].drop(columns=["training", "open precision"])
        closed, opened = scores["n closed"].iloc[0], scores["n open"].iloc[0]
        title = f"answers without an image: percent, in brackets how many of the {closed} closed or {opened} open questions"
        console.print(_scores(with_counts(scores), f"{title} (recalls are summed)"))
    if "printed" in found:
        console.print(_scores(found["printed"], "scores printed in Tables 2 and 4, percent", digits=2))
        console.print("A classifier over the training answers cannot score above the last columns; generated answers can.")


def with_counts(scores: pd.DataFrame) -> pd.DataFrame:
    """`blind_scores` as "percent (count)" on two lines, "-" without a question of the type, without n closed and n open."""
    shown = scores.drop(columns=["n closed", "n open"]).astype(object)
    for name in shown.columns.drop("answer"):
        n = scores["n closed" if name.startswith("closed") else "n open"]
        shares = scores[name].astype(float)
        sums = shares * n / 100
        texts = [f"{share:.1f}\n({count:.1f})" if every else "-" for share, count, every in zip(shares, sums, n, strict=True)]
        shown[name] = [text.replace(".0)", ")") for text in texts]
    return shown


def _scores(frame: pd.DataFrame, title: str, *, digits: int = 1) -> Table:
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in frame.columns:
        longest = max(len(word) for cell in (name, *frame[name]) for word in str(cell).split())  # a word is not cut
        grid.add_column(name, justify="left" if name in ("answer", "model") else "right", min_width=longest)
    for row in frame.itertuples(index=False):
        grid.add_row(*(f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in row))
    return grid
