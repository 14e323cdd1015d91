"""An adapter's files are opened once, below the allowed roots, and read once, unchanged."""

import ctypes
import errno
import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from vllm_multilora.adapters.adapter_errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.files import one_pass
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.problems import Code

from ..checkpoints import MODULES, layout, weights, write
from ..corpus.headers import join, split
from ..packs import take

RANKS = {module: 4 for module, _, _ in MODULES}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "roots" / "adapter", weights(RANKS), rank=4, alpha=8)


def digest_of(folder: Path, **rules) -> str:
    with open_adapter(str(folder), Rules(**rules)) as source:
        return source.check([layout()]).read(None, None).digest


def refused(folder: Path, *roots: Path) -> list[Code]:
    with (
        pytest.raises((AdapterFormatError, AdapterNotFoundError)) as caught,
        open_adapter(str(folder), Rules(tuple(map(str, roots)))) as source,
    ):
        source.check([layout()])
    return [problem.code for problem in caught.value.problems]


class Reads:
    """The bytes of files that are read, by `os.pread`, `os.preadv`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: dict[int, list[tuple[int, int]]] = {}
        pread, preadv = os.pread, os.preadv

        def counted_pread(descriptor: int, count: int, offset: int) -> bytes:
            content = pread(descriptor, count, offset)
            self._note(descriptor, offset, len(content))
            return content

        def counted_preadv(descriptor: int, buffers: list, offset: int) -> int:
            count = preadv(descriptor, buffers, offset)
            self._note(descriptor, offset, count)
            return count

        monkeypatch.setattr(os, "pread", counted_pread)
        monkeypatch.setattr(os, "preadv", counted_preadv)

    def _note(self, descriptor: int, offset: int, count: int) -> None:
        spans = self.spans.setdefault(os.fstat(descriptor).st_ino, [])
        spans.append((offset, offset + count))


@pytest.mark.parametrize("span_bytes", [50, 1 << 20])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_byte_is_read_exactly_once(folder, monkeypatch, ranks, span_bytes):
    """Whatever number of workers it is packed for."""
    monkeypatch.setattr(one_pass, "SPAN_BYTES", span_bytes)
    reads = Reads(monkeypatch)
    take(folder, *[layout(torch.bfloat16)] * ranks)
    for name in (CONFIG, WEIGHTS):
        status = (folder / name).stat()
        spans = sorted(reads.spans[status.st_ino])
        assert spans[0][0] == 0
        assert spans[-1][1] == status.st_size
        assert all(end == begin for (_, end), (begin, _) in pairwise(spans))


def test_descriptors_are_closed(folder):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    with open_adapter(str(folder), Rules()):
        assert descriptors() == before + 2
    assert descriptors() == before
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterNotFoundError):
        digest_of(folder)
    (folder / WEIGHTS).symlink_to("/etc/hostname")
    assert refused(folder, folder.parent) == [Code.NOT_ALLOWED]
    assert descriptors() == before


@pytest.mark.parametrize(
    "path", ["no\0path", "x" * 5000, "x" * 300, "\ud800"], ids=["nul", "long", "name", "utf"]
)
def test_what_is_no_path_is_refused(path):
    with pytest.raises(AdapterFormatError, match="not a path"):
        open_adapter(path, Rules())


def test_an_adapter_in_a_folder_below_is_pointed_out(folder):
    with (
        pytest.raises(AdapterNotFoundError, match=rf"such as {folder}") as caught,
        open_adapter(str(folder.parent), Rules()) as source,
    ):
        source.check([layout()])
    # But nothing of what links lead to.
    (folder.parent / "link").symlink_to(folder)
    assert "link" not in str(caught.value)


# What changes while it is read.


@pytest.mark.parametrize("what", ["a-bit", "half-a-file", "configuration"])
def test_a_file_written_to_meanwhile_is_an_error_and_not_called_bad(folder, what):
    """Even if its times are set back: the time of the change of the inode is what nobody can set.

    What is found in a file that is being written is no fault of what it is going to be.
    """
    path = folder / (CONFIG if what == "configuration" else WEIGHTS)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    if what == "half-a-file":
        content[-64:] = b"\xff" * 64  # NaN
    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([layout()])
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(AdapterReadError, match="written to while it was being read") as caught:
            intake.read(None, None)
    [problem] = caught.value.problems
    assert problem.code == Code.FILE_CHANGED
    assert path.name in problem.message


def test_a_file_truncated_meanwhile_is_an_error(folder):
    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([layout()])
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 8)
        name = f"{MODULES[3][0]}.lora_B.weight"
        with pytest.raises(AdapterReadError, match=rf"ends inside \S+{name}.*truncated"):
            intake.read(None, None)


@pytest.mark.parametrize("what", ["files", "folder"])
def test_files_replaced_meanwhile_are_read_on_as_they_were(folder, tmp_path, what):
    """As those do who write an adapter under another name and rename it into place."""
    expected = digest_of(folder)
    other = write(tmp_path / "other", weights(RANKS, seed=1), rank=4, alpha=9)
    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([layout()])
        if what == "files":
            for name in (CONFIG, WEIGHTS):
                (other / name).rename(folder / name)
        else:
            folder.rename(tmp_path / "moved")
            other.rename(folder)
        assert intake.read(None, None).digest == expected
    assert digest_of(folder) != expected


def test_the_version_tells_states_apart(folder):
    def version() -> str:
        with open_adapter(str(folder), Rules()) as source:
            return source.version

    versions = [version()]
    assert version() == versions[0]
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        status = path.stat()
        content = path.read_bytes()
        path.write_bytes(content[:-1] + content[-1:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        versions.append(version())
    assert len(set(versions)) == 3


def test_a_read_error_is_reported(folder, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([layout()])
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(AdapterReadError, match="Input/output error"):
            intake.read(None, None)


# Where files may lie.


def test_links_may_lead_anywhere_below_the_roots(folder, tmp_path):
    """As a hub's cache has it: a folder of links to files elsewhere in the cache."""
    snapshot = tmp_path / "roots" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(Path("..") / ".." / "adapter" / name)
    (tmp_path / "link").symlink_to(snapshot)
    roots = (str(tmp_path / "roots"),)
    assert digest_of(tmp_path / "link", allowed_roots=roots) == digest_of(folder)


