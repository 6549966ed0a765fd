"""The three training stages (notebooks 10-12): train, then compare texts and answers with their controls.

Every comparison is on images that no training has seen, has an interval, and stands beside the score of the same texts or
answers without the right image.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medv.artifacts import write_json
from medv.checkpoints.adapters import base_folder, is_adapter
from medv.checkpoints.loading import load_processor
from medv.companion.audit.controls import blinded
from medv.companion.studies.machine import Machine
from medv.companion.studies.node import Node
from medv.companion.studies.requests import about, scored_by, text_scores
from medv.companion.studies.summaries import summarize
from medv.companion.studies.vqa_study import CONDITIONS, METRICS, sampler_config, vqa_study
from medv.data.example import Example
from medv.data.readers import check_pictures
from medv.evaluation.answering import Answerer
from medv.intervals import Estimate, bootstrap
from medv.model.looks import Looks
from medv.model.processing import MedVProcessor
from medv.phantoms.facts import score_descriptions
from medv.phantoms.questions import KINDS
from medv.phantoms.sets import vqa_set
from medv.profiles import Profile, SamplerSpec
from medv.training.examples import TrainingData, question_split, stage_examples
from medv.training.launch import RunOptions
from medv.training.stages import run_stage, starting_point

NODES = (
    Node(
        "stage1",
        "10_stage1_alignment.ipynb",
        "Stage 1: align the projector",
        makes=("models/stage1",),
        results=("stage1", "effects_stage1"),
        reads=("language", "vision", "align", "qa50"),
        heavy=True,
    ),
    Node(
        "stage2",
        "11_stage2_instruction.ipynb",
        "Stage 2: tune on instructions",
        needs=("models/stage1",),
        makes=("models/stage2",),
        results=("stage2", "effects_stage2"),
        reads=("instruct", "qa50"),
        heavy=True,
    ),
    Node(
        "stage3",
        "12_stage3_vqa.ipynb",
        "Stage 3: tune on visual question answering",
        needs=("models/stage2",),
        makes=("models/stage3",),
        results=("table2", "fig03", "vqa_controls", "vqa_kinds", "effects_stage3"),
        reads=("vqa_rad|slake|pathvqa",),
        heavy=True,
    ),
)

DEFAULT = Machine()
AFTER, BEFORE, BLIND = "after stage 3", "before stage 3", "trained blind"
WITHOUT_MODEL = ("nearest question", "question only", "majority")  # answers that no network gives


def losses_of(folder: Path) -> pd.DataFrame:
    """The losses of a training from its `history.json`: step, loss, split ("train", "validation"); empty without that file."""
    path, rows = folder / "history.json", []
    for entry in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        for key, split in (("loss", "train"), ("eval_loss", "validation")):
            if key in entry:
                rows.append({"step": int(entry["step"]), "loss": float(entry[key]), "split": split})
    return pd.DataFrame(rows, columns=["step", "loss", "split"])


# --- Captions and descriptions (notebooks 10, 11) ---


def write_texts(answerer: Answerer, examples: Sequence[Example], spec: SamplerSpec, *, seed: int = 0) -> list[str]:
    """The model's text for the request of each example."""
    config = sampler_config(spec, seed=seed)
    return [answer.text for answer in answerer.answer(examples, config, batch_size=spec.batch_size, quiet=True)]


def before_and_after(profile: Profile, start: Path | None, trained: Path, *, seed: int = 0) -> Iterator[tuple[str, Answerer]]:
    """The model where stage 1 begins, unless that is unknown, and the model of stage 1, by name, one at a time."""
    if start is not None or profile.towers == "bundled":
        yield "before", Answerer(*starting_point(profile, start, seed=seed, dtype=getattr(torch, profile.dtype)))
    yield "after stage 1", Answerer.load(trained, dtype=profile.dtype)


