"""The explorer without its widgets: ask about a picture, sweep Z, remember every run, and say what stands on a canvas when.

A `Session` keeps each answer under (picture, question, setting), so that a Z that was asked once is shown again at once.
What is drawn is made in `explorer.view`; what is clicked, in `explorer.widgets`. It knows one answer a run:
for means and intervals there are the notebooks.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from PIL import Image

from medv.data.example import Example
from medv.data.images import ImageError, open_image
from medv.diffusion.config import SamplerConfig
from medv.diffusion.revision import ReMDM, RevealRemask, Revision
from medv.diffusion.schedules import SCHEDULES, schedule_named
from medv.diffusion.trace import COMMIT, Events, Trace
from medv.evaluation.answering import Answer, Answerer
from medv.evaluation.repetition import repeated_parts
from medv.phantoms.sets import description_set

REVISIONS: dict[str, Revision | None] = {"none": None, "reveal-remask": RevealRemask(budget=0.25), "remdm": ReMDM()}
MEASURES = {"repetition": "repeated words (%)", "words": "words", "forwards": "forwards", "seconds": "seconds"}


class Cancelled(Exception):
    """Raised inside a callback to end a run; nothing of that run is kept."""


@dataclass(frozen=True)
class Setting:
    """What can be set: L, B, Z, the names of a schedule and a revision, temperature, seed."""

    gen_length: int = 64
    block_length: int = 32
    steps: int = 64
    schedule: str = "linear"
    revision: str = "none"
    temperature: float = 0.0
    seed: int = 0

    def config(self) -> SamplerConfig:
        """The sampler configuration; raises ValueError, in words, for numbers or names that do not fit together."""
        if self.revision not in REVISIONS:
            raise ValueError(f"unknown revision {self.revision!r}: use one of {', '.join(REVISIONS)}")
        return SamplerConfig(
            self.gen_length,
            self.block_length,
            self.steps,
            temperature=self.temperature,
            seed=self.seed,
            schedule=schedule_named(self.schedule),
            revision=REVISIONS[self.revision],
        )

    def sweep(self) -> tuple["Setting", ...]:
        """This setting at every Z that gives each forward of a block the same number of tokens, the largest Z first."""
        config = replace(self, steps=self.gen_length).config()
        shares = [share for share in range(self.block_length, 0, -1) if self.block_length % share == 0]
        return tuple(replace(self, steps=config.blocks * share) for share in shares)

    def family(self) -> str:
        """The setting without its Z, in words: runs of one family make one line on the chart."""
        said = f"L {self.gen_length}, B {self.block_length}, {self.schedule}"
        said += f", {self.revision}" if self.revision != "none" else ""
        said += f", temperature {self.temperature:g}" if self.temperature else ""
        return said + (f", seed {self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Outcome:
    """One run. parts: the text cut where it repeats itself, each part with whether it is a repetition. picture: its name."""

    picture: str
    setting: Setting
    answer: Answer
    trace: Trace = field(repr=False)
    parts: tuple[tuple[str, bool], ...]

    @property
    def frames(self) -> int:
        """Forwards of the trace: frame k of it is the canvas after k forwards."""
        return self.trace.events[-1].step + 1 if self.trace.events else 0

    @property
    def words(self) -> int:
        """Words of the answer, as `str.split` counts them."""
        return len(self.answer.text.split())

    @property
    def repetition(self) -> float:
        """The percentage of the words that are marked as repeated."""
        return 100 * sum(len(part.split()) for part, again in self.parts if again) / max(self.words, 1)

    def row(self) -> dict:
        """The run as a row of the history."""
        numbers = {"forwards": self.answer.forwards, "seconds": self.answer.seconds, "words": self.words}
        told = {"picture": self.picture, "question": self.answer.question, "text": self.answer.text}
        return told | asdict(self.setting) | numbers | {"repetition": self.repetition}


@dataclass(frozen=True)
class Cell:
    """One position of the canvas after some forward.

    state: "open" (masked), "written", "fresh" (by the last forward), "lost" (taken back by it); token: None where open;
    confidence: when it was written; taken: how often it was taken back so far; forward: of its last event, from 1.
    """

    state: str
    token: int | None = None
    confidence: float = 0.0
    taken: int = 0
    forward: int = 0


def cells(trace: Trace, frame: int) -> list[Cell]:
    """The canvas of a trace of one row after `frame` forwards; 0 is all masks."""
    canvas = [Cell("open")] * trace.gen_length
    for event in trace.events:
        if event.step >= frame:
            break
        last, before = event.step == frame - 1, canvas[event.position]
        if event.kind == COMMIT:
            state = "fresh" if last else "written"
            canvas[event.position] = Cell(state, event.token, event.confidence, before.taken, event.step + 1)
        else:
            token = event.token if last else None
            state = "lost" if last else "open"
            canvas[event.position] = Cell(state, token, event.confidence, before.taken + 1, event.step + 1)
    return canvas


def compare(outcomes: Sequence[Outcome]) -> str:
    """What a sweep says, in two sentences made from its numbers alone. Raises ValueError for fewer than two runs."""
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
    """The picture in an uploaded file; raises ImageError, in words and with the file's own name, for what is none."""
    suffix = Path(name).suffix.lower()
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"upload{suffix if suffix[1:].isalnum() and len(suffix) < 8 else ''}"
        path.write_bytes(content)
        try:
            return open_image(path)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), repr(name))) from None


