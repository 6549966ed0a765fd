"""Captions, descriptions and tags of a `Scene`, and of the shapes of the general family; templates are in `wording.json`.

Every sentence follows from the scene or holds for every phantom of its domain. The wording varies (sentence order, variants of
each slot), yet the vocabulary stays below 650 words, because the readers are models of 1-3 M parameters. All functions draw
from the given generator alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medv.phantoms.general import COUNTS, ShapeScene
from medv.phantoms.scene import FINDINGS, NORMAL, Scene

_WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MODALITY: dict[str, str] = _WORDS["modality"]
"""The name of each domain in questions and tags."""
_MIN_WORDS = 40


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def with_article(phrase: str) -> str:
    """ "nodule" -> "a nodule", "MRI" -> "an MRI"."""
    return ("an " if phrase[0] in "aeiou" or phrase.startswith("MR") else "a ") + phrase


def with_capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def counted(finding: str) -> str:
    """The finding as a noun that can be counted: "nodule", "area of consolidation"."""
    return _WORDS["counted"].get(finding, finding)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence of 8-20 words with all facts of the scene."""
    words = _words(scene, rng, studies=2)
    return pick(rng, _WORDS["normal_captions" if scene.finding == NORMAL else "captions"]).format_map(words)


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A report of 40-120 words: the study, the background, the finding or its absence, negatives, an impression."""
    words = _words(scene, rng)
    normal = scene.finding == NORMAL
    background = list(rng.permutation(_WORDS["background"][scene.domain]))
    study = pick(rng, _WORDS["study_sentences"]).format_map(words)
    found = pick(rng, _WORDS["normal_sentences" if normal else "finding_sentences"]).format_map(words)
    if not normal and rng.random() >= 0.5:
        found += f" {_WORDS['appearances'][scene.domain][scene.finding]}"
    absent = _shuffled([finding for finding in FINDINGS[scene.domain] if finding != scene.finding], rng)
    pairs = (absent[:2], absent[2:]) if normal else (absent[:2],)
    negatives = [pick(rng, _WORDS["negatives"]).format(x=x, X=with_capital(x), y=y) for x, y in pairs]
    if not normal and rng.random() < 0.5:
        negatives.append(pick(rng, _WORDS["otherwise"]).format_map(words))
    impression = pick(rng, _WORDS["normal_impressions" if normal else "impressions"])
    impression = impression.format_map(words | {"place": _place(scene, rng)})
    slots = {"S": study, "F": found, "N": " ".join(negatives), "I": impression}
    order = pick(rng, _WORDS["orders"])
    remarks = 1 + int(rng.random() * 2)
    while True:
        slots["B"] = " ".join(background[:remarks])
        text = " ".join(slots[name] for name in order)
        if text.count(" ") + 1 >= _MIN_WORDS:
            return text
        remarks += 1


def tags(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The facts as short tags in random order, for example ["left", "chest x-ray", "nodule", "upright", "small", "upper"]."""
    facts = (MODALITY[scene.domain], scene.acquisition, scene.finding, scene.side, scene.level, scene.size)
    return _shuffled([fact for fact in facts if fact is not None], rng)


def shapes_caption(scene: ShapeScene, rng: np.random.Generator) -> str:
    """One short sentence with the shape, color, count and background of a general scene."""
    return pick(rng, _WORDS["shape_captions"]).format_map(_shape_words(scene))


def shapes_description(scene: ShapeScene, rng: np.random.Generator) -> str:
    """Six short sentences about a general scene; the first and the last keep their place."""
    words = _shape_words(scene)
    first, *middle, last = (pick(rng, slot).format_map(words) for slot in _WORDS["shape_descriptions"])
    return " ".join([first, *_shuffled(middle, rng), last])


def shapes_tags(scene: ShapeScene, rng: np.random.Generator) -> list[str]:
    """The facts of shapes as tags in random order, for example ["red", "three", "circle", "white background"]."""
    return _shuffled([scene.shape, scene.color, COUNTS[scene.count], f"{scene.background} background"], rng)


def _words(scene: Scene, rng: np.random.Generator, studies: int = 3) -> dict[str, str]:
    """The slots of the templates."""
    bare = pick(rng, _WORDS["studies"][scene.domain][:studies]).format(a=scene.acquisition)
    study, noun = with_article(bare), counted(scene.finding)
    place = _place(scene, rng)
    return {
        "study": study,
        "Study": with_capital(study),
        "study_bare": bare,
        "modality": MODALITY[scene.domain],
        "region": _WORDS["region"][scene.domain],
        "noun": noun,
        "a_noun": with_article(noun),
        "A_noun": with_capital(with_article(noun)),
        "place": place,
        "Place": with_capital(place),
        "side": scene.side or "",
        "level": scene.level or "",
        "size": scene.size or "",
    }


def _place(scene: Scene, rng: np.random.Generator) -> str:
    where = {"side": scene.side, "level": scene.level, "region": _WORDS["region"][scene.domain]}
    return pick(rng, _WORDS["places"][scene.domain]).format_map(where)


def _shape_words(scene: ShapeScene) -> dict[str, str]:
    plural = "es" if scene.shape.endswith(("s", "x", "ch", "sh")) else "s"
    what = f"{COUNTS[scene.count]} {scene.color} {scene.shape}{plural if scene.count > 1 else ''}"
    return {
        "what": what,
        "What": with_capital(what),
        "are": "is" if scene.count == 1 else "are",
        "shape": scene.shape,
        "color": scene.color,
        "number": COUNTS[scene.count],
        "background": scene.background,
    }


def _shuffled(items: list[str], rng: np.random.Generator) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))]
