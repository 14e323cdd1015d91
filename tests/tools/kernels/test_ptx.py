"""What is read from a kernel's PTX: who is accessed, how wide, and whether after the wait."""

import pytest

from tools.kernels.measure.compiled.ptx import Access, Ptx

HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1, .param .u32
    kernel_param_2)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r1, [kernel_param_2];
"""
LOAD = "\tld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 0 ];\n"
WAIT = "\tgriddepcontrol.wait ;\n"


def ptx(body: str) -> Ptx:
    return Ptx(f"{HEAD}{body}\tret;\n}}\n")


def access(
    *parameters: int, size: int = 16, store: bool = False, after: bool = False, loads: int = 0
) -> Access:
    return Access(frozenset(parameters), size, store, after, loads)


def test_an_address_leads_to_the_parameters_that_it_is_computed_from():
    kernel = ptx(
        "\tmad.wide.s32 	%rd3, %r1, 4, %rd1;  // offset\n"
        "\t@%p1 ld.global.b32 { %r2 }, [ %rd3 + 0 ];\n"
        "\tmad.wide.s32 	%rd4, %r2, 4, %rd2;\n"  # by what was loaded: not where from
        "\tcp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r7;\n"
        "\tcp.async.commit_group;\n"
        "\tst.global.v2.b16 	[ %rd2 + 8 ], { %rs1, %rs2 };\n"
    )
    assert kernel.accesses() == [
        access(0, 2, size=4),
        access(1, loads=1),
        access(1, size=4, store=True),
    ]


def test_addresses_that_pass_through_shared_memory_may_be_any_of_those_there():
    kernel = ptx(
        "\tst.shared.b64 	[%r8], %rd1;\n"
        "\tst.shared.v2.b32 	[%r8], {%r1, %r1};\n"
        "\tld.shared.v2.b64 	{%rd5, %rd6}, [%r8];\n"
        "\tld.global.b32 { %r2 }, [ %rd6 + 0 ];\n"
    )
    assert kernel.accesses() == [access(0, size=4)]


FIRST, SECOND = (f"\tld.global.b32 {{ {r} }}, [ %rd1 + 0 ];\n" for r in ("%r10", "%r11"))
USE = "\tmad.wide.s32 	%rd3, %r10, 4, %rd2;\n"
LAST = "\tld.global.b32 { %r12 }, [ %rd3 + 0 ];\n"
LOADS_BEFORE = {
    "beside": (FIRST + SECOND, 0),
    "by its address": (FIRST + USE + LAST, 1),
    "by two beside each other": (f"{FIRST}{SECOND}\tadd.s32 	%r10, %r10, %r11;\n{USE}{LAST}", 1),
    "by its predicate": (f"{FIRST}\tsetp.lt.s32 	%p1, %r10, 1;\n\t@%p1 {LAST.strip()}\n", 1),
    "by a branch": (
        f"{FIRST}\tsetp.lt.s32 	%p1, %r10, 1;\n\t@%p1 bra $L1;\n\tbar.sync 	0;\n$L1:\n{LAST}",
        1,
    ),
    "on the shorter of two ways": (
        f"{FIRST}\tmov.b32 	%r20, %r1;\n\t@%p9 bra $L1;\n\tmov.b32 	%r20, %r10;\n$L1:\n"
        f"\tmad.wide.s32 	%rd3, %r20, 4, %rd2;\n{LAST}",
        0,
    ),
    "through shared memory": (
        f"{FIRST}\tst.shared.b32 	[%r8], %r10;\n\tld.shared.b32 	%r10, [%r8];\n{USE}{LAST}",
        1,
    ),
    "in the first pass of a loop": (f"{FIRST}{USE}$L1:\n{LAST}{USE}\t@%p9 bra $L1;\n", 1),
    "one after the other": (
        f"{FIRST}{USE}\tld.global.b32 {{ %r10 }}, [ %rd3 + 0 ];\n{USE}{LAST}",
        2,
    ),
}


@pytest.mark.parametrize(("body", "loads"), LOADS_BEFORE.values(), ids=LOADS_BEFORE)
def test_loads_are_counted_that_another_one_waits_for(body, loads):
    assert ptx(body).accesses()[-1].loads_before == loads


def test_a_loop_carries_an_address_backwards():
    kernel = ptx(
        "$L1:\n"
        "\tld.global.b16 { %rs1 }, [ %rd7 + 0 ];\n"
        "\tadd.s64 	%rd7, %rd8, 2;\n"
        "\tmov.b64 	%rd8, %rd2;\n"
        "\t@%p1 bra 	$L1;\n"
    )
    assert kernel.accesses() == [access(1, size=2)]


WAITS = {
    "before": (WAIT + LOAD, True, False),
    "after": (LOAD + WAIT, False, False),
    "never": (LOAD, False, True),
    "only-if": (f"\t@%p1 bra $L1;\n{WAIT}$L1:\n{LOAD}", False, True),
    "on-both-ways": (
        f"\t@%p1 bra $L1;\n{WAIT}\tbra.uni $L2;\n$L1:\n{WAIT}$L2:\n{LOAD}",
        True,
        False,
    ),
    "predicated": (f"\t@%p1{WAIT}{LOAD}".replace("\t@%p1\t", "\t@%p1 "), False, True),
    "later-in-a-loop": (f"$L1:\n{LOAD}{WAIT}\t@%p1 bra $L1;\n", False, False),
    "in-a-loop-before": (f"{WAIT}$L1:\n{LOAD}\t@%p1 bra $L1;\n", True, False),
    "early-return": (f"\t@%p1 ret;\n{WAIT}{LOAD}", True, True),
}


@pytest.mark.parametrize(("body", "after", "may_end"), WAITS.values(), ids=WAITS)
def test_a_load_is_after_the_wait_if_every_way_to_it_is(body, after, may_end):
    kernel = ptx(body)
    assert kernel.accesses() == [access(1, after=after)]
    assert kernel.may_end_unwaited == may_end


def test_tensor_core_and_atomic_instructions_are_counted():
    kernel = ptx(
        "\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };\n"
        "\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1;\n"
        "\tatom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;\n"
        "\tred.global.add.f32 [ %rd1 + 0 ], %r2;\n"
        "\tredux.sync.add.s32 %r1, %r2, 0xffffffff;\n"
    )
    assert (kernel.tensor_core, kernel.atomics) == (2, 2)


SUMS, SHARED = "{%r1, %r2}", "%rd2, 1, 1, 1, 0"
FROM_REGISTERS = f"\twgmma.mma_async.sync.aligned.m64n8k16 {SUMS}, {{%r3, %r4}}, {SHARED};\n"
FROM_SHARED = f"\twgmma.mma_async.sync.aligned.m64n8k16 {SUMS}, %rd1, {SHARED};\n"
COMMIT = "\twgmma.commit_group.sync.aligned;\n"
ALL, ALL_BUT_ONE = (f"\twgmma.wait_group.sync.aligned {n};\n" for n in (0, 1))


@pytest.mark.parametrize(
    ("body", "in_flight"),
    [
        (FROM_REGISTERS + FROM_REGISTERS + COMMIT + ALL, 0),
        (FROM_REGISTERS + FROM_REGISTERS + COMMIT + ALL_BUT_ONE, 2),
        (FROM_REGISTERS + COMMIT + ALL + FROM_REGISTERS + COMMIT, 1),
        (FROM_SHARED + COMMIT + ALL_BUT_ONE, 0),
    ],
    ids=["waited for", "waited for later", "one of two", "from shared memory"],
)
def test_products_that_read_registers_while_the_program_goes_on_are_counted(body, in_flight):
    assert ptx(body).in_flight == in_flight


def test_a_jump_into_the_unknown_is_refused():
    with pytest.raises(ValueError, match=r"call\.uni .* leads where nobody knows"):
        ptx("\tcall.uni (%r1), helper, (%r2);\n")
