"""Questions about phantoms, balanced by construction: the question alone reveals nothing about the answer.

`balanced_question` chooses kind, answer and named value first, in strata, and then samples a scene that fits. Each closed
question is planned as a pair with the answers yes and no, so P(yes | question text) = 1/2. Of a two-valued attribute the main
questions name one value only ("on the left?", never "on the right?"), so that the answer can be read off the image;
`hard=True` names both: the exclusive or of question and image, far harder for a small model. Open questions have uniform
answers and never name the finding. `ask` is for dialogues: a question about a given scene, balanced over scenes. Templates are
in `questions.json`.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from medv.phantoms.general import COLORS, COUNTS, SHAPES, ShapeScene, sample_shapes
from medv.phantoms.scene import ACQUISITIONS, DOMAINS, FINDINGS, LEVELS, NORMAL, SIDES, SIZES, Scene, sample_scene
from medv.phantoms.wording import MODALITY, counted, pick, with_article, with_capital

KINDS = ("modality", "abnormal", "finding", "side", "level", "size", "acquisition")
SHAPE_KINDS = ("shape", "color", "count")

_TEMPLATES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

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
    """A question about a scene, with a short answer and the same as a `sentence`; `named` is the value in a closed question."""

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
        values = DOMAINS if kind == "modality" else FINDINGS[scene.domain]
        others = [value for value in values if value != truth]
        named = truth if rng.random() < 0.5 else pick(rng, others)
    else:
        allowed = (_ALL_VALUES if hard else _MAIN_VALUES)[kind]
        named = pick(rng, [value for value in (truth, _opposite(truth)) if value in allowed])
    return _closed(kind, named, paraphrase, scene)


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """The kinds of question that a scene has an answer to."""
    return ("modality", "abnormal", "acquisition") if scene.finding == NORMAL else KINDS


def value_of(scene: Scene, kind: str) -> str:
    """The true value of `kind`, as the scene stores it; "normal" or "abnormal" for "abnormal"."""
    if kind == "abnormal":
        return NORMAL if scene.finding == NORMAL else "abnormal"
    return getattr(scene, "domain" if kind == "modality" else kind)


def balanced_shapes_question(index: int, *, salt: int, scene_seed: int) -> Question:
    """`balanced_question` for shapes: shape, color and count, closed (yes and no) and open (twice), in blocks of 12."""
    block, place = divmod(index, 4 * len(SHAPE_KINDS))
    rng = np.random.default_rng([salt, block, 0x5B1C])
    slot, draws = int(rng.permutation(4 * len(SHAPE_KINDS))[place]), rng.random((len(SHAPE_KINDS), 4))
    kind, part = SHAPE_KINDS[slot // 4], slot % 4
    values = {"shape": SHAPES, "color": tuple(COLORS), "count": tuple(COUNTS)}[kind]
    said = _TEMPLATES["statements"][kind]
    named_u, other_u, text_u, open_u = draws[slot // 4]
    named = values[int(named_u * len(values))]
    others = [value for value in values if value != named]
    if part >= 2:  # open
        value = values[(int(open_u * len(values)) + part) % len(values)]
        scene = sample_shapes(scene_seed, **{kind: value})
        text = _TEMPLATES["open"][kind][int(text_u * 3 + part) % 3]
        sentence = with_capital(said.format(x=_say(value))) + "."
        return Question(kind, "open", text, _say(value), sentence, None, scene)
    scene = sample_shapes(scene_seed, **{kind: named if part else others[int(other_u * len(others))]})
    text = _TEMPLATES["closed"][kind][int(text_u * 3)].format(x=_say(named))
    answer = "yes" if part else "no"
    sentence = f"{answer.capitalize()}, {said.format(x=_say(getattr(scene, kind)))}."
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
            value = named
            if not answer and kind == "modality":  # another value of the same domain, each as likely
                value = pick(rng, [domain for domain in DOMAINS if domain != named])
            elif not answer and kind == "finding":  # also "normal"
                value = named[0], pick(rng, [other for other in (*FINDINGS[named[0]], NORMAL) if other != named[1]])
            elif not answer:
                value = _opposite(named)
            wanted, share = _wish(kind, value)
            plans.append(_Plan(kind, "closed", shown, paraphrase, wanted, share))
        for half in range(2):
            value = _cycle(_ALL_VALUES[kind], 2 * block + half, (salt, KINDS.index(kind), 1))
            wanted, share = _wish(kind, value)
            plans.append(_Plan(kind, "open", None, int(rng.integers(4)), wanted, share))
    return tuple(plans[i] for i in rng.permutation(len(plans)))


def _cycle(values: tuple, step: int, key: tuple[int, ...]):
    """Element `step` of an endless sequence in which every run through the values has its own order."""
    turn, place = divmod(step, len(values))
    return values[np.random.default_rng([*key, turn, 0xC7C1E]).permutation(len(values))[place]]


def _wish(kind: str, value) -> tuple[tuple[tuple[str, str], ...], float]:
    """The options of `sample_scene` with which the answer of `kind` is `value`, and the share of normal images."""
    if kind == "abnormal":
        return ((("finding", NORMAL),), 1.0) if value == NORMAL else ((), 0.0)
    if kind == "finding":
        return (("domain", value[0]), ("finding", value[1])), 0.2
    return ((("domain" if kind == "modality" else kind, value),), 0.2)


def _opposite(value: str) -> str:
    return {NORMAL: "abnormal", "abnormal": NORMAL}.get(value) or _OTHER[value]


def _closed(kind: str, named: str, paraphrase: int, scene: Scene) -> Question:
    templates = _TEMPLATES["closed"][kind]
    templates = templates[named] if kind == "abnormal" else templates
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
    return Question(kind, "open", _TEMPLATES["open"][kind][paraphrase], answer, with_capital(said) + ".", None, scene)


def _short(kind: str, value: str) -> str:
    return MODALITY[value] if kind == "modality" else value


def _phrase(kind: str, value: str) -> str:
    """The value as a question names it: "a CT scan", "consolidation", "left", "a portable image"."""
    if kind == "modality":
        return with_article(MODALITY[value])
    if kind == "acquisition":
        return with_article(_TEMPLATES["acquired"][value])
    return with_article(value) if kind == "finding" and counted(value) == value else value


def _statement(kind: str, scene: Scene) -> str:
    """The truth as a clause, without capital and full stop."""
    value = value_of(scene, kind)
    if kind == "abnormal":
        return "the image is normal" if value == NORMAL else "there is an abnormality"
    if kind == "finding":
        return f"there is {with_article(counted(value))}"
    return _TEMPLATES["statements"][kind].format(x=_phrase(kind, value))


def _say(value: str | int) -> str:
    return COUNTS[value] if isinstance(value, int) else value
