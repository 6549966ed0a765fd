"""Images as the reference sees them: views, pixels, visual tokens, merged embeddings, and losses of batches with images.

The folder with the reference's outputs is MEDV_FIXTURES (default: ../shared/fixtures beside the repository). Every case that
its mm.json and mm.safetensors hold is tested; no name, number or size of a case stands here.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from PIL import Image
from reference import FOLDER, keys, needs_reference, read, reference_network
from safetensors.torch import load_file
from tiny import tokenizer
from transformers import LlamaConfig, SiglipVisionConfig

from medv.checkpoints.assembly import new_processor
from medv.data.chat import IGNORED
from medv.diffusion.corruption import corrupt
from medv.diffusion.loss import masked_cross_entropy, token_weights
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor

pytestmark = needs_reference

IMAGE_PLACEHOLDER = -200  # in the reference's ids
PIXEL_STRIDE = 24  # of the stored pixels
GRAY_LEVEL = 1 / 127.5


MM, MM_KEYS = read("mm.json"), keys("mm.safetensors")
IMAGES = list(MM.get("images", {}))
TABLE = re.compile(r"token_table_(?P<aspect>.+?)_(?P<merge>flat|spatial_unpad|spatial)_(\d+)x(\d+)_to_(\d+)x(\d+)")
SIZES = [
    pytest.param(match, row, id=f"{match['aspect']}-{match['merge']}-{row['size_wh'][0]}x{row['size_wh'][1]}")
    for key, rows in MM.items()
    if (match := TABLE.fullmatch(key))
    for row in rows
]
MODE_FEATURES = [key for key in MM_KEYS if key.startswith("mode.")]
LOSSES = [name for name, facts in MM.items() if isinstance(facts, dict) and f"{name}.loss" in MM_KEYS]


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "mm.safetensors")


@cache
def picture(name: str) -> Image.Image:
    return Image.open(FOLDER / "images" / f"{name}.png")


def released_mode(aspect: str, merge: str) -> dict:
    """The settings of medv for an aspect as the released configurations write it, e.g. anyres_max_4."""
    base, _, most = aspect.partition("_max_")
    return {"image_aspect": base, "image_max_tiles": int(most) if most else None, "patch_merge": merge}


@cache
def config() -> MedVConfig:
    settings = read("config.json")
    vision, mm = settings["vision"], settings["mm"]
    used = {int(i) for key in MM_KEYS if key.endswith("input_ids") for i in tensors()[key].flatten()}
    vocabulary = settings["lm"]["vocab_size"]
    return MedVConfig(
        # The last layer of the released tower is not computed.
        vision_config=SiglipVisionConfig(**vision | {"num_hidden_layers": vision["num_hidden_layers"] - 1}),
        text_config=LlamaConfig(**settings["lm"]),
        image_grid=mm["image_grid_pinpoints"],
        # The placeholder of medv is an id of the vocabulary: any that is nobody's text.
        image_token_id=next(i for i in reversed(range(vocabulary)) if i not in used),
        **released_mode(mm["image_aspect_ratio"], mm["mm_patch_merge_type"]),
    )


@pytest.fixture(scope="module")
def image_network() -> MedVForMaskedDiffusion:
    return reference_network(config())


def processor(**settings) -> MedVProcessor:
    """The processor of the released configuration, with other settings where they are given."""
    own = new_processor(tokenizer(), config())
    for name, value in settings.items():
        setattr(own, name, value)
    return own


def features_of(image_network: MedVForMaskedDiffusion, own: MedVProcessor, names: list[str]) -> torch.Tensor:
    """Merged visual tokens [T, D] of pictures, one after the other."""
    pictures = [picture(name) for name in names]
    features = image_network.model.get_image_features(own.pixels(pictures), own.layouts(pictures))
    return features.reshape(-1, features.shape[-1])


def expanded(row: torch.Tensor, marks: torch.Tensor, fill: int, counts: list[int]) -> torch.Tensor:
    """A row of ids or labels with each image placeholder of `marks` replaced by `counts` times `fill`."""
    counts, parts = iter(counts), []
    for value, mark in zip(row, marks, strict=True):
        parts.append(torch.full((next(counts),), fill) if mark == IMAGE_PLACEHOLDER else value[None])
    return torch.cat(parts)


def padded(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


# Views and numbers of visual tokens.


@pytest.mark.parametrize(("table", "row"), SIZES)
def test_every_listed_size_has_the_views_and_visual_tokens_of_the_reference(table, row):
    columns, rows = (range(int(table[first]), int(table[first + 2]) + 1) for first in (3, 4))
    side = config().vision_config.image_size
    grid = [[side * c, side * r] for c, r in itertools.product(columns, rows)]
    plan = processor(image_grid=grid, **released_mode(table["aspect"], table["merge"])).view_plan
    layout = plan.layout(*row["size_wh"])
    assert [value // side for value in plan.resolution(*row["size_wh"])] == row["grid_wh"]
    assert layout.views == row["n_crops_incl_base"] == len(plan.views(Image.new("RGB", row["size_wh"])))
    assert plan.tokens(*row["size_wh"]) == row["n_visual_tokens"]


@pytest.mark.parametrize("mode", MM.get("modes", {}))
def test_every_listed_mode_has_the_visual_tokens_of_the_reference(mode, image_network):
    aspect, merge, name = mode.split("|")
    own = processor(**released_mode(aspect, merge))
    assert own.view_plan.tokens(*picture(name).size) == MM["modes"][mode]
    with torch.no_grad():
        assert len(features_of(image_network, own, [name])) == MM["modes"][mode]


@pytest.mark.parametrize("name", IMAGES)
def test_the_views_have_the_pixels_of_the_reference(name):
    facts, plan = MM["images"][name], processor().view_plan
    size = picture(name).size
    assert list(size) == facts["size_wh"] and list(plan.resolution(*size)) == facts["best_resolution_wh"]
    assert [value // plan.size for value in plan.resolution(*size)] == facts["grid_wh"]
    assert plan.tokens(*size) == facts["n_visual_tokens"] and plan.layout(*size).views == facts["n_crops_incl_base"]
    pixels = processor().pixels([picture(name)])
    stored = tensors()[f"{name}.pixels_sub"]
    assert len(pixels) == facts["n_crops_incl_base"]
    torch.testing.assert_close(pixels[:, :, ::PIXEL_STRIDE, ::PIXEL_STRIDE], stored, rtol=0, atol=GRAY_LEVEL)
    assert pixels.mean().item() == pytest.approx(facts["pixel_mean"], abs=GRAY_LEVEL / 10)
    assert pixels.std().item() == pytest.approx(facts["pixel_std"], abs=GRAY_LEVEL / 10)


# Features.


@pytest.mark.parametrize("name", IMAGES)
def test_the_features_of_tower_and_projector_are_those_of_the_reference(name, image_network):
    seen = []
    handle = image_network.model.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tower, projected = tensors()[f"{name}.tower"], tensors()[f"{name}.projected"]
    with torch.no_grad():
        features = image_network.model.get_image_features(processor().pixels([picture(name)])[: len(projected)])
    handle.remove()
    torch.testing.assert_close(seen[0][: len(tower)], tower, rtol=0, atol=1e-4)
    torch.testing.assert_close(features, projected, rtol=0, atol=1e-4)


def stride_of(length: int, kept: int) -> int:
    """The step with which `length` rows were thinned to `kept`."""
    return next(step for step in itertools.count(1) if -(-length // step) == kept)


@pytest.mark.parametrize("key", MODE_FEATURES)
def test_the_merged_features_of_every_mode_are_those_of_the_reference(key, image_network):
    aspect, merge, name = key.removeprefix("mode.").split(".", 2)
    stored = tensors()[key][0]
    with torch.no_grad():
        features = features_of(image_network, processor(**released_mode(aspect, merge)), [name])
    torch.testing.assert_close(features[:: stride_of(len(features), len(stored))], stored, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_visual_tokens_stand_in_the_place_of_the_placeholder(name, image_network):
    ids = torch.tensor([126080, 11, 12, IMAGE_PLACEHOLDER, 13, 14, 15])
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 3, IGNORED, ids)
    count = [processor().view_plan.tokens(*picture(name).size)]
    full = expanded(ids, ids, image_network.config.image_token_id, count)
    with torch.no_grad():
        embeds = image_network.model.embed(full[None], features_of(image_network, processor(), [name]))
    torch.testing.assert_close(embeds, tensors()[f"{name}.inputs_embeds"], rtol=0, atol=1e-4)
    assert expanded(labels, ids, IGNORED, count)[None].equal(tensors()[f"{name}.labels"])


# Losses of batches with images. The reference pads rows of different lengths with zero embeddings that are attended.


@dataclass
class Case:
    """A batch of the reference: ids and labels [B, T] with a placeholder per visual token, `real` [B, T] bool where a row has
    tokens, the name of each row's picture (None where the folder lacks it), and each row's visual tokens [n, D].
    """

    stored: dict[str, torch.Tensor]
    processor: MedVProcessor
    ids: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor
    names: list[str | None]
    features: list[torch.Tensor]


def stored_inputs(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a loss case; several cases may share those of a common prefix."""
    prefix = name if f"{name}.input_ids" in MM_KEYS else name.partition("_")[0]
    return {key.removeprefix(f"{prefix}."): tensors()[key] for key in MM_KEYS if key.startswith(f"{prefix}.")}


