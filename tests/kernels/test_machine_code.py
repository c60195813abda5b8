"""The checks of compiled kernels find what they are for, and nothing in code without it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from machine_code import repeated_additions, unset_registers

ADDITION = "@%p1 atom.global.gpu.relaxed.add.f32 %r{0}, [ %rd{1} + 0 ], %r{2};\n"


def test_repeated_additions() -> None:
    once = ADDITION.format(1, 7, 20) + ADDITION.format(2, 7, 21) + ADDITION.format(3, 8, 20)
    assert repeated_additions(once) == 0
    assert repeated_additions(once + ADDITION.format(4, 7, 20)) == 1


# A loop that may be left out (0x20) sets UR12, which the code after it reads.
SKIPPED = """
        /*0010*/                   R2UR UR8, R4 ;
        /*0020*/               @P0 BRA 0x60 ;
        /*0030*/                   UIADD3 UR12, UP0, UR8, 0x2, URZ ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24 ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/                   {last} ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ("UIADD3 UR16, UP0, UR12, 0x2, URZ", True),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR10], R24", True),  # four registers, two to each
        ("UIADD3 UR16, UP0, UR8, 0x2, URZ", False),
        ("ULOP3.LUT UP0, UR12, UR8, 0x1, URZ, 0xc0, !UPT", False),  # sets it, behind a predicate
    ],
)
def test_unset_registers(last: str, found: bool) -> None:
    faults = unset_registers(SKIPPED.replace("{last}", last))
    assert [last in fault for fault in faults if "/*0060*/" in fault] == [True] * found


def test_what_only_an_indirect_branch_reaches() -> None:
    """Nothing is known of what comes before it."""
    sass = "  /*0010*/  BRX R2 -0x10 ;\n  /*0020*/  UIADD3 UR7, UR9, 0x1, URZ ;\n"
    assert unset_registers(sass) == []
