"""What a service or a container may use of the machine's memory is read from its control groups."""

from pathlib import Path

import pytest

from vllm_multilora.slots.budget import machine_memory

MIB = 1 << 20
WHOLE = machine_memory(Path("/nowhere"), Path("/nowhere"))


def limited(root: Path, own: str, limits: dict[str, str]) -> int:
    for name, text in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "own").write_text(own)
    return machine_memory(root, root / "own")


SERVICE = "0::/system.slice/vllm.service\n"


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        pytest.param(
            SERVICE,
            {"memory.max": "max", "system.slice/vllm.service/memory.max": f"{64 * MIB}\n"},
            64 * MIB,
            id="MemoryMax-of-the-service",
        ),
        pytest.param(
            SERVICE,
            {
                "system.slice/memory.max": f"{32 * MIB}",
                "system.slice/vllm.service/memory.max": f"{64 * MIB}",
            },
            32 * MIB,
            id="MemoryMax-of-its-slice",
        ),
        pytest.param("0::/\n", {"memory.max": f"{16 * MIB}"}, 16 * MIB, id="container"),
        pytest.param(
            "0::/docker/abc\n", {"memory.max": f"{16 * MIB}"}, 16 * MIB, id="container-sees-itself"
        ),
        pytest.param(
            "5:cpu:/x\n4:memory,hugetlb:/system.slice/vllm.service\n",
            {"memory/system.slice/vllm.service/memory.limit_in_bytes": f"{8 * MIB}"},
            8 * MIB,
            id="version-1",
        ),
        pytest.param(
            "4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": f"{(1 << 63) - 4096}"},
            WHOLE,
            id="version-1-without-a-limit",
        ),
        pytest.param(
            "4:name=memory-watch:/x\n",
            {"memory/x/memory.limit_in_bytes": f"{MIB}"},
            WHOLE,
            id="version-1-of-another-kind",
        ),
        pytest.param(
            "0::/system.slice/vllm@a:b.service\n",
            {"system.slice/vllm@a:b.service/memory.max": f"{64 * MIB}"},
            64 * MIB,
            id="a-colon-in-its-name",
        ),
        pytest.param(
            "0::/../other\n", {"memory.max": f"{16 * MIB}"}, 16 * MIB, id="container-beside-it"
        ),
        pytest.param(
            "nonsense\n",
            {"memory/memory.limit_in_bytes": f"{16 * MIB}"},
            16 * MIB,
            id="container-of-version-1",
        ),
        pytest.param(
            "0::/../other\n", {"../other/memory.max": f"{MIB}"}, WHOLE, id="outside-the-container"
        ),
        pytest.param("nonsense\n", {}, WHOLE, id="nonsense"),
        pytest.param(SERVICE, {"memory.max": "max"}, WHOLE, id="no-limit"),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, own: str, limits: dict[str, str], expected: int
) -> None:
    root = tmp_path / "groups"
    root.mkdir()
    assert limited(root, own, limits) == expected
