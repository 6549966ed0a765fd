"""The pages of the notebooks: as a run executed them, or their sources with the committed results in place.

A page says where its outputs come from; each cell that saves a result has a link to it, and an anchor, `cell-NAME`.
"""

import ast
import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medv.companion.figures.tables import to_html
from medv.companion.reproduction.exhibits import manifest_of, numbers_of
from medv.companion.studies.node import Node

FOLDED = {"parameters", "injected-parameters"}
"""Tags of the cells whose sources are folded."""
WIDGET = "application/vnd.jupyter.widget-view+json"
PRINTED = {"image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown"}
"""Kinds of an output that are shown without a kernel and are not its bare text."""


def page_of(source: Path, executed: bool, out: Path, node: Node) -> str:
    """A notebook as JSON for the site: parameters folded, outputs as a page can show them, links to its results in `out`.

    `executed`: whether `source` has outputs of a run; otherwise the results of `out` stand in after the cells that make them.
    """
    book = json.loads(source.read_text(encoding="utf-8"))
    here = [name for name in node.results if (out / "figures" / f"{name}.json").exists()]
    makers = _places(book["cells"], here)
    cells = []
    for number, cell in enumerate(book["cells"]):
        cell["source"] = "".join(cell["source"])
        made = [name for name, place in makers.items() if place == number]
        if made:
            targets = "".join(f"(cell-{name})=\n" for name in made)
            links = ", ".join(f"[{name}](../results/{name}.md)" for name in made)
            text = {"cell_type": "markdown", "source": f"{targets}Makes {links}:", "metadata": {}}
            cells.append(text | {"id": f"makes-{number}"})
        if cell["cell_type"] == "code":
            if FOLDED & set(tags := cell["metadata"].get("tags", [])):
                cell["metadata"]["tags"] = [*tags, "hide-input"]
                cell["source"] = re.sub(r'"(/[^"]+)"', lambda found: f'"{Path(found[1]).name}"', cell["source"])
            outputs = cell["outputs"] if executed else [_stand_in(out, name) for name in made]
            cell["outputs"] = [shown for output in outputs if (shown := _shown(output)) is not None]
        cells.append(cell)
    title, _, rest = cells[0]["source"].partition("\n")
    cells[0]["source"] = f"{title}\n\n{_head(node, executed, here)}\n{rest}"
    return json.dumps(book | {"cells": cells, "metadata": book["metadata"] | {"widgets": {}}})


def _places(cells: Sequence[dict[str, Any]], results: Sequence[str]) -> dict[str, int]:
    """The number of the cell that saves each result: the one that names it in `run.figure` or `run.table`, or names none
    there (a loop), or else the last.
    """
    found, nameless = {}, []
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        for call in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("run.figure", "run.table"):
                named = {part.value for part in ast.walk(call.args[1]) if isinstance(part, ast.Constant)} & set(results)
                found |= dict.fromkeys(named, number)
                nameless += [] if named else [number]
    last = max((number for number, cell in enumerate(cells) if cell["cell_type"] == "code"), default=0)
    return {name: found.get(name, (nameless or [last])[0]) for name in results}


def _head(node: Node, executed: bool, results: Sequence[str]) -> str:
    """What stands under the title: the source, the command, the results, and whether the outputs are stand-ins."""
    source = f"<a href='../sources/{node.notebook}'>{node.notebook}</a>"
    made = "".join(f" · <a href='../results/{name}.html'>{name}</a>" for name in results)
    head = f"<p>{source} · <code>medv reproduce --only {node.name}</code>{made}</p>"
    if not executed:
        head += "<p class='medv-stands'>Not executed for this page: committed results stand after the cells that make them.</p>"
    return f"<div class='medv-head'>{head}</div>\n"


def _stand_in(out: Path, name: str) -> dict[str, Any]:
    """A saved result as the output of a cell: the picture, or the numbers of a table with its caption."""
    about = manifest_of(out, name)["about"]
    caption = f"<p class='medv-caption'>{html.escape(about['caption'])} ({html.escape(about['data'])})</p>"
    if about.get("kind") == "table":
        data = {"text/html": f"<div class='scroll'>{unbroken(to_html(numbers_of(out, name)))}</div>{caption}"}
    else:
        picture = base64.b64encode((out / "figures" / f"{name}.png").read_bytes()).decode()
        alt = html.escape(about["caption"], quote=True)
        data = {"text/html": f"<img alt='{alt}' src='data:image/png;base64,{picture}'>{caption}"}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _shown(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output that needs no kernel: progress bars go, a widget is named, and links to figures find them on the site."""
    data = dict(output.get("data", {}))
    if WIDGET in data:
        del data[WIDGET]
        if not PRINTED & set(data):
            if output["output_type"] == "display_data":
                return None
            data = {"text/html": "<p class='medv-widget'>A widget, which needs a running kernel: <code>make lab</code>.</p>"}
    if "text/html" in data:
        data["text/html"] = "".join(data["text/html"]).replace("href='../figures/", "href='../results/figures/")
    return output | {"data": data} if data else output


def unbroken(page: str) -> str:
    """HTML whose intervals, "[1.0, 2.5]", are not broken over lines."""
    return re.sub(r"(\[[-+\d.]+,) ([-+\d.]+\])", r"\1&nbsp;\2", page)