@pytest.mark.parametrize("what", ["folder", "parent", CONFIG, WEIGHTS])
def test_a_link_to_outside_is_refused(folder, tmp_path, what):
    outside = write(tmp_path / "outside" / "adapter", weights(RANKS), rank=4, alpha=8)
    roots = tmp_path / "roots"
    if what == "folder":
        (roots / "link").symlink_to(outside)
        path = roots / "link"
    elif what == "parent":
        (roots / "link").symlink_to(outside.parent)
        path = roots / "link" / "adapter"
    else:
        (folder / what).unlink()
        (folder / what).symlink_to(outside / what)
        path = folder
    assert refused(path, roots) == [Code.NOT_ALLOWED]
    assert refused(path / ".." / ".." / "outside" / "adapter", roots) == [Code.NOT_ALLOWED]
    assert refused(roots, roots) == [Code.NOT_ALLOWED]  # the root itself is nobody's adapter
    digest_of(path, allowed_roots=(str(roots), str(tmp_path / "outside")))


def test_what_exists_outside_the_roots_cannot_be_found_out(folder, tmp_path):
    """A folder, a file, and nothing look alike there, for the folder and for its files."""
    roots = tmp_path / "roots"
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for target in ("there", "file", "nothing"):
        (roots / f"to-{target}").symlink_to(tmp_path / target)
        for path in (tmp_path / target, roots / f"to-{target}", f"{roots}/../{target}"):
            assert refused(path, roots) == [Code.NOT_ALLOWED]
        weights_file = folder / "adapter_model.safetensors"
        weights_file.unlink()
        weights_file.symlink_to(tmp_path / target)
        assert refused(folder, roots) == [Code.NOT_ALLOWED]


