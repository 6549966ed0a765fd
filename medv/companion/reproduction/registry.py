"""Which notebook makes which artifact, figure and table, and from what: the graph that `medv reproduce` walks.

One `Node` per notebook; an edge runs from the maker of an artifact to whoever needs it. `EXHIBITS` lists every table and
figure of the paper, so that what is not reproduced yet is seen to be missing. This module knows names only: it opens no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from medv.profiles import Profile


@dataclass(frozen=True)
class Node:
    """One notebook of the reproduction.

    `needs` and `makes` name artifacts (folders or files under the run folder, as "models/stage1"); `results` names the
    figures and tables that it saves. `parameters` are passed to the notebook beside profile, seed and out. A `heavy` node
    trains or generates for long: unless the profile lets them share the machine, nothing else runs at the same time. Beside an
    `alone` node, which compares speeds, nothing runs in any profile. A `last` node reads the results that there are: it runs
    after all others, however they ended.
    """

    name: str
    notebook: str
    title: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    heavy: bool = False
    alone: bool = False
    last: bool = False


NODES: tuple[Node, ...] = (
    Node("quickstart", "00_quickstart.ipynb", "Ask a question about an image", results=("quickstart",)),
    Node("data", "01_data.ipynb", "The phantoms, and the data sets of the paper", results=("phantoms", "table8")),
    Node(
        "corruption",
        "02_corruption_and_loss.ipynb",
        "The corruption process and the loss (Eq. 1-4)",
        results=("corruption", "loss_weights"),
    ),
    Node("model", "03_model_and_checkpoints.ipynb", "The model, its stages and its checkpoints", results=("table6",)),
    Node("explorer", "50_explorer.ipynb", "The explorer: repetition against sampling steps", results=("explorer",)),
    Node(
        "stage1",
        "10_stage1_alignment.ipynb",
        "Stage 1: align the projector",
        makes=("models/stage1",),
        results=("stage1",),
        heavy=True,
    ),
    Node(
        "stage2",
        "11_stage2_instruction.ipynb",
        "Stage 2: tune on instructions",
        needs=("models/stage1",),
        makes=("models/stage2",),
        results=("stage2",),
        heavy=True,
    ),
    Node(
        "stage3",
        "12_stage3_vqa.ipynb",
        "Stage 3: tune on visual question answering",
        needs=("models/stage2",),
        makes=("models/stage3",),
        results=("table2", "fig03", "vqa_controls", "vqa_kinds"),
        heavy=True,
    ),
    Node(
        "twin", "13_autoregressive_twin.ipynb", "The autoregressive twin", makes=("models/twin",), results=("twin",), heavy=True
    ),
    Node(
        "adaptation",
        "14_from_causal_to_diffusion.ipynb",
        "From causal to diffusion",
        makes=("trials/adaptation",),
        results=("adaptation", "table_adaptation"),
        heavy=True,
    ),
    Node(
        "initialization",
        "30_initialization.ipynb",
        "What the initial weights contribute",
        makes=("trials/initialization",),
        results=("table4", "initialization"),
        heavy=True,
    ),
    Node(
        "lora",
        "31_lora_vs_full.ipynb",
        "LoRA or full fine-tuning",
        needs=("models/stage2",),
        makes=("trials/lora_vs_full",),
        results=("lora_vs_full", "table_lora_vs_full"),
        heavy=True,
    ),
    Node(
        "open_conversation",
        "20_open_conversation.ipynb",
        "Open conversation, and the baseline models",
        needs=("models/stage1", "models/stage2", "models/twin"),
        makes=("answers/open_conversation",),
        results=("table1", "table7", "fig01", "fig02", "fig06", "fig07", "fig08"),
        heavy=True,
    ),
    Node(
        "length_control",
        "21_length_control.ipynb",
        "Length control: how long, and at what cost",
        needs=("models/stage2", "models/twin"),
        makes=("answers/length_control",),
        results=("table3", "fig04"),
        heavy=True,
    ),
    Node(
        "generation_settings",
        "32_generation_settings.ipynb",
        "Generation length, steps and block length",
        needs=("models/stage2",),
        makes=("answers/generation_settings",),
        results=("table5", "fig09", "fig11", "fig12"),
        heavy=True,
    ),
    Node(
        "repetition",
        "33_repetition.ipynb",
        "Repetition, and what steps, length and schedule do to it",
        needs=("models/stage2",),
        makes=("answers/repetition",),
        results=("fig05", "fig10", "schedules"),
        heavy=True,
    ),
    Node(
        "fast_sampling",
        "40_fast_sampling.ipynb",
        "Sampling: speed and quality against forwards",
        needs=("models/stage2",),
        results=("pareto", "cache_agreement", "sampler_speed"),
        alone=True,
    ),
    Node(
        "report",
        "90_report.ipynb",
        "The report: ours beside the paper's, and an audit of its numbers",
        results=("audit", "audit_gaming"),
        last=True,
    ),
)


def nodes_for(profile: Profile) -> tuple[Node, ...]:
    """`NODES`, with an explorer that asks the model of stage 2 where none of the profile's size is bundled."""
    if profile.towers == "bundled":
        return NODES
    return tuple(replace(n, needs=("models/stage2",), heavy=True) if n.name == "explorer" else n for n in NODES)


