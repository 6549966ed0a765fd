"""One hidden word (notebook 41): a diffusion model that sees all other words, against its twin that sees those before.

In each reference description the first mention of a finding, of its side, level and size is hidden, one at a time, as far as
the text states it and does not deny it; on phantoms it must be true of the scene. The list of words is that of
`medv.phantoms.facts`, on real reports too. As reports say a thing twice, the diffusion model fills the word once with all other
words given, where it can copy it from behind, and once with the same word hidden everywhere. The twin never sees a mention.
Nothing tells the diffusion model how many tokens the word has: the blank gets 1 to N, those of the longest hidden word, and of
the fillings that are one word the most confident counts. The twin writes N tokens greedily behind the words before the blank,
and its first word counts. Both are right where the word is the same, in any case of letters.

The controls show another image of the same domain. "most frequent" is the word of this kind that is most frequent in the other
texts; "chance" is one over the number of different words of the kind.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from medv.companion.studies.node import Node
from medv.companion.studies.summaries import estimates
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.templates import BLANK, Template
from medv.intervals import NOT_MEASURED, Estimate, bootstrap
from medv.phantoms.facts import named_spans
from medv.phantoms.scene import NORMAL

NODE = Node(
    "infilling",
    "41_infilling.ipynb",
    "One hidden word",
    needs=("models/stage2", "models/twin"),
    results=("infilling", "hidden_words", "effects_infilling"),
    reads=("qa50",),
    heavy=True,
)

KINDS = ("finding", "side", "level", "size")
TEXTS = 3
"""References for each description that a profile evaluates."""
UNSEEN = 1000
"""Added to the seed of the test images: the protocol was written with those of seed 0 in sight."""
OURS, BLIND, TWIN = "diffusion, all other words", "diffusion, word hidden everywhere", "twin, words before"
OTHER = ", another image"
CHANCE, FREQUENT = "chance", "most frequent word"
MODELS = (OURS, BLIND, TWIN)
SYSTEMS = (*(name + image for name in MODELS for image in ("", OTHER)), FREQUENT, CHANCE)
FILLINGS = 16  # tried for a text at most
STEPS = 64  # forwards that a filling may take, more than it has open tokens: one token is written at a time
_LAST_WORD = re.compile(r"[^\W_]+$")
_FIRST_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Hidden:
    """A hidden word: its text's example, its kind, the text before and behind it."""

    example: Example
    kind: str
    word: str
    before: str
    behind: str

    @property
    def template(self) -> str:
        """The text with a blank for the word."""
        return f"{self.before}____{self.behind}"

    @property
    def everywhere(self) -> str:
        """The text with a blank wherever it has the word."""
        word = re.compile(rf"\b{re.escape(self.word)}\b", re.IGNORECASE)
        return f"{self.before}____{word.sub('____', self.behind)}"


def hidden_words(examples: Sequence[Example]) -> list[Hidden]:
    """For each example and kind the first word of its reference that states it; a word that was said before is left out.

    Raises ValueError where no reference states any.
    """
    found = []
    for example in examples:
        text, scene = example.answer.strip(), example.meta.get("scene")
        spans = [span for span in named_spans(text) if span[2][1] != NORMAL and (scene is None or span[2] in scene.facts())]
        for kind in KINDS:
            places = [
                match for start, stop, fact in spans if fact[0] == kind and (match := _LAST_WORD.search(text, start, stop))
            ]
            if not places or "__" in text:
                continue
            word, before, behind = places[0].group(), text[: places[0].start()], text[places[0].end() :]
            if word.lower() not in _FIRST_WORD.findall(before.lower()):
                found.append(Hidden(example, kind, word, before, behind))
    if not found:
        raise ValueError(f"none of {len(examples)} references states a finding, side, level or size: give others")
    return found