def fitting_picture(image_network, own: MedVProcessor, seen: torch.Tensor) -> tuple[str | None, torch.Tensor]:
    """The picture whose visual tokens are `seen` [n, D], which the folder does not name, and its visual tokens."""
    for name in IMAGES:
        if own.view_plan.tokens(*picture(name).size) == len(seen):
            features = features_of(image_network, own, [name])
            if torch.allclose(features, seen, rtol=0, atol=1e-4):
                return name, features
    return None, seen


def load_case(image_network, name: str, guess: str | None = None) -> Case:
    """A case by its stored embeddings, or, where there are none, with the picture `guess` in every row.

    Cases with anyres in their names follow the released configuration, the others have one padded view an image.
    """
    stored = stored_inputs(name)
    own = processor() if "anyres" in name else processor(image_aspect="pad", patch_merge="flat")
    names, features = [], []
    for row, marks in enumerate(stored["input_ids"]):
        if guess is None:
            embeds, start = stored["inputs_embeds"][row], marks.tolist().index(IMAGE_PLACEHOLDER)
            length = int(embeds.any(dim=1).nonzero().max()) + 1
            found = fitting_picture(image_network, own, embeds[start : start + length - len(marks) + 1])
        else:
            found = guess, features_of(image_network, own, [guess])
        names.append(found[0])
        features.append(found[1])
    ids, labels = (
        [
            expanded(values, marks, fill, [len(tokens)])
            for values, marks, tokens in zip(stored[key], stored["input_ids"], features, strict=True)
        ]
        for key, fill in (("input_ids", image_network.config.image_token_id), ("labels_in", IGNORED))
    )
    real = padded([torch.ones(len(row), dtype=torch.bool) for row in ids], False)
    return Case(stored, own, padded(ids, 0), padded(labels, IGNORED), real, names, features)


