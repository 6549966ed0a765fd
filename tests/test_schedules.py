"""What schedules, filters and revisions promise: on drawn forwards, and over whole runs on an exact text."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_sampler import FILL, MASK, STOP, Table, confident
from test_sampler import run as sampled

from medv.companion.studies.markov import blurred_evidence, word_chain
from medv.diffusion.caching import CACHES, cache_named
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import FILTERS as NAMED
from medv.diffusion.filters import DuplicateVeto, MinSpacing, PhraseVeto, filters_named
from medv.diffusion.revision import ReMDM, RevealRemask, RevisionState, repeated
from medv.diffusion.sampler import sample
from medv.diffusion.schedules import (
    SCHEDULES,
    BudgetedSchedule,
    EntropyBoundSchedule,
    FactorSchedule,
    FixedSchedule,
    StepState,
    ThresholdSchedule,
    bounded_count,
    choose,
    pace,
    schedule_named,
)
from medv.diffusion.trace import REMASK, Trace

pytestmark = pytest.mark.usefixtures("untouched_generators")

ALL = (
    *SCHEDULES.values(),
    FixedSchedule("shift", shift=1 / 3),
    ThresholdSchedule(0.4),
    FactorSchedule(2.5),
    EntropyBoundSchedule(2.0),
    BudgetedSchedule(share=2.0, most=4.0),
)
FILTERS = ((), (MinSpacing(3),), (DuplicateVeto(0.6),), (MinSpacing(2), DuplicateVeto(0.6)), (PhraseVeto(2, 0.9),))
REVISIONS = (
    RevealRemask(0.25),
    RevealRemask(0.5, tokens=3, ngram=0, limit=2),
    ReMDM("cap", eta=0.6),
    ReMDM("rescale", eta=0.9, limit=1),
    ReMDM("conf", eta=1.0),
    ReMDM("loop", eta=0.5),
)
ROWS, PLACES, LENGTH, START = 6, 8, 16, 4  # the block is positions 4 .. 11 of 16


def drawn_state(seed: int, *, words: int = 3, ties: bool = False, steps_left: int | None = None) -> StepState:
    """A forward of random predictions: some positions written, few different words, each row with something open."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    masked = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    masked[:, START + int(integers(PLACES, 1))] = True
    open_here = masked[:, START : START + PLACES].clone()
    confidence = torch.rand(ROWS, PLACES, generator=generator).clamp_min(1e-3)
    if ties:
        confidence = (confidence * 3).ceil() / 4
    entropy = 2 * torch.rand(ROWS, PLACES, generator=generator)
    left = integers(6, ROWS, low=2) if steps_left is None else torch.full((ROWS,), steps_left)
    return StepState(
        score=confidence.log(),
        tokens=integers(words, ROWS, PLACES),
        positions=torch.arange(START, START + PLACES).expand(ROWS, -1),
        open=open_here,
        candidates=open_here,
        response=integers(words, ROWS, LENGTH).masked_fill(masked, MASK),
        masked=masked,
        masks=open_here.sum(dim=1),
        masks_after=torch.full((ROWS,), 4),
        step=int(integers(3, 1)),
        steps_left=left,
        forwards_left=left + 2,
        entropy=(entropy * 4).round() / 4 if ties else entropy,
        fresh_entropy=2 * torch.rand(ROWS, generator=generator),
    )


def of_rows(state: StepState, rows: slice) -> StepState:
    parts = {k: v[rows] for k, v in vars(state).items() if isinstance(v, torch.Tensor)}
    return replace(state, **parts)


def text_run(rows: int = 4, length: int = 32, **options):
    """Sample from an exact text with evidence; nothing stops."""
    text = word_chain(40)
    evidence = blurred_evidence(text, text.draw(rows, length), block_length=8)
    config = SamplerConfig(**{"gen_length": length, "block_length": 16, "steps": 16, "stop_tokens": ()} | options)
    ids = {"mask_token_id": text.mask_token_id, "fill_token_id": text.mask_token_id}
    return sample(text.denoiser(evidence), torch.zeros(rows, 0, dtype=torch.long), config, **ids)


