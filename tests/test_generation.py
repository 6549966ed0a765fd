"""Answers of a whole model: each row of a batch is what it is alone, and the model's own token rules hold."""

from dataclasses import replace

import pytest
import torch
from tiny import QUESTIONS, model, picture, processor, special

from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import sample

pytestmark = pytest.mark.usefixtures("untouched_generators")

BASE = SamplerConfig(gen_length=16, block_length=8, steps=8)
WAYS = {
    "greedy": BASE,
    "uneven": replace(BASE, steps=6),
    "never stops": replace(BASE, stop_tokens=()),
    "temperature": replace(BASE, temperature=0.8, seed=3),
    "random": replace(BASE, remasking="random", seed=5),
    "random and temperature": replace(BASE, remasking="random", temperature=1.0, block_length=4),
    "guidance": replace(BASE, cfg_scale=1.5),
    "guidance and temperature": replace(BASE, cfg_scale=0.5, temperature=1.0),
}


@pytest.fixture(scope="module")
def network():
    """A random model for which stop tokens are likely enough that some answers end early."""
    built = model()
    stops = list(built.config.stop_token_ids)
    # Hidden states have no mean, so a stop needs a direction of its own: that of one frequent token, a little shorter.
    with torch.no_grad():
        built.lm_head.weight[stops[0]] = built.lm_head.weight[40] * 1.05
    return built


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_image", [True, False])
def test_a_batch_gives_what_its_single_runs_give(network, way, with_image):
    config, names = WAYS[way], [11, 4, 7, 100]
    images = [picture(i) for i in range(4)] if with_image else None
    inputs = processor()(images=images, text=QUESTIONS)
    assert not inputs["attention_mask"].all(), "the prompts are ragged"
    batch = network.generate(**inputs, config=config, row_indices=names)
    for row, question in enumerate(QUESTIONS):
        alone = network.generate(
            **processor()(images=images and images[row], text=question), config=config, row_indices=[names[row]]
        )
        assert batch.sequences[row].equal(alone.sequences[0]), question
        for name in ("lengths", "forwards", "finish_reason"):
            assert getattr(batch, name)[row] == getattr(alone, name)[0], name
        own = batch.trace.of_row(row).commits
        assert [(c.position, c.token) for c in own] == [(c.position, c.token) for c in alone.trace.commits]
        assert [c.confidence for c in own] == pytest.approx([c.confidence for c in alone.trace.commits], abs=1e-5)


def test_the_batches_above_hold_early_ends_and_full_ones(network):
    inputs = processor()(images=[picture(i) for i in range(4)], text=QUESTIONS)
    reasons = [r for way in WAYS.values() for r in network.generate(**inputs, config=way).finish_reason]
    assert {"stop", "length"} == set(reasons)


def test_rows_with_the_same_name_draw_the_same_and_others_differ(network):
    inputs = processor()(images=[picture(0)] * 3, text=[QUESTIONS[0]] * 3)
    config = replace(BASE, temperature=1.0, stop_tokens=())
    sequences = network.generate(**inputs, config=config, row_indices=[5, 5, 6]).sequences
    assert sequences[0].equal(sequences[1]) and not sequences[0].equal(sequences[2])
    default = network.generate(**inputs, config=config).sequences
    assert default.equal(network.generate(**inputs, config=config, row_indices=[0, 1, 2]).sequences)


def test_guidance_hides_prompt_and_image_from_the_unconditional_call(network):
    inputs = processor()(images=picture(2), text=QUESTIONS[1])
    width = inputs["input_ids"].shape[1]
    config = replace(BASE, cfg_scale=2.0, suppress_tokens=network.config.suppress_token_ids, stop_tokens=())

    def denoise(canvas, columns, *, unconditional=False):
        if unconditional:
            hidden = canvas.clone()
            hidden[:, :width] = special().mask
            return network(hidden).logits[:, columns]
        return network(canvas, pixel_values=inputs["pixel_values"]).logits[:, columns]

    ids = {"mask_token_id": special().mask, "fill_token_id": special().end_of_text}
    expected = sample(denoise, inputs["input_ids"], config, **ids)
    output = network.generate(**inputs, config=config)
    assert output.sequences.equal(expected.sequences)
    assert not output.sequences.equal(network.generate(**inputs, config=replace(config, cfg_scale=0.0)).sequences)


def test_the_models_own_suppressed_and_stop_tokens_hold_unless_the_call_says_otherwise(network):
    inputs = processor()(images=[picture(i) for i in range(4)], text=QUESTIONS)
    hot = replace(BASE, temperature=5.0, gen_length=64, block_length=32, steps=16)
    never = torch.tensor(list(network.config.suppress_token_ids))
    output = network.generate(**inputs, config=replace(hot, stop_tokens=()))
    assert not torch.isin(output.sequences, never).any()
    free = network.generate(**inputs, config=replace(hot, stop_tokens=(), suppress_tokens=()))
    assert torch.isin(free.sequences, never).any()
    assert (free.sequences != special().image).all(), "an image placeholder in an answer would have no visual token"
    asked = int(free.sequences[0, 5])
    stopped = network.generate(**inputs, config=replace(hot, stop_tokens=(asked,), suppress_tokens=()))
    assert stopped.finish_reason[0] == "stop" and stopped.lengths[0] <= 5


def test_a_mask_is_never_an_answer_whatever_may_be_said():
    sure = model()
    mask = sure.config.mask_token_id
    inputs = processor()(images=picture(0), text=QUESTIONS[0])
    with torch.no_grad():  # a head of its own, for which the mask is always best
        state = sure.model(**inputs)[0, -1]
        sure.lm_head.weight = torch.nn.Parameter(sure.lm_head.weight.clone())
        sure.lm_head.weight[mask] = 100 * state / state.norm()
    for suppressed in (None, ()):
        output = sure.generate(**inputs, config=replace(BASE, stop_tokens=(), suppress_tokens=suppressed))
        assert not (output.sequences == mask).any()


@pytest.mark.parametrize("token", [-1, 10_000])
@pytest.mark.parametrize("name", ["suppress_tokens", "stop_tokens"])
def test_a_token_outside_the_vocabulary_is_refused_and_never_left_without_effect(network, name, token):
    inputs = processor()(images=picture(0), text=QUESTIONS[0])
    with pytest.raises(ValueError, match=f"a suppressed or stop token is {token}: it must be at"):
        network.generate(**inputs, config=replace(BASE, **{name: (token,)}))


def test_a_response_is_decoded_without_special_tokens():
    ids = processor().tokenizer.encode("on the left", add_special_tokens=False)
    row = [*ids, special().end_of_turn, special().end_of_text]
    assert processor().decode_response(row, len(ids)) == "on the left"
    assert processor().decode_response(torch.tensor(row)) == "on the left"
