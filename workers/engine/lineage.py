"""Undecided frames: a tree of hypotheses whose trunk is emitted as soon as it is one.

Every live hypothesis ends in a node of the newest frame. As long as all of them descend from one
node, nothing that comes later can change what lies before it, so it is final. A frame costs a
fixed amount of work however long the undecided part is: branches that die are cut from their
tips, and the trunk is followed from its root.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Any

from workers.engine.bank import Sighting
from workers.rle import LazyMask

SPILL_BYTES = 64 << 20
"""Size of pending masks above which further ones go to a temporary file."""


class Spool:
    """Pending masks as COCO run lengths, in memory up to a limit and then in a temporary file.

    Parameters
    ----------
    limit_bytes : int, optional
        The limit, `SPILL_BYTES` when left out.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = SPILL_BYTES if limit_bytes is None else limit_bytes
        self._file: IO[bytes] | None = None
        self._num_spilled = 0
        self.num_bytes = 0
        """Of the masks in memory."""

    def put(self, counts: bytes) -> bytes | tuple[int, int]:
        """Keep run lengths and return what `get` and `drop` take."""
        if self.num_bytes + len(counts) <= self._limit:
            self.num_bytes += len(counts)
            return counts
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="maskmill-pending-")  # noqa: SIM115
        start = self._file.seek(0, 2)
        self._file.write(counts)
        self._num_spilled += 1
        return start, len(counts)

    def get(self, kept: bytes | tuple[int, int]) -> bytes:
        """Return run lengths."""
        if isinstance(kept, bytes):
            return kept
        assert self._file is not None
        self._file.seek(kept[0])
        return self._file.read(kept[1])

    def close(self) -> None:
        """Forget everything."""
        if self._file is not None:
            self._file.close()
        self._file, self._num_spilled, self.num_bytes = None, 0, 0

    def drop(self, kept: bytes | tuple[int, int]) -> None:
        """Forget run lengths; the file is emptied once nothing in it is wanted."""
        if isinstance(kept, bytes):
            self.num_bytes -= len(kept)
            return
        self._num_spilled -= 1
        if not self._num_spilled:
            assert self._file is not None
            self._file.truncate(0)


class Node:
    """One hypothesis about one frame.

    Where hypotheses never agree there are thousands of them, so each is kept small.

    Attributes
    ----------
    parent : Node or None
        The hypothesis about the frame before; None at the root.
    step : int
        The frame.
    confidence : float
        Of the mask.
    kept : bytes, tuple, or None
        The mask in the spool; None where the object is absent.
    children : tuple of Node
        Live hypotheses about the frame after.
    """

    __slots__ = ("children", "confidence", "kept", "parent", "step")

    def __init__(
        self,
        parent: Node | None,
        step: int,
        confidence: float,
        kept: bytes | tuple[int, int] | None,
    ) -> None:
        self.parent = parent
        self.step = step
        self.confidence = confidence
        self.kept = kept
        self.children: tuple[Node, ...] = ()


