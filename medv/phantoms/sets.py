"""The phantom data sets of the three stages, of the evaluation and of the text pretraining, as lists of `Example`.

Every set is deterministic in (split, seed, index) and prefix-stable: the first 100 of 1,000 examples are the set of 100. Image
numbers of different sets and splits are disjoint, so no image is in two of them. `meta` holds {"scene": Scene or ShapeScene,
"kind": str}; the kind is "caption", "description", "dialogue", "report", or that of the question. Images are drawn on demand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from medv.data.example import Example, Turn
from medv.data.texts import CAPTION_REQUESTS
from medv.phantoms.general import ShapeScene, sample_shapes, shapes_image
from medv.phantoms.pictures import phantom_image
from medv.phantoms.questions import KINDS, Question, ask, balanced_question, balanced_shapes_question, kinds_of
from medv.phantoms.scene import NORMAL, SPLIT_SIZE, Scene, sample_scene, split_seed
from medv.phantoms.wording import caption, description, pick, shapes_caption, shapes_description, shapes_tags, tags

DESCRIPTION_REQUESTS = (
    "Describe the image in detail.",
    "Write a detailed report of the image.",
    "What do you see? Give a detailed description.",
    "Please give a full description of the image.",
)
REPORT_REQUESTS = ("Write a report of a phantom image.", "Make up a detailed report.")
BRIEFLY = " Answer briefly."
CLOSED_SHARE = 0.4  # of the closed questions, in `brief_set`

# Each set has its own range of image numbers in every split.
_SETS = ("align", "instruct", "description", "vqa", "vqa_hard", "general", "text")
_RANGE = SPLIT_SIZE // len(_SETS)


@dataclass(frozen=True)
class _Numbers:
    """The image numbers of one set in one split; other seeds take other parts of its range."""

    name: str
    split: str
    seed: int

    def place(self, index: int) -> int:
        return (index + self.seed * 10_000_019) % _RANGE

    def __getitem__(self, index: int) -> int:
        return split_seed(self.split, _SETS.index(self.name) * _RANGE + self.place(index))

    def scene(self, index: int) -> tuple[np.random.Generator, Scene]:
        return np.random.default_rng([self[index], 0x7E87]), sample_scene(self[index])

    def example(self, index: int, content: "_Content", image_size: int | None = None) -> Example:
        """The example of what was said; `image_size` is None for text alone."""
        scene, turns, kind, form = content
        draw = shapes_image if isinstance(scene, ShapeScene) else phantom_image
        image = None if image_size is None else partial(draw, scene, image_size)
        name = f"phantom/{self.split}/{self.name}/{self.place(index)}"
        return Example(name, image, turns, form, {"scene": scene, "kind": kind})


_Content = tuple[Scene | ShapeScene, tuple[Turn, ...], str, str | None]
"""The scene, the turns, the kind and the answer type of an example."""


def alignment_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 1: a request for a caption and the caption."""
    return _requested(_Numbers("align", split, seed), n, image_size, CAPTION_REQUESTS, caption, "caption")


def instruct_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 2: half descriptions, half dialogues of 1-4 questions; a third of these begin with a description."""
    numbers = _Numbers("instruct", split, seed)
    return [numbers.example(index, _dialogue(*numbers.scene(index)), image_size) for index in _indices(n)]


def description_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """A request for a detailed description and one reference answer, for evaluation."""
    return _requested(_Numbers("description", split, seed), n, image_size, DESCRIPTION_REQUESTS, description, "description")


def _requested(
    numbers: _Numbers, n: int, image_size: int, requests: Sequence[str], write: Callable[..., str], kind: str
) -> list[Example]:
    examples = []
    for index in _indices(n):
        rng, scene = numbers.scene(index)
        turns = _turns((pick(rng, requests), write(scene, rng)))
        examples.append(numbers.example(index, (scene, turns, kind, None), image_size))
    return examples


def vqa_set(split: str, n: int, *, hard: bool = False, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 3: half closed, half open questions with short answers; `hard` names both values of two-valued attributes."""
    numbers, examples = _Numbers("vqa_hard" if hard else "vqa", split, seed), []
    for index in _indices(n):
        asked = balanced_question(index, salt=numbers[0], scene_seed=numbers[index], hard=hard)
        examples.append(numbers.example(index, _asked(asked, asked.text, asked.answer), image_size))
    return examples


def general_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """The general domain: captions, descriptions (a quarter each) and questions about colored shapes."""
    numbers = _Numbers("general", split, seed)
    return [numbers.example(index, _about_shapes(numbers, index), image_size) for index in _indices(n)]


