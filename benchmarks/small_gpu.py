"""VQA-RAD at `small` on one GPU, many short trainings side by side: `search` chooses a recipe, `final` scores it.

    python benchmarks/small_gpu.py search --language L --vision V --data-dir D --out O [--adapted A]
    python benchmarks/small_gpu.py final  --language L --vision V --data-dir D --out O [--adapted A]

search trains every recipe of RECIPES once, on the `validation` protocol (`medv.training.examples`), and takes the one with the
highest mean of closed accuracy and open set recall over all validation questions, a rule fixed before any of them ran; ties go
to the earlier one. It writes O/search.json. final trains that recipe on all training rows and on the image-disjoint ones, with
three seeds, beside the same network that sees gray images alone and beside LoRA, asks the official test questions once, and
writes O/final.json: a row a question, as `medv.evaluation.study.vqa_study` gives it. Small steps leave a GPU idle between its
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
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from medv.artifacts import write_json
from medv.data.question_texts import caption_examples, dialogue_examples
from medv.evaluation.controls import blinded
from medv.evaluation.study import CONDITIONS, sampler_config, vqa_study
from medv.experiments.trials import as_rows, run_trials
from medv.model.assembly import assemble, new_processor
from medv.model.bundled import load_model
from medv.model.looks import Looks
from medv.profiles import SamplerSpec, StageRecipe
from medv.training.examples import in_lower_case, question_split
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage

ANSWER = SamplerSpec(gen_length=8, block_length=8, steps=8)
RANKS, LORA_RATE = (8, 32), 1e-3
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """One training. first: epochs of a stage before it, on captions and dialogues made of the same questions (0 = none);
    images: "real" or "gray"; rank: of LoRA, 0 = full; steps: stop the training early (a dry run), 0 = do not.
    """

    adapted: bool = False
    pool: int = 2
    epochs: float = 24
    batch_size: int = 64
    learning_rate: float = 3e-4
    projector_rate: float = 5.0
    normalization: str = "masked"
    feature_dropout: float = 0.1
    weight_decay: float = 0.05
    first: float = 3
    tune_vision: bool = False
    rank: int = 0
    protocol: str = "validation"
    images: str = "real"
    seed: int = 0
    steps: int = 0


BASE = Trial()
RECIPES = {
    "base": BASE,
    "no first stage": replace(BASE, first=0),
    "144 tokens": replace(BASE, pool=1),
    "40 epochs": replace(BASE, epochs=40),
    "rate 1e-4": replace(BASE, learning_rate=1e-4),
    "projector x 20": replace(BASE, projector_rate=20.0),
    "masked_sample": replace(BASE, normalization="masked_sample"),
    "no dropout": replace(BASE, feature_dropout=0.0),
    "10 epochs": replace(BASE, epochs=10),
    "vision end tuned": replace(BASE, tune_vision=True, feature_dropout=0.0),
    "16 tokens": replace(BASE, pool=3),
    "rate 6e-4": replace(BASE, learning_rate=6e-4),
    "LoRA 32": replace(BASE, rank=32),
    "batch of 16": replace(BASE, batch_size=16, learning_rate=1.5e-4),
}
ADAPTED = {
    "adapted": replace(BASE, adapted=True),
    "adapted, rate 1e-4": replace(BASE, adapted=True, learning_rate=1e-4),
}
FIRST_BATCH = 16  # captions and dialogues are long


def final_trials(recipe: Trial) -> dict[str, Trial]:
    """What is trained of the chosen recipe, the most wanted first."""
    trials = {}
    for seed in SEEDS:
        own = replace(recipe, seed=seed, protocol="official")
        trials |= {f"real-{seed}": own, f"gray-{seed}": replace(own, images="gray")}
    trials |= {f"disjoint-{seed}": replace(recipe, seed=seed, protocol="image_disjoint") for seed in SEEDS}
    others = [rank for rank in (0, *RANKS) if rank != recipe.rank]
    for rank in others:
        for seed in SEEDS:
            trials[f"rank{rank}-{seed}"] = replace(recipe, seed=seed, protocol="official", rank=rank)
    return trials


def recipes_of(trial: Trial) -> dict[str, StageRecipe]:
    """The recipes of both stages of a trial."""
    parts = ("projector", "language_layers", *(("vision_end",) if trial.tune_vision else ()))
    rate, projector = trial.learning_rate, trial.projector_rate
    vqa = StageRecipe(
        parts,
        samples=0,
        epochs=trial.epochs,
        batch_size=trial.batch_size,
        learning_rate=rate,
        projector_rate=projector,
        feature_dropout=trial.feature_dropout,
        lower_case=True,
        weight_decay=trial.weight_decay,
        max_length=1024,
        loss_tokens="response",
        padding=f"fixed:{ANSWER.gen_length}",
        normalization=trial.normalization,
        times="stratified",
        order="by_length",
        cached_vision=not trial.tune_vision,
    )
    first = replace(vqa, epochs=trial.first, batch_size=FIRST_BATCH, padding="none", normalization="masked")
    if trial.rank:  # the projector keeps its rate
        vqa = replace(vqa, learning_rate=LORA_RATE, projector_rate=rate * projector / LORA_RATE)
    return {"first": first, "vqa": vqa}


class Worker:
    """Runs trials in one process; images are looked at once for each number of visual tokens."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.split, self.looks = cache(self._split), cache(self._looks)

    def _split(self, protocol: str):
        train, asked = question_split("vqa_rad", self.arguments.data_dir, protocol)
        few = slice(24 if self.arguments.steps else None)
        return train[few], {name: questions[few] for name, questions in asked.items()}

    def start(self, trial: Trial):
        """The network that a trial begins with."""
        language = self.arguments.adapted if trial.adapted else self.arguments.language
        model = assemble(language, self.arguments.vision, seed=trial.seed, image_pool=trial.pool, feature_norm="layer")
        return model, new_processor(AutoTokenizer.from_pretrained(language), model.config)

    def _looks(self, pool: int, tune: bool) -> Looks:
        model, processor = self.start(Trial(pool=pool))
        looks = Looks(processor)
        if not tune:
            train, asked = self.split("official")
            pictures = [*train, *next(iter(asked.values())), *blinded(train[:1])]
            looks.once(model.model, pictures, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return looks

    def run(self, trial: Trial, scratch: Path) -> dict:
        """Train, then ask: the items of `vqa_study` with the name of the list in `test`, seconds and losses."""
        begun = time.perf_counter()
        train, asked = self.split(trial.protocol)
        looks, recipes = self.looks(trial.pool, trial.tune_vision), recipes_of(trial)
        texts = [*caption_examples(train), *dialogue_examples(in_lower_case(train), copies=3)] if trial.first else []
        examples = {"first": texts, "vqa": in_lower_case(train)}
        if trial.images == "gray":
            examples = {name: blinded(part) for name, part in examples.items()}
            asked = {name: blinded(part) for name, part in asked.items()}
        model, processor = self.start(trial)
        options = {"seed": trial.seed, "checkpoints": False, "looks": looks, "quiet": True}
        lora = LoraRecipe(rank=trial.rank, alpha=2 * trial.rank) if trial.rank else None
        times, losses = {}, {}
        for stage in (name for name in ("first", "vqa") if examples[name]):
            recipe, since = recipes[stage], time.perf_counter()
            if trial.steps:
                recipe = replace(recipe, batch_size=2, epochs=2 * trial.steps / len(examples[stage]))
            how = options | ({"lora": lora} if stage == "vqa" else {})
            train_stage(model, processor, recipe, examples[stage], scratch / stage, **how)
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
        items = self._ask(trial, (model, processor), train, asked, looks)
        times |= {"asking": time.perf_counter() - since, "all": time.perf_counter() - begun}
        return {"items": as_rows(items), "seconds": times, "losses": losses}

    def _ask(self, trial, network, train, asked, looks) -> pd.DataFrame:
        shown = ["model"] if trial.images == "gray" else ["model", "shuffled images"]
        if trial.protocol != "validation" and trial.images == "real" and not trial.rank:
            shown = list(CONDITIONS)
        frames = []
        for name, questions in asked.items():
            config = sampler_config(ANSWER, seed=trial.seed)
            how = {"seed": trial.seed, "conditions": shown, "looks": looks, "quiet": True}
            frames.append(vqa_study(*network, train, questions, config, **how).assign(test=name))
        return pd.concat(frames, ignore_index=True)


def planned(arguments: argparse.Namespace) -> dict[str, Trial]:
    """The trials of a phase by name."""
    tried = (ADAPTED if arguments.adapted else {}) | RECIPES
    if arguments.recipe:
        tried = {name: tried[name] for name in arguments.recipe}
    if arguments.phase == "search":
        trials = tried
    elif len(tried) == 1:
        trials = final_trials(*tried.values())
    else:
        best = json.loads((arguments.out / "search.json").read_text(encoding="utf-8"))["best"]
        trials = final_trials(tried[best])
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
    if arguments.phase == "search":
        best = max(rows, key=lambda row: row["closed"] + row["open"])["name"] if rows else None
        rule = "the highest mean of closed accuracy and open set recall over all validation questions, one seed"
        facts |= {"best": best, "rule": rule, "tried": len(rows)}
        print(f"best: {best}")
    write_json(arguments.out / f"{arguments.phase}.json", facts | {"trials": rows, "items": items})
    columns = [name for name in (rows[0] if rows else ()) if name not in ("trial", "seconds", "losses")]
    table = pd.DataFrame(rows).assign(seconds=[row["seconds"]["all"] for row in rows])
    print(table[[*columns, "seconds"]].round(1).to_string(index=False))


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
    parser.add_argument("--jobs", type=int, default=8, help="processes on the one GPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--minutes", type=float, default=5.0, help="what is not finished then is left out")
    parser.add_argument("--steps", type=int, default=0, help="a dry run of so many steps a stage")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (work if arguments.worker else share_out)(arguments)


if __name__ == "__main__":
    main()
