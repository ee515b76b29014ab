"""What the slab's shared regions hold: counters, histograms and words, each by its index.

Counters and histograms are kept per process and summed over all processes that ever attached, so a sum is the host's
truth and never falls. Words are single values that all processes of the host see.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["COUNTER_LIMIT", "Counter", "Histogram", "Word"]

COUNTER_LIMIT = 96
"""How many counters a slab has."""


class Counter(IntEnum):
    """Counters of the manager and the gateway. New ones are added at the end: the numbers are part of the layout."""

    L1_HITS = 0
    L1_MISSES = 1
    L1_WRITES = 2
    L2_HITS = 3
    L2_MISSES = 4
    L2_WRITES = 5
    L1_REFUSED = 7
    """Values that the slab did not take: too large, or no lock to be had."""
    L1_FENCED = 8
    """Values that an invalidation had overtaken."""
    L1_EXPIRED_TAGS = 9
    """Entries found whose tag had been invalidated."""

    L2_ERROR_TIMEOUT = 10
    L2_ERROR_CONNECTION = 11
    L2_ERROR_AUTH = 12
    L2_ERROR_OOM = 13
    L2_ERROR_READONLY = 14
    L2_ERROR_LOADING = 15
    L2_ERROR_CLUSTER = 16
    L2_ERROR_RESPONSE = 17
    L2_SKIPPED = 18
    """Reads that did not ask Redis: the breaker was open, or invalidations were still to be delivered."""

    BAD_TRUNCATED = 20
    BAD_FORMAT = 21
    BAD_CHECKSUM = 22
    BAD_COMPRESSION = 23
    BAD_CONTENT = 24

    DROPPED_QUEUE_FULL = 26
    DROPPED_UNAVAILABLE = 27
    """Deferred writes given up because Redis could not be reached or refused them."""
    DROPPED_FENCED = 28
    """Deferred writes that an invalidation or a newer value had overtaken."""
    DROPPED_LATE = 29
    """Deferred writes older than what fences can judge."""

    COMPUTATIONS = 32
    COMPUTE_ERRORS = 33
    COALESCED = 34
    """Callers that were served by a computation they did not start."""
    TAKEOVERS = 35
    """Computations taken over from a process that died or was stopped."""
    UNCOORDINATED = 36
    """Computations without a flight: no record was to be had."""
    STALE_REVALIDATE = 37
    STALE_ERROR = 38
    FLIGHTS_LOST = 39
    """Computations whose flight was taken over before they ended; their values were refused."""

    INVALIDATED_KEYS = 40
    INVALIDATED_TAGS = 41
    INVALIDATED_ALL = 42
    INVALIDATED_REMOTE = 43
    """Invalidations of other hosts, applied here."""
    STREAM_FLUSHES = 44
    """L1 cleared because invalidations may have been missed."""
    BREAKER_OPENED = 45
    UNVERIFIED = 46
    """L1 entries that were checked against L2 because the invalidation stream was out of contact."""

    PROMPT_TOKENS_SAVED = 48
    COMPLETION_TOKENS_SAVED = 49
    MICROSECONDS_SAVED = 50
    """Time that the computations of served values had taken."""


class Histogram(IntEnum):
    """Histograms of durations."""

    L1 = 0
    """Look-ups that L1 answered, hit or miss."""
    L2 = 1
    """Look-ups in Redis."""
    COMPUTE = 2
    WAIT = 3
    """Waits for another's computation."""


class Word(IntEnum):
    """Shared 64-bit words. Times are CLOCK_MONOTONIC in ns unless said otherwise; 0 = never."""

    BREAKER = 0
    """Failures in a row while small, else when the next probe of Redis is due (`breaker`)."""
    READER = 1
    """Identity of the process that reads the invalidation stream."""
    READER_BEAT = 2
    """When it last showed that it lives."""
    CONTACT = 3
    """When the invalidations up to that moment had been applied here."""
    CURSOR = 4
    """Id of the last stream entry applied here (`redis_records.pack_id`); 0 = none yet."""
    BEGIN = 5
    """The largest stream id that this host knows of: what a computation that begins now has seen."""
    CLEARED = 6
    """Stream id of the last clear_all; values that began before are void."""
    UNDELIVERED = 7
    """Not 0 while invalidations of this host have not reached Redis: its values are not to be trusted."""
    TAG_EPOCH = 8
    """Grows with every tag invalidation on this host."""
    L2_ENTRIES = 9
    L2_BYTES = 10
    L2_SIZED_AT = 11
    """When the two above were sampled."""
    FOLLOWED = 12
    """Fingerprint of the Redis and prefix that the words above speak of."""
