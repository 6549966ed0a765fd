"""The samplers of the public references, on a network whose answers are written by hand."""

import pytest
import torch
from tiny import model, picture, processor

from medv.diffusion import official, sampler
from medv.diffusion.caching import NO_CACHE
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import add_gumbel_noise

VOCABULARY, MASK, FILL = 12, 11, 10


def network(rows: list[list[float]] | None = None, *, seed: int = 0):
    """A denoiser [B, T] -> logits that depend on the position and on the sum of the canvas."""
    table = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3

    def denoise(canvas, columns, *, unconditional=False):
        logits = table[: canvas.shape[1]] + 0.1 * canvas.sum(dim=1)[:, None, None].sin()
        if rows is not None:
            logits = torch.tensor(rows)[None].expand(len(canvas), -1, -1)
        return (-logits if unconditional else logits)[:, columns].clone()

    return denoise


def peaks(tokens: list[int], sureness: list[float]) -> list[list[float]]:
    """Logits whose best token at each position is given, as sure as given."""
    return [[sure if token == k else 0.0 for k in range(VOCABULARY)] for token, sure in zip(tokens, sureness, strict=True)]


def run(denoise, prompt, config, **options):
    sample = sampler.sample if isinstance(config, SamplerConfig) else official.sample
    return sample(denoise, torch.tensor([prompt], dtype=torch.long), config, mask_token_id=MASK, fill_token_id=FILL, **options)


def text(output, row: int = 0) -> list[int]:
    return output.sequences[row, : output.lengths[row]].tolist()


SMALL = {"gen_length": 8, "block_length": 4, "steps": 8}


@pytest.mark.parametrize("preset", [SamplerConfig.official, SamplerConfig.llada])
def test_without_quirks_the_presets_agree_with_the_plain_sampler(preset):
    plain = SamplerConfig(**SMALL, suppress_tokens=(MASK,), stop_tokens=())
    wanted = run(network(), [1, 2], plain)
    output = run(network(), [1, 2], preset(**SMALL, suppress_tokens=(MASK,)))
    assert output.sequences.equal(wanted.sequences) and output.forwards == wanted.forwards
    assert output.trace.replay(7) == wanted.trace.replay(7) == text(output)
    assert output.finish_reason == ["length"]


def test_masks_of_the_prompt_take_from_the_budget():
    config = SamplerConfig.official(gen_length=4, block_length=4, steps=4, suppress_tokens=(MASK,))
    rows = peaks([1, 2, 3, 4, 5, 6], [9, 1, 5, 4, 3, 2])  # the mask in the prompt is the surest
    answer = text(run(network(rows), [MASK, 7], config))
    assert answer == [3, 4, 5, MASK]


def test_the_first_sequence_found_ends_the_scan():
    rows = peaks([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8])  # written from the right to the left
    both = SamplerConfig.official(gen_length=8, block_length=8, steps=8, stop_sequences=((8,), (2, 3)))
    swapped = SamplerConfig.official(gen_length=8, block_length=8, steps=8, stop_sequences=((2, 3), (8,)))
    assert text(run(network(rows), [], both)) == [1, 2, 3, 4, 5, 6, 7]
    output = run(network(rows), [], swapped)
    assert text(output) == [1] and output.finish_reason == ["stop"] and output.sequences.shape == (1, 8)


def test_a_suffix_is_seen_kept_and_returned():
    seen = []

    def denoise(canvas, columns, *, unconditional=False):
        seen.append(canvas[0, -2:].tolist())
        return network()(canvas, columns)

    output = run(denoise, [1], SamplerConfig.official(**SMALL, suppress_tokens=(MASK,), suffix=(4, 5)))
    assert all(tail == [4, 5] for tail in seen) and text(output)[-2:] == [4, 5] and output.lengths == [10]


def test_unsure_tokens_are_written_last():
    rows = peaks([3, 1, 2, 4], [9, 3, 2, 8])
    config = SamplerConfig.llada(gen_length=4, block_length=4, steps=4, unsure_tokens=(3, 4))
    steps = {commit.position: commit.step for commit in run(network(rows), [], config).trace.commits}
    assert steps[1] == 0 and steps[2] == 1


