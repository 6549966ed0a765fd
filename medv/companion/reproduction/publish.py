"""`medv publish`: a model folder as a folder for the Hugging Face hub.

It holds a whole model with its processor, the card with the measured numbers, a manifest, and the figures and tables that were
made with this model. These are recognized by their manifests: among the inputs is the fingerprint of the model, or they are of
the very notebook run that trained it. Optimizer states, checkpoints and run folders stay behind; no file names a place.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch

from medv.artifacts import CARD, MANIFEST, PACKAGE, Manifest, fingerprint, write_json
from medv.checkpoints.adapters import base_folder, is_adapter
from medv.checkpoints.bundled import load_model
from medv.checkpoints.card import HISTORY_FILE, TRAINING_FILE, Evidence, Measurement, finish_folder, is_own, kind_of
from medv.checkpoints.contents import PLACES, contents
from medv.checkpoints.shards import read_object
from medv.companion.reproduction.cache import SUFFIXES
from medv.intervals import Estimate
from medv.ownership import RUN_FILE, check_apart, claim_folder, reserve
from medv.profiles import PROFILES
from medv.reading import read_text

MADE_BY = "medv publish"
WHOLE = ("model", "twin", "projector", "adapter")
OWN = {"stage1": ("stage1", "after stage 1"), "stage2": ("stage2", "stage 2"), "stage3": ("vqa_controls", "after stage 3")}
"""The node that trains a model -> the result that holds its scores, and how it calls the model there."""
_FINDINGS = {"precision", "recall", "f1"}


def publish(folder: Path, to: Path, *, figures: Path | None = None, licence: str | None = None) -> dict[str, Any]:
    """Make the folder `to` of the model in `folder`, and say what it holds.

    figures: a folder of figures with their manifests; by default those of the run that `folder` lies in, else those of the
    source tree. A projector or LoRA adapters are put together with their base. A folder that holds this very model already is
    brought up to date; its card, and that of `folder`, is kept where somebody changed it. Raises ValueError and
    FileNotFoundError where there is no model or `to` is not ours.
    """
    kind = None if not folder.is_dir() else kind_of(folder)
    if kind not in WHOLE:
        found = f"holds a {kind}" if kind else "holds no model" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"{folder} {found}: give the folder of a model, such as runs/tiny/models/stage2"
            + ("; a tower becomes one by `medv assemble`" if kind else "")
        )
    if figures is not None and not figures.is_dir():
        raise FileNotFoundError(f"there is no folder of figures {figures}: leave --figures out, or give that of a run")
    check_apart(to, [figures])
    with reserve(to, MADE_BY, inputs=[folder]):
        model, processor = load_model(folder, dtype=stored_dtype(folder), device="cpu")
        made = manifest_of(folder)
        pictures = dict(_figures_of(folder, made, figures))
        with claim_folder(to, {"made_by": MADE_BY, "model": contents(model, processor)}, inputs=[folder]):
            for left in to.glob(".*.partial.*"):  # what a killed publication began: a folder, or a file of its card
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            with TemporaryDirectory(dir=to, prefix=".new.partial.") as scratch:
                _save(model, processor, folder, Path(scratch))
                for name, (place, _) in pictures.items():
                    Path(scratch, "figures").mkdir(exist_ok=True)
                    for suffix in SUFFIXES:
                        shutil.copyfile(place / f"{name}{suffix}", Path(scratch, "figures", f"{name}{suffix}"))
                _move(Path(scratch), to)
            kept = _card(folder, to, made, pictures, licence)
            _manifest(folder, kind, made, pictures).write(to)
    facts = {"model": kind if kind in ("model", "twin") else f"whole model, made of a folder of kind {kind}"}
    facts["bytes"] = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    facts["figures"] = ", ".join(sorted(pictures)) or "none was made with this model"
    return facts | {"card": "kept as somebody wrote it" if kept else "written"}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the weights of a model, or of the base below a part of one, are stored in."""
    if is_adapter(folder):
        folder = base_folder(folder)  # `load_model` follows longer chains, and finds circles
    found = (
        getattr(torch, str(read_object(folder / "config.json").get("dtype")), None)
        if (folder / "config.json").is_file()
        else None
    )
    return found if isinstance(found, torch.dtype) else torch.float32


def manifest_of(folder: Path) -> Manifest | None:
    """What a reproduction wrote of the model when it was made, in the folder or the one above (a seed's); None where there is
    none, or where the model was changed since.
    """
    for place in (folder, folder.resolve().parent):
        if (place / MANIFEST).is_file():
            made = Manifest.read(place)
            return made if made.about.get("contents") == fingerprint(place) else None
    return None


def _figures_of(folder: Path, made: Manifest | None, figures: Path | None) -> Iterator[tuple[str, tuple[Path, Manifest]]]:
    """The figures made with the model, by name, with their folder: of the first folder that has any."""
    above = [parent / "figures" for parent in folder.resolve().parents]
    tree = [PACKAGE.parent / "figures" / name for name in PROFILES if made and name == made.profile.get("name")]
    print_of_model = fingerprint(folder)
    for place in [*above, *tree] if figures is None else [figures]:
        found = []
        for file in sorted(place.glob("*.json")) if place.is_dir() else ():
            if not re.fullmatch(r"\w+", file.stem) or not all(file.with_suffix(suffix).is_file() for suffix in SUFFIXES):
                continue
            try:
                manifest = Manifest.read(file)
            except ValueError:  # somebody else's file
                continue
            if print_of_model in manifest.inputs.values() or (made is not None and same_work(made, manifest)):
                found.append((file.stem, (place, manifest)))
        if found:
            yield from found
            return


