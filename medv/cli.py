"""The command line. Each command is a thin call into the library; heavy imports happen inside the commands.

Bad input ends with one sentence on standard error and exit code 2; nothing half-written stays.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medv.profiles import get_profile

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="A research companion for LLaDA-MedV.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Score predictions.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data sets.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure medv against the official algorithm.")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
console, errors = Console(), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ProfileName = Annotated[str, typer.Option("--profile", "-p", help="tiny, small, paper or smoke.")]


def _in_words(command: Callable) -> Callable:
    """Turn the errors that a person can mend into one sentence and exit code 2."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError) as error:
            errors.print(f"[red]medv:[/red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


@app.command()
@_in_words
def reproduce(
    profile: ProfileName = "tiny",
    only: Annotated[list[str] | None, typer.Option("--only", help="A notebook, figure or table; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; default runs/<profile>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again even what is up to date.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Light notebooks that may run at once.")] = 2,
    publish: Annotated[bool, typer.Option("--publish", help="Copy the results to figures/<profile>/.")] = False,
) -> None:
    """Run the notebooks to figures, tables and index.html; cached and resumable."""
    from medv.reproduce import reproduce as run

    get_profile(profile)
    try:
        code = run(profile, only=tuple(only or ()), out=out, dry_run=dry_run, force=force, jobs=jobs, publish=publish)
    except RuntimeError as error:  # another run holds the folder
        raise ValueError(str(error)) from error
    raise typer.Exit(code)


@app.command()
@_in_words
def ask(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or DICOM.")],
    question: Annotated[str, typer.Argument(help="A question about the image.")],
    model: Annotated[Path | None, typer.Option(help="A model folder; default: the bundled tiny model.")] = None,
    gen_length: Annotated[int, typer.Option(help="L, tokens of the response canvas.")] = 64,
    block_length: Annotated[int, typer.Option(help="B, tokens of a block.")] = 32,
    steps: Annotated[int, typer.Option(help="Z, forwards over all blocks.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="linear, cosine, shift, threshold, factor, entropy or budgeted.")
    ] = "linear",
    cache: Annotated[str, typer.Option(help="none, prefix or dual.")] = "none",
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
    from medv.data.example import Example, Turn
    from medv.data.images import open_image
    from medv.diffusion.caching import cache_named
    from medv.diffusion.sampler import SamplerConfig
    from medv.diffusion.schedules import schedule_named
    from medv.report.traces import trace_targets, word_of, write_trace

    how = {"schedule": schedule_named(schedule), "cache": cache_named(cache), "temperature": temperature, "seed": seed}
    config = SamplerConfig(gen_length, block_length, steps, **how)
    watched, files = trace_targets(trace or ())
    if not question.strip():
        raise ValueError("the question is empty: ask something about the image")
    picture = open_image(image)
    from medv.evaluation.answering import answer_with_trace, check_length
    from medv.model.bundled import bundled

    network, processor = _load_quietly(model or bundled("tiny_model"))
    check_length(question, picture, network, processor, gen_length)
    example = Example("ask", lambda: picture, (Turn("user", question),))
    word = word_of(processor.tokenizer)
    with _view(watched and not as_json, gen_length, word) as on_step:
        answer, story = answer_with_trace(network, processor, example, config, on_step=on_step)
    for file in files:
        write_trace(file, story, word, question=question, answer=answer.text, picture=picture)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
        return
    console.print(answer.text or "(an empty answer)", markup=False, highlight=False)
    if model is None:
        note = "a bundled model of about 1.3 million parameters, trained on drawings: never for clinical use"
        errors.print(f"[dim]{answer.forwards} forwards, {answer.seconds:.2f} s; {note}[/dim]", soft_wrap=True)


def _view(wanted: bool, gen_length: int, word):
    """A picture of the canvas that follows the sampling, or nothing where nobody would see it."""
    from medv.report.trace_terminal import TerminalView

    return TerminalView(console, gen_length, word) if wanted and console.is_terminal else nullcontext()


def _load_quietly(folder: Path):
    """`load_model` without the progress bar of its fraction of a second."""
    from transformers.utils import logging

    from medv.model.bundled import load_model

    logging.disable_progress_bar()
    return load_model(folder)


@app.command()
@_in_words
def train(
    stage: Annotated[str, typer.Argument(help="pretrain (the bundled towers), align, instruct or vqa.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; a run that was stopped there goes on.")],
    profile: ProfileName = "tiny",
    data: Annotated[
        str, typer.Option(help="phantoms, vqa_rad, slake, pathvqa, llava_med_align, llava_med_instruct.")
    ] = "phantoms",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of a real data set.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Model folder to start from; default: the towers of the package.")
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Adapters on the language tower instead of full fine-tuning.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    seed: Annotated[int, typer.Option(help="Of order, noise and new weights.")] = 0,
    accumulation: Annotated[int, typer.Option(min=1, help="Cut each batch into so many parts.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train one stage of the paper's recipe."""
    chosen = get_profile(profile)
    if stage == "pretrain":
        from medv.training.pretrain import pretrain

        pretrain(chosen, out, seed=seed)
        return
    from medv.training.command import run_stage
    from medv.training.lora import LoraRecipe

    facts = run_stage(
        stage,
        chosen,
        out,
        data=data,
        data_dir=data_dir,
        init=init,
        lora=LoraRecipe(rank=rank, alpha=2 * rank) if lora else None,
        seed=seed,
        accumulation=accumulation,
    )
    _print_mapping(f"{stage}: saved to {out}", facts, as_json)


@app.command()
@_in_words
def generate(
    questions: Annotated[Path, typer.Option(help="JSON lines with question_id, image and text; or see --data.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    model: Annotated[Path, typer.Option(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="Answers as JSON lines; answers that are there are kept.")],
    gen_length: Annotated[int, typer.Option(help="L, tokens of the response canvas.")] = 64,
    block_length: Annotated[int, typer.Option(help="B, tokens of a block.")] = 64,
    steps: Annotated[int, typer.Option(help="Z, forwards over all blocks.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 16,
    data: Annotated[
        str | None, typer.Option(help="Read --questions as this data set: vqa_rad, slake, pathvqa, qa50.")
    ] = None,
) -> None:
    """Answer the questions of a benchmark; resumable."""
    from medv.diffusion.sampler import SamplerConfig
    from medv.evaluation.benchmark import answer_file, read_questions

    config = SamplerConfig(gen_length, block_length, steps, temperature=temperature, seed=seed)
    count = answer_file(read_questions(questions, images, data=data), model, out, config, batch_size=batch_size)
    console.print(f"{count} answers in {escape(str(out))}")


@evaluate_app.command("vqa")
@_in_words
def evaluate_vqa_command(
    references: Annotated[Path, typer.Option(help="The official annotation file, as shipped.")],
    predictions: Annotated[Path, typer.Option(help="JSON lines with `text` or `answer`.")],
    variant: Annotated[
        str, typer.Option(help="batch (the published results) or gated (asks for a yes or no).")
    ] = "batch",
    as_json: AsJson = False,
) -> None:
    """Closed accuracy and open recall, exactly as the official evaluation computes them, and stricter values beside them."""
    from medv.evaluation.vqa import evaluate_vqa, pair, read_predictions, read_references

    wanted, given = pair(read_references(references), read_predictions(predictions))
    _print_mapping(f"VQA, {variant} variant (percent)", evaluate_vqa(wanted, given, variant=variant).to_dict(), as_json)


@app.command()
@_in_words
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a stage-1 mm_projector.bin.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    to: Annotated[
        str | None, typer.Option(help="medv, lladav, llada8b or projector; default: released to medv, medv to lladav.")
    ] = None,
    vision: Annotated[
        Path | None, typer.Option(help="SigLIP2 folder, for a checkpoint without its vision tower.")
    ] = None,
) -> None:
    """Convert LLaDA, LLaDA-V, LLaDA-MedV and SigLIP2 weights to medv's layout, or back; nothing but names changes."""
    from medv.model.convert import convert as run

    made = run(source, target, to=to, vision=vision)
    console.print(f"{escape(str(target))}: {made}")


@data_app.command("check")
@_in_words
def data_check(
    name: Annotated[str, typer.Argument(help="vqa_rad, slake, pathvqa, qa50, ...")],
    folder: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    as_json: AsJson = False,
) -> None:
    """Validate a data set and compare it with its row of Table 8."""
    from medv.data.check import check_dataset, render_check

    result = check_dataset(name, folder)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    else:
        render_check(result, console)


@bench_app.callback()
def bench() -> None:
    """Measure medv against the official algorithm."""


@bench_app.command("sampler")
@_in_words
def bench_sampler_command(
    preset: Annotated[str, typer.Option(help="cpu, or gpu: LLaDA-8B's shape in bfloat16.")] = "cpu",
    vocab_size: Annotated[int | None, typer.Option(min=1000, help="Default: the preset's, as below.")] = None,
    hidden_size: Annotated[int | None, typer.Option(min=8)] = None,
    layers: Annotated[int | None, typer.Option(min=1)] = None,
    prompt_length: Annotated[int | None, typer.Option(min=1)] = None,
    gen_length: Annotated[int | None, typer.Option(min=4, help="L, tokens of the response canvas.")] = None,
    block_length: Annotated[int | None, typer.Option(min=4, help="B, tokens of a block.")] = None,
    baseline_forwards: Annotated[
        int, typer.Option(min=0, help="Forwards of the official algorithm that are run; 0 = all.")
    ] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time, memory and forwards of every way to sample, on random weights, in one process."""
    from dataclasses import replace

    import torch

    from medv.artifacts import write_json
    from medv.experiments.bench_sampler import PRESETS, bench_sampler

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    changes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "prompt_length": prompt_length,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    shape = replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
    if threads:
        torch.set_num_threads(threads)
    result = bench_sampler(
        shape,
        device="cuda" if preset == "gpu" else "cpu",
        baseline_forwards=baseline_forwards or None,
        seed=seed,
        progress=lambda name: errors.print(f"[dim]{escape(name)} ...[/dim]"),
    )
    if out is not None:
        write_json(out, result.to_dict())
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.print(result.table())


@app.command()
@_in_words
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and what each profile can do here."""
    from medv.doctor import examine

    _print_mapping("medv doctor", examine(), as_json)


def _print_mapping(title: str, mapping: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(mapping, ensure_ascii=False))
        return
    table = Table(title=escape(title), show_header=False)
    for name, value in mapping.items():
        table.add_row(escape(str(name)), f"{value:.4f}" if isinstance(value, float) else escape(str(value)))
    console.print(table)


def main() -> None:
    """Entry point of the `medv` command."""
    try:
        app()
    except KeyboardInterrupt:
        errors.print("medv: interrupted; what was finished is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
