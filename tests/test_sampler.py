"""The sampler on logits made by hand, and against Algorithm 1 as it is written for reading."""

import json
import re
from collections.abc import Callable

import pytest
import torch

from medv.diffusion.algorithm import sample_response
from medv.diffusion.config import SamplerConfig
from medv.diffusion.corruption import noise_generator
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import top_positions, transfer_counts

pytestmark = pytest.mark.usefixtures("untouched_generators")

MASK, FILL, STOP = 9, 8, 7
WORDS = 7  # ids 0 .. 6 are plain tokens


class Table:
    """A denoiser that always answers with the same logits [L, 10] for the response, whatever the canvas; it notes its calls."""

    def __init__(self, logits: torch.Tensor, unconditional: torch.Tensor | None = None, width: int = 2):
        self.logits, self.unconditional, self.width = logits, unconditional, width
        self.canvases, self.columns, self.unconditional_calls = [], [], 0

    def __call__(self, canvas, columns, *, unconditional=False):
        self.canvases.append(canvas.clone())
        self.columns.append(columns)
        self.unconditional_calls += unconditional
        table = self.unconditional if unconditional else self.logits
        own = slice(columns.start - self.width, columns.stop - self.width)
        return table[own].expand(len(canvas), -1, -1)


def confident(tokens: list[int], confidences: list[float]) -> torch.Tensor:
    """Logits [L, 10] that give tokens[i] the probability confidences[i] and share the rest among ids 0 .. 6."""
    logits = torch.full((len(tokens), MASK + 1), -torch.inf)
    for row, (token, p) in enumerate(zip(tokens, confidences, strict=True)):
        others = [i for i in range(WORDS) if i != token]
        logits[row, others] = torch.tensor((1 - p) / len(others)).log()
        logits[row, token] = torch.tensor(p).log()
    return logits


def run(denoise, rows: int = 1, **options):
    """Sample after a prompt of two tokens; nothing stops unless `stop_tokens` says so."""
    config = SamplerConfig(**{"stop_tokens": (), "suppress_tokens": ()} | options)
    prompt = torch.full((rows, 2), 5)
    return sample(denoise, prompt, config, mask_token_id=MASK, fill_token_id=FILL)


def order(output, row: int = 0) -> list[int]:
    """Positions in the order of their commits."""
    return [c.position for c in output.trace.commits if c.row == row]


# How many, and which.


@pytest.mark.parametrize(("masks", "steps"), [(32, 32), (32, 5), (8, 3), (3, 8), (64, 16), (1, 1), (7, 6)])
def test_transfer_counts_fill_all_masks_with_the_remainder_first(masks, steps):
    counts = transfer_counts(masks, steps)
    assert len(counts) == steps and sum(counts) == masks
    assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1


def test_the_most_confident_are_committed_first():
    confidences = [0.5, 0.9, 0.3, 0.8, 0.6, 0.95, 0.4, 0.7]
    output = run(Table(confident([1] * 8, confidences)), gen_length=8, block_length=8, steps=4)
    steps = [{c.position for c in output.trace.commits if c.step == s} for s in range(4)]
    assert steps == [{5, 1}, {3, 7}, {4, 0}, {6, 2}]
    noted = {c.position: c.confidence for c in output.trace.commits}
    assert [noted[i] for i in range(8)] == pytest.approx(confidences, rel=1e-5)


def test_of_equals_the_leftmost_is_committed():
    output = run(Table(confident([2] * 6, [0.5] * 6)), gen_length=6, block_length=6, steps=3)
    assert order(output) == [0, 1, 2, 3, 4, 5]
    marked = top_positions(torch.tensor([[0.1, 0.7, 0.7, 0.7]]), 2)
    assert marked.tolist() == [[False, True, True, False]]


def test_an_uneven_schedule_commits_the_remainder_first():
    output = run(Table(confident([2] * 8, [0.5] * 8)), gen_length=8, block_length=8, steps=3)
    assert [sum(c.step == s for c in output.trace.commits) for s in range(3)] == [3, 3, 2]


