"""What notebooks 10-12 do with a training stage: run it, read what the model then writes, and compare it with its controls.

Every comparison is made on images that no training has seen, with an interval, and beside what the same texts or answers
score without a look at the right image. This module draws nothing and knows no notebook.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from medv.artifacts import write_json
from medv.companion.figures.plots import loss_history
from medv.companion.studies.node import Node
from medv.companion.studies.vqa_study import CONDITIONS, METRICS, sampler_config, summarize, vqa_study
from medv.data.example import Example
from medv.data.training_set import check_pictures
from medv.evaluation.answering import Answerer
from medv.evaluation.controls import blinded
from medv.intervals import NOT_MEASURED, bootstrap_interval, verdict
from medv.model.looks import Looks
from medv.model.processing import MedVProcessor
from medv.phantoms.facts import score_descriptions
from medv.phantoms.questions import KINDS
from medv.phantoms.sets import vqa_set
from medv.profiles import Profile, SamplerSpec
from medv.training.examples import TrainingData, question_split, stage_examples
from medv.training.launch import RunOptions
from medv.training.stages import run_stage

NODES = (
    Node(
        "stage1",
        "10_stage1_alignment.ipynb",
        "Stage 1: align the projector",
        makes=("models/stage1",),
        results=("stage1",),
        heavy=True,
    ),
    Node(
        "stage2",
        "11_stage2_instruction.ipynb",
        "Stage 2: tune on instructions",
        needs=("models/stage1",),
        makes=("models/stage2",),
        results=("stage2",),
        heavy=True,
    ),
    Node(
        "stage3",
        "12_stage3_vqa.ipynb",
        "Stage 3: tune on visual question answering",
        needs=("models/stage2",),
        makes=("models/stage3",),
        results=("table2", "fig03", "vqa_controls", "vqa_kinds"),
        heavy=True,
    ),
)

WRONG = "{}, wrong image"
AFTER, BEFORE = "after stage 3", "before stage 3"
BLIND = "trained blind"
TOLD = ("nearest question", "question only", "majority")  # answers that no network gives
CAPTION = SamplerSpec(gen_length=32, block_length=32, steps=32)
"""Room for a caption of stage 1, one token per forward."""
SENTENCE = SamplerSpec(gen_length=16, block_length=16, steps=16)
"""Room for the full sentences with which a stage-2 model answers a question."""


def finish_stage(stage: str, profile: Profile, folder: Path, *, seed: int = 0, **source) -> dict:
    """`run_stage`, then without its checkpoints: facts of the run and `seconds`, also where the stage was finished before."""
    facts = run_stage(stage, profile, folder, RunOptions(seed=seed), **source)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return facts


def losses_of(folder: Path) -> pd.DataFrame:
    """The losses of a training from its folder, as `figures.plots.loss_history`; none of a model trained elsewhere."""
    history = folder / "history.json"
    return loss_history(json.loads(history.read_text(encoding="utf-8")) if history.is_file() else [])


# --- What it writes: captions and descriptions (notebooks 10, 11) ---


def write_texts(answerer: Answerer, examples: Sequence[Example], spec: SamplerSpec, *, seed: int = 0) -> list[str]:
    """What the model writes to the request of each example."""
    how = {"batch_size": spec.batch_size, "quiet": True}
    return [a.text for a in answerer.answer(examples, sampler_config(spec, seed=seed), **how)]


def judge_texts(system: str, texts: Sequence[str], examples: Sequence[Example]) -> pd.DataFrame:
    """Findings precision, recall and F1 of each text in percent: system, id, metric, score.

    A second system, "..., wrong image", scores each text against the truth of the next example: what fluent text about some
    other image of the same world reaches.
    """
    scenes = [example.meta["scene"] for example in examples]
    frames = []
    for name, truths in ((system, scenes), (WRONG.format(system), scenes[1:] + scenes[:1])):
        items = score_descriptions(texts, truths, resamples=1).items
        for metric in ("precision", "recall", "f1"):
            scores = [100.0 * getattr(item, metric) for item in items]
            ids = [example.id for example in examples]
            frames.append(pd.DataFrame({"system": name, "id": ids, "metric": metric, "score": scores}))
    return pd.concat(frames, ignore_index=True)


def summarize_texts(judged: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % bootstrap interval over texts: system, metric, value, low, high (percent), n."""
    rows = []
    for (system, metric), part in judged.groupby(["system", "metric"], sort=False):
        known = part["score"].dropna()
        low, high = bootstrap_interval(known, seed=0) if len(known) else (np.nan, np.nan)
        row = {"system": system, "metric": metric, "value": known.mean(), "low": low, "high": high}
        rows.append(row | {"n": len(known)})
    return pd.DataFrame(rows)


