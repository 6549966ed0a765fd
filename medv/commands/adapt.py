"""`medv train adapt`: from a causal language tower to a masked-diffusion one. Heavy imports happen inside the command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from medv.commands.console import AsJson, errors, in_words, print_mapping


@in_words
def adapt(
    language: Annotated[Path, typer.Option(help="Folder of a causal language tower (Llama layout and tokenizer).")],
    out: Annotated[Path, typer.Option(help="Folder of the result; a run that was stopped there goes on.")],
    text: Annotated[
        str | None, typer.Option(help="A folder of .txt and .jsonl files, one such file, or the name of a data set.")
    ] = None,
    self_text: Annotated[bool, typer.Option("--self", help="Instead: text that the tower itself writes first.")] = False,
    self_tokens: Annotated[int, typer.Option(min=1, help="Tokens that it writes.")] = 2_000_000,
    self_batch: Annotated[int, typer.Option(min=1, help="Answers that it writes at once.")] = 64,
    attention: Annotated[str, typer.Option(help="at_once: to both sides from the first step; or annealed.")] = "at_once",
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Draw all layers to those of the frozen causal tower.")
    ] = True,
    weights: Annotated[str, typer.Option(help="Of masked tokens: uniform or 1/t.")] = "uniform",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens seen in all, those of every epoch counted.")] = 2_000_000,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-4,
    accumulation: Annotated[int, typer.Option(min=1, help="Cut each batch into so many parts.")] = 1,
    continuations: Annotated[int, typer.Option(min=0, help="Held-out openings continued before and after.")] = 20,
    seed: Annotated[int, typer.Option(help="Of order, noise and what is written.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the best there is.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the layers first (a minute, and a compiler).")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a causal language tower as a masked-diffusion model on text; `medv assemble` takes the result."""
    from medv.companion.studies.adaptation import adapt_on_text
    from medv.model.devices import device_named
    from medv.training.adapt import AdaptRecipe
    from medv.training.launch import TrainingStopped
    from medv.training.text import Writing

    recipe = AdaptRecipe(attention, align, weights, tokens, length, batch_size, lr)
    try:
        facts = adapt_on_text(
            language,
            out,
            recipe,
            text=text,
            writing=Writing(batch_size=self_batch, seed=seed) if self_text else None,
            self_tokens=self_tokens,
            continuations=continuations,
            seed=seed,
            device=device_named(device),
            accumulation=accumulation,
            compiled=compiled,
        )
    except TrainingStopped as stopped:
        errors.print(f"[red]medv:[/red] {escape(str(stopped))}", soft_wrap=True)
        raise typer.Exit(1) from stopped
    print_mapping(f"adapt: saved to {out}", facts, as_json)
