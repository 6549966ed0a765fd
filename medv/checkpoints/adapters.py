"""Folders of LoRA adapters, and merging them into the model they were trained on.

A folder has the two files of peft, with the adapters of the language tower and the whole projector, and, where the model
has one, its `image_newline`, a bare parameter that peft does not save. Training is in `medv.training.lora`.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from medv.artifacts import relative
from medv.checkpoints.card import ADAPTER_FILE as CONFIG_FILE
from medv.checkpoints.loading import check_finite, check_floats, check_folder, loading_errors
from medv.checkpoints.shards import mismatches, read_object, shapes, stored_tensors
from medv.model.modeling import MedVForMaskedDiffusion

NEWLINE_FILE = "image_newline.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
# Settings that may differ from peft's defaults. The others change the computation, or name code to import.
_NOTES = ("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")
_SIZES = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora")


class AdaptedModel(PeftModel):
    """A peft model whose folders hold the image newline too; the newline is trained in place, so `disable_adapter` keeps it."""

    @property
    def newline(self) -> torch.nn.Parameter | None:
        """`image_newline` [D] of the model below, or None."""
        return self.get_base_model().model.image_newline

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """As in peft, plus the newline; the base model is noted relative to the folder, so that both can move together."""
        config, folder = self.peft_config[self.active_adapter], Path(save_directory)
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = relative(Path(base), folder)
        super().save_pretrained(str(folder), save_embedding_layers=False, **options)  # they are never trained here
        config.base_model_name_or_path = base
        if self.newline is not None:
            save_file({"model.image_newline": self.newline.detach().contiguous()}, folder / NEWLINE_FILE)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Nothing: peft's card would hold the path of the base; ours is written when the folder is finished."""

    def load_adapter(self, model_id: str | Path, *args, **options):
        """As in peft, plus the newline."""
        loaded = super().load_adapter(str(model_id), *args, **options)
        if self.newline is not None:
            self.newline.data.copy_(load_file(Path(model_id) / NEWLINE_FILE)["model.image_newline"])
        return loaded


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and not a whole model."""
    return (Path(folder) / CONFIG_FILE).exists()


def base_folder(folder: Path) -> Path:
    """The folder of the model that adapters were trained on.

    Raises ValueError if it was never saved, FileNotFoundError, naming the line to change, if it has moved.
    """
    file = Path(folder) / CONFIG_FILE
    base = read_object(file).get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise ValueError(f"{file} names the base {base!r}: give the folder of a model")
    if not base:
        raise ValueError(f"the base of the adapters in {folder} was never saved: use the merged model beside them")
    found = (Path(folder) / base).resolve()
    if not (is_adapter(found) or (found / "config.json").exists()):
        raise FileNotFoundError(
            f"the adapters in {folder} belong to the model in {base}, which is not there: "
            f"set base_model_name_or_path in {file} to the folder of that model"
        )
    return found


def with_adapters(base: MedVForMaskedDiffusion, folder: Path) -> MedVForMaskedDiffusion:
    """`base` with the adapters in `folder` merged into it, in place: a plain model.

    Raises ValueError for adapters of another kind than LoRA, and for missing, superfluous or non-finite weights.
    """
    check_folder(folder)
    file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}: adapters are read from safetensors alone, never from a pickle")
    tensors = stored_tensors(weights)
    check_floats(folder, base, tensors)
    settings, plain = read_object(file), LoraConfig().to_dict()
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file} is of adapters of the kind {settings.get('peft_type')!r}: medv knows LORA alone")
    if strange := [name for name in settings if name not in _NOTES + _SIZES and settings[name] != plain.get(name)]:
        raise ValueError(f"{file} sets {', '.join(strange)}, which medv's adapters do not have: merge them with peft")
    tied = {module.removesuffix(".weight") for pair in base.all_tied_weights_keys.items() for module in pair}
    if both := [name for name in tensors if any(f".{module}.lora_" in name for module in tied)]:
        raise ValueError(f"{file} adapts {both[0]}, of a weight that is embedding and head at once: adapt the layers alone")
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name]
    patterns = settings.get("rank_pattern") or {}
    asked = [settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if not ranks or any(not isinstance(rank, int) or not 1 <= rank <= max(ranks) for rank in asked):
        raise ValueError(f"{file} asks for the ranks {asked}, but {WEIGHTS_FILE} holds {sorted(set(ranks))}")
    with loading_errors(folder):
        network = AdaptedModel.from_pretrained(base, str(folder), local_files_only=True)
        expected = shapes(get_peft_model_state_dict(network, save_embedding_layers=False))
    if problem := mismatches(expected, shapes(tensors)):
        raise ValueError(f"the adapters in {folder} do not fit their model; {problem}")
    check_finite(folder, network)
    return network.merge_and_unload()
