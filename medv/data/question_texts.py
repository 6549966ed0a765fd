"""Captions and dialogues made from the questions of VQA-RAD: what stages 1 and 2 learn from where nobody wrote reports.

Each image has some six training questions; their answers, put together, are all that the data set says about it. Given
training questions, nothing here can know a test question. It trains nothing.
"""

from collections.abc import Sequence

import numpy as np

from medv.data.example import Example, Turn

CAPTION_REQUESTS = (
    "Describe the image briefly.",
    "Give a short caption of the image.",
    "What does the image show, in one sentence?",
    "Summarize the image in one sentence.",
)

ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
NAMED = {"MODALITY": "Modality", "PLANE": "Plane"}
MOST_TURNS = 12  # questions of one dialogue or caption


def caption_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, a request and a caption: organ, modality and plane where known, then questions and
    answers about it in an order drawn from (seed, copy, image).
    """
    made = []
    for number, (image, asked) in enumerate(_by_image(questions).items()):
        for copy in range(copies):
            rng = np.random.default_rng([seed, copy, number])
            turns = (Turn("user", str(rng.choice(CAPTION_REQUESTS))), Turn("assistant", _caption(asked, rng)))
            made.append(Example(f"{image}/caption/{copy}", asked[0].image, turns, None, {"image": image}))
    return made


def dialogue_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, its questions and answers as the turns of one dialogue, in an order drawn from (seed,
    copy, image).
    """
    made = []
    for number, (image, asked) in enumerate(_by_image(questions).items()):
        for copy in range(copies):
            chosen = _shuffled(asked, np.random.default_rng([seed, copy, number]))
            turns = tuple(turn for example in chosen for turn in example.turns)
            made.append(Example(f"{image}/dialogue/{copy}", asked[0].image, turns, None, {"image": image}))
    return made


def _by_image(questions: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in questions:
        groups.setdefault(example.meta["image"], []).append(example)
    return groups


def _shuffled(asked: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    return [asked[place] for place in rng.permutation(len(asked))[:MOST_TURNS]]


def _caption(asked: Sequence[Example], rng: np.random.Generator) -> str:
    organ = ORGANS.get(str(asked[0].meta.get("image_organ")))
    parts = [f"An image of the {organ}."] if organ else []
    for kind, name in NAMED.items():
        told = [e.answer for e in asked if e.meta.get("question_type") == kind and e.answer_type == "OPEN"]
        parts += [f"{name}: {told[0]}."] if told else []
    parts += [f"Question: {e.question} Answer: {e.answer}." for e in _shuffled(asked, rng)]
    return " ".join(parts)