class Session:
    """A model, and every answer that it has given here; asking the same again gives the kept outcome."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer
        self.outcomes: dict[tuple[str, str, Setting], Outcome] = {}

    def found(self, picture: Image.Image, question: str, setting: Setting) -> Outcome | None:
        """The kept outcome, or None."""
        return self.outcomes.get((_digest(picture), question, setting))

    def known(self, picture: Image.Image, question: str, setting: Setting) -> list[Outcome]:
        """All kept outcomes that differ from this at most in Z, by Z."""
        place = (_digest(picture), question)
        kept = [
            o for key, o in self.outcomes.items() if key[:2] == place and replace(key[2], steps=1) == replace(setting, steps=1)
        ]
        return sorted(kept, key=lambda outcome: outcome.setting.steps)

    def ask(
        self,
        picture: Image.Image,
        question: str,
        setting: Setting,
        *,
        name: str = "picture",
        on_step: Callable[[Events], None] | None = None,
    ) -> Outcome:
        """The answer to one question; `on_step` sees the events of each forward and may raise `Cancelled`.

        Raises ValueError, in words, for a setting that does not fit, an empty question, and one that is too long.
        """
        kept = self.found(picture, question, setting)
        if kept is not None:
            return kept
        answer, trace = self.answerer.ask(picture, question, setting.config(), on_step=on_step)
        outcome = Outcome(name, setting, answer, trace, tuple(repeated_parts(answer.text)))
        self.outcomes[_digest(picture), question, setting] = outcome
        return outcome

    def sweep(
        self,
        picture: Image.Image,
        question: str,
        setting: Setting,
        *,
        name: str = "picture",
        on_step: Callable[[Events], None] | None = None,
    ) -> Iterator[Outcome]:
        """The outcomes of `setting.sweep()`, the largest Z first; what is there already is not asked again."""
        for each in setting.sweep():
            yield self.ask(picture, question, each, name=name, on_step=on_step)

    def history(self) -> pd.DataFrame:
        """All runs so far, one row each: picture, question, text, the setting, forwards, seconds, words, repetition (%)."""
        return pd.DataFrame([outcome.row() for outcome in self.outcomes.values()])


def gallery(count: int = 6, *, image_size: int = 64) -> list[Example]:
    """Test phantoms to begin with, in the order of the set: one of each domain, then what shows something new."""
    seen, domains, more = set(), [], []
    for example in description_set("test", 8 * count, image_size=image_size):
        scene = example.meta["scene"]
        if not seen & {scene.domain, (scene.domain, scene.finding)}:
            domains.append(example)
        elif (scene.domain, scene.finding) not in seen:
            more.append(example)
        seen |= {scene.domain, (scene.domain, scene.finding)}
    return (domains + more)[:count]


def schedules() -> list[str]:
    """The names of the schedules there are."""
    return list(SCHEDULES)


def _digest(picture: Image.Image) -> str:
    """A name of the pixels, kept with the picture; a few microseconds from the second time on."""
    if "medv_digest" not in picture.info:
        head = f"{picture.mode} {picture.size}".encode()
        picture.info["medv_digest"] = hashlib.sha256(head + picture.tobytes()).hexdigest()
    return picture.info["medv_digest"]
