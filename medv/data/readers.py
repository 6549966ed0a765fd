"""The published data sets (Tables 1 and 8): one record each in `DATASETS`, and the readers of their file formats.

Readers keep the order of the file. `meta["image"]` of an example is the image's name in the data file and `Example.image` its
path, or None without an image folder. Errors name the file, the row and the remedy. Nothing here opens an image or tokenizes.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medv.data.example import IMAGE_TOKEN, Example, Turn
from medv.data.images import ImageFolder
from medv.data.rows import Row, found, read_rows
from medv.reading import DataError

Folder = str | os.PathLike
_SPLIT_WORDS = {"val": "validation", "validate": "validation", "dev": "validation"}
_RAD_WHOLE = "VQA_RAD*[Pp]ublic*.json"


@dataclass(frozen=True)
class DataSet:
    """One published data set: everything needed to read, check, score and train on it.

    files: the glob patterns of each split's file within the data set's folder; the first match is read.
    examples: the examples of one row, given the image folder or None.
    fields: sets of field names; a row that has all of one set is an annotation of this data set (`medv evaluate vqa`).
    languages: values of `meta["language"]`, where a file has several.
    reworded: whether an example is a test question in other words; those are only read with `all_rows`.
    split_of: the split that an example itself claims to belong to, or None. one_file: a file may hold several splits.
    test_ids: sha256 of the test set's sorted ids, joined by commas: a file with these ids is never trained on.
    repeats: the published train and test files share questions, distinguished by their ids alone.
    captioned: in stages 1 and 2 of a synthetic profile, captions and dialogues are made of its questions.
    domains: of a chat benchmark (Table 1); a question with several flags counts under the first.
    misprints: (split, quantity) of a wrong cell of Table 8 to the true count and the reason.
    """

    name: str
    title: str
    files: Mapping[str, tuple[str, ...]]
    examples: Callable[[Row, Folder | None], Iterable[Example]]
    fields: tuple[set[str], ...] = ()
    languages: tuple[str, ...] = ("en",)
    reworded: Callable[[Example], bool] | None = None
    split_of: Callable[[Example], str | None] | None = None
    one_file: bool = False
    test_ids: str | None = None
    repeats: bool = False
    captioned: bool = False
    domains: tuple[str, ...] = ()
    misprints: Mapping[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def find(self, folder: str | Path, split: str) -> Path:
        """The file of one split in `folder`, which may be that file; raises DataError naming what was looked for."""
        split, folder = _SPLIT_WORDS.get(split, split), Path(folder)
        if split not in self.files:
            raise DataError(f"{self.name} has no split {split!r}: choose from {', '.join(self.files)}")
        if folder.is_file():
            return folder
        if not folder.is_dir():
            raise DataError(f"the data folder {folder} does not exist")
        for pattern in self.files[split]:
            paths = sorted(folder.glob(pattern))
            if len(paths) > 1:
                raise DataError(f"{folder} holds several files for {self.name}: give one of {', '.join(p.name for p in paths)}")
            if paths:
                return paths[0]
        raise DataError(f"{folder} has no {self.name} {split} file: expected {' or '.join(self.files[split])}")

    def read(
        self,
        path: str | Path,
        *,
        images: Folder | None = None,
        split: str | None = None,
        language: str = "en",
        all_rows: bool = False,
        drop_duplicates: bool = False,
    ) -> list[Example]:
        """The examples of one file, in its order.

        split: the one to choose where a file holds several; None for all. language: of a bilingual set ("en" as in the paper,
        "zh", "all"). all_rows: reworded test questions too. drop_duplicates: drop repetitions. Raises DataError.
        """
        if language not in (*self.languages, "all"):
            raise DataError(f"{self.name} has no language {language!r}: choose from {', '.join((*self.languages, 'all'))}")
        examples = [example for row in read_rows(path) for example in self.examples(row, images)]
        if len(self.languages) > 1 and language != "all":
            examples = [example for example in examples if example.meta["language"] == language]
            if not examples:
                raise DataError(f"{path} has no question in the language {language!r}: choose another language")
        if self.reworded and not all_rows:
            examples = [example for example in examples if not self.reworded(example)]
        if self.one_file and split and any(self.split_of(example) for example in examples):
            examples = [example for example in examples if (self.split_of(example) == "test") == (split == "test")]
            if not examples:
                raise DataError(f"{path} marks every row as test: it has no {split} rows")
        if drop_duplicates:
            first: dict[tuple, Example] = {}
            for example in examples:
                first.setdefault((example.meta.get("image"), example.turns), example)
            examples = list(first.values())
        return examples


def data_set(name: str) -> DataSet:
    """The record of a data set (vqa-rad is vqa_rad); raises DataError for an unknown name."""
    name = name.replace("-", "_")
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def read_dataset(
    name: str,
    folder: str | Path,
    split: str = "train",
    *,
    images: Folder | None = None,
    roots: Sequence[Path] = (),
    **options: Any,
) -> list[Example]:
    """The examples of one split ("train", "validation", "test") of a published data set.

    folder: the data set's folder as downloaded, or one of its files. images: the folder that image names are relative to; by
    default `images/` or `imgs/` in the folder, where there is one. roots: folders into which images may be links. options: see
    `DataSet.read`. Raises DataError.
    """
    dataset = data_set(name)
    path = dataset.find(folder, split)
    root = Path(folder) if Path(folder).is_dir() else path.parent
    if images is None:
        images = next((root / place for place in ("images", "imgs") if (root / place).is_dir()), None)
    elif not Path(images).is_dir():
        raise DataError(f"the image folder {Path(images)} does not exist: leave it out to read the texts alone")
    if images is not None and roots:
        images = ImageFolder(Path(images), tuple(roots))
    return dataset.read(path, images=images, split=split, **options)


def read_training_set(
    name: str, folder: str | Path, *, roots: Sequence[Path] = (), skip_corrupt: bool = False
) -> list[Example]:
    """The training examples in `folder` (or one of its files), with their images, which may be links into the folders `roots`.

    Raises DataError for what would otherwise train silently on test questions or on texts alone: rows of another split, by the
    file's name, by the rows' marks and numbers and by the test file beside it; and missing images, all or, unless
    `skip_corrupt`, some.
    """
    dataset = data_set(name)
    path, examples = dataset.find(folder, "train"), read_dataset(name, folder, "train", roots=roots)
    named = [split for split, patterns in dataset.files.items() if any(path.match(pattern) for pattern in patterns)]
    if named and "train" not in named:
        raise DataError(f"{path} is the {named[0]} file of {dataset.name}: train on {dataset.files['train'][0]}")
    if dataset.split_of:
        claims = {dataset.split_of(example): example.id for example in reversed(examples)}
        others = sorted(set(claims) - {None, "train"})
        if "test" in others or (others and "train" not in claims):
            first = f"(id {claims[others[-1]]})"
            raise DataError(f"{path} holds questions of the {others[-1]} split {first}: train on the training file alone")
    ids = hashlib.sha256(",".join(sorted(example.id for example in examples)).encode()).hexdigest()
    if ids == dataset.test_ids:
        raise DataError(f"{path} holds the questions of {dataset.title}'s test set: train on the training file")
    if "test" in dataset.files:
        try:
            beside = dataset.find(Path(folder) if Path(folder).is_dir() else path.parent, "test")
        except DataError:  # there is no test file
            beside = None
        if beside:
            asked = {_key(example, dataset) for example in read_dataset(name, beside, "test", roots=roots)}
            if shared := [example.id for example in examples if _key(example, dataset) in asked]:
                raise DataError(
                    f"{path} and {beside} share {len(shared)} questions (id {shared[0]}): train on none of the test's"
                )
    check_pictures(examples, path, skip_corrupt=skip_corrupt)
    return examples


def _key(example: Example, dataset: DataSet) -> tuple:
    """When two rows ask the same; where the published files share questions, only with the same id."""
    return (example.meta.get("image"), example.question, example.id if dataset.repeats else None)


def check_pictures(examples: Sequence[Example], path: Path, *, skip_corrupt: bool = False) -> None:
    """Raises DataError where examples that name an image have none: no folder for any, or files that are not there."""
    named = [example for example in examples if "image" in example.meta]
    if any(example.image is None for example in named):
        raise DataError(f"{path} names images, but there is no folder images or imgs beside it: put them there")
    there = {image: image.is_file() for image in {example.image for example in named}}
    lost = sorted(str(image) for image, found in there.items() if not found)
    if lost and (len(lost) == len(there) or not skip_corrupt):
        way = "look at the folder" if len(lost) == len(there) else "add them, or leave them out with --skip-corrupt"
        raise DataError(f"{len(lost)} of the {len(there)} images of {path} are missing ({lost[0]}): {way}")


def question(
    row: Row, images: Folder | None, *, id_key: str = "id", image_key: str = "image", keep: Sequence[str] = (), **meta: Any
) -> Example:
    """An example from the fields `question`, `answer` and `answer_type`; `meta` gets the fields `keep` too."""
    image = row.text(image_key)
    turns = (Turn("user", row.text("question")), Turn("assistant", row.text("answer", empty=True, numbers=True)))
    meta = {"image": image, "id_key": id_key, **meta, **_kept(row, keep)}
    return Example(row.identity(id_key), row.image(images, image), turns, _answer_type(row), meta)


def _answer_type(row: Row) -> str:
    value = row.text("answer_type").upper()
    if value not in ("OPEN", "CLOSED"):
        raise row.error(f"answer_type {value!r} must be OPEN or CLOSED")
    return value


def _kept(row: Row, keys: Sequence[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def _vqa_rad(row: Row, images: Folder | None) -> list[Example]:
    # Ten rows have tabs where commas were. The commas come back; words split with them ("splee n") stay split.
    row |= {
        key: ", ".join(part.strip() for part in text.strip().split("\t")) for key, text in row.items() if isinstance(text, str)
    }
    phrase = row.text("phrase_type").lower()
    keep = ("image_organ", "question_type")
    return [question(row, images, id_key="qid", image_key="image_name", keep=keep, phrase_type=phrase)]


def _rad_split(example: Example) -> str | None:
    return "test" if example.meta["phrase_type"].startswith("test_") else None


def _slake(row: Row, images: Folder | None) -> list[Example]:
    # One training answer is empty (qid 1622); the paper's 4919 includes it.
    spoken, keep = row.text("q_lang").lower(), ("location", "modality", "base_type", "content_type", "triple")
    return [question(row, images, id_key="qid", image_key="img_name", keep=keep, language=spoken)]


def _slake_split(example: Example) -> str | None:
    """By the published question numbers, for images named as published."""
    if not example.id.isdigit() or not example.meta["image"].startswith("xmlab"):
        return None
    ends = {"train": 9835, "validation": 11934, "test": 14028}
    return next((split for split, end in ends.items() if int(example.id) < end), None)


def _pathvqa(row: Row, images: Folder | None) -> list[Example]:
    """One question a row, or (the lxmert files) all of an image, without answer types: then yes and no are closed, as in the
    official normalization. Both give the same examples; 42 test rows repeat an earlier one.
    """
    if "sentf" not in row:
        return [question(row, images)]
    try:
        questions, labels = row["sentf"]["pvqa"], row["labelf"]["pvqa"]
        answers = [answer for (answer,) in labels]
        split, number = row.text("img_id").rsplit("_", 1)
        first_id = {"train": 1, "val": 2, "test": 3}[split] * 10**8 + int(number) * 1000
        pairs = list(zip(questions, answers, strict=True))
    except (KeyError, TypeError, ValueError):
        raise row.error(
            "expected img_id 'test_0001' and as many questions in sentf.pvqa as one-answer labels in labelf.pvqa"
        ) from None
    examples = []
    for index, (asked, answer) in enumerate(pairs):
        kind = "CLOSED" if answer.strip().rstrip(".").lower() in ("yes", "no") else "OPEN"
        fields = {"id": first_id + index, "image": f"{split}/{row['img_id']}.jpg", "question": asked}
        examples.append(question(row.with_fields({**fields, "answer": answer, "answer_type": kind}), images))
    return examples


def _pathvqa_split(example: Example) -> str | None:
    return {"train": "train", "val": "validation", "test": "test"}.get(example.meta["image"].partition("/")[0])


def _qa50(row: Row, images: Folder | None) -> list[Example]:
    """The biomedical chat benchmark of 193 questions, answered by GPT-4 from the captions; for evaluation only."""
    flags, domains = row.get("domain"), DATASETS["qa50"].domains
    domain = next((name for name in domains if isinstance(flags, dict) and flags.get(name)), None)
    if domain is None:
        raise row.error(f"domain {found(flags)} flags none of {', '.join(domains)}")
    image = row.text("image")
    turns = (Turn("user", _without_image(row, row.text("text"))), Turn("assistant", row.text("gpt4_answer")))
    meta = {"image": image, "id_key": "question_id", "domain": domain, "type": row.text("type")}
    meta |= _kept(row, ("pair_id", "fig_caption", "fig_label", "in_text_mention"))
    return [Example(row.identity("question_id"), row.image(images, image), turns, None, meta)]


def _llava_med(row: Row, images: Folder | None) -> list[Example]:
    """A dialogue of LLaVA-Med. The questions of alignment are kept, though the paper's stage 1 leaves them out."""
    spoken = row.get("conversations" if "conversations" in row else "conversatons")
    if not isinstance(spoken, list) or not spoken or not all(isinstance(message, dict) for message in spoken):
        raise row.error("'conversations' must be a list of {'from': ..., 'value': ...}")
    turns = []
    for index, message in enumerate(spoken):
        expected = ("human", "gpt")[index % 2]
        if message.get("from") != expected:
            raise row.error(f"message {index + 1} is from {found(message.get('from'))}, but should be from {expected!r}")
        text = row.with_fields(message).text("value", empty=True)
        text = _without_image(row, text) if index == 0 else text
        if IMAGE_TOKEN in text:
            raise row.error(f"message {index + 1} has an {IMAGE_TOKEN} of its own: only the first may have one, at either end")
        turns.append(Turn("user" if index % 2 == 0 else "assistant", text))
    if len(turns) % 2:
        raise row.error("the dialogue ends with a question: every human message needs an answer")
    kind = _answer_type(row) if "answer_type" in row else None
    image = row.text("image") if "image" in row else None
    if image is None and "pair_id" in row:
        image = f"{row.identity('pair_id')}.jpg"
    meta = {**({"image": image} if image else {}), "id_key": "id"}
    meta |= _kept(row, ("pair_id", "domain", "fig_caption", "in_text_mention", "question_type"))
    path = row.image(images, image) if image else None
    return [Example(row.identity("id", "question_id", "pair_id"), path, tuple(turns), kind, meta)]


