"""Reports the values of all processes of an engine to Prometheus, added up from their files."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from vllm_multilora.metrics import router_names
from vllm_multilora.metrics.definitions import ALL, BY_NAME, INFO, AdapterInfo, Definition, Kind
from vllm_multilora.metrics.recorder import MODEL_NAME
from vllm_multilora.metrics.request_lists import newest_lists
from vllm_multilora.metrics.series_file import (
    FileName,
    Key,
    UnreadableSeriesFileError,
    parse_key,
    read_series,
)
from vllm_multilora.metrics.value_folder import locked

logger = logging.getLogger(__name__)

_Labels = router_names.Labels
_Values = router_names.Values
_cached_key = lru_cache(maxsize=65_536)(parse_key)


class LoRACollector(Collector):
    """The LoRA metrics of one engine (with data parallelism: of all its parts).

    What was counted by a process that has ended still counts. What a gauge says holds only as long
    as its process lives, and of two processes with the same role the younger one's holds.

    A file that cannot be read is left out, and nothing raised here reaches the registry: whatever
    is wrong with these metrics, the others are shown.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._shows_lists = False
        self._has_failed = False

    def show(self, folder: Path) -> None:
        """From now on shows the values in this folder, and no longer those in another."""
        self.folder = folder

    def show_lists(self) -> None:
        """From now on shows `vllm:lora_requests_info` too, which vLLM does not any more."""
        self._shows_lists = True

    def describe(self) -> Iterable[Metric]:
        """All metrics without values: the registry asks for their names."""
        return [_empty(definition) for definition in (*ALL, *router_names.ALL)]

    def collect(self) -> Iterable[Metric]:
        if self.folder is None:
            return []
        try:
            with locked(self.folder, exclusively=False):
                lists = newest_lists(self.folder) if self._shows_lists else ()
                return [*_merge(self.folder), *lists]
        except FileNotFoundError:
            return []  # the engine is ending
        except Exception:
            if not self._has_failed:
                logger.exception("The LoRA metrics cannot be shown; the others are.")
            self._has_failed = True
            return []


def _merge(folder: Path) -> Iterator[Metric]:
    values: dict[str, dict[tuple[_Labels, Key], float]] = defaultdict(lambda: defaultdict(float))
    files = sorted(_files(folder), key=lambda entry: entry[0].writer.started)
    holders = {(name.role, name.engine): name for name, _ in files if not name.writer.is_dead()}
    for name, path in files:
        holds = holders.get((name.role, name.engine)) == name
        labels: _Labels = ()
        for key, value in _read(path):
            if key[0] == MODEL_NAME:
                engine = (("engine", name.engine),) if name.engine else ()
                labels = ((MODEL_NAME, key[1]), *engine)
            elif (definition := BY_NAME.get(key[0])) is not None and (definition.keeps or holds):
                values[key[0]][labels, key[1:]] += value
    for definition in ALL:
        if definition.name in values:
            yield _metric(definition, values[definition.name])
    for definition, of_routers in router_names.values_of(values):
        if of_routers:
            yield _metric(definition, of_routers)


def _files(folder: Path) -> Iterator[tuple[FileName, Path]]:
    for path in folder.glob(f"*{FileName.SUFFIX}"):
        try:
            yield FileName.parse(path.name), path
        except ValueError:
            continue  # none of ours


def _read(path: Path) -> list[tuple[Key, float]]:
    try:
        return [(_cached_key(key), value) for key, value in read_series(path)]
    except FileNotFoundError:
        return []  # the engine is ending
    except (OSError, UnreadableSeriesFileError, ValueError) as error:
        logger.warning("LoRA metrics of one process are left out: %s", error)
        return []


def _empty(definition: Definition) -> Metric:
    # The library knows counters by their name without `_total`.
    is_counter = definition.kind is Kind.COUNTER
    name = definition.name.removesuffix("_total") if is_counter else definition.name
    return Metric(name, definition.help, definition.kind.value)


def _metric(definition: Definition, values: _Values) -> Metric:
    metric = _empty(definition)
    if definition.kind is Kind.HISTOGRAM:
        _add_histograms(metric, definition, values)
        return metric
    for (common, own), value in sorted(values.items()):
        if definition is INFO:
            info = AdapterInfo.decode(value)
            if info is not None:
                labels = {**dict(common), "lora_name": own[0], **info.labels()}
                metric.add_sample(definition.name, labels, 1.0)
            continue
        labels = {**dict(common), **dict(zip(definition.labels, own, strict=True))}
        metric.add_sample(definition.name, labels, value)
    return metric


def _add_histograms(metric: Metric, definition: Definition, values: _Values) -> None:
    own_labels = len(definition.labels)
    series: dict[tuple[_Labels, Key], dict[str, float]] = defaultdict(dict)
    for (common, key), value in sorted(values.items()):
        series[common, key[:own_labels]][key[own_labels]] = value
    for (common, own), parts in series.items():
        labels = {**dict(common), **dict(zip(definition.labels, own, strict=True))}
        count = 0.0
        for bound in (*definition.buckets, float("inf")):
            count += parts.get(repr(bound), 0.0)
            bucket = {**labels, "le": floatToGoString(bound)}
            metric.add_sample(f"{definition.name}_bucket", bucket, count)
        metric.add_sample(f"{definition.name}_count", labels, count)
        metric.add_sample(f"{definition.name}_sum", labels, parts.get("sum", 0.0))


class Beside:
    """The LoRA metrics beside those of a registry, and in the place of those of the same name."""

    def __init__(self, collector: LoRACollector, registry: CollectorRegistry) -> None:
        self._collector, self._registry = collector, registry

    def collect(self) -> Iterator[Metric]:
        ours = list(self._collector.collect())
        names = {metric.name for metric in ours}
        yield from (metric for metric in self._registry.collect() if metric.name not in names)
        yield from ours
