"""What `ask` and `generate` both take of the sampler, and the configuration that it makes; defaults are the profile's."""

from typing import Annotated

import typer

from medv.profiles import Profile

GenLength = Annotated[int | None, typer.Option(help="L, tokens of the response canvas; default: the profile's.")]
BlockLength = Annotated[int | None, typer.Option(help="B, tokens of a block; default: the profile's.")]
Steps = Annotated[int | None, typer.Option(help="Z, forwards over all blocks; default: the profile's.")]
Temperature = Annotated[float, typer.Option(help="0 = the most probable token.")]
Seed = Annotated[int, typer.Option(help="Of the random draws.")]
ScheduleName = Annotated[str, typer.Option("--schedule", help="linear, cosine, shift, threshold, factor, entropy or budgeted.")]
CacheName = Annotated[str, typer.Option("--cache", help="none, prefix or dual.")]
Preset = Annotated[str, typer.Option(help="medv, or official: the reference's own sampler, one question at a time.")]
Graphs = Annotated[bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Default: where the model is on one GPU.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default: the best there is.")]


def sampler_of(
    profile: Profile,
    gen_length: int | None,
    block_length: int | None,
    steps: int | None,
    *,
    schedule: str,
    cache: str,
    preset: str,
    **draws,
):
    """The SamplerConfig of a command's options; `draws` are temperature and seed. ValueError for what cannot be."""
    from medv.diffusion.caching import cache_named
    from medv.diffusion.config import SamplerConfig
    from medv.diffusion.schedules import schedule_named

    own = profile.describe
    given = (gen_length, block_length, steps)
    defaults = (own.gen_length, own.block_length, own.steps)
    lengths = [default if value is None else value for value, default in zip(given, defaults, strict=True)]
    how = {"schedule": schedule_named(schedule), "cache": cache_named(cache)}
    if preset == "official" and (schedule, cache) == ("linear", "none"):
        return SamplerConfig.official(**dict(zip(("gen_length", "block_length", "steps"), lengths, strict=True)), **draws)
    return SamplerConfig(*lengths, preset=preset, **how, **draws)
