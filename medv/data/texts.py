"""Plain text and prompts with answers, to train a language tower on: folders, JSON lines, data sets of the hub.

A document is what one file, line or row says. With a prompt it is a dialogue of one question in the chat format; without one
it is text and nothing else. This module knows no tokenizer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from medv.data.chat import SpecialTokens, prompt_text, without_special
from medv.data.example import Turn

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Document:
    """A text, or the answer to a prompt; not `ended` where it was cut off before its end."""

    text: str
    prompt: str = ""
    ended: bool = True

    def string(self) -> str:
        """The document as a tokenizer gets it, special tokens written out; what ends it is for `medv.training.text`."""
        end = SpecialTokens.STRINGS["end_of_turn"] if self.prompt and self.ended else ""
        return self.opening() + without_special(self.text) + end

    def opening(self) -> str:
        """All up to where the answer to the prompt begins; empty without a prompt."""
        return prompt_text((Turn("user", without_special(self.prompt)),)) if self.prompt else ""


def read_documents(source: str | Path) -> list[Document]:
    """The documents of a folder (its .txt and .jsonl files, in order of their names), of one such file, or of a data set.

    A line of JSON, and a row of a data set, has "text" and may have "prompt" and "ended". A name that is no path is given to
    the package `datasets` (its split "train"). Raises FileNotFoundError or ValueError where there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        documents = [document for file in files for document in _read_file(file)]
    elif path.is_file():
        documents = list(_read_file(path))
    elif path.suffix in SUFFIXES or path.is_absolute():
        raise FileNotFoundError(f"{source} is not there: give a folder, a .txt or .jsonl file, or the name of a data set")
    else:
        documents = list(_of_rows(_hub_rows(str(source)), str(source)))
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{source} holds no text: it needs .txt files, or .jsonl files whose lines have a text")
    return documents


def _read_file(file: Path) -> Iterator[Document]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from None
    if file.suffix == ".txt":
        yield Document(content.strip())
        return
    if file.suffix != ".jsonl":
        raise ValueError(f"{file} is neither .txt nor .jsonl: rename or convert it")
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}): mend or remove it") from None
    yield from _of_rows(rows, str(file))


def _of_rows(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise ValueError(f'{source}, row {number} has no "text": each row needs one, and may have a "prompt"')
        yield Document(row["text"], str(row.get("prompt") or ""), bool(row.get("ended", True)))


def _hub_rows(name: str) -> Iterable[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} is no folder or file, and the package datasets is not installed") from error
    try:
        return load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no folder or file, and no data set could be had by that name: {error}") from error


def split_documents(documents: Iterable[Document], share: float = 0.02) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: of all prompts (or texts, where there is no prompt) `share`, chosen by their hash.

    All answers to one prompt are on the same side. Raises ValueError where there are fewer than two.
    """
    keyed = [(blake2b((document.prompt or document.text).encode()).hexdigest(), document) for document in documents]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise ValueError("the text is a single document, so that nothing can be held out: cut it into several files")
    held = set(keys[: max(1, round(share * len(keys)))])
    return [d for key, d in keyed if key not in held], [d for key, d in keyed if key in held]
