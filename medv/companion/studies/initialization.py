"""What the initial weights contribute (notebook 30, Table 4): four starts, then the same stage 2, and with stage 1 or without.

The paper's model starts from LLaDA, its variants V1 and V2 from LLaDA-V, without and with alignment. Here the bundled text
tower has the role of LLaDA and the bundled model of colored shapes that of LLaDA-V; random weights, which the paper has not,
show what any start is worth. All arms share the vision tower, the examples of a seed and the number of steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from medv import paper
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import bundled
from medv.checkpoints.loading import load_tokenizer
from medv.companion.figures.tables import compare
from medv.companion.studies.node import Node
from medv.companion.studies.trials import as_rows, difference_rows, judged, run_trials
from medv.companion.studies.vqa_study import sampler_config, summarize, vqa_study
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.evaluation.text import repetition
from medv.intervals import NOT_MEASURED, span
from medv.model.modeling import MedVForMaskedDiffusion
from medv.phantoms.facts import score_descriptions
from medv.phantoms.sets import description_set, vqa_set
from medv.profiles import Profile, SamplerSpec
from medv.training.examples import PHANTOM_SETS
from medv.training.launch import RunOptions
from medv.training.stages import towers as training_towers
from medv.training.stages import train_stages

NODES = (
    Node(
        "initialization",
        "30_initialization.ipynb",
        "What the initial weights contribute",
        makes=("trials/initialization",),
        results=("table4", "initialization"),
        heavy=True,
    ),
)

METRICS = {
    "findings_f1": "findings F1 (%)",
    "closed_accuracy": "closed accuracy (%)",
    "open_recall": "open recall (%)",
    "adjacent_duplicates": "adjacent duplicates (%)",
    "words": "words",
}
"""What is measured, by column: of descriptions (facts, repetition, length) and of questions (accuracy, recall)."""


@dataclass(frozen=True)
class Arm:
    """A start: `weights` is "text" (the LLaDA role), "general" (LLaDA-V) or "random"; `aligned`: with stage 1 first."""

    name: str
    weights: str
    aligned: bool
    about: str


ARMS = (
    Arm("LLaDA-MedV", "text", True, "text tower (LLaDA's role)"),
    Arm("LLaDA-MedV V1", "general", False, "general model (LLaDA-V's role)"),
    Arm("LLaDA-MedV V2", "general", True, "general model (LLaDA-V's role)"),
    Arm("random", "random", True, "random language tower"),
)
BASE = ARMS[0].name


@dataclass(frozen=True)
class InitPlan:
    """Optimizer steps of stages 1 and 2, and how much is asked afterwards. batch_size: of a step, 0 = the recipes'."""

    align_steps: int
    instruct_steps: int
    seeds: tuple[int, ...]
    descriptions: int
    questions: int
    describe: SamplerSpec
    answer: SamplerSpec
    batch_size: int = 0


PLANS = {
    "tiny": InitPlan(40, 90, (0, 1, 2), 32, 160, SamplerSpec(72, 24, 36), SamplerSpec(16, 16, 8), batch_size=8),
    "smoke": InitPlan(1, 1, (0, 1), 2, 8, SamplerSpec(16, 8, 4), SamplerSpec(8, 8, 4)),
    "small": InitPlan(100, 400, (0, 1, 2), 32, 200, SamplerSpec(96, 32, 48), SamplerSpec(16, 16, 8), batch_size=16),
}
"""Budgets by profile. In `tiny` far below a full stage 2, so that twelve trainings fit into minutes."""


@dataclass(frozen=True)
class InitTrial:
    """One arm, one seed."""

    arm: Arm
    seed: int
    plan: InitPlan


def parts_of(
    profile: Profile,
    language: str | Path | None = None,
    vision: str | Path | None = None,
    general: str | Path | None = None,
    *,
    towers: Path | None = None,
) -> dict[str, Path]:
    """The folders of the initial weights: the bundled ones where none is given, or the towers fetched to `towers`.

    No general model comes with fetched towers; without one there is no "general" here. Raises ValueError for a profile whose
    data have no known findings, FileNotFoundError where towers were never fetched.
    """
    if not profile.synthetic:
        raise ValueError(
            f"profile {profile.name} trains on real images, whose findings nobody listed: this comparison needs the phantoms; "
            "use tiny or small"
        )
    given = {"language": language, "vision": vision, "general": general}
    given = {name: Path(folder) for name, folder in given.items() if folder}
    if profile.towers == "bundled":
        names = {"language": "language_tower", "vision": "vision_tower", "general": "general_model"}
        return {name: bundled(folder) for name, folder in names.items()} | given
    if {"language", "vision"} <= set(given):
        return given
    return dict(zip(("language", "vision"), training_towers(profile, towers), strict=True)) | given


