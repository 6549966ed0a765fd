"""What `ask` and `generate` both take of the sampler, and the configuration that it makes; defaults are the profile's."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medv.profiles import SAMPLERS, Profile

GenLength = Annotated[int | None, typer.Option(help="L, tokens of the response canvas; default: the profile's.")]
BlockLength = Annotated[int | None, typer.Option(help="B, tokens of a block; default: the profile's.")]
Steps = Annotated[int | None, typer.Option(help="Z, forwards over all blocks; default: the profile's.")]
Temperature = Annotated[float, typer.Option(help="0 = the most probable token.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
ScheduleName = Annotated[str, typer.Option("--schedule", help="How many predictions a forward writes, and which:")]
CacheName = Annotated[str, typer.Option("--cache", help="Keys and values kept between forwards:")]
Preset = Annotated[str, typer.Option(help="medv, or official: the reference's own sampler, one question at a time.")]
Graphs = Annotated[bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Default: where the model is on one GPU.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default: the best there is.")]


class SamplingCommand(TyperCommand):
    """A command whose help lists the registered schedules and caches; they are imported only when the help is printed."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """Complete the two options, then print."""
        from medv.diffusion.caching import CACHES
        from medv.diffusion.schedules import SCHEDULES

        for option in self.params:
            registry = {"schedule": SCHEDULES, "cache": CACHES}.get(option.name)
            if registry is not None and not option.help.endswith("."):
                option.help += f" {', '.join(registry)}."
        super().format_help(ctx, formatter)


def sampler_of(
    profile: Profile,
    gen_length: int | None,
    block_length: int | None,
    steps: int | None,
    *,
    schedule: str,
    cache: str,
    preset: str,
    temperature: float,
    seed: int,
):
    """The configuration of a command's options. Raises ValueError for an unknown name or options that exclude each other."""
    from medv.diffusion.caching import cache_named
    from medv.diffusion.config import SamplerConfig
    from medv.diffusion.schedules import schedule_named

    given = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    own = {name: getattr(profile.describe, name) if value is None else value for name, value in given.items()}
    own |= {"temperature": temperature, "seed": seed}
    if preset not in SAMPLERS:
        raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(SAMPLERS)}")
    how = {"schedule": schedule_named(schedule), "cache": cache_named(cache)}
    if preset != "official":
        return SamplerConfig(**own, **how)
    if (schedule, cache) != ("linear", "none"):
        raise ValueError("the preset 'official' has no schedule and no cache: leave them out")
    return SamplerConfig.official(**own)
