"""The phantoms in words: captions, descriptions and tags of a `Scene`, and of the shapes of the general family.

Every sentence follows from the structured truth or holds for every phantom of its domain; nothing is said that the picture
could belie. The wording varies (sentence order, several variants of each slot), yet the whole vocabulary stays below 650
words, because the readers are models of 1-3 M parameters. All functions take a `numpy.random.Generator` and touch no other
state. Not known here: how a phantom is drawn, and which questions are asked about it (`medv.phantoms.questions`).
"""

from collections.abc import Sequence

import numpy as np

from medv.phantoms.general import COUNTS, ShapeScene
from medv.phantoms.scene import FINDINGS, NORMAL, Scene

# The canonical name of each domain; questions and tags use it.
MODALITY = {
    "chest_xray": "chest x-ray",
    "ct": "CT scan",
    "mri": "MRI",
    "histology": "histology slide",
    "gross": "gross specimen",
}
_STUDIES = {  # {a} is the acquisition; the first two are short enough for captions
    "chest_xray": ("{a} chest x-ray", "{a} chest radiograph", "{a} x-ray of the chest"),
    "ct": ("{a} CT scan", "{a} CT image", "{a} CT scan of the abdomen"),
    "mri": ("{a} MRI", "{a} MRI scan", "{a} MRI of the brain"),
    "histology": ("{a} histology slide", "{a} histology image", "{a} microscopic image of tissue"),
    "gross": ("{a} gross specimen", "{a} gross pathology specimen", "{a} gross specimen seen from above"),
}
_REGION = {"chest_xray": "lung", "ct": "abdomen", "mri": "brain", "histology": "field", "gross": "specimen"}
_PLACES = ("in the {side} {level} {region}", "on the {side} in the {level} {region}", "in the {level} {region} on the {side}")
_PLACES_IN_A_BODY = (*_PLACES, "in the {level} part of the {side} {region}")
_PLACES_IN_A_FIELD = (*_PLACES, "in the {level} {side} part of the {region}")
# How a finding is counted; the others count as they are ("a small nodule").
_COUNTED = {
    "consolidation": "area of consolidation",
    "calcification": "focus of calcification",
    "edema": "area of edema",
    "inflammation": "area of inflammation",
    "necrosis": "area of necrosis",
    "carcinoma": "focus of carcinoma",
    "fibrosis": "area of fibrosis",
}
_STUDY_SENTENCES = (
    "This is {study}.",
    "The image is {study}.",
    "{Study} is presented.",
    "We are looking at {study}.",
    "The study is {study}.",
)
_FINDING_SENTENCES = (
    "There is a {size} {noun} {place}.",
    "A {size} {noun} is seen {place}.",
    "The image shows a {size} {noun} {place}.",
    "{Place}, there is a {size} {noun}.",
    "The main finding is a {size} {noun} {place}.",
    "There is {a_noun} {place}. It is {size} in size.",
    "{A_noun} is present on the {side}. It is {size} and lies in the {level} {region}.",
)
_APPEARANCES = {
    ("chest_xray", "pleural effusion"): "It is dense and lies along the chest wall.",
    ("chest_xray", "pneumothorax"): "The edge of the lung is seen as a thin line.",
    ("chest_xray", "consolidation"): "It is hazy and has a soft edge.",
    ("chest_xray", "nodule"): "It is round and dense.",
    ("ct", "cyst"): "It is round, dark and smooth.",
    ("ct", "calcification"): "It is as bright as bone.",
    ("ct", "mass"): "It is lobulated and has a bright rim.",
    ("ct", "fluid collection"): "It is dark and lies along the abdominal wall.",
    ("mri", "tumor"): "It has a bright rim and a dark core.",
    ("mri", "infarct"): "It has the form of a wedge.",
    ("mri", "hemorrhage"): "It has bright and dark parts.",
    ("mri", "edema"): "It follows the white matter.",
    ("histology", "inflammation"): "The cells are round, dark and crowded.",
    ("histology", "necrosis"): "It is pale and has few nuclei.",
    ("histology", "carcinoma"): "The nuclei are irregular and crowded.",
    ("histology", "fibrosis"): "It is made of pale and wavy strands.",
    ("gross", "tumor"): "It is pale and bulges from the tissue.",
    ("gross", "hemorrhage"): "It is dark red.",
    ("gross", "cyst"): "It is smooth and has a pale rim.",
    ("gross", "ulcer"): "It has a yellow base and a red rim.",
}
_NORMAL_SENTENCES = (
    "No abnormality is seen in the {region}.",
    "There is no focal abnormality in the {region}.",
    "The image is normal, and there is no focal lesion.",
    "The {region} has a normal appearance without any focal lesion.",
)
_BACKGROUND = {
    "chest_xray": (
        "The heart and the mediastinum have a regular outline.",
        "The ribs are intact.",
        "The trachea lies in the midline.",
        "The diaphragm is smooth on both sides.",
        "The bones show no fracture.",
        "The soft tissues of the chest wall are regular.",
    ),
    "ct": (
        "The spine is intact.",
        "The abdominal wall is smooth and regular.",
        "The organs have a regular outline.",
        "The vertebra is seen in the midline.",
        "The bones show no fracture.",
        "The soft tissues are well shown on this axial slice.",
    ),
    "mri": (
        "The skull is intact.",
        "The ventricles are seen near the midline.",
        "The midline is not shifted.",
        "The outline of the brain is smooth and regular.",
        "The gray and white matter are well shown on this axial slice.",
        "The scalp and the skull have a regular outline.",
    ),
    "histology": (
        "The tissue is stained with hematoxylin and eosin.",
        "The nuclei are purple and the stroma is pink.",
        "The background tissue has a regular pattern.",
        "The cells are well preserved.",
        "The stain is of good quality.",
        "The stroma between the cells is regular.",
    ),
    "gross": (
        "The specimen lies on a board beside a ruler.",
        "The outline of the specimen is smooth.",
        "The edges of the tissue are well shown.",
        "The color of the tissue is regular.",
        "The tissue is intact at its edges.",
        "The specimen is seen in one piece.",
    ),
}
_NEGATIVES = (
    "There is no {x} or {y}.",
    "No {x} or {y} is seen.",
    "Neither {x} nor {y} is seen.",
    "There is no evidence of {x} or {y}.",
    "{X} and {y} are absent.",
    "The image shows no {x} and no {y}.",
)
_OTHERWISE = (
    "There is no other abnormality.",
    "The opposite side is clear.",
    "The remaining {region} is clear.",
    "No other lesion is seen.",
)
_IMPRESSIONS = (
    "Impression: {size} {noun} in the {side} {level} {region}.",
    "Impression: {size} {noun} {place}.",
    "Conclusion: a {size} {noun} {place}.",
    "In summary, this {modality} shows a {size} {noun} {place}.",
    "Overall, the picture is that of a {size} {noun} {place}.",
)
_NORMAL_IMPRESSIONS = (
    "Impression: normal {modality}.",
    "Impression: no abnormality.",
    "Conclusion: this is a normal {modality}.",
    "In summary, this {modality} is normal.",
    "Overall, the image is normal.",
)
_ORDERS = ("SBFNI", "SFBNI", "SFNBI", "SBNFI", "FSBNI", "FSNBI", "BSFNI", "SNFBI")
_CAPTIONS = (
    "{Study} showing a {size} {noun} {place}.",
    "The {study_bare} shows a {size} {noun} {place}.",
    "{Study} with a {size} {noun} {place}.",
    "A {size} {noun} {place} on {study}.",
)
_NORMAL_CAPTIONS = (
    "{Study} with no abnormality in the {region}.",
    "This {study_bare} is normal and shows no abnormality.",
    "{Study} showing a normal appearance of the {region}.",
    "There is no abnormality on this {study_bare} of normal appearance.",
)
_MIN_WORDS = 40
_SHAPE_CAPTIONS = (
    "A picture of {what} on a {background} background.",
    "There {are} {what} on a {background} background.",
    "The picture shows {what} on a {background} background.",
    "{What} drawn on a {background} background.",
)
_SHAPE_DESCRIPTIONS = (
    ("The picture shows {what}.", "There {are} {what} in this picture.", "We are looking at {what}."),
    (
        "The only shape in the picture is the {shape}.",
        "The shape that is drawn is the {shape}.",
        "What is drawn here is the shape of a {shape}.",
    ),
    ("The color is {color}.", "It is drawn in {color}.", "Everything that is drawn is {color}."),
    ("The count is {number}.", "The number of shapes is {number}.", "We count {number} in all."),
    ("The background is {background}.", "It lies on a plain {background} background."),
    ("There is no other shape.", "No other color is used for the shapes.", "Nothing else is seen."),
)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def with_article(phrase: str) -> str:
    """ "nodule" -> "a nodule", "MRI" -> "an MRI"."""
    return ("an " if phrase[0] in "aeiou" or phrase.startswith("MR") else "a ") + phrase


