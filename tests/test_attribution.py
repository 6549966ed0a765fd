"""Where it looked: the fast attribution is the slow one, what cannot matter does not, and a region is where its tokens look."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_views import MODES, SIZES, every_mode, noise_picture

from medv.checkpoints.assembly import new_processor, random_model, shape_config
from medv.diffusion.config import SamplerConfig
from medv.diffusion.revision import RevealRemask
from medv.diffusion.trace import REMASK, Event, Trace
from medv.evaluation.answering import Answerer
from medv.evaluation.attribution import WAYS, Occlusions, Regions, attribute, written
from medv.model.views import ViewPlan, merge_views
from medv.phantoms.pictures import draw, lesion_mask
from medv.phantoms.scene import DOMAINS, FINDINGS, sample_scene

pytestmark = pytest.mark.usefixtures("untouched_generators")
CONFIG = SamplerConfig(gen_length=12, block_length=6, steps=6, stop_tokens=())
ways = pytest.mark.parametrize("hide", WAYS)


def answerer(mode=MODES[0], size=8) -> Answerer:
    """A random model with 4 x 4 visual tokens a view."""
    shape, special = tiny.shape(patch_size=size), tiny.special()
    model = random_model(shape, special, seed=0, **mode).eval()
    return Answerer(model, new_processor(tiny.tokenizer(), shape_config(shape, special, **mode)))


@pytest.fixture(scope="module")
def asked():
    """A model, a picture, a question and a trace in which a token was taken back."""
    own, picture = answerer(), noise_picture(50, 40)
    config = replace(CONFIG, steps=8, revision=RevealRemask(0.25))
    _, trace = own.ask(picture, tiny.QUESTIONS[0], config)
    assert any(event.kind == REMASK for event in trace.events)
    return own, picture, tiny.QUESTIONS[0], trace


def slow(own: Answerer, picture: Image.Image, question: str, event: Event, trace: Trace, hide: str, region: int | None):
    """log p of one token with one region hidden, by `model.forward` on one canvas."""
    pixels = np.array(picture)
    height, width = pixels.shape[:2]
    row, column = divmod(region or 0, 4)
    if hide == "pixels" and region is not None:
        place = np.s_[row * height // 4 : (row + 1) * height // 4, round(column * width / 4) : round((column + 1) * width / 4)]
        pixels[place] = pixels[place].reshape(-1, 3).mean(0).round()
    inputs = own.processor(images=Image.fromarray(pixels), text=question)
    features = own.model.model.get_image_features(inputs["pixel_values"])[0]
    if hide == "tokens" and region is not None:
        others = [token for token in range(16) if token != region]
        features = features.clone()
        features[region] = features[others].mean(0)
    canvas = torch.cat([inputs["input_ids"], torch.tensor([trace.replay(event.step - 1)])], dim=1)
    logits = own.model(canvas, image_features=features[None]).logits[0, inputs["input_ids"].shape[1] + event.position]
    return logits.log_softmax(-1)[event.token]


@ways
@torch.no_grad()
def test_the_attribution_is_that_of_one_region_and_one_token_at_a_time(asked, hide):
    own, picture, question, trace = asked
    found = attribute(own, Occlusions.of(own, picture, hide=hide), question, trace)
    assert found.drops.shape == (len(found.events), 4, 4) and found.drops.dtype == torch.float32
    assert {event.position for event in found.events} == set(range(12)), "a revised token counts where it stands at the end"
    for place in (0, 5, 11):
        event = found.events[place]
        whole = slow(own, picture, question, event, trace, hide, None)
        assert found.log_probability[place] == pytest.approx(float(whole), abs=1e-4)
        for region in (0, 6, 15):
            drop = whole - slow(own, picture, question, event, trace, hide, region)
            assert found.drops[place].flatten()[region] == pytest.approx(float(drop), abs=1e-4)
    assert found.drops.abs().max() > 0.01
    assert found.of([2, 7]).allclose(found.drops[2] + found.drops[7])


def test_batches_positions_and_the_way_of_asking_change_nothing(asked):
    own, picture, question, trace = asked
    shown, told = Occlusions.of(own, picture, rows=3), []
    whole = attribute(own, shown, question, trace, rows=5, on_step=lambda *count: told.append(count))
    part = attribute(own, Occlusions.of(own, picture), question, trace, positions=[7, 3])
    assert torch.stack([whole.drops[3], whole.drops[7]]).allclose(part.drops, atol=1e-5)
    assert [event.position for event in part.events] == [3, 7]
    assert told[-1] == (told[-1][1],) * 2 and told[-1][1] == 17 * len({event.step for event in whole.events})
    batched = tiny.examples(3)
    answers = [pair for batch in own.traced(batched, CONFIG, batch_size=2) for pair in batch]
    for example, (answer, kept) in zip(batched, answers, strict=True):
        alone = own.ask(example.image, example.question, CONFIG)[1]
        assert alone.replay(99) == kept.replay(99, kept.events[0].row) and answer.id == example.id


@ways
def test_without_a_projector_no_region_matters(asked, hide):
    _, picture, question, trace = asked
    blind = answerer()
    for weight in blind.model.model.projector.parameters():
        torch.nn.init.zeros_(weight)
    assert attribute(blind, Occlusions.of(blind, picture, hide=hide), question, trace).drops.abs().max() < 1e-6


@ways
def test_a_region_that_shows_nothing_of_its_own_does_not_matter(hide):
    own = answerer()
    flat = Image.new("RGB", (64, 64), (90, 120, 60))
    pixels = np.array(flat)
    pixels[:16, :16] = np.array(noise_picture(16, 16))
    picture = Image.fromarray(pixels)
    _, trace = own.ask(picture, tiny.QUESTIONS[0], CONFIG)
    if hide == "pixels":
        drops = attribute(own, Occlusions.of(own, picture), tiny.QUESTIONS[0], trace).drops
        assert drops[:, 0, 0].abs().max() > 0.01 and drops.flatten(1)[:, 1:].abs().max() < 1e-6
    shown = Occlusions.of(own, picture, hide=hide)
    outside = Occlusions(Regions(1, 1), shown.features[:1].repeat(2, 1, 1))  # a region in which no visual token looks
    assert attribute(own, outside, tiny.QUESTIONS[0], trace).drops.abs().max() < 1e-6


@every_mode
def test_every_visual_token_looks_where_its_pixels_are(mode):
    """A picture that is its own coordinates, cut into views: the mean color of a token's square says where it looks."""
    own = answerer(mode)
    plan, side, checked = own.processor.view_plan, 4, 0
    for width, height in [(96, 32), (40, 64), (64, 64)]:
        x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
        picture = Image.fromarray((255 * np.stack([x, y, 0 * x + 1], axis=-1)).astype(np.uint8))
        views = own.processor.pixels([picture]) / 2 + 0.5  # [V, 3, 32, 32]
        squares = views.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
        layouts, places = own.processor.layouts([picture]), plan.places(width, height)
        seen = squares.reshape(-1, 3)
        if layouts is not None:
            seen = merge_views(squares, layouts, torch.full((3,), torch.nan))
        assert len(seen) == len(places) and seen[:, 0].isnan().equal(places[:, 0].isnan())
        inner = (places > 0.2).all(dim=1) & (places < 0.8).all(dim=1)  # beside an edge a square holds padding, too
        checked += int(inner.sum())
        assert ((seen[:, :2] - places).abs() < 0.03)[inner].all()
        owners = Regions.of(plan, width, height).owners(places)
        count = Regions.of(plan, width, height)
        assert set(owners[owners >= 0].tolist()) == set(range(count.rows * count.columns)), "each region is looked at"
    assert checked


