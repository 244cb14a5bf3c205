"""The loops of a compiled kernel, and what one trip through each of them executes.

A loop's body has branches: a mask for the last tile, a way for scores that need a maximum and one
for scores that do not. What counts here is the cheapest way through the body that executes as many
tensor-core instructions as any does: that of a full tile away from the diagonal. Which way is taken
when it runs no listing tells; these kernels were written for that one.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    opcode: str
    goal: int | None  # index of the instruction that it may branch to
    falls_through: bool


@dataclass
class Loop:
    """own: opcodes of one trip outside the inner loops on its way."""

    own: Counter[str]
    inner: list[Loop] = field(default_factory=list)

    def opcodes(self, trips: int = 1) -> Counter[str]:
        """Of one trip, in which each inner loop is gone through `trips` times."""
        result = Counter(self.own)
        for loop in self.inner:
            for opcode, n in loop.opcodes().items():
                result[opcode] += trips * n
        return result

    def as_dict(self) -> dict[str, Any]:
        return {"own": dict(self.own), "inner": [loop.as_dict() for loop in self.inner]}

    @staticmethod
    def of(stored: dict[str, Any]) -> Loop:
        return Loop(Counter(stored["own"]), [Loop.of(loop) for loop in stored["inner"]])


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def parse_sass(listing: str) -> list[Instruction]:
    """Of cuobjdump -sass. HGMMA reads A from shared memory (named .SS here) or registers (.RS)."""
    lines = [m for m in map(_SASS.match, listing.splitlines()) if m]
    index = {int(m[1], 16): i for i, m in enumerate(lines)}
    result = []
    for m in lines:
        opcode, operands = m[3], m[4]
        goal, conditional = None, bool(m[2])
        if opcode.startswith("BRA"):
            address = re.search(r"0x([0-9a-f]+)", operands)
            goal = index.get(int(address[1], 16)) if address else None
            conditional |= bool(re.match(r"\s*!?U?P\d", operands)) or opcode.startswith("BRA.DIV")
        elif opcode.startswith("HGMMA"):
            opcode += ".RS" if re.match(r"\s*R\d+, R\d+", operands) else ".SS"
        ends = opcode.startswith(("BRA", "EXIT", "RET", "BRX", "JMP"))
        result.append(Instruction(opcode, goal, conditional or not ends))
    return result


_AMD = re.compile(r"^\s+([vs]_\w+|ds_\w+|global_\w+|flat_\w+|buffer_\w+|scratch_\w+)\s*([^;/]*)")


def parse_amd(assembly: str) -> list[Instruction]:
    """Of LLVM's AMDGCN assembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.\w+):", line):
            labels[label[1]] = len(found)
        elif m := _AMD.match(line):
            found.append((m[1], m[2].strip()))
    result = []
    for opcode, operands in found:
        branches = opcode.startswith(("s_branch", "s_cbranch"))
        goal = labels.get(operands) if branches else None
        if goal == len(found):
            goal = None
        ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
        result.append(Instruction(opcode, goal, not ends))
    return result


def loops_of(instructions: list[Instruction]) -> list[Loop]:
    """The outermost natural loops, in the order of the code. Waits on a barrier are loops of a few
    instructions; they are no loops of ours."""
    if not instructions:
        return []
    blocks, following = _blocks(instructions)
    bodies = {
        header: body
        for header, body in _natural_loops(following).items()
        if sum(len(blocks[b]) for b in body) >= 12
    }
    # The innermost first, so that each finds its inner loops done.
    done: dict[int, Loop] = {}
    outermost: dict[int, set[int]] = {}
    for header, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        inside = {h: b for h, b in outermost.items() if b < body}
        done[header] = _cheapest_trip(header, body, inside, done, instructions, blocks, following)
        for h in inside:
            del outermost[h]
        outermost[header] = body
    return [done[h] for h in sorted(outermost)]


