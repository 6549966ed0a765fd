"""The command line. Each command is a thin call into the library; heavy imports happen inside the commands.

Bad input ends with one sentence on standard error and exit code 2; nothing half-written stays.
"""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from medv.commands.bench import bench_app
from medv.commands.compare import compare_loss
from medv.commands.console import (
    console,
    errors,
    escape_unencodable,
    filled_text,
    flush_output,
    print_json,
    print_mapping,
    report_errors,
    say,
)
from medv.commands.evaluate import evaluate_app, judge
from medv.commands.options import (
    Accumulation,
    AsJson,
    BatchSize,
    Device,
    ImageRoots,
    Lora,
    ProfileName,
    RunFolder,
    Sampling,
    SamplingCommand,
    Seed,
    SkipCorrupt,
    check_used,
    expand_options,
)
from medv.commands.publish import publish
from medv.commands.towers import adapt, assemble, towers
from medv.profiles import get_profile
from medv.reading import visible

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="A research companion for LLaDA-MedV.")
train_app = typer.Typer(no_args_is_help=True, help="Train a stage of the paper's recipe, or the towers before it.")
data_app = typer.Typer(no_args_is_help=True, help="Validate data sets.")
config_app = typer.Typer(no_args_is_help=True, help="Validate configuration files.")
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")


@app.command()
@report_errors
def reproduce(
    profile: ProfileName = "tiny",
    only: Annotated[list[str] | None, typer.Option("--only", help="A notebook, figure or table, or all; repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole pipeline, all stages included.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/<profile>, with -seed<seed> where the seed is not 0.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again even what is up to date.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks that run in parallel.")] = 2,
    publish: Annotated[bool, typer.Option("--publish", help="Copy the results to figures/<profile>/.")] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration file of weights, data and judge (paper.toml).")] = None,
    on: Annotated[str | None, typer.Option(help="Run each notebook as a job: slurm, or local (processes here).")] = None,
    slurm: Annotated[
        list[str] | None, typer.Option("--slurm", help="Option of sbatch, KEY=VALUE, as partition=gpu; repeatable.")
    ] = None,
) -> None:
    """Run the notebooks: figures, tables and index.html; cached and resumable."""
    from medv.companion.reproduction.reproduce import reproduce as run

    options = {"dry_run": dry_run, "force": force, "jobs": jobs, "publish": publish, "config": config, "console": console}
    options |= {"on": on, "slurm": tuple(slurm or ()), "seed": seed}
    raise typer.Exit(run(profile, only=tuple(only or ()), out=out, **options))


@app.command()
@report_errors
def replicate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, each with a seed of its own.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write the table, its figure and the runs' effects into this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs of `medv reproduce --seed`: which effects come again, with their mean over runs and corrected p-values."""
    from medv.companion.reproduction.replication import listing, replicate, write_replication

    table = replicate(runs)[0] if out is None else write_replication(runs, out)[0]
    print_json(json.loads(table.to_json(orient="records"))) if as_json else console.print(listing(table))