def another_image(items: Sequence[Hidden]) -> list[Hidden]:
    """The items with the image of the next other example of the domain, or of any where a domain has one example."""
    examples = list({item.example.id: item.example for item in items}.values())
    others = {}
    for number, example in enumerate(examples):
        after = [*examples[number + 1 :], *examples[:number]]
        chosen = next((each for each in after if each.domain == example.domain), after[0] if after else example)
        others[example.id] = replace(example, image=chosen.image)
    return [replace(item, example=others[item.example.id]) for item in items]


def most_tokens(answerer: Answerer, items: Sequence[Hidden]) -> int:
    """Tokens of the longest hidden word."""
    return max(len(answerer.processor.tokenizer.encode(f" {item.word}", add_special_tokens=False)) for item in items)


def filled_by_diffusion(
    answerer: Answerer, items: Sequence[Hidden], *, everywhere: bool = False, batch_size: int = 50
) -> list[str | None]:
    """What the model writes into each blank: of the fillings that are words the most confident, or else of all.

    None where a word has more places than fillings can be tried for.
    """
    most = most_tokens(answerer, items)
    config = SamplerConfig(gen_length=STEPS, block_length=STEPS, steps=STEPS)
    templates = [item.everywhere if everywhere else item.template for item in items]
    tried = [place for place, text in enumerate(templates) if most ** len(BLANK.findall(text)) <= FILLINGS]
    how = {
        "templates": [templates[place] for place in tried],
        "blank_tokens": most,
        "batch_size": batch_size,
        "rank": lambda answer: (all(map(_FIRST_WORD.fullmatch, answer.filled)), answer.confidence),
    }
    answers = answerer.answer([items[place].example for place in tried], config, **how)
    words = {place: answer.filled[0] for place, answer in zip(tried, answers, strict=True)}
    return [words.get(place) for place in range(len(items))]


def continued_by_twin(answerer: Answerer, items: Sequence[Hidden], *, batch_size: int = 50) -> list[str]:
    """The first word that the twin writes greedily behind the words before each blank."""
    tokenizer, most = answerer.processor.tokenizer, most_tokens(answerer, items)
    config, words = SamplerConfig(gen_length=most, block_length=most, steps=most), []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        canvases = [Template(item.template).canvas(tokenizer, (1,)) for item in batch]
        begun = [canvas.ids[: next(start for start, _, blank in canvas.parts if blank)] for canvas in canvases]
        output = answerer.model.generate(**answerer.inputs([item.example for item in batch], begun=begun), config=config)
        for ids, length in zip(output.sequences.tolist(), output.lengths, strict=True):
            match = _FIRST_WORD.search(answerer.processor.decode_response(ids, length))
            words.append(match.group() if match else "")
    return words


def measured(items: Sequence[Hidden], answerer: Answerer, twin: Answerer | None, *, batch_size: int = 50) -> pd.DataFrame:
    """A row per item: id, kind, word, template, and for each system its word and whether it is right (percent: 0 or 100).

    chance has a share; a twin that is not there is NaN.
    """
    said = {FREQUENT: most_frequent(items)}
    for image, shown in (("", items), (OTHER, another_image(items))):
        said[OURS + image] = filled_by_diffusion(answerer, shown, batch_size=batch_size)
        said[BLIND + image] = filled_by_diffusion(answerer, shown, everywhere=True, batch_size=batch_size)
        if twin is not None:
            said[TWIN + image] = continued_by_twin(twin, shown, batch_size=batch_size)
    frame = pd.DataFrame([(item.example.id, item.kind, item.word, item.template) for item in items])
    frame.columns = ["id", "kind", "word", "template"]
    for system in SYSTEMS[:-1]:
        words = said.get(system, [None] * len(items))
        pairs = zip(words, frame["word"], strict=True)
        frame[f"{system}: word"] = [NOT_MEASURED if word is None else word for word in words]
        frame[system] = [np.nan if word is None else 100.0 * (word.lower() == hidden.lower()) for word, hidden in pairs]
    different = frame.assign(word=frame["word"].str.lower()).groupby("kind")["word"].transform("nunique")
    frame[CHANCE] = 100.0 / different
    return frame


