"""What devices send each other: the collective operations in the text of a compiled program, and their bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

# Of the devices of a group, each sends this share of the array's bytes, with ring algorithms over n devices.
_SHARES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter, then an all-gather
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: float(n > 1),
    "collective-broadcast": lambda n: float(n > 1),
}
KINDS = tuple(_SHARES)
"""Names of the collective operations, as XLA writes them."""

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9\-]*)\((?P<rest>.*)")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
        kind: one of `KINDS`.
        size_bytes: bytes of the whole array: what an all-gather makes, what a reduce-scatter takes.
        group: number of devices that take part.
        runs: how often a call of the program runs it.

    >>> Collective("all-reduce", 1000, 4, runs=2).sent_bytes
    3000
    """

    kind: str
    size_bytes: int
    group: int
    runs: int = 1

    @property
    def sent_bytes(self) -> int:
        """Bytes that each device sends in a call of the program, with ring algorithms."""
        return round(self.size_bytes * _SHARES[self.kind](self.group)) * self.runs


def find_collectives(text: str) -> list[Collective]:
    """Find the collective operations in the text of a compiled program, as `compiled.as_text()` gives it.

    Loops whose number of iterations XLA knows count as often as they run, others once. Of the branches of a condition
    the one that sends most counts. An asynchronous operation counts once, however many instructions it is written as;
    an all-reduce that XLA merges with the cut of its result is a reduce-scatter.

    Args:
        text: HLO text of one module, after optimization and partitioning.

    >>> text = '''HloModule m, num_partitions=4
    ...
    ... ENTRY %main (x: f32[8]) -> f32[32] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %all-gather = f32[32]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
    ... }
    ... '''
    >>> find_collectives(text)
    [Collective(kind='all-gather', size_bytes=128, group=4, runs=1)]
    """
    partitions = _PARTITIONS.search(text)
    return _Module(text, int(partitions.group(1)) if partitions else 1).found()


def sent_by_kind(collectives: Sequence[Collective]) -> dict[str, int]:
    """Bytes that each device sends in a call, by kind.

    >>> sent_by_kind([Collective("all-gather", 1000, 2), Collective("all-gather", 200, 2)])
    {'all-gather': 600}
    """
    sent: dict[str, int] = {}
    for each in collectives:
        sent[each.kind] = sent.get(each.kind, 0) + each.sent_bytes
    return dict(sorted(sent.items()))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str


class _Module:
    """The computations of a module, by name."""

    def __init__(self, text: str, partitions: int) -> None:
        self._partitions = partitions
        self._computations: dict[str, list[_Instruction]] = {}
        self._entry = ""
        self._seen: set[tuple[str, str, int]] = set()
        current: list[_Instruction] = []
        for line in text.splitlines():
            begun = _COMPUTATION.match(line)
            if begun:
                current = self._computations[begun["name"]] = []
                self._entry = begun["name"] if begun["entry"] else self._entry
            elif instruction := _INSTRUCTION.match(line):
                current.append(_Instruction(*instruction.group("name", "type", "op", "rest")))

    def found(self) -> list[Collective]:
        return list(self._of(self._entry, 1, fused=False))

    def _of(self, name: str, runs: int, *, fused: bool) -> Iterator[Collective]:
        instructions = self._computations.get(name, [])
        done = {_operand(each): each for each in instructions if each.op.endswith("-done")}
        scatters = fused and any(each.op == "dynamic-slice" for each in instructions)
        for each in instructions:
            kind = each.op.removesuffix("-start")
            if kind in _SHARES:
                # The result of a start holds buffers, too; that of its end is the array.
                found = self._collective(kind, each, done.get(each.name, each), runs, scatters=scatters)
                channel = _channel(each.rest)
                key = (kind, channel, found.size_bytes)
                # The parts of an asynchronous fusion repeat the operation that they share.
                if not (fused and channel and key in self._seen):
                    yield found
                if fused:
                    self._seen.add(key)
            elif each.op not in ("async-update", "async-done"):
                yield from self._called(each, runs, fused=fused)

    def _called(self, caller: _Instruction, runs: int, *, fused: bool) -> Iterator[Collective]:
        if caller.op == "while":
            trips = _TRIPS.search(caller.rest)
            runs *= int(trips.group(1)) if trips else 1
        branches = _BRANCHES.search(caller.rest)
        names = branches.group(1).replace("%", "").split(", ") if branches else _CALLED.findall(caller.rest)
        inside = [list(self._of(name, runs, fused=fused or caller.op == "fusion")) for name in names]
        if caller.op == "conditional":
            yield from max(inside, key=lambda found: sum(each.sent_bytes for each in found), default=[])
            return
        for found in inside:
            yield from found

    def _collective(
        self, kind: str, instruction: _Instruction, result: _Instruction, runs: int, *, scatters: bool
    ) -> Collective:
        group = self._group(kind, instruction.rest)
        size = _bytes(result.type)
        if kind == "reduce-scatter":
            size *= group
        elif kind == "all-reduce" and scatters:
            kind = "reduce-scatter"
        return Collective(kind, size, group, runs)

    def _group(self, kind: str, rest: str) -> int:
        """Number of devices that take part in an operation."""
        if kind == "collective-permute":
            return 2 if re.search(r"source_target_pairs=(\{\{|\[)", rest) else 1
        if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):  # {{0,1},{2,3}}
            return found.group(1).count(",") + 1
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):  # [groups,devices]<=[...]
            return int(found.group(1))
        if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\].*?\{([^}]*)\}", rest):  # mesh['a'=4,'b'=2] {'a'}
            sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
            named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found.group(2))  # 'a':(before)size is a part of an axis
            return math.prod(int(part) if part else sizes[name] for name, part in named)
        return self._partitions


def _operand(instruction: _Instruction) -> str:
    found = re.search(r"%([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def _channel(rest: str) -> str:
    found = re.search(r"channel_id=(\d+)", rest)
    return found.group(1) if found else ""


def _bytes(type_text: str) -> int:
    """Bytes of an array type, or of all arrays of a tuple."""
    return sum(
        math.ceil(_bits(each["dtype"]) * math.prod(map(int, filter(None, each["shape"].split(",")))) / 8)
        for each in _ARRAY.finditer(type_text)
    )


def _bits(dtype: str) -> int:
    """Bits of an element: `f8e4m3fn` has 8, `bf16` 16; `pred` takes a byte."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 8