class Lineage:
    """The undecided frames of one object.

    Parameters
    ----------
    spool : Spool
        Where masks wait.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._root: Node | None = None
        self._size = (0, 0)  # of every mask

    def plant(self, step: int) -> Node:
        """Begin: everything up to this frame is decided."""
        self._root = Node(None, step, 0.0, None)
        return self._root

    @property
    def num_undecided(self) -> int:
        """Frames between the root and the newest hypothesis."""
        count, node = 0, self._root
        while node is not None and node.children:
            count, node = count + 1, node.children[0]
        return count

    def grow(self, parent: Node, step: int, sighting: Sighting) -> Node:
        """Add a hypothesis about the next frame."""
        kept = None
        if sighting.mask is not None:
            kept = self.spool.put(sighting.mask.counts)
            self._size = sighting.mask.height, sighting.mask.width
        node = Node(parent, step, sighting.confidence, kept)
        parent.children += (node,)
        return node

    def settle(self, tips: Iterable[Node]) -> list[tuple[int, Sighting]]:
        """Cut the branches that ended and return the frames that became final.

        Parameters
        ----------
        tips : iterable of Node
            Hypotheses that were live until now. Those from which no other has grown have ended,
            and with them whatever leads to them alone.

        Returns
        -------
        list of (int, Sighting)
            Steps and sightings, in order.
        """
        for tip in set(tips):
            node: Node | None = tip
            while node is not None and node is not self._root and not node.children:
                node = self._cut(node)
        decided = []
        root = self._root
        assert root is not None
        while len(root.children) == 1:
            (root,) = root.children
            root.parent = None
            decided.append((root.step, self._sighting(root)))
        self._root = root
        return decided

    def branch_of(self, tip: Node) -> Node:
        """Return the hypothesis about the oldest undecided frame that a tip descends from."""
        node = tip
        while node.parent is not None and node.parent is not self._root:
            node = node.parent
        return node

    def follow(self, tip: Node) -> list[tuple[int, Sighting]]:
        """Decide everything in favour of one hypothesis; it becomes the root."""
        path: list[Node] = []
        node: Node | None = tip
        while node is not None and node is not self._root:
            path.append(node)
            node = node.parent
        assert self._root is not None
        for chosen, after in zip([self._root, *reversed(path)], reversed(path), strict=False):
            for other in chosen.children:
                if other is not after:
                    self._cut_whole(other)
        decided = [(chosen.step, self._sighting(chosen)) for chosen in reversed(path)]
        self._root = tip
        tip.parent = None
        return decided

    def _cut(self, node: Node) -> Node | None:
        parent = node.parent
        if parent is not None:
            parent.children = tuple(child for child in parent.children if child is not node)
        if node.kept is not None:
            self.spool.drop(node.kept)
        return parent

    def _cut_whole(self, node: Node) -> None:
        waiting = [node]
        while waiting:
            at = waiting.pop()
            waiting += at.children
            if at.kept is not None:
                self.spool.drop(at.kept)
        if node.parent is not None:
            node.parent.children = tuple(c for c in node.parent.children if c is not node)

    def _sighting(self, node: Node) -> Sighting:
        """Return what a node says of its frame, and free its mask."""
        if node.kept is None:
            return Sighting(node.confidence, None)
        mask = LazyMask(*self._size, counts=self.spool.get(node.kept))
        self.spool.drop(node.kept)
        node.kept = None
        return Sighting(node.confidence, mask)

    # -- snapshots ---------------------------------------------------------------------------

    def get_state(self, tips: Sequence[Node]) -> dict[str, Any]:
        """Return the tree as plain values and bytes, with the places of its tips."""
        nodes: list[Node] = []
        places: dict[int, int] = {}
        if self._root is not None:
            waiting = [self._root]
            while waiting:
                node = waiting.pop()
                places[id(node)] = len(nodes)
                nodes.append(node)
                waiting += node.children
        return {
            "size": list(self._size),
            "nodes": [
                [
                    None if n.parent is None else places[id(n.parent)],
                    n.step,
                    n.confidence,
                    None if n.kept is None else self.spool.get(n.kept),
                ]
                for n in nodes
            ],
            "tips": [places[id(tip)] for tip in tips],
        }

    def set_state(self, state: Any) -> list[Node]:
        """Take back what `get_state` returned; return the tips."""
        nodes: list[Node] = []
        self._size = tuple(state["size"])
        for parent, step, confidence, counts in state["nodes"]:
            above = None if parent is None else nodes[parent]
            kept = None if counts is None else self.spool.put(counts)
            node = Node(above, step, confidence, kept)
            if above is not None:
                above.children += (node,)
            nodes.append(node)
        self._root = nodes[0] if nodes else None
        return [nodes[i] for i in state["tips"]]
