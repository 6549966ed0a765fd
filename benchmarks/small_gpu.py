"""VQA-RAD at `small`, many short trainings side by side on one GPU: `search` chooses a recipe, `final` scores it.

    python benchmarks/small_gpu.py search --language L --vision V --data-dir D --out O [--adapted A]
    python benchmarks/small_gpu.py final  --language L --vision V --data-dir D --out O [--adapted A]
    python benchmarks/small_gpu.py final  ... --recipe "two cores" --jobs 2 --few-controls --minutes 240   # without a GPU

search trains every recipe of RECIPES once, on the `validation` protocol (`medv.training.examples`), and takes the one with the
highest mean of closed accuracy and open set recall over all validation questions, a rule fixed before any of them ran; ties go
to the earlier one. It writes O/search.json. final trains that recipe on all training rows and on the image-disjoint ones, with
three seeds, beside the same network that sees gray images alone and beside LoRA, asks the official test questions once, and
writes O/final.json: a row a question, as `studies.vqa_study.vqa_study` gives it. Small steps leave a GPU idle between its
kernels, so several processes share it. What is finished in O is kept; weights are not. `--steps 2` is a dry run.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers.utils import logging

from medv.artifacts import write_json
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import load_model
from medv.checkpoints.loading import load_tokenizer
from medv.companion.audit.controls import blinded
from medv.companion.studies.training_stages import AFTER, BLIND, question_sets
from medv.companion.studies.trials import as_rows, run_trials
from medv.companion.studies.vqa_study import CONDITIONS, sampler_config, vqa_study
from medv.data.example import Example
from medv.evaluation.answering import Answerer
from medv.model.looks import Looks
from medv.profiles import StageRecipe, get_profile
from medv.training.examples import TrainingData, stage_examples
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage

SMALL = get_profile("small")
OWN = ("epochs", "batch_size", "normalization", "padding")  # what the third stage does not share with the second
RANKS, LORA_RATE = (8, 32), 1e-3
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """One training: what it changes of the profile's recipes. first: whether the stage `instruct` comes before it; images:
    "real" or "gray"; rank: of LoRA, 0 = full; forwards: of an answer; steps: of a dry run, 0 = all.
    """

    vqa: Mapping[str, Any] = field(default_factory=dict)
    adapted: bool = False
    pool: int = 2
    first: bool = True
    rank: int = 0
    protocol: str = "validation"
    images: str = "real"
    seed: int = 0
    forwards: int = SMALL.answer.steps
    steps: int = 0


TUNED = {"trains": ("projector", "language_layers", "vision_end"), "cached_vision": False, "feature_dropout": 0.0}
RECIPES = {
    "base": Trial(),
    "144 tokens, 40 epochs": Trial({"epochs": 40}, pool=1),
    "144 tokens": Trial(pool=1),
    "40 epochs": Trial({"epochs": 40}),
    "vision end tuned": Trial(TUNED),
    "no first stage": Trial(first=False),
    "rate 1e-4": Trial({"learning_rate": 1e-4}),
    "projector x 20": Trial({"projector_rate": 20.0}),
    "masked_sample": Trial({"normalization": "masked_sample"}),
    "no dropout": Trial({"feature_dropout": 0.0}),
    "rate 6e-4": Trial({"learning_rate": 6e-4}),
    "16 tokens": Trial(pool=3),
    "LoRA 32": Trial(rank=32),
    "10 epochs": Trial({"epochs": 10}),
}
# Set by hand and not searched for: what a core can do in an hour, from the causal tower as it is.
TWO_CORES = {"epochs": 2, "batch_size": 8, "learning_rate": 2e-4}
ON_CPU = {"two cores": Trial(TWO_CORES, pool=3, first=False, forwards=4)}
ADAPTED = {"adapted": Trial(adapted=True), "adapted, rate 1e-4": Trial({"learning_rate": 1e-4}, adapted=True)}


def final_trials(recipe: Trial, few_controls: bool = False) -> dict[str, Trial]:
    """The trainings of the chosen recipe, the most important first; `few_controls`: one seed of all but the recipe itself."""
    official, seeds = replace(recipe, protocol="official"), SEEDS[:1] if few_controls else SEEDS
    trials = {f"real-{seed}": replace(official, seed=seed) for seed in SEEDS}
    trials |= {f"disjoint-{seed}": replace(recipe, seed=seed, protocol="image_disjoint") for seed in seeds}
    for rank in (rank for rank in (0, *RANKS) if rank != recipe.rank):
        trials |= {f"rank{rank}-{seed}": replace(official, seed=seed, rank=rank) for seed in seeds}
    return trials | {f"gray-{seed}": replace(official, seed=seed, images="gray") for seed in seeds}


def recipe_of(stage: str, trial: Trial) -> StageRecipe:
    """The recipe of a stage of a trial; rates and what else is not the third stage's own hold for both."""
    changes = trial.vqa if stage == "vqa" else {k: v for k, v in trial.vqa.items() if k not in OWN}
    recipe = replace(SMALL.stages[stage], **changes)
    if stage == "vqa" and trial.rank:  # the projector keeps its rate
        projector = recipe.learning_rate * recipe.projector_rate
        recipe = replace(recipe, learning_rate=LORA_RATE, projector_rate=projector / LORA_RATE)
    return recipe


