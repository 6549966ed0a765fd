"""Who answers a benchmark: a MedV model (or its autoregressive twin), or any image-text-to-text checkpoint of transformers.

A runner answers a batch of examples and says with what settings; it writes no file and knows no metric. The second kind is for
the baselines of Table 7, whose published ids are in `BASELINES`; nothing is downloaded here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from medv.checkpoints.bundled import load_model
from medv.checkpoints.contents import contents
from medv.checkpoints.loading import cached_folder, load_network, load_processor
from medv.checkpoints.shards import read_object
from medv.data.example import Example, picture_of
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import LladaConfig, OfficialConfig
from medv.evaluation.answering import Answer, check_length, stream_answers
from medv.model.devices import device_named, place
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor

BASELINES = {
    "LLaMA": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "LLaVA": "llava-hf/llava-1.5-7b-hf",
    "LLaVA-Med": "microsoft/llava-med-v1.5-mistral-7b",
    "Med-Flamingo": "med-flamingo/med-flamingo",
    "MedVLM-R1": "JZPeterPan/MedVLM-R1",
    "Qwen-VL": "Qwen/Qwen2-VL-2B-Instruct",
    "LLaDA-V": "GSAI-ML/LLaDA-V",
}
"""Model of Table 7 -> its id on the Hugging Face hub, as far as the paper names or implies one."""


LONGEST = 2**20
"""Tokens of an answer: more than any model has positions for."""


class Runner(Protocol):
    """Answers batches. `settings`: what the answers depend on beside the question, JSON-able; `model` is a name of it for
    people, and `contents` what it is made of, wherever it lies.
    """

    settings: dict[str, Any]
    contents: dict[str, str]

    def check(self, example: Example, picture: Image.Image | None) -> None:
        """Raises ValueError for a question that cannot be answered whole: it and its answer are longer than the model reads."""

    def answer(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Answer]:
        """One answer per example, in order; `rows` are their places in the benchmark, for the random draws."""


def sampler_settings(config: SamplerConfig | OfficialConfig | LladaConfig) -> dict[str, Any]:
    """L, B, Z, temperature and seed, and whatever else differs from the defaults, as JSON knows it."""
    always = ("gen_length", "block_length", "steps", "temperature", "seed")
    chosen = {name: getattr(config, name) for name in always}
    others = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in always}
    default, published = type(config)(), {OfficialConfig: "official", LladaConfig: "llada"}
    changed = {name: str(value) for name, value in others.items() if value != getattr(default, name)}
    return chosen | changed | ({"preset": published[type(config)]} if type(config) in published else {})


@dataclass
class MedVRunner:
    """A MedV model folder with one sampler configuration.

    dtype and device: of `load_model`. graphs: as `answering.stream_answers` takes it. load: gives the model and its processor;
    the default reads the folder once. `dataclasses.replace(runner, config=...)` asks the same loaded model in another way.
    """

    folder: Path
    config: SamplerConfig
    dtype: str = "float32"
    device: str | None = None
    graphs: bool | None = None
    load: Callable[[], tuple[MedVForMaskedDiffusion, MedVProcessor]] | None = None

    def __post_init__(self):
        device_named(self.device)  # what is not here is told before questions are read
        if self.load is None:
            self.load = cache(partial(load_model, self.folder, dtype=getattr(torch, self.dtype), device=self.device))

    @property
    def settings(self) -> dict[str, Any]:
        """The sampler's settings, the folder's name, and the numbers that are computed with where not float32."""
        dtype = {} if self.dtype == "float32" else {"dtype": self.dtype}
        return {"model": str(self.folder), **dtype, **sampler_settings(self.config)}

    @property
    def contents(self) -> dict[str, str]:
        """Of the weights, configuration and processor, adapters and what lies under them included."""
        return contents(*self.load())

    def check(self, example: Example, picture: Image.Image | None) -> None:
        """Raises ValueError where prompt and canvas are longer than what the model reads."""
        check_length(example.question, picture, *self.load(), self.config.gen_length)

    def answer(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Answer]:
        """Answer the batch; the draws of an answer depend on its place alone."""
        how = {"batch_size": max(len(examples), 1), "first_index": rows[0], "graphs": self.graphs}
        (batch,) = stream_answers(*self.load(), examples, self.config, **how)
        return batch


@dataclass
class CheckpointRunner:
    """Any checkpoint that `AutoModelForImageTextToText` and `AutoProcessor` with a chat template understand.

    Greedy decoding of at most `max_new_tokens` (256 in the paper), one question at a time, so that no padding is involved.
    `system` is the system message, or None. Loading raises FileNotFoundError where the checkpoint is not on this machine, and
    ValueError where it brings code of its own or its weights are not whole (see `medv.checkpoints.loading`).
    """

    checkpoint: str
    max_new_tokens: int = 256
    system: str | None = None
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self):
        if not 1 <= self.max_new_tokens <= LONGEST:
            raise ValueError(f"the answer has {self.max_new_tokens} tokens at most: give from 1 to {LONGEST} (--gen-length)")

    @property
    def settings(self) -> dict[str, Any]:
        """Checkpoint, length and system message."""
        return {"model": self.checkpoint, "max_new_tokens": self.max_new_tokens, "system": self.system}

    @property
    def contents(self) -> dict[str, str]:
        """Of the weights, configuration and processor."""
        return contents(*self._network)

    @cached_property
    def _network(self):
        folder = cached_folder(self.checkpoint)
        if folder is None:
            raise FileNotFoundError(f"{self.checkpoint} is not on this machine: download it first, or give its folder")
        processor = load_processor(AutoProcessor, folder)
        model = load_network(AutoModelForImageTextToText, folder, dtype=self.dtype)
        return place(model, self.device), processor

    def check(self, example: Example, picture: Image.Image | None) -> None:
        """Raises ValueError where prompt and answer are longer than what the model reads, as far as its configuration says."""
        model, _ = self._network
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tokens = self._inputs(example, picture)["input_ids"].shape[1]
        if limit is not None and tokens + self.max_new_tokens > limit:
            raise ValueError(
                f"the prompt has {tokens} tokens and the answer {self.max_new_tokens}, but this model reads {limit}: "
                "shorten the question or the answer (--gen-length)"
            )

    def answer(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Answer]:
        """Answer one by one; `rows` are not needed, as nothing is drawn."""
        return [self._answer(example) for example in examples]

    def _inputs(self, example: Example, picture: Image.Image | None) -> BatchFeature:
        content = [{"type": "text", "text": example.question.strip()}]
        if picture is not None:
            content.insert(0, {"type": "image", "image": picture})
        messages = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        _, processor = self._network
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    @torch.inference_mode()
    def _answer(self, example: Example) -> Answer:
        model, processor = self._network
        inputs = self._inputs(example, picture_of(example)).to(model.device)
        started = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - started
        new = ids[0, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        stopped = len(new) > 0 and int(new[-1]) in ends
        return Answer(
            id=example.id,
            question=example.question,
            text=processor.decode(new, skip_special_tokens=True).strip(),
            tokens=len(new) - stopped,
            forwards=len(new),
            seconds=seconds,
            finish_reason="stop" if stopped else "length",
        )


def availability(checkpoint: str | None) -> str:
    """Whether a checkpoint can be asked here: "on this machine", or why not. Looks at the disk only, and runs no code of it."""
    if not checkpoint:
        return "not available: no published checkpoint is named"
    folder = cached_folder(checkpoint)
    if folder is None or not (folder / "config.json").is_file():
        return "not available: the weights are not on this machine"
    try:
        kind = read_object(folder / "config.json").get("model_type")
    except ValueError as error:
        return f"not available: {error}"
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return f"not available: transformers knows no image-text model of the type {kind!r}"
    return "on this machine"
