"""Scores of the same answer to every question: the share of each metric that needs no look at the question or the image.

The answers are built from training answers at most, and no model is run.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd

from medv.data.example import Example
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import evaluate_vqa, normalize
from medv.phantoms.facts import score_descriptions, stated_facts

FREQUENT = (10, 100)
"""How many of the most frequent words of training answers are said at once."""
REPEATS = (1, 3, 20)
TRUTH, ANSWER = "the reference itself", "answer to every question"
COLUMNS = {
    "closed accuracy": ("batch", "closed_accuracy"),
    "closed, gated": ("gated", "closed_accuracy"),
    "closed, strict": ("batch", "closed_strict_accuracy"),
    "open recall": ("batch", "open_recall"),
    "open set recall": ("batch", "open_set_recall"),
    "open precision": ("batch", "open_precision"),
}
"""Columns of a question-answering set: the variant of the metric, and the score."""
FACTS = {"facts precision": "precision", "facts recall": "recall", "facts F1": "f1"}
COUNTS = ("n closed", "n open", "n")


def constant_answers(train: Sequence[Example]) -> dict[str, str]:
    """Answers that fit every question, by label: "yes", "yes no", the most frequent words of training answers."""
    counted = Counter(word for ex in train if ex.answer_type == "OPEN" for word in normalize(ex.answer.lower()).split())
    words = [word for word, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    several = {f"the {n} most frequent words": " ".join(words[:n]) for n in FREQUENT if n <= len(words)}
    return {'"yes"': "yes", '"no"': "no", '"yes no"': "yes no"} | several


def game_vqa(name: str, train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Scores (percent) of each constant answer on a question-answering set, and of the reference itself: test set, answer to
    every question, the columns `COLUMNS`, n closed, n open.
    """
    references = [Reference.of(example) for example in test]
    answers = {TRUTH: [reference.answer for reference in references]}
    answers |= {label: [text] * len(test) for label, text in constant_answers(train).items()}
    rows = [{"test set": name, ANSWER: label} | all_metrics(references, texts) for label, texts in answers.items()]
    return pd.DataFrame(rows)


def all_metrics(references: Sequence[Reference], texts: Sequence[str]) -> dict[str, float]:
    """The scores COLUMNS (percent) of answers, and n closed and n open."""
    scores = {variant: evaluate_vqa(references, texts, variant=variant) for variant in ("batch", "gated")}
    row = {column: getattr(scores[variant], metric) for column, (variant, metric) in COLUMNS.items()}
    return row | {"n closed": scores["batch"].n_closed, "n open": scores["batch"].n_open}


def inflation(name: str, test: Sequence[Example]) -> pd.DataFrame:
    """Open recall (percent) of an answer that repeats one word of the reference: what repetition alone adds.

    Only references of at least two different words count. Columns: test set, times, open recall, open set recall, n.
    """
    chosen = []
    for example in test:
        if example.answer_type == "OPEN" and len(set(words := normalize(example.answer.lower()).split())) > 1:
            chosen.append((Reference.of(example), words[0]))
    rows = []
    for times in REPEATS if chosen else ():
        scores = evaluate_vqa([reference for reference, _ in chosen], [" ".join([word] * times) for _, word in chosen])
        rows.append((name, times, scores.open_recall, scores.open_set_recall, len(chosen)))
    return pd.DataFrame(rows, columns=["test set", "times", "open recall", "open set recall", "n"])


def game_findings(name: str, train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Facts precision, recall and F1 (percent) of one text for every image, and of the reference itself. Columns: test set,
    answer to every question, `FACTS`, n.

    The texts are the training description that fits the training images best, and one that states every fact there is.
    """
    truths = [example.meta["scene"].facts() for example in train]
    texts = {example.answer: stated_facts(example.answer) for example in train}
    best = max(texts, key=lambda text: sum(len(texts[text] & true) / (len(texts[text]) + len(true)) for true in truths))
    stated, everything = set(), []
    for text, facts in texts.items():
        if facts - stated:
            everything.append(text)
            stated |= facts
    answers = {
        TRUTH: [example.answer for example in test],
        "the best single description": [best] * len(test),
        "every fact there is": [" ".join(everything)] * len(test),
    }
    rows = []
    for label, said in answers.items():
        scores = score_descriptions(said, [example.meta["scene"] for example in test])
        row = {column: 100.0 * getattr(scores, metric) for column, metric in FACTS.items()}
        rows.append({"test set": name, ANSWER: label} | row | {"n": len(test)})
    return pd.DataFrame(rows)


def gaming_grid(
    sets: Mapping[str, tuple[Sequence[Example], Sequence[Example]]],
    descriptions: tuple[Sequence[Example], Sequence[Example]] | None = None,
) -> pd.DataFrame:
    """All of the above: a row per test set and answer, a column per metric (percent), empty where there is none.

    sets: training and test examples of question-answering sets by name; descriptions: the same of the phantoms' descriptions.
    """
    frames = []
    for name, (train, test) in sets.items():
        grown = inflation(name, test)
        times = ["one word of the reference" + (f", {n} times" if n > 1 else "") for n in grown["times"]]
        frames += [game_vqa(name, train, test), grown.assign(**{ANSWER: times}).drop(columns="times")]
    if descriptions:
        frames.append(game_findings("descriptions", *descriptions))
    grid = pd.concat(frames, ignore_index=True)
    counts = [column for column in COUNTS if column in grid]
    return grid[[*grid.columns.drop(counts), *counts]]


def most_reached(grid: pd.DataFrame) -> pd.DataFrame:
    """The most (percent) that an answer made without the references' help reaches in each metric, one column per test set."""
    blind = grid[~grid[ANSWER].str.contains("reference")]
    metrics = [column for column in (*COLUMNS, *FACTS) if column in grid]
    return blind.groupby("test set", sort=False)[metrics].max().T
