"""Converting released weights to medv's and back, without changing any values (`medv convert`).

| source | result |
|---|---|
| LLaDA-8B (`model.transformer...`) | a language tower: a stock `LlamaForCausalLM` folder |
| LLaDA-V, LLaDA-MedV (`model.layers...`, `model.mm_projector...`) | a whole model: a `MedVForMaskedDiffusion` folder |
| a stage-1 `mm_projector.bin` | a projector folder, for `assemble(..., projector=...)` |
| SigLIP, SigLIP2 | a vision tower without its last layer, its head and the text tower |
| weights that PyTorch pickled (`pytorch_model*.bin`) | the same folder with its weights in safetensors, names unchanged |
| medv's own | any of the first three, by name: "llada8b", "lladav", "projector" |

The headers are checked before a byte is written; a target is made whole or not at all. A bfloat16 checkpoint stays one.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from medv import limits
from medv.artifacts import atomic_directory, write_json
from medv.checkpoints import released, shards
from medv.checkpoints.assembly import PREPARATION, new_processor
from medv.checkpoints.card import finish_folder, open_weights
from medv.checkpoints.loading import OFFLINE, check_depth, loading_errors, untied_shapes
from medv.checkpoints.released import lladav_to_medv, medv_to_lladav, read_config, to_medv
from medv.checkpoints.shards import PICKLED, PICKLED_INDEX, SHARD_BYTES, SINGLE, StoredTensor, mismatches, shapes
from medv.data.example import IMAGE_TOKEN
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.ownership import check_new
from medv.reading import check_regular

TARGETS = ("medv", "lladav", "llada8b", "projector")
PROJECTOR_FILE = "mm_projector.bin"
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".spm")  # settings and tokenizers, next to the weights
VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
Tensors = Mapping[str, StoredTensor]


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
    without its vision tower, and where the configuration of the tower cannot be read off its tensors; refused elsewhere.
    Raises FileNotFoundError and ValueError with one sentence that lists everything that does not fit; `target` is then
    untouched.
    """
    source, target = Path(source), Path(target)
    if to is not None:
        limits.named("layout", to, TARGETS)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder or file of weights")
    check_new(target, [source, vision])
    bare = source.is_dir() and not any(source.glob("*.safetensors*"))
    pickled = source.suffix in PICKLED or (bare and shards.pickles(source))
    tensors = {} if pickled else shards.stored_tensors(source)
    siglip = any(name.startswith("vision_model.") for name in tensors)
    if to is not None and (pickled or siglip):
        raise ValueError(f"--to {to} would have no effect: {source} is {'SigLIP' if siglip else 'pickled'}, so leave it out")
    if vision is not None and not (to in (None, "medv") and any(name.startswith("model.layers.") for name in tensors)):
        raise ValueError(
            f"--vision {vision} is for LLaDA-V's weights without their vision tower, and {source} is something else: convert "
            "both without it, and put them together with `medv assemble LANGUAGE VISION TARGET`"
        )
    if pickled:
        return _convert_projector(source, target) if source.suffix in PICKLED else _convert_pickles(source, pickled, target)
    processor = None
    if siglip:
        made = "vision tower"
        config, renamed = _siglip_tower(source, tensors)
        _check(source, SiglipVisionModel, config, renamed)
    else:
        layout = released.layout_of(tensors)
        made = to = to or ("lladav" if layout == "medv" else "medv")
        if to == "projector":
            return _export_projector(tensors, layout, target)
        if layout == to:
            other = "lladav" if layout == "medv" else "medv"
            raise ValueError(f"{source} has the names of {to} already: say what to make of it, for example --to {other}")
        settings, processor = read_config(source), _tokenizer(source)
        if layout == "medv":
            settings = _own_settings(source, settings)
        if to == "medv" and layout == "llada8b":
            made = "language tower"
            config, renamed = _language_part(source, settings, tensors, layout)
        elif to == "medv":
            made = "model"
            config, renamed = _whole_model(source, settings, tensors, vision, processor)
            if processor is not None:
                processor = new_processor(processor, config, system="medical")
                processor.official_prompts = True
        elif layout == "medv" and to == "lladav":
            config = released.released_config(settings, to, _vocabulary(source, tensors))
            _check(source, MedVForMaskedDiffusion, MedVConfig.from_dict(settings), tensors)
            renamed, _ = _renamed(tensors, medv_to_lladav)
        else:  # the language tower alone
            text, renamed = _language_part(source, settings, tensors, layout)
            config = released.released_config(settings, to, text.vocab_size)
            if to == "llada8b":
                renamed, _ = _renamed(renamed, released.lladav_to_llada8b)
    with atomic_directory(target) as folder:
        shards.copy_tensors(folder, renamed, shard_bytes=shard_bytes, quiet=quiet)
        write_json(folder / "config.json", config) if isinstance(config, dict) else config.save_pretrained(folder)
        if made == "vision tower" and (source / PREPARATION).is_file():
            shutil.copyfile(source / PREPARATION, folder / PREPARATION)
        if processor is not None:
            processor.save_pretrained(folder)
        if to not in ("lladav", "llada8b"):  # the layouts of the reference have cards of their own
            finish_folder(folder)
    return made


def _own_settings(source: Path, settings: Mapping) -> dict:
    """The configuration of a medv model with all of its fields; raises ValueError for one that is causal or has wrong types."""
    if (kind := settings.get("model_type")) != MedVConfig.model_type:
        raise ValueError(f"{source} holds a model of the type {kind!r}, which the layouts of the reference cannot hold")
    with loading_errors(source):
        return MedVConfig.from_dict(settings).to_dict()


