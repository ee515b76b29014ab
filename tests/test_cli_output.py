"""How commands print."""

from __future__ import annotations

import io

import pytest

from llm_edge_cache.cli import output
from llm_edge_cache.cli.output import ProgressBar, columns, key_text, size_text, time_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64.0 MiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_have_the_unit_that_people_choose(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "never"), (0.0, "0 ns"), (250e-9, "250 ns"), (1.5e-6, "1.5 µs"), (0.0421, "42.1 ms"), (45, "45 s"),
     (119, "119 s"), (3600, "60 min 0 s"), (7260, "2 h 1 min"), (200_000, "2 d 7 h")],
)  # fmt: skip
def test_times_have_about_two_digits(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("key", "text"),
    [(b"plain", "plain"), ("grün".encode(), "grün"), (b"a\nb", r"a\nb"), (b"\xff\x00", r"\xff\x00"), (b"a\\b", r"a\\b"),
     (b"\x1b[2J", r"\x1b[2J")],
)  # fmt: skip
def test_keys_reach_the_terminal_without_anything_that_it_would_obey(key: bytes, text: str) -> None:
    assert key_text(key) == text


def test_columns_are_aligned() -> None:
    assert columns([("a", "1"), ("long", "22")], right=(1,)) == ["a      1", "long  22"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_on_a_terminal_and_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(output, "_PATIENCE_SECONDS", 0.0)
    with ProgressBar("snapshot", "entries") as bar:
        bar(500, 1000)
    assert "snapshot [###############...............]  50%  500 of 1,000 entries" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_bar_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    monkeypatch.setattr(output, "_PATIENCE_SECONDS", 0.0)
    with ProgressBar("snapshot", "bytes") as bar:
        bar(500, 1000)
    assert pipe.getvalue() == ""
