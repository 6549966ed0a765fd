"""What a result was made of, read off its examples and its model: no label follows from what a profile is called.

A drawn image is a phantom, whatever its data set is called. A result compares with the paper's only where real images were
shown to a model of the paper's size. It reads the configuration in a model's folder and nothing else.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medv.artifacts import PACKAGE
from medv.checkpoints.adapters import base_folder, is_adapter
from medv.checkpoints.shards import read_object
from medv.data.example import Example
from medv.profiles import PAPER, Profile

PHANTOMS = "synthetic phantoms"


def label(profile: Profile, examples: Iterable[Example] = (), model: Path | None = None, name: str = "") -> dict[str, Any]:
    """`data`, `comparable` and `gaps` of a result, as `Run.figure` takes them. Without examples it is of phantoms.

    name: of real data ("vqa_rad questions"). A gap says what stands in for that which the profile is made for.
    """
    examples = list(examples)
    drawn = not examples or any(callable(example.image) or "scene" in example.meta for example in examples)
    own = None if model is None else bundled_name(model)
    data = [PHANTOMS if drawn else f"real {name}".strip(), *([] if own is None else [own])]
    gaps = [f"{PHANTOMS} stand in for real images"] if drawn and not profile.synthetic else []
    gaps += [f"the {own} stands in for a model of this profile"] if own and profile.towers != "bundled" else []
    comparable = not drawn and model is not None and of_paper_size(model)
    return {"data": ", ".join(data), "comparable": comparable, "gaps": gaps}


def bundled_name(model: Path) -> str | None:
    """ "bundled tiny model" for a folder of the package's own weights, by its name; None for any other."""
    model = Path(model).resolve()
    return f"bundled {model.name.replace('_', ' ')}" if model.is_relative_to(PACKAGE.resolve()) else None


def of_paper_size(model: Path) -> bool:
    """Whether the language tower in a folder has the width and depth of LLaDA-8B; adapters are as large as their base."""
    model = Path(model)
    while is_adapter(model):
        model = base_folder(model)
    text = read_object(model / "config.json").get("text_config", {})
    return (text.get("hidden_size"), text.get("num_hidden_layers")) == (PAPER.model.hidden_size, PAPER.model.layers)