def _check(source: Path, kind: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors, unknown=()) -> None:
    """Raises ValueError where `tensors` are not those of a network of this configuration; tied weights are stored once."""
    check_depth(f"the configuration of {source}", config.to_dict(), tensors)
    with torch.device("meta"):
        model = kind(config)
    if problem := mismatches(untied_shapes(model), shapes(tensors), unknown):
        raise ValueError(f"{source} does not fit its configuration; {problem}")
    config.architectures = [kind.__name__]


def _renamed(tensors: Tensors, rename: Callable[[str], str | None]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors under their new names, and the names that have no new one."""
    names = {old: rename(old) for old in tensors}
    return {new: tensors[old] for old, new in names.items() if new}, [old for old, new in names.items() if not new]


def _vocabulary(source: Path, tensors: Tensors) -> int:
    """The rows of the token table; `tensors` under the Llama names of a language tower, or medv's."""
    table = tensors.get("model.embed_tokens.weight") or tensors.get("model.language_model.embed_tokens.weight")
    if table is None:
        raise ValueError(f"{source} has no token table: it is not a whole checkpoint, a shard may be missing")
    return table.shape[0]


def _language_part(source: Path, settings: Mapping, tensors: Tensors, kind: str) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """The language tower in a checkpoint of any kind, checked: its configuration, its tensors by Llama names."""
    medv, unknown = _renamed(tensors, lambda name: to_medv(name, kind))
    kept = {name: tensor for name, tensor in medv.items() if name.startswith(("model.language_model.", "lm_head."))}
    renamed, _ = _renamed(kept, medv_to_lladav)
    config = released.language_config(settings, _vocabulary(source, renamed))
    _check(source, LlamaForCausalLM, config, renamed, unknown)
    return config, renamed


def _siglip_tower(source: Path, tensors: Tensors) -> tuple[SiglipVisionConfig, dict[str, StoredTensor]]:
    """The tower in a whole SigLIP without its last layer, head and text tower; a converted tower stays as it is."""
    config = released.vision_tower_config(read_config(source))
    if not any(name.startswith("vision_model.") for name in tensors):
        return config, dict(tensors)
    config.num_hidden_layers -= 1
    dropped = (f"encoder.layers.{config.num_hidden_layers}.", "head.")
    names = {name: name.removeprefix("vision_model.") for name in tensors if not name.startswith(("text_model.", "logit_"))}
    return config, {new: tensors[old] for old, new in names.items() if not new.startswith(dropped)}


def _whole_model(
    source: Path, settings: Mapping, tensors: Tensors, vision: Path | None, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[MedVConfig, dict[str, StoredTensor]]:
    """A LLaDA-V checkpoint, with the tower in the folder `vision` where it has none of its own."""
    renamed, unknown = _renamed(tensors, lladav_to_medv)
    if vision is not None and not any(name.startswith("model.vision_tower.") for name in renamed):
        _, tower = _siglip_tower(vision, shards.stored_tensors(vision))
        renamed |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()}
    tower_config = released.vision_config_of(renamed, None if vision is None else read_config(vision))
    config = released.medv_config(settings, tower_config, _vocabulary(source, renamed), tokenizer)
    _check(source, MedVForMaskedDiffusion, config, renamed, unknown)
    return config, renamed


def _unpickled(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of PyTorch, which may hold nothing else, each with memory of its own."""
    check_regular(source)
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that the file is not a plain dictionary of tensors
        raise ValueError(f"{source} is not a plain file of tensors and was not read: {str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{source} does not hold a dictionary of tensors")
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def _convert_pickles(source: Path, files: Sequence[Path], target: Path) -> str:
    """The same folder with its weights in safetensors, under the names that they have."""
    files, promised = shards.whole_set(source, files, PICKLED_INDEX)
    weights = shards.united(source, files, promised, _unpickled)
    with atomic_directory(target) as folder:
        for file in source.iterdir():
            if file.suffix in BESIDE and not file.name.endswith(".index.json"):
                check_regular(file)
                shutil.copyfile(file, folder / file.name)
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})
        open_weights(folder)
    return "safetensors"


def _convert_projector(source: Path, target: Path) -> str:
    """A stage-1 artifact of the reference."""
    named = {lladav_to_medv(name) or name: value for name, value in _unpickled(source).items()}
    expected = {f"model.projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    if problem := mismatches(dict.fromkeys(expected, ()), dict.fromkeys(named, ())):
        raise ValueError(f"{source} is not a projector; {problem}")
    with atomic_directory(target) as folder:
        short = {name.removeprefix("model.projector."): value for name, value in named.items()}
        save_file(short, folder / "projector.safetensors", metadata={"format": "pt"})
        finish_folder(folder)
    return "projector"


def _export_projector(tensors: Tensors, layout: str, target: Path) -> str:
    """The projector of a model, in the file that stage 1 of the reference writes."""
    names = {name: to_medv(name, layout) for name in tensors}
    wanted = {name: medv_to_lladav(new) for name, new in names.items() if new and new.startswith("model.projector.")}
    if not wanted:
        raise ValueError("the checkpoint has no projector: a language tower cannot give one")
    files = {tensors[name].file for name in wanted}
    weights = {wanted[name]: value for file in files for name, value in load_file(file).items() if name in wanted}
    with atomic_directory(target) as folder:
        torch.save(weights, folder / PROJECTOR_FILE)
    return "projector"


def _tokenizer(source: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint, with the image placeholder added where it lacks one; None where there is none.

    One in files of its own kind (vocab.json and merges.txt, tokenizer.model) is read by the class that the folder names.
    """
    if not (whole := (source / "tokenizer.json").is_file()) and not any((source / name).is_file() for name in VOCABULARIES):
        return None
    with loading_errors(source):
        tokenizer = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(source, **OFFLINE)
    tokenizer.init_kwargs.pop("auto_map", None)  # code of its own stays behind
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer
