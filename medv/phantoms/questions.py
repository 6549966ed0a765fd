"""Questions about phantoms, balanced by construction: the question alone tells nothing of the answer.

`balanced_question` chooses kind, answer and named value first, in strata, and only then samples a scene that fits. Each
closed question is planned as a pair, once with the answer yes and once with no, so P(yes | question text) = 1/2. Of a
two-valued attribute the main questions name one value only ("on the left?", never "on the right?"), which makes the answer a
read-out of the picture; `hard=True` names both, which makes it the exclusive or of question and picture and is far harder for
a small model. Open questions have uniform answers and never name the finding. `ask` puts a question to a given scene, for
dialogues; it is balanced over scenes, not by plan.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medv.phantoms.general import COLORS, COUNTS, SHAPES, ShapeScene, sample_shapes
from medv.phantoms.scene import ACQUISITIONS, DOMAINS, FINDINGS, LEVELS, NORMAL, SIDES, SIZES, Scene, sample_scene
from medv.phantoms.wording import MODALITY, counted, pick, with_article, with_capital

KINDS = ("modality", "abnormal", "finding", "side", "level", "size", "acquisition")
SHAPE_KINDS = ("shape", "color", "count")

_CLOSED = {
    "modality": ("Is this {x}?", "Is the image {x}?", "Are we looking at {x}?", "Is {x} shown?"),
    "finding": ("Is there {x}?", "Is {x} seen?", "Does the image show {x}?", "Is {x} present?"),
    "side": (
        "Is the abnormality on the {x}?",
        "Is the lesion on the {x} side?",
        "Is the finding on the {x}?",
        "Does the abnormality lie on the {x} side?",
    ),
    "level": (
        "Is the abnormality in the {x} part?",
        "Is the lesion in the {x} part?",
        "Is the finding {x}?",
        "Does the abnormality lie in the {x} part?",
    ),
    "size": ("Is the abnormality {x}?", "Is the lesion {x}?", "Is the finding {x} in size?", "Is it a {x} lesion?"),
    "acquisition": ("Is this {x}?", "Is the image {x}?", "Are we looking at {x}?", "Is {x} shown?"),
}
_ABNORMAL = {
    "abnormal": (
        "Is there an abnormality?",
        "Is any abnormality seen?",
        "Does the image show an abnormality?",
        "Is this image abnormal?",
    ),
    "normal": ("Is the image normal?", "Is this a normal study?", "Does the image look normal?", "Is this image normal?"),
}
_OPEN = {
    "modality": (
        "What kind of image is this?",
        "What is the modality?",
        "Which modality is shown?",
        "What type of study is this?",
    ),
    "abnormal": (
        "Is the image normal or abnormal?",
        "Is this study normal or abnormal?",
        "Does the image look normal or abnormal?",
        "Is it a normal or an abnormal image?",
    ),
    "finding": (
        "What abnormality is seen?",
        "What is the main finding?",
        "Which finding is present?",
        "What is the diagnosis?",
    ),
    "side": (
        "On which side is the abnormality?",
        "Which side is affected?",
        "On which side does the lesion lie?",
        "Is the abnormality on the left or on the right?",
    ),
    "level": (
        "At what level is the abnormality?",
        "Which level is affected?",
        "At which level does the lesion lie?",
        "What is the level of the finding?",
    ),
    "size": (
        "What is the size of the abnormality?",
        "How big is the lesion?",
        "What size is the finding?",
        "Is the abnormality small or large?",
    ),
    "acquisition": (
        "How was this image acquired?",
        "What is the acquisition?",
        "Which acquisition was used?",
        "How was the image obtained?",
    ),
}
_ACQUIRED = {
    "upright": "upright image",
    "portable": "portable image",
    "contrast": "contrast scan",
    "non-contrast": "non-contrast scan",
    "T1": "T1 scan",
    "T2": "T2 scan",
    "low power": "low power view",
    "high power": "high power view",
    "fresh": "fresh specimen",
    "fixed": "fixed specimen",
}
_UNCOUNTED = ("consolidation", "calcification", "edema", "inflammation", "necrosis", "carcinoma", "fibrosis")
_SHAPES_CLOSED = {
    "shape": ("Is there a {x}?", "Is the shape a {x}?", "Do we see a {x}?"),
    "color": ("Is it {x}?", "Is the color {x}?", "Is the shape drawn in {x}?"),
    "count": ("Is the count {x}?", "Is the number of shapes {x}?", "Do we count {x}?"),
}
_SHAPES_OPEN = {
    "shape": ("What shape is drawn?", "Which shape is seen?", "What is the shape?"),
    "color": ("What is the color?", "Which color is seen?", "What color is the shape?"),
    "count": ("How many shapes are there?", "What is the count?", "What is the number of shapes?"),
}
_SHAPES_SAY = {"shape": "the shape is a {x}", "color": "the color is {x}", "count": "the count is {x}"}

# One polarity: the values that a main closed question may name; of the two values of an attribute the second is asked.
_MAIN_VALUES = {
    "abnormal": ("abnormal",),
    "side": SIDES[:1],
    "level": ("upper", "anterior"),
    "size": SIZES[1:],
    "acquisition": tuple(values[1] for values in ACQUISITIONS.values()),
}
_ALL_VALUES = {
    "modality": DOMAINS,
    "abnormal": (NORMAL, "abnormal"),
    "finding": tuple((domain, finding) for domain in DOMAINS for finding in FINDINGS[domain]),
    "side": SIDES,
    "level": ("upper", "lower", "anterior", "posterior"),
    "size": SIZES,
    "acquisition": tuple(value for values in ACQUISITIONS.values() for value in values),
}
_PAIRS = (*ACQUISITIONS.values(), *set(LEVELS.values()), SIDES, SIZES)
_OTHER = {value: other for pair in _PAIRS for value, other in (pair, pair[::-1])}
BLOCK = 4 * len(KINDS)  # each kind, closed and open, twice


@dataclass(frozen=True)
class Question:
    """A question and the scene it is about. `named` is the value that a closed question names, `answer` the short answer,
    `sentence` the same in a full sentence."""

    kind: str
    form: str
    text: str
    answer: str
    sentence: str
    named: str | None
    scene: Scene | ShapeScene


@dataclass(frozen=True)
class _Plan:
    kind: str
    form: str
    named: str | None
    paraphrase: int
    wanted: tuple[tuple[str, str], ...]
    normal_share: float = 0.2


def balanced_question(index: int, *, salt: int, scene_seed: int, hard: bool = False) -> Question:
    """Question `index` of the endless balanced sequence `salt`, about a scene drawn from `scene_seed`.

    Every `BLOCK` consecutive questions from a multiple of BLOCK hold each kind four times: closed yes, closed no, open, open.
    """
    plan = _block(index // BLOCK, salt, hard)[index % BLOCK]
    scene = sample_scene(scene_seed, normal_share=plan.normal_share, **dict(plan.wanted))
    if plan.form == "closed":
        return _closed(plan.kind, plan.named, plan.paraphrase, scene)
    return _open(plan.kind, plan.paraphrase, scene)


def ask(scene: Scene, kind: str, form: str, rng: np.random.Generator, *, hard: bool = False) -> Question:
    """A question of `kind` about a given scene; raises ValueError where the scene has nothing to ask about.

    A closed question of a many-valued kind names the truth and another value of its domain equally often.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    if kind not in kinds_of(scene):
        raise ValueError(f"a normal image has no {kind} to ask about")
    paraphrase = int(rng.integers(4))
    if form == "open":
        return _open(kind, paraphrase, scene)
    if form != "closed":
        raise ValueError(f"unknown form {form!r}: use 'closed' or 'open'")
    truth = value_of(scene, kind)
    if kind in ("modality", "finding"):
        others = [value for value in _domain_values(scene, kind) if value != truth]
        named = truth if rng.random() < 0.5 else pick(rng, others)
    else:
        allowed = (_ALL_VALUES if hard else _MAIN_VALUES)[kind]
        named = pick(rng, [value for value in (truth, _opposite(truth)) if value in allowed])
    return _closed(kind, named, paraphrase, scene)


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """The kinds of question that a scene has an answer to."""
    return ("modality", "abnormal", "acquisition") if scene.finding == NORMAL else KINDS


