"""`vllm-multilora calibrate`: measures what steps and loads of a running server cost."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_multilora import __version__
from vllm_multilora.toolbox.capacity.calibration import (
    FORMAT,
    Calibration,
    CalibrationError,
    Machine,
    Settings,
    check_writable,
    write_calibration,
)
from vllm_multilora.toolbox.clients.adapter_servers import fetch
from vllm_multilora.toolbox.clients.completions import Completions
from vllm_multilora.toolbox.clients.http_client import base_url, get_json, send
from vllm_multilora.toolbox.commands.shared_arguments import add_server
from vllm_multilora.wording import counted

_MUCH = 0.1  # as a residual; on a calm machine it is half of this


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser, "; nobody else may use it meanwhile")
    for flag in ("--max-num-seqs", "--max-num-batched-tokens"):
        parser.add_argument(flag, type=int, required=True, metavar="N", help="the server's setting")
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="drop adapters' files from the system's cache before they are loaded, so that loads "
        "read the disk (Linux; on the server's machine); by default the cache is left as it is",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        metavar="FILE",
        help="the file to write (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    # Afterwards, no adapter is cold any more: a second try would measure no loads.
    check_writable(arguments.output)
    calibration = calibrate(arguments)
    write_calibration(calibration, arguments.output)
    print(report(calibration, arguments.output))
    return 0


def calibrate(arguments: argparse.Namespace) -> Calibration:
    """Measures a server, as the flags say."""
    from vllm_multilora.toolbox.capacity.fitting import fit
    from vllm_multilora.toolbox.capacity.measuring import Measuring
    from vllm_multilora.toolbox.capacity.timing import Adapter, Timed

    seqs, tokens = arguments.max_num_seqs, arguments.max_num_batched_tokens
    if not 2 <= seqs <= tokens:
        raise CalibrationError(
            f"--max-num-seqs must be at least 2 and at most --max-num-batched-tokens, got {seqs} "
            f"and {tokens}"
        )
    url, key = base_url(arguments.url), arguments.api_key
    created = datetime.now(UTC).isoformat(timespec="seconds")
    listing = fetch(url, api_key=key)
    models = get_json(f"{url}/v1/models", api_key=key)["data"]
    base = [model for model in models if not model.get("parent")]
    if not base:
        raise CalibrationError(f"{url}/v1/models lists no base model")
    if "slots" not in listing:
        raise CalibrationError(
            f"{url} does not say how many slots it has: a tenant's key cannot calibrate, give the "
            f"server's with --api-key"
        )

    def plain(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        # Activated adapters answer only prompts that contain their invocations.
        return [row for row in rows if row["kind"] != "alora"]

    adapters = plain(listing["data"])
    cold = [row for row in adapters if row["state"] == "absent"]
    if adapters and not cold:
        raise CalibrationError(
            f"{url} has {counted(len(adapters), 'adapter')}, and all have been requested, so no "
            "load can be timed: restart the server, or register others that nobody has requested"
        )
    if arguments.from_disk:
        if any("path" not in row for row in cold):
            raise CalibrationError(
                f"--from-disk: {url} does not say where its adapters are: give an admin key with "
                f"--api-key"
            )
        forget_files(row["path"] for row in cold if row["path"] is not None)  # a blend has none

    def listed() -> list[Adapter]:
        rows = plain(fetch(url, api_key=key)["data"])
        return [Adapter(row["id"], row["state"], row["bytes"]) for row in rows]

    settings = Settings(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=base[0]["max_model_len"],
        max_loras=listing["slots"]["total"],
        max_cpu_loras=listing["cpu"]["adapters_limit"],
        cpu_cache_bytes=listing["cpu"]["bytes_limit"],
        kv_tokens=kv_tokens(send("GET", f"{url}/metrics", api_key=key)),
    )
    server = Timed(
        Completions(url, key),
        base[0]["id"],
        settings,
        listed,
        "disk" if arguments.from_disk else "page cache",
        lambda what: print(f"measuring {what}", file=sys.stderr, flush=True),
    )
    measured = Measuring(server)
    measured.run()
    found, beside = fit(measured.samples), measured.request_beside_s
    vllm = str(get_json(f"{url}/version", api_key=key)["version"])
    return Calibration(
        format=FORMAT,
        created=created,
        machine=machine(),
        versions={"vllm": vllm, "vllm-multilora": __version__},
        model=list(dict.fromkeys(name for model in base for name in (model["id"], model["root"]))),
        settings=settings,
        step_s=found.seconds,
        request_s=found.request_s,
        request_beside_s=found.request_s if beside is None else beside,
        residual=found.residual,
        loads=measured.loads,
        ranges=measured.ranges,
        adapters=measured.sizes,
    )


def forget_files(folders: Iterable[str]) -> None:
    """Has the system drop what it has cached of the files in folders.

    Raises:
        CalibrationError: They are not on this machine, or the system cannot.
    """
    for folder in folders:
        try:
            for path in filter(Path.is_file, Path(folder).iterdir()):  # no pipe, no folder
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except (OSError, AttributeError) as error:
            raise CalibrationError(f"--from-disk: {folder}: {error}") from error


def kv_tokens(metrics: str) -> int | None:
    """Tokens that the KV cache of one engine holds, from the text of `/metrics`."""
    info = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.M)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info.group(1))) if info else {}
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None


def machine() -> Machine:
    """The processor, its number of cores and the system."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M)
        processor = named.group(1) if named else processor
    system = f"{platform.system()} {platform.release()}"
    return Machine(processor=processor, cores=os.cpu_count() or 1, system=system)


def report(calibration: Calibration, path: Path) -> str:
    residual, loads, step = calibration.residual, calibration.loads, calibration.step_s
    lines = [
        f"wrote {path}: {residual.steps} steps of {calibration.model[0]}, fitted to "
        f"{residual.rms:.1%} (root mean square of all cases; the worst is {residual.worst:+.1%}, "
        f"{residual.worst_case})"
    ]
    if residual.rms > _MUCH:
        lines.append(
            "that is much: if others use the machine or the server, calibrate again without them"
        )
    lines += [
        f"a step takes {1000 * step['step']:.1f} ms, {1000 * step['prompt_token']:.3f} ms more for "
        f"each token of a prompt, {1000 * step['generated_token']:.2f} ms for each generated one",
        f"with adapters {1000 * step['adapters_at_all']:.1f} ms more, and "
        f"{1000 * step['adapter_mib']:.2f} ms for each MiB of them",
        "no load was timed: the server has no adapters, or none could be loaded"
        if loads is None
        else f"a load from {loads.source} takes {1000 * loads.fixed_s:.0f} ms and "
        f"{1000 * loads.s_per_mib:.1f} ms for each MiB; beside steps "
        f"{1000 * loads.beside_fixed_s:.0f} ms and {1000 * loads.beside_s_per_mib:.1f} ms",
    ]
    if loads is not None and (doubt := loads.doubt(calibration.ranges.load_bytes)):
        lines.append(
            f"these times of {counted(loads.measured, 'load')} are doubtful: {doubt}; restart the "
            "server and calibrate again, with more adapters and nobody else on the machine"
        )
    return "\n".join(lines)
