"""Where it looked (notebook 42): the pointing game against the lesions of drawn images.

A phantom's lesion is drawn, so its pixels are known (`lesion_mask`). Each is asked about three times, for its finding, its side
and its level. The first word of the answer that names such a fact is attributed to the regions of the picture; it is a hit if
the region with the largest drop overlaps the lesion by at least one pixel. Beside it stand what the same mask gives to chance
(the share of regions that would hit), to the center of the picture (the mean over the regions that touch it), and to shuffled
images (the mean over the maps of the same kind of word that were made for other pictures). Real pictures have no mask: they are
shown without a score.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from PIL import Image

from medv.companion.figures.overlays import LEAST
from medv.companion.studies.node import Node
from medv.companion.studies.summaries import estimates
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example, Turn, load_image
from medv.evaluation.answering import Answerer
from medv.evaluation.attribution import Occlusions, Regions, attribute, written
from medv.intervals import NOT_MEASURED, RESAMPLES, Estimate, bootstrap
from medv.phantoms.facts import named_spans
from medv.phantoms.pictures import lesion_mask
from medv.phantoms.questions import ask
from medv.phantoms.scene import NORMAL
from medv.phantoms.sets import description_set
from medv.profiles import Profile

NODE = Node(
    "attribution",
    "42_where_it_looked.ipynb",
    "Where it looked",
    needs=("models/stage2",),
    results=("pointing", "where_it_looked", "effects_attribution"),
    reads=("vqa_rad",),
    heavy=True,
)

KINDS = ("finding", "side", "level")
LESIONS, PICTURES = 3, 6
BASELINES = ("chance", "center", "shuffled images")
OURS, TOKENS = "strongest region", "tokens hidden instead"
SHOWN = f"drop of {LEAST:g} nats or more"
COLUMNS = ("words", "system", "value", "low", "high", "n")


@dataclass(frozen=True)
class Named:
    """A word of an answer that names a fact of a lesion. right: whether the fact is true. hits bool [regions]: which regions
    overlap the lesion. drops float32 [rows, columns] by the way of hiding.
    """

    lesion: str
    kind: str
    word: str
    right: bool
    picture: Image.Image
    mask: np.ndarray
    hits: np.ndarray
    drops: dict[str, np.ndarray]


# --- Answers and their maps ---


def lesions(profile: Profile, *, split: str = "test", seed: int = 0) -> list[Example]:
    """The first phantoms of a split that have a lesion, `LESIONS` for each description that the profile evaluates."""
    count = LESIONS * profile.evaluation_descriptions
    drawn = description_set(split, 2 * count, seed=seed, image_size=profile.model.image_size)
    return [example for example in drawn if example.meta["scene"].finding != NORMAL][:count]


def questions(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
    """An open question of each of KINDS about every lesion, in order."""
    asked = []
    for number, example in enumerate(examples):
        for place, kind in enumerate(KINDS):
            found = ask(example.meta["scene"], kind, "open", np.random.default_rng([seed, number, place]))
            turns = Turn("user", found.text), Turn("assistant", found.sentence)
            asked.append(replace(example, turns=turns, meta=example.meta | {"kind": kind}))
    return asked


def named_words(answerer: Answerer, profile: Profile, examples: Sequence[Example], *, seed: int = 0) -> list[Named]:
    """The named facts in the answers to `questions`; an answer that names none gives nothing. For the first
    `profile.evaluation_descriptions` lesions the visual tokens are hidden, too.
    """
    asked, spec = questions(examples, seed=seed), profile.sentence
    answers = (pair for batch in answerer.traced(asked, sampler_config(spec), batch_size=spec.batch_size) for pair in batch)
    found: list[Named] = []
    for number, example in enumerate(examples):
        picture, scene = load_image(example), example.meta["scene"]
        ways = ("pixels", "tokens") if number < profile.evaluation_descriptions else ("pixels",)
        shown = {way: Occlusions.of(answerer, picture, hide=way) for way in ways}
        mask = lesion_mask(scene, profile.model.image_size)
        hits = regions_hit(shown["pixels"].regions, mask)
        for kind in KINDS:
            answer, trace = next(answers)
            pieces = [answerer.processor.tokenizer.decode([e.token]) for e in written(trace, range(answer.tokens))]
            for start, end, fact in named_spans("".join(pieces)):
                if fact[0] != kind:
                    continue
                places = tokens_in(pieces, start, end)
                how = {"question": answer.question, "trace": trace, "positions": places}
                drops = {way: attribute(answerer, each, **how).of(places).numpy() for way, each in shown.items()}
                word = "".join(pieces)[start:end]
                found.append(Named(example.id, kind, word, fact in scene.facts(), picture, mask, hits, drops))
                break
    return found


def tokens_in(pieces: Sequence[str], start: int, end: int) -> list[int]:
    """The numbers of the pieces of a text that the characters from `start` to `end` lie in."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return [n for n, (piece, last) in enumerate(zip(pieces, ends, strict=True)) if last - len(piece) < end and last > start]


