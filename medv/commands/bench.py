"""`medv bench`: sampler, loss and training against the official algorithm. Heavy imports happen inside the commands."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import console, errors, print_json, report_errors, say
from medv.commands.options import AsJson, Seed, expand_options

bench_app = typer.Typer(no_args_is_help=True, help="Measure medv against the official algorithm.")
Vocabulary = Annotated[int | None, typer.Option(min=1000, help="Default: the preset's.")]
Hidden = Annotated[int | None, typer.Option(min=8)]
Layers = Annotated[int | None, typer.Option(min=1)]
Repeats = Annotated[int, typer.Option(min=1)]


@dataclass(frozen=True)
class Bench:
    """The options of every benchmark."""

    preset: Annotated[str, typer.Option(help="cpu, or gpu: LLaDA-8B's shape in bfloat16.")] = "cpu"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    seed: Seed = 0
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None
    as_json: AsJson = False

    def run(self, measure: Callable, presets: dict, changes: dict, **options) -> None:
        """Run a benchmark on a preset with `changes` (None: the preset's); print it, and write it where asked."""
        import torch

        from medv.artifacts import write_json
        from medv.ownership import check_new

        if self.out is not None:
            check_new(self.out)
        if self.preset not in presets:
            raise ValueError(f"unknown preset {self.preset!r}: use one of {', '.join(presets)}")
        if self.threads:
            torch.set_num_threads(self.threads)
        shape = replace(presets[self.preset], **{name: value for name, value in changes.items() if value is not None})
        options["progress"] = lambda name: errors.print(f"{name} ...", style="dim")
        result = measure(shape, device="cuda" if self.preset == "gpu" else "cpu", seed=self.seed, **options)
        if self.out is not None:
            write_json(self.out, result.to_dict())
        print_json(result.to_dict()) if self.as_json else console.print(result.table())
        if failed := getattr(result, "errors", None):
            for name, why in failed.items():
                say(f"{name} failed: {why}")
            raise typer.Exit(1)


@bench_app.command("sampler")
@expand_options
@report_errors
def bench_sampler_command(
    bench: Bench,
    vocab_size: Vocabulary = None,
    hidden_size: Hidden = None,
    layers: Layers = None,
    prompt_length: Annotated[int | None, typer.Option(min=1)] = None,
    gen_length: Annotated[int | None, typer.Option(min=4, help="L, tokens of the response canvas.")] = None,
    block_length: Annotated[int | None, typer.Option(min=4, help="B, tokens of a block.")] = None,
    baseline_forwards: Annotated[int, typer.Option(min=0, help="Forwards of the official algorithm to run; 0 runs all.")] = 8,
) -> None:
    """Time, memory and forwards of every sampler, on random weights, in one process."""
    from medv.companion.bench.sampler import PRESETS, bench_sampler

    changes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "prompt_length": prompt_length,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    journal = bench.out and bench.out.with_suffix(".part.jsonl")  # removed when all is measured
    bench.run(bench_sampler, PRESETS, changes, baseline_forwards=baseline_forwards or None, journal=journal)
    if journal:
        journal.unlink(missing_ok=True)


@bench_app.command("loss")
@expand_options
@report_errors
def bench_loss_command(
    bench: Bench,
    vocab_size: Annotated[int | None, typer.Option(min=2)] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1)] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Tokens of the sequence.")] = None,
    masked: Annotated[int | None, typer.Option(min=1, help="Masked tokens of the sequence.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    repeats: Repeats = 5,
) -> None:
    """Time, memory and gradients of the loss against logits at every position."""
    from medv.companion.bench.loss import LOSS_PRESETS, bench_loss

    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "positions": positions, "masked": masked}
    bench.run(bench_loss, LOSS_PRESETS, sizes | {"dtype": dtype}, repeats=repeats)


@bench_app.command("training")
@expand_options
@report_errors
def bench_training_command(
    bench: Bench,
    vocab_size: Vocabulary = None,
    hidden_size: Hidden = None,
    layers: Layers = None,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    repeats: Repeats = 3,
) -> None:
    """Time and memory of a whole training step against the reference implementation."""
    from medv.companion.bench.training import TRAINING_PRESETS, bench_training

    changes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "layers": layers}
    bench.run(bench_training, TRAINING_PRESETS, changes, rows=rows, repeats=repeats)