@pytest.mark.parametrize("what", ["folder", WEIGHTS])
def test_a_link_that_is_flipped_all_the_time_never_leads_outside(folder, tmp_path, what):
    """10,000 exchanges of a link to an allowed target and one to a forbidden."""
    outside = write(tmp_path / "outside", weights(RANKS, seed=1), rank=4, alpha=8)
    root = folder.parent
    place = root if what == "folder" else folder
    inside = folder if what == "folder" else folder.rename(root / "kept") / WEIGHTS
    target = outside if what == "folder" else outside / WEIGHTS
    if what != "folder":
        place = root / "adapter"
        place.mkdir()
        (place / CONFIG).symlink_to(root / "kept" / CONFIG)
    flipped, other = place / ("flipped" if what == "folder" else WEIGHTS), place / "other"
    flipped.symlink_to(inside)
    other.symlink_to(target)
    path = flipped if what == "folder" else place
    rules = Rules((str(root),))
    with open_adapter(str(path), rules) as source:
        allowed = source.version
    exchange = ctypes.CDLL(None, use_errno=True).renameat2
    if exchange(AT_FDCWD, bytes(flipped), AT_FDCWD, bytes(other), RENAME_EXCHANGE):
        pytest.skip(f"no RENAME_EXCHANGE here: {os.strerror(ctypes.get_errno())}")

    def flip() -> None:
        for _ in range(10_000):
            exchange(AT_FDCWD, bytes(flipped), AT_FDCWD, bytes(other), RENAME_EXCHANGE)

    thread = threading.Thread(target=flip)
    thread.start()
    opened = denied = other_errors = 0
    while thread.is_alive() or not opened or not denied:
        if not thread.is_alive():
            flip_once = (AT_FDCWD, bytes(flipped), AT_FDCWD, bytes(other), RENAME_EXCHANGE)
            exchange(*flip_once)
        try:
            with open_adapter(str(path), rules) as source:
                assert source.version == allowed
                opened += 1
        except AdapterFormatError as error:
            denied += [problem.code for problem in error.problems] == [Code.NOT_ALLOWED]
            other_errors += [problem.code for problem in error.problems] != [Code.NOT_ALLOWED]
    thread.join()
    assert not other_errors


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_refused_without_waiting(folder, kind, name):
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert refused(folder) == [Code.NOT_A_FILE]


def test_a_device_is_not_even_opened_for_reading(folder, monkeypatch):
    """Some do something when they are opened."""
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")
    opened = []
    real = os.open

    def noted(path, flags, *args, **options):
        opened.append((str(path), flags))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", noted)
    assert refused(folder) == [Code.NOT_A_FILE]
    assert [flags & os.O_PATH for path, flags in opened if path == CONFIG] == [os.O_PATH]
    assert len([path for path, _ in opened if path.startswith("/proc/self/fd/")]) == 1  # weights


# Which values slots can hold.


def overflow(folder: Path, dtype: torch.dtype = torch.float32, **rules) -> list:
    with open_adapter(str(folder), Rules(**rules)) as source:
        intake = source.check([layout(dtype)])
        with pytest.raises(AdapterFormatError) as caught:
            intake.read(None, None)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("b", "alpha", "found"),
    [
        (0.0, 4e300, "the scaling 1e+300"),  # 0 * infinity is NaN in a slot
        (1e-6, 4e44, "the scaling 1e+44"),  # 1e38 in exact arithmetic
        (3e38, 8, "values up to 3e+38, times the scaling 2"),
    ],
)
def test_scaled_values_are_judged_as_slots_hold_them(tmp_path, b, alpha, found):
    module = MODULES[0][0]
    tensors = weights({module: 4})
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name].fill_(b)
    [problem] = overflow(write(tmp_path / "a", tensors, rank=4, alpha=alpha))
    assert (problem.code, problem.where) == (Code.OVERFLOW, name)
    assert problem.found == found