def regions_hit(regions: Regions, mask: np.ndarray) -> np.ndarray:
    """Which regions, row by row, hold at least one pixel of a mask [H, W]; bool [regions]."""
    return np.array([bool(mask[place].any()) for place in regions.pixels(mask.shape[1], mask.shape[0])])


Overlay = tuple[str, Image.Image, np.ndarray, str, np.ndarray | None]
"""What is drawn of one word or answer: id, picture, drops [rows, columns], caption, mask."""


def word_overlays(named: Sequence[Named], count: int = PICTURES) -> list[Overlay]:
    """The first named words."""
    verdict = {True: "correct", False: "wrong"}
    return [
        (each.lesion, each.picture, each.drops["pixels"], f"{each.kind}: “{each.word}”, {verdict[each.right]}", each.mask)
        for each in named[:count]
    ]


def real_overlays(answerer: Answerer, profile: Profile, examples: Sequence[Example]) -> list[Overlay]:
    """The first questions of these examples, answered, with the map of the whole answer; without a mask."""
    config, found = sampler_config(profile.sentence), []
    for example in examples:
        picture = load_image(example)
        answer, trace = answerer.ask(picture, example.question, config)
        if answer.tokens:
            shown, places = Occlusions.of(answerer, picture), range(answer.tokens)
            drops = attribute(answerer, shown, example.question, trace, positions=places).of(places).numpy()
            found.append((example.id, picture, drops, f"{example.question} “{answer.text}”", None))
    return found


def cost(answerer: Answerer, profile: Profile, example: Example) -> str:
    """How long the maps of all words of one answer take here, as a sentence."""
    picture = load_image(example)
    answer, trace = answerer.ask(picture, example.question, sampler_config(profile.sentence))
    started = time.perf_counter()
    shown = Occlusions.of(answerer, picture)
    attribute(answerer, shown, example.question, trace)
    seconds, regions = time.perf_counter() - started, shown.regions.rows * shown.regions.columns
    return f"All words of one answer, {answer.forwards} forwards, {regions} regions: {seconds:.2f} s"


def overlay_frame(shown: Sequence[Overlay]) -> pd.DataFrame:
    """What the overlays show: id, caption, row, column, drop (nats)."""
    rows = [
        (name, caption, row, column, float(drops[row, column]))
        for name, _, drops, caption, _ in shown
        for row, column in np.ndindex(drops.shape)
    ]
    return pd.DataFrame(rows, columns=["id", "caption", "row", "column", "drop"])


# --- The pointing game ---


def pointing_items(named: Sequence[Named], way: str = "pixels") -> pd.DataFrame:
    """One row per word: lesion, kind, word, right, drop (of the strongest region, nats), and in percent hit (0 or 100) and what
    the BASELINES expect of its mask; shuffled images are NaN for the only word of a kind.
    """
    known = [each for each in named if way in each.drops]
    rows = []
    for kind in KINDS:
        mine = [each for each in known if each.kind == kind]
        best = np.array([each.drops[way].argmax() for each in mine], dtype=int)
        for number, each in enumerate(mine):
            others = each.hits[np.delete(best, number)]
            shuffled = others.mean() if len(others) else np.nan
            expected = each.hits.mean(), each.hits[central(*each.drops[way].shape)].mean(), shuffled
            row = {"lesion": each.lesion, "kind": kind, "word": each.word, "right": each.right}
            row["drop"] = float(each.drops[way].max())
            shares = {"hit": each.hits[best[number]], **dict(zip(BASELINES, expected, strict=True))}
            rows.append(row | {name: 100.0 * float(share) for name, share in shares.items()})
    return pd.DataFrame(rows, columns=["lesion", "kind", "word", "right", "drop", "hit", *BASELINES])


