"""One table or figure as the index page and the report show it: ours beside the paper's, what made it, or why it is missing.

Ours and the paper's stand in separate blocks; the paper's come from `medv.paper` and nowhere else. It reads the files of a run
folder and runs nothing.
"""

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from medv import paper
from medv.companion.figures.tables import to_html

NUMBERS = {"fig01": "table1", "fig04": "table3", "fig09": "table5", "fig11": "table5", "fig12": "table5"}
"""Figures of the paper whose values one of its tables prints."""

SIDES = """
.sides { display: flex; flex-wrap: wrap; gap: 1.5rem; } .sides > div { overflow-x: auto; }
.sides td:not(.n), .sides th:not(.n) { text-align: left !important; }
"""
"""The look of two blocks side by side where the page has no style of ours: a notebook."""


def safe(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def is_made(out: Path, name: str) -> bool:
    """Whether the run folder `out` holds this result."""
    return (out / "figures" / f"{name}.json").exists()


def manifest_of(out: Path, name: str) -> dict[str, Any]:
    """The manifest of a result as plain data, `about` filled up with what every result has."""
    manifest = json.loads((out / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    about = {"caption": "", "data": "", "counterpart": None, "gaps": [], "notebook": ""}
    return {"seed": None, "profile": {}} | manifest | {"about": about | manifest["about"]}


def seeds(manifest: Mapping[str, Any]) -> str:
    """The seeds behind a result, in words: that of the run, and those that the profile gives to what is repeated."""
    repeated = manifest["profile"].get("seeds") or ()
    more = f" (what is repeated: {', '.join(map(str, repeated))})" if len(repeated) > 1 else ""
    return f"seed {manifest['seed']}{more}"


def picture(out: Path, name: str, size: int) -> str:
    """The PNG of a result, at most `size` pixels wide and twice as high, as a data address."""
    with Image.open(out / "figures" / f"{name}.png") as source:
        small = source.convert("RGB")
        small.thumbnail((size, 2 * size))
        stream = io.BytesIO()
        small.quantize(128).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def beside(out: Path, name: str, *, folder: str = "figures", size: int = 720) -> str:
    """Ours (a table, or the picture) beside the paper's numbers, as HTML; `folder`: where links find the files."""
    if name.startswith("table"):
        ours = pd.read_csv(out / "figures" / f"{name}.csv")
        both = any(str(column).endswith("(paper)") for column in ours.columns)  # the notebook has put them side by side
        whose = "ours and the paper's" if both else "ours"
        return f"<div class='sides'><div><strong>{whose}</strong>{to_html(ours)}</div>{'' if both else papers(name)}</div>"
    alt = safe(manifest_of(out, name)["about"]["caption"] or name)
    image = f"<a href='{safe(folder)}/{safe(name)}.svg'><img alt='{alt}' src='{picture(out, name, size)}'></a>"
    return f"<div class='sides'><div>{image}</div>{papers(name)}</div>"


def numbers(out: Path, name: str, *, most: int = 100) -> str:
    """The numbers behind a picture, folded, as HTML; of long ones the first `most` rows, and how many there are."""
    frame = pd.read_csv(out / "figures" / f"{name}.csv")
    cut = f", the first {most}" if len(frame) > most else ""
    table = f"<div class='scroll'>{to_html(frame.head(most), digits=3)}</div>"
    return f"<details><summary>numbers: {len(frame)} rows{cut}</summary>{table}</details>"


def papers(name: str) -> str:
    """The paper's numbers for this table or figure as HTML, or a word that it prints none; nothing for results of our own."""
    source = NUMBERS.get(name, name)
    if source in paper.TABLES:
        told = "paper" if source == name else f"paper, {source.replace('table', 'Table ')}"
        return f"<div class='paper'><strong>{told}</strong>{to_html(paper.table(source), digits=3)}</div>"
    if name.startswith("fig"):
        return "<div class='paper'><strong>paper</strong><p>This figure shows answers; it prints no numbers.</p></div>"
    return ""


def gathered(out: Path, exhibits: Mapping[str, str], kind: str) -> str:
    """All of the paper's tables (`kind` "table") or figures ("fig"), each `beside` its counterpart or said to be absent, as
    HTML for a notebook that lies in a folder beside `figures`.
    """
    parts = [f"<style>{SIDES}</style>"]
    for name, title in exhibits.items():
        if name.startswith(kind):
            body = beside(out, name, folder="../figures") if is_made(out, name) else "<p><i>absent in this run</i></p>"
            parts.append(f"<h3>{safe(name)}: {safe(title)}</h3>{body}")
    return "".join(parts)


def overview(out: Path, exhibits: Mapping[str, str], makers: Mapping[str, Any]) -> pd.DataFrame:
    """What a run holds of the paper's tables and figures: name, what, here, notebook, seed, remark (why not, or what lacks).

    exhibits: titles by name. makers: the notebook nodes by result, as `medv.companion.reproduction.registry.makers` gives them.
    """
    rows = []
    for name, title in exhibits.items():
        node, here = makers.get(name), is_made(out, name)
        remark = "no notebook makes it yet" if node is None else f"{node.notebook} has not run here, or did not finish"
        manifest = manifest_of(out, name) if here else None
        if manifest:
            remark = "; ".join(manifest["about"]["gaps"])
        seed = manifest["seed"] if manifest else None
        rows.append((name, title, here, node.notebook if node else "", seed, remark))
    columns = ["name", "what", "here", "notebook", "seed", "remark"]
    return pd.DataFrame(rows, columns=columns).astype({"seed": "Int64"})
