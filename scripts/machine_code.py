"""Two faults of compiled kernels that no result on small inputs need show.

- `repeated_additions`: an atomic addition that a thread makes more than once. Of a tensor with a
  dimension of 1, a thread of a Gluon kernel may hold an element several times.
- `unset_registers`: machine code for sm_90 that reads a uniform register which some path there has
  not set. ptxas 12.8 has moved the address of a wgmma operand, common to two loops, in front of
  the first, which may be left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

_ADDITION = re.compile(r"(?:atom|red)\.\S*add\S* (?:%r\d+, )?\[ (\S+) \+ \d+ \], (%r\w+);")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
# Beginnings of opcodes that set a uniform register, and of some that look so and do not.
_SETS = ("U", "R2UR", "S2UR", "CS2UR", "REDUX")
_SETS_NOT = ("UTMA", "UBLKCP", "UISETP", "UPLOP3")
_PARAMETERS = frozenset((4, 5, 63))  # set before the first instruction; UR63 is URZ
_ALL = frozenset(range(64))


def repeated_additions(ptx: str) -> int:
    """How many atomic additions in PTX are of an address and a value that another is of."""
    found = _ADDITION.findall(ptx)
    return len(found) - len(set(found))


def disassembled(cubin: bytes, cuobjdump: str) -> str:
    """SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-sass", file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


class _Instruction(NamedTuple):
    address: int
    guarded: bool  # by a predicate
    opcode: str
    sets: frozenset[int]
    reads: frozenset[int]
    target: int | None  # of a branch


def unset_registers(sass: str) -> list[str]:
    """Instructions that may read a uniform register before it is set."""
    lines = [line for line in sass.splitlines() if _INSTRUCTION.match(line)]
    code = [_parse(line) for line in lines]
    places = {instruction.address: i for i, instruction in enumerate(code)}
    # Which registers are set on every path to an instruction.
    known: list[frozenset[int] | None] = [None] * len(code)
    entries = [(0, _PARAMETERS)]
    while entries:
        work = [entries.pop()]
        while work:
            i, arriving = work.pop()
            before = known[i]
            after = arriving if before is None else before & arriving
            if after == before:
                continue
            known[i] = after
            x = code[i]
            leaving = after | x.sets
            if x.target is not None:
                work.append((places[x.target], leaving))
            ends = x.target is not None or x.opcode.startswith(("EXIT", "RET", "BRX"))
            if (x.guarded or not ends) and i + 1 < len(code):
                work.append((i + 1, leaving))
        # What only indirect branches reach: nothing is known of what was set before.
        unreached = next((i for i, state in enumerate(known) if state is None), None)
        if unreached is not None:
            entries.append((unreached, _ALL))
    return [
        line.strip()
        for line, x, state in zip(lines, code, known, strict=True)
        if x.reads - (state or _ALL) - _PARAMETERS
    ]


def _parse(line: str) -> _Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None
    address, guard, opcode, rest = match.groups()
    operands = [operand.strip() for operand in rest.split(",")]
    setting = -1
    if opcode.startswith(_SETS) and not opcode.startswith(_SETS_NOT):
        setting = int(bool(re.match(r"U?P", operands[0])))  # behind a predicate that is also set
    sets: set[int] = set()
    reads: set[int] = set()
    for n, operand in enumerate(operands):
        for register in map(int, re.findall(r"\bUR(\d+)", operand)):
            if n == setting:
                wide = ".64" in opcode or "WIDE" in opcode
                sets |= {register, register + 1} if wide else {register}
            elif "gdesc" in operand:  # of both operands of a product, or the right one's
                one = re.match(r"R\d+", operands[1]) is not None
                reads |= set(range(register, register + (2 if one else 4)))
            else:
                reads.add(register)
    branch = re.search(r"\b0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
    conditional = guard is not None or (branch is not None and operands[0].lstrip("!")[:1] in "UP")
    target = None if branch is None else int(branch.group(1), 16)
    return _Instruction(
        int(address, 16), conditional, opcode, frozenset(sets), frozenset(reads), target
    )
