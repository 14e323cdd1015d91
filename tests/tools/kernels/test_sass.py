"""A kernel's main loops, as they are read from machine code."""

import pytest

from tools.kernels.measure.compiled.sass import Counts, Sass

LOAD = "@P3 LDG.E.128 R24, desc[UR10][R34.64]"
COPY = "@!P0 LDGSTS.E.BYPASS.128 [R4], desc[UR10][R34.64]"
NARROW = "LDG.E R24, desc[UR10][R34.64]"
PRODUCT = "HMMA.16816.F32.BF16 R52, R56.reuse, R40, R52"
OTHER = "IMAD.MOV.U32 R2, RZ, RZ, R10"


def sass(*lines: str) -> Sass:
    """Machine code of these lines, labels among them; every instruction stalls for 3 cycles."""
    text, address = [], 0
    for line in lines:
        if line.startswith("."):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/    {line} ;    /* 0x00000a00ff017b82 */")
        text.append(f"                                  /* 0x{3 << 41:016x} */")
        address += 16
    return Sass("\n".join(text))


def test_a_loop_counts_what_a_warp_issues_in_one_pass():
    code = sass(
        OTHER, ".L_x_0:", LOAD, COPY, NARROW, PRODUCT, "@!P3 BRA `(.L_x_0)", PRODUCT, "EXIT"
    )
    assert code.main_loops() == [Counts(instructions=5, cycles=15, tensor_core=1, wide_loads=2)]


def test_a_loop_with_two_ways_counts_the_longer_one():
    for jump in ("@P0 BRA `(.L_x_1)", "BRA.U UP0, `(.L_x_1)"):
        code = sass(".L_x_0:", jump, LOAD, PRODUCT, ".L_x_1:", OTHER, "@P1 BRA `(.L_x_0)", "EXIT")
        assert code.main_loops() == [Counts(5, 15, 1, 1)]


def test_only_innermost_loops_with_tensor_core_products_are_main_loops():
    code = sass(
        ".L_x_0:",
        PRODUCT,
        ".L_x_1:",
        PRODUCT,
        "@P0 BRA `(.L_x_1)",
        ".L_x_2:",
        LOAD,
        "@P1 BRA `(.L_x_2)",
        ".L_x_3:",
        PRODUCT,
        OTHER,
        "@P1 BRA `(.L_x_3)",
        "@P2 BRA `(.L_x_0)",
        "EXIT",
    )
    assert code.main_loops() == [Counts(2, 6, 1, 0), Counts(3, 9, 1, 0)]


@pytest.mark.parametrize("line", ["BRX R4 -0x10", "CALL.REL.NOINC R8", "BRA R4"])
def test_a_branch_to_an_unknown_place_is_refused(line):
    with pytest.raises(ValueError, match="leads where nobody knows"):
        sass(OTHER, line, "EXIT")