# The promises of choose.


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("ties", [False, True])
def test_every_choice_is_open_and_never_empty_and_made_row_by_row(schedule, filters, ties):
    for seed in range(12):
        state = drawn_state(seed, ties=ties)
        chosen = choose(state, schedule, filters)
        assert (chosen <= state.open).all(), "only what is open is written"
        assert chosen.any(dim=1).all(), "at least one token of each row"
        for row in range(ROWS):
            here = slice(row, row + 1)
            assert choose(of_rows(state, here), schedule, filters).equal(chosen[here])


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("filters", FILTERS)
def test_the_last_forward_writes_all_that_is_open(schedule, filters):
    for seed in range(6):
        state = drawn_state(seed, steps_left=1)
        assert choose(state, schedule, filters).equal(state.open)


def test_a_row_with_nothing_open_writes_nothing():
    state = drawn_state(0)
    nothing = torch.zeros_like(state.open)
    for schedule in ALL:
        assert not choose(replace(state, open=nothing, candidates=nothing), schedule, FILTERS[3]).any()


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_written_is_the_surest_and_of_equals_the_leftmost(schedule, ties):
    for seed in range(12):
        state = drawn_state(seed, ties=ties)
        chosen = choose(state, schedule)
        value = -state.entropy if schedule.needs_entropy else state.score
        for row in range(ROWS):
            order = sorted(state.open[row].nonzero()[:, 0].tolist(), key=lambda i: (-float(value[row, i]), i))
            count = int(chosen[row].sum())
            if isinstance(schedule, ThresholdSchedule) and ties:  # equals above the threshold are all written
                assert {float(value[row, i]) for i in chosen[row].nonzero()[:, 0]} == {
                    float(value[row, i]) for i in order[:count]
                }
                continue
            assert set(chosen[row].nonzero()[:, 0].tolist()) == set(order[:count])


# The schedules, one by one.


@pytest.mark.parametrize(
    "schedule", [FixedSchedule(), FixedSchedule("cosine"), FixedSchedule("shift"), FixedSchedule("shift", shift=1 / 3)]
)
@pytest.mark.parametrize(("masks", "steps"), [(32, 32), (32, 5), (8, 3), (64, 16), (1, 1), (7, 6)])
def test_fixed_counts_fill_the_block_and_waste_no_forward(schedule, masks, steps):
    counts = schedule.counts(masks, steps)
    needed = [count for count in counts if count]
    assert len(counts) == steps and sum(counts) == masks and min(counts) >= 0
    assert counts[: len(needed)] == needed, "many first may be done early, and never pauses"
    assert len(needed) == min(steps, masks) or (schedule.shape, schedule.shift) == ("shift", 3.0)


@pytest.mark.parametrize(
    "schedule", [FixedSchedule("cosine"), *(FixedSchedule("shift", shift=s) for s in (1e-12, 1e18, 1e300))]
)
@pytest.mark.parametrize(("masks", "steps"), [(1, 60_000), (2, 60_000), (4, 8), (4, 4), (3, 1)])
def test_however_extreme_its_shape_a_fixed_schedule_leaves_nothing_masked(schedule, masks, steps):
    assert sum(schedule.counts(masks, steps)) == masks
    words = torch.tensor([0, 1, 2, 3])[:masks]
    logits = confident(words.tolist(), [0.5] * masks)
    for filters in ((), (MinSpacing(2),)):
        some = {"schedule": schedule, "filters": filters, "steps": min(steps, 8)}
        done = sampled(Table(logits), gen_length=masks, block_length=masks, **some)
        assert done.sequences[0].equal(words) and done.forwards[0] <= min(steps, 8)


def test_the_shapes_differ_as_they_say():
    halves = {
        name: sum(schedule.counts(64, 8)[:4])
        for name, schedule in {
            "linear": FixedSchedule(),
            "cosine": FixedSchedule("cosine"),
            "many first": FixedSchedule("shift", shift=3),
            "few first": FixedSchedule("shift", shift=1 / 3),
        }.items()
    }
    assert halves["few first"] < halves["linear"] == 32 < halves["many first"]
    assert halves["many first"] == pytest.approx(48, abs=3) and halves["few first"] == pytest.approx(16, abs=3)
    assert halves["cosine"] == pytest.approx(64 * (1 - math.cos(math.pi / 4)), abs=1.5)
    assert FixedSchedule("shift", shift=1.0).counts(64, 8) == [8] * 8


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.0])
def test_a_threshold_writes_all_above_it_and_else_no_more_than_the_pace(threshold):
    for seed in range(20):
        state = drawn_state(seed)
        chosen = choose(state, ThresholdSchedule(threshold))
        above = state.open & (state.score >= math.log(threshold))
        assert (above <= chosen).all()
        assert chosen.sum(dim=1).equal(torch.maximum(above.sum(dim=1), pace(state)))


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_a_factor_writes_the_longest_run_that_it_allows(factor):
    for seed in range(20):
        state = drawn_state(seed)
        counts = choose(state, FactorSchedule(factor)).sum(dim=1)
        for row in range(ROWS):
            best = state.score[row][state.open[row]].exp().sort(descending=True).values.tolist()
            allowed = [n for n, c in enumerate(best, start=1) if (n + 1) * (1 - c) < factor]
            assert counts[row] == max([*allowed, int(pace(state)[row])])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 100.0])
