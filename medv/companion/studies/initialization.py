"""The contribution of the initial weights (notebook 30, Table 4): four starts, the same stage 2, with or without stage 1.

The paper's model starts from LLaDA, its variants V1 and V2 from LLaDA-V, without and with alignment. Here the bundled text
tower has the role of LLaDA and the bundled model of colored shapes that of LLaDA-V; random weights are our own baseline. All
arms share the vision tower, the examples of a seed and the number of steps. At the released size there are the paper's three
arms, by the full recipe, and the first is the model of stage 2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from medv import paper
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import bundled
from medv.checkpoints.loading import load_tokenizer
from medv.companion.figures.tables import compare
from medv.companion.studies.conversation import answer_all, questions
from medv.companion.studies.machine import Machine
from medv.companion.studies.node import Node
from medv.companion.studies.requests import Judge, about
from medv.companion.studies.summaries import differences as paired
from medv.companion.studies.trials import as_rows, run_trials
from medv.companion.studies.vqa_study import sampler_config, vqa_study
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.evaluation.text import repetition
from medv.intervals import NOT_MEASURED, Estimate
from medv.model.modeling import MedVForMaskedDiffusion
from medv.phantoms.facts import score_description
from medv.phantoms.sets import description_set, vqa_set
from medv.profiles import InitPlan, Profile
from medv.training.examples import PHANTOM_SETS, TrainingData
from medv.training.launch import RunOptions
from medv.training.stages import towers as training_towers
from medv.training.stages import train_stages

NODE = Node(
    "initialization",
    "30_initialization.ipynb",
    "What the initial weights contribute",
    makes=("trials/initialization",),
    results=("table4", "initialization", "effects_initialization"),
    reads=("general", "align", "instruct", "qa50"),
    may_read=("language", "vision", "judge"),
    needs_given=("models/stage2",),
    heavy=True,
)

METRICS = {
    "findings_f1": "findings F1 (%)",
    "closed_accuracy": "closed accuracy (%)",
    "open_recall": "open recall (%)",
    "adjacent_duplicates": "adjacent duplicates (%)",
    "words": "words",
}
"""What is measured, by column: of descriptions (facts, repetition, length) and of questions (accuracy, recall)."""
JUDGED = {"judged": "judge's score (%)", "adjacent_duplicates": "adjacent duplicates (%)", "words": "words"}
"""The same of answers to the real benchmark."""


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

    No general model comes with fetched towers; without one there is no "general" here. Raises FileNotFoundError where towers
    were never fetched.
    """
    given = {"language": language, "vision": vision, "general": general}
    given = {name: Path(folder) for name, folder in given.items() if folder}
    if profile.towers == "bundled":
        names = {"language": "language_tower", "vision": "vision_tower", "general": "general_model"}
        return {name: bundled(folder) for name, folder in names.items()} | given
    if {"language", "vision"} <= set(given) or profile.towers == "given":
        return given
    return dict(zip(("language", "vision"), training_towers(profile, towers), strict=True)) | given


def arms_of(parts: Mapping[str, Path], profile: Profile) -> tuple[Arm, ...]:
    """The arms whose initial weights there are; at the released size those of the paper."""
    known = ARMS[:3] if profile.towers == "given" else ARMS
    return tuple(arm for arm in known if arm.weights != "general" or "general" in parts)


def starts(arms: Sequence[Arm], parts: Mapping[str, Path], profile: Profile, *, seed: int) -> pd.DataFrame:
    """A row per arm: arm, start, stage 1, and the parameters of the language tower, except at the released size."""
    rows = []
    for arm in arms:
        row = {"arm": arm.name, "start": arm.about, "stage 1": arm.aligned}
        if profile.towers != "given":
            tower = initial(arm, parts, profile, seed=seed).model.model.language_model
            row["language tower (parameters)"] = sum(weight.numel() for weight in tower.parameters())
        rows.append(row)
    return pd.DataFrame(rows)


