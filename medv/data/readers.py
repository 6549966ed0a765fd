"""Readers of the published file formats: LLaVA-Med, VQA-RAD, SLAKE, PathVQA and the 193-question chat benchmark (Tables 1, 8).

Every reader yields `Example`s in file order and keeps what the row says beyond that in `meta`; `meta["image"]` is the image's
name in the data file and `Example.image` its path, or None where no image folder was given. Errors name the file, the row and
the mend. The readers do not open images, draw samples or tokenize.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medv.data.example import IMAGE_TOKEN, Example, Turn
from medv.data.images import ImageFolder
from medv.data.rows import Row, found, read_rows
from medv.reading import DataError

DATASETS = ("llava_med_align", "llava_med_instruct", "llava_med_vqa", "vqa_rad", "slake", "pathvqa", "qa50")
LANGUAGES = ("en", "zh", "all")
# The benchmark's domains; a question with two flags counts under the first of this order (8 of 193 have two).
QA50_DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")

_RAD_WHOLE = "VQA_RAD*[Pp]ublic*.json"
# Where each split is looked for, relative to the data set's folder; the first match is read.
FILES = {
    "llava_med_align": {"train": ("*align*.json", "alignment/*align*.json")},
    "llava_med_instruct": {"train": ("*instruct*.json", "instruct/*instruct*.json", "few_shot_examples.json")},
    "llava_med_vqa": {"train": ("train.json",), "validation": ("val.json", "validate.json"), "test": ("test.json",)},
    # The one file of the publication holds both splits, by the marks of its rows.
    "vqa_rad": {"train": ("trainset.json", _RAD_WHOLE), "test": ("testset.json", _RAD_WHOLE)},
    "slake": {"train": ("train.json",), "validation": ("validate.json",), "test": ("test.json",)},
    "pathvqa": {
        split: (f"{short}.jsonl", f"pvqa_{short}.json", f"lxmert/pvqa_{short}.json")
        for split, short in (("train", "train"), ("validation", "val"), ("test", "test"))
    },
    "qa50": {"test": ("llava_med_eval_qa50_qa.jsonl",)},
}
_TEST_MARK = "test_"
Folder = str | os.PathLike
_SPLIT_WORDS = {"val": "validation", "validate": "validation", "dev": "validation"}
_IMAGE_FOLDERS = ("images", "imgs")


def read_dataset(
    name: str,
    folder: str | Path,
    split: str = "train",
    *,
    images: Folder | None = None,
    language: str = "en",
    drop_duplicates: bool = False,
    roots: Sequence[Path] = (),
) -> list[Example]:
    """The examples of one split ("train", "validation", "test") of a published data set.

    `folder` is the data set's folder as downloaded, or one of its files. `images` is the folder that the image names are
    relative to; by default `images/` or `imgs/` in `folder` where there is one, else the examples have no image. `language`
    is for SLAKE ("en" as in the paper, "zh", "all"); `drop_duplicates` for PathVQA; `roots` are folders into which images may
    be links. Raises DataError.
    """
    name = same_name(name)
    if language != "en" and name != "slake":
        raise DataError(f"{name} has no language {language!r}: only slake is bilingual")
    if drop_duplicates and name != "pathvqa":
        raise DataError(f"drop_duplicates is for pathvqa, not for {name}")
    path = find_file(name, folder, split)
    root = root_of(folder, path)
    if images is None:
        images = next((root / place for place in _IMAGE_FOLDERS if (root / place).is_dir()), None)
    elif not Path(images).is_dir():
        raise DataError(f"the image folder {Path(images)} does not exist: leave it out to read the texts alone")
    if images is not None and roots:
        images = ImageFolder(Path(images), tuple(roots))
    if name == "slake":
        return read_slake(path, images=images, language=language)
    if name == "pathvqa":
        return read_pathvqa(path, images=images, drop_duplicates=drop_duplicates)
    if name == "vqa_rad":
        return read_vqa_rad(path, images=images, split=split)
    return {"qa50": read_qa50}.get(name, read_llava_med)(path, images=images)


def same_name(name: str) -> str:
    """The name of a data set as it is written here: vqa_rad for vqa-rad."""
    return name.replace("-", "_")


def root_of(folder: str | Path, path: Path) -> Path:
    """The folder of a data set that was named by it, or by its file `path`."""
    return Path(folder) if Path(folder).is_dir() else path.parent


def find_file(name: str, folder: str | Path, split: str) -> Path:
    """The file that holds one split of a data set; raises DataError naming what was looked for."""
    if name not in FILES:
        raise DataError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    split = _SPLIT_WORDS.get(split, split)
    if split not in FILES[name]:
        raise DataError(f"{name} has no split {split!r}: choose from {', '.join(FILES[name])}")
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    for pattern in FILES[name][split]:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataError(f"{folder} holds several files for {name}: give one of {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise DataError(f"{folder} has no {name} {split} file: expected {' or '.join(FILES[name][split])}")


def _answer_type(row: Row) -> str:
    value = row.text("answer_type").upper()
    if value not in ("OPEN", "CLOSED"):
        raise row.error(f"answer_type {value!r} must be OPEN or CLOSED")
    return value


def _question(row: Row, id_key: str, image: str, folder: Folder | None, **meta: Any) -> Example:
    """A question-answering example from the fields `question`, `answer`, `answer_type`."""
    answer = row.text("answer", empty=True, numbers=True)
    turns = (Turn("user", row.text("question")), Turn("assistant", answer))
    meta = {"image": image, "id_key": id_key, **meta}
    return Example(row.identity(id_key), row.image(folder, image), turns, _answer_type(row), meta)


def _extra(row: Row, *keys: str) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def read_vqa_rad(
    path: str | Path, *, images: Folder | None = None, frame_rows: bool = False, split: str | None = None
) -> list[Example]:
    """VQA-RAD (`trainset.json`, `testset.json`): by default the freeform and paraphrased questions, 1797 and 451.

    The one file of the publication marks its test rows "test_..." in `phrase_type`; of a file with such marks `split` ("train",
    "test"; None takes all) chooses the rows. `frame` rows re-word test questions (they hold the image and answer of 104 of
    the 179 open ones), so they are never to be trained on. Ten rows have tabs where commas were; the commas come back, but
    words split with them ("splee n") stay split.
    """
    examples = []
    for row in read_rows(path):
        row |= {key: _commas(value) for key, value in row.items() if isinstance(value, str)}
        phrase = row.text("phrase_type").lower()
        if phrase.removeprefix(_TEST_MARK) == "frame" and not frame_rows:
            continue
        extra = _extra(row, "image_organ", "question_type")
        examples.append(_question(row, "qid", row.text("image_name"), images, phrase_type=phrase, **extra))
    marked = [example.meta["phrase_type"].startswith(_TEST_MARK) for example in examples]
    if split is None or not any(marked):
        return examples
    kept = [example for example, mark in zip(examples, marked, strict=True) if mark == (split == "test")]
    if not kept:
        raise DataError(f"{path} marks every row as test in 'phrase_type': it has no {split} rows")
    return kept


def _commas(text: str) -> str:
    return ", ".join(part.strip() for part in text.strip().split("\t"))


def read_slake(
    path: str | Path, *, images: Folder | None = None, language: str = "en", keep_empty: bool = True
) -> list[Example]:
    """SLAKE: English as in the paper, Chinese ("zh") or both ("all"); raises DataError where no row is in that language.

    One training answer is empty (qid 1622); the paper's 4919 includes it, and `keep_empty=False` drops it.
    """
    if language not in LANGUAGES:
        raise DataError(f"unknown language {language!r}: choose from {', '.join(LANGUAGES)}")
    examples = []
    for row in read_rows(path):
        spoken = row.text("q_lang").lower()
        if language in ("all", spoken) and (keep_empty or row.text("answer", empty=True, numbers=True)):
            extra = _extra(row, "location", "modality", "base_type", "content_type", "triple")
            examples.append(_question(row, "qid", row.text("img_name"), images, language=spoken, **extra))
    if not examples:
        raise DataError(f"{path} has no question in the language {language!r} ('q_lang'): choose another language")
    return examples


def read_pathvqa(path: str | Path, *, images: Folder | None = None, drop_duplicates: bool = False) -> list[Example]:
    """PathVQA: one question a row (`test.jsonl`) or grouped by image (the lxmert files); both give the same examples.

    Of the grouped format, which has no answer types, the questions answered yes or no are closed, and no others; as in the
    official normalization neither case, nor spaces, nor a full stop count. 42 test rows repeat an earlier (image, question,
    answer); `drop_duplicates` leaves 6719 of 6761, like the widely used copy.
    """
    seen, examples = set(), []
    for row in read_rows(path):
        for part in _pathvqa_parts(row):
            example = _question(part, "id", part.text("image"), images)
            same = (example.meta["image"], example.question, example.answer)
            if not drop_duplicates or same not in seen:
                examples.append(example)
            seen.add(same)
    return examples


def _pathvqa_parts(row: Row) -> Iterator[Row]:
    if "sentf" not in row:
        yield row
        return
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
    for index, (question, answer) in enumerate(pairs):
        fields = {"id": first_id + index, "image": f"{split}/{row['img_id']}.jpg", "question": question}
        kind = "CLOSED" if answer.strip().rstrip(".").lower() in ("yes", "no") else "OPEN"
        yield row.with_fields({**fields, "answer": answer, "answer_type": kind})


def read_qa50(path: str | Path, *, images: Folder | None = None) -> list[Example]:
    """The 193-question biomedical chat benchmark, answered by GPT-4 from the caption; evaluation only, never train on it.

    `meta` has `type` (conversation or detailed_description), `domain`, and the caption and mentions that a judge is shown.
    """
    examples = []
    for row in read_rows(path):
        flags = row.get("domain")
        domain = next((d for d in QA50_DOMAINS if isinstance(flags, dict) and flags.get(d)), None)
        if domain is None:
            raise row.error(f"domain {found(flags)} flags none of {', '.join(QA50_DOMAINS)}")
        image = row.text("image")
        turns = (Turn("user", _without_image(row, row.text("text"))), Turn("assistant", row.text("gpt4_answer")))
        extra = _extra(row, "pair_id", "fig_caption", "fig_label", "in_text_mention")
        meta = {"image": image, "id_key": "question_id", "domain": domain, "type": row.text("type"), **extra}
        examples.append(Example(row.identity("question_id"), row.image(images, image), turns, None, meta))
    return examples


def read_llava_med(path: str | Path, *, images: Folder | None = None) -> list[Example]:
    """LLaVA-Med's dialogue files: alignment (stage 1), instruction (stage 2) and its VQA files (stage 3, with `answer_type`).

    The alignment questions are kept, though the paper's stage 1 trains on the image and the caption alone.
    """
    examples = []
    for row in read_rows(path):
        turns = _dialogue(row)
        kind = _answer_type(row) if "answer_type" in row else None
        name = row.text("image") if "image" in row else None
        if name is None and "pair_id" in row:
            name = f"{row.identity('pair_id')}.jpg"
        extra = _extra(row, "pair_id", "domain", "fig_caption", "in_text_mention", "question_type")
        meta = {**({"image": name} if name else {}), "id_key": "id", **extra}
        identity = row.identity("id", "question_id", "pair_id")
        examples.append(Example(identity, row.image(images, name) if name else None, turns, kind, meta))
    return examples


def _dialogue(row: Row) -> tuple[Turn, ...]:
    key = next((key for key in ("conversations", "conversatons") if key in row), None)
    spoken = row.get(key)
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
    return tuple(turns)


def _without_image(row: Row, text: str) -> str:
    """The text without the image placeholder that it begins or ends with."""
    bare = text.removeprefix(IMAGE_TOKEN) if text.startswith(IMAGE_TOKEN) else text.removesuffix(IMAGE_TOKEN)
    if IMAGE_TOKEN in bare:
        raise row.error(f"{IMAGE_TOKEN} stands more than once or amid the text: it must come first or last")
    return bare.strip()