def value_of(scene: Scene, kind: str) -> str:
    """The truth that a question of `kind` asks for, as the scene stores it; "normal" or "abnormal" for "abnormal"."""
    if kind == "abnormal":
        return NORMAL if scene.finding == NORMAL else "abnormal"
    return getattr(scene, "domain" if kind == "modality" else kind)


def balanced_shapes_question(index: int, *, salt: int, scene_seed: int) -> Question:
    """The same for the general family: shape, color and count, closed (yes and no) and open (twice), in blocks of 12."""
    block, place = divmod(index, 4 * len(SHAPE_KINDS))
    rng = np.random.default_rng([salt, block, 0x5B1C])
    slot, draws = int(rng.permutation(4 * len(SHAPE_KINDS))[place]), rng.random((len(SHAPE_KINDS), 4))
    kind, part = SHAPE_KINDS[slot // 4], slot % 4
    values = {"shape": SHAPES, "color": tuple(COLORS), "count": tuple(COUNTS)}[kind]
    named_u, other_u, text_u, open_u = draws[slot // 4]
    named = values[int(named_u * len(values))]
    others = [value for value in values if value != named]
    if part >= 2:  # open
        value = values[(int(open_u * len(values)) + part) % len(values)]
        scene = sample_shapes(scene_seed, **{kind: value})
        text = _SHAPES_OPEN[kind][int(text_u * 3 + part) % 3]
        sentence = with_capital(_SHAPES_SAY[kind].format(x=_say(value))) + "."
        return Question(kind, "open", text, _say(value), sentence, None, scene)
    scene = sample_shapes(scene_seed, **{kind: named if part else others[int(other_u * len(others))]})
    text = _SHAPES_CLOSED[kind][int(text_u * 3)].format(x=_say(named))
    answer = "yes" if part else "no"
    sentence = f"{answer.capitalize()}, {_SHAPES_SAY[kind].format(x=_say(getattr(scene, kind)))}."
    return Question(kind, "closed", text, answer, sentence, _say(named), scene)


@lru_cache(maxsize=4096)
def _block(block: int, salt: int, hard: bool) -> tuple[_Plan, ...]:
    """The 28 plans of one block, in random order."""
    rng = np.random.default_rng([salt, block, int(hard), 0xB10C])
    named_values = _ALL_VALUES | ({} if hard else _MAIN_VALUES)
    plans = []
    for kind in KINDS:
        named = _cycle(named_values[kind], block, (salt, KINDS.index(kind), 0))
        paraphrase = int(rng.integers(4))
        shown = named[1] if kind == "finding" else named
        for answer in (True, False):
            wanted, share = _wish(kind, named if answer else _false_value(kind, named, rng))
            plans.append(_Plan(kind, "closed", shown, paraphrase, wanted, share))
        for half in range(2):
            value = _cycle(_ALL_VALUES[kind], 2 * block + half, (salt, KINDS.index(kind), 1))
            wanted, share = _wish(kind, value)
            plans.append(_Plan(kind, "open", None, int(rng.integers(4)), wanted, share))
    return tuple(plans[i] for i in rng.permutation(len(plans)))


def _cycle(values: tuple, step: int, key: tuple[int, ...]):
    """Element `step` of an endless sequence in which every run through the values has its own order."""
    turn, place = divmod(step, len(values))
    return values[_order(len(values), turn, key)[place]]


@lru_cache(maxsize=4096)
def _order(size: int, turn: int, key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng([*key, turn, 0xC7C1E]).permutation(size))


def _wish(kind: str, value) -> tuple[tuple[tuple[str, str], ...], float]:
    """What to ask of `sample_scene` so that the answer of `kind` is `value`, and its share of normal images."""
    if kind == "abnormal":
        return ((("finding", NORMAL),), 1.0) if value == NORMAL else ((), 0.0)
    if kind == "finding":
        return (("domain", value[0]), ("finding", value[1])), 0.2
    return ((("domain" if kind == "modality" else kind, value),), 0.2)


def _false_value(kind: str, named, rng: np.random.Generator):
    """Another value of the same domain, each as likely; for a finding also "normal"."""
    if kind == "modality":
        return pick(rng, [domain for domain in DOMAINS if domain != named])
    if kind == "finding":
        domain, finding = named
        return domain, pick(rng, [other for other in (*FINDINGS[domain], NORMAL) if other != finding])
    return _opposite(named)


def _opposite(value: str) -> str:
    return {NORMAL: "abnormal", "abnormal": NORMAL}.get(value) or _OTHER[value]


def _domain_values(scene: Scene, kind: str) -> tuple[str, ...]:
    return DOMAINS if kind == "modality" else FINDINGS[scene.domain]


def _closed(kind: str, named: str, paraphrase: int, scene: Scene) -> Question:
    templates = _ABNORMAL[named] if kind == "abnormal" else _CLOSED[kind]
    answer = "yes" if value_of(scene, kind) == named else "no"
    text = templates[paraphrase].format(x=_phrase(kind, named))
    if kind == "finding":
        said = f"there is {_phrase(kind, named) if answer == 'yes' else 'no ' + named}"
    else:
        said = _statement(kind, scene)
    return Question(kind, "closed", text, answer, f"{answer.capitalize()}, {said}.", _short(kind, named), scene)


def _open(kind: str, paraphrase: int, scene: Scene) -> Question:
    said = _statement(kind, scene)
    answer = _short(kind, value_of(scene, kind))
    return Question(kind, "open", _OPEN[kind][paraphrase], answer, with_capital(said) + ".", None, scene)


def _short(kind: str, value: str) -> str:
    return MODALITY[value] if kind == "modality" else value


def _phrase(kind: str, value: str) -> str:
    """The value as a question names it: "a CT scan", "consolidation", "left", "a portable image"."""
    if kind == "modality":
        return with_article(MODALITY[value])
    if kind == "acquisition":
        return with_article(_ACQUIRED[value])
    if kind == "finding" and value not in _UNCOUNTED:
        return with_article(value)
    return value


def _statement(kind: str, scene: Scene) -> str:
    """What is true, as a clause without its capital and its stop."""
    value = value_of(scene, kind)
    if kind == "abnormal":
        return "the image is normal" if value == NORMAL else "there is an abnormality"
    if kind == "finding":
        return f"there is {with_article(counted(value))}"
    return {
        "modality": "this is {x}",
        "acquisition": "this is {x}",
        "side": "it is on the {x}",
        "level": "it is in the {x} part",
        "size": "it is {x}",
    }[kind].format(x=_phrase(kind, value))


def _say(value: str | int) -> str:
    return COUNTS[value] if isinstance(value, int) else value
