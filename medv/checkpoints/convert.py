"""Converting checkpoints: released weights to medv's, and back, without changing a bit of them (`medv convert`).

| what the source holds | what is made of it |
|---|---|
| LLaDA-8B (`model.transformer...`) | a language tower: a stock `LlamaForCausalLM` folder |
| LLaDA-V, LLaDA-MedV (`model.layers...`, `model.mm_projector...`) | a whole model: a `MedVForMaskedDiffusion` folder |
| a stage-1 `mm_projector.bin` | a projector folder, for `assemble(..., projector=...)` |
| SigLIP, SigLIP2 | a vision tower without its last layer, its head and the text tower |
| weights that PyTorch pickled (`pytorch_model*.bin`) | the same folder with its weights in safetensors, names unchanged |
| medv's own | any of the first three, by name: "llada8b", "lladav", "projector" |

Everything is checked by the headers before a byte is written; a target is made whole or not at all. What the configuration
of a source means is in `medv.checkpoints.released`. Numbers are never converted: a bfloat16 checkpoint stays one.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, SiglipVisionModel

from medv.artifacts import atomic_directory, write_json
from medv.checkpoints.assembly import new_processor
from medv.checkpoints.key_names import layout_of, lladav_to_llada8b, lladav_to_medv, medv_to_lladav, to_medv
from medv.checkpoints.loading import OFFLINE, in_words
from medv.checkpoints.released import (
    language_config,
    medv_config,
    read_config,
    released_config,
    vision_config_of,
    vision_tower_config,
)
from medv.checkpoints.shards import (
    PICKLED,
    SHARD_BYTES,
    SINGLE,
    StoredTensor,
    copy_tensors,
    mismatches,
    pickles,
    stored_tensors,
)
from medv.data.example import IMAGE_TOKEN
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.ownership import check_new
from medv.reading import check_regular

TARGETS = ("medv", "lladav", "llada8b", "projector")
PROJECTOR_FILE = "mm_projector.bin"


def convert(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    vision: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
) -> str:
    """Convert `source` to the folder `target`; returns what was made ("model", "language tower", "vision tower",
    "projector", "lladav", "llada8b", "safetensors").

    to: one of `TARGETS`; by default released weights become medv's. vision: a SigLIP folder, for a LLaDA-V checkpoint
    without its vision tower, and where the configuration of the tower cannot be told from its tensors; refused elsewhere.
    Raises FileNotFoundError and ValueError with one sentence that lists everything that does not fit; `target` is then
    untouched.
    """
    source, target = Path(source), Path(target)
    if to is not None and to not in TARGETS:
        raise ValueError(f"unknown layout {to!r}: use one of {', '.join(TARGETS)}")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder or file of weights")
    check_new(target, [source, vision])
    if vision is not None and not (to in (None, "medv") and _is_lladav(source)):
        raise ValueError(
            f"--vision {vision} is for LLaDA-V's weights without their vision tower, and {source} is something else: convert "
            "both without it, and put them together with `medv assemble LANGUAGE VISION TARGET`"
        )
    if source.suffix in PICKLED:
        return _convert_projector(source, target)
    if source.is_dir() and not list(source.glob("*.safetensors*")) and (files := pickles(source)):
        return _convert_pickles(source, files, target)
    tensors = stored_tensors(source)
    if any(name.startswith("vision_model.") for name in tensors):
        return _convert_vision(source, target, tensors, shard_bytes, quiet)
    layout = layout_of(tensors)
    if to is None:
        to = "lladav" if layout == "medv" else "medv"
    if to == "projector":
        return _export_projector(tensors, layout, target)
    if layout == to:
        other = "lladav" if layout == "medv" else "medv"
        raise ValueError(f"{source} has the names of {to} already: say what to make of it, for example --to {other}")
    if to != "medv":
        return _export(source, target, tensors, (layout, to), shard_bytes, quiet)
    if layout == "llada8b":
        return _convert_language(source, target, tensors, shard_bytes, quiet)
    return _convert_model(source, target, tensors, vision, shard_bytes, quiet)


def _is_lladav(source: Path) -> bool:
    if source.suffix in PICKLED or (source.is_dir() and not list(source.glob("*.safetensors*"))):
        return False
    return any(name.startswith("model.layers.") for name in stored_tensors(source))


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _expected(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this model must hold; tied weights are stored once."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _check(source: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], unknown=()):
    problem = mismatches(expected, found, unknown)
    if problem:
        raise ValueError(f"{source} does not fit its configuration; {problem}")


def _renamed(tensors: Mapping[str, StoredTensor], rename) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors under their new names, and the names for which there is none."""
    names = {old: rename(old) for old in tensors}
    return {new: tensors[old] for old, new in names.items() if new}, [old for old, new in names.items() if not new]