def judged_starts(
    profile: Profile,
    folder: Path,
    parts: Mapping[str, Path],
    base: Path,
    data: Mapping[str, TrainingData],
    *,
    judge: Judge | None,
    machine: Machine,
) -> pd.DataFrame:
    """`compare_starts` at the released size, on the real benchmark. base: the model of stage 2, which is the first arm."""
    asked, seed = questions(profile, data["qa50"]), profile.seeds[0]

    def work(trial: InitTrial, scratch: Path) -> pd.DataFrame:
        model = base if trial.arm.name == BASE else parts["general"]
        for stage in () if trial.arm.name == BASE else ("align", "instruct") if trial.arm.aligned else ("instruct",):
            machine.train(stage, profile, scratch / stage, seed=seed, init=model, data=data[stage])
            model = scratch / stage
        items = answer_all(profile, {trial.arm.name: (model, False)}, asked, scratch / "answers", judge=judge)
        items["adjacent_duplicates"] = [100 * repetition(text.split())["adjacent_duplicates"] for text in items["text"]]
        return items.rename(columns={"score": "judged"})[["id", "text", *JUDGED]]

    trials = {arm.name.replace(" ", "_"): InitTrial(arm, seed, profile.initialization) for arm in arms_of(parts, profile)}
    return _tried(folder, trials, work).astype(dict.fromkeys(JUDGED, float))


def _tried(folder: Path, trials: Mapping[str, InitTrial], work: Callable[[InitTrial, Path], pd.DataFrame]) -> pd.DataFrame:
    """`run_trials` of work that returns items: the items of all trials with condition (the arm) and seed."""
    results = run_trials(folder, trials, lambda trial, scratch: {"items": as_rows(work(trial, scratch))})
    frames = [pd.DataFrame(results[k]["items"]).assign(condition=t.arm.name, seed=t.seed) for k, t in trials.items()]
    return pd.concat(frames, ignore_index=True)


def metrics_of(frame: pd.DataFrame) -> dict[str, str]:
    """The metrics of items (columns) or of `differences` (in the column `metric`), with their titles."""
    return JUDGED if "judged" in set(frame.get("metric", frame.columns)) else METRICS


def gaps(arms: Sequence[Arm]) -> list[str]:
    """The arms that are left out, as gaps of the result."""
    left = [arm.name for arm in ARMS if arm not in arms and arm.weights == "general"]
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
        batch = plan.batch_size or profile.stages[stage].batch_size
        examples = PHANTOM_SETS[stage]("train", count * batch, seed=seed, image_size=profile.model.image_size)
        recipe = replace(profile.stages[stage], samples=len(examples), epochs=1, batch_size=batch)
        stages[stage] = (recipe, examples, ())
    options = RunOptions(seed=seed, checkpoints=False, quiet=True)
    return Answerer(train_stages(start.model, start.processor, stages, folder, options), start.processor)


def examine(answerer: Answerer, plan: InitPlan, profile: Profile, *, seed: int) -> pd.DataFrame:
    """One row per description and question: id, text and those of METRICS that apply; repetition is counted over words."""
    size = profile.model.image_size
    asked = description_set("test", plan.descriptions, image_size=size)
    how = {"batch_size": plan.describe.batch_size, "quiet": True}
    texts = [answer.text for answer in answerer.answer(asked, sampler_config(plan.describe, seed=seed), **how)]
    rows = []
    for example, text in zip(asked, texts, strict=True):
        repeated = 100 * repetition(text.split())["adjacent_duplicates"]
        row = {"id": example.id, "text": text, "findings_f1": 100 * score_description(text, example.meta["scene"]).f1}
        rows.append(row | {"adjacent_duplicates": repeated, "words": len(text.split())})
    test = vqa_set("test", plan.questions, image_size=size)
    how["batch_size"] = plan.answer.batch_size
    vqa = vqa_study(answerer, test, test, sampler_config(plan.answer, seed=seed), conditions=["model"], **how)
    vqa = vqa.rename(columns={"answer": "text"})[["id", "text", "closed_accuracy", "open_recall"]]
    return pd.concat([pd.DataFrame(rows), vqa], ignore_index=True)


