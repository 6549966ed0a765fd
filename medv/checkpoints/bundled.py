"""The weights in the package, and loading and saving whole models.

A folder holds a whole model (or an autoregressive twin), or the result of stage 1: a projector of a few megabytes and, in
`base.json`, the model it was trained on, from which the whole is put together.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from medv import limits
from medv.artifacts import atomic_directory, default_out, relative, write_json
from medv.checkpoints.adapters import base_folder, is_adapter, with_adapters
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.card import ASSEMBLED_FILE, BASE_FILE, PROJECTOR_FILE, finish_folder, origin_of
from medv.checkpoints.loading import load_network, load_processor, load_tokenizer, load_weights, loading_errors
from medv.checkpoints.shards import read_object
from medv.model.configuration import MedVConfig
from medv.model.devices import place
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.model.twin import MedVForCausalLM, MedVTwinConfig

BUNDLED = ("tokenizer", "language_tower", "vision_tower", "general_model", "tiny_model", "twin_tower")
NETWORKS = {MedVConfig.model_type: MedVForMaskedDiffusion, MedVTwinConfig.model_type: MedVForCausalLM}
"""model_type in config.json -> the class of the network."""


def bundled(part: str) -> Path:
    """The folder of a bundled part; raises ValueError for an unknown name, FileNotFoundError where it was not shipped."""
    limits.named("bundled part", part, BUNDLED)
    folder = Path(__file__).parent.parent / "weights" / part
    if not folder.is_dir():
        raise FileNotFoundError(f"the bundled {part} is missing from this installation: make it with `medv train pretrain`")
    return folder


def fetched_towers(profile: str, folder: Path) -> tuple[Path, Path]:
    """The language and vision towers that `medv towers` made in `folder`; raises FileNotFoundError, naming the command."""
    parts = folder / "language_tower", folder / "vision_tower"
    if not all((part / "config.json").is_file() for part in parts):
        raise FileNotFoundError(
            f"profile {profile} begins from pretrained towers, and {folder} does not hold them: bring them with "
            f"`medv towers {profile}" + ("`" if folder == default_out(profile) / "towers" else f" --out {folder}`")
        )
    return parts


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """A model (or an autoregressive twin) in evaluation mode and its processor from a folder; nothing is downloaded.

    It is placed on the device by `medv.model.devices.place` (None: the best there is). A folder of LoRA adapters gives the
    model they were trained on with the adapters merged into it. Raises FileNotFoundError where there is no model, or where
    the base of a projector is missing; ValueError for a model that is incomplete, not finite, not MedV's or that brings
    code of its own (see `medv.checkpoints.loading`).
    """
    model, processor = _load(Path(folder), (), dtype)
    model.name_or_path = str(folder)  # adapters trained on it belong to this folder, not to one that it was put together of
    return place(model, device), processor


def _load(folder: Path, above: tuple[Path, ...], dtype: torch.dtype) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """`load_model` on the CPU; `above` are the folders whose base this one is."""
    if folder.resolve() in above:
        raise ValueError(f"{above[0]} is put on a base that leads back to {folder}: name the folder of a whole model there")
    above = (*above, folder.resolve())
    if is_adapter(folder):
        model, processor = _load(base_folder(folder), above, dtype)
        return with_adapters(model, folder).eval(), processor
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    kind = read_object(folder / "config.json").get("model_type")
    if kind not in NETWORKS:
        raise ValueError(
            f"{folder} holds a model of the type {kind!r}, not MedV's: `medv convert` reads released weights, and `medv "
            "assemble` puts a language and a vision tower together to what stage 1 begins with"
        )
    processor = load_processor(MedVProcessor, folder)
    if not (folder / BASE_FILE).exists():
        model = load_network(NETWORKS[kind], folder, dtype=dtype)
    else:  # a projector and the name of its base
        name = read_object(folder / BASE_FILE).get("model")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'{folder / BASE_FILE} names no base: write {{"model": FOLDER}}, or "bundled" for our own towers')
        if name == "bundled":
            with loading_errors(folder):
                config = MedVConfig.from_pretrained(folder, local_files_only=True)
            sight = {"image_pool": config.image_pool, "feature_norm": config.feature_norm}
            towers = bundled("language_tower"), bundled("vision_tower")
            model = assemble(*towers, seed=0, projector=folder, **sight).to(dtype).eval()
        elif not (is_adapter(folder / name) or (folder / name / "config.json").exists()):
            raise FileNotFoundError(
                f"{folder} holds a projector trained on {folder / name}, where there is no model: put that folder back, "
                f"or name its place in {folder / BASE_FILE}"
            )
        else:
            model = _load(folder / name, above, dtype)[0].eval()
            load_weights(model.model.projector, folder / PROJECTOR_FILE)
    config = model.config
    rows = config.text_config.vocab_size
    ids = [config.image_token_id, config.mask_token_id, config.fill_token_id]
    ids += [*config.stop_token_ids, *config.suppress_token_ids]
    if len(processor.tokenizer) > rows or not all(0 <= token < rows for token in ids):
        raise ValueError(
            f"{folder} has {len(processor.tokenizer)} tokens and special tokens up to {max(ids)}, but only {rows} embeddings: "
            "the files do not belong together"
        )
    made, wanted = processor.view_plan, config.view_plan
    if (made.size, made.side) != (wanted.size, wanted.side):
        raise ValueError(
            f"{folder} has a processor for views of {made.size} pixels and {made.side} tokens a side, but a network for "
            f"{wanted.size} and {wanted.side}: the files do not belong together"
        )
    return model, processor


def save_projector(model: MedVForMaskedDiffusion, folder: Path, base: dict[str, str]) -> None:
    """Write the projector, the configuration of the whole and `base`: {"model": folder it was trained on}, or {"model":
    "bundled"} for the towers of the package. The folder is noted relative to `folder`, so both may move together.
    """
    if base["model"] != "bundled":
        base = {"model": relative(Path(base["model"]), folder)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.model.projector.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / PROJECTOR_FILE, metadata={"format": "pt"})
    model.config.architectures = ["MedVForMaskedDiffusion"]
    model.config.save_pretrained(folder)
    write_json(folder / BASE_FILE, base)


def save_assembled(
    language: Path, vision: Path, target: Path, *, projector: Path | None = None, system: str | None = None, **options
) -> dict[str, str]:
    """Write a model made of two towers (see `assemble`) to `target`; returns the content of its `assembled.json`."""
    model = assemble(language, vision, projector=projector, **options)
    note = {"language_tower": Path(language).name, "vision_tower": Path(vision).name}
    note["projector"] = "untrained" if projector is None else projector.name
    start = origin_of([Path(language), Path(vision)])["start"]
    with atomic_directory(target) as folder:
        model.save_pretrained(folder)
        new_processor(load_tokenizer(language), model.config, system=system).save_pretrained(folder)
        write_json(folder / ASSEMBLED_FILE, note | {"start": start})
        finish_folder(folder)
    return note


def untrained_projector(folder: Path) -> bool:
    """Whether a folder holds a model from `save_assembled` whose projector is untrained."""
    note = Path(folder) / ASSEMBLED_FILE
    return note.is_file() and read_object(note).get("projector") == "untrained"
