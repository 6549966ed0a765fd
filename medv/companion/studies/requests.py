"""Requests of the studies and their scores: phantoms by the facts of their scenes, real questions by a judge or by words.

Phantoms are drawn where a profile has no other data; real requests are those of the chat benchmark (qa50, 193 questions).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medv.artifacts import read_jsonl
from medv.data.example import Example
from medv.data.readers import check_pictures, data_set, read_dataset
from medv.evaluation.judge_client import Endpoint
from medv.evaluation.judging import judge_file
from medv.evaluation.vqa import normalize, token_scores
from medv.phantoms.facts import score_description
from medv.phantoms.sets import alignment_set, description_set
from medv.profiles import Profile
from medv.training.examples import PHANTOMS, TrainingData

MAKERS = {"caption": alignment_set, "description": description_set}


def requests_for(
    profile: Profile, source: TrainingData = PHANTOMS, count: int | None = None, *, kind: str = "description", seed: int = 0
) -> list[Example]:
    """Test requests: phantoms with a caption or a description, or real ones, evenly chosen where there are more than `count`
    (default: the profile's). Raises DataError where images of real ones are missing.
    """
    count = count or profile.evaluation_descriptions
    if source.name == PHANTOMS.name:
        return MAKERS[kind]("test", count, seed=seed, image_size=profile.model.image_size)
    found = read_dataset(source.name, source.folder, "test")
    check_pictures(found, source.folder)
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [found[place] for place in chosen]


def about(example: Example) -> str:
    """The facts of a phantom, or the domain of a real image, to read."""
    scene = example.meta.get("scene")
    return example.domain if scene is None else ", ".join(value for _, value in sorted(scene.facts()))


def text_scores(text: str, example: Example) -> dict[str, float]:
    """precision, recall, f1 (percent) of a text: of the facts of its phantom, or, of a real image, of the reference's words."""
    if "scene" in example.meta:
        found = score_description(text, example.meta["scene"])
        precision, recall, f1 = found.precision, found.recall, found.f1
    else:
        recall, precision, f1 = token_scores(normalize(example.answer).split(), normalize(text).split())
    return {"precision": 100.0 * precision, "recall": 100.0 * recall, "f1": 100.0 * f1}


def scored_by(examples: Sequence[Example]) -> str:
    """The unit of `text_scores`, for titles."""
    return "facts" if all("scene" in example.meta for example in examples) else "words of the reference"


@dataclass(frozen=True)
class JudgeOf:
    """Scores answers to a real benchmark by an endpoint, with every judgement kept: judge(answers, out) gives percent of the
    reference's score by question id. Raises RuntimeError where the endpoint stops answering; what was judged is kept.
    """

    endpoint: Endpoint
    questions: Path

    def __call__(self, answers: Path, out: Path) -> dict[str, float]:
        """Judge an answer file into `out`, which may be continued."""
        scores = judge_file(self.questions, answers, out, self.endpoint, cache=out.parent / "judge_cache", quiet=True)
        if scores.stopped:
            raise RuntimeError(
                f"{scores.stopped}; {len(scores.judged)} questions are judged and kept: mend that, and run again"
            )
        answered = {str(row["question_id"]) for row in read_jsonl(answers)}
        if lost := [(name, reason) for name, reason in scores.unjudged if name in answered]:
            name, reason = lost[0]
            print(f"{len(lost)} answers of {answers.name} have no score and stand in no mean; {name}: {reason}")
        return {item.id: item.relative for item in scores.judged}


Judge = Callable[[Path, Path], Mapping[str, float]]


def judge_of(endpoint: Endpoint | None, source: TrainingData) -> JudgeOf | None:
    """The judge of real requests; None where no endpoint is given."""
    return None if endpoint is None else JudgeOf(endpoint, data_set(source.name).find(source.folder, "test"))