def compare_starts(profile: Profile, plan: InitPlan, folder: Path, parts: Mapping[str, Path]) -> pd.DataFrame:
    """Tune and examine every arm with every seed: the rows of `examine` with condition (the arm), seed. Results are kept."""

    def work(trial: InitTrial, scratch: Path) -> pd.DataFrame:
        start = initial(trial.arm, parts, profile, seed=trial.seed)
        tuned = tune(start, trial.arm, trial.plan, profile, scratch, seed=trial.seed)
        return examine(tuned, trial.plan, profile, seed=trial.seed)

    trials = {
        f"{arm.name.replace(' ', '_')}-seed{seed}": InitTrial(arm, seed, plan)
        for seed in plan.seeds
        for arm in arms_of(parts, profile)
    }
    return _tried(folder, trials, work).astype(dict.fromkeys(METRICS, float))


def table4(summary: pd.DataFrame, metrics: Mapping[str, str] = METRICS) -> pd.DataFrame:
    """Table 4, ours and the paper's in columns of their own: the paper's score is a judge's, ours counts findings."""
    rows = []
    for arm in _among(summary):
        part = summary[summary["condition"] == arm.name].set_index("metric").reindex(list(metrics))
        cells = {title: Estimate.of(part.loc[name]).cell() for name, title in metrics.items()}
        about = {"model": arm.name, "start": arm.about, "aligned": arm.aligned}
        rows.append(about | cells | {"seeds": int(part["seeds"].max())})
    published = paper.table("table4").drop(columns="stage3")
    published = published.rename(columns={"initial_weights": "start", "overall_score": "judge's overall score"})
    return compare(pd.DataFrame(rows), published, on="model")


def differences(items: pd.DataFrame) -> pd.DataFrame:
    """Each arm minus the first, paired by seed and text: arm, metric, value, low, high, n, seeds, verdict."""
    frames = [paired(items, arm.name, BASE, list(metrics_of(items))).assign(arm=arm.name) for arm in _among(items)[1:]]
    table = pd.concat(frames, ignore_index=True)
    return table[["arm", "metric", "value", "low", "high", "n", "seeds", "verdict"]]


def conclusion(table: pd.DataFrame) -> str:
    """Whether the paper's two effects appear in `differences`: V1 and V2 score lower, and repeat more."""
    lines = []
    effects = {next(iter(metrics_of(table))): ("lower", "scores lower"), "adjacent_duplicates": ("higher", "repeats more")}
    for metric, (wanted, words) in effects.items():
        for arm in (arm.name for arm in ARMS[1:3] if arm.name in set(table["arm"])):
            row = table[(table["arm"] == arm) & (table["metric"] == metric)].iloc[0]
            said = {wanted: "appears", NOT_MEASURED: NOT_MEASURED}
            said = said.get(row["verdict"], f"does not appear ({row['verdict']})")
            points = Estimate.of(row).cell("+.1f")
            lines.append(f"{arm} {words} than {BASE}, as in the paper: {said}; difference in points {points}")
    return "\n".join(lines) or "neither V1 nor V2 is among the arms: the paper's two effects are not measured"


def _among(rows: pd.DataFrame) -> list[Arm]:
    """The arms that these rows are about."""
    return [arm for arm in ARMS if arm.name in set(rows["condition"])]


def sample_of(items: pd.DataFrame, examples: Sequence[Example], count: int = 2) -> str:
    """The first descriptions of the first seed by every arm, with the true facts (of a real image the domain), to read."""
    texts = items[items["seed"] == items["seed"].min()].set_index(["condition", "id"])["text"]
    lines = []
    for example in examples[:count]:
        name = example.id if "scene" in example.meta else f"{example.id}/{example.meta['type']}"
        lines.append(f"truth: {about(example)}")
        lines += [f"  {arm.name:14} {texts[arm.name, name] or '(nothing)'}" for arm in _among(items)]
    return "\n".join(lines)


def bars(summary: pd.DataFrame) -> pd.DataFrame:
    """The metrics in percent, in the columns of `medv.companion.figures.plots.accuracy_bars`."""
    order = [*(arm.name for arm in ARMS), *METRICS, *JUDGED]
    rows = summary[summary["metric"] != "words"]
    rows = rows.sort_values(["condition", "metric"], key=lambda column: column.map(order.index))
    titles = rows["metric"].map(METRICS | JUDGED).str.replace(" (%)", "", regex=False)
    return rows.assign(metric=titles).rename(columns={"condition": "system"})
