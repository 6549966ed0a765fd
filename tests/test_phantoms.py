"""What phantoms promise: the same scene gives the same picture, and what a scene states can be seen where it says."""

import pickle
from functools import partial

import numpy as np
import pytest

from medv.phantoms import general
from medv.phantoms.pictures import draw, phantom_image, phantom_scene
from medv.phantoms.scene import ACQUISITIONS, DOMAINS, FINDINGS, LEVELS, NORMAL, SIDES, SPLIT_SEEDS, Scene, sample_scene

CASES = [(domain, finding) for domain in DOMAINS for finding in FINDINGS[domain]]
RADIOLOGICAL = ("chest_xray", "ct", "mri")
SEEDS = range(40, 46)


def change(domain, finding, side, level, size, acquisition, seed):
    """How much the finding changes each pixel of the otherwise same picture: [64, 64]."""
    normal = draw(Scene(domain, seed, NORMAL, None, None, None, acquisition)).astype(float)
    found = draw(Scene(domain, seed, finding, side, level, size, acquisition)).astype(float)
    return np.abs(found - normal).mean(axis=2)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_scene_gives_the_same_picture(domain):
    scene = sample_scene(7, domain=domain)
    first = draw(scene)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw(scene))
    assert np.array_equal(first, np.asarray(pickle.loads(pickle.dumps(partial(phantom_image, scene, 64)))()))


@pytest.mark.parametrize("domain", DOMAINS)
def test_other_seeds_give_other_anatomy(domain):
    acquisition = ACQUISITIONS[domain][0]
    coarse = [
        draw(Scene(domain, seed, NORMAL, None, None, None, acquisition)).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        for seed in SEEDS
    ]
    for i, one in enumerate(coarse):
        assert all(np.abs(one - other).mean() > 2 for other in coarse[:i])


@pytest.mark.parametrize(("domain", "finding"), CASES)
def test_a_finding_shows_on_its_side_and_level(domain, finding):
    for seed in SEEDS:
        for side in SIDES:
            for level in LEVELS[domain]:
                for size in ("small", "large"):
                    acquisition = ACQUISITIONS[domain][seed % 2]
                    difference = change(domain, finding, side, level, size, acquisition, seed)
                    where = f"{finding}, {side} {level} {size}, seed {seed}"
                    assert difference.max() > 25, where
                    halves = difference[:, :32].sum(), difference[:, 32:].sum()
                    right_of_image = (side == "left") == (domain in RADIOLOGICAL)
                    assert halves[right_of_image] > 0.8 * sum(halves), where
                    rows = (difference.sum(axis=1) * np.arange(64)).sum() / difference.sum()
                    assert (rows < 31.5) == (level == LEVELS[domain][0]), where


@pytest.mark.parametrize(("domain", "finding"), CASES)
def test_a_large_finding_changes_more_of_the_picture_than_a_small_one(domain, finding):
    for side in SIDES:
        for level in LEVELS[domain]:
            areas = {}
            for size in ("small", "large"):
                changed = [change(domain, finding, side, level, size, ACQUISITIONS[domain][0], seed) for seed in SEEDS]
                areas[size] = np.mean([(difference > 15).sum() for difference in changed])
            assert areas["large"] > 2 * areas["small"] > 30, (side, level, areas)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_acquisition_can_be_seen(domain):
    for seed in SEEDS:
        one, other = (
            draw(Scene(domain, seed, NORMAL, None, None, None, acquisition)).astype(float)
            for acquisition in ACQUISITIONS[domain]
        )
        assert (np.abs(one - other).max(axis=2) > 30).mean() > 0.015


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_scene_shows_the_same_anatomy_at_every_size(domain):
    for seed in SEEDS:
        scene = sample_scene(seed, domain=domain)
        coarse, fine = draw(scene, 64).astype(float), draw(scene, 256).astype(float)
        shrunk = fine.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(coarse - shrunk).mean() < 8
        assert np.corrcoef(coarse.ravel(), shrunk.ravel())[0, 1] > 0.93


def test_splits_never_share_a_scene():
    seeds = {split: {phantom_scene(split, index).seed for index in range(50)} for split in SPLIT_SEEDS}
    assert len(set.union(*seeds.values())) == 150


def test_drawing_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (the state that must not move)
    for domain in DOMAINS:
        draw(sample_scene(3, domain=domain))
    general.draw_shapes(general.sample_shapes(3))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_wishes_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="pixels"):
        draw(sample_scene(1), size=4)
    with pytest.raises(ValueError, match="domain"):
        draw(Scene("ultrasound", 1, NORMAL, None, None, None, "portable"))


@pytest.mark.parametrize("shape", general.SHAPES)
def test_shapes_differ_by_seed_and_show_their_color(shape):
    scene = general.sample_shapes(11, shape=shape, color="red", count=2, background="black")
    picture = general.draw_shapes(scene)
    assert picture.shape == (64, 64, 3)
    assert np.array_equal(picture, np.asarray(general.shapes_image(scene)))
    red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
    more = general.draw_shapes(general.sample_shapes(11, shape=shape, color="red", count=4, background="black"))
    assert 60 < red.sum() < ((more[..., 0] > 150) & (more[..., 1] < 100)).sum()
    assert not np.array_equal(picture, general.draw_shapes(general.sample_shapes(12, shape=shape)))


def test_shapes_refuse_unknown_attributes():
    with pytest.raises(ValueError, match="color"):
        general.sample_shapes(1, color="mauve")
    with pytest.raises(ValueError, match="attribute"):
        general.sample_shapes(1, size="large")
