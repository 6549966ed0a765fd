"""The command line. Each command is a thin call into the library; heavy imports happen inside the commands.

Bad input ends with one sentence on standard error and exit code 2; nothing half-written stays.
"""

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from medv.commands.adapt import adapt
from medv.commands.bench import bench_app
from medv.commands.console import AsJson, any_text, console, errors, finish, print_json, say
from medv.commands.console import in_words as _in_words
from medv.commands.console import print_mapping as _print_mapping
from medv.commands.evaluate import evaluate_app, judge
from medv.commands.sampling import (
    BlockLength,
    CacheName,
    Device,
    GenLength,
    Graphs,
    Preset,
    SamplingCommand,
    ScheduleName,
    Seed,
    Steps,
    Temperature,
    sampler_of,
)
from medv.commands.towers import assemble, towers
from medv.profiles import get_profile
from medv.reading import visible

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="A research companion for LLaDA-MedV.")
train_app = typer.Typer(no_args_is_help=True, help="Train a stage of the paper's recipe, or what comes before it.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data sets.")
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

ImageRoots = Annotated[
    list[Path] | None,
    typer.Option("--image-root", help="A folder that images may be links into (a cache, DVC, git-annex); repeatable."),
]
ProfileName = Annotated[str, typer.Option("--profile", "-p", help="tiny, small, paper or smoke.")]


@app.command()
@_in_words
def reproduce(
    profile: ProfileName = "tiny",
    only: Annotated[list[str] | None, typer.Option("--only", help="A notebook, figure or table, or all; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; default runs/<profile>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again even what is up to date.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks that may run at once.")] = 2,
    publish: Annotated[bool, typer.Option("--publish", help="Copy the results to figures/<profile>/.")] = False,
) -> None:
    """Run the notebooks to figures, tables and index.html; cached and resumable."""
    from medv.companion.reproduction.reproduce import reproduce as run

    get_profile(profile)
    options = {"dry_run": dry_run, "force": force, "jobs": jobs, "publish": publish, "console": console}
    code = run(profile, only=tuple(only or ()), out=out, **options)
    raise typer.Exit(code)


