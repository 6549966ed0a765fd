"""The phantom data sets of the three stages, of the evaluation and of the text pretraining, as lists of `Example`.

Every function is deterministic in (split, seed, index) and prefix-stable: the first 100 of 1,000 examples are the examples of
a set of 100. Image numbers of different sets and splits never meet, so no image is in two of them. `meta` carries
{"scene": Scene or ShapeScene, "kind": str}; the kind is "caption", "description", "dialogue", or that of the question. Images
are drawn when called for, so building a set draws nothing.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from medv.data.example import Example, Turn
from medv.data.question_texts import CAPTION_REQUESTS
from medv.phantoms.general import sample_shapes, shapes_image
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


def alignment_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 1: a request for a caption and the caption."""

    def example(index: int) -> Example:
        rng, scene = _scene("align", split, index, seed)
        turns = _turns((pick(rng, CAPTION_REQUESTS), caption(scene, rng)))
        return _phantom("align", split, index, seed, scene, turns, "caption", image_size)

    return _build(example, n)


def instruct_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 2: half descriptions, half dialogues of 1-4 questions; a third of these begin with a description."""

    def example(index: int) -> Example:
        rng, scene = _scene("instruct", split, index, seed)
        turns, kind = _dialogue(scene, rng)
        return _phantom("instruct", split, index, seed, scene, turns, kind, image_size)

    return _build(example, n)


def description_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """A request for a detailed description and one reference answer, for evaluation."""

    def example(index: int) -> Example:
        rng, scene = _scene("description", split, index, seed)
        turns = _turns((pick(rng, DESCRIPTION_REQUESTS), description(scene, rng)))
        return _phantom("description", split, index, seed, scene, turns, "description", image_size)

    return _build(example, n)


def vqa_set(split: str, n: int, *, hard: bool = False, seed: int = 0, image_size: int = 64) -> list[Example]:
    """Stage 3: half closed, half open questions with short answers; `hard` names both values of two-valued attributes."""
    name = "vqa_hard" if hard else "vqa"

    def example(index: int) -> Example:
        number = _number(name, split, index, seed)
        question = balanced_question(index, salt=_salt(name, split, seed), scene_seed=number, hard=hard)
        turns = _turns((question.text, question.answer))
        return _phantom(name, split, index, seed, question.scene, turns, question.kind, image_size, question.form.upper())

    return _build(example, n)


def general_set(split: str, n: int, *, seed: int = 0, image_size: int = 64) -> list[Example]:
    """The general domain: captions, descriptions (a quarter each) and questions about colored shapes."""

    def example(index: int) -> Example:
        scene, turns, kind, form = _shapes_example("general", split, index, seed)
        image = partial(shapes_image, scene, image_size)
        return Example(_id("general", split, index, seed), image, turns, form, {"scene": scene, "kind": kind})

    return _build(example, n)


def text_set(split: str, n: int, *, seed: int = 0) -> list[Example]:
    """Text only, for the language tower: the user turn carries the facts as tags, the answer needs them read.

    Of twenty examples six are descriptions, three captions, five balanced questions, two dialogues, one a report without
    tags, and three are about shapes.
    """

    def example(index: int) -> Example:
        turns, scene, kind, form = _text_example(split, index, seed)
        return Example(_id("text", split, index, seed), None, turns, form, {"scene": scene, "kind": kind})

    return _build(example, n)


def brief_set(split: str, n: int, *, seed: int = 0) -> list[Example]:
    """Text only: one balanced question about facts that stand as tags before it, and its brief answer.

    With so little to say, reading is all there is to learn: the first lesson of the language tower. Of the closed
    questions, which are answered by chance half of the time, two in five are kept.
    """
    examples: list[Example] = []
    salt, index = _salt("text", split, seed), 0
    while len(examples) < n:
        number = _number("text", split, index, seed)
        question = balanced_question(index, salt=salt, scene_seed=number)
        index += 1
        rng = np.random.default_rng([index, 7])
        if question.form == "closed" and rng.random() > CLOSED_SHARE:
            continue
        turns = _turns((_tagged(tags(question.scene, rng), question.text + BRIEFLY), question.answer))
        meta = {"scene": question.scene, "kind": question.kind}
        examples.append(Example(f"{_id('text', split, index, seed)}/brief", None, turns, question.form.upper(), meta))
    return examples


def _build(example: Callable[[int], Example], n: int) -> list[Example]:
    if not 0 <= n <= _RANGE:
        raise ValueError(f"a set of {n} examples cannot be made: ask for 0..{_RANGE}")
    return [example(index) for index in range(n)]


def _place(index: int, seed: int) -> int:
    """Where in the range of its set an example lies; other seeds take other parts."""
    return (index + seed * 10_000_019) % _RANGE


def _number(name: str, split: str, index: int, seed: int) -> int:
    """The image number."""
    return split_seed(split, _SETS.index(name) * _RANGE + _place(index, seed))


def _salt(name: str, split: str, seed: int) -> int:
    return _number(name, split, 0, seed)


def _scene(name: str, split: str, index: int, seed: int) -> tuple[np.random.Generator, Scene]:
    number = _number(name, split, index, seed)
    return np.random.default_rng([number, 0x7E87]), sample_scene(number)


def _id(name: str, split: str, index: int, seed: int) -> str:
    return f"phantom/{split}/{name}/{_place(index, seed)}"


def _turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said)))


def _phantom(
    name: str,
    split: str,
    index: int,
    seed: int,
    scene: Scene,
    turns: tuple[Turn, ...],
    kind: str,
    image_size: int,
    answer_type: str | None = None,
) -> Example:
    image = partial(phantom_image, scene, image_size)
    return Example(_id(name, split, index, seed), image, turns, answer_type, {"scene": scene, "kind": kind})


def _dialogue(scene: Scene, rng: np.random.Generator) -> tuple[tuple[Turn, ...], str]:
    described = rng.random()
    pairs = []
    if described < 2 / 3:
        pairs.append((pick(rng, DESCRIPTION_REQUESTS), description(scene, rng)))
        if described < 0.5:
            return _turns(*pairs), "description"
    kinds = _kinds_to_ask(scene, rng)
    for kind in kinds[: 1 + int(rng.random() * (4 - len(pairs)))]:
        question = ask(scene, kind, pick(rng, ("closed", "open")), rng)
        pairs.append((question.text, question.sentence))
    return _turns(*pairs), "dialogue"


def _kinds_to_ask(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The kinds in random order; "is it abnormal" as often of normal images (one in five) as of abnormal ones."""
    kinds = [kind for kind in rng.permutation(KINDS) if kind in kinds_of(scene)]
    if scene.finding != NORMAL and rng.random() < 0.75:
        kinds.remove("abnormal")
    return [str(kind) for kind in kinds]


