"""The graph that `medv reproduce` runs: which notebook makes which artifact, figure and table, and from what.

One `Node` per notebook, declared in the study that it shows; an edge runs from the maker of an artifact to its users.
`EXHIBITS` lists every table and figure of the paper.
"""

import ast
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from medv.companion import studies
from medv.companion.studies.node import Node
from medv.profiles import Profile

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
"""Every table and figure of the paper by name, with a title of ours."""


def counterpart(result: str) -> str | None:
    """Where the paper has this result: "Table 2" for "table2", "Figure 3" for "fig03", None for a result of our own."""
    if result not in EXHIBITS:
        return None
    kind, number = ("Table", result[5:]) if result.startswith("table") else ("Figure", result[3:])
    return f"{kind} {int(number)}"


@cache
def all_nodes() -> tuple[Node, ...]:
    """The nodes of all studies in the order of their notebooks.

    Only the declarations, `NODE = Node(...)` or `NODES = (Node(...), ...)` of literals, are evaluated: importing every study
    takes seconds, and what one declares must not affect the notebook of another (see `medv.companion.reproduction.cache`).
    """
    nodes: list[Node] = []
    for file in (file for folder in studies.__path__ for file in Path(folder).glob("*.py")):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in ("NODE", "NODES"):
                found = eval(compile(ast.Expression(statement.value), str(file), "eval"), {"Node": Node})
                nodes += [found] if isinstance(found, Node) else found
    return tuple(sorted(nodes, key=lambda node: node.notebook))


def nodes_for(profile: Profile) -> tuple[Node, ...]:
    """The nodes that a profile has a plan for, with what they need of its own model where none of its size is bundled."""
    nodes = [node for node in all_nodes() if not node.plan or getattr(profile, node.plan)]
    if profile.towers == "bundled":
        return tuple(nodes)
    given = profile.towers == "given"
    more = {node: (*node.needs_model, *(node.needs_given if given else ())) for node in nodes}
    return tuple(replace(n, needs=(*n.needs, *also), heavy=n.heavy or bool(also)) for n, also in more.items())


def makers(nodes: Iterable[Node]) -> dict[str, Node]:
    """Map each artifact, figure and table to its node; raises ValueError if two nodes make the same one."""
    found: dict[str, Node] = {}
    for node in nodes:
        for product in (*node.makes, *node.results):
            if product in found:
                raise ValueError(f"{product!r} is made twice, by {found[product].name!r} and {node.name!r}: rename one")
            found[product] = node
    return found


def find_node(name: str, nodes: Iterable[Node]) -> Node:
    """The node called `name`, or else the one that makes it; raises ValueError, listing the names, if there is none."""
    nodes = tuple(nodes)
    known = makers(nodes) | {node.name: node for node in nodes}
    if name in known:
        return known[name]
    if name in EXHIBITS:
        raise ValueError(f"{counterpart(name)} ({name}) is not reproduced yet: no notebook makes it")
    names = dict.fromkeys([*(node.name for node in nodes), *known])
    raise ValueError(f"nothing is called {name!r}: choose one of {', '.join(names)}")


def parents(node: Node, nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes that make what `node` needs; raises ValueError if no node makes one of them."""
    made_by = makers(nodes)
    for artifact in node.needs:
        if artifact not in made_by:
            raise ValueError(f"{node.name!r} needs {artifact!r}, which no notebook makes: add it to one node's `makes`")
    return tuple(dict.fromkeys(made_by[artifact] for artifact in node.needs))


def ordered(nodes: Iterable[Node], only: Iterable[str] = ()) -> tuple[Node, ...]:
    """The nodes, makers before users, otherwise as declared; with `only`, those that make these names and their makers.

    `only` takes names of nodes, artifacts, figures and tables. Raises ValueError for an unknown or a not yet reproduced name,
    for two nodes of one name, for a product without a maker or with two, and for a cycle.
    """
    nodes = tuple(nodes)
    graph = {node.name: [parent.name for parent in parents(node, nodes)] for node in nodes}
    if len(graph) != len(nodes):
        raise ValueError(f"two notebook nodes have the same name: {sorted(node.name for node in nodes)}")
    try:
        order = tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"the notebooks need each other in a circle: {' -> '.join(error.args[1])}") from None
    queue = [find_node(name, nodes).name for name in only] or list(order)
    wanted = set()
    while queue:
        name = queue.pop()
        wanted.add(name)
        queue += graph[name]
    by_name = {node.name: node for node in nodes}
    return tuple(sorted((by_name[name] for name in order if name in wanted), key=lambda node: node.last))


def chain_lengths(nodes: Iterable[Node]) -> dict[str, int]:
    """Length of the longest chain of notebooks that starts at each node, itself included."""
    nodes = tuple(nodes)
    lengths: dict[str, int] = {}
    for node in reversed(ordered(nodes)):
        users = [other.name for other in nodes if node in parents(other, nodes)]
        lengths[node.name] = 1 + max((lengths[name] for name in users), default=0)
    return lengths
