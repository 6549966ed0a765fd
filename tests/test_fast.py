"""The decoder gives what the whole forward gives, case by case; caches are exact where they must be and valid elsewhere."""

import copy
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import QUESTIONS, model, picture, processor, shape, special
from torch.utils._python_dispatch import TorchDispatchMode

from medv.checkpoints.assembly import shape_config
from medv.diffusion.algorithm import sample_response
from medv.diffusion.caching import DualCache, NoCache, PrefixCache
from medv.diffusion.config import SamplerConfig
from medv.diffusion.corruption import noise_generator
from medv.diffusion.filters import DuplicateVeto, MinSpacing, PhraseVeto
from medv.diffusion.revision import ReMDM, RevealRemask
from medv.diffusion.sampler import log_confidence, sample
from medv.diffusion.schedules import BudgetedSchedule, EntropyBoundSchedule, FactorSchedule, FixedSchedule, ThresholdSchedule
from medv.diffusion.trace import REMASK
from medv.model import decoding
from medv.model.decoding import Decoder
from medv.model.modeling import MedVForMaskedDiffusion

CASES = 240
BASE = SamplerConfig(gen_length=16, block_length=8, steps=16)


def with_stops(network: MedVForMaskedDiffusion) -> MedVForMaskedDiffusion:
    """Make a stop token about as likely as one frequent token, so that some answers end early."""
    with torch.no_grad():
        network.lm_head.weight[network.config.stop_token_ids[0]] = network.lm_head.weight[40] * 1.05
    return network


@pytest.fixture(scope="module")
def network() -> MedVForMaskedDiffusion:
    return with_stops(model())


def prompts(rows: list[int], *, images: bool = True):
    """Ragged prompts of these questions."""
    return dict(processed(tuple(rows), images))


@cache
def processed(rows: tuple[int, ...], images: bool):
    return processor()(images=[picture(r) for r in rows] if images else None, text=[QUESTIONS[r % 4] for r in rows])


def story(output) -> list[tuple]:
    """What was written, in order."""
    return [commit[:4] for commit in output.trace.commits]


def same(one, other) -> bool:
    """Identical sequences, commit order, counts and ends; confidences up to rounding."""
    assert one.sequences.equal(other.sequences)
    assert story(one) == story(other)
    assert (one.lengths, one.forwards, one.finish_reason) == (other.lengths, other.forwards, other.finish_reason)
    confidences = [[c.confidence for c in output.trace.commits] for output in (one, other)]
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-5)
    return True


def drawn_case(number: int) -> tuple[SamplerConfig, dict]:
    """A configuration and prompts that depend on the number."""
    draw = random.Random(number)
    length = draw.choice((4, 8, 12, 16))
    block = draw.choice([b for b in (1, 2, 3, 4, 6, 8, 12, 16) if length % b == 0])
    blocks = length // block
    config = SamplerConfig(
        gen_length=length,
        block_length=block,
        steps=blocks * draw.randint(1, block + 1),
        temperature=draw.choice((0.0, 0.0, 0.0, 0.7, 1.5)),
        cfg_scale=draw.choice((0.0, 0.0, 1.0, 2.5)),
        remasking=draw.choice(("low_confidence", "low_confidence", "low_confidence", "random")),
        stop_tokens=draw.choice((None, (), tuple(draw.sample(range(300), 9)))),
        seed=draw.randint(0, 99),
    )
    rows = [draw.randrange(8) for _ in range(draw.choice((1, 1, 2, 3, 4)))]
    return config, prompts(rows, images=draw.random() < 0.5)


# Exactness.


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_decoder_writes_what_the_forward_of_the_model_writes(network, part):
    ended = Counter()
    for number in range(part, CASES, 8):
        config, inputs = drawn_case(number)
        fast = network.generate(**inputs, config=config)
        assert same(fast, network.generate(**inputs, config=config, reference=True)), (number, config)
        assert fast.refreshes == 0
        ended.update(fast.finish_reason)
    assert ended["stop"] and ended["length"], "some answers end early"


