"""The forward process: what may be masked, how often, and that the noise of a sample belongs to the sample alone."""

import pytest
import torch

from medv.diffusion.corruption import EPS, corrupt, draw_noise, masking_probability

pytestmark = pytest.mark.usefixtures("untouched_generators")

MASK = 99


def clean(rows: int, width: int) -> torch.Tensor:
    return torch.arange(rows * width).reshape(rows, width) % 90


def test_only_targets_are_masked_and_the_rest_is_untouched():
    ids, (t, u) = clean(4, 50), draw_noise(0, 0, range(4), 50)
    targets = torch.arange(50)[None].expand(4, 50) >= 20
    noise = corrupt(ids, targets, t, u, MASK)
    assert noise.masked.any() and not noise.masked[:, :20].any()
    assert (noise.ids == MASK).equal(noise.masked)
    assert noise.ids[~noise.masked].equal(ids[~noise.masked])
    assert ids.equal(clean(4, 50)), "the clean ids are not written to"


@pytest.mark.parametrize("time", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_each_target_is_masked_with_the_probability_of_its_time(time):
    width = 40_000
    _, u = draw_noise(3, 1, [7], width)
    targets = torch.ones(1, width, dtype=torch.bool)
    noise = corrupt(clean(1, width), targets, torch.tensor([time]), u, MASK)
    p = (1 - 1e-3) * time + 1e-3
    assert noise.p_mask.item() == pytest.approx(p, rel=1e-6)
    assert noise.masked.float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / width) ** 0.5 + 1e-9)


def test_masking_probability_runs_from_eps_to_one():
    assert masking_probability(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([EPS, 1.0])
    assert masking_probability(torch.tensor([0.0]), eps=0.25).item() == 0.25


def test_noise_of_a_sample_depends_neither_on_the_batch_nor_on_its_order():
    t, u = draw_noise(5, 11, [4, 9, 2], 16)
    for row, index in enumerate([4, 9, 2]):
        alone_t, alone_u = draw_noise(5, 11, [index], 16)
        assert alone_t.equal(t[row : row + 1]) and alone_u.equal(u[row : row + 1])
    shuffled_t, shuffled_u = draw_noise(5, 11, [2, 4, 9], 16)
    assert shuffled_t.equal(t[[2, 0, 1]]) and shuffled_u.equal(u[[2, 0, 1]])


@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 1000])
def test_a_wider_batch_only_adds_noise_at_the_end(width):
    t, u = draw_noise(5, 11, [4], 2048)
    narrow_t, narrow_u = draw_noise(5, 11, [4], width)
    assert narrow_t.equal(t) and narrow_u.equal(u[:, :width])


def test_noise_is_a_function_of_seed_step_and_index():
    _, reference = draw_noise(1, 2, [3], 8)
    assert draw_noise(1, 2, [3], 8)[1].equal(reference)
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 3), (12, 2, 3), (1, -1, 3)]:
        assert not draw_noise(*other[:2], [other[2]], 8)[1].equal(reference), other


def test_strata_partition_the_interval():
    n = 16
    for step in range(20):
        t, _ = draw_noise(0, step, range(100, 100 + n), 1, strata=[(k, n) for k in range(n)])
        assert (t * n).floor().tolist() == list(range(n))


def test_one_stratum_is_the_plain_draw():
    plain, stratified = draw_noise(0, 0, [1, 2], 4), draw_noise(0, 0, [1, 2], 4, strata=[(0, 1), (0, 1)])
    assert plain[0].equal(stratified[0]) and plain[1].equal(stratified[1])


def test_times_are_uniform():
    t, _ = draw_noise(0, 0, range(4000), 1)
    assert t.mean().item() == pytest.approx(0.5, abs=0.02) and t.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_a_mask_token_among_the_targets_is_refused():
    ids, (t, u) = clean(1, 8), draw_noise(0, 0, [0], 8)
    ids[0, 5] = MASK
    targets = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask token 99"):
        corrupt(ids, targets, t, u, MASK)
    targets[0, 5] = False
    corrupt(ids, targets, t, u, MASK)  # in the prompt it is nobody's business here
