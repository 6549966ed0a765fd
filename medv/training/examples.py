"""Which examples a stage learns from: the phantoms' own sets, or a real data set in a folder.

| protocol | learns from | is asked |
|---|---|---|
| official | all training questions | the test questions; in VQA-RAD 202 of the 203 test images are training images, too |
| image_disjoint | training questions about images that no test question is about | the test questions |
| validation | the other training questions | those about held-out images, and held-out ones about images of the training |

Recipes are chosen by `validation`; no test row is read for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from medv import limits
from medv.data.example import Example
from medv.data.readers import data_set, read_dataset, read_training_set
from medv.data.texts import caption_examples, dialogue_examples
from medv.phantoms import sets as phantom_sets
from medv.profiles import STAGES, Profile

PHANTOM_SETS = {"align": phantom_sets.alignment_set, "instruct": phantom_sets.instruct_set, "vqa": phantom_sets.vqa_set}
PROTOCOLS = ("official", "image_disjoint", "validation")
SEEN, UNSEEN = "seen images", "unseen images"
VALIDATION_EXAMPLES = 64
PHANTOMS_ADDED = 300  # to real images
CAPTIONS, DIALOGUES = 2, 3  # of each image, in stage instruct; each has its own order of the questions
HELD_OUT = 0.15  # of the images, and of the questions about the others


@dataclass(frozen=True)
class TrainingData:
    """A data set by name, the folder of a real one, and the protocol; images may be links into the folders `roots`."""

    name: str = "phantoms"
    folder: Path | None = None
    protocol: str = "official"
    roots: tuple[Path, ...] = ()


PHANTOMS = TrainingData()


def stage_examples(
    stage: str, profile: Profile, data: TrainingData = PHANTOMS, *, skip_corrupt: bool = False
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of a stage; real data have none for validation during the training.

    From VQA-RAD the stages align and instruct of a synthetic profile learn captions and dialogues made of its training
    questions, with at most PHANTOMS_ADDED phantoms. With skip_corrupt missing images are left to the training, which counts
    them. Raises ValueError for what cannot be trained on, see `medv.data.readers`.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: use pretrain, {', '.join(STAGES)}")
    maker, size, recipe = PHANTOM_SETS[stage], profile.model.image_size, profile.recipe(stage, data.name)
    if data.name == "phantoms":
        if data.folder is not None:
            raise ValueError(f"--data-dir {data.folder} is for a real data set: name that with --data, or leave it out")
        if not profile.synthetic:
            raise ValueError(f"profile {profile.name} trains on real data: name it with --data and --data-dir")
        if data.protocol != "official":
            raise ValueError(f"protocol {data.protocol} is for real data: phantoms are never in two splits")
        count = min(VALIDATION_EXAMPLES, recipe.samples)
        return maker("train", recipe.samples, image_size=size), maker("validation", count, image_size=size)
    if data.folder is None:
        raise ValueError(f"--data {data.name} needs the folder of the data set: give --data-dir")
    if data.protocol == "official":  # a data set without questions to ask has this one alone, and may have no test split
        train = read_training_set(data.name, data.folder, roots=data.roots, skip_corrupt=skip_corrupt)
    else:
        train = question_split(data, skip_corrupt=skip_corrupt)[0]
    if recipe.lower_case:
        train = in_lower_case(train)
    if stage == "vqa" or not data_set(data.name).captioned or not profile.synthetic:
        return train, []
    texts = caption_examples(train, copies=CAPTIONS)
    texts += dialogue_examples(train, copies=DIALOGUES) if stage == "instruct" else []
    return [*texts, *maker("train", min(PHANTOMS_ADDED, recipe.samples), image_size=size)], []


def drawn(train: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` training examples of a seed; a larger set holds the smaller ones."""
    if size > len(train):
        raise ValueError(f"a training set of {size} was asked for, but there are {len(train)} examples: lower the sizes")
    order = np.random.default_rng([seed, 0x10A4]).permutation(len(train))
    return [train[index] for index in order[:size]]


def in_lower_case(questions: Sequence[Example]) -> list[Example]:
    """The same questions with answers in lower case: data sets write "Yes" and "yes", the scores read one word."""
    return [
        replace(e, turns=tuple(replace(t, text=t.text.lower()) if t.role == "assistant" else t for t in e.turns))
        for e in questions
    ]


def question_split(data: TrainingData, *, skip_corrupt: bool = False) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training questions and the lists to be asked, by name, under a protocol; raises ValueError for an unknown one."""
    limits.named("protocol", data.protocol, PROTOCOLS)
    train = read_training_set(data.name, data.folder, roots=data.roots, skip_corrupt=skip_corrupt)
    if data.protocol == "validation":
        train, held = validation_split(train)
        return train, {f"{data.name} validation, {name}": questions for name, questions in held.items()}
    test = read_dataset(data.name, data.folder, "test", roots=data.roots)
    if data.protocol == "official":
        return train, {f"{data.name} test": test}
    asked = {example.meta["image"] for example in test}
    train = [example for example in train if example.meta["image"] not in asked]
    if not train:
        raise ValueError(f"every training image of {data.name} is a test image, too: there is no image-disjoint training")
    return train, {f"{data.name} test, {UNSEEN}": test}


def validation_split(questions: Sequence[Example]) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training questions cut into those to learn from and two held-out lists, by hashes of names, the same on every machine.

    UNSEEN has all questions about a share HELD_OUT of the images; SEEN has a like share of those about the other images,
    together with those that share their image, type of question and answer: mostly the same question in other words.
    """
    kept, held = [], {SEEN: [], UNSEEN: []}
    for example in questions:
        image = example.meta["image"]
        if _share(image) < HELD_OUT:
            held[UNSEEN].append(example)
        elif _share(image, str(example.meta.get("question_type")), example.answer.strip().lower()) < HELD_OUT:
            held[SEEN].append(example)
        else:
            kept.append(example)
    return kept, held


def _share(*names: str) -> float:
    """A number in [0, 1) that depends on the names alone."""
    return int.from_bytes(sha256("\n".join(names).encode()).digest()[:8], "big") / 2**64
