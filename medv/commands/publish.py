"""`medv publish`: a model folder, ready for the Hugging Face hub."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import print_mapping, report_errors, say
from medv.commands.options import AsJson


@report_errors
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, of a stage-1 projector or of LoRA adapters.")],
    to: Annotated[Path, typer.Option(help="The new folder; one that holds this model already is brought up to date.")],
    figures: Annotated[
        Path | None, typer.Option(help="Figures with their manifests; default: those of the run that the model lies in.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights, an id of the hub, e.g. apache-2.0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a hub-ready folder of a model: weights, processor, card with measured numbers, manifest, figures."""
    from transformers.utils import logging

    from medv.companion.reproduction.publish import publish as run

    logging.disable_progress_bar()
    with redirect_stdout(sys.stderr):  # DeepSpeed, which accelerate imports to save a model, greets there
        facts = run(folder, to, figures=figures, licence=licence)
    print_mapping(f"published to {to}", facts, as_json)
    say(f"`hf upload USER/{to.resolve().name} {to}` brings it to the Hugging Face hub")
