"""The same images described with many settings (notebooks 20, 21, 32, 33), and Table 5 (notebook 32).

All settings answer the same requests and are compared image by image. Greedy sampling draws nothing, so a "seed" is another
set of test images. The score is that of `medv.phantoms.facts`: the facts that a text states, against those that are true of the
phantom; it is no GPT score. Answers about real images have the score of a judge, or none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medv import paper
from medv.artifacts import read_jsonl
from medv.companion.studies.node import Node
from medv.companion.studies.requests import Judge, requests_for
from medv.companion.studies.summaries import cells, means, summarize_answers
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.evaluation.text import measure_answer
from medv.phantoms.facts import score_description
from medv.profiles import Profile, SamplerSpec
from medv.training.examples import PHANTOMS, TrainingData

NODE = Node(
    "generation_settings",
    "32_generation_settings.ipynb",
    "Generation length, steps and block length",
    needs=("models/stage2",),
    makes=("answers/generation_settings",),
    results=("table5", "fig09", "fig11", "fig12", "effects_generation_settings"),
    reads=("qa50",),
    may_read=("judge",),
    heavy=True,
)

SCORES = ("score", "precision", "recall")
REPETITIONS = ("adjacent_duplicates", "repeated_share", "rep_2", "rep_4", "distinct_1")
METRICS = (*SCORES, "words", "forwards", "seconds", *REPETITIONS, "longest_run")
"""score, precision, recall and the repetition shares in percent; words, forwards and seconds per answer."""
PAPER_LENGTH, PAPER_BLOCK = 256, 64
PLAIN = SamplerSpec(1, 1, 1)


def requests(profile: Profile, source: TrainingData = PHANTOMS, *, share: float = 1.0) -> dict[int, list[Example]]:
    """Requests for a description by seed: phantoms of the test split, other images for each seed; or a real benchmark (qa50),
    which has no second set. `share` takes the first part of each set of phantoms.
    """
    if source.name != PHANTOMS.name:
        return {profile.seeds[0]: requests_for(profile, source)}
    count = max(2, round(share * profile.evaluation_descriptions))
    return {seed: requests_for(profile, source, count, seed=seed) for seed in profile.seeds}


def score_name(asked: Mapping[int, Sequence[Example]]) -> str:
    """The name of the column `score` for these requests."""
    real = any("scene" not in example.meta for examples in asked.values() for example in examples)
    return "judge's score (%)" if real else "facts, F1 (%)"


def divisor(profile: Profile) -> int:
    """The divisor of the paper's lengths: the smallest power of two that makes 256 fit the profile's canvas."""
    return next(d for d in (1, 2, 4, 8, 16, 32) if PAPER_LENGTH // d <= profile.describe.gen_length)


def canvas_of(profile: Profile) -> tuple[int, int]:
    """L and B of the paper's main setting, 256 and 64, over `divisor`."""
    scale = divisor(profile)
    return PAPER_LENGTH // scale, max(PAPER_BLOCK // scale, 1)


def name_of(length: int, block: int, steps: int) -> str:
    """The name of a setting."""
    return f"L={length} B={block} Z={steps}"


