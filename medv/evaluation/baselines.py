"""The baselines of Table 7: any image-text-to-text checkpoint of transformers with the interface of an `Answerer`.

Nothing is downloaded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from medv.checkpoints.contents import contents
from medv.checkpoints.loading import cached_folder, load_network, load_processor
from medv.checkpoints.shards import read_object
from medv.data.example import Example, picture_of
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answer, check_length
from medv.model.devices import place

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


@dataclass
class CheckpointAnswerer:
    """Any checkpoint that `AutoModelForImageTextToText` and `AutoProcessor` with a chat template understand.

    It decodes greedily and one question at a time; of a `SamplerConfig` it uses gen_length alone.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str = ""

    @classmethod
    def load(cls, checkpoint: str, *, device: str | None = None) -> "CheckpointAnswerer":
        """Load a folder, or a hub id that was downloaded before. Raises FileNotFoundError where it is not on this machine."""
        folder = cached_folder(checkpoint)
        if folder is None:
            raise FileNotFoundError(f"{checkpoint} is not on this machine: download it first, or give its folder")
        processor = load_processor(AutoProcessor, folder)
        model = load_network(AutoModelForImageTextToText, folder, dtype="auto")
        return cls(place(model, device), processor, checkpoint)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of weights, configuration and processor."""
        return contents(self.model, self.processor)

    def settings(self, config: SamplerConfig) -> dict[str, Any]:
        """Checkpoint and length of the answer."""
        return {"model": self.name, "max_new_tokens": config.gen_length}

    def check(self, question: str, picture: Image.Image | None, config: SamplerConfig) -> None:
        """Raises ValueError where prompt and answer are longer than the model reads, as far as its configuration says."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        check_length(self._inputs(question, picture)["input_ids"].shape[1], config.gen_length, limit)

    def answer(
        self, examples: Sequence[Example], config: SamplerConfig, *, batch_size: int = 1, first_index: int = 0, quiet=True
    ) -> list[Answer]:
        """Answer one by one; batch_size and first_index make no difference, as nothing is drawn, and nothing is shown."""
        return [self._answer(example, config.gen_length) for example in examples]

    def _inputs(self, question: str, picture: Image.Image | None) -> BatchFeature:
        content = [{"type": "text", "text": question.strip()}]
        if picture is not None:
            content.insert(0, {"type": "image", "image": picture})
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **how)

    @torch.inference_mode()
    def _answer(self, example: Example, max_new_tokens: int) -> Answer:
        inputs = self._inputs(example.question, picture_of(example)).to(self.model.device)
        started = time.perf_counter()
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - started
        new = ids[0, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        stopped = len(new) > 0 and int(new[-1]) in ends
        return Answer(
            id=example.id,
            question=example.question,
            text=self.processor.decode(new, skip_special_tokens=True).strip(),
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
        return f"not available: transformers has no image-text model of the type {kind!r}"
    return "on this machine"
