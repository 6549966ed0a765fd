"""The explorer without its widgets: ask about a picture, sweep Z, and keep every run.

A `Session` keeps each answer under (picture, question, setting), so that a Z that was asked before is shown at once. HTML is
made in `explorer.view`, widgets in `explorer.widgets`. A run is one answer: means and intervals are in the notebooks.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from medv.companion.figures.traces import Cell, cells, forwards_of
from medv.data.example import Example
from medv.data.images import ImageError, open_image
from medv.diffusion.config import SamplerConfig
from medv.diffusion.filters import filters_named
from medv.diffusion.length import length_named
from medv.diffusion.revision import ReMDM, RevealRemask, Revision
from medv.diffusion.schedules import schedule_named
from medv.diffusion.trace import Events, Trace
from medv.evaluation.answering import Answer, Answerer
from medv.evaluation.text import repeated_parts
from medv.phantoms.sets import description_set

REVISIONS: dict[str, Revision | None] = {"none": None, "reveal-remask": RevealRemask(budget=0.25), "remdm": ReMDM()}
OnStep = Callable[[Events], None]
MEASURES = {"repetition": "repeated words (%)", "words": "words", "forwards": "forwards", "seconds": "seconds"}


class Cancelled(Exception):
    """Raised inside a callback to end a run; nothing of that run is kept."""


@dataclass(frozen=True)
class Setting:
    """The fields of the explorer: L, B, Z, the names of a schedule, a filter, a revision and a length, temperature, seed."""

    gen_length: int = 64
    block_length: int = 32
    steps: int = 64
    schedule: str = "linear"
    filter: str = "none"
    revision: str = "none"
    length: str = "canvas"
    temperature: float = 0.0
    seed: int = 0

    def config(self) -> SamplerConfig:
        """The sampler configuration; raises ValueError for numbers or names that do not fit together."""
        if self.revision not in REVISIONS:
            raise ValueError(f"unknown revision {self.revision!r}: use one of {', '.join(REVISIONS)}")
        named = {"schedule": schedule_named(self.schedule), "filters": filters_named(self.filter)}
        named |= {"revision": REVISIONS[self.revision], "length": length_named(self.length)}
        sizes = self.gen_length, self.block_length, self.steps
        return SamplerConfig(*sizes, temperature=self.temperature, seed=self.seed, **named)

    def sweep(self) -> tuple["Setting", ...]:
        """This setting at every Z at which each forward of a block writes the same number of tokens, the largest Z first."""
        config = replace(self, steps=self.gen_length).config()
        shares = [share for share in range(self.block_length, 0, -1) if self.block_length % share == 0]
        return tuple(replace(self, steps=config.blocks * share) for share in shares)

    def family(self) -> str:
        """A label of the setting without its Z: runs of one family make one line on the chart."""
        parts = [f"L {self.gen_length}, B {self.block_length}, {self.schedule}"]
        parts += [name for name in (self.filter, self.revision) if name != "none"]
        parts += [f"length {self.length}"] if self.length != "canvas" else []
        parts += [f"temperature {self.temperature:g}"] if self.temperature else []
        parts += [f"seed {self.seed}"] if self.seed else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """One run. picture: its name; image: what was asked about."""

    picture: str
    setting: Setting
    answer: Answer
    trace: Trace = field(repr=False)
    image: Image.Image | None = field(default=None, repr=False, compare=False)

    @cached_property
    def parts(self) -> list[tuple[str, bool]]:
        """The text cut where it repeats itself, each part with whether it is a repetition."""
        return repeated_parts(self.answer.text)

    @property
    def kept(self) -> set[int]:
        """The positions of its words that were given; others may be fixed behind its end."""
        return {event.position for event in self.trace.fixed if event.position < self.answer.tokens}

    @property
    def frames(self) -> int:
        """Forwards of the trace: frame k is the canvas after k forwards."""
        return forwards_of(self.trace.events)

    def canvas(self, frame: int) -> list[Cell]:
        """The positions of the canvas after `frame` forwards."""
        return cells(self.trace.events, self.trace.gen_length, frame, self.trace.fixed)

    @property
    def words(self) -> int:
        """Words of the answer, as `str.split` counts them."""
        return len(self.answer.text.split())

    @property
    def repetition(self) -> float:
        """The percentage of the words that are marked as repeated."""
        return 100 * sum(len(part.split()) for part, again in self.parts if again) / max(self.words, 1)

    def row(self) -> dict:
        """The run as a row of a table: picture, question, text, the setting, forwards, seconds, words, repetition (%)."""
        numbers = {"forwards": self.answer.forwards, "seconds": self.answer.seconds, "words": self.words}
        asked = {"picture": self.picture, "question": self.answer.question, "text": self.answer.text}
        return asked | asdict(self.setting) | numbers | {"repetition": self.repetition}


def compare(outcomes: Sequence[Outcome]) -> str:
    """The result of a sweep in two sentences. Raises ValueError for fewer than two runs."""
    runs = sorted(outcomes, key=lambda outcome: outcome.setting.steps)
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} runs cannot be compared: sweep Z first")
    few, many, least = runs[0], runs[-1], min(runs, key=lambda outcome: outcome.repetition)
    seen = "the paper's effect is seen at the ends" if few.repetition > many.repetition else "the effect does not appear"
    return (
        f"Repeated words: {few.repetition:.0f} % at Z = {few.setting.steps} ({few.answer.forwards} forwards), "
        f"{many.repetition:.0f} % at Z = {many.setting.steps} ({many.answer.forwards} forwards); fewest, "
        f"{least.repetition:.0f} %, at Z = {least.setting.steps}. In this sweep {seen}; with one answer at each Z it is an "
        "example and no rule."
    )


def read_upload(name: str, content: bytes) -> Image.Image:
    """The picture in an uploaded file. Raises ImageError, with the file's own name, where it cannot be read."""
    suffix = Path(name).suffix.lower()
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"upload{suffix if suffix[1:].isalnum() and len(suffix) < 8 else ''}"
        path.write_bytes(content)
        try:
            return open_image(path)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), repr(name))) from None


