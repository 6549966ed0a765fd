"""Views and visual tokens: the count is that of the merge, tokens stand where the picture has them, batches equal singles."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUESTIONS, shape, special, tokenizer

from medv.checkpoints.assembly import new_processor, random_model, shape_config
from medv.checkpoints.bundled import load_model
from medv.data.example import Example, Turn
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.model.looks import Looks
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.model.views import ASPECTS, MERGES, ViewPlan, merge_views
from medv.training.collate import Collator, Encoder
from medv.training.lora import freeze_except

SIZE, SIDE = 32, 4
GRID = tuple((SIZE * columns, SIZE * rows) for columns in (1, 2, 3) for rows in (1, 2, 3))
ANYRES = {"image_aspect": "anyres", "image_grid": GRID}
MODES = [
    {"image_aspect": aspect, "patch_merge": merge, "image_max_tiles": most, "image_grid": GRID}
    for aspect in ASPECTS
    for merge in MERGES
    for most in ((None, 1, 2) if (aspect, merge) == ("anyres", "spatial_unpad") else (None,))
]
SIZES = [(32, 32), (96, 32), (32, 96), (40, 33), (33, 40), (7, 200), (200, 7), (1, 999), (999, 1), (300, 301), (1, 1)]
SAMPLER = SamplerConfig(gen_length=8, block_length=8, steps=4)


def name_of(mode: dict) -> str:
    return "-".join(str(mode[key]) for key in ("image_aspect", "patch_merge", "image_max_tiles"))


every_mode = pytest.mark.parametrize("mode", MODES, ids=name_of)


def plan(**changes) -> ViewPlan:
    return ViewPlan(**{"size": SIZE, "side": SIDE, "aspect": "anyres", "grid": GRID, "merge": "spatial_unpad"} | changes)


def network(**options) -> MedVForMaskedDiffusion:
    """A random model with 4 x 4 visual tokens a view."""
    return random_model(shape(patch_size=8), special(), seed=0, **options).eval()


def processor(**options) -> MedVProcessor:
    return new_processor(tokenizer(), shape_config(shape(patch_size=8), special(), **options))


def noise_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def coordinates(views: int) -> torch.Tensor:
    """Features [views, N, 3] that say where they come from: view, row and column in the view."""
    places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), dim=-1).reshape(-1, 2)
    view = torch.arange(views)[:, None, None].expand(views, SIDE * SIDE, 1)
    return torch.cat([view, places.expand(views, -1, -1)], dim=-1).float()


def layouts_of(*rows) -> torch.Tensor:
    return torch.tensor([list(vars(row).values()) for row in rows])


# The number of tokens.


@every_mode
def test_the_number_of_tokens_is_that_of_the_merge_for_any_size(mode):
    own, rng = processor(**mode), random.Random(0)
    sizes = SIZES + [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(150)]
    for size in sizes:
        layout = own.view_plan.layout(*size)
        layouts = own.layouts([Image.new("L", size)])
        features = torch.zeros(layout.views, SIDE * SIDE, 2)
        merged = features.flatten(0, 1) if layouts is None else merge_views(features, layouts, torch.ones(2))
        assert len(merged) == own.view_plan.tokens(*size) == layout.tokens(SIDE), size
        newlines = int(merged[:, 0].sum())
        assert newlines == (layout.height if mode["patch_merge"] == "spatial_unpad" else 0), size


@every_mode
def test_a_picture_has_as_many_views_as_its_layout_says(mode):
    own = processor(**mode)
    for size in SIZES:
        views = own.view_plan.layout(*size).views
        assert len(own.pixels([Image.new("L", size)])) == views
        assert views == 1 or (mode["image_aspect"] == "anyres" and views > 1)


def test_the_tokens_of_the_released_mode():
    grid = tuple((384 * columns, 384 * rows) for columns in range(1, 7) for rows in range(1, 7))
    released = ViewPlan(384, 27, "anyres", grid, 4, "spatial_unpad")
    assert released.tokens(384, 384) == 1485 == 729 + 27 * 28
    assert released.tokens(768, 768) == released.tokens(2048, 2048) == 3699 == 729 + 54 * 55
    assert ViewPlan(384, 27).tokens(800, 300) == ViewPlan(384, 27, "pad").tokens(800, 300) == 729


def test_rows_of_tokens_are_rounded_down():
    layout = plan().layout(90, 51)  # fills 6.8 of 8 token rows of 3 x 2 tiles
    assert (layout.columns, layout.rows, layout.top, layout.height, layout.width) == (3, 2, 1, 6, 12)
    slim = plan().layout(51, 90)
    assert (slim.columns, slim.rows, slim.left, slim.height, slim.width) == (2, 3, 1, 12, 6)


@pytest.mark.parametrize(("most", "side"), [(9, 12), (8, 12), (7, 10)])  # 12 x 12 tokens are 1, 1.06 and 1.13 times too many
def test_a_grid_is_shrunk_only_if_it_is_more_than_a_tenth_too_large(most, side):
    layout = plan(max_tiles=most).layout(500, 500)
    assert (layout.width, layout.height) == (side, side)


# Views.


def test_padding_keeps_the_picture_in_the_middle_of_gray():
    (view,) = plan(aspect="pad").views(Image.new("RGB", (10, 4), (255, 0, 0)))
    pixels = np.asarray(view)
    assert view.size == (10, 10) and (pixels[3:7] == (255, 0, 0)).all()
    assert (pixels[:3] == 127).all() and (pixels[7:] == 127).all()


def test_tiles_are_the_enlarged_picture_on_black_row_by_row():
    picture = noise_picture(90, 50)
    base, *tiles = plan().views(picture)
    layout = plan().layout(90, 50)
    assert (layout.columns, layout.rows, len(tiles)) == (3, 2, 6)
    assert base.size == (90, 50), "the base view is the whole picture, to be squashed"
    canvas = Image.new("RGB", (96, 64))
    for number, tile in enumerate(tiles):
        assert tile.size == (SIZE, SIZE)
        canvas.paste(tile, (number % 3 * SIZE, number // 3 * SIZE))
    enlarged = picture.resize((96, 54), Image.Resampling.BICUBIC)  # 53.3 rows, rounded up
    pixels = np.asarray(canvas)
    assert (pixels[5:59] == np.asarray(enlarged)).all()
    assert (pixels[:5] == 0).all() and (pixels[59:] == 0).all()


@pytest.mark.parametrize(
    ("size", "best"), [((32, 32), (32, 32)), ((20, 60), (32, 64)), ((33, 32), (64, 32)), ((500, 500), (96, 96))]
)
def test_the_grid_keeps_most_pixels_and_wastes_least(size, best):
    assert plan().resolution(*size) == best


# The merge.


def test_spatial_reads_the_tiles_as_one_picture():
    layout = plan(merge="spatial").layout(64, 64)
    merged = merge_views(coordinates(5), layouts_of(layout), None)
    assert merged[:16].equal(coordinates(1)[0])
    grid = merged[16:].reshape(8, 8, 3)
    for row, column in [(0, 0), (0, 4), (3, 7), (4, 0), (7, 5)]:
        view = 1 + row // 4 * 2 + column // 4
        assert grid[row, column].tolist() == [view, row % 4, column % 4]


def test_unpad_drops_the_padding_and_ends_each_row_with_a_newline():
    layout = plan().layout(90, 48)  # 3 x 2 tiles; the picture fills 6 of 8 token rows
    assert (layout.columns, layout.rows, layout.top, layout.left, layout.height, layout.width) == (3, 2, 1, 0, 6, 12)
    merged = merge_views(coordinates(7), layouts_of(layout), torch.full((3,), -1.0))
    rows = merged[16:].reshape(6, 13, 3)
    assert (rows[:, -1] == -1).all() and (rows[:, :-1] >= 0).all()
    assert rows[0, 0].tolist() == [1, 1, 0] and rows[-1, -2].tolist() == [6, 2, 3]


def test_a_single_view_ends_with_one_newline():
    layout = plan(aspect="pad").layout(10, 30)
    merged = merge_views(coordinates(1), layouts_of(layout), torch.full((3,), -1.0))
    assert merged[:-1].equal(coordinates(1)[0]) and merged[-1].tolist() == [-1, -1, -1]


def test_a_large_grid_is_shrunk_by_bilinear_interpolation():
    layout = plan(max_tiles=1).layout(500, 500)  # 12 x 12 tokens, three times too many a side
    assert (layout.width, layout.height) == (4, 4)
    features = torch.rand(10, 16, 2, generator=torch.Generator().manual_seed(0))
    rows = merge_views(features, layouts_of(layout), torch.zeros(2))[16:].reshape(4, 5, 2)[:, :-1]
    tiles = features[1:].reshape(3, 3, 4, 4, 2).transpose(1, 2).reshape(12, 12, 2)
    torch.testing.assert_close(rows, tiles[1::3, 1::3])  # the centers of 3 x 3 squares
    half = plan(max_tiles=1).layout(64, 64)  # 8 x 8 tokens, twice too many a side
    rows = merge_views(features[:5], layouts_of(half), torch.zeros(2))[16:].reshape(4, 5, 2)[:, :-1]
    tiles = features[1:5].reshape(2, 2, 4, 4, 2).transpose(1, 2).reshape(4, 2, 4, 2, 2)
    torch.testing.assert_close(rows, tiles.mean(dim=(1, 3)))


def test_images_of_a_batch_keep_their_own_views():
    own, pictures = processor(**ANYRES, patch_merge="spatial_unpad"), [noise_picture(*size) for size in SIZES[:5]]
    model = network(**ANYRES, patch_merge="spatial_unpad")
    with torch.no_grad():
        together = model.model.get_image_features(own.pixels(pictures), own.layouts(pictures))
        single = [model.model.get_image_features(own.pixels([p]), own.layouts([p])) for p in pictures]
    torch.testing.assert_close(together, torch.cat(single))


# Through processor, training and generation.


@every_mode
def test_a_batch_of_images_of_different_sizes_is_what_its_single_runs_are(mode):
    model, own = network(**mode), processor(**mode)
    pictures = [noise_picture(*size) for size in ((64, 64), (90, 30), (20, 33))]
    batch = own(images=pictures, text=QUESTIONS[:3])
    assert set(batch) == set(own.model_input_names)
    with torch.no_grad():
        logits = model(**batch).logits
    answers = model.generate(**batch, config=SAMPLER)
    for row, picture in enumerate(pictures):
        alone = own(images=picture, text=QUESTIONS[row])
        tokens = int((alone["input_ids"] == special().image).sum())
        assert tokens == own.view_plan.tokens(*picture.size)
        with torch.no_grad():
            single = model(**alone).logits[0]
        torch.testing.assert_close(logits[row, -len(single) :], single, rtol=1e-4, atol=1e-4)
        assert answers.sequences[row].equal(model.generate(**alone, config=SAMPLER, row_indices=[row]).sequences[0])


def sized_examples() -> list[Example]:
    """Questions about pictures of three sizes, and one without a picture."""
    images = [None, *(lambda size=size: noise_picture(*size) for size in ((64, 64), (90, 30), (20, 33)))]
    turns = (Turn("user", QUESTIONS[0]), Turn("assistant", "chest"))
    return [Example(str(i), image, turns) for i, image in enumerate(images)]


def training_items(own: MedVProcessor) -> list[dict]:
    encode = Encoder(own, loss_tokens="response", max_length=1000)
    return [encode(example) | {"noise": (0, 0, i), "stratum": (3, 4)} for i, example in enumerate(sized_examples())]


@every_mode
def test_a_training_batch_may_mix_sizes_and_text(mode):
    model, items = network(**mode, loss_normalization="sample"), training_items(processor(**mode))
    collator = Collator(special(), padding="none")
    with torch.no_grad():
        together = model(**collator(items)).loss
        single = torch.stack([model(**collator([item])).loss for item in items])
    torch.testing.assert_close(together, single.mean(), rtol=1e-5, atol=1e-5)
    assert "image_layouts" not in collator(items[:1])


def test_answers_are_about_images_of_any_size():
    mode = ANYRES | {"patch_merge": "spatial_unpad"}
    answers = Answerer(network(**mode), processor(**mode)).answer(sized_examples()[1:], SAMPLER, quiet=True)
    assert len(answers) == 3


def test_what_was_computed_of_images_is_kept_within_bounds():
    drawn = []
    example = Example("1", lambda: drawn.append(1) or noise_picture(40, 40), sized_examples()[0].turns)
    for mode, expected in (({}, 1), (ANYRES, 2)):
        own = processor(**mode)
        looks = Looks(own, keep=3 * SIZE * SIZE * 4)
        encode = Encoder(own, loss_tokens="response", max_length=1000, looks=looks)
        drawn.clear()
        first, second = encode(example), encode(example)
        assert len(drawn) == expected and first["pixel_values"].equal(second["pixel_values"])


def test_the_newline_is_a_weight_of_models_that_unpad_and_learns_with_the_language_tower(tmp_path):
    mode = ANYRES | {"patch_merge": "spatial_unpad"}
    assert "model.image_newline" not in network(**ANYRES, patch_merge="spatial").state_dict()
    model = network(**mode).train()
    newline = model.model.image_newline
    assert newline.shape == (32,) and 0.5 < newline.std().item() * 32**0.5 < 1.5
    freeze_except(model, ["projector"])
    assert not newline.requires_grad
    freeze_except(model, ["projector", "language_model"])
    model(**Collator(special(), padding="none")(training_items(processor(**mode)))).loss.backward()
    assert newline.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    processor(**mode).save_pretrained(tmp_path)
    loaded, own = load_model(tmp_path)
    assert loaded.model.image_newline.equal(newline)
    assert loaded.config.view_plan == model.config.view_plan == own.view_plan


# Settings.


@every_mode
def test_save_and_load_keep_the_settings_of_the_processor(tmp_path, mode):
    own = processor(**mode)
    own.save_pretrained(tmp_path)
    loaded = MedVProcessor.from_pretrained(tmp_path)
    assert loaded.view_plan == own.view_plan == shape_config(shape(patch_size=8), special(), **mode).view_plan
    first, second = (p(images=noise_picture(50, 20), text="Where?") for p in (own, loaded))
    assert set(first) == set(second) and all(first[key].equal(second[key]) for key in first)


def test_the_settings_may_be_other_than_those_of_the_model(tmp_path):
    processor(**ANYRES, patch_merge="spatial_unpad").save_pretrained(tmp_path)
    loaded = MedVProcessor.from_pretrained(tmp_path, image_aspect="pad", patch_merge="flat")
    assert loaded.view_plan.tokens(90, 20) == SIDE * SIDE
    loaded.image_aspect, loaded.patch_merge = "anyres", "spatial"
    assert loaded.view_plan == plan(merge="spatial")
    model = network(**ANYRES, patch_merge="spatial_unpad")
    with torch.no_grad():
        assert model(**loaded(images=noise_picture(90, 20), text="Where?")).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect": "crop"}, "unknown image_aspect 'crop': use one of square, pad, anyres"),
        ({"patch_merge": "unpad"}, "unknown patch_merge 'unpad': use one of flat, spatial, spatial_unpad"),
        ({"image_aspect": "anyres"}, "'anyres' needs image_grid"),
        ({"image_aspect": "anyres", "image_grid": [[32, 40]]}, r"image_grid holds \[32, 40\]: .* multiples of 32 pixels"),
        ({"image_aspect": "anyres", "image_grid": [[0, 32]]}, r"image_grid holds \[0, 32\]"),
        ({"image_aspect": "anyres", "image_grid": [[32]]}, r"image_grid holds \[32\]"),
        ({"image_max_tiles": 0}, "image_max_tiles is 0: give a number from 1 to 1024, or None"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(settings, message):
    own = shape(patch_size=8)
    with pytest.raises(ValueError, match=message):
        shape_config(own, special(), **settings)
    base = processor()
    with pytest.raises(ValueError, match=message):
        MedVProcessor(base.image_processor, base.tokenizer, image_tokens=SIDE * SIDE, **settings)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="the image has 0 x 5 pixels"):
        plan().layout(0, 5)


def test_views_and_layouts_that_do_not_belong_together_are_refused():
    layouts = layouts_of(plan().layout(64, 64))
    with pytest.raises(ValueError, match="layouts are of 5 views but there are 4"):
        merge_views(coordinates(4), layouts, torch.ones(3))
    with pytest.raises(ValueError, match="this model has no image_newline"):
        merge_views(coordinates(5), layouts, None)
    with pytest.raises(ValueError, match="there are no pixel_values"):
        network()(torch.tensor([[30, 31]]), image_layouts=layouts)
