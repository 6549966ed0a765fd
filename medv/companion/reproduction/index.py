"""The index page of a run: every table and figure of the paper and of our own, made or not, on one self-contained page.

A card for each, then each in full: ours beside the paper's, with status, seconds, profile, seeds, command and manifest. What is
missing is listed with the reason. The page needs no network and no other file: pictures are embedded small and link to the
full ones.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medv.artifacts import git_commit, machine, write_text
from medv.companion.figures.tables import to_html
from medv.companion.figures.templates import template
from medv.companion.reproduction.exhibits import beside, is_made, manifest_of, numbers_of, picture
from medv.companion.reproduction.reproduce import Progress
from medv.profiles import PAPER, get_profile

CARD = 260
"""Width in pixels of the picture on a card."""
ROWS = 100
"""Of the numbers behind a picture, at most so many rows are shown."""
WORDS = {"waiting": "not run", "stale": "out of date"}


def write_index(out: Path, profile: str, seed: int, items: Sequence[Progress], exhibits: dict[str, str]) -> Path:
    """Write `index.html` into the run folder `out` and return its path.

    `items`: every notebook in order; `exhibits`: name and title of each table and figure of the paper.
    """
    made = {result: item for item in items for result in item.node.results}
    papers = [facts_of(out, name, title, made.get(name)) for name, title in exhibits.items()]
    own = [facts_of(out, name, "", item) for name, item in made.items() if name not in exhibits]
    there = [result["item"].status in ("done", "cached") for result in papers if result["shown"]]
    page = template(__package__, "index.html.jinja").render(
        profile=profile,
        small=get_profile(profile).model != PAPER.model,
        facts=f"profile {profile} · seed {seed} · {machine()} · commit {(git_commit() or 'unknown')[:12]}",
        papers=papers,
        own=own,
        made=sum(there),
        older=there.count(False),
        notebooks=[(item, (out / "notebooks" / item.node.notebook).exists()) for item in items],
        words=WORDS,
        style="".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("index.css", "results.css")),
    )
    return write_text(out / "index.html", page.strip() + "\n")


def facts_of(out: Path, name: str, title: str, item: Progress | None, *, embed: bool = True) -> dict[str, Any]:
    """One table or figure for `results.html.jinja`; `shown`: whether it is in the folder and a notebook made it.

    `embed`: pictures are part of the page, not files beside it.
    """
    result = {"name": name, "title": title, "item": item, "shown": item is not None and is_made(out, name)}
    if not result["shown"]:
        return result
    manifest, sheet = manifest_of(out, name), name.startswith("table")
    about, seeds = manifest["about"], manifest["profile"].get("seeds") or ()
    profile = manifest["profile"].get("name", "tiny")
    seed = f" --seed {manifest['seed']}" if manifest["seed"] else ""
    if name in item.node.results:
        config = "" if manifest["profile"].get("synthetic", True) else " --config FILE"  # real data are named there
        command = f"medv reproduce --profile {profile}{config} --only {name}{seed}"
    else:  # by hand, with parameters of its own
        wanted = {"seed": manifest["seed"] or None, **manifest["parameters"]}
        given = " ".join(f"-p {key} {shlex.quote(str(value))}" for key, value in wanted.items() if value is not None)
        command = f"papermill notebooks/{item.node.notebook} OUT.ipynb -k python3 -p profile {profile} {given}"
    repeated = f" (what is repeated: {', '.join(map(str, seeds))})" if len(seeds) > 1 else ""
    result |= {
        "title": title or about["caption"],
        "manifest": json.dumps(manifest, indent=1),
        "about": about,
        "seeds": f"seed {manifest['seed']}{repeated}",
        "sheet": sheet,
        "numbers": None,
        "small": picture(out, name, 2 * CARD if sheet else CARD),
        "beside": beside(out, name, embed=embed),
        "profile": profile,
        "origin": f"commit {(manifest.get('commit') or 'unknown')[:12]}, {manifest.get('created', '')[:10]}",
        "command": command,
        "files": [kind for kind in ("png", "svg", "csv", "json") if (out / "figures" / f"{name}.{kind}").exists()],
    }
    if not sheet:
        frame = numbers_of(out, name)
        result |= {"rows": len(frame), "cut": len(frame) > ROWS, "numbers": to_html(frame.head(ROWS), digits=3)}
    return result
