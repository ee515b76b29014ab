"""Counts the keys of ten million requests that are made to be confused with one another.

    python tests/stress/key_collisions.py [--requests N] [--workers N] [--seed N] [--json FILE]

Every request comes with its identity, worked out from the choices that made it and not from its values, so nothing of
the encoder is believed. Half of the requests cut a short text of separators and MessagePack's own marks into
namespace, model, prompt and a parameter's name and value, at random places; the others put numbers, strings, nulls and
booleans that look alike into nested lists and maps, each spelled in one of several equal ways (`0`, `0.0`, `-0.0`, a
list or a tuple, keys in any order); a tenth differ from the one before in one place, and a tenth are the one before in
another spelling. Then:

- each key belongs to one identity (no two different requests share a key), and
- there are as many keys as identities (equal requests do share one).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from provenance import RESULTS, Provenance, at_least, at_most, write_results

from llm_edge_cache import CacheableRequest, generate_cache_key

BUCKETS = 64
DIGEST = 16  # bytes kept of a key and of an identity
CHUNK = 10_000  # requests that share a random generator
TEXTS = 200  # that a chunk cuts, each some 25 times

Key = Callable[[CacheableRequest], str]
Identity = Any  # nested tuples of ints and strings

# What a text is made of before it is cut: separators, quotes, escapes, and characters whose UTF-8 looks like marks of
# MessagePack (an array of eight, a string of one, nil, a map of none).
ALPHABET = ("a", "b", "|", '"', "\\", ",", ":", "\x00", "\x01", "1", "\u0098", "\u00a1", "\u00c0", "\u0080", "{", "]")

# Values in their spellings; values of one row are equal, of different rows different.
SCALARS: tuple[tuple[Any, ...], ...] = (
    (None,),
    (True,),
    (False,),
    (0, 0.0, -0.0),
    (1, 1.0),
    (-1, -1.0),
    (0.1,),
    (0.1 + 2**-56,),
    (1.5,),
    (2**53, 2.0**53),
    (2**53 + 1,),
    (2**53 + 2, 2.0**53 + 2),
    (2**63, 2.0**63),
    (2**63 + 1,),
    (2**64 - 1,),
    (2**64, 2.0**64),
    (2**64 + 1,),
    (-(2**63), -(2.0**63)),
    (-(2**63) - 1,),
    (10**30,),
    (1e30, int(1e30)),
    ("",),
    ("0",),
    ("1",),
    ("1.0",),
    ("true",),
    ("null",),
    ("[]",),
    ("\x01",),
    ("\u00c0",),
)
TEMPERATURES: tuple[tuple[Any, ...], ...] = (
    (None,),
    (0, 0.0, -0.0, 0.001, -0.004),
    (0.12, 0.125, 0.1201),
    (0.38, 0.375, 0.3849),
    (0.7, 0.70, 0.704, 0.6951),
    (1, 1.0, 0.995, 1.001),
    (-1, -1.0),
    (2, 2.0),
)
LIMITS: tuple[tuple[Any, ...], ...] = ((None,), (0, 0.0), (1, 1.0), (2**53, 2.0**53), (2**53 + 1,))
NESTED = "nested"  # a namespace that no cut gives: the two halves name their strings differently
NAMES = ("", "a", "b", "a|b", "model", "prompt", "temperature", "max_tokens", "\u00e9")


# ---- an identity, and a request that has it ----


def _value(rng: random.Random, depth: int) -> Identity:
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.randrange(len(SCALARS))
    if kind < 0.75:
        return ("list", *[_value(rng, depth - 1) for _ in range(rng.randrange(4))])
    return _mapping(rng, depth - 1)


def _mapping(rng: random.Random, depth: int) -> Identity:
    return ("map", *[(name, _value(rng, depth)) for name in sorted(rng.sample(NAMES, rng.randrange(4)))])


def _nested(rng: random.Random) -> Identity:
    """Temperature, limit, messages or None, parameters."""
    messages = ("list", *[_mapping(rng, 2) for _ in range(rng.randrange(3))]) if rng.random() < 0.5 else None
    return rng.randrange(len(TEMPERATURES)), rng.randrange(len(LIMITS)), messages, _mapping(rng, 3)


def _altered(rng: random.Random, identity: Identity) -> Identity:
    """Another identity that differs in one place."""
    temperature, limit, messages, parameters = identity
    place = rng.randrange(3)
    if place == 0:
        return (temperature + 1) % len(TEMPERATURES), limit, messages, parameters
    if place == 1:
        return temperature, limit, None if messages else ("list",), parameters
    return temperature, limit, messages, ("map", ("", ("list", parameters)))


def _spelled(rng: random.Random, identity: Identity) -> Any:
    """The value of that identity, in one of its spellings."""
    if isinstance(identity, int):
        return rng.choice(SCALARS[identity])
    if identity[0] == "list":
        items = [_spelled(rng, item) for item in identity[1:]]
        return items if rng.random() < 0.7 else tuple(items)
    entries = [(name, _spelled(rng, value)) for name, value in identity[1:]]
    if len(entries) > 1:
        rng.shuffle(entries)
    return dict(entries)


def _nested_fields(rng: random.Random, identity: Identity) -> dict[str, Any]:
    temperature, limit, messages, parameters = identity
    return {
        "namespace": NESTED,
        "model": "m",
        "temperature": rng.choice(TEMPERATURES[temperature]),
        "max_tokens": rng.choice(LIMITS[limit]),
        "messages": None if messages is None else _spelled(rng, messages),
        "parameters": _spelled(rng, parameters),
    }


def _cut(rng: random.Random, text: str) -> tuple[dict[str, Any], Identity]:
    a, b, c, d = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    namespace, model, prompt, name, value = text[:a], text[a:b] or "m", text[b:c], text[c:d], text[d:]
    shape = rng.randrange(4)
    fields: dict[str, Any] = {"namespace": namespace, "model": model}
    if shape == 0:
        fields.update(prompt=prompt, parameters={name: value})
    elif shape == 1:
        fields.update(messages=[{name: prompt}, {"": value}])
    elif shape == 2:
        fields.update(prompt=prompt, parameters={"x": [name, value]})
    else:
        fields.update(prompt=prompt, parameters={"x": {name: value}})
    # The shape is part of it but where two shapes can coincide: {"x": "..."} is never {"x": [...]} or {"x": {...}}.
    return fields, (shape, namespace, model, prompt, name, value)


def requests(seed: int, chunk: int, count: int = CHUNK) -> Iterator[tuple[dict[str, Any], Identity]]:
    """The fields and the identity of each of a chunk's requests."""
    rng = random.Random(f"{seed}/{chunk}")
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(3, 10))) for _ in range(TEXTS)]
    identity = _nested(rng)
    for _ in range(count):
        what = rng.random()
        if what < 0.5:
            yield _cut(rng, rng.choice(texts))
            continue
        if what < 0.8:
            identity = _nested(rng)
        elif what < 0.9:
            identity = _altered(rng, identity)
        yield _nested_fields(rng, identity), identity  # in the last tenth the one before, spelled anew