@app.command(cls=SamplingCommand)
@expand_options
@report_errors
def ask(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or DICOM.")],
    question: Annotated[
        str | None, typer.Argument(help="A question about the image; with --template it may be left out.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A folder of a model or of LoRA adapters; default: the bundled tiny model.")
    ] = None,
    *,
    sampling: Sampling,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="Record how the answer is unmasked: FILE.html (animated page), FILE.json, or - to watch it in this "
            "terminal (not with --json or into a pipe); repeatable."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='A sentence to complete: "There is a ____ in the ____ lung."; two or more _ are a blank.')
    ] = None,
    blank_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a blank: 1 to this number are tried, the surest is kept; default: 3.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about one image, or fill the blanks of a sentence about it."""
    from medv.companion.figures.traces import TerminalView, trace_targets, word_of, write_trace
    from medv.data.images import open_image
    from medv.evaluation.templates import DESCRIBE

    filling = sampling.filling(template, blank_tokens)
    config = sampling.config(one_block=bool(filling))
    watched, files = trace_targets(trace or ())
    if filling and question is None:
        question = DESCRIBE
    if filling and watched:
        raise ValueError("the blanks are filled in several ways, which no terminal shows: give --trace a file")
    if question is None:
        raise ValueError('there is no question: give one, or a sentence to complete (--template "There is a ____ here.")')
    question.encode()  # half of a character, as a shell of another encoding gives it, is refused here
    picture = open_image(image)
    from transformers.utils import logging

    from medv.checkpoints.bundled import untrained_projector

    logging.disable_progress_bar()  # loading takes a fraction of a second
    answerer = sampling.answerer(model)
    word = word_of(answerer.processor.tokenizer)
    watched = watched and not as_json and console.is_terminal
    with TerminalView(console, config.gen_length, word) if watched else nullcontext() as on_step:
        answer, recorded = answerer.ask(picture, question, config, on_step=on_step, **filling)
    for file in files:
        write_trace(file, recorded, word, question=question, answer=answer.text, picture=picture)
    if as_json:
        print_json(answer.to_dict())
        return
    console.print(filled_text(answer.parts) if filling else answer.text or "(an empty answer)")
    if model is not None and untrained_projector(model):
        say("the projector of this model is untrained, so the image says nothing yet: train it with `medv train align`")
    if model is None:
        note = "a bundled model of about 1.3 million parameters, trained on drawings: never for clinical use"
        errors.print(f"{answer.forwards} forwards, {answer.seconds:.2f} s; {note}", style="dim", soft_wrap=True)


@train_app.command()
@report_errors
def pretrain(out: RunFolder, profile: ProfileName = "tiny", seed: Seed = 0) -> None:
    """Train the bundled towers again."""
    from medv.companion.towers.pretrain import pretrain as train_parts

    train_parts(get_profile(profile), out, seed=seed)


@report_errors
def train(
    context: typer.Context,
    out: RunFolder,
    profile: ProfileName = "tiny",
    data: Annotated[
        str, typer.Option(help="phantoms, vqa_rad, slake, pathvqa, llava_med_align, llava_med_instruct.")
    ] = "phantoms",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of a real data set.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Training questions: official, image_disjoint (no test image) or validation.")
    ] = "official",
    init: Annotated[Path | None, typer.Option(help="Model folder to start from; default: the profile's towers.")] = None,
    lora: Lora = False,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank; default: 16.")] = None,
    seed: Seed = 0,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Epochs; default: the recipe's.")] = None,
    accumulation: Accumulation = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations twice to save memory.")] = False,
    deepspeed: Annotated[str | None, typer.Option(help="DeepSpeed: zero2 or zero3.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes that prepare images, for each training process.")] = 0,
    device: Device = None,
    skip_corrupt: SkipCorrupt = False,
    image_root: ImageRoots = None,
    as_json: AsJson = False,
) -> None:
    """Train one stage of the paper's recipe."""
    chosen, stage = get_profile(profile), context.info_name
    from medv.model.devices import rank as process_rank
    from medv.training.examples import TrainingData
    from medv.training.launch import RunOptions
    from medv.training.lora import LoraRecipe
    from medv.training.stages import run_stage

    check_used(lora, "without --lora", rank=rank)
    changes = ({} if epochs is None else {"epochs": epochs}) | ({"checkpointing": True} if checkpointing else {})
    chosen = chosen.with_recipe(stage, **changes)
    options = RunOptions(
        seed=seed,
        lora=LoraRecipe(rank=rank or 16, alpha=2 * (rank or 16)) if lora else None,
        accumulation=accumulation,
        deepspeed=deepspeed,
        device=device,
        skip_corrupt=skip_corrupt,
        workers=workers,
    )
    check_used(data != "phantoms", "on phantoms", image_root=image_root or None)
    source = TrainingData(data, data_dir, protocol, tuple(image_root or ()))
    with redirect_stdout(sys.stderr):  # the Trainer's log; standard output has the result alone
        facts = run_stage(stage, chosen, out, options, data=source, init=init)
    if process_rank():
        return
    if "seconds" not in facts:
        say(f"{out} was finished already: nothing is trained again")
    print_mapping(f"{stage}: saved to {out}", facts, as_json)