def with_capital(text: str) -> str:
    """The text with its first letter large."""
    return text[0].upper() + text[1:]


def counted(finding: str) -> str:
    """The finding as a noun that can be counted: "nodule", "area of consolidation"."""
    return _COUNTED.get(finding, finding)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence of 8-20 words with all facts of the scene."""
    words = _words(scene, rng, studies=2)
    return pick(rng, _NORMAL_CAPTIONS if scene.finding == NORMAL else _CAPTIONS).format_map(words)


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A report of 40-120 words: the study, the background, the finding or its absence, negatives, an impression."""
    words = _words(scene, rng)
    normal = scene.finding == NORMAL
    background = list(rng.permutation(_BACKGROUND[scene.domain]))
    slots = {
        "S": pick(rng, _STUDY_SENTENCES).format_map(words),
        "F": _finding(scene, rng, words),
        "N": _negatives(scene, rng, words),
        "I": pick(rng, _NORMAL_IMPRESSIONS if normal else _IMPRESSIONS).format_map(words | {"place": _place(scene, rng)}),
    }
    order = pick(rng, _ORDERS)
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
    return pick(rng, _SHAPE_CAPTIONS).format_map(_shape_words(scene))


def shapes_description(scene: ShapeScene, rng: np.random.Generator) -> str:
    """Six short sentences about a general scene; the first and the last keep their place."""
    words = _shape_words(scene)
    first, *middle, last = (pick(rng, slot).format_map(words) for slot in _SHAPE_DESCRIPTIONS)
    return " ".join([first, *_shuffled(middle, rng), last])


