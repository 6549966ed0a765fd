"""`medv generate`: answers to a file of questions, appended batch by batch, so that a stopped run loses nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from medv.artifacts import append_jsonl, fingerprint, read_jsonl
from medv.data.example import Example, Turn
from medv.data.images import resolve_image
from medv.data.readers import read_dataset
from medv.diffusion.sampler import SamplerConfig
from medv.evaluation.answering import stream_answers
from medv.model.bundled import load_model


def read_questions(path: Path, images: Path, *, data: str | None = None) -> list[Example]:
    """Questions as JSON lines: `question_id` (or `id`), `text` (or `question`) and `image`, in file order; or, with `data`,
    the annotation file of that data set as shipped.
    """
    if data is not None:
        return read_dataset(data, path, "test", images=images)
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error.msg}): one object per line is needed"
            ) from error
        text = str(row.get("text", row.get("question", ""))).replace("<image>", "").strip()
        if not text or not row.get("image"):
            raise ValueError(f"{path}, line {number} lacks a question text or an image name")
        name = str(row.get("question_id", row.get("id", number - 1)))
        examples.append(Example(name, resolve_image(images, row["image"]), (Turn("user", text),)))
    if len({example.id for example in examples}) != len(examples):
        raise ValueError(f"{path} names a question id twice: ids must be unique to resume")
    return examples


def answer_file(
    examples: Sequence[Example], model: Path, out: Path, config: SamplerConfig, *, batch_size: int = 16
) -> int:
    """Answer what `out` does not hold yet; returns the number of answers there are.

    Raises ValueError where `out` holds answers made with other settings, another model or other questions.
    """
    asked = [(example.id, example.question) for example in examples]
    settings = fingerprint({"config": str(config), "model": str(model), "questions": asked})
    done = read_jsonl(out) if out.exists() else []
    if any(row.get("settings") != settings for row in done):
        raise ValueError(f"{out} holds answers made with other settings: choose another file or delete it")
    if [row["question_id"] for row in done] != [example.id for example in examples[: len(done)]]:
        raise ValueError(f"the answers in {out} are not the first of these questions: choose another file")
    network, processor = load_model(model)
    rest = examples[len(done) :]
    with tqdm(total=len(examples), initial=len(done), desc="answers", unit="question") as bar:
        batches = stream_answers(network, processor, rest, config, batch_size=batch_size, first_index=len(done))
        for batch in batches:
            for answer in batch:
                append_jsonl(out, {"question_id": answer.id, **answer.to_dict(), "settings": settings})
            bar.update(len(batch))
    return len(examples)