def same_work(made: Manifest, other: Manifest) -> bool:
    """Whether two results are of one run of one notebook, as far as manifests tell."""
    parts = ("profile", "seed", "parameters", "inputs", "code", "commit", "versions", "platform", "threads")
    return made.about.get("node") == other.about.get("node") and all(getattr(made, p) == getattr(other, p) for p in parts)


def measurements(made: Manifest | None, pictures: dict[str, tuple[Path, Manifest]]) -> list[Measurement]:
    """The scores of the model and of its controls, from the figure of the notebook that trained it."""
    name, own = OWN.get(str(made.about.get("node")), ("", "")) if made else ("", "")
    if name not in pictures:
        return []
    place, manifest = pictures[name]
    rows = []
    try:
        frame = pd.read_csv(place / f"{name}.csv").astype(dict.fromkeys(("value", "low", "high"), float))
        known = np.isfinite(frame[["value", "low", "high"]]).all(axis=1)  # what has no interval is no measured number
        for row in frame[known].to_dict("records"):
            metric = f"findings, {row['metric']}" if row["metric"] in _FINDINGS else str(row["metric"])
            data = str(row.get("test") or manifest.about.get("data", "")).partition(", profile")[0]
            estimate = Estimate(row["value"], row["low"], row["high"], int(row["n"]), int(row.get("seeds", 1)))
            rows.append(Measurement(str(row["system"]), metric, data, estimate, name, row["system"] == own))
    except (KeyError, ValueError) as error:  # pandas' ParserError is a ValueError
        raise ValueError(f"{place / name}.csv is no table of scores ({error}): make it again, or give --figures") from None
    return sorted(rows, key=lambda row: not row.own)


def _save(model: torch.nn.Module, processor: Any, folder: Path, scratch: Path) -> None:
    """Weights, configuration, processor, and what is recorded of the training."""
    model.save_pretrained(scratch)
    processor.save_pretrained(scratch)
    for file in scratch.glob("*config.json"):
        settings = read_object(file)
        if noted := (PLACES - {"transformers_version", "architectures", "dtype"}) & set(settings):
            write_json(file, {name: value for name, value in settings.items() if name not in noted})
    above = folder.resolve().parent if is_adapter(folder) else folder
    for name in (TRAINING_FILE, HISTORY_FILE):
        if (above / name).is_file():
            shutil.copyfile(above / name, scratch / name)
    for file in (file for file in folder.glob("LICENSE*") if file.is_file()):
        shutil.copyfile(file, scratch / file.name)


def _move(scratch: Path, to: Path) -> None:
    """Put every new file in its place, and remove what an earlier publication of the model had beside them."""
    before = Manifest.read(to).about.get("figures", ()) if (to / MANIFEST).is_file() else ()
    new = {file.relative_to(scratch) for file in scratch.rglob("*") if file.is_file()}
    for name in sorted(new):
        (to / name).parent.mkdir(exist_ok=True)
        (scratch / name).replace(to / name)
    ours = [file for file in to.glob("figures/*") if file.stem in before and file.suffix in SUFFIXES]
    ours += [*to.glob("model-?????-of-?????.safetensors"), to / "model.safetensors", to / "model.safetensors.index.json"]
    for file in ours:
        if file.is_file() and file.relative_to(to) not in new:
            file.unlink()


def _card(
    folder: Path, to: Path, made: Manifest | None, pictures: dict[str, tuple[Path, Manifest]], licence: str | None
) -> bool:
    """Write the card, unless somebody wrote one here or beside the model; whether one was kept."""
    theirs = folder / CARD
    if not (to / CARD).exists() and theirs.is_file() and not is_own(read_text(theirs)):
        shutil.copyfile(theirs, to / CARD)
    node = made.about.get("node") if made else None
    shown = [name for name, (_, manifest) in pictures.items() if made and manifest.about.get("node") == node]
    captions = [(name, manifest.about.get("caption") or name) for name, (_, manifest) in pictures.items()]
    evidence = Evidence(measurements(made, pictures), captions, shown, licence)
    try:
        finish_folder(to, evidence=evidence, **_notes(folder))
    except (AttributeError, KeyError, TypeError) as error:  # what the notes hold is of another kind
        files = f"{TRAINING_FILE}, {RUN_FILE} or {HISTORY_FILE}"
        raise ValueError(f"{files} of {folder} is not as medv writes it ({error!r}): restore or remove it") from error
    return not is_own(read_text(to / CARD))


def _notes(folder: Path) -> dict[str, Any]:
    above = folder.resolve().parent if is_adapter(folder) else folder
    files = {Path(name).stem: above / name for name in (TRAINING_FILE, RUN_FILE)}
    return {name: read_object(file) if file.is_file() else {} for name, file in files.items()}


def _manifest(folder: Path, kind: str, made: Manifest | None, pictures: Sequence[str]) -> Manifest:
    """The manifest of the published folder; that of the model, where there is one, is in it."""
    about = {"kind": kind, "figures": sorted(pictures), "run": _notes(folder)["run"]}
    about["model"] = (
        json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if made and (folder / MANIFEST).is_file() else None
    )
    known = {"profile": made.profile, "seed": made.seed, "parameters": made.parameters} if made else {}
    return Manifest(name=MADE_BY, inputs={"model": fingerprint(folder)}, about=about, **known)