class Session:
    """A model and its answers so far; asking the same again returns the kept outcome."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer
        self.outcomes: dict[tuple[str, str, Setting], Outcome] = {}
        self.filled: dict[tuple[str, str, Setting, tuple[int, ...]], Outcome] = {}  # by the response too; not on the chart

    def found(self, picture: Image.Image, question: str, setting: Setting) -> Outcome | None:
        """The kept outcome, or None."""
        return self.outcomes.get((_digest(picture), question, setting))

    def known(self, picture: Image.Image, question: str, setting: Setting) -> dict[int, Outcome]:
        """The kept outcomes of this setting at any Z, by Z in order."""
        kept = {}
        for (digest, asked, each), outcome in self.outcomes.items():
            if (digest, asked, replace(each, steps=setting.steps)) == (_digest(picture), question, setting):
                kept[each.steps] = outcome
        return dict(sorted(kept.items()))

    def ask(
        self, picture: Image.Image, question: str, setting: Setting, *, name: str = "picture", on_step: OnStep | None = None
    ) -> Outcome:
        """Answer one question; `on_step` may raise `Cancelled`. ValueError for a bad setting or an empty or long question."""
        if (kept := self.found(picture, question, setting)) is not None:
            return kept
        answer, trace = self.answerer.ask(picture, question, setting.config(), on_step=on_step)
        outcome = Outcome(name, setting, answer, trace, picture)
        self.outcomes[_digest(picture), question, setting] = outcome
        return outcome

    def fill(self, outcome: Outcome, kept: Sequence[int]) -> Outcome:
        """The same question and setting again, with the tokens of an answer at these positions kept; all others are written.

        A length that was chosen stays.
        """
        trace, question = outcome.trace, outcome.answer.question
        kept = {*kept, *(event.position for event in trace.fixed if event.position >= outcome.answer.tokens)}
        written, response = trace.replay(10**9), [trace.mask_token_id] * trace.gen_length
        for place in kept:
            response[place] = written[place]
        key = (_digest(outcome.image), question, outcome.setting, tuple(response))
        if key not in self.filled:
            config = replace(outcome.setting.config(), length=None)
            answer, made = self.answerer.ask(outcome.image, question, config, response=response)
            self.filled[key] = replace(outcome, answer=answer, trace=made)
        return self.filled[key]

    def sweep(self, picture: Image.Image, question: str, setting: Setting, *, name: str = "picture") -> Iterator[Outcome]:
        """The outcomes of `setting.sweep()`, the largest Z first; kept ones are not asked again."""
        for each in setting.sweep():
            yield self.ask(picture, question, each, name=name)


def gallery(count: int = 6, *, image_size: int = 64) -> list[Example]:
    """Test phantoms to begin with, in the order of the set: one of each domain, then other findings."""
    seen, domains, more = set(), [], []
    for example in description_set("test", 8 * count, image_size=image_size):
        scene = example.meta["scene"]
        if not seen & {scene.domain, (scene.domain, scene.finding)}:
            domains.append(example)
        elif (scene.domain, scene.finding) not in seen:
            more.append(example)
        seen |= {scene.domain, (scene.domain, scene.finding)}
    return (domains + more)[:count]


def _digest(picture: Image.Image) -> str:
    """A digest of the pixels, kept with the picture."""
    if "medv_digest" not in picture.info:
        head = f"{picture.mode} {picture.size}".encode()
        picture.info["medv_digest"] = hashlib.sha256(head + picture.tobytes()).hexdigest()
    return picture.info["medv_digest"]
