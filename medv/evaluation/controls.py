"""What a model must beat: answers that need no image, and the same model shown the wrong images or nothing but gray.

This module runs no model and scores nothing; its answers go to `medv.evaluation.vqa`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from medv.data.example import Example
from medv.evaluation.normalize import normalize

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MajorityAnswers:
    """Two blind answer lists for the same test questions."""

    majority: list[str]  # the most frequent training answer to any question of the same type
    lookup: list[str]  # the most frequent training answer to the same question, else the majority answer


def majority_answers(train_examples: Sequence[Example], test_examples: Sequence[Example]) -> MajorityAnswers:
    """The answers that word frequencies alone give; spellings that normalize alike are counted together.

    Ties go to the answer that comes first in training. Raises ValueError where training lacks a type of question.
    """
    by_type, by_question, spelling = defaultdict(Counter), defaultdict(Counter), {}
    for example in train_examples:
        answer = normalize(example.answer)
        spelling.setdefault(answer, example.answer)
        by_type[example.answer_type][answer] += 1
        by_question[_question_key(example)][answer] += 1
    majority, lookup = [], []
    for example in test_examples:
        if example.answer_type not in by_type:
            raise ValueError(f"no training example has the answer type {example.answer_type!r} of question {example.id}")
        usual = _first(by_type[example.answer_type])
        key = _question_key(example)
        majority.append(spelling[usual])
        lookup.append(spelling[_first(by_question[key]) if key in by_question else usual])
    return MajorityAnswers(majority, lookup)


def nearest_answers(train_examples: Sequence[Example], test_examples: Sequence[Example]) -> list[str]:
    """For each test question the answer to the training question of its type with the most words in common (Jaccard).

    Words are runs of letters, digits and underscores in lower case; of equally near questions the first in training counts.
    Raises ValueError where training lacks a type of question.
    """
    number: dict[str, int] = {}
    train, test = (
        [{number.setdefault(word, len(number)) for word in _WORD.findall(example.question.lower())} for example in examples]
        for examples in (train_examples, test_examples)
    )
    known, asked = _incidence(train, len(number)), _incidence(test, len(number))
    shared = asked @ known.T  # [tests, trainings]
    near = shared / np.maximum(asked.sum(1)[:, None] + known.sum(1) - shared, 1)
    types = np.array([example.answer_type for example in train_examples])
    answers = []
    for example, row in zip(test_examples, near, strict=True):
        same = types == example.answer_type
        if not same.any():
            raise ValueError(f"no training example has the answer type {example.answer_type!r} of question {example.id}")
        answers.append(train_examples[int(np.where(same, row, -1).argmax())].answer)
    return answers


def _incidence(sets: Sequence[set[int]], width: int) -> np.ndarray:
    """float32 [sets, width]: 1 where a word is in a set."""
    table = np.zeros((len(sets), width), dtype=np.float32)
    for row, words in zip(table, sets, strict=True):
        row[list(words)] = 1
    return table


def _question_key(example: Example) -> tuple[str | None, str]:
    return example.answer_type, normalize(example.question)


def _first(counts: Counter) -> str:
    return counts.most_common(1)[0][0]


def gray_picture() -> Image.Image:
    """A uniform gray picture, in which there is nothing to see."""
    return Image.new("RGB", (64, 64), (127, 127, 127))


def blinded(examples: Sequence[Example]) -> list[Example]:
    """The same questions with a gray picture in place of every image: to ask a model blind, or to train it so."""
    return [example if example.image is None else replace(example, image=gray_picture) for example in examples]


def shuffled_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions, each with the image of another example, and never by chance with its own picture.

    `meta["image_of"]` names the example that the image came from. Raises ValueError if an example has no image, or if one image
    belongs to more than half of the examples, which leaves no such assignment.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        if example.image is None:
            raise ValueError(f"example {example.id} has no image to exchange: give the image folder")
        groups[_picture(example)].append(place)
    shift = max(map(len, groups.values()), default=0)
    if 2 * shift > len(examples):
        raise ValueError(f"one image belongs to {shift} of the {len(examples)} examples: too many to give each another's")
    rng = np.random.default_rng(seed)
    pictures = list(groups.values())
    # Examples of one picture stand together, so a turn by the largest group's size moves every example off its own picture.
    order = [int(place) for index in rng.permutation(len(pictures)) for place in rng.permutation(pictures[index])]
    shuffled = list(examples)
    for place, source in zip(order, order[shift:] + order[:shift], strict=True):
        own, other = examples[place], examples[source]
        named = {"image": other.meta["image"]} if "image" in other.meta else {}
        shuffled[place] = replace(own, image=other.image, meta={**own.meta, **named, "image_of": other.id})
    return shuffled


def _picture(example: Example) -> Hashable:
    """What tells two pictures apart: the path, or the function and arguments that draw it."""
    image = example.image
    if isinstance(image, partial):
        return image.func, image.args, tuple(sorted(image.keywords.items()))
    return image