def central(rows: int, columns: int) -> list[int]:
    """The regions that touch the center of the picture: one, two or four."""
    return [
        row * columns + column
        for row in sorted({(rows - 1) // 2, rows // 2})
        for column in sorted({(columns - 1) // 2, columns // 2})
    ]


def by_lesion(items: pd.DataFrame, column: str, other: str | None = None) -> Estimate:
    """The mean of a column, or of its difference to another; the words of one lesion are drawn together."""
    values = items[column] if other is None else items[column] - items[other]
    return bootstrap(values.groupby(items["lesion"]).mean().to_numpy(float))


def groups_of(items: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All words, those of each kind, the correct and the wrong findings, and the words whose map the explorer shows."""
    parts = {"all words": items} | {kind: items[items["kind"] == kind] for kind in KINDS}
    finding, right = parts["finding"], parts["finding"]["right"].astype(bool)
    return parts | {"correct finding": finding[right], "wrong finding": finding[~right], SHOWN: items[items["drop"] >= LEAST]}


def apart(first: pd.DataFrame, second: pd.DataFrame) -> Estimate:
    """The hit rate of some words minus that of others about other lesions, both resampled; n of both together. Not measured
    where either is fewer than two words.
    """
    values, rng = [part["hit"].to_numpy(float) for part in (first, second)], np.random.default_rng(0)
    if min(map(len, values)) < 2:
        return Estimate(np.nan, np.nan, np.nan)
    drawn = [rng.choice(each, (RESAMPLES, len(each))).mean(axis=1) for each in values]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return Estimate(values[0].mean() - values[1].mean(), float(low), float(high), sum(map(len, values)))


def pointing_rates(items: pd.DataFrame, hidden: pd.DataFrame) -> pd.DataFrame:
    """Hit rates and their BASELINES for `groups_of` the words: COLUMNS, in percent with 95 % intervals over n lesions. hidden:
    the items for which visual tokens were hidden.
    """
    found = {}
    for name, part in groups_of(items).items():
        found[name, OURS] = by_lesion(part, "hit")
        found |= {(name, base): by_lesion(part, base) for base in BASELINES}
    # Hidden tokens hardly ever make such a drop: a rate over a few words would mislead.
    found |= {(name, TOKENS): by_lesion(part, "hit") for name, part in groups_of(hidden).items() if name != SHOWN}
    return estimates(found, COLUMNS[:2])[list(COLUMNS)]


def pointing_table(items: pd.DataFrame) -> pd.DataFrame:
    """A row per group of words: n (lesions), the hit rate, by how much it is above each of BASELINES (points), and the median
    drop of the strongest region.
    """
    rows = []
    for name, part in groups_of(items).items():
        found = by_lesion(part, "hit")
        gaps = {f"above {base}": by_lesion(part, "hit", base).cell("+.1f") for base in BASELINES}
        row = {"words": name, "n": found.n, "hits (%)": found.cell()} | gaps
        rows.append(row | {"median drop (nats)": round(part["drop"].median(), 3)})
    return pd.DataFrame(rows)


def pointing_verdict(items: pd.DataFrame, hidden: pd.DataFrame) -> str:
    """The result in sentences, from the intervals."""
    found = by_lesion(items, "hit")
    if np.isnan(found.value):
        return f"The pointing game is {NOT_MEASURED}: it needs drawn lesions, whose place is known."
    gaps = {base: by_lesion(items, "hit", base) for base in BASELINES}
    above = [f"{base} ({gap.cell('+.1f')})" for base, gap in gaps.items() if gap.low > 0]
    rest = [f"{base} ({gap.cell('+.1f')})" for base, gap in gaps.items() if not gap.low > 0]
    lines = [
        f"The strongest region lies on the lesion for {found.cell()} % of the words, n = {found.n} lesions.",
        f"It is above {', '.join(above)} points." if above else "",
        f"It is not shown to be above {', '.join(rest)} points." if rest else "",
    ]
    part = groups_of(items)[SHOWN]
    share = 100 * len(part) / len(items)
    lines.append(f"{share:.0f} % of the words have a region with a {SHOWN}.")
    lines[-1] += f" It lies on the lesion for {by_lesion(part, 'hit').cell()} % of them."
    told = f"The median drop of the strongest region is {items['drop'].median():.3f} nats"
    lines.append(f"{told}, of the largest tenth at least {items['drop'].quantile(0.9):.2f}.")
    right, wrong = (groups_of(items)[name] for name in ("correct finding", "wrong finding"))
    rates, gap = [by_lesion(part, "hit") for part in (right, wrong)], apart(right, wrong)
    words = gap.verdict("higher", "lower", "not shown to differ")
    lines.append(f"Findings that are named correctly: {rates[0].cell()} %, n = {rates[0].n}; wrongly: {rates[1].cell()} %, ")
    lines[-1] += f"n = {rates[1].n}. The first rate is {words}: {gap.cell('+.1f')} points."
    if len(hidden):
        both = items.merge(hidden, on=["lesion", "kind"], suffixes=("", " by tokens"))
        gap = by_lesion(both, "hit", "hit by tokens")
        words = gap.verdict("hits more often than", "hits less often than", "is not shown to differ from")
        lines.append(f"Hiding pixels {words} hiding visual tokens: {gap.cell('+.1f')} points, n = {gap.n}.")
    return "\n".join(line for line in lines if line)


def pointing_gaps(items: pd.DataFrame) -> dict[str, Estimate]:
    """The hit rate minus each of its BASELINES, for `effects.effect_table`."""
    return {f"strongest region on the lesion, minus {base}": by_lesion(items, "hit", base) for base in BASELINES}
