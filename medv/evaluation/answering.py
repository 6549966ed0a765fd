"""Answers of a model to questions about images: batched, seeded, in order, each with its cost.

Each example of a batch keeps its own index for the random draws, so an answer does not depend on the batch it was made in
(beyond the last bits of floating point).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from medv.checkpoints.bundled import load_model
from medv.checkpoints.contents import contents
from medv.data.example import Example, Turn
from medv.data.images import as_picture
from medv.diffusion.blockwise import BlockwiseConfig
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import OfficialConfig
from medv.diffusion.trace import Events, Trace, drain
from medv.model.devices import computes_on, device_named
from medv.model.looks import Looks, joined
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor


@dataclass(frozen=True)
class Answer:
    """One answer. tokens: length before the stop token; forwards: network calls; seconds: wall time of its batch, shared
    equally; finish_reason: "stop" or "length".
    """

    id: str
    question: str
    text: str
    tokens: int
    forwards: int
    seconds: float
    finish_reason: str

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)


@dataclass
class Answerer:
    """A model (or an autoregressive twin) and its processor, ready to answer questions with any sampler configuration.

    name: of the model, for people. graphs: replay cached forwards as CUDA graphs; None: where the configuration has a cache
    and the model is on one GPU.
    """

    model: MedVForMaskedDiffusion
    processor: MedVProcessor
    name: str = ""
    graphs: bool | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        graphs: bool | None = None,
    ) -> "Answerer":
        """Load a folder as `load_model` does; dtype may be a name ("bfloat16"), device None is the best available."""
        device_named(device)  # raises ValueError before the weights are read
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls(*load_model(Path(folder), dtype=dtype, device=device), name=str(folder), graphs=graphs)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of weights, configuration and processor."""
        return contents(self.model, self.processor)

    def settings(self, config: BlockwiseConfig) -> dict[str, Any]:
        """JSON-able: name and dtype (unless float32) of the model; L, B, Z, temperature, seed and other non-default options."""
        dtype = {} if self.model.dtype == torch.float32 else {"dtype": str(self.model.dtype).removeprefix("torch.")}
        always, default = ("gen_length", "block_length", "steps", "temperature", "seed"), type(config)()
        settings = {"model": self.name, **dtype, **{name: getattr(config, name) for name in always}}
        for name in (field.name for field in fields(config) if field.name not in always):
            if getattr(config, name) != getattr(default, name):
                settings[name] = str(getattr(config, name))
        return settings if isinstance(config, SamplerConfig) else settings | {"preset": config.preset}

    def check(self, question: str, picture: Image.Image | None, config: BlockwiseConfig) -> None:
        """Raises ValueError where prompt and canvas together are longer than the model reads."""
        image_tokens = 0 if picture is None else self.processor.view_plan.tokens(*as_picture(picture).size)
        self._check_length(len(self._prompt(question, image_tokens)), config)

    def ask(
        self,
        image: Image.Image | Path | Callable[[], Image.Image] | None,
        question: str,
        config: BlockwiseConfig,
        *,
        on_step: Callable[[Events], None] | None = None,
    ) -> tuple[Answer, Trace]:
        """One answer and how it was unmasked; `on_step` is called with the events of each forward as it happens.

        Raises ValueError for an empty question and one that is too long.
        """
        if not question.strip():
            raise ValueError("the question is empty: ask something about the image")
        source = (lambda: image) if isinstance(image, Image.Image) else image
        return self._answer_batch([Example("ask", source, (Turn("user", question),))], config, [0], on_step=on_step)[0]

    def answer(
        self, examples: Sequence[Example], config: BlockwiseConfig, *, batch_size: int = 50, quiet: bool = False, **options
    ) -> list[Answer]:
        """Answer the first question of every example, in order, with a progress bar; options as in `stream`."""
        answers = []
        with tqdm(total=len(examples), desc="answers", unit="question", disable=quiet) as bar:
            for batch in self.stream(examples, config, batch_size=batch_size, **options):
                answers += batch
                bar.update(len(batch))
        return answers

    def stream(
        self,
        examples: Sequence[Example],
        config: BlockwiseConfig,
        *,
        batch_size: int = 50,
        first_index: int = 0,
        looks: Looks | None = None,
    ) -> Iterator[list[Answer]]:
        """The same, batch by batch. first_index: index of the first example for the random draws. looks: prepared images."""
        options = {"batch_size": batch_size, "first_index": first_index, "looks": looks}
        for batch in self.traced(examples, config, **options):
            yield [answer for answer, _ in batch]

    def traced(
        self,
        examples: Sequence[Example],
        config: BlockwiseConfig,
        *,
        batch_size: int = 50,
        first_index: int = 0,
        looks: Looks | None = None,
    ) -> Iterator[list[tuple[Answer, Trace]]]:
        """As `stream`, each answer with its trace."""
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            rows = list(range(first_index + start, first_index + start + len(batch)))
            yield self._answer_batch(batch, config, rows, looks)

    def inputs(self, examples: Sequence[Example], looks: Looks | None = None) -> dict[str, torch.Tensor]:
        """The inputs of `model.generate` for the first question of every example, on the model's device."""
        if len({example.image is None for example in examples}) > 1:
            raise ValueError("a batch mixes questions with and without an image: answer them in two calls")
        looks = looks or Looks(self.processor, keep=0)
        counts, images = zip(*map(looks, examples), strict=True)
        prompts = [self._prompt(example.question, count) for example, count in zip(examples, counts, strict=True)]
        inputs = dict(self.processor.batch(prompts, None)) | joined(images)
        place = computes_on(self.model.get_input_embeddings())
        inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
        if "vision_states" in inputs:
            states, layouts = inputs.pop("vision_states"), inputs.pop("image_layouts", None)
            with torch.no_grad():
                inputs["image_features"] = self.model.model.project(states, layouts)
        return inputs

    def _prompt(self, question: str, image_tokens: int) -> list[int]:
        return self.processor.encode_turns((Turn("user", question.strip()),), image_tokens=image_tokens)

    def _check_length(self, tokens: int, config: BlockwiseConfig) -> None:
        check_length(tokens, config.gen_length, self.model.config.text_config.max_position_embeddings)

    def _answer_batch(
        self,
        batch: Sequence[Example],
        config: BlockwiseConfig,
        rows: list[int],
        looks: Looks | None = None,
        on_step: Callable[[Events], None] | None = None,
    ) -> list[tuple[Answer, Trace]]:
        model, config = self.model, with_stop(config, self.processor)
        was_training = model.training
        model.eval()
        inputs = self.inputs(batch, looks)
        self._check_length(inputs["input_ids"].shape[1], config)
        acceleration = model.acceleration(config, self.graphs)
        with torch.inference_mode():
            steps = model.stream(**inputs, config=config, row_indices=rows, tell=on_step is not None, **acceleration)
            output = drain(steps, on_step)
        model.train(was_training)
        ids = output.sequences.tolist()
        answers = [
            Answer(
                id=example.id,
                question=example.question,
                text=self.processor.decode_response(ids[row], output.lengths[row]),
                tokens=output.lengths[row],
                forwards=output.forwards[row],
                seconds=output.seconds / len(batch),
                finish_reason=output.finish_reason[row],
            )
            for row, example in enumerate(batch)
        ]
        return [(answer, output.trace.of_row(row)) for row, answer in enumerate(answers)]


def with_stop(config: BlockwiseConfig, processor: MedVProcessor) -> BlockwiseConfig:
    """The official preset without stop sequences with the end of turn, as in the reference's demonstration; any other
    configuration unchanged.
    """
    if not isinstance(config, OfficialConfig) or config.stop_sequences:
        return config
    return replace(config, stop_sequences=((processor.special.end_of_turn,),))


def check_length(tokens: int, gen_length: int, limit: int | None) -> None:
    """Raises ValueError where a prompt of `tokens` and an answer of `gen_length` exceed the model's `limit` (None: unknown)."""
    if limit is not None and tokens + gen_length > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer {gen_length}, but this model reads {limit}: "
            "shorten the question or the answer (--gen-length)"
        )