class Worker:
    """Runs trials in one process; images are encoded once for each number of visual tokens."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.split, self.looks, self.learned = cache(self._split), cache(self._looks), cache(self._learned)

    def _split(self, protocol: str):
        train, asked = question_sets(SMALL, "vqa_rad", self.arguments.data_dir, protocol)
        return train, {name: self._few(questions) for name, questions in asked.items()}

    def _learned(self, stage: str, protocol: str, gray: bool) -> list[Example]:
        """The training examples of a stage; the same objects each time, so that drawn images are encoded once, too."""
        if gray:
            return blinded(self.learned(stage, protocol, False))
        data = TrainingData("vqa_rad", Path(self.arguments.data_dir), protocol)
        return self._few(stage_examples(stage, SMALL, data)[0])

    def _few(self, examples: list[Example]) -> list[Example]:
        return examples[:: len(examples) // 6] if self.arguments.steps else examples

    def start(self, trial: Trial):
        """The network that a trial begins with."""
        language = self.arguments.adapted if trial.adapted else self.arguments.language
        model = assemble(language, self.arguments.vision, seed=trial.seed, image_pool=trial.pool, feature_norm="layer")
        return model, new_processor(load_tokenizer(language), model.config)

    def _looks(self, pool: int, learns: bool) -> Looks:
        """Of the images of all questions: pixels where the tower learns, else what it makes of them."""
        model, processor = self.start(Trial(pool=pool))
        looks = Looks(processor)
        if not learns:
            looks.once(model.model, blinded(self.split("official")[0][:1]))
        return looks

    def run(self, trial: Trial, scratch: Path) -> dict:
        """Train, then ask: the items of `vqa_study` with the name of the list in `test`, seconds and losses."""
        begun, gray = time.perf_counter(), trial.images == "gray"
        train, asked = self.split(trial.protocol)
        model, processor = self.start(trial)
        learns, times, losses = "vision_end" in trial.vqa.get("trains", ()), {}, {}
        looks = self.looks(trial.pool, learns)
        for stage in ("instruct", "vqa") if trial.first else ("vqa",):
            recipe, learned = recipe_of(stage, trial), self.learned(stage, trial.protocol, gray)
            since = time.perf_counter()
            if trial.steps:
                recipe = replace(recipe, batch_size=2, epochs=2 * trial.steps / len(learned))
            lora = LoraRecipe(rank=trial.rank, alpha=2 * trial.rank) if trial.rank and stage == "vqa" else None
            parts = 2 if trial.pool == 1 else 1  # or eight such trainings are more than 80 GB
            options = RunOptions(seed=trial.seed, lora=lora, accumulation=parts, checkpoints=False, quiet=True)
            train_stage(model, processor, recipe, learned, scratch / stage, options, looks=looks)
            times[stage] = time.perf_counter() - since
            history = json.loads((scratch / stage / "history.json").read_text(encoding="utf-8"))
            losses[stage] = [row["loss"] for row in history if "loss" in row]
            del model
            gc.collect()  # the Trainer's circles hold the optimizer
            torch.cuda.empty_cache()
            model, processor = load_model(scratch / stage)
        if torch.cuda.is_available():
            model.to("cuda")
        since = time.perf_counter()
        asked = {name: blinded(part) if gray else part for name, part in asked.items()}
        if not learns:
            looks.once(model.model, [example for part in asked.values() for example in part])
        items = self._ask(trial, Answerer(model, processor), train, asked, looks)
        times |= {"asking": time.perf_counter() - since, "all": time.perf_counter() - begun}
        return {"items": as_rows(items), "seconds": times, "losses": losses}

    def _ask(self, trial, answerer, train, asked, looks) -> pd.DataFrame:
        shown = ["model"] if trial.images == "gray" else ["model", "shuffled images"]
        if trial.protocol != "validation" and trial.images == "real":
            shown = list(CONDITIONS)
        if self.arguments.few_controls and (trial.rank or trial.protocol != "official"):
            spared = ("gray image", "shuffled images") if trial.rank else ("gray image",)
            shown = [name for name in shown if name not in spared]
        frames = []
        for name, questions in asked.items():
            config = sampler_config(replace(SMALL.answer, steps=trial.forwards), seed=trial.seed)
            how = {"seed": trial.seed, "conditions": shown, "looks": looks, "quiet": True}
            frames.append(vqa_study(answerer, train, questions, config, **how).assign(test=name))
        return pd.concat(frames, ignore_index=True)


def planned(arguments: argparse.Namespace) -> dict[str, Trial]:
    """The trials of a phase by name."""
    tried = (ADAPTED if arguments.adapted else {}) | RECIPES
    if arguments.recipe:
        tried = {name: (tried | ON_CPU)[name] for name in arguments.recipe}
    if arguments.phase == "search":
        trials = tried
    elif len(tried) == 1:
        trials = final_trials(*tried.values(), arguments.few_controls)
    else:
        best = json.loads((arguments.out / "search.json").read_text(encoding="utf-8"))["best"]
        trials = final_trials(tried[best], arguments.few_controls)
    return {name: replace(trial, steps=arguments.steps) for name, trial in trials.items()}


def work(arguments: argparse.Namespace) -> None:
    """One process: take trials that nobody has taken yet, until none is left."""
    logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(arguments.threads)
    worker, folder = Worker(arguments), arguments.out / arguments.phase
    for name, trial in planned(arguments).items():
        try:
            (folder / f"{name}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            run_trials(folder, {name: trial}, worker.run, quiet=True)
            print(f"{name}: done", flush=True)
        except (RuntimeError, ValueError, OSError):  # the other trials are worth having without it
            traceback.print_exc()
            shutil.rmtree(folder / f"{name}.work", ignore_errors=True)


def share_out(arguments: argparse.Namespace) -> None:
    """Start the processes, wait for them at most `--minutes`, and put together what is finished."""
    folder, begun = arguments.out / arguments.phase, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for taken in folder.glob("*.taken"):
        taken.unlink()
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    logs = [(folder / f"worker-{i}.log").open("w") for i in range(arguments.jobs)]
    running = [subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) for log in logs]
    for process in running:
        try:
            process.wait(timeout=max(1.0, 60 * arguments.minutes - (time.perf_counter() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found = {name: folder / f"{name}.json" for name in planned(arguments)}
    results = {n: json.loads(p.read_text(encoding="utf-8"))["result"] for n, p in found.items() if p.exists()}
    gather(arguments, results, time.perf_counter() - begun)
    if len(results) < len(found):
        missing = ", ".join(name for name in found if name not in results)
        raise SystemExit(f"{len(results)} of {len(found)} trials are finished, not {missing}: the logs are in {folder}")


def gather(arguments: argparse.Namespace, results: dict[str, dict], seconds: float) -> None:
    """Write the phase's file and print the scores."""
    trials = planned(arguments)
    rows, items = [], []
    for name, result in results.items():
        frame = pd.DataFrame(result["items"])
        shown = scores(frame, "model")
        wrong = scores(frame, "shuffled images") if "shuffled images" in set(frame["condition"]) else {}
        row = {"name": name, **shown, **{f"{key}, minus shuffled": shown[key] - wrong[key] for key in wrong}}
        rows.append(row | {"trial": asdict(trials[name]), "seconds": result["seconds"], "losses": result["losses"]})
        items += [row | {"trial": name} for row in result["items"]]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = {"device": card, "torch": torch.__version__, "seconds": seconds, "processes": arguments.jobs}
    if arguments.phase == "final":
        chosen, usual = asdict(next(iter(trials.values()))), asdict(Trial())
        own = {name: chosen[name] for name in ("adapted", "pool", "first", "rank", "forwards") if chosen[name] != usual[name]}
        facts["recipe"] = ", ".join(f"{name} {value}" for name, value in {**chosen["vqa"], **own}.items())
        items = [row | {"condition": called} for row in items if (called := named(row, trials[row["trial"]]))]
    if arguments.phase == "search":
        best = max(rows, key=lambda row: row["closed"] + row["open"])["name"] if rows else None
        rule = "the highest mean of closed accuracy and open set recall over all validation questions, one seed"
        facts |= {"best": best, "rule": rule, "tried": len(rows)}
        print(f"best: {best}")
    write_json(arguments.out / f"{arguments.phase}.json", facts | {"trials": rows, "items": items})
    columns = [name for name in (rows[0] if rows else ()) if name not in ("trial", "seconds", "losses")]
    table = pd.DataFrame(rows).assign(seconds=[row["seconds"]["all"] for row in rows])
    print(table[[*columns, "seconds"]].round(1).to_string(index=False))


