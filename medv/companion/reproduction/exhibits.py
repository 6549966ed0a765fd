"""Tables and figures as the index page and the report show them: ours beside the paper's, or why one is missing.

Ours and the paper's are separate blocks; the paper's numbers come from `medv.paper` alone.
"""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from medv import paper
from medv.companion.figures.tables import to_html
from medv.companion.figures.templates import template
from medv.companion.studies.node import Node

NUMBERS = {"fig01": "table1", "fig04": "table3", "fig09": "table5", "fig11": "table5", "fig12": "table5"}
"""Figures of the paper whose values one of its tables prints."""


def is_made(out: Path, name: str) -> bool:
    """Whether the run folder `out` holds this result."""
    return (out / "figures" / f"{name}.json").exists()


def manifest_of(out: Path, name: str) -> dict[str, Any]:
    """The manifest of a result as plain data; keys of `about` that it lacks are empty."""
    manifest = json.loads((out / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    about = {"caption": "", "data": "", "counterpart": None, "gaps": [], "notebook": ""}
    return {"seed": None, "profile": {}} | manifest | {"about": about | manifest["about"]}


def numbers_of(out: Path, name: str) -> pd.DataFrame:
    """The CSV of a result."""
    return pd.read_csv(out / "figures" / f"{name}.csv")


def picture(out: Path, name: str, size: int) -> str:
    """The PNG of a result, at most `size` pixels wide and twice as high, as a data address."""
    with Image.open(out / "figures" / f"{name}.png") as source:
        small = source.convert("RGB")
    small.thumbnail((size, 2 * size))
    stream = io.BytesIO()
    small.quantize(128).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def beside(out: Path, name: str, *, folder: str = "figures", embed: bool = True) -> str:
    """Ours (a table, or the picture) beside the paper's numbers, as HTML; `folder`: where links find the files, and the page
    its pictures where it does not `embed` them.
    """
    source = NUMBERS.get(name, name)
    printed = to_html(paper.table(source), digits=3) if source in paper.TABLES else None
    shown = {
        "name": name,
        "folder": folder,
        "table": None,
        "joined": False,
        "paper": printed,
        "of": "" if source == name else source.replace("table", "Table "),
    }
    if name.startswith("table"):
        ours = numbers_of(out, name)
        joined = any(str(column).endswith("(paper)") for column in ours.columns)  # by the notebook
        shown |= {"table": to_html(ours), "joined": joined}
    else:
        shown |= {
            "picture": picture(out, name, 720) if embed else f"{folder}/{name}.png",
            "alt": manifest_of(out, name)["about"]["caption"] or name,
        }
    return template(__package__, "exhibits.html.jinja").module.beside(shown)


def gathered(out: Path, exhibits: Mapping[str, str], kind: str) -> str:
    """All of the paper's tables (`kind` "table") or figures ("fig"), each `beside` its counterpart or named as absent, as
    HTML for a notebook that lies in a folder beside `figures`.
    """
    chosen = {name: title for name, title in exhibits.items() if name.startswith(kind)}
    blocks = {name: beside(out, name, folder="../figures") if is_made(out, name) else None for name in chosen}
    return template(__package__, "exhibits.html.jinja").module.gathered(chosen, blocks)


def overview(out: Path, exhibits: Mapping[str, str], makers: Mapping[str, Node]) -> pd.DataFrame:
    """The paper's tables and figures in a run: name, what, here, notebook, seed, remark (why it or a part of it is missing).

    exhibits: titles by name. makers: the notebook nodes by result, by `medv.companion.reproduction.registry.makers`.
    """
    rows = []
    for name, title in exhibits.items():
        node, here = makers.get(name), is_made(out, name)
        if here:
            manifest = manifest_of(out, name)
            seed, remark = manifest["seed"], "; ".join(manifest["about"]["gaps"])
        else:
            seed = None
            remark = f"{node.notebook} has not run here, or did not finish" if node else "no notebook makes it yet"
        rows.append((name, title, here, node.notebook if node else "", seed, remark))
    return pd.DataFrame(rows, columns=["name", "what", "here", "notebook", "seed", "remark"]).astype({"seed": "Int64"})
