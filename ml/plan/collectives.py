"""What a compiled program sends: each collective, its bytes on the wire, how often, and along which mesh axes."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from ml.plan.hlo import Instruction, Module, Occurrence

# The bytes that each device sends, as a share of what the operation moves, in a group of ``n``, with the algorithms
# that are optimal for long messages (Chan et al. 2007): rings and their multidimensional kin.
_SHARE = {
    "all-gather": lambda n: (n - 1) / n,  # of the result
    "reduce-scatter": lambda n: (n - 1) / n,  # of the operand
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{(?P<slices>[\d,:]+)\}.*_xla_megascale_transfer_type="(?P<kind>[A-Z_]+)"'
)
# The TPU compiler has no reduce-scatter: it fuses an all-reduce with the slice that each device keeps of it.
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"
_NAME = re.compile(r'op_name="([^"]*)"')
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ORDER = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_NAMED = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\))? \{(?P<axes>[^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: such as ``all-gather``.
      axes: the mesh axes along which it communicates.
      group: devices that take part in one instance.
      bytes: sent by one device each time.
      times: a step.
      name: where in the traced program it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    times: int
    name: str

    @property
    def total(self) -> float:
        """Bytes that one device sends in a step."""
        return self.bytes * self.times


def collectives(hlo: str, mesh: Mapping[str, int], across: str = "data") -> list[Collective]:
    """Reads the collectives off a compiled program.

    A pair of start and done is one operation, and so are the pieces of one that the compiler spread over several
    fusions: they share a channel.

    Args:
      hlo: text of the compiled module, partitioned.
      mesh: axis name -> size, in the order in which the program numbers its devices.
      across: the axis that spans slices. What TPUs do over the network between them is a ``send`` to their hosts.
    """
    found: list[Collective] = []
    seen: set[tuple[tuple[str, ...], str]] = set()
    for occurrence in Module(hlo).occurrences():
        instruction = occurrence.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (hosted := _BETWEEN_SLICES.search(instruction.text)):
            found.append(_between_slices(hosted, occurrence, across))
        if kind not in _SHARE:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        if occurrence.fused and channel:
            key = (occurrence.scope, channel[1])
            if key in seen:
                continue
            seen.add(key)
        groups = _groups(instruction.text, int(np.prod(list(mesh.values()))))
        size = groups.shape[1]
        if size < 2:
            continue
        moved = _moved(kind, instruction, size)
        if kind == "all-reduce" and occurrence.computation.startswith(_FUSED_REDUCE_SCATTER):
            kind = "reduce-scatter"
        name = _NAME.search(instruction.text)
        found.append(
            Collective(
                kind=kind,
                axes=_axes(groups, mesh),
                group=_cycle(groups) if kind == "collective-permute" else size,
                bytes=_SHARE[kind](size) * moved,
                times=occurrence.times,
                name=name[1] if name else "",
            )
        )
    return found


def by_axes(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[float, int]]:
    """Sums: (kind, axes) -> (bytes a device sends in a step, operations in a step), most bytes first."""
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for one in found:
        entry = totals[one.kind, one.axes]
        entry[0] += one.total
        entry[1] += one.times
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return {key: (size, int(times)) for key, (size, times) in ordered}


def _between_slices(hosted: re.Match[str], occurrence: Occurrence, across: str) -> Collective:
    first, _, last = hosted["slices"].partition(":")
    slices = int(last) - int(first) + 1 if last else len(hosted["slices"].split(","))
    kind = hosted["kind"].lower().replace("_", "-")
    name = _NAME.search(occurrence.instruction.text)
    return Collective(
        kind=kind,
        axes=(across,),
        group=slices,
        bytes=_SHARE[kind](slices) * occurrence.instruction.arrays[0][1],
        times=occurrence.times,
        name=name[1] if name else "",
    )


def _moved(kind: str, instruction: Instruction, group: int) -> int:
    """Bytes of what the operation's cost is a share of."""
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        sizes = [size for type_, size in arrays if not (type_ == "u32" and size == 4)]  # the rest is bookkeeping
        result = sum(sizes[len(sizes) // 2 :])  # after the operands
    else:
        result = sum(size for _, size in arrays)
    return result * group if kind == "reduce-scatter" else result


def _groups(text: str, devices: int) -> np.ndarray:
    """``[groups, members]``: who communicates with whom; of a permutation, the pairs of different devices."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        array = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), dtype=int).reshape(-1, 2)
        moving = array[array[:, 0] != array[:, 1]]
        return moving if len(moving) else np.zeros((1, 1), int)
    if named := _NAMED.search(text):
        return _named_groups(named)
    if iota := re.search(r"replica_groups=" + _IOTA.pattern, text):
        return _iota(*iota.groups())
    explicit = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if explicit is None:  # ``{}`` or nothing: everyone
        return np.arange(devices)[None]
    rows = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", explicit[1])]
    widest = max(map(len, rows))
    return np.array([row + row[-1:] * (widest - len(row)) for row in rows])


def _iota(shape: str, counted: str, permutation: str | None) -> np.ndarray:
    """``[2,4]<=[4,2]T(1,0)``: the numbers from 0 on, shaped, transposed, and shaped again."""
    extents = _integers(counted)
    ids = np.arange(np.prod(extents)).reshape(extents)
    if permutation:
        ids = ids.transpose(_integers(permutation))
    return ids.reshape(_integers(shape))


def _named_groups(match: re.Match[str]) -> np.ndarray:
    """``mesh['a'=2,'b'=4] {'b'}``; an entry ``'b':(2)2`` is part of an axis: 2 before it, 2 in it."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", match["mesh"])}
    ids = np.arange(np.prod(list(sizes.values())))
    if match["ids"]:
        order = _ORDER.fullmatch(match["ids"])  # ``[2,4]T(1,0)``: as many numbers, shaped and transposed
        ids = _iota("-1", *order.groups()) if order else np.array(re.findall(r"\d+", match["ids"]), int)
    wanted = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", match["axes"])
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in wanted}
    shape: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        inside.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    members = int(np.prod([shape[axis] for axis in inside]))
    return ids.reshape(shape).transpose(*outside, *inside).reshape(-1, members)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    coordinates = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(name for name, at in zip(mesh, coordinates, strict=True) if (at != at[:, :1]).any())


def _cycle(pairs: np.ndarray) -> int:
    """Devices in the longest chain of a permutation."""
    following = {int(source): int(target) for source, target in pairs}
    starts = set(following) - set(following.values()) or set(following)
    longest = 0
    for start in starts:
        at, length = start, 1
        while at in following and following[at] != start and length <= len(following):
            at, length = following[at], length + 1
        longest = max(longest, length)
    return longest


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