def test_with_as_many_steps_as_tokens_each_forward_commits_one():
    denoise = Table(torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
    output = run(denoise, gen_length=12, block_length=4, steps=12)
    assert [c.step for c in output.trace.commits] == list(range(12))
    assert output.forwards == [12] == [len(denoise.canvases)]


def test_no_more_forwards_than_tokens():
    denoise = Table(torch.randn(4, 10, generator=torch.Generator().manual_seed(0)))
    assert run(denoise, gen_length=4, block_length=4, steps=16).forwards == [4]


# Blocks.


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_block_never_writes_ahead_of_itself(remasking, temperature):
    denoise = Table(torch.randn(16, 10, generator=torch.Generator().manual_seed(1)))
    options = {"gen_length": 16, "block_length": 4, "steps": 8, "suppress_tokens": (MASK,)}
    output = run(denoise, rows=3, remasking=remasking, temperature=temperature, **options)
    assert all(c.position // 4 == c.step // 2 for c in output.trace.commits)
    for forward, (canvas, columns) in enumerate(zip(denoise.canvases, denoise.columns, strict=True)):
        block = forward // 2
        assert (columns.start, columns.stop) == (2 + 4 * block, 6 + 4 * block)
        assert (canvas[:, columns.stop :] == MASK).all(), "later blocks are still hidden"
        assert (canvas[:, 2 : columns.start] != MASK).all(), "earlier blocks are complete"
        assert (canvas[:, :2] == 5).all(), "the prompt is not written to"


def reading(seed: int) -> Callable:
    """A denoiser whose logits depend on every token of the canvas, and never predict the mask."""
    generator = torch.Generator().manual_seed(seed)
    base, mix = torch.randn(12, 10, generator=generator), torch.randn(12, 10, 12, 10, generator=generator)
    base[:, MASK] = -torch.inf

    def denoise(canvas, columns, *, unconditional=False):
        logits = torch.stack([base + mix[range(12), row].sum(dim=0) / 3 for row in canvas[:, 2:]])
        return logits[:, columns.start - 2 : columns.stop - 2]

    return denoise


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("block_length", "steps"), [(12, 12), (12, 5), (4, 6), (3, 12), (1, 12)])
def test_the_sampler_writes_what_algorithm_1_writes(block_length, steps, temperature):
    denoise, prompt = reading(block_length), torch.full((1, 2), 5)
    options = {"gen_length": 12, "block_length": block_length, "steps": steps, "temperature": temperature}
    output = run(denoise, **options, seed=3)
    expected = sample_response(denoise, prompt, **options, mask_token_id=MASK, generator=noise_generator(3, 0, 0))
    assert output.sequences.equal(expected)


def test_replaying_the_trace_ends_in_the_output():
    denoise = Table(torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
    options = {"gen_length": 12, "block_length": 4, "steps": 6, "temperature": 1.0, "suppress_tokens": (MASK,)}
    output = run(denoise, rows=2, **options)
    last = max(c.step for c in output.trace.commits)
    for row in range(2):
        assert output.trace.replay(last, row) == output.sequences[row].tolist()
        assert output.trace.of_row(row).replay(last, row) == output.sequences[row].tolist()
        assert output.trace.replay(-1, row) == [MASK] * 12
        for step, canvas in enumerate(denoise.canvases):
            assert output.trace.replay(step - 1, row) == canvas[row, 2:].tolist()
    columns = json.loads(json.dumps(output.trace.to_dict()))
    assert columns["position"] == [c.position for c in output.trace.commits] and columns["gen_length"] == 12


# Ends.


def test_an_early_stop_saves_forwards_and_fills_what_follows():
    tokens, confidences = [1, 2, STOP, 4, 5, 6, 1, 2], [0.5, 0.6, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9]
    logits = confident(tokens, confidences)
    output = run(Table(logits), gen_length=8, block_length=4, steps=8, stop_tokens=(STOP,))
    assert order(output) == [2, 1, 0], "nothing after the stop is written, nothing before it is left out"
    assert output.sequences.tolist() == [[1, 2] + [FILL] * 6]
    assert (output.lengths, output.finish_reason, output.forwards) == ([2], ["stop"], [3])


def test_a_stop_that_is_written_last_ends_after_its_block():
    logits = confident([1, STOP, 3, 4, 5, 6, 1, 2], [0.9, 0.4, 0.8, 0.7, 0.9, 0.9, 0.9, 0.9])
    output = run(Table(logits), gen_length=8, block_length=4, steps=8, stop_tokens=(STOP,))
    assert order(output) == [0, 2, 3, 1]
    assert (output.lengths, output.finish_reason, output.forwards) == ([1], ["stop"], [4])
    assert output.sequences.tolist() == [[1] + [FILL] * 7]


def test_the_first_of_two_stops_ends_the_response():
    logits = confident([1, STOP, 3, 6, 1, 1], [0.5, 0.6, 0.7, 0.9, 0.5, 0.5])
    output = run(Table(logits), gen_length=6, block_length=6, steps=6, stop_tokens=(6, STOP))
    assert order(output) == [3, 2, 1, 0] and output.lengths == [1]


def test_without_stop_tokens_nothing_ends_early():
    output = run(Table(confident([STOP] * 8, [0.9] * 8)), gen_length=8, block_length=4, steps=8)
    assert (output.lengths, output.finish_reason, output.forwards) == ([8], ["length"], [8])
    assert output.sequences.tolist() == [[STOP] * 8]


def test_an_empty_response_is_possible():
    output = run(Table(confident([STOP] * 4, [0.9] * 4)), gen_length=4, block_length=4, steps=4, stop_tokens=(STOP,))
    assert (output.lengths, output.finish_reason, output.forwards) == ([0], ["stop"], [1])


def test_rows_that_have_ended_are_left_alone_while_others_go_on():
    early, late = (confident([1, s, 3, 4, 5, 6, 1, 2], [0.8, 0.9] + [0.5] * 6) for s in (STOP, 2))

    def denoise(canvas, columns, *, unconditional=False):
        return torch.stack([early, late])[:, columns.start - 2 : columns.stop - 2]

    output = run(denoise, rows=2, gen_length=8, block_length=4, steps=8, stop_tokens=(STOP,))
    assert output.forwards == [2, 8] and output.lengths == [1, 8] and output.finish_reason == ["stop", "length"]
    assert order(output, 0) == [1, 0] and len(order(output, 1)) == 8


# What may be written.


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_suppressed_tokens_never_appear(temperature, cfg_scale):
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 3, MASK]] += 5
    denoise = Table(logits, unconditional=logits.flip(0))
    options = {"gen_length": 64, "block_length": 32, "steps": 16, "temperature": temperature, "cfg_scale": cfg_scale}
    output = run(denoise, rows=4, suppress_tokens=(0, 3, MASK), **options)
    assert not torch.isin(output.sequences, torch.tensor([0, 3, MASK])).any()
    assert torch.isin(run(denoise, rows=4, **options).sequences, torch.tensor([0, 3, MASK])).any()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"remasking": "random"}, {"cfg_scale": 1e39}], ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused_and_never_an_answer(options, wrong):
    logits = confident([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6])
    logits[2] = wrong
    with pytest.raises(ValueError, match=r"confidence nan, .* not finite; take another model, or bfloat16"):
        run(Table(logits, logits), gen_length=4, block_length=2, steps=4, **options)


