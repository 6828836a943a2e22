"""Which model came from which: base -> SFT -> pairs -> SPPO 1 -> pairs -> SPPO 2."""

from dataclasses import dataclass, field
from pathlib import Path

from preflab.reporting.artifacts import RunArtifacts
from utils.artifacts import read_json
from utils.errors import UserError


@dataclass
class Node:
    """A model, or pairs that a model made.

    Attributes:
        name: of the run, or of a base model.
        kind: base, SFT, DPO ..., pairs or merged.
        note: what else it was made of.
        is_run: whether the report has a page of it.
        children: what was made from it.
    """

    name: str
    kind: str
    note: str = ""
    is_run: bool = False
    children: list["Node"] = field(default_factory=list)

    def lines(self, depth: int = 0) -> list[tuple[int, "Node"]]:
        """(depth, node) of this node and of all below it."""
        return [(depth, self), *(line for child in self.children for line in child.lines(depth + 1))]


def lineage(runs: list[RunArtifacts]) -> list[Node]:
    """The trees of all runs, one per base model."""
    nodes = {run.name: Node(run.name, _kind(run), is_run=True) for run in runs if _is_model_or_pairs(run)}
    roots: dict[str, Node] = {}
    # Oldest first, so that children are in the order in which they were made.
    for run in reversed(runs):
        if run.name not in nodes:
            continue
        node, parent = nodes[run.name], _parent(run, nodes)
        node.note = _note(run, nodes, parent)
        # A run cannot be below itself; names in damaged files could say so.
        if parent in nodes and not _is_below(nodes[parent], node):
            nodes[parent].children.append(node)
        else:
            roots.setdefault(parent, Node(parent, "base")).children.append(node)
    return list(roots.values())


def path_to(name: str, trees: list[Node]) -> list[Node]:
    """The nodes from the base model to a run; [] if it is in no tree."""
    for node in trees:
        if node.name == name and node.is_run:
            return [node]
        below = path_to(name, node.children)
        if below:
            return [node, *below]
    return []


def _is_below(node: Node, above: Node) -> bool:
    return any(node is below for _, below in above.lines())


def _is_model_or_pairs(run: RunArtifacts) -> bool:
    return run.is_training or bool(run.of_stage("preference_pairs", trials=True))


def _kind(run: RunArtifacts) -> str:
    return run.run.trains or ("pairs" if run.of_stage("preference_pairs", trials=True) else "training")


def _arguments(run: RunArtifacts) -> dict:
    """The arguments of training, or of the pairs."""
    if run.training:
        return run.training.args
    pairs = run.of_stage("preference_pairs", trials=True)
    if pairs:
        return pairs[0].args
    try:
        return read_json(run.weights / "run.json").get("args") or {}
    except (UserError, AttributeError):
        return {}


def _parent(run: RunArtifacts, nodes: dict[str, Node]) -> str:
    """The name of what a run was made from: its policy's pairs, the adapter that it starts from, or its base."""
    args = _arguments(run)
    pairs = _pairs_of(args, nodes)
    start = args.get("start_adapter") or args.get("adapter_path")
    start_name = Path(str(start)).name if start else None
    if pairs and run.name != pairs:
        return pairs
    if start_name in nodes:
        return start_name
    base = str(((run.training.summary.get("start") if run.training else None) or {}).get("base") or "")
    base = base or str(args.get("model_name_or_path") or "unknown base")
    # A merged folder is named after the run whose adapter it holds.
    name = Path(base).name.partition("-merged")[0]
    return name if name in nodes else base.removeprefix("builtin:") if base.startswith("builtin:") else Path(base).name


def _pairs_of(args: dict, nodes: dict[str, Node]) -> str | None:
    """The run of generate_preference_pairs.py that a run was trained on."""
    name = Path(str(args.get("dataset_name") or "")).name
    return name if name in nodes and nodes[name].kind == "pairs" else None


def _note(run: RunArtifacts, nodes: dict[str, Node], parent: str) -> str:
    args = _arguments(run)
    start, data = args.get("start_adapter"), args.get("dataset_name")
    notes = []
    if start and run.is_training:
        how = "continues" if args.get("start_adapter_use") == "continue" else "merges"
        notes.append(f"{how} {Path(str(start)).name}")
    if data and Path(str(data)).name != parent:
        notes.append(f"data {data}")
    return ", ".join(notes)