def _shapes_example(name: str, split: str, index: int, seed: int, tagged: bool = False):
    """(scene, turns, kind, answer type) of one example about shapes."""
    number = _number(name, split, index, seed)
    rng = np.random.default_rng([number, 0x5A7E7])
    task, place = index % 4, index // 4
    if task < 2:
        scene = sample_shapes(number)
        if task == 0:
            kind, asked, said = "caption", pick(rng, CAPTION_REQUESTS), shapes_caption(scene, rng)
        else:
            kind, asked, said = "description", pick(rng, DESCRIPTION_REQUESTS), shapes_description(scene, rng)
        form = None
    else:
        question = balanced_shapes_question(2 * place + task - 2, salt=_salt(name, split, seed), scene_seed=number)
        scene, kind, form = question.scene, question.kind, question.form.upper()
        asked, said = _short_or_sentence(question, rng)
    return scene, _turns((_tagged(shapes_tags(scene, rng), asked) if tagged else asked, said)), kind, form


def _short_or_sentence(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """Either a brief answer that was asked for, or a sentence."""
    if rng.random() < 0.5:
        return question.text + BRIEFLY, question.answer
    return question.text, question.sentence


def _tagged(words: list[str], request: str) -> str:
    return f"Tags: {', '.join(words)}\n{request}"


def _text_example(split: str, index: int, seed: int):
    """(turns, scene, kind, answer type) of one text example."""
    round_, task = divmod(index, 20)
    if task >= 17:
        scene, turns, kind, form = _shapes_example("text", split, 3 * round_ + task - 17, seed, tagged=True)
        return turns, scene, kind, form
    rng, scene = _scene("text", split, index, seed)
    if task < 5:
        number, salt = _number("text", split, index, seed), _salt("text", split, seed)
        question = balanced_question(5 * round_ + task, salt=salt, scene_seed=number, hard=task % 2 == 1)
        asked, said = _short_or_sentence(question, rng)
        turns = _turns((_tagged(tags(question.scene, rng), asked), said))
        return turns, question.scene, question.kind, question.form.upper()
    if task < 11:
        pair, kind = (pick(rng, DESCRIPTION_REQUESTS), description(scene, rng)), "description"
    elif task < 14:
        pair, kind = (pick(rng, CAPTION_REQUESTS), caption(scene, rng)), "caption"
    elif task < 16:
        turns, kind = _dialogue(scene, rng)
        first = Turn("user", _tagged(tags(scene, rng), turns[0].text))
        return (first, *turns[1:]), scene, kind, None
    else:
        return _turns((pick(rng, REPORT_REQUESTS), description(scene, rng))), scene, "report", None
    return _turns((_tagged(tags(scene, rng), pair[0]), pair[1])), scene, kind, None
