"""`medv bench`: sampler, loss and training against the official algorithm. Heavy imports happen inside the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import AsJson, console, errors, in_words, print_json, say

bench_app = typer.Typer(no_args_is_help=True, help="Measure medv against the official algorithm.")
Preset = Annotated[str, typer.Option(help="cpu, or gpu: LLaDA-8B's shape in bfloat16.")]
BenchOut = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


@bench_app.callback()
def bench() -> None:
    """Measure medv against the official algorithm."""


@bench_app.command("sampler")
@in_words
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
    from medv.companion.bench.sampler import PRESETS, bench_sampler

    changes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "prompt_length": prompt_length,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    options = {"baseline_forwards": baseline_forwards or None, "seed": seed}
    if out is not None:
        options["journal"] = out.with_suffix(".part.jsonl")  # taken away when all is measured
    _bench(bench_sampler, PRESETS, preset, changes, threads, out, as_json, **options)
    if out is not None:
        options["journal"].unlink(missing_ok=True)


def _bench(run: Callable, presets: dict, preset: str, changes: dict, threads: int | None, out, as_json: bool, **options):
    """Run a benchmark on a changed preset; print it, and write it where asked."""
    from dataclasses import replace

    import torch

    from medv.artifacts import write_json
    from medv.ownership import check_new

    if out is not None:
        check_new(out)
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(presets)}")
    if threads:
        torch.set_num_threads(threads)
    shape = replace(presets[preset], **{name: value for name, value in changes.items() if value is not None})
    options["progress"] = lambda name: errors.print(f"{name} ...", style="dim")
    result = run(shape, device="cuda" if preset == "gpu" else "cpu", **options)
    if out is not None:
        write_json(out, result.to_dict())
    if as_json:
        print_json(result.to_dict())
    else:
        console.print(result.table())
    if failed := getattr(result, "errors", None):
        for name, why in failed.items():
            say(f"{name} failed: {why}")
        raise typer.Exit(1)


@bench_app.command("loss")
@in_words
def bench_loss_command(
    preset: Preset = "cpu",
    vocab_size: Annotated[int | None, typer.Option(min=2)] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1)] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Tokens of the sequence.")] = None,
    masked: Annotated[int | None, typer.Option(min=1, help="Those that are masked.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of states, weights and labels.")] = 0,
    out: BenchOut = None,
    as_json: AsJson = False,
) -> None:
    """Time, memory and gradients of the loss against logits at every position."""
    from medv.companion.bench.loss import LOSS_PRESETS, bench_loss

    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "positions": positions, "masked": masked}
    changes = sizes | {"dtype": dtype}
    _bench(bench_loss, LOSS_PRESETS, preset, changes, threads, out, as_json, repeats=repeats, seed=seed)


@bench_app.command("training")
@in_words
def bench_training_command(
    preset: Preset = "cpu",
    vocab_size: Annotated[int | None, typer.Option(min=1000)] = None,
    hidden_size: Annotated[int | None, typer.Option(min=8)] = None,
    layers: Annotated[int | None, typer.Option(min=1)] = None,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    out: BenchOut = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory of a whole training step against the reference's way."""
    from medv.companion.bench.training import TRAINING_PRESETS, bench_training

    changes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "layers": layers}
    _bench(bench_training, TRAINING_PRESETS, preset, changes, threads, out, as_json, rows=rows, repeats=repeats, seed=seed)