def loss_from_model(image_network, case: Case) -> torch.Tensor:
    """The loss by the model's own forward, from pixels where the folder has all pictures."""
    noise = {"t": case.stored["t"], "u": case.stored["u"], "labels": case.labels}
    if None in case.names:
        return image_network(case.ids, image_features=torch.cat(case.features), **noise).loss
    pictures = [picture(name) for name in case.names]
    views = {"pixel_values": case.processor.pixels(pictures), "image_layouts": case.processor.layouts(pictures)}
    return image_network(case.ids, **views, **noise).loss


def loss_from_parts(image_network, case: Case, *, masked_turns: bool) -> torch.Tensor:
    """The same loss where rows end in zero embeddings that are seen, or where a turn does not see later ones."""
    targets, own = case.labels != IGNORED, image_network.config
    noise = corrupt(case.ids, targets, case.stored["t"], case.stored["u"], own.mask_token_id, eps=own.noise_eps)
    embeds = image_network.model.embed(noise.ids, torch.cat(case.features)) * case.real[..., None]
    visible = None
    if masked_turns:
        turn = case.stored["conversation_ids"]  # [B, T]
        visible = (turn[:, None] <= turn[:, :, None])[:, None]  # [B, 1, query, key]
    tower = image_network.model.language_model
    hidden = tower(inputs_embeds=embeds, attention_mask=visible, use_cache=False).last_hidden_state
    weights = token_weights(noise.masked, targets, noise.p_mask, own.loss_normalization)
    return masked_cross_entropy(hidden[noise.masked], image_network.lm_head, case.labels[noise.masked], weights)


def case_losses(image_network, name: str, case: Case) -> list[torch.Tensor]:
    """The loss of a case by every way that has words for it."""
    masked_turns = name.endswith("convmask_on")
    losses = [loss_from_parts(image_network, case, masked_turns=masked_turns)]
    if case.real.all() and not masked_turns:
        losses.append(loss_from_model(image_network, case))
    return losses


def the_case(image_network, name: str) -> Case:
    """The case with the pictures that it was made of."""
    if "inputs_embeds" in stored_inputs(name):
        return load_case(image_network, name)
    with torch.no_grad():  # no embeddings to compare: the picture whose loss is nearest
        guesses = [load_case(image_network, name, guess) for guess in IMAGES]
        wanted = tensors()[f"{name}.loss"]
        guesses = [case for case in guesses if case.labels.shape == stored_inputs(name)["labels_out"].shape]
        best = min(guesses, key=lambda case: (case_losses(image_network, name, case)[0] - wanted).abs().item())
    return load_case(image_network, name, best.names[0])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_batches_with_images_are_those_of_the_reference(name, image_network):
    case = the_case(image_network, name)
    assert any(case.names), "no row of this batch is of a picture in the folder"
    assert case.labels.equal(case.stored["labels_out"])
    if "inputs_embeds" in case.stored:
        with torch.no_grad():
            embeds = image_network.model.embed(case.ids, torch.cat(case.features)) * case.real[..., None]
        torch.testing.assert_close(embeds, case.stored["inputs_embeds"], rtol=0, atol=1e-4)
    trained = {"norm": image_network.model.language_model.norm.weight}
    if None not in case.names:  # else the projector's part in a row is unknown
        trained["projector0"] = image_network.model.projector.linear_1.weight
    for loss in case_losses(image_network, name, case):
        image_network.zero_grad()
        loss.backward(retain_graph=True)
        assert loss.item() == pytest.approx(tensors()[f"{name}.loss"].item(), rel=1e-6)
        assert loss.item() == pytest.approx(MM[name]["loss"], rel=1e-6)
        for part, parameter in trained.items():
            stored = tensors()[f"{name}.grad.{part}"]
            torch.testing.assert_close(parameter.grad, stored, rtol=1e-5, atol=1e-5, msg=f"gradient of {part}")