def test_the_tokens_of_a_picture_are_as_many_as_their_places():
    for mode in MODES:
        plan = answerer(mode).processor.view_plan
        assert all(len(plan.places(*size)) == plan.tokens(*size) for size in SIZES)


def test_many_visual_tokens_make_nine_regions_a_side_and_boxes_cover_the_picture():
    regions = Regions.of(ViewPlan(384, 27), 640, 480)
    assert (regions.rows, regions.columns) == (9, 9)
    assert Regions.of(ViewPlan(64, 4), 64, 64) == Regions(4, 4) and Regions.of(ViewPlan(64, 4), 64, 64, most=2) == Regions(2, 2)
    assert Regions.of(ViewPlan(64, 4, "pad"), 64, 30) == Regions(2, 4)
    hit = np.zeros((480, 640), int)
    for place in regions.pixels(640, 480):
        hit[place] += 1
    assert (hit == 1).all() and regions.boxes[0] == (0, 0, 1 / 9, 1 / 9) and regions.boxes[-1][2:] == (1, 1)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode["image_aspect"] == "anyres"][:2])
@ways
def test_a_region_of_several_views_is_hidden_in_all_of_them(mode, hide):
    own, picture = answerer(mode), noise_picture(90, 40)
    shown = Occlusions.of(own, picture, hide=hide, rows=4)
    changed = (shown.features[1:] != shown.features[:1]).any(dim=-1)  # [R, T]
    owners = shown.regions.owners(own.processor.view_plan.places(*picture.size))
    for region, tokens in enumerate(changed):
        assert tokens[owners == region].all()
    _, trace = own.ask(picture, tiny.QUESTIONS[0], CONFIG)
    assert attribute(own, shown, tiny.QUESTIONS[0], trace).drops.shape[1:] == (4, 4)


def test_what_cannot_be_attributed_is_refused_in_words(asked):
    own, picture, question, trace = asked
    shown = Occlusions.of(own, picture)
    with pytest.raises(ValueError, match=r"several rows: take trace\.of_row"):
        attribute(own, shown, question, Trace((Event(0, 0, 0, 1, 0.5), Event(0, 1, 0, 1, 0.5)), 4, 9))
    with pytest.raises(ValueError, match="no token there"):
        attribute(own, shown, question, trace, positions=[99])
    with pytest.raises(ValueError, match="'fog': use one of pixels, tokens"):
        Occlusions.of(own, picture, hide="fog")
    back = Trace((Event(0, 0, 1, 5, 0.9), Event(1, 0, 1, 5, 0.9, REMASK), Event(1, 0, 0, 5, 0.9)), 4, 9)
    assert [event.position for event in written(back)] == [0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_mask_of_a_lesion_is_what_its_drawing_changes(domain):
    for number, finding in enumerate(FINDINGS[domain]):
        small, large = (
            sample_scene(5 + number, domain=domain, finding=finding, side="left", size=size) for size in ("small", "large")
        )
        masks = [lesion_mask(scene) for scene in (small, large)]
        assert 0.005 < masks[0].mean() < masks[1].mean() < 0.25
        center = np.argwhere(masks[0]).mean(axis=0)[1] / 64
        assert (center > 0.5) == (domain in ("chest_xray", "ct", "mri")), "the patient's left is on the right of an X-ray"
        bare = replace(small, finding="normal", side=None, level=None, size=None)
        outside = np.abs(draw(small).astype(int) - draw(bare))[~masks[0]]
        assert outside.max() <= 16 and not lesion_mask(bare).any()
