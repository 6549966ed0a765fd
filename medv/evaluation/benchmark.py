"""`medv generate`: answers to a file of questions, appended one by one, so that a stopped run loses nothing.

Under torchrun the batches are distributed over the processes, with the same answers.
"""

import glob
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

from torch import distributed
from tqdm.auto import tqdm

from medv.artifacts import append_jsonl, write_text
from medv.data.example import IMAGE_TOKEN, Example, Turn, contents, picture_of
from medv.data.images import ImageError, ImageFolder, open_image
from medv.data.readers import read_dataset
from medv.data.rows import Row, by_id, read_rows
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.baselines import CheckpointAnswerer
from medv.model.devices import processes, rank
from medv.ownership import Run, owned, owned_rows, reserve_file
from medv.reading import read_lines

MADE_BY = "medv generate"


def read_questions(path: Path, images: Path | ImageFolder, *, data: str | None = None) -> list[Example]:
    """Questions as JSON lines: `question_id` (or `id`), `text` (or `question`) and `image`, in file order; or, with `data`,
    the annotation file of that data set as shipped. Raises DataError for a row that is no question about an image.
    """
    if data is not None:
        return read_dataset(data, path, "test", images=images)
    examples = []
    for name, row in by_id(read_rows(path), "question_id", "id").items():
        text = row.text("text", "question").replace(IMAGE_TOKEN, "").strip()
        if not text:
            raise row.error(f"there is no question beside {IMAGE_TOKEN}")
        examples.append(Example(name, row.image(images, row.text("image")), (Turn("user", text),)))
    return examples


def examine(
    examples: Sequence[Example], answerer: Answerer | CheckpointAnswerer, config: SamplerConfig, *, skip_corrupt: bool = False
) -> tuple[list[Example], dict[str, str]]:
    """The questions that can be answered, checked before any is; and, with `skip_corrupt`, the errors of other images by id.

    Raises ImageError, without `skip_corrupt`, for an image that cannot be read; ValueError for a question that is too long for
    the model, or where no image can be read.
    """
    asked, skipped = [], {}
    look = lru_cache(maxsize=8)(open_image)  # several questions about one image stand together
    for example in examples:
        try:
            picture = look(example.image) if isinstance(example.image, Path) else picture_of(example)
        except ImageError as error:
            if not skip_corrupt:
                raise ImageError(f"question {example.id}: {error}; mend it, or leave such out with --skip-corrupt") from error
            skipped[example.id] = str(error)
            continue
        try:
            answerer.check(example.question, picture, config)
        except ValueError as error:
            raise ValueError(f"question {example.id}: {error}") from error
        asked.append(example)
    if not asked:
        raise ValueError(f"none of the {len(examples)} images can be read: look at their folder")
    return asked, skipped


def write_skipped(skipped: Mapping[str, str], out: Path) -> Path:
    """List skipped questions and their errors as JSON lines beside the answers; raises ValueError over another file."""
    path = out.with_name(f"{out.name}.skipped")
    fields = ("question_id", "reason")
    if path.exists() and not all(isinstance(row, dict) and tuple(row) == fields for _, row in read_lines(path)):
        raise ValueError(f"{path} exists, and is no list of questions that were left out: move it away")
    return write_text(path, "".join(json.dumps(dict(zip(fields, item, strict=True))) + "\n" for item in skipped.items()))


def answer_file(
    examples: Sequence[Example],
    answerer: Answerer | CheckpointAnswerer,
    config: SamplerConfig,
    out: Path,
    *,
    batch_size: int = 16,
    inputs: Iterable[Path] = (),
    quiet: bool = False,
) -> int:
    """Answer what `out` does not hold yet, one JSON line an answer, in the order of the examples; returns how many there are.

    A batch of which some answers are there is asked whole, so that no answer depends on where a run stopped, and the missing
    ones are added. Under torchrun each process writes a file beside `out`, and the first one merges them. Raises ValueError,
    with nothing changed, where two questions have one id, and where `out` is one of `inputs`, holds anything but answers by
    the same settings and equal contents of model, questions and images, or another process works on it.
    """
    number, world = rank(), processes()
    if twice := [name for name, count in Counter(example.id for example in examples).items() if count > 1]:
        raise ValueError(f"two questions have the id {twice[0]} ({len(twice)} ids in all): give every question its own")
    out = out.resolve()  # a link stays one
    with reserve_file(out, MADE_BY, inputs=inputs) if number == 0 else nullcontext():
        settings, asked = answerer.settings(config), contents(examples)
        run: Run = {
            "made_by": MADE_BY,
            "settings": {name: value for name, value in settings.items() if name != "model"},
            "model": answerer.contents,
            "questions": asked["rows"],
            "images": asked["images"],
        }
        done = _answers_there(out, run)
        own = out if world == 1 else out.with_name(f"{out.name}.part{number}")
        _barrier(world)  # nobody writes before all have read
        starts = range(number * batch_size, len(examples), world * batch_size)
        with tqdm(total=sum(len(examples[s : s + batch_size]) for s in starts), desc="answers", disable=quiet) as bar:
            for start in starts:
                batch = examples[start : start + batch_size]
                if any(example.id not in done for example in batch):
                    for answer in answerer.answer(batch, config, batch_size=batch_size, first_index=start, quiet=True):
                        row = {"question_id": answer.id, **answer.to_dict(), "settings": settings}
                        if answer.id not in done:
                            append_jsonl(own, owned(run, row))
                bar.update(len(batch))
        _barrier(world)
        if number == 0:
            _merge(out, run, [example.id for example in examples])
        _barrier(world)
    return len(examples)


def _parts(out: Path) -> list[Path]:
    """The files of the processes of a distributed run."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part*"))


def _answers_there(out: Path, run: Run) -> dict[str, dict]:
    """Answers by question id, from `out` and from the parts of a killed run."""
    rows = [Row(row, path, "an answer") for path in (out, *_parts(out)) for row in owned_rows(path, run)]
    return {row.identity("question_id"): dict(row) for row in rows if row.answer() is not None}


def _merge(out: Path, run: Run, order: list[str]) -> None:
    """Write all answers in the order of the questions to `out` and remove the parts; a complete file is left alone."""
    parts = _parts(out)
    if not parts and [row["question_id"] for row in owned_rows(out, run)] == order:
        return
    rows = _answers_there(out, run)
    write_text(out, "".join(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in order))
    for part in parts:
        part.unlink()


def _barrier(world: int) -> None:
    """Wait for the other processes of torchrun, without a time limit that a long share could reach."""
    if world > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(days=7))
        distributed.barrier()
