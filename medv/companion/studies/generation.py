"""What notebooks 20, 21, 32 and 33 ask: the same images described in many ways, and what changes from one way to another.

Every way answers the same requests, so that two ways are compared image by image. A diffusion model that writes its most
probable token draws nothing, and a "seed" is therefore another set of test images. The score is that of
`medv.phantoms.facts`: facts of a phantom that a text states, against those that are true. It is no GPT score. Examples
without a scene (real images) have no such score; their words, forwards, times and repetitions are measured all the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medv import paper
from medv.artifacts import read_jsonl
from medv.companion.studies.node import Node
from medv.companion.studies.vqa_study import sampler_config
from medv.data.example import Example
from medv.data.readers import read_dataset
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.evaluation.text import measure_answer
from medv.intervals import NOT_MEASURED, span, verdict
from medv.phantoms.facts import score_description
from medv.phantoms.sets import description_set
from medv.profiles import Profile, SamplerSpec

NODES = (
    Node(
        "generation_settings",
        "32_generation_settings.ipynb",
        "Generation length, steps and block length",
        needs=("models/stage2",),
        makes=("answers/generation_settings",),
        results=("table5", "fig09", "fig11", "fig12"),
        heavy=True,
    ),
)

SCORES = ("score", "precision", "recall")
REPETITIONS = ("adjacent_duplicates", "repeated_share", "rep_2", "rep_4", "distinct_1")
METRICS = (*SCORES, "words", "forwards", "seconds", *REPETITIONS, "longest_run")
"""score, precision, recall and the repetition shares in percent; words, forwards and seconds per answer."""
PAPER_LENGTH = 256
PLAIN = SamplerSpec(1, 1, 1)


def requests(
    profile: Profile, *, data: str = "phantoms", data_dir: str | Path | None = None, share: float = 1.0
) -> dict[int, list[Example]]:
    """Requests for a description by seed: phantoms of the test split, other images for each seed; or a real benchmark (qa50).

    `share` takes the first part of each set. Raises ValueError for real data without a folder.
    """
    if data != "phantoms":
        if data_dir is None:
            raise ValueError(f"data={data!r} needs the folder of the data set: set data_dir")
        return {profile.seeds[0]: read_dataset(data, Path(data_dir), "test")}
    count, size = max(2, round(share * profile.evaluation_descriptions)), profile.model.image_size
    return {seed: description_set("test", count, seed=seed, image_size=size) for seed in profile.seeds}


def divisor(profile: Profile) -> int:
    """By what the paper's lengths are divided here: the smallest power of two that makes 256 fit the profile's canvas."""
    return next(d for d in (1, 2, 4, 8, 16, 32) if PAPER_LENGTH // d <= profile.describe.gen_length)


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
) -> pd.DataFrame:
    """Every way answers every request; answers that `folder` holds are kept, so that a stopped run goes on.

    One row per way, seed and request: setting, seed, number, id, question, text, finish_reason, and METRICS.
    """
    frames = []
    for place, (name, way) in enumerate(ways.items()):
        for seed, examples in asked.items():
            out = folder / f"{place:02d}-seed{seed}.jsonl"
            answer_file(examples, *way, out, batch_size=batch_size, quiet=True)
            frames.append(measured(read_jsonl(out), examples).assign(setting=name, seed=seed))
    frame = pd.concat(frames, ignore_index=True)
    return frame[["setting", "seed", *frame.columns.drop(["setting", "seed"])]]


def ask_model(
    model: Path,
    configs: Mapping[str, SamplerConfig],
    asked: Mapping[int, Sequence[Example]],
    folder: Path,
    *,
    dtype: str = "float32",
    **options,
) -> pd.DataFrame:
    """`ask_all` of one model folder, loaded once in `dtype`, with many sampler configurations."""
    answerer = Answerer.load(model, dtype=dtype)
    return ask_all({name: (answerer, config) for name, config in configs.items()}, asked, folder, **options)


def measured(rows: Sequence[Mapping], examples: Sequence[Example]) -> pd.DataFrame:
    """The measures of answers (rows of an answer file, in the order of the examples)."""
    records = []
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        measures = measure_answer(row)
        record = {"number": number, "id": example.id, **{key: row[key] for key in ("question", "text", "finish_reason")}}
        scene = example.meta.get("scene")
        found = None if scene is None else score_description(row["text"], scene)
        for name, attribute in zip(SCORES, ("f1", "precision", "recall"), strict=True):
            record[name] = np.nan if found is None else 100.0 * getattr(found, attribute)
        shares = {name: 100.0 * measures[name] for name in REPETITIONS if name != "repeated_share"}
        kept = {name: measures[name] for name in ("words", "forwards", "seconds", "repeated_share", "longest_run")}
        records.append(record | kept | shares)
    return pd.DataFrame(records)


def summarize(items: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Mean and 95 % interval: setting, metric, value, low, high, n (answers measured), seeds.

    The interval is a two-level bootstrap: seeds are drawn with replacement, then the answers of each.
    """
    rows = []
    for setting, part in items.groupby("setting", sort=False):
        for metric in metrics:
            groups = [group[metric].to_numpy(float) for _, group in part.groupby("seed")]
            value, low, high = interval(groups)
            row = {"setting": setting, "metric": metric, "value": value, "low": low, "high": high}
            rows.append(row | {"n": int(part[metric].notna().sum()), "seeds": len(groups)})
    return pd.DataFrame(rows)


