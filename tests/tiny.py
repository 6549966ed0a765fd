"""What the model tests build on: a tokenizer, a random model of a few ten thousand parameters and hand-made examples."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from medv.checkpoints.assembly import new_processor, random_model, shape_config
from medv.companion.towers.tokenizer import train_tokenizer
from medv.data.chat import SpecialTokens
from medv.data.example import Example, Turn
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.profiles import ModelShape
from medv.training.collate import Collator, Encoder

torch.set_num_threads(1)

SHAPE = ModelShape(
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    vocab_size=300,
    vision_hidden_size=32,
    vision_intermediate_size=64,
    vision_layers=2,
    vision_heads=2,
    image_size=32,
    patch_size=16,
    max_positions=256,
    # Large weights, so that what one token does to another is far above rounding.
    initializer_range=0.2,
)
QUESTIONS = ("What is shown?", "Is there a mass?", "Which side is it on?", "How large is the lesion in this image?")
ANSWERS = ("chest", "yes", "on the left", "small, in the upper part")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens with LLaDA's special ones."""
    return train_tokenizer([*QUESTIONS, *ANSWERS, "user", "assistant", "system", "\n\n"] * 4, SHAPE.vocab_size)


@cache
def special() -> SpecialTokens:
    """The special ids of `tokenizer()`."""
    return SpecialTokens.of(tokenizer())


def shape(**changes) -> ModelShape:
    """The shape of the test model, with the vocabulary of `tokenizer()`."""
    return replace(SHAPE, vocab_size=len(tokenizer()), **changes)


def model(seed: int = 0, attention: str = "sdpa", **options) -> MedVForMaskedDiffusion:
    """A new random model in evaluation mode."""
    built = random_model(shape(), special(), seed=seed, **options)
    built.set_attn_implementation(attention)
    return built.eval()


@cache
def processor(system: str | None = None) -> MedVProcessor:
    """The processor that belongs to `model()`."""
    return new_processor(tokenizer(), shape_config(shape(), special()), system=system)


def picture(number: int) -> Image.Image:
    """A 40 x 32 picture with a bright bar that depends on the number."""
    image = Image.new("RGB", (40, 32), (20 * number % 256, 90, 160))
    image.paste((255, 255, 255), (4 * number % 32, 0, 4 * number % 32 + 6, 32))
    return image


def examples(count: int = 8) -> list[Example]:
    """Questions of different lengths about pictures."""
    return [
        Example(
            id=f"example-{i}",
            image=lambda i=i: picture(i),
            turns=(Turn("user", QUESTIONS[i % 4]), Turn("assistant", ANSWERS[(i + i // 4) % 4])),
        )
        for i in range(count)
    ]


def training_batch(count: int = 3) -> dict[str, torch.Tensor]:
    """A training batch of these examples, unpadded."""
    encode = Encoder(processor(), loss_tokens="response", max_length=200)
    items = [encode(e) | {"noise": (0, 0, i), "stratum": (i, count)} for i, e in enumerate(examples(count))]
    return Collator(special(), padding="none")(items)


def gradients(network, batch) -> dict[str, torch.Tensor]:
    """The gradients of the loss of a batch."""
    network.zero_grad()
    network(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def question_folder(folder: Path, count: int) -> Path:
    """The folder with questions.jsonl, as `medv generate` reads it, and its images."""
    rows = []
    for number, example in enumerate(examples(count)):
        example.image().save(folder / f"{number}.png")
        rows.append(json.dumps({"question_id": f"q{number}", "image": f"{number}.png", "text": example.question}))
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return folder
