"""An option that does not exist is refused by its name, wherever options are taken."""

import pytest
import torch
from tiny import model, processor

from medv.diffusion.config import SamplerConfig

CONFIG = SamplerConfig(gen_length=4, block_length=4, steps=4)
IDS = torch.arange(20, 28)[None]
CALLS = {
    "settings": SamplerConfig,
    "generate": lambda **options: model().generate(IDS, config=CONFIG, **options),
    "stream": lambda **options: next(model().stream(IDS, config=CONFIG, **options)),
    "forward": lambda **options: model()(IDS, **options),
    "processor": lambda **options: processor()(text="What is shown?", **options),
}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *[("settings", n) for n in ("max_new_tokens", "threshold", "prefix_refresh_interval", "remasking_strategy")],
        ("settings", "stopping_criteria"),
        *[("generate", n) for n in ("max_new_tokens", "temperature", "gen_length")],
        ("stream", "max_new_tokens"),
        ("forward", "use_cache"),
        ("processor", "max_length"),
    ],
)
def test_an_unknown_option_is_refused_by_its_name(where, name):
    with pytest.raises(TypeError, match=name):
        CALLS[where](**{name: 1})
