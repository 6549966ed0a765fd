"""A VQA test with its controls, and the sampler configuration of a profile.

The conditions: the model; the same model shown the images of other questions ("shuffled images") or a gray picture ("gray
image"); the answer to the training question with the most words in common ("nearest question"); the most frequent training
answer to the same question ("question only") and to all questions of its type ("majority"). The last five never see the image.
"""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medv.companion.audit.controls import blinded, majority_answers, nearest_answers, shuffled_images
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import OfficialConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import METRICS as FIELDS
from medv.evaluation.vqa import evaluate_vqa
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

    A metric of the other answer type is NaN. seconds: wall time per question. looks: prepared images. Raises ValueError for
    an unknown condition.
    """
    if unknown := set(conditions) - set(CONDITIONS):
        raise ValueError(f"unknown condition {', '.join(sorted(unknown))}: use {', '.join(CONDITIONS)}")
    blind = majority_answers(train, test)
    baselines = {"nearest question": nearest_answers(train, test), "question only": blind.lookup, "majority": blind.majority}
    shown = {"model": test, "gray image": blinded(test)}
    references, frames = [Reference.of(example) for example in test], []
    asked = [(ex.id, ex.meta.get("kind"), ex.answer_type, ex.question, ex.answer) for ex in test]
    for condition in conditions:
        started = time.perf_counter()
        answers = baselines.get(condition)
        if answers is None:
            seen = shuffled_images(test, seed) if condition == "shuffled images" else shown[condition]
            given = answerer.answer(seen, config, looks=looks, batch_size=batch_size, quiet=quiet)
            answers = [answer.text for answer in given]
        frame = pd.DataFrame(asked, columns=["id", "kind", "answer_type", "question", "reference"]).assign(answer=list(answers))
        frame.insert(0, "condition", condition)
        frame.insert(1, "seed", seed)
        scores = evaluate_vqa(references, answers).items
        for metric in METRICS:
            values = [getattr(item, FIELDS[metric]) for item in scores]
            frame[metric] = [np.nan if value is None else 100.0 * value for value in values]
        frame["seconds"] = (time.perf_counter() - started) / len(test)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
