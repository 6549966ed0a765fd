"""How far each metric can be gamed: scores of answers that never look at the question or the image.

Every answer here is the same text for all questions, built from training answers at most, so whatever it scores a metric gives
away for nothing. It runs no model.
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
TRUTH = "the reference itself"
COLUMNS = ("closed accuracy", "closed, gated", "closed, strict", "open recall", "open set recall", "open precision")
FACTS = ("facts precision", "facts recall", "facts F1")


def constant_answers(train: Sequence[Example]) -> dict[str, str]:
    """Answers that fit every question, by what they are: "yes", "yes no", the most frequent words of training answers."""
    counted = Counter(word for ex in train if ex.answer_type == "OPEN" for word in normalize(ex.answer.lower()).split())
    words = [word for word, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    several = {f"the {n} most frequent words": " ".join(words[:n]) for n in FREQUENT if n <= len(words)}
    return {'"yes"': "yes", '"no"': "no", '"yes no"': "yes no"} | several


def game_vqa(name: str, train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Scores (percent) of each constant answer on a question-answering set, and of the reference itself: test set, answer, the
    columns `COLUMNS`, n closed, n open.
    """
    references = [Reference.of(example) for example in test]
    lists = {key: [text] * len(test) for key, text in constant_answers(train).items()}
    rows = []
    for answer, said in ({TRUTH: [reference.answer for reference in references]} | lists).items():
        batch, gated = (evaluate_vqa(references, said, variant=variant) for variant in ("batch", "gated"))
        scores = (
            *(batch.closed_accuracy, gated.closed_accuracy, batch.closed_strict_accuracy),
            *(batch.open_recall, batch.open_set_recall, batch.open_precision),
        )
        counts = {"n closed": batch.n_closed, "n open": batch.n_open}
        rows.append({"test set": name, "answer to every question": answer, **dict(zip(COLUMNS, scores, strict=True)), **counts})
    return pd.DataFrame(rows)


def inflation(name: str, test: Sequence[Example]) -> pd.DataFrame:
    """Open recall (percent) of an answer that says one word of the reference again and again: what repetition alone adds.

    Only references of at least two different words count. Columns: test set, times, open recall, open set recall, n.
    """
    chosen = []
    for example in test:
        if example.answer_type == "OPEN" and len(set(words := normalize(example.answer.lower()).split())) > 1:
            chosen.append((Reference.of(example), words[0]))
    rows = []
    for times in REPEATS if chosen else ():
        scores = evaluate_vqa([reference for reference, _ in chosen], [" ".join([word] * times) for _, word in chosen])
        recalls = {"open recall": scores.open_recall, "open set recall": scores.open_set_recall}
        rows.append({"test set": name, "times": times, **recalls, "n": len(chosen)})
    return pd.DataFrame(rows, columns=["test set", "times", "open recall", "open set recall", "n"])


def game_findings(name: str, train: Sequence[Example], test: Sequence[Example]) -> pd.DataFrame:
    """Facts precision, recall and F1 (percent) of one text for every image: the training description that fits the training
    images best, and one that states every fact there is; and of the reference itself. Columns: test set, answer, `FACTS`, n.
    """
    truths = [example.meta["scene"].facts() for example in train]
    texts = {example.answer: stated_facts(example.answer) for example in train}
    best = max(texts, key=lambda text: sum(len(texts[text] & true) / (len(texts[text]) + len(true)) for true in truths))
    lists = {
        TRUTH: [example.answer for example in test],
        "the best single description": [best] * len(test),
        "every fact there is": [_everything(texts)] * len(test),
    }
    rows = []
    for answer, said in lists.items():
        scores = score_descriptions(said, [example.meta["scene"] for example in test], resamples=1)
        values = [100.0 * getattr(scores, metric) for metric in ("precision", "recall", "f1")]
        rows.append(
            {"test set": name, "answer to every question": answer, **dict(zip(FACTS, values, strict=True)), "n": scores.n}
        )
    return pd.DataFrame(rows)


def gaming_grid(
    sets: Mapping[str, tuple[Sequence[Example], Sequence[Example]]],
    descriptions: tuple[Sequence[Example], Sequence[Example]] | None = None,
) -> pd.DataFrame:
    """All of the above in one frame: a row per test set and answer, a column per metric (percent), empty where none is.

    sets: training and test examples of question-answering sets by name; descriptions: the same of the phantoms' descriptions.
    """
    frames = []
    for name, (train, test) in sets.items():
        grown = inflation(name, test)
        times = [f"one word of the reference, {n} times" if n > 1 else "one word of the reference" for n in grown["times"]]
        frames += [game_vqa(name, train, test), grown.assign(**{"answer to every question": times}).drop(columns="times")]
    if descriptions:
        frames.append(game_findings("descriptions", *descriptions))
    grid = pd.concat(frames, ignore_index=True)
    counts = ["n closed", "n open", "n"]
    return grid[[*(column for column in grid.columns if column not in counts), *(c for c in counts if c in grid)]]


def most_reached(grid: pd.DataFrame) -> pd.DataFrame:
    """The most (percent) that an answer made without the references' help reaches in each metric, one column per test set."""
    blind = grid[~grid["answer to every question"].str.contains("reference")]
    metrics = [column for column in (*COLUMNS, *FACTS) if column in grid]
    return blind.groupby("test set", sort=False)[metrics].max().T


def _everything(texts: Mapping[str, frozenset]) -> str:
    """Training descriptions one after another, each for a fact that those before it do not state."""
    stated, kept = set(), []
    for text, facts in texts.items():
        if facts - stated:
            kept.append(text)
            stated |= facts
    return " ".join(kept)