def named(row: dict, trial: Trial) -> str | None:
    """The condition of an item as notebook 12 names it; None for a condition that it does not show."""
    if trial.images == "gray":
        return BLIND
    if not row["trial"].startswith("rank"):
        return {"model": AFTER}.get(row["condition"], row["condition"])
    arm = f"LoRA r = {trial.rank}" if trial.rank else "full fine-tuning"
    return {"model": arm, "shuffled images": f"{arm}, shuffled images"}.get(row["condition"])


def scores(frame: pd.DataFrame, condition: str) -> dict[str, float]:
    """Closed accuracy and open set recall of a condition, of all questions and of each list."""
    part, found = frame[frame["condition"] == condition], {}
    for name, rows in [("", part), *(part.groupby("test") if part["test"].nunique() > 1 else ())]:
        label = f", {name.rpartition(', ')[2]}" if name else ""
        found |= {f"closed{label}": rows["closed_accuracy"].mean(), f"open{label}": rows["open_set_recall"].mean()}
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=("search", "final"))
    parser.add_argument("--language", type=Path, required=True, help="folder of the language tower")
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision tower")
    parser.add_argument("--adapted", type=Path, help="folder of the language tower adapted to masked diffusion")
    parser.add_argument("--data-dir", type=Path, required=True, help="trainset.json, testset.json, images/")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--recipe", action="append", help="only these of all; final with one: it, not the best")
    parser.add_argument(
        "--few-controls", action="store_true", help="one seed, and fewer wrong images, of gray, disjoint and LoRA"
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes on the one GPU, or on the cores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--minutes", type=float, default=5.0, help="what is not finished then is left out")
    parser.add_argument("--steps", type=int, default=0, help="a dry run of so many steps a stage")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (work if arguments.worker else share_out)(arguments)


if __name__ == "__main__":
    main()