def _blocks(instructions: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Straight pieces of code, and which may follow each."""
    starts = {0}
    for i, (_, goal, falls_through) in enumerate(instructions):
        if goal is not None:
            starts.add(goal)
        if goal is not None or not falls_through:
            starts.add(i + 1)
    ordered = sorted(s for s in starts if s < len(instructions))
    number = {start: b for b, start in enumerate(ordered)}
    blocks = [range(a, z) for a, z in zip(ordered, [*ordered[1:], len(instructions)])]
    following = []
    for block in blocks:
        last = instructions[block[-1]]
        next_ones = [number[last.goal]] if last.goal is not None else []
        if last.falls_through and block.stop < len(instructions):
            next_ones.append(number[block.stop])
        following.append(next_ones)
    return blocks, following


def _natural_loops(following: list[list[int]]) -> dict[int, set[int]]:
    """Header -> body: blocks that come back to a block which every way to them goes through."""
    before: list[list[int]] = [[] for _ in following]
    for a, goals in enumerate(following):
        for b in goals:
            before[b].append(a)
    order, seen = [], {0}
    stack = [(0, iter(following[0]))]
    while stack:
        block, goals = stack[-1]
        new = next((g for g in goals if g not in seen), None)
        if new is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(following[new])))
    order.reverse()
    dominators = {b: set(seen) for b in seen}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new_set = {b} | set.intersection(*(dominators[p] for p in before[b] if p in seen))
            if new_set != dominators[b]:
                dominators[b], changed = new_set, True
    bodies: dict[int, set[int]] = {}
    for a in seen:
        for header in following[a]:
            if header in dominators[a]:
                body = bodies.setdefault(header, {header})
                todo = [a]
                while todo:
                    b = todo.pop()
                    if b not in body:
                        body.add(b)
                        todo += [p for p in before[b] if p in seen]
    return bodies


TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
EXPONENTIAL = ("MUFU.EX2", "v_exp_f32")
Cost = tuple[int, int]  # tensor-core instructions, minus all instructions: the larger the better


def _cheapest_trip(
    header: int,
    body: set[int],
    inside: dict[int, set[int]],
    done: dict[int, Loop],
    instructions: list[Instruction],
    blocks: list[range],
    following: list[list[int]],
) -> Loop:
    """From the header back to it: most tensor-core instructions, then fewest of all.

    Of two alternatives LLVM's code for AMD may go by both, each with a branch around it, and then
    there is a way that takes neither. So a way with exponentials goes before all without.
    """
    inner_of = {b: h for h, inner in inside.items() for b in inner}

    def opcodes(node: int) -> Counter[str]:
        if node in inside:
            return done[node].opcodes()
        return Counter(instructions[i].opcode for i in blocks[node])

    def goals(node: int) -> list[int]:
        members = inside.get(node, {node})
        ahead = {g for b in members for g in following[b] if g in body and g not in members}
        return sorted({inner_of.get(g, g) for g in ahead})

    # Of each node the best ways from there to the header, without and with exponentials.
    best: dict[int, dict[bool, tuple[Cost, list[int]]]] = {}

    def search(node: int) -> dict[bool, tuple[Cost, list[int]]]:
        if node in best:
            return best[node]
        best[node] = {}  # on the way: a way that comes by here again is none
        names = opcodes(node)
        tensor = sum(n for o, n in names.items() if o.startswith(TENSOR))
        fewest = -sum(names.values())
        exponential = any(o.startswith(EXPONENTIAL) for o in names)
        found: dict[bool, tuple[Cost, list[int]]] = {}
        if any(header in following[b] for b in inside.get(node, {node})):
            found[exponential] = (tensor, fewest), [node]
        for goal in goals(node):
            for rest, ((t, f), way) in search(goal).items() if goal != header else ():
                cost, kind = (tensor + t, fewest + f), exponential or rest
                if kind not in found or cost > found[kind][0]:
                    found[kind] = cost, [node, *way]
        best[node] = found
        return found

    ways = search(header)
    way = (ways.get(True) or ways.get(False) or ((0, 0), [header]))[1]
    own: Counter[str] = Counter()
    for node in way:
        if node not in inside:
            own.update(opcodes(node))
    return Loop(own, [done[node] for node in way if node in inside])