def test_an_entropy_bound_is_kept_and_used_up(gamma):
    for seed in range(20):
        state = drawn_state(seed)
        chosen = choose(state, EntropyBoundSchedule(gamma))
        for row in range(ROWS):
            entropies = sorted(state.entropy[row][state.open[row]].tolist())
            count = int(chosen[row].sum())
            if count > int(pace(state)[row]):
                assert sum(entropies[: count - 1]) <= gamma + 1e-6, "all but the most uncertain"
            if count < len(entropies):
                assert sum(entropies[:count]) > gamma, "one more would be too many"


def test_the_bound_counts_the_first_for_nothing():
    state = drawn_state(0)
    entropy = torch.tensor([1.0, 0.5, 0.25, 2.0, 9.0, 9.0, 9.0, 9.0]).expand(ROWS, -1)
    state = replace(state, entropy=entropy, candidates=torch.ones_like(state.open))
    for gamma, count in ((0.0, 1), (0.24, 1), (0.25, 2), (0.75, 3), (1.74, 3), (1.75, 4), (3.75, 5)):
        assert bounded_count(state, torch.full((ROWS,), gamma)).tolist() == [count] * ROWS


# Whole runs.


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("steps", [2, 6, 32])
def test_a_run_ends_in_time_with_everything_written_once(schedule, filters, steps):
    output = text_run(schedule=schedule, filters=filters, steps=steps)
    assert all(1 <= forwards <= steps for forwards in output.forwards)
    assert (output.sequences < 40).all()
    assert Counter((e.row, e.position) for e in output.trace.events) == {(r, p): 1 for r in range(4) for p in range(32)}
    for row in range(4):
        events = output.trace.of_row(row).events
        assert len({e.step for e in events}) == output.forwards[row], "every forward writes something"
        blocks = [e.position // 16 for e in events]
        assert blocks == sorted(blocks), "block by block"


EXACT = (*(SCHEDULES[name] for name in ("linear", "cosine", "budgeted")), BudgetedSchedule(share=2.0, most=4.0))


@pytest.mark.parametrize("schedule", EXACT)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("steps", [2, 6, 16, 30, 32])
def test_a_budget_is_spent_exactly(schedule, filters, steps):
    assert text_run(schedule=schedule, filters=filters, steps=steps).forwards == [steps] * 4


@pytest.mark.parametrize(("clear", "expected"), [((0, 1, 0), "fewer"), ((1, 0, 0), "more"), ((0, 0, 0), "as many")])
def test_the_budgeted_schedule_spends_where_a_block_is_harder_than_those_before(clear, expected):
    text, rows, block = word_chain(40), 16, 16
    tokens = text.draw(rows, 3 * block)
    told = 0.97 * torch.nn.functional.one_hot(tokens, 40).double() + 0.03 / 40
    seen = torch.tensor(clear, dtype=torch.bool).repeat_interleave(block)[None, :, None]
    config = SamplerConfig(3 * block, block, 24, stop_tokens=(), schedule=BudgetedSchedule())
    denoise, empty = text.denoiser(torch.where(seen, told, 1.0)), torch.zeros(rows, 0, dtype=torch.long)
    output = sample(denoise, empty, config, mask_token_id=40, fill_token_id=40)
    assert output.forwards == [24] * rows
    spent = len({(e.row, e.step) for e in output.trace.events if e.position // block == 1}) / rows
    assert {"fewer": spent < 6, "more": spent > 8, "as many": 7 < spent < 9}[expected], "an equal share is 8"


@pytest.mark.parametrize("schedule", [ThresholdSchedule(0.9), FactorSchedule(1.0), EntropyBoundSchedule(0.5)])
def test_what_the_network_is_sure_of_takes_one_forward(schedule):
    sure = sampled(Table(confident([1, 2] * 8, [0.999] * 16)), gen_length=16, block_length=16, steps=16, schedule=schedule)
    unsure = sampled(Table(confident([1, 2] * 8, [0.3] * 16)), gen_length=16, block_length=16, steps=16, schedule=schedule)
    assert sure.forwards == [1] and unsure.forwards == [16]


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("least", [0, 3, 8, 16])
def test_no_stop_comes_before_the_minimum_length(schedule, least):
    logits = confident([STOP if i % 2 else 1 for i in range(16)], [0.9] * 16)
    logits[:, 2] = -2.0  # what is written in place of a stop
    output = sampled(
        Table(logits), gen_length=16, block_length=4, steps=8, stop_tokens=(STOP,), min_length=least, schedule=schedule
    )
    expected = next((i for i in range(least, 16) if i % 2), 16)
    assert output.lengths == [expected]
    assert output.finish_reason == ["stop" if expected < 16 else "length"]
    assert (output.sequences[0, :expected] != STOP).all() and (output.sequences[0, expected:] == FILL).all()


# Filters.


@pytest.mark.parametrize("distance", [1, 2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_spacing_keeps_the_best_and_drops_only_what_is_near_a_better_one(distance, ties):
    for seed in range(20):
        state = drawn_state(seed, ties=ties)
        kept = MinSpacing(distance).keep(state) & state.candidates
        for row in range(ROWS):
            order = sorted(state.candidates[row].nonzero()[:, 0].tolist(), key=lambda i: (-float(state.score[row, i]), i))
            expected = []
            for place in order:
                if all(abs(place - other) >= distance for other in expected):
                    expected.append(place)
            assert kept[row].nonzero()[:, 0].tolist() == sorted(expected)


@pytest.mark.parametrize("schedule", ALL)
def test_tokens_of_one_forward_lie_apart_until_the_last(schedule):
    for seed in range(12):
        chosen = choose(drawn_state(seed), schedule, (MinSpacing(3), DuplicateVeto(0.6)))
        for row in chosen:
            assert all(other - one >= 3 for one, other in pairwise(row.nonzero()[:, 0].tolist()))


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("ties", [False, True])
def test_an_unsure_repetition_is_never_written_beside_its_like(schedule, ties):
    vetoed = 0
    for seed in range(30):
        state = drawn_state(seed, words=2, ties=ties)
        veto = DuplicateVeto(0.8)
        left = veto.keep(state) & state.candidates
        chosen = choose(state, schedule, (veto,))
        vetoed += int((state.candidates & ~left).sum())
        for row in range(ROWS):
            if not left[row].any():
                assert chosen[row].sum() == 1, "the best one, so that the row goes on"
                continue
            after = torch.where(state.masked[row], -1, state.response[row])
            after[START : START + PLACES][chosen[row]] = state.tokens[row][chosen[row]]
            for i in chosen[row].nonzero()[:, 0].tolist():
                beside = [after[START + i - 1], after[START + i + 1]]
                if state.tokens[row, i] in beside and state.score[row, i] < math.log(0.8):
                    # its like is a worse one of the same forward that is sure
                    twins = [j for j in (i - 1, i + 1) if 0 <= j < PLACES and chosen[row, j]]
                    assert any(
                        state.tokens[row, j] == state.tokens[row, i] and state.score[row, j] >= math.log(0.8) for j in twins
                    )
    assert vetoed > 50, "the veto had something to do"


def test_of_two_equal_neighbors_the_better_is_written_and_the_other_asked_again():
    state = drawn_state(0, words=1)
    everything = torch.ones_like(state.open)
    score = torch.tensor([0.5, 0.6, 0.2, 0.1, 0.7, 0.7, 0.05, 0.9]).log().expand(ROWS, -1)
    tokens = torch.tensor([1, 1, 1, 2, 3, 3, 4, 4]).expand(ROWS, -1)
    state = replace(
        state, score=score, tokens=tokens, open=everything, candidates=everything, masked=torch.ones_like(state.masked)
    )
    kept = DuplicateVeto(0.85).keep(state)
    assert kept[0].tolist() == [False, True, False, True, True, False, False, True]
    assert DuplicateVeto(0.04).keep(state).all(), "a repetition that is sure is meant"


def completed_runs(state, row, length, confidence):
    """The candidates that PhraseVeto removes from a row, run by run."""
    size = state.response.shape[1]
    token = [int(token) for token in state.response[row]]
    strength = [-math.inf if state.masked[row, i] else math.inf for i in range(size)]
    for k, place in enumerate(state.positions[row].tolist()):
        if state.candidates[row, k]:
            token[place], strength[place] = int(state.tokens[row, k]), float(state.score[row, k])
    runs = {}
    for start in range(size - length + 1):
        if (least := min(strength[start : start + length])) > -math.inf:
            runs[start] = least, -start, tuple(token[start : start + length])
    removed = set()
    for start, (least, order, words) in runs.items():
        if least < math.inf and any(words == other[2] and (least, order) < other[:2] for other in runs.values()):
            weakest = min(range(start, start + length), key=lambda i: strength[i])
            if confidence == 1 or math.exp(least) < confidence:
                removed.add(weakest)
    return removed


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("confidence", [0.7, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_phrase_veto_removes_the_token_that_completes_a_run_said_elsewhere(length, confidence, ties):
    vetoed = 0
    for seed in range(30):
        state = drawn_state(seed, words=2, ties=ties)
        kept = PhraseVeto(length, confidence).keep(state)
        beside = DuplicateVeto(confidence).keep(state)
        for row in range(ROWS):
            removed = completed_runs(state, row, length, confidence)
            for k in state.candidates[row].nonzero()[:, 0].tolist():
                assert bool(kept[row, k]) == (bool(beside[row, k]) and int(state.positions[row, k]) not in removed)
            vetoed += len(removed)
    assert vetoed > 30, "the veto had something to do"


def test_a_run_longer_than_the_answer_leaves_the_veto_of_neighbors():
    state = drawn_state(0, words=2)
    assert torch.equal(PhraseVeto(state.response.shape[1] + 1).keep(state), DuplicateVeto(1.0).keep(state))


def test_a_filter_is_found_by_its_name():
    assert filters_named("none") == () and all(filters_named(name) == (NAMED[name],) for name in NAMED)
    with pytest.raises(ValueError, match="unknown filter 'phrase': use one of none, spacing, veto, phrases"):
        filters_named("phrase")


def test_with_filters_fewer_words_stand_beside_their_like():
    def repeats(*filters):
        tokens = text_run(rows=40, filters=filters).sequences
        return float((tokens[:, 1:] == tokens[:, :-1]).double().mean())

    plain = repeats()
    assert plain > 0.01 and repeats(DuplicateVeto()) < plain / 4 and repeats(MinSpacing(2)) < plain / 4


# Revision.


def revised(revision, **options):
    return text_run(revision=revision, **options)


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize("schedule", [SCHEDULES["linear"], BudgetedSchedule(), ThresholdSchedule(0.6)])
def test_a_revision_ends_in_time_and_takes_back_only_what_stands(revision, schedule):
    output = revised(revision, schedule=schedule, steps=16, temperature=1.0)
    assert (output.sequences < 40).all() and all(forwards <= 16 for forwards in output.forwards)
    # Reading refuses a token that is written twice, or taken back where it does not stand.
    assert Trace.from_dict(output.trace.to_dict()) == output.trace
    back = [e for e in output.trace.events if e.kind == REMASK]
    assert back, "something is taken back"
    assert max(Counter((e.row, e.position) for e in back).values()) <= revision.limit
    sure = {(e.row, e.position, e.step): e.confidence for e in output.trace.commits}
    for event in back:
        earlier = [s for r, p, s in sure if (r, p) == (event.row, event.position) and s <= event.step]
        assert event.confidence == sure[event.row, event.position, max(earlier)], "the confidence at commit time"
    for row in range(4):
        assert output.trace.replay(10**9, row) == output.sequences[row].tolist()


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_revision_is_a_function_of_the_seed(revision):
    runs = [revised(revision, temperature=1.0, seed=seed).trace.events for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_stop_is_never_taken_back_and_nothing_after_it_is_written(revision):
    logits = confident([1, 2, 3, 4, STOP, 5, 6, 1], [0.5, 0.4, 0.6, 0.3, 0.2, 0.9, 0.9, 0.9])
    output = sampled(Table(logits), gen_length=8, block_length=8, steps=16, stop_tokens=(STOP,), revision=revision)
    assert not [e for e in output.trace.events if e.kind == REMASK and e.token == STOP]
    assert output.lengths == [4] and output.sequences[0].tolist() == [1, 2, 3, 4, FILL, FILL, FILL, FILL]


def test_the_least_sure_tokens_are_asked_again_and_repetitions_before_them():
    tokens, sure = [1, 2, 2, 3, 4, 5, 6, 1], [0.9, 0.8, 0.95, 0.3, 0.7, 0.2, 0.6, 0.5]
    options = {"gen_length": 8, "block_length": 8, "steps": 8}
    for revision, expected in (
        (RevealRemask(0.25, ngram=0), {5, 3}),
        (RevealRemask(0.25, ngram=1), {2, 5}),
        (RevealRemask(0.25, tokens=2, ngram=0), {5, 3, 7, 6}),
    ):
        output = sampled(Table(confident(tokens, sure)), revision=revision, **options)
        back = [e for e in output.trace.events if e.kind == REMASK]
        assert {e.position for e in back} == expected and {e.step for e in back} == {5}, "when the block is full"
        assert output.forwards == [8]


@pytest.mark.parametrize(("kind", "chance"), [("cap", 0.3), ("rescale", 0.3 * 0.75), ("conf", 0.3 * 0.75 / 2)])
def test_remdm_takes_back_with_the_chance_that_it_says(kind, chance):
    rows, generator = 200_000, torch.Generator().manual_seed(0)
    written = torch.tensor([True, True, False]).expand(rows, -1)
    state = RevisionState(
        score=torch.tensor([0.9, 0.1, 0.5]).log().expand(rows, -1),
        tokens=torch.ones(rows, 3, dtype=torch.long),
        written=written,
        allowed=written,
        step=2,
        steps=6,
        draw=lambda: torch.rand(rows, 3, generator=generator),
    )
    # 2 of 3 places are written, and half of the forwards are gone with the next: sigma_max = (1 - 3/6) / (2/3) = 0.75.
    back = ReMDM(kind, eta=0.3).during(state).double().mean(dim=0)
    assert back[2] == 0 and back[:2].mean() == pytest.approx(chance, abs=0.01)
    if kind == "conf":
        assert back[1] / back[0] == pytest.approx(math.exp(0.8), rel=0.1), "doubt is exp(-confidence)"
    assert ReMDM("loop", eta=0.3).during(state) is None
    assert ReMDM("loop", eta=0.3).after(state).double().mean(dim=0)[:2].mean() == pytest.approx(0.3, abs=0.01)


def test_repetitions_are_found_and_the_first_stays():
    tokens = torch.tensor([[1, 1, 1, 2, 3, 2, 3, 4]])
    written = torch.ones_like(tokens, dtype=torch.bool)
    assert repeated(tokens, written, 1)[0].nonzero()[:, 0].tolist() == [1, 2]
    assert repeated(tokens, written, 2)[0].nonzero()[:, 0].tolist() == [5, 6]
    written[0, 5] = False
    assert not repeated(tokens, written, 2).any() and not repeated(tokens, written, 5).any()


# Refusals.


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FixedSchedule("sine"), "unknown shape 'sine'"),
        (lambda: FixedSchedule("shift", shift=0), "shift is 0"),
        (lambda: ThresholdSchedule(0), "threshold is 0"),
        (lambda: ThresholdSchedule(1.1), r"threshold is 1\.1"),
        (lambda: FactorSchedule(-1), "factor is -1"),
        (lambda: FactorSchedule(float("nan")), "factor is nan: it must be a finite number"),
        (lambda: MinSpacing(1.5), "distance is 1.5: it must be a whole number"),
        (lambda: EntropyBoundSchedule(-0.1), r"gamma is -0\.1"),
        (lambda: BudgetedSchedule(share=0), "share is 0"),
        (lambda: BudgetedSchedule(most=0.5), r"most is 0\.5"),
        (lambda: MinSpacing(0), "distance is 0"),
        (lambda: DuplicateVeto(0), "confidence is 0"),
        (lambda: PhraseVeto(1), "length is 1"),
        (lambda: PhraseVeto(confidence=1.5), "confidence is 1.5"),
        (lambda: RevealRemask(1.0), r"budget is 1\.0: it must be below 1"),
        (lambda: ReMDM("other"), "unknown kind 'other'"),
        (lambda: ReMDM(eta=0), "eta is 0: it must be above 0"),
        (lambda: schedule_named("magic"), "unknown schedule 'magic': use one of linear, cosine"),
        (lambda: cache_named("magic"), "unknown cache 'magic': use one of none, prefix, dual"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_names_give_what_they_name():
    assert {name: type(schedule_named(name)) for name in SCHEDULES} == {n: type(s) for n, s in SCHEDULES.items()}
    assert schedule_named("cosine").shape == "cosine" and cache_named("none").refreshes(5)
    assert not CACHES["dual"].refreshes(5) and CACHES["prefix"].refreshes(32)
