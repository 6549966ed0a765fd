"""Controls for visual question answering: answers that need no image, and inputs with wrong or gray images.

Their answers are scored by `medv.evaluation.vqa` beside the model's own.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from medv.data.example import Example
from medv.evaluation.vqa import normalize

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MajorityAnswers:
    """Two blind answer lists for the same test questions."""

    majority: list[str]  # the most frequent training answer to any question of the same type
    lookup: list[str]  # the most frequent training answer to the same question, else the majority answer


def majority_answers(train_examples: Sequence[Example], test_examples: Sequence[Example]) -> MajorityAnswers:
    """The answers that training frequencies alone give; spellings that normalize alike are counted together.

    Ties go to the answer that comes first in training. Raises ValueError where training lacks a type of question.
    """
    counts, spelling = defaultdict(Counter), {}  # counts by type, and by type and question
    for example in train_examples:
        answer = normalize(example.answer)
        spelling.setdefault(answer, example.answer)
        counts[example.answer_type][answer] += 1
        counts[example.answer_type, normalize(example.question)][answer] += 1
    most_frequent = {key: spelling[part.most_common(1)[0][0]] for key, part in counts.items()}
    _check_types(train_examples, test_examples)
    majority = [most_frequent[example.answer_type] for example in test_examples]
    keys = [(example.answer_type, normalize(example.question)) for example in test_examples]
    return MajorityAnswers(majority, [most_frequent.get(key, usual) for key, usual in zip(keys, majority, strict=True)])


def nearest_answers(train_examples: Sequence[Example], test_examples: Sequence[Example]) -> list[str]:
    """For each test question the answer to the training question of its type with the most words in common (Jaccard).

    Words are runs of letters, digits and underscores in lower case; of equally near questions the first in training counts.
    Raises ValueError where training lacks a type of question.
    """
    _check_types(train_examples, test_examples)
    number: dict[str, int] = {}
    train, test = (
        [{number.setdefault(word, len(number)) for word in _WORD.findall(example.question.lower())} for example in examples]
        for examples in (train_examples, test_examples)
    )
    known, asked = (np.zeros((len(sets), len(number)), dtype=np.float32) for sets in (train, test))  # 1: has the word
    for table, sets in ((known, train), (asked, test)):
        for row, words in zip(table, sets, strict=True):
            row[list(words)] = 1
    shared = asked @ known.T  # [tests, trainings]
    near = shared / np.maximum(asked.sum(1)[:, None] + known.sum(1) - shared, 1)
    types = np.array([example.answer_type for example in train_examples], dtype=object)
    same = types == np.array([example.answer_type for example in test_examples], dtype=object)[:, None]
    return [train_examples[place].answer for place in np.where(same, near, -1).argmax(axis=1)]


def _check_types(train_examples: Sequence[Example], test_examples: Sequence[Example]) -> None:
    known = {example.answer_type for example in train_examples}
    for example in test_examples:
        if example.answer_type not in known:
            raise ValueError(f"no training example has the answer type {example.answer_type!r} of question {example.id}")


def gray_picture() -> Image.Image:
    """A uniform gray picture."""
    return Image.new("RGB", (64, 64), (127, 127, 127))


def blinded(examples: Sequence[Example]) -> list[Example]:
    """The same questions with a gray picture in place of every image."""
    return [example if example.image is None else replace(example, image=gray_picture) for example in examples]


def shuffled_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions, each with the image of another example and never with its own picture.

    `meta["image_of"]` names the example that the image came from. Raises ValueError if an example has no image, or if one image
    belongs to more than half of the examples, which leaves no such assignment.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        if example.image is None:
            raise ValueError(f"example {example.id} has no image to exchange: give the image folder")
        image = example.image
        if isinstance(image, partial):  # drawn: equal function and arguments make an equal picture
            image = image.func, image.args, tuple(sorted(image.keywords.items()))
        groups[image].append(place)
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