@app.command(cls=SamplingCommand)
@_in_words
def ask(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or DICOM.")],
    question: Annotated[str, typer.Argument(help="A question about the image.")],
    model: Annotated[
        Path | None, typer.Option(help="A folder of a model or of LoRA adapters; default: the bundled tiny model.")
    ] = None,
    profile: ProfileName = "tiny",
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    schedule: ScheduleName = "linear",
    cache: CacheName = "none",
    preset: Preset = "medv",
    cuda_graphs: Graphs = None,
    device: Device = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="How the answer was unmasked: FILE.html (animated page), FILE.json, or - to watch it in this "
            "terminal (nothing is drawn with --json or into a pipe); repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about one image."""
    from medv.companion.figures.traces import trace_targets, word_of, write_trace
    from medv.data.images import open_image

    chosen, how = get_profile(profile), {"schedule": schedule, "cache": cache, "preset": preset}
    config = sampler_of(chosen, gen_length, block_length, steps, **how, temperature=temperature, seed=seed)
    watched, files = trace_targets(trace or ())
    if not question.strip():
        raise ValueError("the question is empty: ask something about the image")
    question.encode()  # half of a character, as a shell of another encoding gives it, is refused here
    picture = open_image(image)
    from transformers.utils import logging

    from medv.checkpoints.bundled import bundled, untrained_projector
    from medv.evaluation.answering import Answerer

    logging.disable_progress_bar()  # of a fraction of a second
    how = {"dtype": chosen.dtype if model else "float32", "device": device, "graphs": cuda_graphs}
    answerer = Answerer.load(model or bundled("tiny_model"), **how)
    word = word_of(answerer.processor.tokenizer)
    with _view(watched and not as_json, config.gen_length, word) as on_step:
        answer, story = answerer.ask(picture, question, config, on_step=on_step)
    for file in files:
        write_trace(file, story, word, question=question, answer=answer.text, picture=picture)
    if as_json:
        print_json(answer.to_dict())
        return
    console.print(answer.text or "(an empty answer)")
    if model is not None and untrained_projector(model):
        say("the projector of this model is untrained, so the image says nothing yet: train it with `medv train align`")
    if model is None:
        note = "a bundled model of about 1.3 million parameters, trained on drawings: never for clinical use"
        errors.print(f"{answer.forwards} forwards, {answer.seconds:.2f} s; {note}", style="dim", soft_wrap=True)


def _view(wanted: bool, gen_length: int, word):
    """A picture of the canvas that follows the sampling, or nothing where nobody would see it."""
    from medv.companion.figures.trace_terminal import TerminalView

    return TerminalView(console, gen_length, word) if wanted and console.is_terminal else nullcontext()


@_in_words
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the result; a run that was stopped there goes on.")],
    profile: ProfileName = "tiny",
    data: Annotated[
        str, typer.Option(help="phantoms, vqa_rad, slake, pathvqa, llava_med_align, llava_med_instruct.")
    ] = "phantoms",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of a real data set.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Which questions it sees: official, image_disjoint (no test image), validation.")
    ] = "official",
    init: Annotated[Path | None, typer.Option(help="Model folder to start from; default: the towers of the package.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Adapters on the language tower instead of full fine-tuning.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    seed: Annotated[int, typer.Option(help="Of order, noise and new weights.")] = 0,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Instead of the recipe's.")] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Cut each batch into so many parts.")] = 1,
    deepspeed: Annotated[str | None, typer.Option(help="zero2 or zero3: share the work under DeepSpeed.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the best there is.")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out and count images that cannot be read.")
    ] = False,
    image_root: ImageRoots = None,
    as_json: AsJson = False,
) -> None:
    """Train one stage of the paper's recipe; also under torchrun and the deepspeed launcher (python -m medv)."""
    chosen, stage = get_profile(profile), context.info_name
    from medv.companion.towers.pretrain import pretrain
    from medv.training import launch
    from medv.training.command import run_stage
    from medv.training.lora import LoraRecipe

    if epochs is not None:
        chosen = chosen.with_recipe(stage, epochs=epochs)
    try:
        if stage == "pretrain":
            pretrain(chosen, out, seed=seed)
            return
        with redirect_stdout(sys.stderr):  # where the Trainer's log goes: the result alone is printed
            facts = run_stage(
                stage,
                chosen,
                out,
                data=data,
                data_dir=data_dir,
                roots=tuple(image_root or ()),
                protocol=protocol,
                init=init,
                lora=LoraRecipe(rank=rank, alpha=2 * rank) if lora else None,
                seed=seed,
                accumulation=accumulation,
                deepspeed=deepspeed,
                skip_corrupt=skip_corrupt,
                device=device,
            )
    except launch.TrainingStopped as stopped:
        if str(stopped):
            say(str(stopped))
        raise typer.Exit(1) from stopped
    if launch.rank():
        return
    if "seconds" not in facts:
        say(f"{out} was finished already: nothing is trained again")
    _print_mapping(f"{stage}: saved to {out}", facts, as_json)


for _stage, _about in (("pretrain", "Make the bundled towers again."), ("align", None), ("instruct", None), ("vqa", None)):
    train_app.command(_stage, help=_about)(train)
train_app.command("adapt")(adapt)


@app.command(cls=SamplingCommand)
@_in_words
def generate(
    questions: Annotated[Path, typer.Option(help="JSON lines with question_id, image and text; or see --data.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[Path, typer.Option(help="Answers as JSON lines; answers that are there are kept.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a model or of LoRA adapters.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Instead: an image-text-to-text checkpoint of transformers, folder or id.")
    ] = None,
    profile: ProfileName = "tiny",
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    schedule: ScheduleName = "linear",
    cache: CacheName = "none",
    preset: Preset = "medv",
    cuda_graphs: Graphs = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 16,
    data: Annotated[str | None, typer.Option(help="Read --questions as this data set: vqa_rad, slake, pathvqa, qa50.")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out, count and list questions whose image cannot be read.")
    ] = False,
    image_root: ImageRoots = None,
) -> None:
    """Answer the questions of a benchmark; resumable, and under torchrun shared out over its processes."""
    from medv.data.images import ImageFolder
    from medv.evaluation.answering import Answerer
    from medv.evaluation.baselines import CheckpointAnswerer, availability
    from medv.evaluation.benchmark import answer_file, examine, read_questions, write_skipped
    from medv.model.devices import device_named

    if (model is None) == (checkpoint is None):
        raise ValueError("give either --model or --checkpoint, one of the two")
    chosen, how = get_profile(profile), {"schedule": schedule, "cache": cache, "preset": preset}
    config = sampler_of(chosen, gen_length, block_length, steps, **how, temperature=temperature, seed=seed)
    device_named(device)  # a device that is not here is reported before questions are read
    if checkpoint is not None and (found := availability(checkpoint)) != "on this machine":
        mend = f"fetch it first, for example with `hf download {checkpoint}`"
        raise ValueError(f"{checkpoint}: {found}; {'--model takes ours' if Path(checkpoint).is_dir() else mend}")
    wanted = read_questions(questions, ImageFolder(images, tuple(image_root or ())), data=data)
    if checkpoint is None:
        answerer = Answerer.load(model, dtype=chosen.dtype, device=device, graphs=cuda_graphs)
    else:
        answerer = CheckpointAnswerer.load(checkpoint, device=device)
    wanted, skipped = examine(wanted, answerer, config, skip_corrupt=skip_corrupt)
    count = answer_file(wanted, answerer, config, out, batch_size=batch_size, inputs=[questions])
    if skipped and os.environ.get("RANK", "0") == "0":
        say(f"{len(skipped)} questions were left out, as their images cannot be read: see {write_skipped(skipped, out)}")
    console.print(visible(f"{count} answers in {out}"), soft_wrap=True)


app.command()(judge)
app.command()(towers)
app.command()(assemble)


@app.command()
@_in_words
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a stage-1 mm_projector.bin.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    to: Annotated[
        str | None, typer.Option(help="medv, lladav, llada8b or projector; default: released to medv, medv to lladav.")
    ] = None,
    vision: Annotated[Path | None, typer.Option(help="SigLIP2 folder, for a checkpoint without its vision tower.")] = None,
) -> None:
    """Convert LLaDA, LLaDA-V, LLaDA-MedV and SigLIP2 weights to medv's layout, or back; nothing but names changes."""
    from medv.checkpoints.convert import convert as run

    made = run(source, target, to=to, vision=vision)
    console.print(visible(f"{target}: {made}"), soft_wrap=True)


