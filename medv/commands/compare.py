"""`medv compare-loss`: a user's loss over the band of healthy trainings. Heavy imports happen inside the command."""

from pathlib import Path
from typing import Annotated

import typer

from medv import limits
from medv.commands.console import console, print_json, report_errors
from medv.commands.options import AsJson, check_used
from medv.reading import visible


@report_errors
def compare_loss(
    history: Annotated[Path, typer.Argument(help="history.json of medv, or trainer_state.json of a Trainer.")],
    normalization: Annotated[
        str | None, typer.Option(help="Of your loss: sample, token, masked_sample or masked; default: the recipe's, or sample.")
    ] = None,
    times: Annotated[str | None, typer.Option(help="How you draw t: iid or stratified; default: the recipe's, or iid.")] = None,
    scale: Annotated[
        str, typer.Option(help="Divide by: start (mean of the first fifth), or uniform (a uniform guess).")
    ] = "start",
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Your vocabulary, for --scale uniform.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a step of your training.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="All steps of the training, if it has not ended.")] = None,
    band: Annotated[Path | None, typer.Option(help="CSV of a band; default: that of the tiny run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw it: FILE.png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lay the loss of a training over the band of healthy ones (notebook 15)."""
    from medv.companion.studies import loss_compare as study
    from medv.diffusion.loss import NORMALIZATIONS
    from medv.training.stream import TIMES

    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{out} has no known kind of picture: call it .png, .svg or .pdf")
    limits.named("scale", scale, study.SCALES)
    check_used(scale == study.UNIFORM, f"on --scale {scale}", vocab_size=vocab_size)
    log = study.read_history(history, total=steps)
    chosen = {"normalization": normalization or log.recipe.get("normalization", "sample")}
    chosen["times"] = times or log.recipe.get("times", "iid")
    for name, known in (("normalization", NORMALIZATIONS), ("times", TIMES)):
        limits.named(name, chosen[name], known)
    file = study.find_band(band)
    reference = study.read_band(file, scale=scale, **chosen)
    own = study.lay_over(log, reference, scale, vocabulary=vocab_size)
    found = study.report(log, reference, own, study.origin(file), scale)
    if out is not None:
        from medv.artifacts import atomic_file
        from medv.companion.figures.losses import own_loss_figure
        from medv.companion.figures.plots import footer
        from medv.ownership import check_new

        check_new(out, [history])
        fig = own_loss_figure(reference, own, f"Over {found['band_seeds']} trainings", ylabel=f"loss, {study.SCALES[scale]}")
        footer(fig, f"band: {found['band']}; normalization {chosen['normalization']}, {chosen['times']} t")
        with atomic_file(out) as partial:
            fig.savefig(partial, format=out.suffix[1:], dpi=160, bbox_inches="tight")
    if as_json:
        print_json(found)
        return
    for sentence in study.sentences(found, reference["trained"].iloc[0], batch_size=batch_size):
        console.print(visible(sentence), soft_wrap=True)
