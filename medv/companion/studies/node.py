"""The declaration of one notebook of the reproduction; each study declares its own as `NODE` or `NODES`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Node:
    """One notebook of the reproduction.

    `needs` and `makes` name artifacts (folders or files under the run folder, as "models/stage1"); `results` names the
    figures and tables that it saves. `reads` names the materials of the configuration file without which it cannot run where a
    profile has real data alone ("a|b" stands for either), `may_read` those that it uses where they are there. `needs_model` are
    further needs where the package holds no model of the profile's size, `needs_given` where its weights are given. `plan` is
    the field of a profile without which there is nothing to run.
    `parameters` are passed to the notebook beside profile, seed, out and config. A `heavy` node trains or generates for long:
    unless the profile lets them share the machine, nothing else runs at the same time. Nothing ever runs beside an `alone`
    node, which compares speeds. A `last` node reads the results of the others: it runs after them, however they ended.
    """

    name: str
    notebook: str
    title: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    may_read: tuple[str, ...] = ()
    needs_model: tuple[str, ...] = ()
    needs_given: tuple[str, ...] = ()
    plan: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    heavy: bool = False
    alone: bool = False
    last: bool = False