@data_app.command("check")
@_in_words
def data_check(
    name: Annotated[str, typer.Argument(help="vqa_rad, slake, pathvqa, qa50, ...")],
    folder: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    image_root: ImageRoots = None,
    as_json: AsJson = False,
) -> None:
    """Validate a data set and compare it with its row of Table 8."""
    from medv.data.check import check_dataset, render_check

    result = check_dataset(name, folder, roots=tuple(image_root or ()))
    if as_json:
        print_json(result.to_dict())
    else:
        render_check(result, console)


@app.command()
@_in_words
def plan(
    stage: Annotated[str, typer.Argument(help="align, instruct or vqa.")],
    profile: ProfileName = "paper",
    data: Annotated[str, typer.Option(help="The data set, where it has a recipe of its own: slake, pathvqa.")] = "",
    gpus: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    card: Annotated[str, typer.Option(help="The kind of GPU, for the hours: A100, H100, H200, L4, ...")] = "A100",
    mfu: Annotated[float, typer.Option(help="Share of its peak that is reached, for the hours.")] = 0.4,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage; 0 is no DeepSpeed.")] = 0,
    gpu_memory: Annotated[float | None, typer.Option(help="GB (1e9 bytes) of one device.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Adapters on the language tower.")] = False,
    accumulation: Annotated[int, typer.Option(min=1, help="Cut each batch into so many parts.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What a stage needs of each GPU's memory, of the disk and of time, by arithmetic; exit code 2 where it cannot fit."""
    from medv.checkpoints.assembly import shape_config
    from medv.data.chat import SpecialTokens
    from medv.training.lora import LoraRecipe
    from medv.training.memory import check_memory, plan_cost, plan_memory

    chosen = get_profile(profile)
    what = (shape_config(chosen.model, SpecialTokens(*range(7))), chosen.recipe(stage, data))
    shared = {"gpus": gpus, "zero": zero, "lora": LoraRecipe() if lora else None}
    options = shared | {"accumulation": accumulation, "capacity": gpu_memory and gpu_memory * 1e9}
    found = plan_memory(*what, **options)
    views = 5 if chosen.towers == "given" else 1  # the released models cut an image into tiles, up to four and a base
    cost = plan_cost(*what, **shared, card=card, mfu=mfu, views=views)
    if as_json:
        print_json(found.to_dict() | cost.to_dict())
    else:
        console.print(found.table(f"{stage}, profile {profile}"))
        console.print(cost.sentence(), soft_wrap=True)
    check_memory(*what, **options)


@app.command()
@_in_words
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and what each profile can do here."""
    from medv.doctor import examine

    _print_mapping("medv doctor", examine(), as_json)


def main() -> None:
    """Entry point of the `medv` command."""
    any_text()
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept")
        sys.exit(130)
    finally:
        finish()


if __name__ == "__main__":
    main()