def difference(judged: pd.DataFrame, better: str, base: str, *, metric: str = "f1") -> str:
    """One sentence on whether `better` beats `base` on the texts that both wrote: a paired bootstrap of the difference."""
    grid = judged[judged["metric"] == metric].pivot(index="id", columns="system", values="score")[[better, base]].dropna()
    gap = (grid[better] - grid[base]).to_numpy()
    if not len(gap):
        return f"{metric} of {better} minus {base}: {NOT_MEASURED}"
    low, high = bootstrap_interval(gap, seed=0)
    said = verdict(low, high, above="a gain", below="a loss")
    return f"{metric} of {better} minus {base}: {gap.mean():+.1f} points [{low:+.1f}, {high:+.1f}], n = {len(gap)}: {said}"


def texts_beside_truth(examples: Sequence[Example], texts: Sequence[str], count: int = 3) -> str:
    """The first few requests with the true facts, the reference and what the model wrote, to read."""
    said = []
    for example, text in list(zip(examples, texts, strict=True))[:count]:
        facts = ", ".join(value for _, value in sorted(example.meta["scene"].facts()))
        said.append(f"truth      {facts}\nreference  {example.answer}\nmodel      {text or '(nothing)'}\n")
    return "\n".join(said)


# --- What it answers (notebook 12) ---