def test_the_cases_hold_everything_they_should():
    cases = [drawn_case(number) for number in range(CASES)]
    assert any(not inputs["attention_mask"].all() for _, inputs in cases)
    assert len({(c.gen_length, c.block_length, c.steps) for c, _ in cases}) > 60
    assert sum(c.block_length % (c.steps // c.blocks) > 0 for c, _ in cases) > 40, "uneven remainders"
    for kind in ("temperature", "cfg_scale"):
        assert sum(getattr(c, kind) > 0 for c, _ in cases) > 60
    assert sum(c.remasking == "random" for c, _ in cases) > 30
    assert sum(bool(c.temperature and c.cfg_scale and c.remasking == "random") for c, _ in cases) > 2


SCHEDULES = (
    FixedSchedule("cosine"),
    FixedSchedule("shift", shift=1 / 3),
    FixedSchedule("shift", shift=3),
    ThresholdSchedule(0.5),
    FactorSchedule(1.0),
    EntropyBoundSchedule(1.0),
    BudgetedSchedule(),
)
FILTERS = ((), (MinSpacing(2),), (PhraseVeto(),), (MinSpacing(3), DuplicateVeto(0.8)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("filters", FILTERS)
def test_every_schedule_and_filter_writes_the_same_by_the_decoder_and_the_whole_forward(network, schedule, filters):
    sides = SCHEDULES.index(schedule), FILTERS.index(filters)
    for number in range(4):
        config, inputs = drawn_case(1000 + 100 * sides[0] + 10 * sides[1] + number)
        least = random.Random(number).choice((0, config.gen_length // 2))
        config = replace(config, schedule=schedule, filters=filters, min_length=least)
        fast = network.generate(**inputs, config=config)
        assert same(fast, network.generate(**inputs, config=config, reference=True)), (number, config)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", [NoCache(), DualCache(3)])
def test_a_row_of_an_adaptive_batch_is_its_single_run(network, schedule, cache):
    config = replace(BASE, steps=8, schedule=schedule, filters=(MinSpacing(2),), temperature=0.8, cache=cache)
    batch = network.generate(**prompts([0, 1, 2, 3]), config=config, row_indices=[5, 6, 7, 8])
    for row in range(4):
        alone = network.generate(**prompts([row]), config=config, row_indices=[5 + row])
        assert batch.sequences[row].equal(alone.sequences[0]) and batch.forwards[row] == alone.forwards[0]
        assert [c[2:4] for c in batch.trace.of_row(row).commits] == [c[2:4] for c in alone.trace.commits]


@pytest.mark.parametrize("revision", [RevealRemask(0.5, tokens=3), ReMDM("cap", eta=0.6), ReMDM("loop", eta=0.5)])
def test_a_revision_writes_the_same_by_the_decoder_and_the_whole_forward(network, revision):
    kinds = Counter()
    for number in range(3000, 3006):
        config, inputs = drawn_case(number)
        config = replace(config, schedule=SCHEDULES[number % 7], filters=FILTERS[number % 4], revision=revision)
        fast = network.generate(**inputs, config=config)
        assert same(fast, network.generate(**inputs, config=config, reference=True)), (number, config)
        kinds.update(event.kind for event in fast.trace.events)
    assert kinds[REMASK] > 5, "tokens are taken back"


def test_a_revision_runs_with_and_without_a_cache(network):
    config, inputs = replace(BASE, revision=RevealRemask(0.25)), prompts([0, 1, 2])
    plain = network.generate(**inputs, config=config)
    assert same(plain, network.generate(**inputs, config=config, reference=True))
    assert same(plain, network.generate(**inputs, config=replace(config, cache=DualCache(1))))
    cached = network.generate(**inputs, config=replace(config, cache=DualCache(4)))
    assert (cached.sequences != special().mask).all() and cached.forwards == plain.forwards and cached.refreshes == 4


@cache
def grouped_model(attention: str = "sdpa") -> MedVForMaskedDiffusion:
    """Four heads that share two of keys and values, and a head tied to the embedding."""
    config = shape_config(shape(heads=4, key_value_heads=2), special())
    torch.manual_seed(3)
    grouped = with_stops(MedVForMaskedDiffusion(config).eval())
    grouped.set_attn_implementation(attention)
    return grouped


@cache
def ungrouped(grouped: MedVForMaskedDiffusion) -> MedVForMaskedDiffusion:
    """The multi-head model that computes the same: each head has a copy of its keys' and values' weights."""
    config = copy.deepcopy(grouped.config)
    config.text_config.num_key_value_heads = 4
    whole, state = MedVForMaskedDiffusion(config).eval(), grouped.state_dict()
    for name in state:
        if "language_model" in name and ("k_proj" in name or "v_proj" in name):
            state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    return whole


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(1), DualCache(1)])
def test_grouped_keys_and_both_attentions_are_identical_too(attention, cache):
    grouped = grouped_model(attention)
    assert grouped.lm_head.weight is grouped.get_input_embeddings().weight
    for number in range(2000, 2006):
        config, inputs = drawn_case(number)
        fast = grouped.generate(**inputs, config=replace(config, cache=cache))
        assert same(fast, grouped.generate(**inputs, config=config, reference=True)), (number, config)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(4), DualCache(4)])
def test_grouped_keys_write_what_their_copies_write_under_every_cache_and_schedule(schedule, cache):
    grouped, inputs = grouped_model(), prompts([0, 1, 3])
    config = replace(BASE, steps=8, schedule=schedule, cache=cache, cfg_scale=1.0)
    assert same(grouped.generate(**inputs, config=config), ungrouped(grouped).generate(**inputs, config=config))


def test_the_logits_of_the_decoder_are_those_of_the_model(network):
    inputs = prompts([0, 3])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)
    canvas = torch.cat([inputs["input_ids"], torch.randint(10, 200, (2, 8))], dim=1)
    columns = slice(canvas.shape[1] - 8, canvas.shape[1] - 2)
    with torch.inference_mode():
        features = network.model.get_image_features(inputs["pixel_values"])
        decoder = Decoder(network, inputs["input_ids"], 8, attention_mask=mask[:, :-8], image_features=features)
        expected = network(canvas, mask, image_features=features, logits_to_keep=columns).logits
        torch.testing.assert_close(decoder(canvas, columns), expected)
        some = torch.tensor([[0, 3, 5], [1, 2, 4]])
        rows = torch.arange(2)[:, None]
        asked = decoder(canvas, columns, positions=columns.start + some)
        torch.testing.assert_close(asked, expected[rows, some])


def test_images_may_be_looked_at_beforehand(network):
    inputs = prompts([1, 2])
    expected = network.generate(**inputs, config=BASE)
    features = network.model.get_image_features(inputs.pop("pixel_values"))
    assert same(network.generate(**inputs, image_features=features, config=BASE), expected)


@pytest.mark.slow
def test_a_model_answers_as_algorithm_1_writes(network):
    for number in range(0, CASES, 5):
        config, _ = drawn_case(number)
        plain = {"cfg_scale": 0.0, "remasking": "low_confidence", "stop_tokens": (), "suppress_tokens": (special().mask,)}
        config = replace(config, steps=min(config.steps, config.gen_length), **plain)
        inputs = prompts([number % 4], images=False)

        def denoise(canvas, columns):
            logits = network(canvas, logits_to_keep=columns).logits
            return logits.index_fill(-1, torch.tensor([special().mask, special().image]), -torch.inf)

        names = ("gen_length", "block_length", "steps", "temperature")
        options = {name: getattr(config, name) for name in names} | {"generator": noise_generator(config.seed, 0, 0)}
        expected = sample_response(denoise, inputs["input_ids"], mask_token_id=special().mask, **options)
        assert network.generate(**inputs, config=config).sequences.equal(expected), (number, config)


# What it saves.


class Watched(Decoder):
    """A decoder that notes the rows and columns of each call."""

    def __call__(self, canvas, columns, *, unconditional=False, positions=None):
        logits = super().__call__(canvas, columns, unconditional=unconditional, positions=positions)
        self.calls = [*getattr(self, "calls", []), tuple(logits.shape[:2])]
        return logits


def own_sample(network, inputs, config, kind=Watched):
    """Sample with a decoder of one's own, after the prompts' ids alone."""
    ids = {"mask_token_id": special().mask, "fill_token_id": special().end_of_text}
    decoder = kind(network, inputs["input_ids"], config.gen_length, attention_mask=inputs["attention_mask"], cache=config.cache)
    return sample(decoder, inputs["input_ids"], config, **ids), decoder


def test_only_open_positions_reach_the_head(network):
    config = replace(BASE, steps=6, stop_tokens=())
    _, decoder = own_sample(network, prompts([0, 1], images=False), config)
    assert decoder.calls == [(2, 8), (2, 5), (2, 2)] * 2


def test_rows_that_have_ended_leave_the_batch(network):
    config = replace(BASE, gen_length=24, steps=24, stop_tokens=())
    inputs = prompts(list(range(8)), images=False)
    written = own_sample(network, inputs, config)[0].sequences
    rows_with = {token: int((written == token).any(dim=1).sum()) for token in written.unique().tolist()}
    early = replace(config, stop_tokens=(next(token for token, rows in rows_with.items() if 1 < rows < 5),))
    output, decoder = own_sample(network, inputs, early)
    assert set(output.finish_reason) == {"stop", "length"}
    assert sum(rows for rows, _ in decoder.calls) == sum(output.forwards) < 8 * len(decoder.calls)


class Static(Watched):
    """As on a GPU with graphs: all columns of the block each time."""

    static = True

    def __call__(self, canvas, columns, *, unconditional=False, positions=None):
        assert positions is None
        return super().__call__(canvas, columns, unconditional=unconditional)


@pytest.mark.parametrize("number", range(12))
def test_static_shapes_give_the_same(network, number):
    config, inputs = drawn_case(number)
    config = replace(config, stop_tokens=tuple(network.config.stop_token_ids), suppress_tokens=(special().image,))
    inputs = prompts([0, 2, 5], images=False)
    fixed, decoder = own_sample(network, inputs, config, kind=Static)
    assert same(fixed, own_sample(network, inputs, config)[0])
    assert {columns for _, columns in decoder.calls} == {config.block_length}


class Rerun:
    """What stands in for a CUDA graph where there is no GPU: it runs the captured forward again."""

    made = 0

    def __init__(self, forward, *inputs):
        self.forward, self.shapes = forward, [part.shape for part in inputs]
        Rerun.made += 1

    def __call__(self, *inputs):
        assert [part.shape for part in inputs] == self.shapes, "a graph has one shape"
        return self.forward(*inputs)


class Graphed(Watched):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.graphs = True


@pytest.mark.parametrize(
    ("cache", "widths"), [(NoCache(), 1), (PrefixCache(4), 3), (DualCache(4), 2), (DualCache(4, vicinity=(3, 3)), 3)]
)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_graphs_are_made_once_for_each_width_and_change_nothing(network, monkeypatch, cache, widths, cfg_scale):
    monkeypatch.setattr(decoding, "Graph", Rerun)
    config = replace(BASE, cfg_scale=cfg_scale, cache=cache, stop_tokens=(), suppress_tokens=(special().image,))
    inputs, before = prompts([0, 2, 5], images=False), Rerun.made
    graphed, _ = own_sample(network, inputs, config, kind=Graphed)
    assert same(graphed, own_sample(network, inputs, config)[0])
    assert Rerun.made - before == widths * (2 if cfg_scale else 1)


@pytest.mark.parametrize("cache", [NoCache(), DualCache(4), DualCache(4, vicinity=(3, 3))])
def test_a_decoder_begins_anew_with_its_graphs_and_buffers(network, monkeypatch, cache):
    monkeypatch.setattr(decoding, "Graph", Rerun)
    config = replace(BASE, cfg_scale=1.5, cache=cache, stop_tokens=(), suppress_tokens=(special().image,))
    ids = {"mask_token_id": special().mask, "fill_token_id": special().end_of_text}
    _, decoder = own_sample(network, prompts([0, 2, 5], images=False), config, kind=Graphed)
    made, buffers = Rerun.made, [part.data_ptr() for part in decoder.streams[False].keys]
    again = prompts([2, 1, 4], images=False)  # as wide, padded otherwise
    assert again["input_ids"].shape == (3, decoder.width)
    decoder.begin(again["input_ids"], again["attention_mask"], None)
    assert same(sample(decoder, again["input_ids"], config, **ids), own_sample(network, again, config)[0])
    assert Rerun.made == made and [part.data_ptr() for part in decoder.streams[False].keys] == buffers


def test_what_a_compiler_gets_of_the_logits_is_their_confidence():
    logits = 4 * torch.randn(3, 8, 300, generator=torch.Generator().manual_seed(0))
    taken = torch.zeros(300).index_fill_(0, torch.tensor([4, 7]), -torch.inf)
    tokens, score = decoding.best_allowed(logits, taken)
    expected = log_confidence(logits + taken)
    assert tokens.equal(expected[0])
    torch.testing.assert_close(score, expected[1])


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        selects = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.count += name in self.NAMES or selects
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(4), DualCache(4)])
def test_no_step_of_a_fixed_schedule_waits(network, cache):
    inputs, counts = prompts([0, 1, 2], images=False), []
    for length in (8, 32):
        config = SamplerConfig(length, 8, length, cfg_scale=1.0, stop_tokens=(), suppress_tokens=(1,), cache=cache)
        ids = {"mask_token_id": special().mask, "fill_token_id": special().end_of_text}
        decoder = Decoder(network, inputs["input_ids"], length, attention_mask=inputs["attention_mask"], cache=cache)
        watch = Waits()
        watch.count = 0
        with watch:
            output = sample(decoder, inputs["input_ids"], config, **ids)
        counts.append(watch.count)
        assert output.forwards == [2 * length] * 3
    assert counts[0] == counts[1], "only what is done once a call may wait"


