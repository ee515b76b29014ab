"""What a scrape of any one process says about the host, and how a cache is registered and taken out."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from llm_edge_cache import SharedSlab, metrics, series
from llm_edge_cache.regions import Counter, Histogram, Word

DOCS = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
NS = 1_000_000_000
ROUNDS = 2000

Samples = dict[str, float]


class Manager:
    """What a manager is to the metrics."""

    def __init__(self, slab: SharedSlab) -> None:
        self.slab = slab


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def managed(slab: SharedSlab, registry: CollectorRegistry) -> SharedSlab:
    """A slab that a manager exports to `registry`."""
    metrics.register(Manager(slab), registry)
    return slab


def _key(name: str, labels: Mapping[str, str]) -> str:
    return name + "".join(f",{label}={value}" for label, value in sorted(labels.items()))


def _scrape(registry: CollectorRegistry) -> Samples:
    """The samples by name and labels, as ``name,label=value,label=value``."""
    text = generate_latest(registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {_key(sample.name, sample.labels): sample.value for sample in samples}
    assert len(found) == len(samples), "a series is exported twice"
    return found


def _buckets(samples: Samples, histogram: str) -> dict[float, float]:
    """Counts by upper bound, in the order of the exposition."""
    found = {}
    for key, value in samples.items():
        if match := re.fullmatch(rf"{histogram}_bucket,le=([^,]+)(,tier=l1)?", key):
            found[float(match[1])] = value
    return found


# ---- what is exported ----


def test_the_names_of_the_contract_carry_what_the_manager_counted(
    managed: SharedSlab, registry: CollectorRegistry
) -> None:
    expected = {
        "llm_edge_cache_hits_total,tier=l1": Counter.L1_HITS,
        "llm_edge_cache_hits_total,tier=l2": Counter.L2_HITS,
        "llm_edge_cache_misses_total,tier=l1": Counter.L1_MISSES,
        "llm_edge_cache_misses_total,tier=l2": Counter.L2_MISSES,
        "llm_edge_cache_writes_total,tier=l1": Counter.L1_WRITES,
        "llm_edge_cache_writes_total,tier=l2": Counter.L2_WRITES,
    }
    for amount, counter in enumerate(expected.values(), start=1):
        managed._count(counter, amount)
    samples = _scrape(registry)
    assert {key: samples[key] for key in expected} == {key: at for at, key in enumerate(expected, start=1)}
    assert samples["llm_edge_requests_total"] == 1 + 3  # every request is a hit or a miss of L1


def test_every_counter_moves_one_sample_of_its_own(managed: SharedSlab, registry: CollectorRegistry) -> None:
    moved_by: dict[str, Counter] = {}
    before = _scrape(registry)
    for counter in Counter:
        managed._count(counter, 1_000_000)
        after = _scrape(registry)
        (moved,) = (key for key in after if after[key] != before[key] and key != "llm_edge_requests_total")
        assert moved not in moved_by, f"{counter} and {moved_by[moved]}"
        assert after[moved] == (1 if counter is Counter.MICROSECONDS_SAVED else 1_000_000)
        moved_by[moved] = counter
        before = after


@pytest.mark.parametrize(
    ("prefix", "series_name"),
    [
        ("L2_ERROR_", "llm_edge_cache_errors_total"),
        ("BAD_", "llm_edge_cache_bad_values_total"),
        ("DROPPED_", "llm_edge_cache_writes_dropped_total"),
    ],
)
def test_reasons_are_named_as_their_counters(
    managed: SharedSlab, registry: CollectorRegistry, prefix: str, series_name: str
) -> None:
    counters = [counter for counter in Counter if counter.name.startswith(prefix)]
    for counter in counters:
        managed._count(counter, 100 + counter)
    found = {key: value for key, value in _scrape(registry).items() if key.startswith(series_name) and value}
    tier = ",tier=l2" if prefix == "L2_ERROR_" else ""
    names = {counter: counter.name.removeprefix(prefix).lower() for counter in counters}
    assert found == {f"{series_name},reason={names[counter]}{tier}": 100 + counter for counter in counters}


def test_a_slab_by_itself_is_exported_with_its_own_counts(slab: SharedSlab, registry: CollectorRegistry) -> None:
    metrics.register(slab, registry)
    slab.set(b"k", b"v")
    slab.get(b"k")
    slab.get(b"k")
    slab.get(b"none")
    slab._count(Counter.L1_HITS, 100)  # a manager's: not what was asked for
    samples = _scrape(registry)
    assert samples["llm_edge_cache_hits_total,tier=l1"] == 2
    assert samples["llm_edge_cache_misses_total,tier=l1"] == 1
    assert samples["llm_edge_cache_writes_total,tier=l1"] == 1
    assert samples["llm_edge_requests_total"] == 3


def test_the_slab_s_state_is_exported(managed: SharedSlab, registry: CollectorRegistry) -> None:
    managed.set(b"k", b"v" * 1000)
    managed.set(b"l", b"v" * (managed.config.max_value_bytes or 0))
    managed.set(b"too large", b"v" * ((managed.config.max_value_bytes or 0) + 1))
    stats, samples = managed.stats(), _scrape(registry)
    assert samples["llm_edge_cache_size_entries,tier=l1"] == stats.entries == 2
    assert samples["llm_edge_cache_memory_bytes,tier=l1"] == stats.used_bytes > 1000
    assert samples["llm_edge_cache_limit_entries"] == stats.max_entries
    assert samples["llm_edge_cache_limit_bytes"] == stats.memory_bytes
    assert samples["llm_edge_cache_attached_processes"] == 1
    assert samples["llm_edge_cache_refusals_total"] == 1
    assert 0 < samples["llm_edge_cache_window_share"] <= 1


def test_evictions_rejections_and_expirations_are_those_of_the_slab(
    managed: SharedSlab, registry: CollectorRegistry
) -> None:
    for number in range(3 * (managed.config.max_entries or 0)):
        managed.set(b"%d" % number, b"v", ttl=1.0)
    managed._advance_clock(10.0)
    for number in range(100):
        managed.set(b"again %d" % number, b"v")
    stats, samples = managed.stats(), _scrape(registry)
    assert samples["llm_edge_cache_evictions_total"] == stats.evictions > 0
    assert samples["llm_edge_cache_admission_rejections_total"] == stats.admission_rejections
    assert samples["llm_edge_cache_expirations_total"] == stats.expirations > 0


def test_the_build_is_told(managed: SharedSlab, registry: CollectorRegistry) -> None:
    version = importlib.metadata.version("llm-edge-cache")
    (found,) = (key for key in _scrape(registry) if key.startswith("llm_edge_cache_build_info"))
    assert found.endswith(f",version={version}")


# ---- histograms ----


def test_latency_is_in_milliseconds_and_its_buckets_accumulate(
    managed: SharedSlab, registry: CollectorRegistry
) -> None:
    for elapsed_ns in (250, 251, 1_000_000, 3_600 * NS):
        managed._observe(Histogram.L1, elapsed_ns)
    samples = _scrape(registry)
    buckets = _buckets(samples, "llm_edge_cache_latency_ms")
    assert list(buckets) == [*(0.00025 * 2**at for at in range(30)), float("inf")]
    assert list(buckets.values()) == [1, *[2] * 11, *[3] * 18, 4]  # 1 ms lies below 250 ns * 2**12
    assert samples["llm_edge_cache_latency_ms_count,tier=l1"] == 4
    assert samples["llm_edge_cache_latency_ms_sum,tier=l1"] == pytest.approx(3_600_001.000501)
    assert samples["llm_edge_cache_latency_ms_count,tier=l2"] == 0


@pytest.mark.parametrize("histogram", [Histogram.COMPUTE, Histogram.WAIT])
def test_computing_and_waiting_are_in_seconds(
    managed: SharedSlab, registry: CollectorRegistry, histogram: Histogram
) -> None:
    managed._observe(histogram, 2 * NS)
    samples = _scrape(registry)
    name = f"llm_edge_cache_{histogram.name.lower()}_seconds"
    buckets = _buckets(samples, name)
    assert samples[f"{name}_sum"] == 2
    assert {bound for bound, count in buckets.items() if count} == {bound for bound in buckets if bound >= 2}


# ---- words ----


@pytest.mark.parametrize(("word", "is_open"), [(0, 0), (5, 0), (1023, 0), (1024, 1), (2**63, 1)])
def test_the_breaker_is_open_from_the_first_time_on(
    managed: SharedSlab, registry: CollectorRegistry, word: int, is_open: int
) -> None:
    managed._word_set(Word.BREAKER, word)
    assert _scrape(registry)["llm_edge_cache_breaker_open"] == is_open


def test_what_was_never_measured_has_no_sample(managed: SharedSlab, registry: CollectorRegistry) -> None:
    unmeasured = {
        "llm_edge_cache_size_entries,tier=l2",
        "llm_edge_cache_memory_bytes,tier=l2",
        "llm_edge_cache_l2_size_age_seconds",
        "llm_edge_cache_stream_contact_age_seconds",
    }
    assert not unmeasured & set(_scrape(registry))
    managed._word_set(Word.L2_SIZED_AT, time.monotonic_ns())
    managed._word_set(Word.CONTACT, time.monotonic_ns())
    assert unmeasured <= set(_scrape(registry))


def test_sampled_sizes_carry_their_age(managed: SharedSlab, registry: CollectorRegistry) -> None:
    managed._word_set(Word.L2_ENTRIES, 7)
    managed._word_set(Word.L2_BYTES, 7000)
    managed._word_set(Word.L2_SIZED_AT, time.monotonic_ns() - 60 * NS)
    managed._word_set(Word.CONTACT, time.monotonic_ns() + 3600 * NS)  # no clock of ours: shown as no age
    samples = _scrape(registry)
    assert samples["llm_edge_cache_size_entries,tier=l2"] == 7
    assert samples["llm_edge_cache_memory_bytes,tier=l2"] == 7000
    assert samples["llm_edge_cache_l2_size_age_seconds"] >= 60
    assert samples["llm_edge_cache_stream_contact_age_seconds"] == 0


# ---- registration ----


def test_registering_again_replaces(slab: SharedSlab, registry: CollectorRegistry) -> None:
    slab.get(b"none")
    metrics.register(slab, registry)
    assert _scrape(registry)["llm_edge_cache_misses_total,tier=l1"] == 1
    metrics.register(Manager(slab), registry)
    assert _scrape(registry)["llm_edge_cache_misses_total,tier=l1"] == 0


def test_another_slab_needs_another_registry(slab: SharedSlab, name: str, registry: CollectorRegistry) -> None:
    metrics.register(slab, registry)
    with SharedSlab(name + "-other", slab.config) as other:
        try:
            with pytest.raises(ValueError, match=f"'{name}-other' cannot be exported.* of slab '{name}'"):
                metrics.register(other, registry)
            metrics.register(other, CollectorRegistry())
        finally:
            other.unlink()
    assert _scrape(registry)  # the first one is there still


def test_a_clash_with_another_s_series_is_refused(slab: SharedSlab, registry: CollectorRegistry) -> None:
    Gauge("llm_edge_cache_limit_bytes", "Somebody else's.", registry=registry)
    with pytest.raises(ValueError, match="CollectorRegistry of its own"):
        metrics.register(slab, registry)


def test_what_has_no_slab_is_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(TypeError, match="an open manager or a SharedSlab, not str"):
        metrics.register("answers", registry)  # type: ignore[arg-type]


def test_the_default_is_the_client_s_registry(slab: SharedSlab) -> None:
    collector = metrics.register(slab)
    try:
        assert "llm_edge_requests_total" in _scrape(prometheus_client.REGISTRY)
    finally:
        collector.unregister()
    assert "llm_edge_requests_total" not in _scrape(prometheus_client.REGISTRY)


def test_unregistering_twice_does_nothing(slab: SharedSlab, registry: CollectorRegistry) -> None:
    collector = metrics.register(slab, registry)
    collector.unregister()
    collector.unregister()
    assert _scrape(registry) == {}


def test_a_replaced_collector_does_not_take_its_successor_out(slab: SharedSlab, registry: CollectorRegistry) -> None:
    replaced = metrics.register(slab, registry)
    metrics.register(slab, registry)
    replaced.unregister()
    assert _scrape(registry)


def test_the_registry_s_own_unregister_makes_room_too(slab: SharedSlab, name: str, registry: CollectorRegistry) -> None:
    registry.unregister(metrics.register(slab, registry))
    with SharedSlab(name + "-other", slab.config) as other:
        try:
            metrics.register(other, registry)
            assert _scrape(registry)
        finally:
            other.unlink()


# ---- a slab that is not there ----


def test_a_closed_slab_has_no_samples_and_spares_the_others(
    slab: SharedSlab, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.register(slab, registry)
    Gauge("another", "Somebody else's.", registry=registry)
    slab.close()
    assert _scrape(registry) == {"another": 0}
    assert caplog.records == []


def test_an_unlinked_slab_has_no_samples(slab: SharedSlab, registry: CollectorRegistry) -> None:
    metrics.register(slab, registry)
    slab.unlink()
    assert _scrape(registry) == {}


def test_a_replaced_slab_is_followed(slab: SharedSlab, name: str, registry: CollectorRegistry) -> None:
    metrics.register(Manager(slab), registry)
    slab._count(Counter.L1_HITS, 3)
    with SharedSlab(name, slab.config, replace=True) as successor:
        successor._count(Counter.L1_HITS, 1)
        assert _scrape(registry)["llm_edge_requests_total"] == 1


def test_a_failure_to_read_is_logged_and_never_raised(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SharedSlab):
        def _counter_sums(self) -> tuple[int, ...]:
            raise OSError("no")

    registry = CollectorRegistry()
    with Broken(name) as slab:
        metrics.register(slab, registry)
        assert _scrape(registry) == {}
    assert f"slab '{name}' cannot be read for metrics: OSError('no')" in caplog.text


# ---- many processes ----


def _work(slab: SharedSlab, pipe: Connection) -> None:
    """Count for as many rounds as asked, again and again; without end when asked for 0."""
    while True:
        rounds = pipe.recv()
        at = 0
        while not rounds or at < rounds:
            slab._record(Counter.L1_HITS, Histogram.L1, time.monotonic_ns())
            slab.get(b"none")
            at += 1
        pipe.send(generate_latest(REGISTRY_OF_THE_FAMILY))


REGISTRY_OF_THE_FAMILY = CollectorRegistry()  # the forked workers have it from their parent


class Worker:
    def __init__(self, slab: SharedSlab) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process: BaseProcess = context.Process(target=_work, args=(slab, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


@pytest.fixture
def workers(slab: SharedSlab) -> Iterator[list[Worker]]:
    collector = metrics.register(Manager(slab), REGISTRY_OF_THE_FAMILY)
    started = [Worker(slab) for _ in range(4)]
    yield started
    for worker in started:
        worker.kill()
    collector.unregister()


COUNTED = (
    "llm_edge_requests_total",
    "llm_edge_cache_hits_total,tier=l1",
    "llm_edge_cache_latency_ms_count,tier=l1",
    "llm_edge_cache_latency_ms_bucket,le=+Inf,tier=l1",
)


class Watch:
    """Scrapes, and complains when a sum falls."""

    def __init__(self) -> None:
        self._last: Samples = {}

    def scrape(self) -> Samples:
        samples = _scrape(REGISTRY_OF_THE_FAMILY)
        falling = re.compile(r".*(_total|_count|_sum|_bucket)(,.*)?")
        fallen = {key for key, value in self._last.items() if falling.fullmatch(key) and samples[key] < value}
        assert not fallen
        self._last = samples
        return samples

    def requests(self) -> float:
        samples = self.scrape()
        return samples["llm_edge_requests_total"]


def _run(workers: list[Worker], watch: Watch) -> None:
    """Let all of them work, and scrape until they are done."""
    for worker in workers:
        worker.pipe.send(ROUNDS)
    for worker in workers:
        while not worker.pipe.poll(0.001):
            watch.scrape()
        worker.pipe.recv()


def _exact(samples: Samples) -> set[float]:
    return {samples[key] for key in COUNTED}


def test_sums_are_exact_over_live_killed_and_replaced_processes(slab: SharedSlab, workers: list[Worker]) -> None:
    watch = Watch()
    _run(workers, watch)
    assert _exact(watch.scrape()) == {4 * ROUNDS}
    workers[0].kill()
    assert _exact(watch.scrape()) == {4 * ROUNDS}
    workers[0] = Worker(slab)  # it takes the record of the dead over, and goes on counting in it
    _run(workers, watch)
    assert _exact(watch.scrape()) == {8 * ROUNDS}
    assert watch.scrape()["llm_edge_cache_attached_processes"] == 5


def test_a_process_killed_while_it_counts_takes_nothing_back(slab: SharedSlab, workers: list[Worker]) -> None:
    watch = Watch()
    workers[0].pipe.send(0)
    deadline = time.monotonic() + 30
    while watch.requests() < ROUNDS:
        assert time.monotonic() < deadline
    workers[0].kill()
    counted = watch.requests()
    assert counted >= ROUNDS
    workers[0] = Worker(slab)
    _run(workers, watch)
    assert watch.requests() == counted + 4 * ROUNDS


def test_any_process_tells_the_same(workers: list[Worker]) -> None:
    watch = Watch()
    _run(workers, watch)
    for worker in workers:
        worker.pipe.send(1)
        told = worker.pipe.recv().decode()
        expected = watch.scrape()
        families = text_string_to_metric_families(told)
        found = {_key(sample.name, sample.labels): sample.value for family in families for sample in family.samples}
        assert {key: found[key] for key in COUNTED} == {key: expected[key] for key in COUNTED}


# ---- the format and the documentation ----


def test_the_exposition_is_sound_openmetrics(managed: SharedSlab, registry: CollectorRegistry) -> None:
    managed._observe(Histogram.L1, 1000)
    text = openmetrics_exposition.generate_latest(registry).decode()
    families = list(openmetrics_parser.text_string_to_metric_families(text))
    assert len(families) == len(series.SERIES) + len(series.HISTOGRAMS)


def test_the_documentation_lists_exactly_the_series_there_are() -> None:
    listed = re.findall(r"^\| `(llm_edge_\w+)` \| (\w+) \| ([^|]*) \|", DOCS.read_text(), re.MULTILINE)
    tables = [(found.name, found.kind, found.labels, found.samples) for found in series.SERIES]
    tables += [(found.name, "histogram", found.labels, found.samples) for found in series.HISTOGRAMS]
    expected = [(name, kind, _documented(labels, [s[0] for s in samples])) for name, kind, labels, samples in tables]
    assert sorted(listed) == sorted(expected)


def _documented(labels: tuple[str, ...], values: list[tuple[str, ...]]) -> str:
    """The labels and, where they are a fixed set, their values, in the order of the table."""
    if labels == ("version", "layout"):
        return "`version`, `layout`"
    columns = [list(dict.fromkeys(value[at] for value in values)) for at in range(len(labels))]
    return "; ".join(f"`{label}`: {', '.join(column)}" for label, column in zip(labels, columns, strict=True))
