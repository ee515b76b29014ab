"""The records of the two tiers, and how environment variables fill them."""

from __future__ import annotations

import logging
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

from llm_edge_cache import L1Config, L2Config, RedisConfigError, SettingsError, SlabConfig, load_settings, settings

DOCS = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
SECRET = "s3cr3t"


def _environ(**variables: str) -> dict[str, str]:
    return {f"LLM_EDGE_CACHE_{name}": value for name, value in variables.items()}


def _slab(**variables: str) -> SlabConfig | None:
    return load_settings(_environ(**variables)).slab.config


def _l2(**variables: str) -> L2Config:
    l2 = load_settings(_environ(REDIS_URL="redis://cache", **variables)).l2
    assert l2 is not None
    return l2


def _refusal(**variables: str) -> SettingsError:
    with pytest.raises(SettingsError) as raised:
        load_settings(_environ(**variables))
    return raised.value


# ---- what is not set ----


def test_without_variables_everything_has_its_default() -> None:
    expected = settings.Settings(L1Config(), None, None, settings.SlabSettings("llm-edge-cache", None))
    assert load_settings({"PATH": "/bin"}) == expected


def test_without_a_mapping_the_process_s_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_TTL", "7")
    assert load_settings().l1 == L1Config(ttl_seconds=7.0)


def test_without_variables_whatever_slab_is_live_is_right() -> None:
    assert load_settings({"PATH": "/bin"}).slab == ("llm-edge-cache", None)


def test_the_name_alone_configures_no_slab() -> None:
    found = load_settings(_environ(NAME=" chat/eu"))
    assert found.slab == (" chat/eu", None)  # as it stands: the application reads it too
    assert found.l1 == L1Config(name=" chat/eu")


def test_without_a_redis_url_there_is_no_second_tier() -> None:
    assert load_settings(_environ(L2_TTL="60", KEY_PREFIX="a:")).l2 is None


def test_the_redis_url_alone_brings_the_defaults() -> None:
    assert _l2() == L2Config("redis://cache")


# ---- what is set ----


@pytest.mark.parametrize(
    ("text", "memory_bytes"),
    [("33554432", 32 << 20), ("32MiB", 32 << 20), ("32 mib", 32 << 20), ("32768KiB", 32 << 20), ("1GiB", 1 << 30)],
)
def test_memory_is_bytes_or_has_a_unit(text: str, memory_bytes: int) -> None:
    assert _slab(L1_MEMORY=text) == SlabConfig(memory_bytes=memory_bytes)


def test_every_field_of_the_slab_has_its_variable() -> None:
    expected = SlabConfig(memory_bytes=16 << 20, max_entries=1000, ttl=60.5, tti=30.0)
    assert _slab(L1_MEMORY="16MiB", L1_MAX_CAPACITY=" 1000 ", L1_TTL=" 60.5", L1_TTI="30") == expected


def test_every_field_of_the_first_tier_has_its_variable() -> None:
    environ = _environ(NAME="a", L1_MEMORY="16MiB", L1_MAX_CAPACITY="500", L1_TTL="60.5", L1_TTI="none")
    assert load_settings(environ).l1 == L1Config(500, 16 << 20, 60.5, None, "a")


def test_the_slab_of_a_part_takes_its_other_fields_from_the_slab_s_defaults() -> None:
    found = load_settings(_environ(L1_MEMORY="16MiB"))
    assert found.slab.config == SlabConfig(memory_bytes=16 << 20)
    assert found.l1 == L1Config(memory_bytes=16 << 20, max_capacity=16 << 10)  # so that both make the same slab


def test_none_switches_expiry_off() -> None:
    assert _slab(L1_TTL="none", L1_TTI="None") == SlabConfig(ttl=None, tti=None)


