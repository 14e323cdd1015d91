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
    assert kernel.accesses() == [Access(frozenset({1}), 16, False, after, 0)]
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
