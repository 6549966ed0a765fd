"""Which notebook makes which artifact, figure and table, and from what: the graph that `medv reproduce` walks.

One `Node` per notebook; an edge runs from the maker of an artifact to whoever needs it. `EXHIBITS` lists every table and
figure of the paper, so that what is not reproduced yet is seen to be missing.
"""

import ast
from collections.abc import Iterable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from medv.companion import studies
from medv.companion.studies.node import Node
from medv.profiles import Profile


def declared(folders: Iterable[str] = studies.__path__) -> tuple[Node, ...]:
    """The nodes of all studies, in the order of their notebooks.

    Read from the statement `NODES = (Node(...), ...)` of each file, without an import: the driver needs no torch, and what
    one study declares cannot change the results of another (see `reach`).
    """
    nodes: list[Node] = []
    for path in (path for folder in folders for path in Path(folder).glob("*.py")):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NODES":
                nodes += eval(compile(ast.Expression(statement.value), path, "eval"), {"Node": Node})
    return tuple(sorted(nodes, key=lambda node: node.notebook))


NODES = declared()


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
