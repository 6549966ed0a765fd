"""The chosen length: where an exact end stands, read row by row, filled as an infilling, and never in the way of the rest."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from command import run, save_picture
from test_sampler import FILL, MASK, STOP, Table, confident
from tiny import QUESTIONS, model, picture, processor

from medv.companion.explorer.session import Setting
from medv.diffusion.caching import CACHES
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import DuplicateVeto
from medv.diffusion.length import ChosenLength, length_named
from medv.diffusion.revision import RevealRemask
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import SCHEDULES
from medv.diffusion.trace import drain
from medv.model.length import stream

pytestmark = pytest.mark.usefixtures("untouched_generators")

AUTO, LOW = ChosenLength(), ChosenLength(0.06)
BASE = SamplerConfig(gen_length=16, block_length=8, steps=8, length=LOW)
WAYS = {
    "one block": replace(BASE, block_length=16),
    **{f"schedule {name}": replace(BASE, schedule=SCHEDULES[name]) for name in ("shift", "threshold", "budgeted")},
    **{f"cache {name}": replace(BASE, cache=CACHES[name]) for name in ("prefix", "dual")},
    "veto": replace(BASE, filters=(DuplicateVeto(),)),
    "revision": replace(BASE, revision=RevealRemask(0.25)),
    "drawn": replace(BASE, temperature=0.8, remasking="random", seed=3),
    "guidance": replace(BASE, cfg_scale=1.0),
    "shortest": replace(BASE, length=replace(LOW, shortest=9)),
}


def sampled(denoise, rows: int = 1, **options):
    """Sample after a prompt of two tokens."""
    config, ids = (
        SamplerConfig(suppress_tokens=(), **{"stop_tokens": ()} | options),
        {"mask_token_id": MASK, "fill_token_id": FILL},
    )
    return drain(stream(denoise, torch.full((rows, 2), 5), config, **ids))


def ending(places: list[int], size: int = 12):
    """A denoiser of rows that say one word up to their places and then end."""

    def denoise(canvas, columns, *, unconditional=False):
        logits = torch.full((len(canvas), columns.stop - columns.start, MASK + 1), -9.0)
        for row, place in enumerate(places):
            for column in range(columns.start, columns.stop):
                logits[row, column - columns.start, 1 if column - 2 < place else STOP if column - 2 == place else FILL] = 9.0
        return logits

    return denoise


@pytest.fixture(scope="module")
def network():
    """A random model whose end token is likely at some masked positions and unlikely at others."""
    built = model()
    with torch.no_grad():
        built.lm_head.weight[built.config.stop_token_ids[0]] = built.lm_head.weight[40] * 2
    return built


def asked(rows=range(4)) -> dict:
    return processor()(images=[picture(i) for i in rows], text=[QUESTIONS[i] for i in rows])


def by_hand(network, config: SamplerConfig, row: int) -> tuple[torch.Tensor, int]:
    """The response with ends of one request and its length, position by position from plain probabilities."""
    inputs, own = asked([row]), network.config
    canvas = torch.full((1, config.gen_length), own.mask_token_id)
    images = network.model.get_image_features(inputs["pixel_values"])
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = torch.cat([inputs["input_ids"], canvas], dim=1)
        logits = network(ids, image_features=images, logits_to_keep=slice(width, None)).logits[0]
    length = config.length.shortest
    for place in range(config.length.shortest, config.gen_length):
        p = logits[place].softmax(dim=-1)
        length += sum(float(p[token]) for token in {*own.stop_token_ids, own.fill_token_id}) < config.length.threshold
    length = min(length, config.gen_length - 1)
    for place in range(length, config.gen_length):
        canvas[0, place] = own.fill_token_id if place > length else own.stop_token_ids[0]
    return canvas, length


def test_the_length_is_the_place_of_an_exact_end():
    places = [1, 5, 0, 11, 12, 7]
    options = {"gen_length": 12, "block_length": 4, "steps": 12, "stop_tokens": (STOP,), "length": AUTO}
    output = sampled(ending(places), rows=6, **options)
    assert output.lengths == [1, 5, 1, 11, 11, 7], "at least one token and an end"
    assert output.finish_reason == ["stop"] * 6
    for row in (0, 1, 3, 4, 5):
        length = output.lengths[row]
        assert output.sequences[row].tolist() == [1] * length + [FILL] * (12 - length)
    assert output.forwards == [1 + length for length in output.lengths], "one for the choice, one a token"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sampling_is_an_infilling_before_ends_set_by_hand_whatever_the_batch(network, way):
    config = WAYS[way]
    plain = replace(config, length=None)
    together = network.generate(**asked(range(3)), config=config, row_indices=[0, 1, 2])
    for row in range(3):
        response, length = by_hand(network, config, row)
        filled = network.generate(**asked([row]), config=plain, row_indices=[row], response=response)
        alone = network.generate(**asked([row]), config=config, row_indices=[row])
        assert together.lengths[row] == alone.lengths[0] == filled.lengths[0] == length
        assert together.sequences[row].equal(filled.sequences[0]) and alone.sequences.equal(filled.sequences)
        assert together.forwards[row] == alone.forwards[0] == filled.forwards[0] + 1


def test_the_answers_above_have_different_lengths(network):
    assert len({by_hand(network, BASE, row)[1] for row in range(3)}) == 3


@pytest.mark.parametrize("block", [16, 8])
@pytest.mark.parametrize("other", [{}, {"schedule": SCHEDULES["entropy"]}, {"temperature": 0.7}])
def test_the_shortest_length_of_a_whole_canvas_is_the_fixed_canvas(network, block, other):
    config = replace(BASE, block_length=block, length=ChosenLength(shortest=16), **other)
    chosen, fixed = (network.generate(**asked(), config=each) for each in (config, replace(config, length=None)))
    assert chosen.sequences.equal(fixed.sequences) and chosen.trace == fixed.trace
    assert (chosen.lengths, chosen.forwards, chosen.finish_reason) == (fixed.lengths, fixed.forwards, fixed.finish_reason)


def test_a_lower_threshold_never_chooses_a_longer_answer_and_min_length_is_kept(network):
    lengths = []
    for threshold in (0.5, 0.1, 0.05, 0.001):
        lengths.append(network.generate(**asked(), config=replace(BASE, length=ChosenLength(threshold))).lengths)
    assert all(a >= b for many, few in pairwise(lengths) for a, b in zip(many, few, strict=True))
    assert lengths[0] != lengths[-1]
    least = network.generate(**asked(), config=replace(BASE, min_length=12, length=ChosenLength(0.001)))
    assert min(least.lengths) == 12


def test_what_cannot_be_chosen_is_refused_in_a_sentence(network):
    table = Table(confident([1] * 8, [0.5] * 8))
    options = {"gen_length": 8, "block_length": 8, "steps": 8, "length": AUTO}
    with pytest.raises(ValueError, match="stop_tokens names none"):
        sampled(table, **options)
    with pytest.raises(ValueError, match="leave out either"):
        network.generate(**asked(), config=BASE, response=torch.full((4, 16), network.config.mask_token_id))
    with pytest.raises(ValueError, match=r"`medv\.model\.length` chooses a length before"):
        sample(table, torch.full((1, 2), 5), SamplerConfig(**options), mask_token_id=MASK, fill_token_id=FILL)
    for bad in ({"threshold": 0}, {"threshold": 1.0}, {"shortest": 0}):
        with pytest.raises(ValueError, match="must be"):
            ChosenLength(**bad)
    with pytest.raises(ValueError, match="at most 16"):
        replace(BASE, length=ChosenLength(shortest=17))
    with pytest.raises(ValueError, match="use one of canvas, auto"):
        length_named("short")


def test_the_command_line_chooses_and_says_what_it_does_not_know(tmp_path, model_dir):
    save_picture(tmp_path / "a.png", "rgb")
    command = ["ask", tmp_path / "a.png", "What is shown?", "--model", model_dir, "--json"]
    command += ["--gen-length", "8", "--block-length", "8", "--steps", "8"]
    plain, auto = (json.loads(run(*command, *more).stdout) for more in ((), ("--length", "auto")))
    assert auto["forwards"] == auto["tokens"] + 1 and plain["forwards"] <= 8
    assert "use one of canvas, auto" in run(*command, "--length", "long").stderr
    assert "no length" in run(*command, "--length", "auto", "--preset", "official").stderr


def test_a_setting_of_the_explorer_with_a_chosen_length_has_a_line_of_its_own():
    plain, auto = Setting(), Setting(length="auto")
    assert plain.config().length is None and auto.config().length == ChosenLength()
    assert auto.family() == f"{plain.family()}, length auto"