for _stage, _about in (
    ("align", "Stage 1: train the projector on captions."),
    ("instruct", "Stage 2: train projector and language tower on dialogues."),
    ("vqa", "Stage 3: train projector and language tower on questions with short answers."),
):
    train_app.command(_stage, help=f"{_about} Also under torchrun and the deepspeed launcher (python -m medv).")(train)
train_app.command("adapt")(adapt)


@app.command(cls=SamplingCommand)
@expand_options
@report_errors
def generate(
    questions: Annotated[Path, typer.Option(help="JSON lines with question_id, image and text; or as --data says.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[Path, typer.Option(help="Answers as JSON lines; existing answers are kept.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a model or of LoRA adapters.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Instead of --model: an image-text-to-text checkpoint of transformers; greedy, of L alone."),
    ] = None,
    *,
    sampling: Sampling,
    batch_size: BatchSize = 16,
    data: Annotated[str | None, typer.Option(help="Read --questions as this data set: vqa_rad, slake, pathvqa, qa50.")] = None,
    skip_corrupt: SkipCorrupt = False,
    image_root: ImageRoots = None,
) -> None:
    """Answer the questions of a benchmark; resumable, and distributed under torchrun."""
    from medv.data.images import ImageFolder
    from medv.evaluation.baselines import CheckpointAnswerer, availability
    from medv.evaluation.benchmark import answer_file, examine, read_questions, write_skipped
    from medv.model.devices import device_named, rank

    if (model is None) == (checkpoint is None):
        raise ValueError("give either --model or --checkpoint, one of the two")
    check_used(checkpoint is None, "beside --checkpoint", **sampling.changed("profile", "gen_length", "device"))
    config = sampling.config(one_block=checkpoint is not None)
    device_named(sampling.device)  # a device that is not here is reported before questions are read
    if checkpoint is not None and (found := availability(checkpoint)) != "on this machine":
        mend = f"fetch it first, for example with `hf download {checkpoint}`"
        raise ValueError(f"{checkpoint}: {found}; {'--model takes ours' if Path(checkpoint).is_dir() else mend}")
    wanted = read_questions(questions, ImageFolder(images, tuple(image_root or ())), data=data)
    answerer = sampling.answerer(model) if model else CheckpointAnswerer.load(checkpoint, device=sampling.device)
    wanted, skipped = examine(wanted, answerer, config, skip_corrupt=skip_corrupt)
    count = answer_file(wanted, answerer, config, out, batch_size=batch_size, inputs=[questions])
    if skipped and rank() == 0:
        say(f"{len(skipped)} questions were left out, as their images cannot be read: see {write_skipped(skipped, out)}")
    console.print(visible(f"{count} answers in {out}"), soft_wrap=True)


app.command()(judge)
app.command("compare-loss")(compare_loss)
app.command()(publish)
app.command()(towers)
app.command()(assemble)


@app.command()
@report_errors
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a stage-1 mm_projector.bin.")],
    target: Annotated[Path, typer.Argument(help="Output folder; it must not exist.")],
    to: Annotated[
        str | None, typer.Option(help="medv, lladav, llada8b or projector; default: released to medv, medv to lladav.")
    ] = None,
    vision: Annotated[Path | None, typer.Option(help="SigLIP2 folder, for a checkpoint without its vision tower.")] = None,
) -> None:
    """Convert LLaDA, LLaDA-V, LLaDA-MedV and SigLIP2 weights to medv's layout, or back, without changing any values."""
    from medv.checkpoints.convert import convert as run

    console.print(visible(f"{target}: {run(source, target, to=to, vision=vision)}"), soft_wrap=True)


