"""The slab's settings, as the gunicorn hooks read them from the environment."""

from __future__ import annotations

import pytest

from llm_edge_cache import SlabConfig
from llm_edge_cache.errors import SettingsError
from llm_edge_cache.workers.environment import read_slab_settings


def _read(**variables: str) -> SlabConfig | None:
    return read_slab_settings({f"LLM_EDGE_CACHE_{name}": value for name, value in variables.items()}).config


def test_without_variables_whatever_is_live_is_right() -> None:
    settings = read_slab_settings({"PATH": "/bin"})
    assert settings.name == "llm-edge-cache"
    assert settings.config is None


def test_the_name_alone_configures_nothing() -> None:
    settings = read_slab_settings({"LLM_EDGE_CACHE_NAME": " chat/eu"})
    assert settings == (" chat/eu", None)  # as it stands: the application reads it too


@pytest.mark.parametrize(
    ("text", "memory_bytes"),
    [("33554432", 32 << 20), ("32MiB", 32 << 20), ("32 mib", 32 << 20), ("32768KiB", 32 << 20), ("1GiB", 1 << 30)],
)
def test_memory_is_bytes_or_has_a_unit(text: str, memory_bytes: int) -> None:
    assert _read(L1_MEMORY=text) == SlabConfig(memory_bytes=memory_bytes)


def test_every_field_has_its_variable() -> None:
    expected = SlabConfig(memory_bytes=16 << 20, max_entries=1000, ttl=60.5, tti=30.0)
    assert _read(L1_MEMORY="16MiB", L1_MAX_CAPACITY=" 1000 ", L1_TTL=" 60.5", L1_TTI="30") == expected


def test_none_switches_expiry_off() -> None:
    assert _read(L1_TTL="none", L1_TTI="None") == SlabConfig(ttl=None, tti=None)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("NAME", "", "1 to 1024 bytes"),
        ("NAME", "é" * 513, "1 to 1024 bytes"),
        ("L1_MEMORY", "", "KiB, MiB or GiB"),
        ("L1_MEMORY", "0", "KiB, MiB or GiB"),
        ("L1_MEMORY", "1.5GiB", "KiB, MiB or GiB"),
        ("L1_MEMORY", "64MB", "KiB, MiB or GiB"),
        ("L1_MEMORY", "-1", "KiB, MiB or GiB"),
        ("L1_MAX_CAPACITY", "0", "at least 1"),
        ("L1_MAX_CAPACITY", "1e3", "at least 1"),
        ("L1_TTL", "0", "above 0"),
        ("L1_TTL", "-3", "above 0"),
        ("L1_TTL", "nan", "above 0"),
        ("L1_TTI", "inf", "above 0"),
        ("L1_TTI", "soon", "above 0"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read_slab_settings({f"LLM_EDGE_CACHE_{variable}": value})
    message = str(raised.value)
    assert f"LLM_EDGE_CACHE_{variable}={value!r}" in message
    assert allowed in message


def test_values_that_do_not_fit_together_are_all_named() -> None:
    with pytest.raises(SettingsError, match=r"L1_MEMORY='1MiB', LLM_EDGE_CACHE_L1_MAX_CAPACITY='100000000'.*too small"):
        _read(L1_MEMORY="1MiB", L1_MAX_CAPACITY="100000000")