@pytest.mark.parametrize("preset", [SamplerConfig.official, SamplerConfig.llada])
@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"remasking": "random"}, {"cfg_scale": 1.5}])
def test_a_seed_decides_everything(preset, settings):
    once, again = (run(network(), [1, 2], preset(**SMALL, **settings, suppress_tokens=(MASK,), seed=3)) for _ in range(2))
    assert once.sequences.equal(again.sequences)
    assert once.forwards == [16 if "cfg_scale" in settings else 8]
    if "cfg_scale" not in settings:
        others = [
            run(network(), [1, 2], preset(**SMALL, **settings, suppress_tokens=(MASK,), seed=seed)) for seed in range(4, 9)
        ]
        assert any(other.trace != once.trace for other in others)


def test_gumbel_noise_samples_the_softmax_at_the_temperature():
    logits, temperature = torch.tensor([0.0, 1.0, 2.0]), 0.7
    uniform = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = add_gumbel_noise(logits.expand(20000, -1), temperature, uniform).argmax(dim=-1).bincount(minlength=3) / 20000
    torch.testing.assert_close(drawn, (logits / temperature).softmax(dim=0), rtol=0, atol=0.015)


def test_rows_with_images_are_answered_as_alone():
    net, own = model(), processor()
    config = SamplerConfig.official(**SMALL)
    questions, pictures = ["What is shown?", "Which side is it on?"], [picture(1), picture(5)]
    both = net.generate(**own(pictures, questions), config=config)
    for row, (question, image) in enumerate(zip(questions, pictures, strict=True)):
        alone = net.generate(**own(image, question), config=config)
        assert text(both, row) == text(alone) and both.trace.of_row(row).replay(7, row) == alone.trace.replay(7)


def test_padding_on_the_left_is_hidden_but_moves_positions_as_in_the_reference():
    net = model()
    prompt, config = torch.tensor([[50, 60, 70]]), SamplerConfig.llada(**SMALL)
    padded = torch.tensor([[90, 90, 50, 60, 70], [90, 30, 50, 60, 70]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    other = torch.where(mask.bool(), padded, 80)
    whole = net.generate(padded, mask, config=config).sequences
    assert whole.equal(net.generate(other, mask, config=config).sequences)
    assert net.generate(prompt, config=config).lengths == [8]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (SamplerConfig, {"preset": "official"}),
        (SamplerConfig, {"suffix": (1,)}),
        (SamplerConfig, {"stop_sequences": ((1,),)}),
        (SamplerConfig, {"unsure_tokens": (1,)}),
        (SamplerConfig.official, {"stop_tokens": (1,)}),
        (SamplerConfig.official, {"cache": NO_CACHE}),
        (SamplerConfig.official, {"unsure_tokens": (1,)}),
        (SamplerConfig.llada, {"stop_sequences": ((1,),)}),
        (SamplerConfig.llada, {"min_length": 1}),
    ],
)
def test_settings_of_another_sampler_are_refused(make, settings):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(settings))}'"):
        make(**settings)


def test_an_empty_stop_sequence_is_refused():
    with pytest.raises(ValueError, match="a stop sequence is empty"):
        SamplerConfig.official(stop_sequences=((),))


@pytest.mark.parametrize("preset", [SamplerConfig.official, SamplerConfig.llada])
def test_lengths_and_steps_that_do_not_divide_are_refused(preset):
    with pytest.raises(ValueError, match="does not divide"):
        preset(gen_length=10, block_length=4)
    with pytest.raises(ValueError, match="not a multiple"):
        preset(gen_length=8, block_length=4, steps=3)
    with pytest.raises(ValueError, match="remasking"):
        preset(remasking="entropy")


def test_the_official_preset_takes_one_row():
    with pytest.raises(ValueError, match="one row at a time, not 2"):
        config = SamplerConfig.official(**SMALL)
        official.sample(network(), torch.ones(2, 3, dtype=torch.long), config, mask_token_id=MASK, fill_token_id=FILL)


def test_ids_and_embeddings_give_the_same_hidden_states():
    net, ids = model(), torch.tensor([[50, 60, 70, 80]])
    with torch.no_grad():
        by_ids, by_embeds = net(ids), net(inputs_embeds=net.get_input_embeddings()(ids))
    assert by_ids.logits.equal(by_embeds.logits)
    with pytest.raises(ValueError, match="one of the two"):
        net(ids, inputs_embeds=net.get_input_embeddings()(ids))
