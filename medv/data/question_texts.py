"""Captions and dialogues made from the training questions of VQA-RAD, for stages 1 and 2 of a synthetic profile.

Each image has some six training questions; together, their answers are all that the data set says about it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from medv.data.example import Example, Turn

CAPTION_REQUESTS = (
    "Describe the image briefly.",
    "Give a short caption of the image.",
    "What does the image show, in one sentence?",
    "Summarize the image in one sentence.",
)

_ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
_NAMED = {"MODALITY": "Modality", "PLANE": "Plane"}
MOST_TURNS = 12  # questions of one dialogue or caption


def caption_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, a request and a caption: organ, modality and plane where given, then questions and
    answers about it in an order drawn from (seed, copy, image).
    """

    def turns(asked: Sequence[Example], rng: np.random.Generator) -> tuple[Turn, ...]:
        request = str(rng.choice(CAPTION_REQUESTS))
        organ = _ORGANS.get(str(asked[0].meta.get("image_organ")))
        parts = [f"An image of the {organ}."] if organ else []
        for kind, name in _NAMED.items():
            given = [e.answer for e in asked if e.meta.get("question_type") == kind and e.answer_type == "OPEN"]
            parts += [f"{name}: {given[0]}."] if given else []
        parts += [f"Question: {e.question} Answer: {e.answer}." for e in _shuffled(asked, rng)]
        return (Turn("user", request), Turn("assistant", " ".join(parts)))

    return _of_images(questions, "caption", turns, copies, seed)


def dialogue_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, its questions and answers as one dialogue, in an order drawn from (seed, copy, image)."""

    def turns(asked: Sequence[Example], rng: np.random.Generator) -> tuple[Turn, ...]:
        return tuple(turn for example in _shuffled(asked, rng) for turn in example.turns)

    return _of_images(questions, "dialogue", turns, copies, seed)


def _of_images(questions: Sequence[Example], kind: str, turns: Callable, copies: int, seed: int) -> list[Example]:
    groups: dict[str, list[Example]] = {}
    for example in questions:
        groups.setdefault(example.meta["image"], []).append(example)
    return [
        Example(
            f"{image}/{kind}/{copy}",
            asked[0].image,
            turns(asked, np.random.default_rng([seed, copy, number])),
            None,
            {"image": image},
        )
        for number, (image, asked) in enumerate(groups.items())
        for copy in range(copies)
    ]


def _shuffled(asked: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    return [asked[place] for place in rng.permutation(len(asked))[:MOST_TURNS]]