def most_frequent(items: Sequence[Hidden]) -> list[str]:
    """For each item the word of its kind that is hidden most often in the texts of other examples; of equals the first."""
    all_of = {kind: Counter(item.word.lower() for item in items if item.kind == kind) for kind in KINDS}
    own = Counter((item.example.id, item.kind, item.word.lower()) for item in items)
    guesses = []
    for item in items:
        counts = {word: count - own[item.example.id, item.kind, word] for word, count in all_of[item.kind].items()}
        guesses.append(max(counts, key=counts.get))
    return guesses


def groups(frame: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """The items of each kind, and all; empty ones are left out."""
    parts = {kind: frame[frame["kind"] == kind] for kind in KINDS} | {"all": frame}
    return {name: part for name, part in parts.items() if len(part)}


def per_text(part: pd.DataFrame, values: pd.Series) -> Estimate:
    """The mean over texts of the mean of a text's items: the items of one text belong together."""
    return bootstrap(values.groupby(part["id"], sort=False).mean())


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """metric (the group), system, value, low, high, n: texts."""
    found = {(name, system): per_text(part, part[system]) for name, part in groups(frame).items() for system in SYSTEMS}
    return estimates(found, ("metric", "system")).drop(columns="seeds")


def words_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per group: items, "accuracy [95 % interval]" of each system, and diffusion minus twin, paired."""
    rows = []
    for name, part in groups(frame).items():
        row = {"hidden": name, "words": len(part)}
        row |= {system: per_text(part, part[system]).cell() for system in (*MODELS, FREQUENT)}
        row |= {CHANCE: round(part[CHANCE].mean(), 1), "minus twin": gap(part, OURS, TWIN).cell("+.1f")}
        rows.append(row | {"minus twin, hidden everywhere": gap(part, BLIND, TWIN).cell("+.1f")})
    return pd.DataFrame(rows)


def gap(part: pd.DataFrame, first: str, second: str) -> Estimate:
    """The first system minus the second, paired by item, in points."""
    return per_text(part, part[first] - part[second])


def verdict(frame: pd.DataFrame) -> str:
    """What the intervals say about the twin and the image, over all words and per kind."""
    lines = []
    for system, given in ((OURS, "given all other words"), (BLIND, "with the word hidden everywhere")):
        for name, part in groups(frame).items():
            found = gap(part, system, TWIN)
            who = found.verdict(
                "the diffusion model is right more often", "the twin is right more often", "no difference is shown"
            )
            lines.append(f"{name} ({len(part)} words), {given}: {who}; diffusion minus twin {found.cell('+.1f')} points.")
    for system in MODELS:
        found = gap(frame, system, system + OTHER)
        use = found.verdict("it uses the image", "another image serves it better", "no use of the image is shown")
        lines.append(f"{system}: {use}; its own image minus another one {found.cell('+.1f')} points.")
    return "\n".join(lines)


def examples_table(frame: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """The first items, unselected: the template around its blank, the word, and what both models wrote."""
    shown = frame.head(count)
    around = [re.sub(r"^.*?(.{0,48}____.{0,32}).*$", r"\1", text, flags=re.DOTALL) for text in shown["template"]]
    columns = {
        "text": around,
        "hidden": shown["word"],
        "diffusion": shown[f"{OURS}: word"],
        "hidden everywhere": shown[f"{BLIND}: word"],
        "twin": shown[f"{TWIN}: word"],
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def twin_gaps(frame: pd.DataFrame) -> dict[str, Estimate]:
    """Diffusion minus the twin by kind of word, for `effects.effect_table`."""
    systems = {"given all other words": OURS, "hidden everywhere": BLIND}
    parts = groups(frame).items()
    return {
        f"{name}, {how}: diffusion minus twin": gap(p, system, TWIN) for how, system in systems.items() for name, p in parts
    }