def _without_image(row: Row, text: str) -> str:
    """The text without the image placeholder at its beginning or end."""
    bare = text.removeprefix(IMAGE_TOKEN) if text.startswith(IMAGE_TOKEN) else text.removesuffix(IMAGE_TOKEN)
    if IMAGE_TOKEN in bare:
        raise row.error(f"{IMAGE_TOKEN} stands more than once or amid the text: it must come first or last")
    return bare.strip()


_RECORDS = (
    DataSet(
        name="llava_med_align",
        title="LLaVA-Med alignment",
        files={"train": ("*align*.json", "alignment/*align*.json")},
        examples=_llava_med,
    ),
    DataSet(
        name="llava_med_instruct",
        title="LLaVA-Med instruction",
        files={"train": ("*instruct*.json", "instruct/*instruct*.json", "few_shot_examples.json")},
        examples=_llava_med,
    ),
    DataSet(
        name="vqa_rad",
        title="VQA-RAD",
        files={"train": ("trainset.json", _RAD_WHOLE), "test": ("testset.json", _RAD_WHOLE)},
        examples=_vqa_rad,
        fields=({"phrase_type"},),
        # They hold the image and the answer of 104 of the 179 open test questions.
        reworded=lambda example: example.meta["phrase_type"].removeprefix("test_") == "frame",
        split_of=_rad_split,
        one_file=True,
        test_ids="fbe3a5480ce22d6d1843bbe9aea3f7a0c3be2aecd73988cf44b7d6e77a171ac7",
        repeats=True,
        captioned=True,
    ),
    DataSet(
        name="slake",
        title="SLAKE",
        files={"train": ("train.json",), "validation": ("validate.json",), "test": ("test.json",)},
        examples=_slake,
        fields=({"q_lang"},),
        languages=("en", "zh"),
        split_of=_slake_split,
    ),
    DataSet(
        name="pathvqa",
        title="PathVQA",
        files={
            split: (f"{short}.jsonl", f"pvqa_{short}.json", f"lxmert/pvqa_{short}.json")
            for split, short in (("train", "train"), ("validation", "val"), ("test", "test"))
        },
        examples=_pathvqa,
        fields=({"sentf"}, {"id", "image", "question", "answer", "answer_type"}),
        split_of=_pathvqa_split,
        misprints={("validation", "images"): (832, "the paper's cell is wrong: the published files hold 832")},
    ),
    DataSet(
        name="llava_med_vqa",
        title="LLaVA-Med VQA",
        files={"train": ("train.json",), "validation": ("val.json", "validate.json"), "test": ("test.json",)},
        examples=_llava_med,
        fields=({"conversations", "answer_type"}, {"conversatons", "answer_type"}),
        repeats=True,
    ),
    DataSet(
        name="qa50",
        title="the chat benchmark",
        files={"test": ("llava_med_eval_qa50_qa.jsonl",)},
        examples=_qa50,
        domains=("chest_xray", "mri", "histology", "gross", "ct_scan"),
    ),
)
DATASETS = {dataset.name: dataset for dataset in _RECORDS}
"""The registry: a new data set is one more record."""