# ---- counting ----


@dataclasses.dataclass
class Census:
    requests: int = 0
    keys: int = 0
    identities: int = 0
    collisions: int = 0  # keys that belong to more than one identity

    def add_pairs(self, records: bytes) -> None:
        """Count the keys of one bucket; a record is a key's digest and the identity's."""
        owner: dict[bytes, bytes] = {}
        guilty = set()
        for at in range(0, len(records), 2 * DIGEST):
            key, identity = records[at : at + DIGEST], records[at + DIGEST : at + 2 * DIGEST]
            if owner.setdefault(key, identity) != identity:
                guilty.add(key)
        self.requests += len(records) // (2 * DIGEST)
        self.keys += len(owner)
        self.collisions += len(guilty)

    def add_identities(self, records: bytes) -> None:
        self.identities += len({records[at : at + DIGEST] for at in range(0, len(records), DIGEST)})


def _digests(fields: dict[str, Any], identity: Identity, key_of: Key) -> tuple[bytes, bytes]:
    key = key_of(CacheableRequest(**fields))
    named = hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()
    return hashlib.blake2b(key.encode(), digest_size=DIGEST).digest(), named


def census(seed: int, count: int, key_of: Key = generate_cache_key) -> Census:
    """Count a few requests in this process."""
    pairs, identities = bytearray(), bytearray()
    for fields, identity in requests(seed, 0, count):
        key, named = _digests(fields, identity, key_of)
        pairs += key + named
        identities += named
    counted = Census()
    counted.add_pairs(bytes(pairs))
    counted.add_identities(bytes(identities))
    return counted


def _work(job: tuple[Path, int, int, int, int]) -> None:
    """Write the digests of every `workers`-th chunk into this worker's buckets."""
    folder, seed, worker, workers, chunks = job
    for begin in range(worker, chunks, workers * 20):
        pairs = [bytearray() for _ in range(BUCKETS)]
        identities = [bytearray() for _ in range(BUCKETS)]
        for chunk in range(begin, min(begin + workers * 20, chunks), workers):
            for fields, identity in requests(seed, chunk):
                key, named = _digests(fields, identity, generate_cache_key)
                pairs[key[0] % BUCKETS] += key + named
                identities[named[0] % BUCKETS] += named
        for kind, buckets in (("pairs", pairs), ("identities", identities)):
            for number, records in enumerate(buckets):
                with (folder / f"{kind}-{number}-{worker}").open("ab") as file:
                    file.write(records)


def _read(folder: Path, kind: str, bucket: int) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"{kind}-{bucket}-*")))


def run(count: int, workers: int, seed: int) -> Census:
    counted = Census()
    with tempfile.TemporaryDirectory() as name:
        folder, chunks = Path(name), -(-count // CHUNK)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(_work, [(folder, seed, worker, workers, chunks) for worker in range(workers)])
        for bucket in range(BUCKETS):
            counted.add_pairs(_read(folder, "pairs", bucket))
            counted.add_identities(_read(folder, "identities", bucket))
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "key-collisions.json")
    arguments = parser.parse_args()
    provenance = Provenance(arguments.seed, ("msgspec",))
    counted = run(arguments.requests, arguments.workers, arguments.seed)
    print(counted)
    bars = [
        at_least("requests generated", counted.requests, arguments.requests),
        at_most("keys that two different requests share", counted.collisions, 0),
        at_most("equal requests with different keys", abs(counted.keys - counted.identities), 0),
    ]
    met = write_results(arguments.json, provenance, dataclasses.asdict(counted), bars)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