def text_set(split: str, n: int, *, seed: int = 0) -> list[Example]:
    """Text only, for the language tower: the user turn carries the facts as tags, and the answer depends on them.

    Of twenty examples six are descriptions, three captions, five balanced questions, two dialogues, one a report without tags,
    and three are about shapes.
    """
    numbers = _Numbers("text", split, seed)
    return [numbers.example(index, _about_tags(numbers, index)) for index in _indices(n)]


def brief_set(split: str, n: int, *, seed: int = 0) -> list[Example]:
    """Text only, the first lesson of the language tower: a balanced question about tags before it, and its brief answer.

    Of the closed questions, which are answered by chance half of the time, two in five are kept.
    """
    numbers, examples, index = _Numbers("text", split, seed), [], 0
    while len(examples) < n:
        question = balanced_question(index, salt=numbers[0], scene_seed=numbers[index])
        index += 1
        rng = np.random.default_rng([index, 7])
        if question.form == "closed" and rng.random() > CLOSED_SHARE:
            continue
        asked = _tagged(tags(question.scene, rng), question.text + BRIEFLY)
        example = numbers.example(index, _asked(question, asked, question.answer))
        examples.append(replace(example, id=f"{example.id}/brief"))
    return examples


def _indices(n: int) -> range:
    if not 0 <= n <= _RANGE:
        raise ValueError(f"a set of {n} examples cannot be made: ask for 0..{_RANGE}")
    return range(n)


def _turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said)))


def _tagged(words: list[str], request: str) -> str:
    return f"Tags: {', '.join(words)}\n{request}"


def _asked(question: Question, asked: str, said: str) -> _Content:
    return question.scene, _turns((asked, said)), question.kind, question.form.upper()


def _short_or_sentence(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """A question and its answer: brief, as requested, or a sentence."""
    if rng.random() < 0.5:
        return question.text + BRIEFLY, question.answer
    return question.text, question.sentence


def _dialogue(rng: np.random.Generator, scene: Scene) -> _Content:
    described, pairs = rng.random(), []
    if described < 2 / 3:
        pairs.append((pick(rng, DESCRIPTION_REQUESTS), description(scene, rng)))
        if described < 0.5:
            return scene, _turns(*pairs), "description", None
    kinds = [str(kind) for kind in rng.permutation(KINDS) if kind in kinds_of(scene)]
    if scene.finding != NORMAL and rng.random() < 0.75:
        kinds.remove("abnormal")  # asked as often of normal images (one in five) as of abnormal ones
    for kind in kinds[: 1 + int(rng.random() * (4 - len(pairs)))]:
        question = ask(scene, kind, pick(rng, ("closed", "open")), rng)
        pairs.append((question.text, question.sentence))
    return scene, _turns(*pairs), "dialogue", None


def _about_shapes(numbers: _Numbers, index: int, *, tagged: bool = False) -> _Content:
    rng = np.random.default_rng([numbers[index], 0x5A7E7])
    task, place = index % 4, index // 4
    kind, form = ("caption", "description")[task % 2], None
    if task < 2:
        scene = sample_shapes(numbers[index])
        requests, write = ((CAPTION_REQUESTS, shapes_caption), (DESCRIPTION_REQUESTS, shapes_description))[task]
        asked, said = pick(rng, requests), write(scene, rng)
    else:
        question = balanced_shapes_question(2 * place + task - 2, salt=numbers[0], scene_seed=numbers[index])
        scene, kind, form = question.scene, question.kind, question.form.upper()
        asked, said = _short_or_sentence(question, rng)
    return scene, _turns((_tagged(shapes_tags(scene, rng), asked) if tagged else asked, said)), kind, form


def _about_tags(numbers: _Numbers, index: int) -> _Content:
    round_, task = divmod(index, 20)
    if task >= 17:
        return _about_shapes(numbers, 3 * round_ + task - 17, tagged=True)
    rng, scene = numbers.scene(index)
    if task < 5:
        hard = task % 2 == 1
        question = balanced_question(5 * round_ + task, salt=numbers[0], scene_seed=numbers[index], hard=hard)
        asked, said = _short_or_sentence(question, rng)
        return _asked(question, _tagged(tags(question.scene, rng), asked), said)
    if task == 16:
        return scene, _turns((pick(rng, REPORT_REQUESTS), description(scene, rng))), "report", None
    if task >= 14:
        _, (first, *others), kind, _ = _dialogue(rng, scene)
        return scene, (Turn("user", _tagged(tags(scene, rng), first.text)), *others), kind, None
    if task < 11:
        asked, said, kind = pick(rng, DESCRIPTION_REQUESTS), description(scene, rng), "description"
    else:
        asked, said, kind = pick(rng, CAPTION_REQUESTS), caption(scene, rng), "caption"
    return scene, _turns((_tagged(tags(scene, rng), asked), said)), kind, None
