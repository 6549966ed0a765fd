"""Answers of a model to the questions of a data set: batched, seeded, in order, each with what it cost.

A batch mixes examples; each keeps its own index for the random draws, so an answer does not depend on the batch it was made
in (beyond the last bits of floating point). It knows no metric.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from PIL import Image
from tqdm.auto import tqdm

from medv.data.chat import encode_prompt
from medv.data.example import Example, Turn
from medv.diffusion.config import SamplerConfig
from medv.diffusion.official import OfficialConfig
from medv.diffusion.trace import Events, Trace, drain
from medv.model.devices import computes_on
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


def answer_examples(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    examples: Sequence[Example],
    config: SamplerConfig,
    *,
    looks: Looks | None = None,
    batch_size: int = 50,
    quiet: bool = False,
) -> list[Answer]:
    """Answer the first question of every example, in order; `looks` spare images that were looked at before."""
    bar = tqdm(total=len(examples), desc="answers", unit="question", disable=quiet)
    answers = []
    for batch in stream_answers(model, processor, examples, config, looks=looks, batch_size=batch_size):
        answers += batch
        bar.update(len(batch))
    bar.close()
    return answers


def stream_answers(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    examples: Sequence[Example],
    config: SamplerConfig,
    *,
    looks: Looks | None = None,
    batch_size: int = 50,
    first_index: int = 0,
    graphs: bool | None = None,
) -> Iterator[list[Answer]]:
    """The same, batch by batch; `first_index` is the index of the first example for the random draws.

    graphs: replay cached forwards as CUDA graphs; None: where the configuration has a cache and the model is on one GPU.
    """
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rows = range(first_index + start, first_index + start + len(batch))
        answered = _answer_batch(model, processor, batch, config, looks, list(rows), graphs=graphs)
        yield [answer for answer, _ in answered]


def answer_with_trace(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    example: Example,
    config: SamplerConfig,
    *,
    on_step: Callable[[Events], None] | None = None,
    graphs: bool | None = None,
) -> tuple[Answer, Trace]:
    """One answer and how it came about; `on_step` is called with the events of each forward as it happens."""
    return _answer_batch(model, processor, [example], config, None, [0], on_step, graphs)[0]


def with_stop(config: SamplerConfig, processor: MedVProcessor) -> SamplerConfig:
    """The official preset without stops of its own with that of the reference's demonstration, the end of turn; other
    configurations as they are.
    """
    if not isinstance(config, OfficialConfig) or config.stop_sequences:
        return config
    return replace(config, stop_sequences=((processor.special.end_of_turn,),))


def check_length(
    question: str, picture: Image.Image | None, model: MedVForMaskedDiffusion, processor: MedVProcessor, gen_length: int
) -> None:
    """Raises ValueError where prompt and answer together are longer than what the model reads."""
    prompt = processor.encode_turns((Turn("user", question.strip()),), image=picture)
    _check_positions(len(prompt), gen_length, model)


def _check_positions(tokens: int, gen_length: int, model: MedVForMaskedDiffusion) -> None:
    limit = model.config.text_config.max_position_embeddings
    if tokens + gen_length > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer {gen_length}, but this model reads {limit}: "
            "shorten the question or the answer (--gen-length)"
        )


def _answer_batch(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    batch: Sequence[Example],
    config: SamplerConfig,
    looks: Looks | None,
    rows: list[int],
    on_step: Callable[[Events], None] | None = None,
    graphs: bool | None = None,
) -> list[tuple[Answer, Trace]]:
    config = with_stop(config, processor)
    with_image = batch[0].image is not None
    if any((example.image is not None) != with_image for example in batch):
        raise ValueError("a batch mixes questions with and without an image: answer them in two calls")
    looks = looks or Looks(processor, keep=0)
    counts, seen = zip(*map(looks, batch), strict=True)
    told = {"system": processor.system_prompt, "official": processor.official_prompts}
    prompts = [
        encode_prompt(processor.tokenizer, (Turn("user", example.question.strip()),), image_tokens=count, **told)
        for example, count in zip(batch, counts, strict=True)
    ]
    _check_positions(max(map(len, prompts)), config.gen_length, model)
    place = computes_on(model.get_input_embeddings())
    inputs = dict(processor.batch(prompts, None)) | joined(seen)
    inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        if "vision_states" in inputs:
            states, layouts = inputs.pop("vision_states"), inputs.pop("image_layouts", None)
            inputs["image_features"] = model.model.project(states, layouts)
        how = model.acceleration(config, graphs)
        steps = model.stream(**inputs, config=config, row_indices=rows, tell=on_step is not None, **how)
        output = drain(steps, on_step)
    model.train(was_training)
    ids = output.sequences.tolist()
    answers = [
        Answer(
            id=example.id,
            question=example.question,
            text=processor.decode_response(ids[row], output.lengths[row]),
            tokens=output.lengths[row],
            forwards=output.forwards[row],
            seconds=output.seconds / len(batch),
            finish_reason=output.finish_reason[row],
        )
        for row, example in enumerate(batch)
    ]
    return [(answer, output.trace.of_row(row)) for row, answer in enumerate(answers)]
