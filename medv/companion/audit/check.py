"""Compare a downloaded data set with what the paper used: its counts beside Table 8's (Table 1's for the chat benchmark).

Only what the files say is checked: counts, missing images, repeated or empty answers. No image is opened.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medv.data.example import Example
from medv.data.readers import DataSet, data_set, read_dataset
from medv.paper import table
from medv.reading import DataError, visible


@dataclass(frozen=True)
class Count:
    """One cell: `paper` is None where the paper prints none; `note` explains a cell that the paper misprints."""

    split: str
    quantity: str
    counted: int
    paper: int | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "match", "mismatch", "misprint" (the data are right and the paper's cell is not) or "" (nothing to compare)."""
        if self.paper is None:
            return ""
        return "match" if self.counted == self.paper else "misprint" if self.note else "mismatch"


@dataclass(frozen=True)
class DatasetCheck:
    """Counts and oddities of a data set; `problems` does not affect `matches`, as the paper's own data have some."""

    name: str
    counts: tuple[Count, ...]
    problems: tuple[str, ...]

    @property
    def matches(self) -> bool | None:
        """Whether every count is the paper's, or is right where the paper misprints it; None where the paper prints none."""
        verdicts = {count.verdict for count in self.counts} - {""}
        return "mismatch" not in verdicts if verdicts else None

    def to_dict(self) -> dict[str, Any]:
        """The check ready for JSON, with the verdict of each count."""
        counts = [asdict(count) | {"verdict": count.verdict} for count in self.counts]
        return {"name": self.name, "matches": self.matches, "counts": counts, "problems": list(self.problems)}


def check_dataset(
    name: str, folder: str | Path, *, images: str | Path | None = None, roots: Sequence[Path] = ()
) -> DatasetCheck:
    """Count every split found in a data set's folder and list its oddities; images may be links into `roots`.

    Raises DataError if no split is found or a file cannot be read.
    """
    dataset = data_set(name)
    counts, problems, found = [], [], {}
    for split in dataset.files:
        try:
            dataset.find(folder, split)
        except DataError as error:
            problems.append(f"{split}: {error}")
            continue
        examples = found[split] = read_dataset(name, folder, split, images=images, roots=roots)
        counts += _counts(dataset, split, examples)
        problems += [f"{split}: {problem}" for problem in _problems(examples)]
    if not found:
        raise DataError(problems[0].partition(": ")[2])
    shown = {split: {e.meta["image"] for e in examples if "image" in e.meta} for split, examples in found.items()}
    for split in ("validation", "test"):
        if shared := shown.get(split, set()) & shown.get("train", set()):
            share = f"{len(shared)} of {len(shown[split])} images also occur in train"
            problems.append(f"{split}: {share} (the split is by question)")
    if not any(example.image for examples in found.values() for example in examples):
        problems.append("no image folder was given or found, so the images were counted by name only")
    return DatasetCheck(dataset.name, tuple(counts), tuple(problems))


def _counts(dataset: DataSet, split: str, examples: Sequence[Example]) -> list[Count]:
    counted = {"images": len({example.meta.get("image") for example in examples} - {None})}
    if dataset.domains:
        kinds, domains = (Counter(example.meta[name] for example in examples) for name in ("type", "domain"))
        counted |= {"conversation": kinds["conversation"], "description": kinds["detailed_description"]}
        counted |= {domain: domains[domain] for domain in dataset.domains} | {"overall": len(examples)}
        paper = table("table1_counts").iloc[0].to_dict()
    else:
        counted["qa_pairs"] = len(examples)
        if types := Counter(example.answer_type for example in examples if example.answer_type):
            counted |= {"closed_form": types["CLOSED"], "open_form": types["OPEN"]}
        column = f"{dataset.name}_{'val' if split == 'validation' else split}"
        paper = table("table8").set_index("detail").get(column, {})
    cells = []
    for quantity, count in counted.items():
        printed = int(paper[quantity]) if quantity in paper else None
        true, why = dataset.misprints.get((split, quantity), (None, ""))
        cells.append(Count(split, quantity, count, printed, why if count == true else ""))
    return cells


def _problems(examples: Sequence[Example]) -> list[str]:
    """Oddities of one split, as sentences."""
    images = {example.meta["image"]: example.image for example in examples if "image" in example.meta}
    missing = [name for name, path in images.items() if path is not None and not path.is_file()]
    empty = [example.id for example in examples if any(not t.text for t in example.turns if t.role == "assistant")]
    repeated = len(examples) - len({(example.meta.get("image"), example.turns) for example in examples})
    ids = [identity for identity, count in Counter(example.id for example in examples).items() if count > 1]
    damaged = [example.id for example in examples if any("\ufffd" in turn.text for turn in example.turns)]
    answers = defaultdict(set)
    for example in examples:
        if example.answer_type == "CLOSED":
            answers[example.meta.get("image"), example.question].add(example.answer.lower())
    contradictions = sum(len(given) > 1 for given in answers.values())
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(images)} images are missing (first: {missing[0]})")
    if repeated:
        problems.append(f"{repeated} rows repeat the image, question and answer of an earlier row")
    if contradictions:
        problems.append(f"{contradictions} closed questions about one image have several answers")
    if ids:
        problems.append(f"{len(ids)} ids are not unique (first: {ids[0]})")
    if empty:
        problems.append(f"{len(empty)} answers are empty (first: id {empty[0]})")
    if damaged:
        problems.append(f"{len(damaged)} rows have characters lost in an earlier conversion (first: id {damaged[0]})")
    return problems


def render_check(check: DatasetCheck, console: Console) -> None:
    """Print the counts in the order of Table 8, the paper's beside ours, then the problems."""
    grid = Table(title=f"{check.name}: counted beside the paper's", title_justify="left")
    for heading, side in (("split", "left"), ("", "left"), ("counted", "right"), ("paper", "right"), ("", "left")):
        grid.add_column(heading, justify=side)
    colors = {"match": "green", "mismatch": "red", "misprint": "yellow", "": "dim"}
    for count in check.counts:
        words = f"mismatch, but {count.note}" if count.verdict == "misprint" else count.verdict
        printed = "" if count.paper is None else str(count.paper)
        grid.add_row(count.split, count.quantity, str(count.counted), printed, Text(words, style=colors[count.verdict]))
    console.print(grid)
    for problem in check.problems:
        console.print(f"- {visible(problem)}", markup=False, highlight=False)
    if check.matches is not None:
        agree = "All counts agree with the paper's" if check.matches else "Some counts differ from the paper's"
        misprints = sum(count.verdict == "misprint" for count in check.counts)
        console.print(f"{agree}, but for {misprints} that the paper misprints." if misprints else f"{agree}.")