def shapes_tags(scene: ShapeScene, rng: np.random.Generator) -> list[str]:
    """The facts of shapes as tags in random order, for example ["red", "three", "circle", "white background"]."""
    return _shuffled([scene.shape, scene.color, COUNTS[scene.count], f"{scene.background} background"], rng)


def shape_phrase(color: str, shape: str, count: int) -> str:
    """ "one red circle", "three red circles"."""
    ending = "" if count == 1 else "es" if shape.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{COUNTS[count]} {color} {shape}{ending}"


def _words(scene: Scene, rng: np.random.Generator, studies: int = 3) -> dict[str, str]:
    """What the slots of the templates may use."""
    bare = pick(rng, _STUDIES[scene.domain][:studies]).format(a=scene.acquisition)
    study, noun = with_article(bare), counted(scene.finding)
    place = _place(scene, rng)
    return {
        "study": study,
        "Study": with_capital(study),
        "study_bare": bare,
        "modality": MODALITY[scene.domain],
        "region": _REGION[scene.domain],
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
    places = _PLACES_IN_A_FIELD if scene.domain in ("histology", "gross") else _PLACES_IN_A_BODY
    return pick(rng, places).format(side=scene.side, level=scene.level, region=_REGION[scene.domain])


def _finding(scene: Scene, rng: np.random.Generator, words: dict[str, str]) -> str:
    """What is there, and in half of the abnormal images how it looks."""
    if scene.finding == NORMAL:
        return pick(rng, _NORMAL_SENTENCES).format_map(words)
    said = pick(rng, _FINDING_SENTENCES).format_map(words)
    return said if rng.random() < 0.5 else f"{said} {_APPEARANCES[scene.domain, scene.finding]}"


def _negatives(scene: Scene, rng: np.random.Generator, words: dict[str, str]) -> str:
    """What is not there: two of the absent findings (all four in a normal image), sometimes that nothing else is."""
    absent = _shuffled([finding for finding in FINDINGS[scene.domain] if finding != scene.finding], rng)
    pairs = (absent[:2], absent[2:]) if scene.finding == NORMAL else (absent[:2],)
    said = [pick(rng, _NEGATIVES).format(x=x, X=with_capital(x), y=y) for x, y in pairs]
    if scene.finding != NORMAL and rng.random() < 0.5:
        said.append(pick(rng, _OTHERWISE).format_map(words))
    return " ".join(said)


def _shape_words(scene: ShapeScene) -> dict[str, str]:
    what = shape_phrase(scene.color, scene.shape, scene.count)
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
