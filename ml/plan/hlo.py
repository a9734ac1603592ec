"""Reads the text of a compiled program: its computations, what calls what, and how often each loop turns."""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_ASSIGNMENT = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"(?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "tf32": 32}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      name: unique in its computation.
      opcode: such as ``all-gather-start``.
      type: of the result, as written.
      text: operands and attributes, as written.
    """

    name: str
    opcode: str
    type: str
    text: str

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """Element type and bytes of each array in the result, a tuple's in order."""
        return [(kind, _bytes(kind, extents)) for kind, extents in _ARRAY.findall(self.type)]

    @property
    def called(self) -> list[str]:
        """The computations that it runs; not the function that a reduction applies."""
        names = _CALLED.findall(self.text)
        for group in _CALLED_LISTS.findall(self.text):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        if self.opcode == "call":
            names += re.findall(r"to_apply=%?([\w.\-]+)", self.text)
        return names


@dataclasses.dataclass(frozen=True)
class Occurrence:
    """An instruction as it is run.

    Attributes:
      instruction: the line.
      times: how often, loops multiplied out.
      scope: the loop bodies and calls around it; a fusion is no scope of its own.
      fused: whether it lies inside a fusion.
      computation: the name of the computation that holds the line.
    """

    instruction: Instruction
    times: int
    scope: tuple[str, ...]
    fused: bool
    computation: str


class Module:
    """A program.

    Attributes:
      computations: name -> lines.
      entry: the computation that is run.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                lines = self.computations[header["name"]] = []
                self.entry = header["name"] if header["entry"] else self.entry
            elif (assignment := _ASSIGNMENT.match(line)) and (parsed := _instruction(**assignment.groupdict())):
                lines.append(parsed)

    def occurrences(self) -> Iterator[Occurrence]:
        """Every instruction that is run, from the entry on; of a conditional, all branches."""
        yield from self._visit(self.entry, 1, (self.entry,), False)

    def _visit(self, name: str, times: int, scope: tuple[str, ...], fused: bool) -> Iterator[Occurrence]:
        for instruction in self.computations.get(name, ()):
            yield Occurrence(instruction, times, scope, fused, name)
            if instruction.opcode.endswith(("-done", "-update")):  # names again what its start has run
                continue
            for called in instruction.called:
                if instruction.opcode in ("while", "call", "conditional"):
                    turns = self.trip_count(instruction) if instruction.opcode == "while" else 1
                    yield from self._visit(called, times * turns, (*scope, f"{instruction.name}/{called}"), False)
                else:
                    yield from self._visit(called, times, scope, True)

    def trip_count(self, loop: Instruction) -> int:
        """How often a ``while`` turns: as the compiler notes it, else the bound that its condition compares with.

        Such loops count up from 0, as those of `jax.lax.scan` do; 1 if there is no telling.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        lines = self.computations.get(condition[1], []) if condition else []
        bounds = {int(line.text.split(")")[0]) for line in lines if _is_integer_constant(line)}
        directions = {found for line in self._with_called(lines) for found in re.findall(r"direction=(\w+)", line.text)}
        if len(bounds) == 1 and directions in ({"LT"}, {"LE"}):
            return bounds.pop() + (directions == {"LE"})
        return 1

    def _with_called(self, lines: list[Instruction]) -> list[Instruction]:
        return lines + [inner for line in lines for name in line.called for inner in self.computations.get(name, ())]


def _instruction(name: str, rest: str) -> Instruction | None:
    type_, rest = _split_type(rest)
    match = _OPCODE.match(rest)
    return Instruction(name, match["opcode"], type_, match["rest"]) if match else None


def _split_type(rest: str) -> tuple[str, str]:
    """The result's type, which in a tuple holds spaces and parentheses, and what follows it."""
    if not rest.startswith("("):
        type_, _, after = rest.partition(" ")
        return type_, after
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[: index + 1], rest[index + 1 :].lstrip()
    return rest, ""


def _is_integer_constant(line: Instruction) -> bool:
    return line.opcode == "constant" and bool(re.match(r"[su]\d+\[\]", line.type)) and line.text[:1].isdigit()


def _bytes(kind: str, extents: str) -> int:
    bits = _BITS.get(kind)
    if bits is None:
        width = re.search(r"\d+", kind)  # f32, s8, f8e4m3fn
        bits = int(width[0]) if width else 0
    count = math.prod(int(extent.lstrip("<=")) for extent in extents.split(",") if extent)
    return (bits * count + 7) // 8