EXHIBITS: dict[str, str] = {
    "table1": "Open-ended biomedical visual conversation, scored by a judge",
    "table2": "Fine-tuned visual question answering on VQA-RAD, SLAKE and PathVQA",
    "table3": "Response length and time per query",
    "table4": "What the initialization contributes",
    "table5": "Generation length, sampling steps and block length",
    "table6": "Training recipe of the three stages",
    "table7": "The baseline models",
    "table8": "The question-answering data sets",
    "fig01": "Open-ended conversation: scores of several models",
    "fig02": "Open-ended conversation: answers side by side",
    "fig03": "Visual question answering after stage 3",
    "fig04": "Response length of several models",
    "fig05": "Token repetition in answers",
    "fig06": "Open-ended conversation: further example 1",
    "fig07": "Open-ended conversation: further example 2",
    "fig08": "Open-ended conversation: further example 3",
    "fig09": "Generation settings: effect of the generation length",
    "fig10": "Token repetition against sampling steps",
    "fig11": "Generation settings: effect of the block length",
    "fig12": "Generation settings: effect of the number of steps",
}
"""Every table and figure of the paper by name: the title in our words."""


def counterpart(result: str) -> str | None:
    """What a result stands beside in the paper: "Table 2" for "table2", "Figure 3" for "fig03", None for our own."""
    if result not in EXHIBITS:
        return None
    kind, number = ("Table", result[5:]) if result.startswith("table") else ("Figure", result[3:])
    return f"{kind} {int(number)}"


def planned(nodes: Iterable[Node] = NODES) -> tuple[str, ...]:
    """The tables and figures of the paper that no notebook makes yet, in the paper's order."""
    made = {result for node in nodes for result in node.results}
    return tuple(name for name in EXHIBITS if name not in made)


def makers(nodes: Iterable[Node] = NODES) -> dict[str, Node]:
    """Map each artifact, figure and table to its node; raises ValueError if two nodes make the same one."""
    found: dict[str, Node] = {}
    for node in nodes:
        for product in (*node.makes, *node.results):
            if product in found:
                raise ValueError(f"{product!r} is made twice, by {found[product].name!r} and {node.name!r}: rename one")
            found[product] = node
    return found


def find_node(name: str, nodes: Iterable[Node] = NODES) -> Node:
    """The node called `name`; raises ValueError, listing the names, if there is none."""
    by_name = {node.name: node for node in nodes}
    if name not in by_name:
        raise ValueError(f"unknown notebook node {name!r}: choose one of {', '.join(by_name)}")
    return by_name[name]


def parents(node: Node, nodes: Iterable[Node] = NODES) -> tuple[Node, ...]:
    """The nodes that make what `node` needs; raises ValueError if nobody makes one of them."""
    made_by = makers(nodes)
    for artifact in node.needs:
        if artifact not in made_by:
            raise ValueError(f"{node.name!r} needs {artifact!r}, which no notebook makes: add it to one node's `makes`")
    return tuple(dict.fromkeys(made_by[artifact] for artifact in node.needs))


def ordered(nodes: Iterable[Node] = NODES, only: Iterable[str] = ()) -> tuple[Node, ...]:
    """The nodes, makers before users, otherwise as declared; with `only`, those that make these names and their makers.

    `only` takes names of nodes, artifacts, figures and tables; without it all nodes are there. Raises ValueError for
    an unknown or a not yet reproduced name, for two nodes of one name, for a product without a maker or with two, and for a
    cycle.
    """
    nodes = tuple(nodes)
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        raise ValueError(f"two notebook nodes have the same name: {sorted(node.name for node in nodes)}")
    graph = {node.name: [parent.name for parent in parents(node, nodes)] for node in nodes}
    try:
        order = tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"the notebooks need each other in a circle: {' -> '.join(error.args[1])}") from None
    queue = [_maker_of(name, nodes).name for name in only] or list(order)
    wanted = set()
    while queue:
        name = queue.pop()
        wanted.add(name)
        queue += graph[name]
    chosen = [by_name[name] for name in order if name in wanted]
    return tuple(sorted(chosen, key=lambda node: node.last))


def chain_lengths(nodes: Iterable[Node] = NODES) -> dict[str, int]:
    """How many notebooks follow one after the other from each node on, itself included: the longest chain is begun first."""
    nodes = tuple(nodes)
    lengths: dict[str, int] = {}
    for node in reversed(ordered(nodes)):
        after = [other.name for other in nodes if node in parents(other, nodes)]
        lengths[node.name] = 1 + max((lengths[name] for name in after), default=0)
    return lengths


def _maker_of(name: str, nodes: tuple[Node, ...]) -> Node:
    by_name = {node.name: node for node in nodes}
    products = makers(nodes)
    if name in by_name:
        return by_name[name]
    if name in products:
        return products[name]
    if name in EXHIBITS:
        raise ValueError(f"{counterpart(name)} ({name}) is not reproduced yet: no notebook makes it")
    names = ", ".join((*by_name, *products))
    raise ValueError(f"nothing is called {name!r}: choose one of {names}")
