"""Answers of a model to questions about images: batched, seeded, in order, each with its cost.

Each example of a batch keeps its own index for the random draws, so an answer does not depend on the batch it was made in
(beyond the last bits of floating point).
"""

import math
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
from medv.diffusion.blockwise import BlockwiseConfig, SamplerOutput
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import OfficialConfig
from medv.diffusion.trace import Events, Trace, drain
from medv.evaluation.templates import BLANK_TOKENS, Canvas, Template
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


@dataclass(frozen=True)
class FilledAnswer(Answer):
    """A template with its blanks filled. filled: the words of the blanks; confidence: the geometric mean of that of their
    tokens; parts: the text cut into (piece, whether it was filled in). forwards and seconds are those of all fillings tried.
    """

    template: str
    filled: tuple[str, ...]
    confidence: float
    parts: tuple[tuple[str, bool], ...]


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
        names = [field.name for field in fields(config) if field.name not in always]
        settings |= {name: str(getattr(config, name)) for name in names if getattr(config, name) != getattr(default, name)}
        return settings if isinstance(config, SamplerConfig) else settings | {"preset": config.preset}

    def check(self, question: str, picture: Image.Image | None, config: BlockwiseConfig) -> None:
        """Raises ValueError where prompt and canvas together are longer than the model reads."""
        image_tokens = 0 if picture is None else self.processor.view_plan.tokens(*as_picture(picture).size)
        limit = self.model.config.text_config.max_position_embeddings
        check_length(len(self._prompt(question, image_tokens)), config.gen_length, limit)

    def ask(
        self,
        image: Image.Image | Path | Callable[[], Image.Image] | None,
        question: str,
        config: BlockwiseConfig,
        *,
        on_step: Callable[[Events], None] | None = None,
        template: str | None = None,
        blank_tokens: int = BLANK_TOKENS,
        response: Sequence[int] | None = None,
    ) -> tuple[Answer, Trace]:
        """One answer and how it was unmasked; `on_step` is called with the events of each forward as it happens.

        template: a text whose blanks are filled, see `fill`; it gives a `FilledAnswer` and takes no `on_step`. response: L
        token ids with the mask at open positions. Raises ValueError for an empty question and one that is too long.
        """
        if not question.strip():
            raise ValueError("the question is empty: ask something about the image")
        source = (lambda: image) if isinstance(image, Image.Image) else image
        examples = [Example("ask", source, (Turn("user", question),))]
        if template is None:
            responses = None if response is None else [list(response)]
            return self._answer_batch(examples, config, [0], on_step=on_step, responses=responses)[0]
        if on_step is not None or response is not None:
            raise ValueError("a template is filled in several ways, so that none can be watched or given: leave that out")
        return self.fill(examples, [template], config, blank_tokens=blank_tokens)[0]

    def answer(
        self,
        examples: Sequence[Example],
        config: BlockwiseConfig,
        *,
        batch_size: int = 50,
        quiet: bool = False,
        templates: Sequence[str] | None = None,
        blank_tokens: int = BLANK_TOKENS,
        **options,
    ) -> list[Answer]:
        """Answer the first question of every example, in order, with a progress bar; options as in `traced`.

        templates: texts whose blanks are filled instead, one for each example, see `fill`.
        """
        if templates is not None:
            how = {"blank_tokens": blank_tokens, "batch_size": batch_size, **options}
            return [answer for answer, _ in self.fill(examples, templates, config, **how)]
        answers = []
        with tqdm(total=len(examples), desc="answers", unit="question", disable=quiet) as bar:
            for batch in self.stream(examples, config, batch_size=batch_size, **options):
                answers += batch
                bar.update(len(batch))
        return answers

    def stream(self, examples: Sequence[Example], config: BlockwiseConfig, **options) -> Iterator[list[Answer]]:
        """The same, batch by batch; options as in `traced`."""
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
        """Answers with their traces, batch by batch. first_index: of the first example, for draws. looks: prepared images."""
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            rows = list(range(first_index + start, first_index + start + len(batch)))
            yield self._answer_batch(batch, config, rows, looks)

    def fill(
        self,
        examples: Sequence[Example],
        templates: Sequence[str],
        config: BlockwiseConfig,
        *,
        blank_tokens: int = BLANK_TOKENS,
        batch_size: int = 50,
        first_index: int = 0,
        looks: Looks | None = None,
        rank: Callable[[FilledAnswer], Any] = lambda answer: answer.confidence,
    ) -> list[tuple[FilledAnswer, Trace]]:
        """Fill the blanks of one template for each example: the answers, and how the kept filling of each was unmasked.

        Each blank gets 1 to `blank_tokens` tokens, in all ways, and the filling of the highest `rank` is kept, by default of
        the highest mean log-confidence; of equals the shortest. The template and the end of turn behind it are the canvas, in
        one block; `config` gives the rest, its steps as the forwards that a filling may take. Raises ValueError for a template
        without a blank.
        """
        if not isinstance(config, SamplerConfig):
            raise ValueError(f"the preset {config.preset!r} cannot keep the words of a template: leave the preset out")
        if config.remasking == "random" and blank_tokens > 1:
            raise ValueError("random remasking has no confidence by which fillings can be compared: set blank_tokens to 1")
        looks = looks or Looks(self.processor)
        tried: list[list[tuple[FilledAnswer, Trace]]] = [[] for _ in examples]
        by_length: dict[int, list[tuple[int, Canvas]]] = {}
        for number, (_, text) in enumerate(zip(examples, templates, strict=True)):
            for sizes in Template(text).sizes(blank_tokens):
                canvas = Template(text).canvas(self.processor.tokenizer, sizes)
                by_length.setdefault(len(canvas.ids), []).append((number, canvas))
        for length, rows in sorted(by_length.items()):
            sized = replace(config, gen_length=length, block_length=length, min_length=0)
            for start in range(0, len(rows), batch_size):
                numbers, canvases = zip(*rows[start : start + batch_size], strict=True)
                batch, indices = [examples[number] for number in numbers], [first_index + number for number in numbers]
                made = self._answer_batch(batch, sized, indices, looks, responses=[canvas.ids for canvas in canvases])
                for number, canvas, (answer, trace) in zip(numbers, canvases, made, strict=True):
                    tried[number].append((self._filled(answer, trace, canvas, templates[number]), trace))
        return [_best(each, rank) for each in tried]

    def _filled(self, answer: Answer, trace: Trace, canvas: Canvas, template: str) -> FilledAnswer:
        written = {event.position: event for event in trace.commits}
        mean = sum(math.log(max(event.confidence, 1e-30)) for event in written.values()) / len(written)
        ids = [written[place].token if place in written else token for place, token in enumerate(canvas.ids)]
        texts = [self.processor.tokenizer.decode(ids[start:stop]) for start, stop, _ in canvas.parts]
        texts[0] = texts[0].lstrip()
        parts = tuple((text, blank) for text, (*_, blank) in zip(texts, canvas.parts, strict=True))
        filled = tuple(text.strip() for text, blank in parts if blank)
        return FilledAnswer(**asdict(answer), template=template, filled=filled, confidence=math.exp(mean), parts=parts)

    def inputs(
        self, examples: Sequence[Example], looks: Looks | None = None, begun: Sequence[Sequence[int]] | None = None
    ) -> dict[str, torch.Tensor]:
        """The inputs of `model.generate` for the first question of every example, on the model's device.

        begun: token ids that an answer begins with, for each example; they end the prompt.
        """
        if len({example.image is None for example in examples}) > 1:
            raise ValueError("a batch mixes questions with and without an image: answer them in two calls")
        looks = looks or Looks(self.processor, keep=0)
        counts, images = zip(*map(looks, examples), strict=True)
        prompts = [self._prompt(example.question, count) for example, count in zip(examples, counts, strict=True)]
        if begun is not None:
            prompts = [[*prompt, *ids] for prompt, ids in zip(prompts, begun, strict=True)]
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

    def _answer_batch(
        self,
        batch: Sequence[Example],
        config: BlockwiseConfig,
        rows: list[int],
        looks: Looks | None = None,
        on_step: Callable[[Events], None] | None = None,
        responses: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[Answer, Trace]]:
        model, config = self.model, with_stop(config, self.processor)
        was_training = model.training
        model.eval()
        inputs = self.inputs(batch, looks)
        mend = "the answer (--gen-length)" if responses is None else "the text to be completed"
        check_length(inputs["input_ids"].shape[1], config.gen_length, model.config.text_config.max_position_embeddings, mend)
        acceleration = model.acceleration(config, self.graphs)
        with torch.inference_mode():
            if responses is not None:
                inputs["response"] = inputs["input_ids"].new_tensor(responses)
            steps = model.stream(**inputs, config=config, row_indices=rows, tell=on_step is not None, **acceleration)
            output = drain(steps, on_step)
        model.train(was_training)
        return [(answer, output.trace.of_row(row)) for row, answer in enumerate(self.answers_of(batch, output))]

    def answers_of(self, batch: Sequence[Example], output: SamplerOutput) -> list[Answer]:
        """The answers that a sampler's output holds, a row for each example."""
        ids = output.sequences.tolist()
        return [
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


def _best(tried: Sequence[tuple[FilledAnswer, Trace]], rank: Callable[[FilledAnswer], Any]) -> tuple[FilledAnswer, Trace]:
    """The filling of the highest rank, with the cost of all."""
    answer, trace = max(tried, key=lambda made: rank(made[0]))
    cost = {name: sum(getattr(made, name) for made, _ in tried) for name in ("forwards", "seconds")}
    alone = {name: tuple(event._replace(row=0) for event in getattr(trace, name)) for name in ("events", "fixed")}
    return replace(answer, **cost), replace(trace, **alone)


def with_stop(config: BlockwiseConfig, processor: MedVProcessor) -> BlockwiseConfig:
    """The official preset without stop sequences gets the end of turn, as in the reference's demonstration; others stay."""
    if not isinstance(config, OfficialConfig) or config.stop_sequences:
        return config
    return replace(config, stop_sequences=((processor.special.end_of_turn,),))


def check_length(tokens: int, gen_length: int, limit: int | None, mend: str = "the answer (--gen-length)") -> None:
    """Raises ValueError, with `mend`, where a prompt of `tokens` and an answer of `gen_length` exceed `limit` (None: none)."""
    if limit is not None and tokens + gen_length > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer {gen_length}, but this model reads {limit}: "
            f"shorten the question or {mend}"
        )
