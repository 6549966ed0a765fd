"""A VQA result with what it must be compared with: Table 2 and Figure 3 for our models, controls included.

Every study has the same conditions: the model; the same model shown the images of other questions ("shuffled images") or a
gray picture ("gray image"); the answer to the training question with the most words in common ("nearest question"); the most
frequent training answer to the same question ("question only") and to all questions of its type ("majority"). What the last
five reach needs no look at the image. This module trains nothing.
"""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import OfficialConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.controls import blinded, majority_answers, nearest_answers, shuffled_images
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import VQAScores, evaluate_vqa
from medv.model.looks import Looks
from medv.profiles import SamplerSpec

CONDITIONS = ("model", "shuffled images", "gray image", "nearest question", "question only", "majority")
METRICS = ("closed_accuracy", "open_recall", "closed_strict_accuracy", "open_set_recall", "open_precision", "open_f1")


def sampler_config(spec: SamplerSpec, *, seed: int = 0) -> SamplerConfig | OfficialConfig:
    """The sampler configuration of a profile's L, B and Z."""
    make = SamplerConfig.official if spec.preset == "official" else SamplerConfig
    return make(gen_length=spec.gen_length, block_length=spec.block_length, steps=spec.steps, seed=seed)


def vqa_study(
    answerer: Answerer,
    train: Sequence[Example],
    test: Sequence[Example],
    config: SamplerConfig,
    *,
    seed: int = 0,
    conditions: Sequence[str] = CONDITIONS,
    looks: Looks | None = None,
    batch_size: int = 50,
    quiet: bool = False,
) -> pd.DataFrame:
    """One row per condition and question: condition, seed, id, answer_type, question, reference, answer, metrics in percent.

    A metric that belongs to the other answer type is NaN. `seconds` is the wall time per question. `looks` spare images
    that were looked at before. Raises ValueError for an unknown condition.
    """
    unknown = set(conditions) - set(CONDITIONS)
    if unknown:
        raise ValueError(f"unknown condition {', '.join(sorted(unknown))}: use {', '.join(CONDITIONS)}")
    blind = majority_answers(train, test)
    told = {"nearest question": nearest_answers(train, test), "question only": blind.lookup, "majority": blind.majority}
    shown = {"model": test, "gray image": blinded(test)}
    references = [Reference.of(example) for example in test]
    frames = []
    for condition in conditions:
        started = time.perf_counter()
        answers = told.get(condition)
        if answers is None:
            seen = shuffled_images(test, seed) if condition == "shuffled images" else shown[condition]
            given = answerer.answer(seen, config, looks=looks, batch_size=batch_size, quiet=quiet)
            answers = [answer.text for answer in given]
        scores = evaluate_vqa(references, answers)
        frame = _item_frame(scores, test, answers)
        frame.insert(0, "condition", condition)
        frame.insert(1, "seed", seed)
        frame["seconds"] = (time.perf_counter() - started) / len(test)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _item_frame(scores: VQAScores, test: Sequence[Example], answers: Sequence[str]) -> pd.DataFrame:
    columns = {
        "closed_accuracy": "hit",
        "closed_strict_accuracy": "strict_hit",
        "open_recall": "recall",
        "open_set_recall": "set_recall",
        "open_precision": "precision",
        "open_f1": "f1",
    }
    frame = pd.DataFrame(
        {
            "id": [example.id for example in test],
            "kind": [example.meta.get("kind") for example in test],
            "answer_type": [example.answer_type for example in test],
            "question": [example.question for example in test],
            "reference": [example.answer for example in test],
            "answer": list(answers),
        }
    )
    for metric, name in columns.items():
        values = [getattr(item, name) for item in scores.items]
        frame[metric] = [np.nan if value is None else 100.0 * value for value in values]
    return frame


def summarize(items: pd.DataFrame, *, metrics: Sequence[str] = METRICS, resamples: int = 2000) -> pd.DataFrame:
    """Mean and 95 % interval per condition and metric, over seeds and questions.

    Columns: condition, metric, value, low, high (percent), n (questions), seeds. The interval is a two-level bootstrap:
    seeds are drawn with replacement, then questions, the same ones for every seed drawn, as the seeds share the test set.
    """
    rows = []
    for condition, part in items.groupby("condition", sort=False):
        for metric in metrics:
            grid = part.pivot_table(index="seed", columns="id", values=metric, dropna=True)
            if grid.empty:
                continue
            low, high = _two_level_interval(grid.to_numpy(), resamples)
            rows.append(
                {
                    "condition": condition,
                    "metric": metric,
                    "value": float(np.nanmean(grid.to_numpy())),
                    "low": low,
                    "high": high,
                    "n": grid.shape[1],
                    "seeds": grid.shape[0],
                }
            )
    return pd.DataFrame(rows)


def _two_level_interval(grid: np.ndarray, resamples: int, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of a [seeds, questions] grid."""
    rng = np.random.default_rng(0)
    seeds, questions = grid.shape
    means, mean = [], np.nanmean if np.isnan(grid).any() else np.mean
    for _ in range(resamples):
        columns = rng.integers(questions, size=questions)
        means.append(mean(grid[rng.integers(seeds, size=seeds)][:, columns]))
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wide(summary: pd.DataFrame, metrics: Sequence[str] = METRICS[:2]) -> pd.DataFrame:
    """The summary as a table to read: a row per condition, "mean [low, high]" and n per metric."""
    rows = []
    for condition, part in summary.groupby("condition", sort=False):
        row = {"condition": condition}
        for metric in metrics:
            found = part[part["metric"] == metric]
            if len(found):
                cell = found.iloc[0]
                row[metric] = f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"
                row[f"n {metric.partition('_')[0]}"] = int(cell["n"])
        rows.append(row)
    return pd.DataFrame(rows)
