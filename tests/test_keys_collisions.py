"""The collision hunt finds nothing in the keys, and every fault that is planted in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent / "stress"))

from key_collisions import DIGEST, Census, Key, census, main, requests

from llm_edge_cache import CacheableRequest


def test_no_two_different_requests_share_a_key_and_equal_ones_do() -> None:
    counted = census(seed=2, count=20_000)
    assert counted.collisions == 0
    assert counted.keys == counted.identities
    assert counted.requests == 20_000
    assert 10_000 < counted.keys < 20_000  # most differ, and many come twice


def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "collisions.json"
    command = ["key_collisions.py", "--requests", "20000", "--workers", "2", "--seed", "3", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    document = json.loads(result.read_text())
    assert document["requests"] == 20_000
    assert document["collisions"] == 0


def test_a_chunk_s_requests_are_the_same_every_time() -> None:
    assert list(requests(1, 5, 50)) == list(requests(1, 5, 50))
    assert list(requests(1, 5, 50)) != list(requests(2, 5, 50))


# ---- planted faults ----


def joined(request: CacheableRequest) -> str:
    parts = (request.namespace, request.model, request.prompt, request.messages, *sorted(request.parameters.items()))
    return "|".join(str(part) for part in (*parts, request.temperature, request.max_tokens))


def as_json(request: CacheableRequest) -> str:
    fields = (request.namespace, request.model, request.prompt, request.messages, request.temperature)
    return msgspec.json.encode((fields, request.max_tokens, request.parameters), order="sorted").decode()


def through_floats(request: CacheableRequest) -> str:
    """Reads every number as JavaScript does."""

    def lowered(value: object) -> object:
        if isinstance(value, list):
            return [lowered(item) for item in value]
        if isinstance(value, dict):
            return {name: lowered(item) for name, item in value.items()}
        return value if isinstance(value, (bool, float, str)) or value is None else float(value)  # type: ignore[arg-type]

    return repr(
        lowered(msgspec.msgpack.decode(request.canonical, ext_hook=lambda _, data: int.from_bytes(data, "big")))
    )


def without_null(request: CacheableRequest) -> str:
    kept = {name: value for name, value in request.parameters.items() if value is not None}
    return msgspec.structs.replace(request, parameters=kept).canonical.hex()


def in_any_order(request: CacheableRequest) -> str:
    return request.canonical.hex() + str(list(request.parameters))


@pytest.mark.parametrize("faulty", [joined, through_floats, without_null])
def test_different_requests_that_share_a_key_are_found(faulty: Key) -> None:
    assert census(seed=2, count=5_000, key_of=faulty).collisions > 0


@pytest.mark.parametrize("faulty", [as_json, in_any_order])
def test_equal_requests_with_different_keys_are_found(faulty: Key) -> None:
    counted = census(seed=2, count=5_000, key_of=faulty)
    assert counted.keys > counted.identities


def test_a_census_counts_keys_identities_and_collisions() -> None:
    key, one, other = (bytes([byte]) * DIGEST for byte in range(3))
    counted = Census()
    counted.add_pairs(key + one + key + one + key + other)
    counted.add_identities(one + one + other)
    assert counted == Census(requests=3, keys=1, identities=2, collisions=1)