def arms_of(parts: Mapping[str, Path]) -> tuple[Arm, ...]:
    """The arms whose initial weights there are."""
    return tuple(arm for arm in ARMS if arm.weights != "general" or "general" in parts)


def plan_of(profile: Profile) -> InitPlan:
    """The plan of a profile, with no more seeds than the profile has on this machine."""
    plan = PLANS[profile.name]
    plan = replace(plan, describe=plan.describe.like(profile.describe), answer=plan.answer.like(profile.answer))
    return plan if profile.towers == "bundled" else replace(plan, seeds=profile.seeds)


def gaps(arms: Sequence[Arm]) -> list[str]:
    """What is missing, in words."""
    left = [arm.name for arm in ARMS if arm not in arms]
    return [f"no general vision-language model of this size: without {' and '.join(left)}"] if left else []


def initial(arm: Arm, parts: Mapping[str, Path], profile: Profile, *, seed: int) -> Answerer:
    """The model where an arm begins. New weights (projector, random tower) depend on `seed` alone."""
    if arm.weights == "general":
        return Answerer.load(parts["general"])
    model = assemble(parts["language"], parts["vision"], seed=seed, **profile.model.sight)
    if arm.weights == "random":
        tower = model.model.vision_tower.state_dict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MedVForMaskedDiffusion(model.config)
        model.model.vision_tower.load_state_dict(tower)
    tokenizer = load_tokenizer(parts["language"])
    return Answerer(model, new_processor(tokenizer, model.config, system=profile.system))


def tune(start: Answerer, arm: Arm, plan: InitPlan, profile: Profile, folder: Path, *, seed: int) -> Answerer:
    """Stage 1 (where the arm has it) and stage 2 by the profile's recipes, for the plan's steps, on the seed's examples."""
    steps = {"align": plan.align_steps, "instruct": plan.instruct_steps} if arm.aligned else {"instruct": plan.instruct_steps}
    stages = {}
    for stage, count in steps.items():
        recipe = profile.stages[stage]
        batch = plan.batch_size or recipe.batch_size
        size = count * batch
        examples = PHANTOM_SETS[stage]("train", size, seed=seed, image_size=profile.model.image_size)
        stages[stage] = (replace(recipe, samples=size, epochs=1, batch_size=batch), examples, ())
    options = RunOptions(seed=seed, checkpoints=False, quiet=True)
    return Answerer(train_stages(start.model, start.processor, stages, folder, options), start.processor)


def examine(answerer: Answerer, plan: InitPlan, profile: Profile, *, seed: int) -> pd.DataFrame:
    """What a model says: one row per description and question, with `text`, `id` and those of METRICS that it has.

    Repetition is counted over words.
    """
    size = profile.model.image_size
    asked = description_set("test", plan.descriptions, image_size=size)
    how = {"batch_size": plan.describe.batch_size, "quiet": True}
    answers = answerer.answer(asked, sampler_config(plan.describe, seed=seed), **how)
    texts = [answer.text for answer in answers]
    items = score_descriptions(texts, [example.meta["scene"] for example in asked], resamples=1).items
    rows = []
    for example, text, item in zip(asked, texts, items, strict=True):
        words = text.split()
        repeated = 100 * repetition(words)["adjacent_duplicates"]
        row = {"id": example.id, "text": text, "findings_f1": 100 * item.f1}
        rows.append(row | {"adjacent_duplicates": repeated, "words": len(words)})
    test = vqa_set("test", plan.questions, image_size=size)
    how["batch_size"] = plan.answer.batch_size
    vqa = vqa_study(answerer, test, test, sampler_config(plan.answer, seed=seed), conditions=["model"], **how)
    vqa = vqa.rename(columns={"answer": "text"})[["id", "text", "closed_accuracy", "open_recall"]]
    return pd.concat([pd.DataFrame(rows), vqa], ignore_index=True)


