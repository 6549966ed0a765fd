"""The index page of a run: every table and figure of the paper and of our own, made or not, on one self-contained page.

A card for each, then each in full: ours beside the paper's, with status, seconds, profile, seeds, the command that makes it
again and its manifest. What is missing stands there with its reason. The page needs no network and no other file: pictures
are embedded small and link to the full ones. It knows what `medv.companion.reproduction.reproduce` tells it, and runs nothing.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from medv.artifacts import git_commit, machine, write_text
from medv.companion.reproduction.exhibits import beside, is_made, manifest_of, numbers, picture, safe, seeds

CARD = 260
"""Width in pixels of the picture on a card."""
WORDS = {"waiting": "not run", "stale": "out of date"}


class Standing(Protocol):
    """What the page needs to know of a notebook (see `medv.companion.reproduction.reproduce.Progress`)."""

    node: Any
    status: str
    note: str
    seconds: float | None


def write_index(out: Path, profile: str, seed: int, items: Sequence[Standing], exhibits: dict[str, str]) -> Path:
    """Write `index.html` into the run folder `out` and return its path.

    `items`: every notebook in order; `exhibits`: name and title of each table and figure of the paper.
    """
    page = _Page(out, profile, {result: item for item in items for result in item.node.results}, exhibits)
    own = [result for result in page.made if result not in exhibits]
    standing = [page.made[name].status for name in exhibits if name in page.made and is_made(out, name)]
    done = sum(status in ("done", "cached") for status in standing)
    older = f", {len(standing) - done} more one from an earlier state" if len(standing) > done else ""
    tally = f"{done} of the paper's {len(exhibits)} tables and figures have a counterpart in this run{older}."
    facts = f"profile {profile} · seed {seed} · {machine()} · commit {(git_commit() or 'unknown')[:12]}"
    body = [
        f"<h1>medv: results of profile {safe(profile)}</h1><p class='muted'>{safe(facts)}</p>",
        f"<p>{tally} {_warning(profile)}</p>",
        f"<h2>The paper's tables and figures</h2><div class='cards'>{''.join(map(page.card, exhibits))}</div>",
        f"<h2>Our own</h2><div class='cards'>{''.join(map(page.card, own))}</div>" if own else "",
        "<h2>Notebooks</h2>" + page.notebooks(items),
        "<h2>Each in full</h2>",
        *(page.result(name) for name in (*exhibits, *own) if name in page.made and is_made(out, name)),
    ]
    style = resources.files(__package__).joinpath("index.css").read_text(encoding="utf-8")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>medv: {safe(profile)}</title>"
    text = f"<!doctype html><html lang='en'><head>{head}<style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    return write_text(out / "index.html", text)


def _warning(profile: str) -> str:
    if profile == "paper":
        return ""
    return f"Profile <code>{safe(profile)}</code> uses small models: its numbers do not compare with the paper's."


def _status(item: Standing) -> str:
    return f"<span class='{safe(item.status)}'>{safe(WORDS.get(item.status, item.status))}</span>"


def _seconds(item: Standing) -> str:
    return "" if item.seconds is None else f"{item.seconds:.1f} s"


class _Page:
    """The parts of one page. made: the notebook's standing by the result that it makes."""

    def __init__(self, out: Path, profile: str, made: dict[str, Standing], exhibits: dict[str, str]):
        self.out, self.profile, self.made, self.exhibits = out, profile, made, exhibits

    def title(self, name: str) -> str:
        return self.exhibits.get(name) or (manifest_of(self.out, name)["about"]["caption"] if self.shown(name) else "")

    def shown(self, name: str) -> bool:
        return is_made(self.out, name)

    def command(self, name: str) -> str:
        return f"<code>medv reproduce --profile {safe(self.profile)} --only {safe(name)}</code>"

    def card(self, name: str) -> str:
        """A small picture with name, title and standing; for what is missing, why."""
        label, item = f"<b>{safe(name)}</b>", self.made.get(name)
        if item is None:
            return self._hole(name, label, "not yet", "no notebook makes it yet")
        if not self.shown(name):
            why = item.note or f"{item.node.notebook} has not run here"
            return self._hole(name, label, WORDS.get(item.status, item.status), why)
        gaps = manifest_of(self.out, name)["about"]["gaps"]
        missing = f"<span class='waiting'>in part: {safe('; '.join(gaps))}</span>" if gaps else ""
        shape = " class='sheet'" if name.startswith("table") else ""
        image = f"<img{shape} alt='' loading='lazy' src='{picture(self.out, name, 2 * CARD if shape else CARD)}'>"
        told = f"<span>{label} {_status(item)}</span><span class='muted'>{safe(self.title(name))}</span>{missing}"
        return f"<a class='card' href='#{safe(name)}'><span class='frame'>{image}</span>{told}</a>"

    def _hole(self, name: str, label: str, status: str, why: str) -> str:
        told = f"<span>{label} <span class='planned'>{safe(status)}</span></span>"
        title = f"<span class='muted'>{safe(self.exhibits.get(name, ''))}</span>"
        return f"<div class='card hole'><span class='frame'><span class='muted'>{safe(why)}</span></span>{told}{title}</div>"

    def notebooks(self, items: Sequence[Standing]) -> str:
        """Every notebook: what it is for, where it stands, how to run it, how long it took."""
        rows = []
        for item in items:
            copy, name = f"notebooks/{item.node.notebook}", safe(item.node.notebook)
            link = f"<a href='{safe(copy)}'>{name}</a>" if (self.out / copy).exists() else name
            told = _status(item) + (f"<br><span class='muted'>{safe(item.note)}</span>" if item.note else "")
            cells = (link, safe(item.node.title), told, self.command(item.node.name))
            row = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr>{row}<td class='n'>{_seconds(item)}</td></tr>")
        head = "<tr><th>notebook</th><th>what</th><th>status</th><th>command</th><th class='n'>time</th></tr>"
        return f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"

    def result(self, name: str) -> str:
        """One table or figure in full."""
        item, manifest = self.made[name], manifest_of(self.out, name)
        about = manifest["about"]
        heading = f"{name} · beside {about['counterpart']} of the paper" if about["counterpart"] else name
        time = f"notebook {_seconds(item)}" if item.seconds else ""
        facts = (_status(item), time, f"profile {safe(self.profile)}", safe(seeds(manifest)))
        gaps = "".join(f"<p class='waiting'>Missing: {safe(gap)}</p>" for gap in about["gaps"])
        return (
            f"<article id='{safe(name)}'><h3>{safe(heading)}</h3>"
            f"<p>{safe(about['caption'] or self.exhibits.get(name, ''))}</p>"
            f"<p class='muted'>{' · '.join(filter(None, facts))} · {self.command(name)}</p>{gaps}"
            f"{beside(self.out, name)}<p class='muted'>{safe(about['data'])}</p><p class='muted'>{self._links(name)}</p>"
            f"{'' if name.startswith('table') else numbers(self.out, name)}"
            f"<details><summary>manifest</summary><pre>{safe(json.dumps(manifest, indent=1))}</pre></details></article>"
        )

    def _links(self, name: str) -> str:
        files = [self.out / "figures" / f"{name}.{suffix}" for suffix in ("png", "svg", "csv", "json")]
        return " ".join(f"<a href='figures/{safe(f.name)}'>{f.suffix[1:]}</a>" for f in files if f.exists())