def judge_texts(system: str, texts: Sequence[str], examples: Sequence[Example]) -> pd.DataFrame:
    """`text_scores` of each text, and of the "wrong image", the next example's truth: system, id, metric, score (percent)."""
    rows = []
    for name, truths in ((system, examples), (f"{system}, wrong image", [*examples[1:], *examples[:1]])):
        scores = [text_scores(text, truth) for text, truth in zip(texts, truths, strict=True)]
        for metric in ("precision", "recall", "f1"):
            rows += [(name, ex.id, metric, score[metric]) for ex, score in zip(examples, scores, strict=True)]
    return pd.DataFrame(rows, columns=["system", "id", "metric", "score"])


def shares_stated(texts: Sequence[str], examples: Sequence[Example]) -> str:
    """The share of the phantoms of which a description states each attribute rightly; real images have no known attributes."""
    if scored_by(examples) != "facts":
        return "the attributes of real images are not known"
    found = score_descriptions(texts, [example.meta["scene"] for example in examples]).by_attribute
    shares = {name: round(100 * share) for name, share in found.items()}
    return f"share of images whose description states the attribute rightly (%)\n{shares}"


def difference(judged: pd.DataFrame, better: str, base: str, *, metric: str = "f1") -> str:
    """A sentence on whether `better` beats `base` on the texts that both wrote: the paired difference and its verdict."""
    grid = judged[judged["metric"] == metric].pivot(index="id", columns="system", values="score")
    gap = bootstrap(grid[better] - grid[base])
    points, said = gap.cell("+.1f"), gap.verdict("a gain", "a loss")
    return f"{metric} of {better} minus {base} in points: {points}, n = {gap.n}: {said}"


def texts_beside_truth(examples: Sequence[Example], texts: Sequence[str], count: int = 3) -> str:
    """The first few requests with the true facts, the reference and the model's text, to read."""
    return "\n".join(
        f"truth      {about(example)}\nreference  {example.answer}\nmodel      {text or '(nothing)'}\n"
        for example, text in list(zip(examples, texts, strict=True))[:count]
    )


# --- Questions (notebook 12) ---