def test_the_logits_of_the_denoiser_are_not_written_to():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    run(Table(logits), gen_length=4, block_length=4, steps=4, suppress_tokens=(0, MASK))
    assert logits.equal(before)


def test_guidance_counts_two_forwards_and_weighs_as_written():
    conditional, unconditional = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(2))
    denoise = Table(conditional, unconditional)
    output = run(denoise, gen_length=6, block_length=6, steps=6, cfg_scale=1.5)
    assert output.forwards == [12] == [len(denoise.canvases)] and denoise.unconditional_calls == 6
    guided = unconditional + 2.5 * (conditional - unconditional)
    assert output.sequences[0].tolist() == guided.argmax(-1).tolist() != conditional.argmax(-1).tolist()
    noted = {c.position: c.confidence for c in output.trace.commits}
    assert [noted[i] for i in range(6)] == pytest.approx(guided.softmax(-1).amax(-1).tolist(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_tempered_softmax(temperature):
    logits, count = torch.tensor([2.0, 0.5, -0.5, 1.0]), 8000
    table = Table(logits.expand(count, 4))
    output = run(table, gen_length=count, block_length=count, steps=1, temperature=temperature)
    observed = output.sequences[0].bincount(minlength=4).double()
    expected = count * (logits.double() / temperature).softmax(-1)
    assert ((observed - expected) ** 2 / expected).sum() < 16.27, "chi-square with 3 degrees of freedom at 0.001"


def test_confidence_is_the_probability_without_temperature():
    logits = confident([1, 2, 3], [0.9, 0.8, 0.7])
    output = run(Table(logits), gen_length=3, block_length=3, steps=3, temperature=0.7)
    for c in output.trace.commits:
        assert c.confidence == pytest.approx(logits[c.position].softmax(-1)[c.token].item(), rel=1e-5)


@pytest.mark.slow
def test_random_remasking_takes_positions_in_an_order_of_the_seed():
    logits = confident([1] * 16, [0.9 - 0.05 * i for i in range(16)])
    options = {"gen_length": 16, "block_length": 16, "steps": 16, "remasking": "random"}
    orders = [order(run(Table(logits), seed=seed, **options)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])
    firsts = [order(run(Table(logits), seed=seed, **options))[0] for seed in range(100)]
    assert len(set(firsts)) > 12, "any position can be the first"


def test_the_global_generator_does_not_matter():
    denoise = Table(torch.randn(8, 10, generator=torch.Generator().manual_seed(0)))
    options = {"gen_length": 8, "block_length": 8, "steps": 8, "temperature": 1.0, "remasking": "random"}
    first = run(denoise, **options)
    with torch.random.fork_rng():
        torch.manual_seed(999)
        assert run(denoise, **options).sequences.equal(first.sequences)


# Refusals.


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"gen_length": 64, "block_length": 24, "steps": 64}, "block_length 24 does not divide gen_length 64"),
        ({"gen_length": 8, "block_length": 16, "steps": 8}, "block_length 16 does not divide gen_length 8"),
        ({"gen_length": 64, "block_length": 16, "steps": 30}, "steps 30 is not a multiple of the 4 blocks"),
        ({"gen_length": 64, "block_length": 16, "steps": 3}, "steps 3 is not a multiple of the 4 blocks"),
    ],
)
def test_an_indivisible_schedule_is_refused_with_a_value_that_works(options, value):
    with pytest.raises(ValueError, match=value) as refusal:
        SamplerConfig(**options)
    offered = int(re.findall(r"\d+", str(refusal.value))[-1])
    name = "block_length" if "block_length" in str(refusal.value) else "steps"
    SamplerConfig(**options | {name: offered})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"gen_length": -1}, "gen_length is -1"),
        ({"block_length": 0}, "block_length is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"cfg_scale": -1.0}, "cfg_scale is -1.0"),
        ({"remasking": "entropy"}, "unknown remasking 'entropy': use one of low_confidence, random"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplerConfig(**options)