def _vocabulary(source: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """The rows of the token table; `tensors` under the Llama names of a language tower, or medv's."""
    table = tensors.get("model.embed_tokens.weight") or tensors.get("model.language_model.embed_tokens.weight")
    if table is None:
        raise ValueError(f"{source} has no token table: it is not a whole checkpoint, a shard may be missing")
    return table.shape[0]


def _language_part(source: Path, tensors, layout: str) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """The language tower in a checkpoint of any layout, whole and checked: its configuration, its tensors by Llama names."""
    settings = read_config(source)
    medv, unknown = _renamed(tensors, lambda name: to_medv(name, layout))
    kept = {name: tensor for name, tensor in medv.items() if name.startswith(("model.language_model.", "lm_head."))}
    renamed, _ = _renamed(kept, medv_to_lladav)
    config = language_config(settings.get("text_config", settings), _vocabulary(source, renamed))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _check(source, _expected(model), _shapes(renamed), unknown)
    return config, renamed


def _convert_language(source: Path, target: Path, tensors, shard_bytes: int, quiet: bool) -> str:
    config, renamed = _language_part(source, tensors, "llada8b")
    with atomic_directory(target) as folder:
        copy_tensors(folder, renamed, shard_bytes=shard_bytes, quiet=quiet)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        tokenizer = _tokenizer(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return "language tower"


def _convert_vision(source: Path, target: Path, tensors, shard_bytes: int, quiet: bool) -> str:
    config, layers = vision_tower_config(read_config(source))
    dropped = (f"vision_model.encoder.layers.{layers - 1}.", "vision_model.head.", "text_model.", "logit_")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    renamed, unknown = _renamed(kept, lambda name: name.removeprefix("vision_model.") if "vision_model." in name else None)
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    _check(source, _expected(model), _shapes(renamed), unknown)
    with atomic_directory(target) as folder:
        copy_tensors(folder, renamed, shard_bytes=shard_bytes, quiet=quiet)
        config.architectures = ["SiglipVisionModel"]
        config.save_pretrained(folder)
    return "vision tower"


def _convert_model(source: Path, target: Path, tensors, vision: Path | None, shard_bytes: int, quiet: bool) -> str:
    settings = read_config(source)
    renamed, unknown = _renamed(tensors, lladav_to_medv)
    if vision is not None and not any(name.startswith("model.vision_tower.") for name in renamed):
        renamed |= _vision_tensors(vision)
    tokenizer = _tokenizer(source)
    tower = vision_config_of(renamed, None if vision is None else read_config(vision))
    config = medv_config(settings, tower, _vocabulary(source, renamed), tokenizer)
    with torch.device("meta"):
        model = MedVForMaskedDiffusion(config)
    _check(source, _expected(model), _shapes(renamed), unknown)
    with atomic_directory(target) as folder:
        copy_tensors(folder, renamed, shard_bytes=shard_bytes, quiet=quiet)
        config.architectures = ["MedVForMaskedDiffusion"]
        config.save_pretrained(folder)
        if tokenizer is not None:
            processor = new_processor(tokenizer, config, system="medical")
            processor.official_prompts = True
            processor.save_pretrained(folder)
    return "model"


def _vision_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a vision tower (SigLIP's whole release or a converted one) under medv's names."""
    tensors = stored_tensors(folder)
    _, layers = vision_tower_config(read_config(folder))
    if not any(name.startswith("vision_model.") for name in tensors):  # a converted tower: nothing is left to drop
        return {f"model.vision_tower.{name}": tensor for name, tensor in tensors.items()}
    dropped = (f"vision_model.encoder.layers.{layers - 1}.", "vision_model.head.")
    return {
        "model.vision_tower." + name.removeprefix("vision_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_model.") and not name.startswith(dropped)
    }


def _export(source: Path, target: Path, tensors, layouts: tuple[str, str], shard_bytes: int, quiet: bool) -> str:
    """From medv's layout, or the Llama names of a language tower, to a released one; LLaDA-8B has no eyes."""
    layout, to = layouts
    settings = read_config(source)
    if layout == "medv" and to == "lladav":
        with torch.device("meta"):
            model = MedVForMaskedDiffusion(MedVConfig.from_dict(settings))
        _check(source, _expected(model), _shapes(tensors))
        vocabulary = _vocabulary(source, tensors)
        renamed, _ = _renamed(tensors, medv_to_lladav)
    else:
        config, part = _language_part(source, tensors, layout)
        vocabulary = config.vocab_size
        renamed = part if to == "lladav" else {lladav_to_llada8b(name): tensor for name, tensor in part.items()}
    with atomic_directory(target) as folder:
        copy_tensors(folder, renamed, shard_bytes=shard_bytes, quiet=quiet)
        write_json(folder / "config.json", released_config(settings, to, vocabulary))
        tokenizer = _tokenizer(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return to


def _unpickled(source: Path) -> dict[str, torch.Tensor]:
    """What a file of PyTorch holds, which may be tensors by name and nothing else."""
    check_regular(source)
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that the file is not a plain dictionary of tensors
        raise ValueError(f"{source} is not a plain file of tensors and was not read: {str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{source} does not hold a dictionary of tensors")
    return weights


def _convert_pickles(source: Path, files: Sequence[Path], target: Path) -> str:
    """The same folder with its weights in safetensors, under the names that they have."""
    weights = {name: value.clone() for file in files for name, value in _unpickled(file).items()}
    with atomic_directory(target) as folder:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
                check_regular(file)
                shutil.copyfile(file, folder / file.name)
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    return "safetensors"


def _convert_projector(source: Path, target: Path) -> str:
    """A stage-1 artifact: a pickle that may hold tensors and nothing else."""
    weights = _unpickled(source)
    named = {lladav_to_medv(name) or name: value.contiguous() for name, value in weights.items()}
    expected = {f"model.projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    problem = mismatches(dict.fromkeys(expected, ()), dict.fromkeys(named, ()))
    if problem:
        raise ValueError(f"{source} is not a projector; {problem}")
    with atomic_directory(target) as folder:
        short = {name.removeprefix("model.projector."): value for name, value in named.items()}
        save_file(short, folder / "projector.safetensors", metadata={"format": "pt"})
    return "projector"


def _export_projector(tensors: Mapping[str, StoredTensor], layout: str, target: Path) -> str:
    """The projector of a model, as stage 1 of the reference leaves it."""
    wanted = {name: to_medv(name, layout) for name in tensors}
    wanted = {name: new for name, new in wanted.items() if new and new.startswith("model.projector.")}
    if not wanted:
        raise ValueError("the checkpoint has no projector: a language tower cannot give one")
    files = {tensors[name].file for name in wanted}
    weights = {medv_to_lladav(wanted[k]): v for file in files for k, v in load_file(file).items() if k in wanted}
    with atomic_directory(target) as folder:
        torch.save(weights, folder / PROJECTOR_FILE)
    return "projector"


def _tokenizer(source: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint, with the image placeholder added where it lacks one; None where there is none."""
    if not (source / "tokenizer.json").is_file():
        return None
    with in_words(source):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **OFFLINE)
    tokenizer.init_kwargs.pop("auto_map", None)  # code of its own stays behind
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer
