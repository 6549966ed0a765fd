"""What every saved model folder gets when it is finished: a model card, and files that others may read.

A card is `README.md` with the hub's metadata, made of the folder's own files and of the numbers that `medv publish` brings. It
holds no time and no path, and no fingerprint reads it. Text from files is escaped. A card that somebody changed is kept.
"""

import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from medv.artifacts import CARD, PACKAGE, write_text
from medv.checkpoints.shards import read_object, stored_tensors
from medv.intervals import Estimate
from medv.ownership import RUN_FILE
from medv.profiles import PROFILES
from medv.reading import read_json, read_text, visible

ADAPTER_FILE, PROJECTOR_FILE, BASE_FILE = "adapter_config.json", "projector.safetensors", "base.json"
ASSEMBLED_FILE, ORIGIN_FILE = "assembled.json", "origin.json"
TRAINING_FILE, HISTORY_FILE = "training.json", "history.json"
NOTES = (TRAINING_FILE, HISTORY_FILE, RUN_FILE, ASSEMBLED_FILE, ORIGIN_FILE, BASE_FILE)
HUB_DATA = {"vqa_rad": "flaviagiammarino/vqa-rad", "slake": "BoKelvin/SLAKE", "pathvqa": "flaviagiammarino/path-vqa"}
"""Data sets of medv -> their ids on the hub."""
BUNDLED_LICENCE = "Apache-2.0"
BUNDLED_START = [
    {"model": f"medv's bundled {tower}, trained on synthetic data", "licence": BUNDLED_LICENCE}
    for tower in ("language tower", "vision tower")
]
NOT_RECORDED = "not recorded"
STAGES = {"align": "1, alignment", "instruct": "2, instruction tuning", "vqa": "3, visual question answering"}


def _lines(imports: str, **loaded: str) -> str:
    """The lines that load a folder by `from_pretrained`; loaded: the class of each variable."""
    return "\n".join([imports, "", *(f'{name} = {kind}.from_pretrained(".")' for name, kind in loaded.items())])


@dataclass(frozen=True)
class Kind:
    """A sort of model folder: what it is, the lines that load it, the hub's tags, task and library."""

    what: str
    load: str
    tags: tuple[str, ...] = ("masked-diffusion", "biomedical")
    task: str = "image-text-to-text"
    library: str = "transformers"


_PARTS = 'from medv.checkpoints.bundled import load_model\n\nmodel, processor = load_model(".")'
KINDS = {
    "model": Kind(
        "A masked-diffusion vision-language model (the network of LLaDA-MedV): vision tower, projector, bidirectional Llama.",
        _lines(
            "from medv import MedVForMaskedDiffusion, MedVProcessor", model="MedVForMaskedDiffusion", processor="MedVProcessor"
        ),
    ),
    "twin": Kind(
        "The autoregressive twin of a masked-diffusion vision-language model: the same network with causal attention.",
        _lines(
            "from medv import MedVProcessor\nfrom medv.model.twin import MedVForCausalLM",
            model="MedVForCausalLM",
            processor="MedVProcessor",
        ),
        ("autoregressive", "biomedical"),
    ),
    "projector": Kind(
        "The result of stage 1: a projector between a vision and a language tower, and the name of the model it belongs to.",
        _PARTS,
    ),
    "adapter": Kind(
        "LoRA adapters of a language tower, with the projector that was trained beside them.", _PARTS, library="peft"
    ),
    "language tower": Kind(
        "A language tower (Llama layout with LLaDA's special tokens), from which medv makes a vision-language model.",
        _lines("from transformers import AutoTokenizer, LlamaForCausalLM", model="LlamaForCausalLM", tokenizer="AutoTokenizer"),
        (),
        "text-generation",
    ),
    "vision tower": Kind(
        "A vision tower, from which medv makes a vision-language model.",
        _lines("from transformers import AutoModel", model="AutoModel"),
        (),
        "image-feature-extraction",
    ),
}
_TYPES = {"llada_medv": "model", "llada_medv_twin": "twin", "llama": "language tower"}


@dataclass(frozen=True)
class Measurement:
    """A measured mean: of which `system`, by which `metric`, on which `data`, its estimate, the figure that holds it, and
    whether the system is the model of the card (else a control).
    """

    system: str
    metric: str
    data: str
    estimate: Estimate
    source: str
    own: bool = True


@dataclass(frozen=True)
class Evidence:
    """What `medv publish` adds to a card. pictures: (name, caption) of each figure and table, `shown` of them as pictures.
    licence: an id of the hub, where the user names one.
    """

    measured: Sequence[Measurement] = ()
    pictures: Sequence[tuple[str, str]] = ()
    shown: Sequence[str] = ()
    licence: str | None = None


def finish_folder(folder: Path, **notes: Any) -> None:
    """`open_weights` of a folder, and write its card; `notes` as in `write_card`."""
    open_weights(folder)
    write_card(folder, **notes)


def open_weights(folder: Path) -> None:
    """Let others read the weights in `folder` as they may read any new file.

    safetensors writes to a temporary file of its own, which its owner alone may read, and renames it.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def write_card(folder: Path, evidence: Evidence | None = None, **notes: Any) -> bool:
    """Write the card of a model folder; False where a card of somebody else stands there, which is kept, or there is no model.

    evidence: of a folder that is published. notes: contents of files by their stem (`training`, `run`) that are not in the
    folder, or not yet.
    """
    path, kind = folder / CARD, kind_of(folder)
    if kind is None or (path.exists() and not is_own(read_text(path))):
        return False
    write_text(path, signed(card(folder, kind, evidence, notes)))
    return True


def kind_of(folder: Path) -> str | None:
    """The key in `KINDS` of what a folder holds; None where it holds no model that medv loads."""
    if (folder / ADAPTER_FILE).is_file():
        return "adapter"
    if (folder / PROJECTOR_FILE).is_file():
        return "projector"
    if not (folder / "config.json").is_file():
        return None
    found = str(read_object(folder / "config.json").get("model_type"))
    return _TYPES.get(found, "vision tower" if "text_config" not in read_object(folder / "config.json") else None)


def signed(text: str) -> str:
    """`text` with a last line by which `is_own` sees whether it was changed."""
    return f"{text.strip()}\n\n<!-- written by medv, {hashlib.sha256(text.strip().encode()).hexdigest()[:32]} -->\n"


def is_own(text: str) -> bool:
    """Whether medv wrote this card, and nobody changed it since."""
    return text == signed(text.rpartition("\n\n<!-- written by medv, ")[0])


def origin_of(folders: Sequence[Path | None]) -> dict[str, Any]:
    """Where training in these folders' weights began, for `training.json`: `start`, one record per pretrained part with its
    `model`, `hub` id and `licence` as far as they are known, and `before`, the stages since then.
    """
    start, before = [], []
    for folder in folders:
        if folder is None:
            continue
        inside = folder.resolve().is_relative_to(PACKAGE)
        if (file := folder / TRAINING_FILE).is_file():
            training = read_object(file)
            start += training.get("start", [{"model": NOT_RECORDED}])
            before += [*training.get("before", []), stage_row(training)]
        elif inside:
            name = f"medv's bundled {folder.name.replace('_', ' ')}, trained on synthetic data"
            start.append({"model": name, "licence": BUNDLED_LICENCE})
        elif (file := folder / ORIGIN_FILE).is_file():
            origin = read_object(file)
            start.append({name: origin[name] for name in ("model", "hub", "licence") if origin.get(name)})
        else:
            assembled = read_object(folder / ASSEMBLED_FILE) if (folder / ASSEMBLED_FILE).is_file() else {}
            start += assembled.get("start", [{"model": "weights that the user gave"}])
    return {"start": start, "before": before}


def stage_row(training: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a stage that its successors and its card repeat."""
    recipe = training.get("recipe", {})
    row = {name: training.get(name) for name in ("stage", "data", "steps", "seed", "lora")}
    return row | {name: recipe.get(name) for name in ("batch_size", "learning_rate", "normalization", "times", "trains")}