def interval(groups: Sequence[np.ndarray], *, resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high) of values in groups (one per seed, of the same size): groups are drawn, then values within each.

    NaN is a value that was not measured and stands in no mean; all three are NaN where nothing was.
    """
    rng = np.random.default_rng(0)
    grid = np.stack(groups)  # [seeds, n]
    if np.isnan(grid).all():
        return np.nan, np.nan, np.nan
    mean = np.nanmean if np.isnan(grid).any() else np.mean
    chosen = grid[rng.integers(len(grid), size=(resamples, len(grid)))]  # [resamples, seeds, n]
    inside = rng.integers(grid.shape[1], size=(resamples, len(grid), grid.shape[1]))
    means = mean(np.take_along_axis(chosen, inside, axis=2), axis=(1, 2))
    low, high = np.nanquantile(means, [0.025, 0.975])
    return float(mean(grid)), float(low), float(high)


def change(items: pd.DataFrame, metric: str, first: str, second: str) -> dict:
    """What the metric does from one setting to another on the same requests: change, low, high, n and a verdict in a word.

    "rises" or "falls" where the 95 % interval of the paired difference excludes 0, else "no change shown"; "not measured"
    where no request has the metric in both settings.
    """
    grid = items.pivot(index=["seed", "id"], columns="setting", values=metric)
    gap = grid[second] - grid[first]
    value, low, high = interval([part.to_numpy(float) for _, part in gap.groupby("seed")])
    said = verdict(low, high, above="rises", below="falls", between="no change shown")
    return {"change": value, "low": low, "high": high, "n": int(gap.notna().sum()), "verdict": said}


def check_effects(items: pd.DataFrame, claims: Sequence[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    """The paper's effects beside ours. claims: (what the paper says, metric, first setting, second setting, its direction).

    The direction is "rises", "falls" or "no change shown", from first to second. appears here: "yes", "no" and what it does, or
    "not measured".
    """
    rows = []
    for claim, metric, first, second, expected in claims:
        if first == second:
            continue
        found = change(items, metric, first, second)
        answers = {expected: "yes", NOT_MEASURED: NOT_MEASURED}
        answer = answers.get(found["verdict"], f"no: {found['verdict']}")
        ours = span(found["change"], found["low"], found["high"], form="+.1f")
        row = {"the paper says": claim, "metric": metric.replace("_", " "), "from": first, "to": second}
        rows.append(row | {"here": ours, "n": found["n"], "appears here": answer})
    return pd.DataFrame(rows)


def cells(summary: pd.DataFrame, metrics: Sequence[str], *, digits: int = 1) -> pd.DataFrame:
    """A row per setting, a column "mean [low, high]" per metric."""
    short = summary[summary["metric"].isin(metrics)].copy()
    short["cell"] = [span(r.value, r.low, r.high, form=f".{digits}f") for r in short.itertuples()]
    return short.pivot(index="setting", columns="metric", values="cell")[list(metrics)]


def means(summary: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A row per setting, a column of means per metric."""
    short = summary[summary["metric"].isin(metrics)]
    return short.pivot(index="setting", columns="metric", values="value")[list(metrics)]


def table5(settings: pd.DataFrame, items: pd.DataFrame, scale: int) -> pd.DataFrame:
    """Table 5, ours and the paper's: a row per row of the paper, the paper's lengths being `scale` times ours."""
    summary = summarize(items)
    joined = settings.set_index("setting")
    joined["score [95 % interval]"] = cells(summary, ["score"])["score"]
    kept = {"words": "words", "repeated_share": "repeated words (%)", "adjacent_duplicates": "equal neighbors (%)"}
    for name, column in kept.items():
        joined[column] = means(summary, [name])[name].round(1)
    joined["forwards"] = means(summary, ["forwards"])["forwards"]
    joined["s per answer"] = means(summary, ["seconds"])["seconds"].round(3)
    counts = items.groupby("setting")["id"].count()
    joined["n"] = counts
    printed = paper.table("table5")
    joined["GPT score (paper)"] = printed["overall_score"].to_numpy()
    joined["L, B, Z (paper)"] = [f"{r.generation_length}, {r.block_length}, {r.sampling_steps}" for r in printed.itertuples()]
    names = {"gen_length": "L", "block_length": "B", "steps": "Z"}
    return joined.rename(columns=names).reset_index(drop=True)


def table5_claims(settings: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """What the paper reads off its Table 5, for `check_effects`."""
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