def compare_starts(
    profile: Profile, plan: InitPlan, folder: Path, parts: Mapping[str, Path], *, quiet: bool = False
) -> pd.DataFrame:
    """Tune and examine every arm with every seed: the rows of `examine` with condition (the arm), seed. Results are kept."""

    def work(trial: InitTrial, scratch: Path) -> dict[str, Any]:
        start = initial(trial.arm, parts, profile, seed=trial.seed)
        tuned = tune(start, trial.arm, trial.plan, profile, scratch, seed=trial.seed)
        return {"items": as_rows(examine(tuned, trial.plan, profile, seed=trial.seed))}

    trials = {
        f"{arm.name.replace(' ', '_')}-seed{seed}": InitTrial(arm, seed, plan) for seed in plan.seeds for arm in arms_of(parts)
    }
    results = run_trials(folder, trials, work, quiet=quiet)
    frames = [
        pd.DataFrame(results[name]["items"]).assign(condition=trial.arm.name, seed=trial.seed) for name, trial in trials.items()
    ]
    return pd.concat(frames, ignore_index=True).astype(dict.fromkeys(METRICS, float))


def summary_of(items: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval of each arm and metric over seeds and texts, as `studies.vqa_study.summarize` gives them."""
    return summarize(items, metrics=list(METRICS))


def table4(summary: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the paper's, in columns of their own. The paper's score is a judge's, ours counts findings: other things."""
    rows = []
    for arm in _among(summary):
        part = summary[summary["condition"] == arm.name].set_index("metric").reindex(list(METRICS))
        cells = {title: span(*part.loc[name, ["value", "low", "high"]]) for name, title in METRICS.items()}
        about = {"model": arm.name, "start": arm.about, "aligned": arm.aligned}
        rows.append(about | cells | {"seeds": int(part["seeds"].max())})
    published = paper.table("table4").drop(columns="stage3")
    published = published.rename(columns={"initial_weights": "start", "overall_score": "judge's overall score"})
    return compare(pd.DataFrame(rows), published, on="model")


def differences(items: pd.DataFrame) -> pd.DataFrame:
    """Each arm minus the first, paired by seed and text: arm, metric, value, low, high, n, seeds, verdict."""
    frames = []
    for arm in _among(items)[1:]:
        rows = difference_rows(items, arm.name, BASE, list(METRICS))
        frames.append(judged(rows, list(METRICS)).assign(arm=arm.name))
    table = pd.concat(frames, ignore_index=True)
    return table[["arm", "metric", "value", "low", "high", "n", "seeds", "verdict"]]


def conclusion(table: pd.DataFrame) -> str:
    """Which of the paper's two effects appear, computed from `differences`: V1 and V2 score lower, and repeat more."""
    lines = []
    effects = {"findings_f1": ("lower", "scores lower"), "adjacent_duplicates": ("higher", "repeats more")}
    for metric, (wanted, words) in effects.items():
        for arm in (arm.name for arm in ARMS[1:3] if arm.name in set(table["arm"])):
            row = table[(table["arm"] == arm) & (table["metric"] == metric)].iloc[0]
            said = {wanted: "appears", NOT_MEASURED: NOT_MEASURED}
            said = said.get(row["verdict"], f"does not appear ({row['verdict']})")
            points = span(row["value"], row["low"], row["high"], form="+.1f")
            lines.append(f"{arm} {words} than {BASE}, as in the paper: {said}; difference in points {points}")
    return "\n".join(lines) or "neither V1 nor V2 is among the arms: the paper's two effects are not measured"


def _among(rows: pd.DataFrame) -> list[Arm]:
    """The arms that these rows are about."""
    return [arm for arm in ARMS if arm.name in set(rows["condition"])]


def sample_of(items: pd.DataFrame, examples: Sequence[Example], count: int = 2) -> str:
    """The first descriptions of the first seed, arm under arm, with the truth, to read."""
    first = items[(items["seed"] == items["seed"].min())]
    said = []
    for example in examples[:count]:
        facts = ", ".join(value for _, value in sorted(example.meta["scene"].facts()))
        said.append(f"truth: {facts}")
        for arm in _among(items):
            text = first[(first["condition"] == arm.name) & (first["id"] == example.id)]["text"].iloc[0]
            said.append(f"  {arm.name:14} {text or '(nothing)'}")
    return "\n".join(said)


def bars(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of `summary_of` in percent, as `medv.companion.figures.plots.accuracy_bars` wants them."""
    rows = summary[summary["metric"].isin([name for name in METRICS if name != "words"])]
    rows = rows.sort_values("metric", kind="stable", key=lambda column: column.map(list(METRICS).index))
    titles = rows["metric"].map(METRICS).str.replace(" (%)", "", regex=False)
    rows = rows.assign(metric=titles).rename(columns={"condition": "system"})
    order = [arm.name for arm in ARMS]
    return rows.assign(place=rows["system"].map(order.index)).sort_values("place", kind="stable").drop(columns="place")
