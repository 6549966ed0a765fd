"""`medv config check`: what a run can make of a configuration file, and what it costs, before it begins.

Exhibits come from the registry, counts from Table 8 (`medv data check`), memory, disk and hours from `medv plan`. No weights
are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medv.checkpoints.assembly import shape_config
from medv.companion.audit.check import check_dataset
from medv.companion.reproduction.materials import DATA, Materials
from medv.companion.reproduction.registry import EXHIBITS, nodes_for, ordered, parents
from medv.data.chat import SpecialTokens
from medv.evaluation.judge_client import KEYS, key_from_environment
from medv.profiles import STAGES, Profile
from medv.reading import visible
from medv.training.costs import PEAK_TFLOPS, peak_flops, plan_stage
from medv.training.stages import ZERO_STAGES


def examine(profile: Profile, file: Path, *, card: str = "A100") -> dict[str, Any]:
    """JSON-able: `exhibits` (name -> "" or why it cannot be made), `data` (name -> counts or what is wrong), `stages` (memory a
    GPU, disk and hours of each training), `notes`, and `complete`: whether every exhibit can be made.
    """
    if peak_flops(card) is None:  # no fault of the file
        raise ValueError(f"the peak of a card {card!r} is not known: use one of {', '.join(PEAK_TFLOPS)}")
    materials = Materials.read(file)
    profile = materials.of(profile)
    nodes, stages, reasons = nodes_for(profile), _costs(profile, materials, card), {}
    refused = {
        f"stage{1 + STAGES.index(name.split()[0])}": plan["said"] for name, plan in stages.items() if "hours" not in plan
    }
    for node in ordered(nodes):
        own = materials.missing(node, profile)
        before = [parent.name for parent in parents(node, nodes) if reasons[parent.name]]
        own += [refused[node.name]] if node.name in refused else []
        reasons[node.name] = "; ".join(own) or (f"needs {before[0]}: {reasons[before[0]]}" if before else "")
    exhibits = {name: reasons[node.name] for node in nodes for name in node.results if name in EXHIBITS}
    notes = [] if materials.judge is not None else ["no [judge]: the answers of Tables 1, 3, 4 and 5 have no scores"]
    if materials.judge is not None and not key_from_environment():
        notes += [f"no key for the judge: none of {', '.join(KEYS)} is set"]
    notes += [] if materials.baselines else ["no [baselines]: Tables 1 and 3 have no rows of other models"]
    return {
        "exhibits": {name: exhibits.get(name, "no notebook makes it") for name in EXHIBITS},
        "data": {name: _counts(name, path) for name, path in materials.data.items()},
        "stages": stages,
        "notes": notes,
        "complete": not any(exhibits.values()),
    }


def _counts(name: str, path: Path) -> str:
    """The counts that differ from the paper's and the missing images, or the sentence of an error."""
    try:
        found = check_dataset(DATA[name], path)
    except (ValueError, OSError) as error:
        return str(error)
    wrong = [f"{c.split} {c.quantity} {c.counted}, the paper {c.paper}" for c in found.counts if c.verdict == "mismatch"]
    wrong += [problem for problem in found.problems if "missing" in problem or "no image folder" in problem]
    counted = ", ".join(
        f"{c.split} {c.quantity} {c.counted}" for c in found.counts if c.quantity in ("images", "qa_pairs", "overall")
    )
    compared = any(c.verdict == "match" for c in found.counts)
    return "; ".join(wrong) or (f"{counted}: as in the paper" if compared else f"{counted}: nothing to compare with")


def _costs(profile: Profile, materials: Materials, card: str) -> dict[str, Mapping[str, Any]]:
    """The plan of each training that the file does not spare, in sentences and as data."""
    machine, found = materials.machine, {}
    cut = {"gpus": machine.processes, "zero": ZERO_STAGES[machine.deepspeed], "accumulation": machine.accumulation}
    config = shape_config(profile.model, SpecialTokens(*range(7)))
    for number, stage in enumerate(STAGES, start=1):
        for name in [] if f"stage{number}" in materials.weights else materials.vqa_sets() or [""] if stage == "vqa" else [""]:
            views = 5 if profile.towers == "given" else 1  # the released models cut an image into four tiles and a base
            try:
                plan = plan_stage(config, profile.recipe(stage, name), **cut, card=card, views=views)
                said = {"said": f"{plan.memory_sentence()}; {plan.cost_sentence()}", **plan.to_dict()}
            except ValueError as error:
                said = {"said": str(error)}
            found[f"{stage} {name}".strip()] = said
    return found


def render(found: Mapping[str, Any], console: Console) -> None:
    """Print the result of `examine`."""
    table = Table("exhibit", "can be made", box=None, pad_edge=False)
    for name, reason in found["exhibits"].items():
        table.add_row(name, Text(visible(reason) or "yes", style="red" if reason else ""))
    console.print(table)
    lines = [f"{name}: {said}" for name, said in found["data"].items()]
    lines += [f"{name}: {plan['said']}" for name, plan in found["stages"].items()]
    for line in [*lines, *found["notes"]]:
        console.print(Text(visible(line)), soft_wrap=True)