def table5_settings(profile: Profile) -> pd.DataFrame:
    """The rows of Table 5 with all lengths divided by `divisor`: group, gen_length, block_length, steps, setting."""
    lengths = ["gen_length", "block_length", "steps"]
    rows = paper.table("table5").rename(columns={"generation_length": "gen_length", "sampling_steps": "steps"})
    rows = rows[["group", *lengths]].copy()
    rows[lengths] = (rows[lengths] // divisor(profile)).clip(lower=1)
    rows["setting"] = [name_of(*row) for row in rows[lengths].itertuples(index=False)]
    return rows


def plain_configs(settings: pd.DataFrame, like: SamplerSpec = PLAIN) -> dict[str, SamplerConfig]:
    """One configuration for each different setting of `table5_settings`, with the sampler of `like`."""
    kept = settings.drop_duplicates("setting")
    return {row.setting: sampler_config(like.sized(row.gen_length, row.block_length, row.steps)) for row in kept.itertuples()}


def ask_all(
    ways: Mapping[str, tuple[Answerer, SamplerConfig]],
    asked: Mapping[int, Sequence[Example]],
    folder: Path,
    *,
    batch_size: int = PLAIN.batch_size,
    judge: Judge | None = None,
) -> pd.DataFrame:
    """Answer every request in every way; answers that `folder` holds are kept. judge: scores the answers to real requests.

    One row per way, seed and request: setting, seed, number, id, question, text, finish_reason, and METRICS.
    """
    frames = []
    for place, (name, way) in enumerate(ways.items()):
        for seed, examples in asked.items():
            out = folder / f"{place:02d}-seed{seed}.jsonl"
            answer_file(examples, *way, out, batch_size=batch_size, quiet=True)
            scores = {} if judge is None else judge(out, out.with_suffix(".judged.jsonl"))
            frames.append(measured(read_jsonl(out), examples, scores).assign(setting=name, seed=seed))
    frame = pd.concat(frames, ignore_index=True)
    return frame[["setting", "seed", *frame.columns.drop(["setting", "seed"])]]


def ask_model(
    answerer: Answerer, configs: Mapping[str, SamplerConfig], asked: Mapping[int, Sequence[Example]], folder: Path, **options
) -> pd.DataFrame:
    """`ask_all` of one model with many sampler configurations."""
    return ask_all({name: (answerer, config) for name, config in configs.items()}, asked, folder, **options)


def measured(rows: Sequence[Mapping], examples: Sequence[Example], scores: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The measures of answers (rows of an answer file, in the order of the examples). scores: a judge's, by question id."""
    records = []
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        measures, scene = measure_answer(row), example.meta.get("scene")
        record = {"number": number, "id": example.id, **{key: row[key] for key in ("question", "text", "finish_reason")}}
        found = None if scene is None else score_description(row["text"], scene)
        for name, attribute in zip(SCORES, ("f1", "precision", "recall"), strict=True):
            record[name] = np.nan if found is None else 100.0 * getattr(found, attribute)
        if found is None and scores:
            record["score"] = scores.get(example.id, np.nan)
        shares = {name: 100.0 * measures[name] for name in REPETITIONS if name != "repeated_share"}
        kept = {name: measures[name] for name in ("words", "forwards", "seconds", "repeated_share", "longest_run")}
        records.append(record | kept | shares)
    return pd.DataFrame(records)


def table5(settings: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Table 5, ours and the paper's: a row per row of the paper."""
    summary = summarize_answers(items, METRICS)
    joined = settings.set_index("setting")
    joined["score [95 % interval]"] = cells(summary, ["score"])["score"]
    kept = {"words": "words", "repeated_share": "repeated words (%)", "adjacent_duplicates": "equal neighbors (%)"}
    value = means(summary, METRICS)
    for name, column in kept.items():
        joined[column] = value[name].round(1)
    joined["forwards"] = value["forwards"]
    joined["s per answer"] = value["seconds"].round(3)
    joined["n"] = items.groupby("setting")["id"].count()
    printed = paper.table("table5")
    joined["GPT score (paper)"] = printed["overall_score"].to_numpy()
    joined["L, B, Z (paper)"] = [f"{r.generation_length}, {r.block_length}, {r.sampling_steps}" for r in printed.itertuples()]
    return joined.rename(columns={"gen_length": "L", "block_length": "B", "steps": "Z"}).reset_index(drop=True)


def table5_claims(settings: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """The paper's claims about Table 5, for `check_effects`."""
    ends = {g: (part["setting"].iloc[0], part["setting"].iloc[-1]) for g, part in settings.groupby("group")}
    (a0, a1), (b0, b1), (c0, c1) = ends["A"], ends["B"], ends["C"]
    return [
        ("A: a longer canvas scores higher", "score", a0, a1, "rises"),
        ("A: and says more words", "words", a0, a1, "rises"),
        ("B: more steps score higher", "score", b0, b1, "rises"),
        ("B: more steps repeat less", "repeated_share", b0, b1, "falls"),
        ("B: and stutter less", "adjacent_duplicates", b0, b1, "falls"),
        ("C: larger blocks do not score higher throughout", "score", c0, c1, "no change shown"),
    ]
