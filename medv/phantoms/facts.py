"""An offline judge of descriptions: the facts of a phantom that a text states, and their precision and recall.

`stated_facts` reads free text, also the broken text of a half-trained model, into (attribute, value) pairs as in `Scene.facts`;
`score_description` compares them with the scene. Denied findings ("no pleural effusion") are no claims. The parser covers the
words of the phantoms and common synonyms, and no grammar beyond negation; it is not the GPT judge of the paper, and its numbers
are meaningless on real reports.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medv.phantoms.scene import NORMAL, Scene

_PATTERNS = {
    ("domain", "chest_xray"): r"x-? ?rays?|radiographs?",
    ("domain", "ct"): r"ct|computed tomography",
    ("domain", "mri"): r"mri?|magnetic resonance",
    ("domain", "histology"): r"histolog\w*|histopath\w*|microscop\w*|photomicro\w*",
    ("domain", "gross"): r"gross|macroscop\w*",
    ("finding", "pleural effusion"): r"(?:pleural )?effusions?",
    ("finding", "pneumothorax"): r"pneumothora(?:x|ces)",
    ("finding", "consolidation"): r"consolidat\w+",
    ("finding", "nodule"): r"nodul\w+",
    ("finding", "cyst"): r"cyst\w*",
    ("finding", "calcification"): r"calcif\w+",
    ("finding", "mass"): r"mass(?:es)?",
    ("finding", "fluid collection"): r"(?:fluid )?collections?",
    ("finding", "tumor"): r"tumou?rs?|neoplas\w+",
    ("finding", "infarct"): r"infarct\w*",
    ("finding", "hemorrhage"): r"ha?emorrhag\w+|bleed\w*",
    ("finding", "edema"): r"o?edema\w*",
    ("finding", "inflammation"): r"inflam\w+",
    ("finding", "necrosis"): r"necro\w+",
    ("finding", "carcinoma"): r"carcinomas?|carcinomatous",
    ("finding", "fibrosis"): r"fibro\w+",
    ("finding", "ulcer"): r"ulcer\w*",
    ("side", "left"): r"left(?:-sided)?",
    ("side", "right"): r"right(?:-sided)?",
    ("level", "upper"): r"upper|superior",
    ("level", "lower"): r"lower|inferior",
    ("level", "anterior"): r"anterior(?:ly)?",
    ("level", "posterior"): r"posterior(?:ly)?",
    ("size", "small"): r"small|tiny|little|minor|minimal",
    ("size", "large"): r"large|big|huge|massive|extensive|siz(?:e)?able",
    ("acquisition", "upright"): r"upright|erect|standing",
    ("acquisition", "portable"): r"portable|bedside|mobile",
    ("acquisition", "contrast"): r"contrast(?:-enhanced)?|enhanced",
    ("acquisition", "non-contrast"): r"noncontrast",
    ("acquisition", "T1"): r"t1w?(?:-weighted)?",
    ("acquisition", "T2"): r"t2w?(?:-weighted)?",
    ("acquisition", "low power"): r"low[- ](?:power|magnification)",
    ("acquisition", "high power"): r"high[- ](?:power|magnification)",
    ("acquisition", "fresh"): r"fresh(?:ly)?",
    ("acquisition", "fixed"): r"(?:formalin-)?(?:fixed|fixation)",
}
_FACTS = {fact: re.compile(rf"\b(?:{pattern})\b") for fact, pattern in _PATTERNS.items()}
_OF_THE_LESION = ("side", "level", "size")

# Ambiguous word groups and their replacements.
_READINGS = (
    (re.compile(r"without (?:any |intravenous |iv )*contrast|non[- ]?contrast|no contrast|unenhanced"), "noncontrast"),
    (re.compile(r"mass effect|in contrast|large (?:vessels?|airways?|bowel)|upper limits?"), " "),
    (re.compile(r"n't\b"), " not"),
)
# Where one claim ends and the next begins.
_CLAIMS = re.compile(
    r"[.;!?\n]+|,? \b(?:but|however|although|whereas|while|except)\b|,? and (?=there (?:is|are)\b)"
    r"|, (?=(?:and |with )?(?:a|an|the|there|it|this)\b)"
)
_DENIAL = re.compile(r"\b(?:no|not|without|neither|nor|never|absence of|negative for|free of|lacks?|lacking)\b")
_DENIAL_ENDS = re.compile(r"\b(?:on|in|of) this\b|\bshow(?:s|ing)\b")
_DENIED = re.compile(
    r"(?:\b(?:is|are|was|were|be) )?\b(?:absent|excluded|ruled out|"
    r"not (?:\w+ )?(?:seen|identified|present|detected|visible|found|evident|demonstrated|noted|observed|shown))\b"
)
_VERB = re.compile(r"\b(?:is|are|was|were|shows?|showing|has)\b")
# "The right lung is clear" states no side of the finding.
_SPARED = re.compile(r"\b(?:clear|normal|unremarkable|intact|spared|preserved|opposite|contralateral|remaining|other)\b")
_WHOLE = (
    r"(?:image|study|scan|x-ray|radiograph|film|ct|mri|slide|section|specimen|picture|examination|exam|it|this|abdomen|"
    r"brain|field|lung|lungs|chest|tissue|appearance)"
)
_ALL_NORMAL = re.compile(
    r"\b(?:no|without|without any|no evidence of(?: an| any)?)(?: (?:acute|focal|significant|definite|visible))*"
    r" (?:abnormalit(?:y|ies)|lesions?|pathology)\b"
    rf"|\b{_WHOLE}(?: (?:scan|image|slide))? (?:is|are|appears?|looks?|seems?)"
    r"(?: (?:entirely|completely))? (?:normal|unremarkable)\b"
    r"|\b(?:a|the|impression|conclusion|overall|of)\W+(?:normal|unremarkable)"
    rf" (?:\w+ )?{_WHOLE}\b"
    r"|\b(?:impression|conclusion|diagnosis)\W+(?:normal|unremarkable)\b"
)

# "Normal" said of a part, or itself denied: "the right lung is normal", "this is not a normal scan".
_PARTIAL = re.compile(r"\b(?:not|left|right|other|opposite|remaining|rest|otherwise)\b")


@dataclass(frozen=True)
class FindingScore:
    """Shares of 0..1 and the facts behind them; `correct` facts are both stated and true."""

    precision: float
    recall: float
    f1: float
    correct: frozenset[tuple[str, str]]
    stated: frozenset[tuple[str, str]]
    true: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class FindingScores:
    """Mean scores of several texts, 0..1; `by_attribute` is the recall of each attribute where present."""

    precision: float
    recall: float
    f1: float
    by_attribute: dict[str, float]
    items: tuple[FindingScore, ...]


def stated_facts(text: str) -> frozenset[tuple[str, str]]:
    """The (attribute, value) pairs that a text claims, for example ("finding", "nodule"), without denied ones."""
    text = re.sub(r"[\u2010-\u2015]", "-", text.lower()).replace("\u2019", "'")
    for pattern, reading in _READINGS:
        text = pattern.sub(reading, text)
    return frozenset(fact for claim in _CLAIMS.split(text) for fact in _claimed(" ".join(claim.split())))


def score_description(text: str, scene: Scene) -> FindingScore:
    """Compare what a text states with the facts of its scene; a text that states nothing scores 0."""
    stated, true = stated_facts(text), scene.facts()
    correct = stated & true
    precision = len(correct) / len(stated) if stated else 0.0
    recall = len(correct) / len(true)
    f1 = 2 * len(correct) / (len(stated) + len(true))
    return FindingScore(precision, recall, f1, correct, stated, true)


def score_descriptions(texts: Sequence[str], scenes: Sequence[Scene]) -> FindingScores:
    """Score `texts[i]` against `scenes[i]`; raises ValueError when their numbers differ or there are none."""
    if len(texts) != len(scenes):
        raise ValueError(f"{len(texts)} texts but {len(scenes)} scenes: give one text for each scene")
    if not texts:
        raise ValueError("there is nothing to score: no texts were given")
    items = tuple(score_description(text, scene) for text, scene in zip(texts, scenes, strict=True))
    found: dict[str, list[bool]] = {}
    for item in items:
        for fact in item.true:
            found.setdefault(fact[0], []).append(fact in item.correct)
    means = [float(np.mean([getattr(item, name) for item in items])) for name in ("precision", "recall", "f1")]
    return FindingScores(*means, {name: float(np.mean(hits)) for name, hits in sorted(found.items())}, items)


def fact_spans(text: str, scene: Scene) -> list[tuple[int, int, bool]]:
    """The spans (start, end, true of the scene) of stated facts, in order; facts without a span of their own are left out."""
    true = scene.facts()
    return sorted({(start, end, fact in true) for start, end, fact in named_spans(text)})


def named_spans(text: str) -> list[tuple[int, int, tuple[str, str]]]:
    """The same spans with the fact that each states: (start, end, (attribute, value))."""
    lower = text.lower() if len(text.lower()) == len(text) else text
    edges = [0, *(edge for cut in _CLAIMS.finditer(lower) for edge in cut.span()), len(lower)]
    spans = set()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        claim = lower[start:end]
        denied = _denied_spans(claim)
        for fact in _claimed(claim):
            for match in _FACTS.get(fact, _ALL_NORMAL).finditer(claim):
                if fact not in _FACTS or not _inside(match.start(), denied):
                    spans.add((start + match.start(), start + match.end(), fact))
    return sorted(spans)


def _claimed(claim: str) -> set[tuple[str, str]]:
    """The facts of one claim, a piece of a sentence in lower case."""
    denied = _denied_spans(claim)
    facts = {
        fact for fact, pattern in _FACTS.items() if any(not _inside(match.start(), denied) for match in pattern.finditer(claim))
    }
    if not any(name == "finding" for name, _ in facts) and _SPARED.search(claim):
        facts = {fact for fact in facts if fact[0] not in _OF_THE_LESION}
    for match in _ALL_NORMAL.finditer(claim):
        if not _PARTIAL.search(claim, 0, match.start()):
            facts.add(("finding", NORMAL))
    return facts


def _denied_spans(claim: str) -> list[tuple[int, int]]:
    """The denied parts of a claim: after "no ...", and before "... are absent"."""
    spans = []
    for cue in _DENIAL.finditer(claim):
        end = _DENIAL_ENDS.search(claim, cue.end())
        spans.append((cue.end(), end.start() if end else len(claim)))
    for cue in _DENIED.finditer(claim):
        verbs = [verb.end() for verb in _VERB.finditer(claim, 0, cue.start())]
        spans.append((verbs[-1] if verbs else 0, cue.start()))
    return spans


def _inside(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
