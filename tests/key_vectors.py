"""Writes tests/data/key_vectors.json, the golden file that pins the encoding of keys.

    python tests/key_vectors.py

A vector is a request as JSON, its canonical encoding and its key. Run it to add vectors; if one that was there before
changes, every deployed cache goes cold: that needs another ENCODING_VERSION and a line in the changelog.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_edge_cache import CacheableRequest, generate_cache_key

VECTORS = Path(__file__).resolve().parent / "data" / "key_vectors.json"

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


def _with(**parameters: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "p", "parameters": parameters}


def _at(temperature: float) -> dict[str, Any]:
    return {"model": "m", "prompt": "p", "temperature": temperature}


REQUESTS: dict[str, dict[str, Any]] = {
    "model alone": {"model": "gpt-4o"},
    "prompt": {"model": "gpt-4o", "prompt": "Hello"},
    "empty prompt": {"model": "gpt-4o", "prompt": ""},
    "separator in the model": {"model": "a|b", "prompt": "c"},
    "separator in the prompt": {"model": "a", "prompt": "b|c"},
    "length prefixes in the prompt": {"model": "a", "prompt": "\u0001\u00a1b\u0000"},
    "namespace": {"model": "gpt-4o", "prompt": "Hello", "namespace": "tenant-1"},
    "namespace like the model": {"model": "m", "prompt": "p", "namespace": "m"},
    "message": {"model": "gpt-4o", "messages": _said("Hello")},
    "no messages": {"model": "gpt-4o", "messages": []},
    "two messages": {"model": "gpt-4o", "messages": _said("Hello", "Goodbye")},
    "two messages, exchanged": {"model": "gpt-4o", "messages": _said("Goodbye", "Hello")},
    "content in parts": {
        "model": "gpt-4o",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                ],
            }
        ],
    },
    "content is null": {"model": "m", "messages": [{"role": "assistant", "content": None}]},
    "content is absent": {"model": "m", "messages": [{"role": "assistant"}]},
    "temperature 0": _at(0),
    "temperature -0.0": _at(-0.0),
    "temperature -0.001": _at(-0.001),
    "temperature 0.7": _at(0.7),
    "temperature 0.704": _at(0.704),
    "temperature 0.995": _at(0.995),
    "temperature 0.125": _at(0.125),
    "temperature 0.375": _at(0.375),
    "temperature 1": _at(1),
    "temperature 2.0": _at(2.0),
    "temperature as a parameter": _with(temperature=0.704),
    "max_tokens 0": {"model": "m", "prompt": "p", "max_tokens": 0},
    "max_tokens 256": {"model": "m", "prompt": "p", "max_tokens": 256},
    "max_tokens 256.0": {"model": "m", "prompt": "p", "max_tokens": 256.0},
    "zero": _with(x=0),
    "zero, floating": _with(x=0.0),
    "zero, negative": _with(x=-0.0),
    "one": _with(x=1),
    "one, floating": _with(x=1.0),
    "one, true": _with(x=True),
    "one, a string": _with(x="1"),
    "null": _with(x=None),
    "false": _with(x=False),
    "fraction": _with(x=0.1),
    "fraction, its neighbour": _with(x=0.10000000000000002),
    "smallest binary64": _with(x=5e-324),
    "largest binary64": _with(x=1.7976931348623157e308),
    "2**53": _with(x=2**53),
    "2**53, floating": _with(x=2.0**53),
    "2**53 + 1": _with(x=2**53 + 1),
    "2**63": _with(x=2**63),
    "2**64 - 1": _with(x=2**64 - 1),
    "2**64": _with(x=2**64),
    "-2**63": _with(x=-(2**63)),
    "-2**63 - 1": _with(x=-(2**63) - 1),
    "10**40": _with(x=10**40),
    "-128": _with(x=-128),
    "list": _with(x=[1, [2, []], {}]),
    "map in a list": _with(x=[{"a": 1}, {"b": 2}]),
    "maps merged": _with(x=[{"a": 1, "b": 2}]),
    "two parameters": _with(b=1, a=2),
    "keys beyond ASCII": _with(**{"\u00e9": 1, "z": 2, "\uffff": 3, "\U0001f600": 4, "": 5}),
    "composed": _with(x="\u00e9"),
    "decomposed": _with(x="e\u0301"),
    "tools and more": {
        "model": "gpt-4o",
        "messages": _said("Will it rain in Paris?"),
        "temperature": 0.2,
        "max_tokens": 512,
        "parameters": {
            "tools": [TOOL],
            "tool_choice": "auto",
            "response_format": {"type": "json_object"},
            "seed": 42,
            "stop": ["\n\n", "END"],
            "top_p": 0.95,
            "logit_bias": {"50256": -100},
            "stream": False,
        },
        "namespace": "tenant-1",
    },
    "long": {"model": "m", "prompt": "0123456789abcdef" * 20, "parameters": {"x": list(range(20))}},
}


def main() -> None:
    vectors = []
    for name, fields in REQUESTS.items():
        request = CacheableRequest(**fields)
        encoding, key = request.canonical.hex(), generate_cache_key(request)
        vectors.append({"name": name, "request": fields, "encoding": encoding, "key": key})
    lines = ",\n".join(json.dumps(vector) for vector in vectors)
    VECTORS.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
