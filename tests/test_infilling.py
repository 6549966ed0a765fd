"""Infilling: fixed tokens of a response stay, open ones are written, and with nothing fixed it is `generate`."""

import random
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from test_fast import prompts, same
from test_sampler import FILL, MASK, STOP, Table, confident, reading

from medv.diffusion.algorithm import sample_response
from medv.diffusion.caching import NO_CACHE, DualCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.diffusion.corruption import noise_generator
from medv.diffusion.filters import DuplicateVeto, MinSpacing
from medv.diffusion.revision import ReMDM, RevealRemask
from medv.diffusion.sampler import sample, stream
from medv.diffusion.schedules import SCHEDULES, BudgetedSchedule
from medv.diffusion.trace import COMMIT, Trace, drain

pytestmark = pytest.mark.usefixtures("untouched_generators")

REVISIONS = (None, RevealRemask(0.25), ReMDM("cap", eta=0.5), ReMDM("loop", eta=0.5))
FILTERS = ((), (MinSpacing(2), DuplicateVeto(0.8)))
CACHES = (NO_CACHE, PrefixCache(2), DualCache())


@pytest.fixture(scope="module")
def network():
    return tiny.model()


def partly(number: int, rows: int, length: int, mask: int) -> torch.Tensor:
    """Plain tokens and masks in random shares: nothing fixed in the first row of several, the last quarter of the last row."""
    generator = torch.Generator().manual_seed(number)
    share = torch.rand(rows, 1, generator=generator)
    tokens = torch.randint(60, 250, (rows, length), generator=generator)
    hidden = torch.rand(rows, length, generator=generator) < share
    hidden[0] |= rows > 1
    hidden[-1, -length // 4 :] = False
    return tokens.masked_fill(hidden, mask)


def case(number: int, schedule, filters, revision, cache) -> tuple[SamplerConfig, dict]:
    """A configuration and inputs with a response, drawn by number."""
    draw = random.Random(number)
    length, block = draw.choice(((8, 8), (12, 4), (16, 8), (16, 2)))
    config = SamplerConfig(
        gen_length=length,
        block_length=block,
        steps=length // block * draw.randint(1, block),
        temperature=draw.choice((0.0, 0.0, 1.0)),
        cfg_scale=draw.choice((0.0, 0.0, 1.5)),
        remasking=draw.choice(("low_confidence", "low_confidence", "random")),
        stop_tokens=draw.choice((None, (), tuple(draw.sample(range(60), 9)))),
        seed=number,
        schedule=schedule,
        filters=filters,
        revision=revision,
        cache=cache,
    )
    inputs = prompts([draw.randrange(8) for _ in range(draw.choice((1, 2, 3)))])
    return config, inputs | {"response": partly(number, len(inputs["input_ids"]), length, tiny.special().mask)}


def all_cases():
    for number, parts in enumerate(product(SCHEDULES.values(), FILTERS, REVISIONS, CACHES)):
        yield case(number, *parts)


# What is fixed stays.


@pytest.mark.parametrize("part", range(4))
def test_fixed_tokens_never_change_and_open_ones_are_written(network, part):
    mask = tiny.special().mask
    for config, inputs in list(all_cases())[part::4]:
        response = inputs["response"]
        fixed = response != mask
        output, canvases = network.generate(**inputs, config=config), []
        assert output.sequences[fixed].equal(response[fixed]), config
        assert all(not fixed[event.row, event.position] for event in output.trace.events), "and none is ever touched"
        for row, length in enumerate(output.lengths):
            canvases.append(output.trace.replay(10**6, row)[:length])
            assert canvases[row] == output.sequences[row, :length].tolist()
            assert mask not in canvases[row], "nothing before the end stays open"
            assert output.trace.replay(-1, row) == response[row].tolist()
            blocks = response[row].eq(mask).unflatten(0, (config.blocks, -1)).any(dim=1).sum()
            spent = output.forwards[row] / (2 if config.cfg_scale else 1)
            most = config.blocks if config.schedule.across_blocks else blocks  # forwards may go to another block
            assert spent <= most * (config.steps // config.blocks), "a block without open positions takes no forward"


def test_a_decoder_fills_what_the_forward_of_the_model_fills(network):
    for config, inputs in all_cases():
        if config.cache == NO_CACHE:
            assert same(network.generate(**inputs, config=config), network.generate(**inputs, config=config, reference=True))


def test_a_cache_that_is_refreshed_at_every_forward_fills_the_same(network):
    for number, schedule in enumerate(SCHEDULES.values()):
        config, inputs = case(500 + number, schedule, (), None, PrefixCache(1))
        assert same(
            network.generate(**inputs, config=config), network.generate(**inputs, config=replace(config, cache=NO_CACHE))
        )


def test_fixed_tokens_of_later_blocks_are_seen_from_the_first_forward(network):
    response = torch.full((1, 16), tiny.special().mask)
    for cache in CACHES:
        config, first = SamplerConfig(16, 8, 16, stop_tokens=(), cache=cache), {}
        for token in (70, 90):
            response[0, 12] = token
            steps = network.stream(**prompts([0]), config=config, response=response)
            first[token] = next(steps)[0].confidence
        assert first[70] != first[90], cache


# Nothing fixed.


def test_with_nothing_fixed_it_is_generate_bit_for_bit(network):
    for number, (config, inputs) in list(enumerate(all_cases()))[::5]:
        inputs["response"].fill_(tiny.special().mask)
        inputs["reference"] = number % 2 == 0 and config.cache == NO_CACHE
        given = network.generate(**inputs, config=config)
        plain = network.generate(**{name: part for name, part in inputs.items() if name != "response"}, config=config)
        assert given.sequences.equal(plain.sequences) and given.trace == plain.trace and given.forwards == plain.forwards


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_row_draws_the_same_alone_and_in_a_ragged_batch(network, name):
    for number, revision in enumerate(REVISIONS):
        config = SamplerConfig(16, 4, 8, schedule=SCHEDULES[name], revision=revision, temperature=number % 2, seed=number)
        rows, response = [0, 3, 1], partly(number, 3, 16, tiny.special().mask)
        together = network.generate(**prompts(rows), config=config, response=response)
        for place, row in enumerate(rows):
            own = {"response": response[place : place + 1], "row_indices": [place]}
            alone = network.generate(**prompts([row]), config=config, **own)
            assert alone.sequences[0].equal(together.sequences[place]), (name, revision, place)
            assert alone.forwards == [together.forwards[place]]
        nothing = network.generate(**prompts(rows[:1]), config=config)
        assert nothing.sequences[0].equal(together.sequences[0]), "the first row has nothing fixed"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("block_length", "steps"), [(12, 12), (12, 5), (4, 6), (3, 12)])
def test_the_sampler_fills_what_algorithm_1_fills(block_length, steps, temperature):
    prompt = torch.full((1, 2), 5)
    options = {"gen_length": 12, "block_length": block_length, "steps": steps, "temperature": temperature}
    for number in range(6):
        denoise = reading(number)
        response = partly(number, 1, 12, MASK) % 7
        response[partly(number, 1, 12, MASK) == MASK] = MASK
        output = sample(
            denoise,
            prompt,
            SamplerConfig(**options, stop_tokens=(), suppress_tokens=(), seed=number),
            mask_token_id=MASK,
            fill_token_id=FILL,
            response=response,
        )
        noise = noise_generator(number, 0, 0)
        assert output.sequences.equal(
            sample_response(denoise, prompt, **options, mask_token_id=MASK, generator=noise, response=response)
        )


# Forwards and ends.


def filled(response: list[int], confidences: list[float], tokens: list[int] | None = None, **options):
    """One row filled by a table of logits, which asks for `tokens` (default: all 1)."""
    logits = confident(tokens or [1] * len(response), confidences)
    config = SamplerConfig(**{"gen_length": len(response), "stop_tokens": (STOP,), "suppress_tokens": ()} | options)
    ids = {"mask_token_id": MASK, "fill_token_id": FILL}
    return sample(Table(logits), torch.full((1, 2), 5), config, response=torch.tensor([response]), **ids)


def test_a_block_takes_no_more_forwards_than_it_has_open_positions():
    response = [2] * 4 + [MASK, 2, 2, MASK] + [MASK] * 4
    output = filled(response, [0.5] * 12, block_length=4, steps=9)
    assert output.forwards == [0 + 2 + 3] and [c.step for c in output.trace.commits] == [0, 1, 2, 2, 3, 4]
    assert filled([2] * 8, [0.5] * 8, block_length=4, steps=8).forwards == [0], "nothing is open"


def test_forwards_are_budgeted_over_the_open_positions():
    response = [MASK] + [2] * 7 + [MASK] * 8
    for steps in (4, 8):
        output = filled(response, [0.5] * 16, block_length=4, steps=steps, schedule=BudgetedSchedule())
        assert output.forwards == [steps] and output.sequences[0, 1:8].tolist() == [2] * 7


def test_a_fixed_stop_ends_the_row_as_a_written_one_does():
    output = filled([MASK, 2, MASK, STOP, MASK, 3], [0.9] * 6, block_length=3, steps=6)
    assert output.sequences.tolist() == [[1, 2, 1, STOP, FILL, FILL]] or output.sequences.tolist() == [[1, 2, 1] + [FILL] * 3]
    assert (output.lengths, output.finish_reason, output.forwards) == ([3], ["stop"], [2])


def test_no_stop_is_written_in_front_of_a_fixed_token():
    logits = [0.9, 0.9, 0.9, 0.9]
    output = filled([MASK, MASK, 2, MASK], logits, [STOP] * 4, block_length=4, steps=4)
    assert output.lengths == [3] and STOP not in output.sequences[0, :2] and output.sequences[0, 2] == 2


def test_a_trace_holds_what_was_fixed_also_as_json():
    response = [MASK, 2, MASK, 3]
    output = filled(response, [0.9] * 4, block_length=4, steps=4)
    assert output.trace.replay(-1) == response and output.trace.replay(9) == [1, 2, 1, 3]
    again = Trace.from_dict(output.trace.to_dict())
    assert again == output.trace and again.of_row(0) == again and again.of_row(1).replay(9) == [MASK] * 4
    assert len(again.commits) == 2 and all(event.kind == COMMIT for event in again.commits)
    broken = output.trace.to_dict()
    for columns, words in (({"row": [0]}, "have the columns"), ({"row": [0], "position": [9], "token": [1]}, "lie below")):
        with pytest.raises(ValueError, match=words):
            Trace.from_dict(broken | {"fixed": columns})
    with pytest.raises(ValueError, match="writes where a token stands"):
        Trace.from_dict(broken | {"fixed": {"row": [0], "position": [0], "token": [1]}})


# Refusals.


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (torch.zeros(1, 8).long(), r"shape \(1, 8\): give it 2 rows and gen_length 8"),
        (torch.zeros(2, 9).long(), r"shape \(2, 9\)"),
        (torch.zeros(2, 8), "of torch.float32: give a tensor of token ids, torch.int64"),
        ([[0] * 8] * 2, "of list: give a tensor"),
        (torch.full((2, 8), -1), "the id -1: ids are between 0 and"),
        (torch.full((2, 8), 10**6), "the id 1000000"),
        (torch.full((2, 8), tiny.special().image), "placeholder of an image"),
    ],
)
def test_what_is_no_response_is_refused_in_words(network, response, words):
    with pytest.raises(ValueError, match=words):
        network.generate(**prompts([0, 1]), config=SamplerConfig(8, 8, 8), response=response)


def test_the_presets_and_the_twin_refuse_a_response(network):
    from medv.model.twin import causal_twin

    response = torch.full((1, 8), tiny.special().mask)
    for config in (SamplerConfig.official(8, 8, 8), SamplerConfig.llada(8, 8, 8)):
        with pytest.raises(ValueError, match="cannot keep tokens of a response"):
            network.generate(**prompts([0]), config=config, response=response)
    with pytest.raises(ValueError, match="has no option response"):
        causal_twin(network).generate(**prompts([0]), config=SamplerConfig(8, 8, 8), response=response)


def test_a_negative_id_is_refused_by_the_sampler_itself():
    with pytest.raises(ValueError, match="the id -2: ids are at least 0"):
        filled([-2, MASK], [0.5] * 2, block_length=2, steps=2)
    steps = stream(
        Table(confident([1], [0.5])), torch.full((1, 2), 5), SamplerConfig(1, 1, 1), mask_token_id=MASK, fill_token_id=FILL
    )
    assert drain(steps).trace.fixed == ()
