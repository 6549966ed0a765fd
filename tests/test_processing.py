"""The processor: prompts with placeholders, pixels as the tower expects them, and clear refusals."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUESTIONS, picture, processor, special

from medv.data.chat import SYSTEM_PROMPTS, encode_prompt
from medv.data.example import Turn
from medv.data.images import open_image
from medv.model.processing import MedVProcessor, image_processor

pytestmark = pytest.mark.usefixtures("untouched_generators")


def test_prompts_are_padded_on_the_left_and_marked():
    inputs = processor()(images=[picture(i) for i in range(4)], text=QUESTIONS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and inputs["pixel_values"].shape == (4, 3, 32, 32)
    for row, question in enumerate(QUESTIONS):
        prompt = encode_prompt(processor().tokenizer, (Turn("user", question),), image_tokens=4)
        assert ids[row, -len(prompt) :].tolist() == prompt
        assert mask[row].tolist() == [0] * (ids.shape[1] - len(prompt)) + [1] * len(prompt)
        assert (ids[row, : -len(prompt)] == special().end_of_text).all()


def test_one_image_and_one_question_need_no_lists():
    one, many = processor()(images=picture(1), text="Where?"), processor()(images=[picture(1)], text=["Where?"])
    assert all(one[key].equal(many[key]) for key in many) and set(one) == set(processor().model_input_names)


def test_without_images_there_are_no_placeholders_and_no_pixels():
    inputs = processor()(text="What is shown?")
    assert "pixel_values" not in inputs and not (inputs["input_ids"] == special().image).any()


def test_white_space_around_a_question_does_not_matter():
    padded, plain = processor()(text="  What is shown?\n"), processor()(text="What is shown?")
    assert padded["input_ids"].equal(plain["input_ids"])


@pytest.mark.parametrize("text", [None, "", "   ", [], ["What is shown?", " "]])
def test_an_empty_question_is_refused(text):
    with pytest.raises(ValueError, match="the question is empty"):
        processor()(text=text)


@pytest.mark.parametrize("images", [1, 3])
def test_as_many_images_as_questions_are_needed(images):
    with pytest.raises(ValueError, match=f"{images} images but 2 questions"):
        processor()(images=[picture(0)] * images, text=["a?", "b?"])


def test_pixels_are_the_picture_squashed_to_a_square_and_scaled():
    image = picture(3)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    pixels = processor().pixels([image])[0].permute(1, 2, 0)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_every_color_mode_becomes_three_channels(mode):
    image = Image.new("RGB", (20, 30), (255, 255, 255))
    image = Image.new("I;16", (20, 30), 65535) if mode == "I;16" else image.convert(mode)
    pixels = processor().pixels([image])
    assert pixels.shape == (1, 3, 32, 32) and pixels.max() <= 1
    if mode != "I;16":
        torch.testing.assert_close(pixels, torch.ones_like(pixels))


def test_the_system_message_is_by_name_or_in_ones_own_words():
    for system, expected in [
        (None, None),
        ("medical", SYSTEM_PROMPTS["medical"]),
        ("general", SYSTEM_PROMPTS["general"]),
        ("Be brief.", "Be brief."),
    ]:
        own = processor(system)
        assert own.system_prompt == expected
        text = own.tokenizer.decode(own(text="Where?")["input_ids"][0])
        assert ("system<|end_header_id|>" in text) == (expected is not None)
        assert expected is None or f"{expected}<|eot_id|>" in text


@pytest.mark.parametrize("system", [None, "general", "Be brief."])
def test_save_and_load_keep_the_processor(tmp_path, system):
    own = processor(system)
    own.save_pretrained(tmp_path)
    loaded = MedVProcessor.from_pretrained(tmp_path)
    assert (loaded.system, loaded.image_tokens, loaded.special) == (system, 4, special())
    first, second = (p(images=picture(5), text="Is there a mass?") for p in (own, loaded))
    assert all(first[key].equal(second[key]) for key in first)


def test_the_image_size_is_that_of_the_tower():
    assert image_processor(384, [0.5] * 3, [0.5] * 3)(picture(0), return_tensors="pt")["pixel_values"].shape == (1, 3, 384, 384)


def test_official_prompts_lose_the_newline_after_the_image_and_stay_so_when_saved(tmp_path):
    own, official = processor(), copy.copy(processor())
    official.official_prompts = True
    official.save_pretrained(tmp_path)
    official = type(official).from_pretrained(tmp_path)
    asked = {"images": picture(0), "text": "What is shown?"}
    ours, theirs = own(**asked)["input_ids"][0].tolist(), official(**asked)["input_ids"][0].tolist()
    after = len(ours) - 1 - ours[::-1].index(special().image)
    assert theirs == ours[: after + 1] + ours[after + 2 :]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F", "PA"])
def test_a_picture_in_memory_is_seen_as_open_image_sees_its_file(tmp_path, mode):
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray((ramp * 16 + 300).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert("LA" if mode == "PA" else mode)
    if mode in ("LA", "RGBA", "PA"):
        image.putalpha(Image.fromarray(ramp.T.astype(np.uint8).reshape(30, 40)))
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    if mode in ("I", "F"):  # no file keeps it: what it shows is the same ramp in sixteen bits
        Image.fromarray(np.asarray(image).astype(np.uint16)).save(tmp_path / "x.png")
    else:
        image.save(tmp_path / f"x.{suffix}")
    seen = open_image(tmp_path / f"x.{suffix}")
    given = Image.open(tmp_path / f"x.{suffix}") if mode == "CMYK" else image
    gap = (processor().pixels([given]) - processor().pixels([seen])).abs().max()
    assert gap < (0.02 if mode in ("I", "F") else 1e-6)
    spread = processor()(images=given, text="Where?")["pixel_values"]
    assert spread.min() < -0.7 and spread.max() > 0.3


def test_a_transparent_palette_and_a_turned_photograph_are_seen_as_from_their_files(tmp_path):
    flat = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)).convert("P")
    flat.save(tmp_path / "a.png", transparency=7)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3).save(tmp_path / "b.jpg", exif=exif)
    for name in ("a.png", "b.jpg"):
        lazy, seen = Image.open(tmp_path / name), open_image(tmp_path / name)
        one, two = (processor()(images=image, text="Where?") for image in (lazy, seen))
        assert all(one[key].equal(two[key]) for key in two)


@pytest.mark.parametrize(
    "given", ["x.png", Path("x.png"), np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), b"x", 7, [None], ["x.png"]]
)
def test_what_is_no_picture_is_refused_and_told_what_is(given):
    with pytest.raises(ValueError, match=r"give a PIL image, as medv\.data\.images\.open_image reads it"):
        processor()(images=given, text="Where?")


def test_a_picture_of_numbers_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        processor()(images=Image.fromarray(np.full((8, 8), np.nan, np.float32)), text="Where?")