def test_values_that_no_worker_here_keeps_are_judged_too(tmp_path):
    """Another machine's workers keep them: all must agree that the adapter is refused."""
    module, inputs, outputs = MODULES[0]
    tensors = weights({module: 4})
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][-1, -1] = float("nan")
    folder = write(tmp_path / "a", tensors, rank=4, alpha=4)
    whole = layout()
    half = layout(
        slices=(type(whole.slices[0])(module, 0, inputs, outputs, (0, inputs), (0, outputs // 2)),)
    )
    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([half])
        with pytest.raises(AdapterFormatError, match=r"1 of 160 values NaN .* at \[39, 3\]"):
            intake.read(None, None)


def test_layouts_that_differ_in_ranges_only_say_a_problem_once(tmp_path):
    tensors = weights({MODULES[0][0]: 4})
    tensors["nonsense"] = torch.zeros(3)
    folder = write(tmp_path / "a", tensors, rank=4, alpha=4)
    narrow = layout(max_rank=2)
    with open_adapter(str(folder), Rules()) as source, pytest.raises(AdapterFormatError) as caught:
        source.check([layout(), layout(torch.bfloat16), narrow])
    codes = [problem.code for problem in caught.value.problems]
    assert sorted(codes) == sorted([Code.UNKNOWN_TENSOR, Code.RANK_TOO_LARGE])


# What tells adapters apart.


def test_the_digest_does_not_depend_on_the_order_of_keys_or_on_names_of_files(folder, tmp_path):
    config = '{"lora_alpha": 8.0, "r": 4, "target_modules": [], "base_model_name_or_path": "x"}'
    other = tmp_path / "other name"
    other.mkdir()
    (other / CONFIG).write_text(config)
    header, data = split((folder / WEIGHTS).read_bytes())
    text = json.dumps(dict(reversed(header.items()))).encode()
    (other / WEIGHTS).write_bytes(join(text, data))
    assert digest_of(other) == digest_of(folder)
    assert len(digest_of(folder)) == 64


def test_the_digest_stays_what_it_was_in_earlier_versions(tmp_path):
    """Operators pin adapters by it; so a plain one's has nothing of what later kinds have."""
    tensors = {name: torch.full_like(each, 0.5) for name, each in weights(RANKS).items()}
    expected = "f8141ac153882685d73800ed6049651e2fabf16eec50a1700241dac776d3e791"
    assert digest_of(write(tmp_path / "a", tensors, rank=4, alpha=8)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 9},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 2}},
        {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [1, 2]},
        {"seed": 1},
        {"one_bit": True},
    ],
    ids=str,
)
def test_the_digest_changes_with_what_is_applied(folder, tmp_path, change):
    ours = ("alpha", "seed", "one_bit")
    config = {key: value for key, value in change.items() if key not in ours}
    tensors = weights(RANKS, seed=change.get("seed", 0))
    if change.get("one_bit"):
        next(reversed(tensors.values())).view(torch.int32)[-1, -1] ^= 1
    other = write(tmp_path / "other", tensors, rank=4, alpha=change.get("alpha", 8), **config)
    assert digest_of(other) != digest_of(folder)


def test_the_order_of_patterns_counts(tmp_path):
    """The first that fits decides."""
    digests = set()
    for patterns in ({"q_proj": 2, ".*": 3}, {".*": 3, "q_proj": 2}):
        folder = tmp_path / str(len(digests))
        write(folder, weights(RANKS), rank=4, alpha=8, alpha_pattern=patterns)
        digests.add(digest_of(folder))
    assert len(digests) == 2