@config_app.command("check")
@report_errors
def config_check(
    file: Annotated[Path, typer.Argument(help="Configuration file.")],
    profile: ProfileName = "paper",
    card: Annotated[str, typer.Option(help="Kind of GPU, for the estimated hours: A100, H100, H200, L4, ...")] = "A100",
    as_json: AsJson = False,
) -> None:
    """Check a configuration file before a run: exhibits, folders, counts, memory, disk, hours; exit code 1 for a gap."""
    from medv.companion.reproduction.preflight import examine, render

    found = examine(get_profile(profile), file, card=card)
    print_json(found) if as_json else render(found, console)
    raise typer.Exit(0 if found["complete"] else 1)


@data_app.command("check")
@report_errors
def data_check(
    name: Annotated[str, typer.Argument(help="vqa_rad, slake, pathvqa, qa50, ...")],
    folder: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    image_root: ImageRoots = None,
    as_json: AsJson = False,
) -> None:
    """Validate a data set and compare it with its row of Table 8."""
    from medv.companion.audit.check import check_dataset, render_check

    result = check_dataset(name, folder, roots=tuple(image_root or ()))
    print_json(result.to_dict()) if as_json else render_check(result, console)


@app.command()
@report_errors
def audit(
    name: Annotated[str, typer.Argument(help="vqa_rad, slake or pathvqa.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    as_json: AsJson = False,
) -> None:
    """Count what a VQA data set's splits share, and score answers that see no image."""
    from medv.companion.audit.leakage import audit_dataset, render_audit

    found = audit_dataset(name, folder)
    print_json({key: frame.to_dict("records") for key, frame in found.items()}) if as_json else render_audit(found, console)


@app.command()
@report_errors
def plan(
    stage: Annotated[str, typer.Argument(help="align, instruct or vqa.")],
    profile: ProfileName = "paper",
    data: Annotated[str | None, typer.Option(help="A data set with a recipe of its own: slake or pathvqa.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    card: Annotated[str, typer.Option(help="Kind of GPU, for the estimated hours: A100, H100, H200, L4, ...")] = "A100",
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilization, for the estimated hours.")] = 0.4,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage; 0: no DeepSpeed.")] = 0,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU in GB (1e9 bytes).")] = None,
    lora: Lora = False,
    accumulation: Accumulation = 1,
    as_json: AsJson = False,
) -> None:
    """Estimate memory per GPU, disk and time of a stage; exits with code 2 if it does not fit."""
    from medv.checkpoints.assembly import shape_config
    from medv.data.chat import SpecialTokens
    from medv.training.costs import check_memory, plan_stage
    from medv.training.lora import LoraRecipe

    chosen = get_profile(profile)
    check_used(stage != "align", "on align, which trains the projector alone", lora=lora or None)
    known = stage == "vqa" and data in ("vqa_rad", *chosen.vqa_sets)  # the stage's recipe is that of VQA-RAD
    check_used(known, f"on the recipe of {stage} at profile {profile}", data=data)
    model_and_recipe = (shape_config(chosen.model, SpecialTokens(*range(7))), chosen.recipe(stage, data or ""))
    options = {
        "gpus": gpus,
        "zero": zero,
        "lora": LoraRecipe() if lora else None,
        "accumulation": accumulation,
        "capacity": gpu_memory and gpu_memory * 1e9,
        "card": card,
        "mfu": mfu,
        "views": 5 if chosen.towers == "given" else 1,  # the released models cut an image into up to four tiles and a base
    }
    found = plan_stage(*model_and_recipe, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(found.table(f"{stage}, profile {profile}"))
        console.print(found.cost_sentence(), soft_wrap=True)
    check_memory(*model_and_recipe, **options)


@app.command()
@report_errors
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and which profiles run here."""
    from medv.doctor import examine

    print_mapping("medv doctor", examine(), as_json)


def main() -> None:
    """Entry point of the `medv` command."""
    escape_unencodable()
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept")
        sys.exit(130)
    finally:
        flush_output()


if __name__ == "__main__":
    main()
