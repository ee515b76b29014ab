"""The stand-in for the LLM providers: after the recorded delay it gives the recorded answer."""

from __future__ import annotations

from collections.abc import Iterable

from exchanges import Exchange

LONGEST_SECONDS = 1.5  # a demonstration need not wait for the slowest recording, which took over a minute


class RecordedProvider:
    """Answers that were recorded, by the key of their request."""

    def __init__(self, exchanges: Iterable[Exchange], delay_scale: float) -> None:
        self._exchanges = {exchange.key: exchange for exchange in exchanges}
        self._delay_scale = delay_scale

    def find(self, key: bytes) -> Exchange | None:
        """Return the recorded exchange, or None."""
        return self._exchanges.get(key)

    def delay(self, exchange: Exchange) -> float:
        """Return the seconds to wait before answering."""
        return min(exchange.seconds, LONGEST_SECONDS) * self._delay_scale