# Caches.

POLICIES = (PrefixCache, DualCache, lambda interval: DualCache(interval, vicinity=(3, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_refresh_at_every_forward_is_no_cache(network, policy):
    for number in range(0, CASES, 6):
        config, inputs = drawn_case(number)
        every = network.generate(**inputs, config=replace(config, cache=policy(1)))
        plain = network.generate(**inputs, config=config)
        assert same(every, plain)
        assert every.refreshes == len({c.step for c in plain.trace.commits}) * (2 if config.cfg_scale else 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("unconditional", [False, True])
def test_a_window_is_exact_while_the_canvas_stays(network, policy, unconditional):
    inputs = prompts([0, 1, 3], images=False)
    canvas = torch.cat([inputs["input_ids"], torch.randint(10, 200, (3, 16))], dim=1)
    columns = slice(canvas.shape[1] - 12, canvas.shape[1] - 6)
    with torch.inference_mode():
        decoder = Decoder(network, inputs["input_ids"], 16, attention_mask=inputs["attention_mask"], cache=policy(4))
        full, *windows = (decoder(canvas, columns, unconditional=unconditional) for _ in range(4))
        assert decoder.refreshes == 1
        for window in windows:
            torch.testing.assert_close(window, full, atol=1e-5, rtol=1e-4)
        canvas[:, columns.start] = 5
        fresh = decoder(canvas, columns, unconditional=unconditional)  # the fifth forward refreshes
        assert decoder.refreshes == 2 and not torch.allclose(fresh, full, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_cached_run_is_valid_and_counted(network, policy, cfg_scale):
    config = replace(BASE, steps=12, stop_tokens=(), cfg_scale=cfg_scale, cache=policy(4))
    output = network.generate(**prompts([0, 1, 2, 3]), config=config)
    times = 2 if cfg_scale else 1
    assert output.forwards == [12 * times] * 4
    assert output.refreshes == 2 * 2 * times, "two blocks of six forwards: the first and the fifth refresh"
    assert (output.sequences != special().mask).all()
    written = Counter((c.row, c.position) for c in output.trace.commits)
    assert len(written) == 4 * 16 and set(written.values()) == {1}
    starts = network.generate(**prompts([0]), config=replace(config, cache=policy(None)))
    assert starts.refreshes == 2 * times


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_cached_row_of_a_ragged_batch_is_its_single_run(network, policy, cfg_scale):
    config = replace(BASE, gen_length=24, steps=24, cfg_scale=cfg_scale, cache=policy(3))
    batch = network.generate(**prompts([0, 1, 2, 3]), config=config)
    for row in range(4):
        alone = network.generate(**prompts([row]), config=config)
        assert batch.sequences[row].equal(alone.sequences[0])
        assert [c[2:4] for c in batch.trace.of_row(row).commits] == [c[2:4] for c in alone.trace.commits]


def test_a_cache_changes_what_is_written(network):
    outputs = [network.generate(**prompts([0, 1]), config=replace(BASE, cache=c)) for c in (NoCache(), DualCache(None))]
    assert not outputs[0].sequences.equal(outputs[1].sequences), "the exactness above is not an idle cache"


# Confidence.


def test_log_confidence_is_that_of_float64():
    logits = 4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)
    tokens, score = log_confidence(logits.clone())
    assert tokens.equal(logits.argmax(-1))
    torch.testing.assert_close(score.double(), expected.amax(-1), rtol=1e-5, atol=1e-9)
    other = torch.arange(50)
    named, score = log_confidence(logits.clone(), other)
    assert named.equal(other)
    torch.testing.assert_close(score.double(), expected[other, other], rtol=1e-5, atol=1e-6)


def test_near_certain_predictions_are_still_ranked():
    logits = torch.zeros(5, 10)
    logits[:, 3] = torch.tensor([20.0, 35.0, 25.0, 45.0, 60.0])
    assert logits.softmax(-1)[1:, 3].eq(1).all(), "a float32 softmax ties them"
    assert log_confidence(logits)[1].argsort(descending=True).tolist() == [4, 3, 1, 2, 0]


# Refusals.


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PrefixCache(0), "refresh_interval is 0"),
        (lambda: DualCache(-2), "refresh_interval is -2"),
        (lambda: DualCache(4, vicinity=(-1, 0)), "vicinity is -1"),
        (lambda: model().generate(**prompts([0]), config=BASE, graphs=True), "CUDA graphs need a CUDA device"),
        (
            lambda: model().generate(**prompts([0]), config=replace(BASE, cache=DualCache()), reference=True),
            "the reference has no cache",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("rows", [(1, 1), (3, 7)])
def test_the_head_piece_by_piece_is_the_head(rows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 101, bias=False)
    states = torch.randn(*rows, 16, generator=generator)
    with torch.no_grad():
        head.weight.copy_(torch.randn(101, 16, generator=generator))
        for piece in (1, 10, 101, 2048):
            monkeypatch.setattr(decoding, "HEAD_PIECE", piece)
            torch.testing.assert_close(decoding.vocabulary_logits(head, states), head(states))