def question_sets(
    profile: Profile, data: str, data_dir: str | Path | None, protocol: str = "official"
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training questions and the test sets by name: the phantoms' main and hard set, or what a protocol of
    `medv.training.examples` asks of a real data set.

    Raises ValueError for real data without a folder, and for what `medv.data.training_set` refuses.
    """
    if data == "phantoms":
        size, count = profile.model.image_size, profile.evaluation_questions
        train = vqa_set("train", profile.stages["vqa"].samples, image_size=size)
        tests = {"phantoms": vqa_set("test", count, image_size=size)}
        return train, tests | {"phantoms, hard": vqa_set("test", count, hard=True, image_size=size)}
    if data_dir is None:
        raise ValueError(f"data={data!r} needs the folder of the data set: set data_dir")
    train, tests = question_split(TrainingData(data, Path(data_dir), protocol))
    for test in tests.values():
        check_pictures(test, Path(data_dir))
    return train, {name: [_with_kind(example) for example in test] for name, test in tests.items()}


def _with_kind(example: Example) -> Example:
    """The kind of a real question is the first type that its file names (VQA-RAD: "PRES, SIZE")."""
    kind = str(example.meta.get("question_type") or "any").partition(",")[0].strip().lower()
    return replace(example, meta={"kind": kind} | example.meta)


def fit_answers(profile: Profile, processor: MedVProcessor, train: Sequence[Example]) -> Profile:
    """The profile with a canvas that holds 95 % of the training answers and their end, in training as in answering.

    The canvas grows in steps of 8 tokens and never shrinks; phantom answers keep the profile's own.
    """
    lengths = [len(processor.tokenizer.encode(example.answer, add_special_tokens=False)) + 1 for example in train]
    length = max(profile.answer.gen_length, 8 * int(np.ceil(np.quantile(lengths, 0.95) / 8)))
    if not profile.synthetic or length == profile.answer.gen_length:
        return profile
    longer = profile.with_recipe("vqa", padding=f"fixed:{length}")
    return replace(longer, answer=profile.answer.sized(length, length, length))


def train_seeds(
    profile: Profile,
    folder: Path,
    init: Path,
    *,
    data: str = "phantoms",
    data_dir: str | Path | None = None,
    protocol: str = "official",
    blind: bool = False,
) -> pd.DataFrame:
    """Stage 3 once per seed of the profile, each in `folder`/seed<k>; a finished seed is kept. One row of facts a seed.

    With `blind` the same network learns from gray pictures, in `folder`/blind<k>, to be what `study_seeds` compares with. The
    weights of the first seed are copied to `folder` itself, so that the folder is a model like any other.
    """
    rows = []
    source = TrainingData(data, None if data_dir is None else Path(data_dir), protocol)
    for seed in profile.seeds:
        rows.append({"seed": seed} | finish_stage("vqa", profile, folder / f"seed{seed}", init=init, seed=seed, data=source))
        if blind:
            gray = blinded(stage_examples("vqa", profile, source)[0])
            finish_stage("vqa", profile, folder / f"blind{seed}", init=init, seed=seed, examples=gray)
    shutil.copytree(folder / f"seed{profile.seeds[0]}", folder, dirs_exist_ok=True)
    write_json(folder / "seeds.json", rows)
    return pd.DataFrame(rows)


def study_before(
    answerer: Answerer, profile: Profile, train: Sequence[Example], tests: Mapping[str, Sequence[Example]], seed: int = 0
) -> pd.DataFrame:
    """The model before stage 3 on every test set, answering in sentences; columns as `study_seeds`."""
    spec = max(SENTENCE.like(profile.answer), profile.answer, key=lambda spec: spec.gen_length)
    how = {"seed": seed, "conditions": ["model"], "batch_size": spec.batch_size, "quiet": True}
    frames = []
    for name, test in tests.items():
        items = vqa_study(answerer, train, test, sampler_config(spec), **how)
        frames.append(items.assign(test=name, condition=BEFORE))
    return pd.concat(frames, ignore_index=True)


def study_seeds(
    profile: Profile, folder: Path, train: Sequence[Example], tests: Mapping[str, Sequence[Example]]
) -> pd.DataFrame:
    """Every seed's model with its controls on every test set: the rows of `vqa_study` and the name of the set in `test`.

    A folder without seeds, of a model trained elsewhere, is that model alone. Models that were trained blind are asked blind.
    The hard set goes without the gray image, to save time.
    """
    frames = []
    models = {seed: folder / f"seed{seed}" for seed in profile.seeds if (folder / f"seed{seed}").is_dir()}
    for seed, model in (models or {profile.seeds[0]: folder}).items():
        answerer, looks = Answerer.load(model), None
        if profile.stages["vqa"].cached_vision:
            looks = Looks(answerer.processor)
            looks.once(answerer.model.model, [*chain(*tests.values()), *blinded(train[:1])])
        for name, test in tests.items():
            shown = [c for c in CONDITIONS if not (name.endswith("hard") and c == "gray image")]
            how = {"config": sampler_config(profile.answer, seed=seed), "seed": seed, "quiet": True}
            how["batch_size"] = profile.answer.batch_size
            items = vqa_study(answerer, train, test, conditions=shown, looks=looks, **how)
            frames.append(items.assign(test=name).replace({"condition": {"model": AFTER}}))
            if (folder / f"blind{seed}").is_dir():
                blind = Answerer.load(folder / f"blind{seed}")
                items = vqa_study(blind, train, blinded(test), conditions=["model"], **how)
                frames.append(items.assign(test=name).replace({"condition": {"model": BLIND}}))
    return pd.concat(frames, ignore_index=True)


def recorded(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `benchmarks/small_gpu.py final` wrote: items as those of `study_seeds`, and one row of facts a training."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    facts = pd.DataFrame([{"name": row["name"], "seconds": row["seconds"]["all"]} for row in found["trials"]])
    facts = facts[facts["name"].str.startswith("real")]
    return pd.DataFrame(found["items"]), facts


def scores(items: pd.DataFrame) -> pd.DataFrame:
    """`summarize` per test set, and the wall time: test, condition, metric, value, low, high, n, seeds,
    seconds_per_question (empty for answers that no network gave).
    """
    frames = []
    for name, part in items.groupby("test", sort=False):
        part = part.sort_values("condition", kind="stable", key=lambda column: (column != AFTER).astype(int))
        seconds = part[~part["condition"].isin(TOLD)].groupby("condition")["seconds"].mean()
        summary = summarize(part)
        frames.append(summary.assign(test=name, seconds_per_question=summary["condition"].map(seconds)))
    return pd.concat(frames, ignore_index=True)[["test", *frames[0].columns.drop("test")]]


def score_table(summary: pd.DataFrame, metrics: Sequence[str] = METRICS[:4]) -> pd.DataFrame:
    """`scores` as a table to read: a row per test set and system, "mean [low, high]" and n, seeds, seconds per question."""
    rows = []
    for (name, condition), part in summary.groupby(["test", "condition"], sort=False):
        cells = {row.metric: row for row in part.itertuples()}
        row = {"test set": name, "system": condition}
        for metric in metrics:
            if cell := cells.get(metric):
                row[metric] = f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]"
        for form in ("closed", "open"):
            row[f"n {form}"] = next((cell.n for metric, cell in cells.items() if metric.startswith(form)), 0)
        rows.append(row | {"seeds": part["seeds"].max(), "s per question": part["seconds_per_question"].iloc[0]})
    return pd.DataFrame(rows)


def margins(summary: pd.DataFrame) -> pd.DataFrame:
    """How far the model stands above its best control, in points, per test set and metric."""
    rows = []
    controls = (*CONDITIONS[1:], BLIND)
    for (name, metric), part in summary.groupby(["test", "metric"], sort=False):
        if metric not in METRICS[:2]:
            continue
        value = part.set_index("condition")["value"]
        best = value[value.index.isin(controls)].idxmax()
        row = {"test set": name, "metric": metric, AFTER: value[AFTER], "best control": best, "control": value[best]}
        rows.append(row | {"margin": value[AFTER] - value[best]})
    return pd.DataFrame(rows)


def by_kind(items: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of closed and recall of open questions per kind and test set, beside the question-only control: a grid."""
    kept = items[items["condition"].isin([AFTER, "question only"])].copy()
    kept["score"] = kept["closed_accuracy"].fillna(kept["open_recall"])
    kept["column"] = kept["answer_type"].str.lower() + ", " + kept["condition"]
    kept["kind"] = pd.Categorical(kept["kind"], dict.fromkeys([*KINDS, *sorted(set(kept["kind"]))]))
    kept = kept.sort_values("kind", kind="stable").sort_values("test", kind="stable")
    kept["row"] = kept["test"] + ": " + kept["kind"].astype(str)
    columns = [f"{form}, {who}" for form in ("closed", "open") for who in (AFTER, "question only")]
    grid = kept.pivot_table(index="row", columns="column", values="score", sort=False)
    return grid.reindex(columns=columns).rename_axis(index=None, columns=None)


def training_time(facts: pd.DataFrame | Mapping) -> str:
    """The wall time of `train_seeds` in words; unknown where a seed was finished before."""
    if "seconds" not in facts or facts["seconds"].isna().any():
        return "training time unknown, as the training was not done, or not as a whole, in this run"
    return f"training took {facts['seconds'].mean():.0f} s a seed"