def test_every_field_of_the_second_tier_has_its_variable() -> None:
    expected = L2Config("redis://cache", 60.0, 500.0, 20.5, "a:", 4096, 10, 1.5)
    assert expected == _l2(
        L2_TTL="60",
        CONNECTION_TIMEOUT_MS="500",
        OPERATION_TIMEOUT_MS="20.5",
        KEY_PREFIX="a:",
        COMPRESS_ABOVE="4096",
        QUEUE_LIMIT="10",
        STALENESS="1.5",
    )


def test_compression_may_be_named_off_and_the_prefix_empty() -> None:
    assert _l2(COMPRESS_ABOVE="none", KEY_PREFIX="") == L2Config("redis://cache", key_prefix="")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://api.example.com/openai/", "https://[::1]:8443"])
def test_the_upstream_is_taken_as_it_stands(url: str) -> None:
    assert load_settings(_environ(UPSTREAM=url)).upstream == url


# ---- what is not allowed ----


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("NAME", "", "1 to 1024 bytes"),
        ("NAME", "é" * 513, "1 to 1024 bytes"),
        ("NAME", "\udcff", "1 to 1024 bytes"),
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
        ("REDIS_URL", "", "redis://"),
        ("REDIS_URL", "http://cache", "redis://"),
        ("REDIS_URL", "redis://cache:port", "1 to 65535"),
        ("L2_TTL", "none", "a number of seconds above 0"),
        ("CONNECTION_TIMEOUT_MS", "0", "milliseconds above 0, at most 60000"),
        ("OPERATION_TIMEOUT_MS", "60001", "milliseconds above 0, at most 60000"),
        ("KEY_PREFIX", "a" * 257, "at most 256 characters"),
        ("KEY_PREFIX", "\udcff", "of UTF-8"),
        ("COMPRESS_ABOVE", "-1", "a number of bytes, or 'none'"),
        ("QUEUE_LIMIT", "0", "at least 1"),
        ("STALENESS", "0", "above 0"),
        ("UPSTREAM", "", "http:// or https://"),
        ("UPSTREAM", "api.example.com", "http:// or https://"),
        ("UPSTREAM", "ftp://api.example.com", "http:// or https://"),
        ("UPSTREAM", "http://", "of a host"),
        ("UPSTREAM", "http://host:port", "of a host"),
        ("UPSTREAM", "http://host/a b", "of a host"),
        ("UPSTREAM", "http://host/?a=b", "without user name, password, query"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    message = str(_refusal(**{variable: value}))
    assert f"LLM_EDGE_CACHE_{variable}={value!r}" in message
    assert allowed in message


def test_a_bad_value_of_the_second_tier_is_an_error_without_a_redis_too() -> None:
    assert "QUEUE_LIMIT='0'" in str(_refusal(QUEUE_LIMIT="0"))


def test_values_that_do_not_fit_together_are_all_named() -> None:
    expected = r"_L1_MEMORY='1MiB', LLM_EDGE_CACHE_L1_MAX_CAPACITY='100000000' do not fit.*too small"
    assert re.search(expected, str(_refusal(L1_MEMORY="1MiB", L1_MAX_CAPACITY="100000000", L2_TTL="60")))


# ---- secrets ----

BAD_URLS = [
    f"http://user:{SECRET}@cache",
    f"redis://user:{SECRET}@cache:port",
    f"redis://:{SECRET}/more@cache",
    f"redis://:{SECRET}?more@cache",
    f"redis://:{SECRET}@more@cache:x",
    f"{SECRET}@cache",
    f"user:{SECRET}@redis://cache",
    f"redis+sentinel://h/s?sentinel_password={SECRET}&x=1",
    f"redis+sentinel://:a@h/s?sentinel_password=b@{SECRET}&x=1",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_bad_redis_url_is_shown_without_its_password(url: str) -> None:
    error = _refusal(REDIS_URL=url)
    assert "LLM_EDGE_CACHE_REDIS_URL='" in str(error)
    assert "***" in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert error.__context__ is None


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host", f"https://{SECRET}@host", f"https://:{SECRET}@h:x"])
def test_a_bad_upstream_is_shown_without_its_password(url: str) -> None:
    error = _refusal(UPSTREAM=url)
    assert "LLM_EDGE_CACHE_UPSTREAM='https://***@h" in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert error.__context__ is None


def test_a_masked_url_still_says_where() -> None:
    assert "='redis://***@cache:port'" in str(_refusal(REDIS_URL=f"redis://:{SECRET}@cache:port"))


def test_no_repr_shows_the_password() -> None:
    found = load_settings(_environ(REDIS_URL=f"redis://:{SECRET}@cache"))
    for shown in (repr(found), str(found), repr(found.l2), f"{found.l2}"):
        assert SECRET not in shown


def test_configurations_differ_by_url_and_can_be_hashed() -> None:
    assert L2Config("redis://a") != L2Config("redis://b")
    assert len({L2Config("redis://a"), L2Config("redis://a"), L2Config("redis://b")}) == 2


# ---- variables that are none of ours ----


def test_the_admin_token_is_taken_as_it_stands_and_shown_nowhere() -> None:
    found = load_settings(_environ(ADMIN_TOKEN=SECRET))
    assert found.admin_token == SECRET
    assert SECRET not in repr(found)


@pytest.mark.parametrize("token", ["", f"{SECRET} two", f"{SECRET}\n", f"{SECRET}\u00e9"])
def test_a_bad_admin_token_is_refused_without_being_shown(token: str) -> None:
    error = _refusal(ADMIN_TOKEN=token)
    assert str(error).startswith("LLM_EDGE_CACHE_ADMIN_TOKEN='***' is not allowed: it must be visible ASCII characters")
    assert SECRET not in "".join(traceback.format_exception(error))


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    load_settings({**_environ(L1_TLT=SECRET, L1_TTL="60"), "OTHER_L1_TTL": "1"})
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("llm_edge_cache", logging.WARNING)
    assert "LLM_EDGE_CACHE_L1_TLT" in record.getMessage()
    assert "nearest is LLM_EDGE_CACHE_L1_TTL" in record.getMessage()
    assert SECRET not in record.getMessage()


def test_known_variables_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_settings(_environ(NAME="a", L1_TTL="60"))
    assert caplog.records == []


# ---- the records ----


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("redis_url", "http://cache", RedisConfigError),
        ("redis_url", None, TypeError),
        ("key_prefix", b"a:", TypeError),
        ("key_prefix", "a" * 257, ValueError),
        ("ttl_seconds", 0, ValueError),
        ("ttl_seconds", "60", TypeError),
        ("operation_timeout_ms", 60_001, ValueError),
        ("connection_timeout_ms", True, TypeError),
        ("compress_above", -1, ValueError),
        ("compress_above", 1.5, TypeError),
        ("queue_limit", 0, ValueError),
        ("queue_limit", True, TypeError),
        ("staleness_seconds", float("nan"), ValueError),
    ],
)
def test_the_second_tier_refuses_what_it_cannot_be(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Redis URL" if field == "redis_url" else field):
        L2Config(**{field: value})


def test_the_first_tier_is_the_slab_that_it_asks_for() -> None:
    assert L1Config(500, 16 << 20, 60.0, None).slab_config() == SlabConfig(16 << 20, 500, ttl=60.0, tti=None)


@pytest.mark.parametrize(("field", "value"), [("name", None), ("max_capacity", "10"), ("ttl_seconds", "60")])
def test_the_first_tier_refuses_wrong_types(field: str, value: Any) -> None:
    with pytest.raises(TypeError):
        L1Config(**{field: value})


# ---- the documentation ----


def test_the_documentation_lists_exactly_the_variables_there_are() -> None:
    listed = re.findall(r"^\| `(LLM_EDGE_CACHE_[A-Z0-9_]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert listed == [variable.name for variable in settings._VARIABLES]
