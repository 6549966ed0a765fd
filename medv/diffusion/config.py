"""The settings of the sampler of this library (`medv.diffusion.sampler`)."""

from dataclasses import dataclass

from medv import limits
from medv.diffusion.blockwise import BlockwiseConfig
from medv.diffusion.caching import NO_CACHE, CachePolicy
from medv.diffusion.length import ChosenLength
from medv.diffusion.official import LladaConfig, OfficialConfig
from medv.diffusion.revision import Revision
from medv.diffusion.schedules import LINEAR, Filter, Schedule


@dataclass(frozen=True)
class SamplerConfig(BlockwiseConfig):
    """How a response is sampled: the settings of `BlockwiseConfig`, and those below.

    stop_tokens: ids that end the response; None leaves it to the model, () never stops. min_length: no stop token before so
    many tokens. schedule: how many predictions a forward commits and which; filters: candidates that are deferred to a later
    forward; revision: tokens that are taken back (`medv.diffusion.schedules`, `filters`, `revision`). cache: keys and values
    that a forward may keep from earlier ones (`medv.diffusion.caching`); only the denoiser reads it. length: how an answer gets
    a length of its own (`medv.model.length`); None fills the canvas or stops where a stop token is written.

    `SamplerConfig.official(...)` and `SamplerConfig.llada(...)` configure the samplers of the public references.
    """

    stop_tokens: tuple[int, ...] | None = None
    min_length: int = 0
    schedule: Schedule = LINEAR
    filters: tuple[Filter, ...] = ()
    revision: Revision | None = None
    cache: CachePolicy = NO_CACHE
    length: ChosenLength | None = None

    official = OfficialConfig
    llada = LladaConfig

    def __post_init__(self):
        super().__post_init__()
        limits.whole("min_length", self.min_length, 0, self.gen_length)
        if self.length is not None:
            limits.whole("the shortest length", self.length.shortest, 1, self.gen_length)