def question_sets(
    profile: Profile, data: str, data_dir: str | Path | None, protocol: str = "official"
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training questions and test sets by name: the phantoms' main and hard set, or a real data set split by a protocol of
    `medv.training.examples`. Raises ValueError for real data without a folder or with missing images.
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
        for place, example in enumerate(test):  # its kind is the first type in its file (VQA-RAD: "PRES, SIZE")
            kind = str(example.meta.get("question_type") or "any").partition(",")[0].strip().lower()
            test[place] = replace(example, meta={"kind": kind} | example.meta)
    return train, tests


def fit_answers(profile: Profile, processor: MedVProcessor, train: Sequence[Example]) -> Profile:
    """The profile with a canvas, in training and answering, that holds 95 % of the training answers and their end token.

    The canvas grows in steps of 8 tokens and never shrinks; phantoms keep the profile's own.
    """
    lengths = [len(processor.tokenizer.encode(example.answer, add_special_tokens=False)) + 1 for example in train]
    length = max(profile.answer.gen_length, 8 * int(np.ceil(np.quantile(lengths, 0.95) / 8)))
    if not profile.synthetic or length == profile.answer.gen_length:
        return profile
    longer = profile.with_recipe("vqa", padding=f"fixed:{length}")
    return replace(longer, answer=profile.answer.sized(length, length, length))


def processor_of(folder: Path) -> MedVProcessor:
    """The processor of a model's folder, read without its weights."""
    while is_adapter(folder):
        folder = base_folder(folder)
    return load_processor(MedVProcessor, folder)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one data set, and the profile with a canvas that holds its answers."""

    source: TrainingData
    profile: Profile
    train: list[Example]
    tests: dict[str, list[Example]]

    @classmethod
    def read(cls, profile: Profile, source: TrainingData, processor: MedVProcessor | None = None) -> "QuestionSet":
        """The set of `question_sets`; with the processor of the model its canvas is fitted."""
        train, tests = question_sets(profile, source.name, source.folder, source.protocol)
        return cls(source, profile if processor is None else fit_answers(profile, processor, train), train, tests)

    def sentence(self) -> str:
        """How many questions there are, and how they are answered."""
        sizes = ", ".join(f"{name} {len(test)}" for name, test in self.tests.items())
        long, seeds = self.profile.answer.gen_length, self.profile.seeds
        return f"training {len(self.train)}; test: {sizes}; answers of at most {long} tokens; seeds {seeds}"


def train_seeds(
    sets: Sequence[QuestionSet], folder: Path, init: Path, *, blind: bool = False, machine: Machine = DEFAULT
) -> pd.DataFrame:
    """Stage 3 once per set and seed of the profile, each in `place_of`; a finished seed is kept. One row of facts a seed.

    With `blind` the same network also learns from gray pictures, in `blind<k>`, as a control of `study_seeds`. The first
    model is copied to `folder` itself.
    """
    rows = []
    for one in sets:
        place = place_of(one, sets, folder)
        for seed in one.profile.seeds:
            facts = machine.train("vqa", one.profile, place / f"seed{seed}", init=init, seed=seed, data=one.source)
            rows.append(({"data": one.source.name} if len(sets) > 1 else {}) | {"seed": seed} | facts)
            if blind:
                gray = blinded(stage_examples("vqa", one.profile, one.source)[0])
                run_stage("vqa", one.profile, place / f"blind{seed}", RunOptions(seed=seed), init=init, examples=gray)
                shutil.rmtree(place / f"blind{seed}" / "checkpoints", ignore_errors=True)
    shutil.copytree(place_of(sets[0], sets, folder) / f"seed{sets[0].profile.seeds[0]}", folder, dirs_exist_ok=True)
    write_json(folder / "seeds.json", rows)
    return pd.DataFrame(rows)


def place_of(one: QuestionSet, sets: Sequence[QuestionSet], folder: Path) -> Path:
    """The folder of a set's models: `folder`, or one by the set's name in it where there are several."""
    return folder / one.source.name if len(sets) > 1 else folder


def study_sets(start: Path, sets: Sequence[QuestionSet], folder: Path) -> pd.DataFrame:
    """`study_before` and `study_seeds` of every set; `start` is the folder of the model before stage 3."""
    frames = []
    for one in sets:
        before = Answerer.load(start, dtype=one.profile.dtype)
        frames.append(study_before(before, one.profile, one.train, one.tests))
        del before  # its memory is needed
        place = place_of(one, sets, folder)  # a model trained elsewhere has no folder for each set
        frames.append(study_seeds(one.profile, place if place.is_dir() else folder, one.train, one.tests))
    return pd.concat(frames, ignore_index=True)


def sentence_spec(profile: Profile) -> SamplerSpec:
    """How a model before stage 3, which answers in sentences, is asked a question."""
    return max(profile.sentence, profile.answer, key=lambda spec: spec.gen_length)


def study_before(
    answerer: Answerer, profile: Profile, train: Sequence[Example], tests: Mapping[str, Sequence[Example]], seed: int = 0
) -> pd.DataFrame:
    """The model before stage 3 on every test set, answering in sentences; columns as `study_seeds`."""
    spec = sentence_spec(profile)
    how = {"seed": seed, "conditions": ["model"], "batch_size": spec.batch_size, "quiet": True}
    items = {name: vqa_study(answerer, train, test, sampler_config(spec), **how) for name, test in tests.items()}
    return pd.concat([part.assign(test=name, condition=BEFORE) for name, part in items.items()], ignore_index=True)


def study_seeds(
    profile: Profile, folder: Path, train: Sequence[Example], tests: Mapping[str, Sequence[Example]]
) -> pd.DataFrame:
    """Every seed's model with its controls on every test set: the rows of `vqa_study` with the name of the set in `test`.

    A folder without seeds is a model trained elsewhere. Models trained blind are asked blind. The hard set has no gray image.
    """
    frames = []
    models = {seed: folder / f"seed{seed}" for seed in profile.seeds if (folder / f"seed{seed}").is_dir()}
    for seed, model in (models or {profile.seeds[0]: folder}).items():
        answerer, looks = Answerer.load(model, dtype=profile.dtype), None
        if profile.stages["vqa"].cached_vision:
            looks = Looks(answerer.processor)
            looks.once(answerer.model.model, [*chain(*tests.values()), *blinded(train[:1])])
        for name, test in tests.items():
            shown = [c for c in CONDITIONS if not (name.endswith("hard") and c == "gray image")]
            how = {"config": sampler_config(profile.answer, seed=seed), "seed": seed}
            how |= {"batch_size": profile.answer.batch_size, "quiet": True}
            items = vqa_study(answerer, train, test, conditions=shown, looks=looks, **how)
            frames.append(items.assign(test=name).replace({"condition": {"model": AFTER}}))
            if (folder / f"blind{seed}").is_dir():
                blind = Answerer.load(folder / f"blind{seed}", dtype=profile.dtype)
                items = vqa_study(blind, train, blinded(test), conditions=["model"], **how)
                frames.append(items.assign(test=name).replace({"condition": {"model": BLIND}}))
    return pd.concat(frames, ignore_index=True)


def recorded(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The file of `benchmarks/small_gpu.py final`: items as those of `study_seeds`, and one row of facts per training."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    seconds = [row["seconds"]["all"] - row["seconds"]["asking"] for row in found["trials"] if row["name"].startswith("real")]
    return pd.DataFrame(found["items"]), pd.DataFrame({"seconds": seconds, "recipe": found["recipe"]})


def scores(items: pd.DataFrame) -> pd.DataFrame:
    """`summarize` per test set, with seconds_per_question (wall time; empty for answers that no network gave)."""
    frames = []
    for name, part in items.groupby("test", sort=False):
        part = part.sort_values("condition", kind="stable", key=lambda column: (column != AFTER).astype(int))
        seconds = part[~part["condition"].isin(WITHOUT_MODEL)].groupby("condition")["seconds"].mean()
        summary = summarize(part, METRICS)
        frames.append(summary.assign(test=name, seconds_per_question=summary["condition"].map(seconds)))
    return pd.concat(frames, ignore_index=True)[["test", *frames[0].columns.drop("test")]]


def score_table(summary: pd.DataFrame, metrics: Sequence[str] = METRICS[:4]) -> pd.DataFrame:
    """`scores` as a table to read: a row per test set and system, "mean [low, high]" and n, seeds, seconds per question."""
    rows = []
    for (name, condition), part in summary.groupby(["test", "condition"], sort=False):
        row = {"test set": name, "system": condition}
        row |= {cell.metric: Estimate.of(cell).cell() for cell in part.itertuples() if cell.metric in metrics}
        for form in ("closed", "open"):
            row[f"n {form}"] = next(iter(part[part["metric"].str.startswith(form)]["n"]), 0)
        rows.append(row | {"seeds": part["seeds"].max(), "s per question": part["seconds_per_question"].iloc[0]})
    return pd.DataFrame(rows)


def margins(summary: pd.DataFrame) -> pd.DataFrame:
    """The model minus its best control, in points, per test set and metric."""
    rows, controls = [], (*CONDITIONS[1:], BLIND)
    kept = summary[summary["metric"].isin(METRICS[:2])]
    for (name, metric), part in kept.groupby(["test", "metric"], sort=False):
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
    """The wall time of `train_seeds`, unknown where a seed was finished before, and what a recorded recipe changes."""
    if "seconds" not in facts or facts["seconds"].isna().any():
        return "training time unknown, as the training was not done, or not as a whole, in this run"
    recipe = f", by the profile's recipe with {facts['recipe'].iloc[0]}" if "recipe" in facts else ""
    return f"training took {facts['seconds'].mean():.0f} s a seed{recipe}"
