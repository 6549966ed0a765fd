"""An option that does not exist, or would have no effect, is refused by its name, wherever options are taken."""

import pytest
import torch
from command import run
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train vqa --out out --rank 8", "--rank would have no effect without --lora: leave --rank out"),
        ("train align --out out --image-root .", "--image-root would have no effect on phantoms: leave --image-root out"),
        (
            "train adapt --out out --language l --text t --self-tokens 9 --self-batch 2",
            "--self-tokens and --self-batch would have no effect without --self",
        ),
        ("towers small --out out --language l --vision v --wheels w", "--wheels would have no effect beside --language and"),
        ("compare-loss history.json --vocab-size 9", "--vocab-size would have no effect on --scale start"),
        ("plan align --data slake", "--data would have no effect on the recipe of align at profile paper"),
        ("plan align --lora", "--lora would have no effect on align, which trains the projector alone"),
        ("train align --out out --lora", "this stage trains the projector alone, and LoRA adapts the language tower"),
        ("plan vqa --data slack", "--data would have no effect on the recipe of vqa at profile paper"),
        ("plan vqa --data slake --profile tiny", "--data would have no effect on the recipe of vqa at profile tiny"),
        ("evaluate text --answers a.jsonl --marked --json", "--marked would have no effect beside --json"),
        (
            "generate --questions q --images i --out out --checkpoint c --gen-length 8 --temperature 0.5 --schedule cosine",
            "--temperature and --schedule would have no effect beside --checkpoint",
        ),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused_before_anything_is_read(line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = run(*line.split())
    assert told.exit_code == 2 and words in " ".join(told.stderr.split()), told.output
    assert not list(tmp_path.iterdir())