def card(folder: Path, kind: str, evidence: Evidence | None, notes: Mapping[str, Any]) -> str:
    """The text of a card."""
    notes = {Path(name).stem: read_json(folder / name) if (folder / name).is_file() else {} for name in NOTES} | notes
    run, sort, found = notes["run"], KINDS[kind], evidence or Evidence()
    training = {"stage": run.get("stage"), "profile": run.get("profile"), **notes["training"]}
    start = training.get("start") or notes["assembled"].get("start") or ([notes["origin"]] if notes["origin"] else [])
    start = start or (BUNDLED_START if notes["base"].get("model") == "bundled" else [])
    staged = "trains" in training.get("recipe", {})
    rows = [*training.get("before", []), *([stage_row(training)] if staged else [])]
    sets = [row["data"] or {} for row in rows]
    drawn = bool(sets) and all(one and one["drawn"] == one["examples"] for one in sets)
    known = {str(one.get("licence")) for one in start} == {BUNDLED_LICENCE}
    licence = found.licence or ("apache-2.0" if known else "other")
    own = [one for one in found.measured if one.own]
    stage = STAGES.get(training["stage"], training["stage"])
    title = f"medv {kind}" + (f" of stage {stage}" if stage else "")
    title += f", profile {training['profile']}" if training["profile"] else ""
    metadata = ModelCardData(
        library_name=sort.library,
        license=licence,
        license_name="see-the-card" if licence == "other" else None,
        language="en",
        pipeline_tag=sort.task,
        tags=["medv", "llada-medv", *sort.tags, *(["synthetic-data"] if drawn else [])],
        base_model=list(dict.fromkeys(one["hub"] for one in start if one.get("hub"))) or None,
        datasets=list(dict.fromkeys(HUB_DATA[one["name"]] for one in sets if one.get("name") in HUB_DATA)) or None,
        model_name=title if own else None,
        eval_results=[_result(one) for one in own] or None,
    )
    history = [row for row in notes["history"] if isinstance(row, dict)] if isinstance(notes["history"], list) else []
    losses = {name: row[name] for row in history for name in ("loss", "eval_loss") if name in row}
    profile = PROFILES.get(training["profile"])
    sizes = profile and (profile.answer if training["stage"] == "vqa" else profile.describe)
    loader = jinja2.PackageLoader(__package__, "")
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, finalize=escape, **options)
    environment.filters["plain"] = Plain
    return environment.get_template("card.md.jinja").render(
        metadata=metadata.to_yaml(),
        title=title,
        kind=kind,
        sort=sort,
        sizes=f"gen_length={sizes.gen_length}, block_length={sizes.block_length}, steps={sizes.steps}" if sizes else "",
        weights=sum(prod(tensor.shape) for file in folder.glob("*.safetensors") for tensor in stored_tensors(file).values()),
        start=[one.get("model") or NOT_RECORDED for one in start],
        rows=[_stage_cells(row) for row in rows],
        recipe={} if staged else training.get("recipe", {}),
        base=notes["base"],
        assembled=notes["assembled"],
        data=run.get("data") or {},
        drawn=drawn,
        losses=losses,
        licence=licence,
        published=evidence is not None,
        found=found,
    )


def _stage_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table of stages."""
    data, lora = row["data"], row["lora"]
    described = NOT_RECORDED
    if data:
        some = f"{data.get('name') or 'name ' + NOT_RECORDED}, {data['drawn']} of them drawn"
        described = f"{data['examples']} examples, {'drawn (phantoms)' if data['drawn'] == data['examples'] else some}"
    trained = ", ".join(row["trains"] or ()) + (f", LoRA of rank {lora['rank']}, alpha {lora['alpha']}" if lora else "")
    loss = f"{row['normalization']}, t {row['times']}"
    stage = STAGES.get(row["stage"], row["stage"] or NOT_RECORDED)
    return [stage, described, row["steps"], row["batch_size"], row["learning_rate"], loss, trained, row["seed"]]


class Plain(str):
    """Text of our own, which `escape` leaves as it is."""


def escape(value: Any) -> str:
    """`value` as one line of Markdown that shows its characters and nothing else: no markup, no HTML, no controls."""
    if isinstance(value, Plain):
        return value
    text = html.escape(visible(re.sub(r"\s+", " ", str(value))), quote=False)
    return re.sub(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)


def _result(one: Measurement) -> EvalResult:
    """A measured number for the `model-index` of the hub."""
    found = one.estimate
    seeds = f", mean over the models of {found.seeds} training seeds" if found.seeds > 1 else ""
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=re.sub(r"[^\w.-]+", "-", one.data).strip("-") or "data",
        dataset_name=one.data,
        metric_type=re.sub(r"\W+", "_", one.metric),
        metric_name=f"{one.metric} (%), 95 % interval {found.low:.1f} to {found.high:.1f}, n = {found.n}{seeds}",
        metric_value=round(found.value, 2),
    )
