"""Folders as they were, question files, and checkpoints with a part that is wrong."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

FLAGS = {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False}


def tree(folder: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def edit(file, **changes):
    """Change fields of a JSON file; "a__b" is the field b of the object a."""
    settings = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        place = settings
        for step in path:
            place = place[step]
        place[last] = value
    file.write_text(json.dumps(settings))


def change(folder, how, name="model.safetensors"):
    """Write the tensors of a file again as `how` returns them."""
    save_file(how(load_file(folder / name)), folder / name, metadata={"format": "pt"})


def spoiled(value, name="projector.linear_1.weight"):
    def how(tensors):
        for key, tensor in tensors.items():
            if name in key:
                tensor.view(-1)[3] = value
        return tensors

    return how


def half(tensors):
    return dict(sorted(tensors.items())[::2])


def as_type(dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def resized(tensors):
    name = "model.projector.linear_1.weight"
    return tensors | {name: tensors[name].T.contiguous()}


def files(folder, names):
    """A question file and an answer file; the question's text is its name, which the stub goes by."""
    about = {"fig_label": "Fig. 1", "fig_caption": "A lung.", "in_text_mention": None, "domain": FLAGS}
    questions = [
        {"question_id": n, "text": f"{name}\n<image>", "gpt4_answer": "yes", "type": "conversation", **about}
        for n, name in enumerate(names)
    ]
    answers = [{"question_id": n, "text": f"the answer to {name}"} for n, name in enumerate(names)]
    paths = folder / "q.jsonl", folder / "a.jsonl"
    for path, rows in zip(paths, (questions, answers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths
