"""Options that several commands share: each is declared once, and those that always come together as a dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medv import limits
from medv.profiles import SAMPLERS, get_profile

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ProfileName = Annotated[str, typer.Option("--profile", "-p", help="tiny, small, paper or smoke.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default: the best available.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Gradient accumulation steps: parts of each batch.")]
Lora = Annotated[bool, typer.Option("--lora", help="LoRA adapters on the language tower instead of full fine-tuning.")]
RunFolder = Annotated[Path, typer.Option(help="Output folder; a run that was stopped there continues.")]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Skip and count images that cannot be read.")]
ImageRoots = Annotated[
    list[Path] | None,
    typer.Option("--image-root", help="A folder that images may link to (a cache, DVC, git-annex); repeatable."),
]


@dataclass(frozen=True)
class Sampling:
    """The options of a sampler; lengths and steps default to those of the profile."""

    profile: ProfileName = "tiny"
    gen_length: Annotated[int | None, typer.Option(help="L, tokens of the response canvas; default: the profile's.")] = None
    block_length: Annotated[int | None, typer.Option(help="B, tokens of a block; default: the profile's.")] = None
    steps: Annotated[int | None, typer.Option(help="Z, forwards over all blocks; default: the profile's.")] = None
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most probable token.")] = 0.0
    seed: Seed = 0
    schedule: Annotated[str, typer.Option(help="How many predictions a forward writes, and which:")] = "linear"
    filter: Annotated[str, typer.Option(help="Which predictions wait (phrases: those that repeat): none,")] = "none"
    cache: Annotated[str, typer.Option(help="Keys and values kept between forwards:")] = "none"
    length: Annotated[str, typer.Option(help="canvas: all of it; auto: chosen first, needs training with padding.")] = "canvas"
    preset: Annotated[str, typer.Option(help="medv, or official: the reference's own sampler, one question at a time.")] = (
        "medv"
    )
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Replay CUDA graphs; default: where the model is on one GPU."),
    ] = None
    device: Device = None

    def config(self, *, one_block: bool = False):
        """The sampler's configuration, on request in one block; raises ValueError where the options do not fit together."""
        from medv.diffusion.caching import cache_named
        from medv.diffusion.config import SamplerConfig
        from medv.diffusion.filters import filters_named
        from medv.diffusion.length import length_named
        from medv.diffusion.schedules import schedule_named

        settings = {"temperature": self.temperature, "seed": self.seed}
        for name in ("gen_length", "block_length", "steps"):
            given = getattr(self, name)
            settings[name] = getattr(get_profile(self.profile).describe, name) if given is None else given
        settings |= {"block_length": settings["gen_length"]} if one_block else {}
        how = {"schedule": schedule_named(self.schedule), "cache": cache_named(self.cache)}
        how |= {"filters": filters_named(self.filter), "length": length_named(self.length)}
        limits.named("preset", self.preset, SAMPLERS)
        if self.preset != "official":
            return SamplerConfig(**settings, **how)
        if (self.schedule, self.filter, self.cache, self.length) != ("linear", "none", "none", "canvas"):
            raise ValueError("the preset 'official' has no schedule, no filter, no cache and no length: leave them out")
        return SamplerConfig.official(**settings)

    def filling(self, template: str | None, blank_tokens: int | None) -> dict[str, Any]:
        """The options of `Answerer.ask` for a template, none without one; raises ValueError where others do not go with it."""
        from medv.evaluation.templates import BLANK_TOKENS, Template

        check_used(template is not None, "without --template", blank_tokens=blank_tokens)
        if template is None:
            return {}
        lengths = {name: value for name, value in self.changed().items() if "length" in name}
        check_used(False, "beside --template, which sets the length of the answer", **lengths)
        blank_tokens = BLANK_TOKENS if blank_tokens is None else blank_tokens
        Template(template).sizes(blank_tokens)
        template.encode()  # half of a character, as a shell of another encoding gives it, is refused here
        return {"template": template, "blank_tokens": blank_tokens}

    def changed(self, *but: str) -> dict[str, Any]:
        """The options that are not as by default, without those named."""
        names = [item.name for item in fields(self) if item.name not in but and getattr(self, item.name) != item.default]
        return {name: getattr(self, name) for name in names}

    def answerer(self, folder: Path | None):
        """The Answerer of a model folder; None is the bundled tiny model."""
        from medv.checkpoints.bundled import bundled
        from medv.evaluation.answering import Answerer

        dtype = get_profile(self.profile).dtype if folder else "float32"
        return Answerer.load(folder or bundled("tiny_model"), dtype=dtype, device=self.device, graphs=self.cuda_graphs)


def check_used(used: bool, where: str, **given: Any) -> None:
    """Raises ValueError for options that are given, not None, though they are not `used` where the words say."""
    named = " and ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None)
    if named and not used:
        raise ValueError(f"{named} would have no effect {where}: leave {named} out")


class SamplingCommand(TyperCommand):
    """A command whose help lists the registered schedules, filters and caches, imported only when the help is printed."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """Complete these options, then print."""
        from medv.diffusion.caching import CACHES
        from medv.diffusion.filters import FILTERS
        from medv.diffusion.schedules import SCHEDULES

        for option in self.params:
            registry = {"schedule": SCHEDULES, "filter": FILTERS, "cache": CACHES}.get(option.name)
            if registry is not None and not option.help.endswith("."):
                option.help += f" {', '.join(registry)}."
        super().format_help(ctx, formatter)


def expand_options(command: Callable) -> Callable:
    """Let typer see the fields of each parameter that is a dataclass (such as `Sampling`) as options of the command."""
    parameters = signature(command).parameters
    groups = {name: parameter.annotation for name, parameter in parameters.items() if is_dataclass(parameter.annotation)}
    shown = []
    for name, parameter in parameters.items():
        if name in groups:
            for item in fields(groups[name]):
                shown.append(Parameter(item.name, Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type))
        else:
            shown.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def wrapped(**given):
        for name, group in groups.items():
            given[name] = group(**{item.name: given.pop(item.name) for item in fields(group)})
        return command(**given)

    wrapped.__signature__ = Signature(shown)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return wrapped
