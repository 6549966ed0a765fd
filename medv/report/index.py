"""The index page of a run: every table and figure of the paper and of our own, made or not, on one self-contained page.

Ours and the paper's numbers stand in separate blocks; the paper's come from `medv.paper` and nowhere else. The page needs no
network: pictures are embedded small and link to the full ones. It knows what `medv.reproduce` tells it, and runs nothing.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from PIL import Image

from medv import paper
from medv.artifacts import git_commit, machine, write_text
from medv.report.tables import to_html

THUMBNAIL = 720
WORDS = {"waiting": "not run", "stale": "out of date"}


class Standing(Protocol):
    """What the page needs to know of a notebook (see `medv.reproduce.Progress`)."""

    node: Any
    status: str
    note: str
    seconds: float | None


def write_index(out: Path, profile: str, seed: int, items: Sequence[Standing], exhibits: dict[str, str]) -> Path:
    """Write `index.html` into the run folder `out` and return its path.

    `items`: every notebook in order; `exhibits`: name and title of each table and figure of the paper.
    """
    made = {result: item for item in items for result in item.node.results}
    names = [*exhibits, *(result for result in made if result not in exhibits)]
    done = sum(name in made and made[name].status in ("done", "cached") for name in exhibits)
    facts = f"profile {profile} · seed {seed} · {machine()} · commit {(git_commit() or 'unknown')[:12]}"
    body = [
        f"<h1>medv: results of profile {_safe(profile)}</h1><p class='muted'>{_safe(facts)}</p>",
        f"<p>{done} of the paper's {len(exhibits)} tables and figures have a counterpart in this run. {_warning(profile)}</p>",
        "<h2>Notebooks</h2>" + _notebooks(out, profile, items),
        "<h2>Tables and figures</h2>" + _contents(out, names, made, exhibits, profile),
        *(_result(out, name, made[name], exhibits, profile) for name in names if name in made and _shown(out, name)),
    ]
    style = resources.files(__package__).joinpath("index.css").read_text(encoding="utf-8")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>medv: {_safe(profile)}</title>"
    page = (
        f"<!doctype html><html lang='en'><head>{head}<style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    )
    return write_text(out / "index.html", page)


def _safe(value: object) -> str:
    return html.escape(str(value))


def _warning(profile: str) -> str:
    if profile == "paper":
        return ""
    return f"Profile <code>{_safe(profile)}</code> uses small models: its numbers do not compare with the paper's."


def _shown(out: Path, name: str) -> bool:
    return (out / "figures" / f"{name}.json").exists()


def _status(item: Standing) -> str:
    return f"<span class='{_safe(item.status)}'>{_safe(WORDS.get(item.status, item.status))}</span>"


def _seconds(item: Standing) -> str:
    return "" if item.seconds is None else f"{item.seconds:.1f} s"


def _command(profile: str, name: str) -> str:
    return f"<code>medv reproduce --profile {_safe(profile)} --only {_safe(name)}</code>"


def _notebooks(out: Path, profile: str, items: Sequence[Standing]) -> str:
    rows = []
    for item in items:
        copy = f"notebooks/{item.node.notebook}"
        name = _safe(item.node.notebook)
        link = f"<a href='{_safe(copy)}'>{name}</a>" if (out / copy).exists() else name
        cells = (link, _safe(item.node.title), _status(item), _safe(item.note), _command(profile, item.node.name))
        rows.append(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td class='n'>{_seconds(item)}</td></tr>"
        )
    head = "<tr><th>notebook</th><th>what</th><th>status</th><th></th><th>command</th><th class='n'>time</th></tr>"
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _contents(
    out: Path, names: Sequence[str], made: dict[str, Standing], exhibits: dict[str, str], profile: str
) -> str:
    rows = []
    for name in names:
        item = made.get(name)
        label = f"<a href='#{_safe(name)}'>{_safe(name)}</a>" if _shown(out, name) else _safe(name)
        status = _status(item) if item else "<span class='planned'>not yet</span>"
        command = _command(profile, name) if item else ""
        title = exhibits.get(name) or f"our own ({item.node.title})"
        rows.append(f"<tr><td>{label}</td><td>{_safe(title)}</td><td>{status}</td><td>{command}</td></tr>")
    head = "<tr><th>name</th><th>what</th><th>status</th><th>command</th></tr>"
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _result(out: Path, name: str, item: Standing, exhibits: dict[str, str], profile: str) -> str:
    """One table or figure: what it is, the picture or the numbers, and the paper's numbers if it is a table of the paper."""
    stem = out / "figures" / name
    manifest = json.loads(stem.with_name(f"{name}.json").read_text(encoding="utf-8"))
    about = {"caption": exhibits.get(name, ""), "data": "", "counterpart": None} | manifest["about"]
    heading = f"{name} · beside {about['counterpart']} of the paper" if about["counterpart"] else name
    facts = " · ".join(
        filter(None, (_status(item), _seconds(item), f"profile {_safe(profile)}", f"seed {_safe(manifest['seed'])}"))
    )
    parts = [f"<h3>{_safe(heading)}</h3><p>{_safe(about['caption'])}</p><p class='muted'>{facts}</p>"]
    if name.startswith("table"):
        ours = pd.read_csv(stem.with_name(f"{name}.csv"))
        both = any(str(column).endswith("(paper)") for column in ours.columns)  # the notebook has put them side by side
        whose = "ours and the paper's" if both else "ours"
        block = f"<div><strong>{whose}</strong>{to_html(ours)}</div>{'' if both else _papers(name)}"
        parts.append(f"<div class='sides'>{block}</div>")
    else:
        alt = _safe(about["caption"] or name)
        parts.append(f"<a href='figures/{_safe(name)}.svg'><img alt='{alt}' src='{_thumbnail(stem)}'></a>")
    parts.append(
        f"<p class='muted'>{_safe(about['data'])}</p><p class='muted'>{_links(stem)} {_command(profile, name)}</p>"
    )
    return f"<article id='{_safe(name)}'>{''.join(parts)}</article>"


def _papers(name: str) -> str:
    if name not in paper.TABLES:
        return ""
    return f"<div class='paper'><strong>paper</strong>{to_html(paper.table(name), digits=3)}</div>"


def _links(stem: Path) -> str:
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg", ".csv", ".json")]
    return " ".join(f"<a href='figures/{_safe(f.name)}'>{f.suffix[1:]}</a>" for f in files if f.exists())


def _thumbnail(stem: Path) -> str:
    """The PNG, small enough to embed, as a data address."""
    with Image.open(stem.with_name(f"{stem.name}.png")) as picture:
        small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL, 2 * THUMBNAIL))
        stream = io.BytesIO()
        small.quantize(128).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
