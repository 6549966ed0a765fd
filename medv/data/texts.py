"""Texts to train on: documents for a language tower, and captions and dialogues made of questions.

A document is one text file, JSON line or row: an answer to a prompt in the chat format, or text alone. Captions and dialogues
are made of the training questions of VQA-RAD for stages 1 and 2: each image has some six questions, whose answers together are
all that the data set says about it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from medv.data.chat import SpecialTokens, prompt_text, without_special
from medv.data.example import Example, Turn
from medv.reading import read_text, read_values

SUFFIXES = (".jsonl", ".txt")
CAPTION_REQUESTS = (
    "Describe the image briefly.",
    "Give a short caption of the image.",
    "What does the image show, in one sentence?",
    "Summarize the image in one sentence.",
)

_ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
_NAMED = {"MODALITY": "Modality", "PLANE": "Plane"}
MOST_TURNS = 12  # questions of one dialogue or caption


def all_prompts() -> tuple[str, ...]:
    """The prompts to which a causal model writes its own training text: every topic in every template of `prompts.json`.

    Half of the topics are medical and half are not, so that the tower keeps its general knowledge.
    """
    parts = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    topics = [topic for group in parts["topics"].values() for topic in group]
    return tuple(template.format(topic) for topic in topics for template in parts["templates"])


@dataclass(frozen=True)
class Document:
    """A text, or the answer to a prompt; `ended` is False where it was cut off before its end."""

    text: str
    prompt: str = ""
    ended: bool = True

    def string(self) -> str:
        """The document with its special tokens as text, without an end of text (see `medv.companion.towers.text`)."""
        end = SpecialTokens.STRINGS["end_of_turn"] if self.prompt and self.ended else ""
        return self.opening() + without_special(self.text) + end

    def opening(self) -> str:
        """The chat format up to where the answer begins; empty without a prompt."""
        return prompt_text((Turn("user", without_special(self.prompt)),)) if self.prompt else ""


def read_documents(source: str | Path, first: int | None = None) -> list[Document]:
    """The documents of a folder (its .txt and .jsonl files by name; `first`: so many), of one such file, or of a data set.

    A JSON line or a row has "text" and may have "prompt" and "ended". A name that is no path is loaded with the package
    `datasets` (split "train"). Raises FileNotFoundError or ValueError where there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())[:first]
        documents = [document for file in files for document in _read_file(file)]
    elif path.is_file():
        documents = _read_file(path)
    elif path.suffix in SUFFIXES or path.is_absolute():
        raise FileNotFoundError(f"{source} is not there: give a folder, a .txt or .jsonl file, or the name of a data set")
    else:
        try:
            from datasets import load_dataset

            documents = _of_rows(load_dataset(str(source), split="train"), str(source))
        except ImportError as error:
            raise ValueError(f"{source} is no folder or file, and the package datasets is not installed") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source} is no folder or file, and no data set could be had by that name: {error}") from error
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{source} holds no text: it needs .txt files, or .jsonl files whose lines have a text")
    return documents


def _read_file(file: Path) -> list[Document]:
    if file.suffix == ".txt":
        return [Document(read_text(file).strip())]
    if file.suffix != ".jsonl":
        raise ValueError(f"{file} is neither .txt nor .jsonl: rename or convert it")
    return _of_rows((row for _, row in read_values(file)), str(file))


def _of_rows(rows: Iterable[Any], source: str) -> list[Document]:
    documents = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise ValueError(f'{source}, row {number} has no "text": each row needs one, and may have a "prompt"')
        prompt, ended = row.get("prompt") or "", row.get("ended", True)
        if not isinstance(prompt, str) or not isinstance(ended, bool):
            raise ValueError(f"{source}, row {number}: prompt {prompt!r} must be text, and ended {ended!r} true or false")
        documents.append(Document(row["text"], prompt, ended))
    return documents


def split_documents(documents: Iterable[Document], share: float = 0.02) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: a share of all prompts (of texts without a prompt), chosen by their hash.

    All answers to one prompt are on the same side. Raises ValueError where there are fewer than two.
    """
    keyed = [(blake2b((document.prompt or document.text).encode()).hexdigest(), document) for document in documents]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise ValueError("the text is a single document, so that nothing can be held out: cut it into several files")
    held = set(keys[: max(1, round(share * len(keys)))])
    return [d for key, d in keyed if key not in held], [d for key, d in keyed if key in held]


def caption_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, a request and a caption: organ, modality and plane where given, then questions and
    answers about it in an order drawn from (seed, copy, image).
    """

    def turns(asked: Sequence[Example], rng: np.random.Generator) -> tuple[Turn, ...]:
        request = str(rng.choice(CAPTION_REQUESTS))
        organ = _ORGANS.get(str(asked[0].meta.get("image_organ")))
        parts = [f"An image of the {organ}."] if organ else []
        for kind, name in _NAMED.items():
            given = [e.answer for e in asked if e.meta.get("question_type") == kind and e.answer_type == "OPEN"]
            parts += [f"{name}: {given[0]}."] if given else []
        parts += [f"Question: {e.question} Answer: {e.answer}." for e in _shuffled(asked, rng)]
        return (Turn("user", request), Turn("assistant", " ".join(parts)))

    return _of_images(questions, "caption", turns, copies, seed)


def dialogue_examples(questions: Sequence[Example], *, copies: int = 1, seed: int = 0) -> list[Example]:
    """For each image, `copies` times, its questions and answers as one dialogue, in an order drawn from (seed, copy, image)."""

    def turns(asked: Sequence[Example], rng: np.random.Generator) -> tuple[Turn, ...]:
        return tuple(turn for example in _shuffled(asked, rng) for turn in example.turns)

    return _of_images(questions, "dialogue", turns, copies, seed)


def _of_images(questions: Sequence[Example], kind: str, turns: Callable, copies: int, seed: int) -> list[Example]:
    groups: dict[str, list[Example]] = {}
    for example in questions:
        groups.setdefault(example.meta["image"], []).append(example)
    return [
        Example(
            f"{image}/{kind}/{copy}",
            asked[0].image,
            turns(asked, np.random.default_rng([seed, copy, number])),
            None,
            {"image": image},
        )
        for number, (image, asked) in enumerate(groups.items())
        for copy in range(copies)
    ]


def _shuffled(asked: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    return [asked[place] for place in rng.permutation(len(asked))[:MOST_TURNS]]
