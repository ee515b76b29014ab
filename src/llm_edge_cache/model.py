"""What is asked and what is answered: the records that users of the cache see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from llm_edge_cache.canonical import encode_fields

__all__ = ["CacheableRequest", "CachedResponse", "TokenUsage"]


class _RequestSubject(msgspec.Struct, frozen=True, eq=False, dict=True):
    """The fields of a request that may be given by position."""

    model: str
    """The model's name; not empty."""
    prompt: str | None = None
    """A text to complete, where there are no messages."""


class CacheableRequest(_RequestSubject, frozen=True, eq=False, kw_only=True, dict=True):
    """A request whose answer may be kept. Two requests are equal when they have the same key.

    A request cannot be changed; the `with_*` methods return others. What decides about its key is encoded when the
    request is made: lists and dicts that are changed afterwards (a conversation that goes on in the same list) change
    no key. They are not copied, though, so `messages` and `parameters` show the change.

    Its repr shows neither prompt, messages nor parameters, so that no log does.

    Args:
        model: The model's name; not empty.
        prompt: A text to complete. Not together with messages; neither is fine (embeddings have an `input` parameter).
        messages: Chat messages, a list or tuple of dicts of JSON values.
        temperature: Any finite number. Its key is that of the number rounded to two decimals; None is not 0.
        max_tokens: An integral number. None is not 0.
        parameters: Every further parameter of the request by name, as JSON values: tools, response_format, seed ...
            All of them count; none is rounded.
        namespace: Whose answers these are (a tenant, a user); requests of different namespaces never meet.

    Raises:
        TypeError: A field is of a wrong type, or something inside is no JSON value; the message names its place.
        ValueError: model is empty, prompt and messages are both given; NaN, an infinity or a lone surrogate is inside,
            or containers are nested too deep.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    parameters: Mapping[str, Any] = {}
    namespace: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no request, and encode what is one."""
        given: Any = self  # the annotations promise what is checked here
        model, prompt, messages, namespace = given.model, given.prompt, given.messages, given.namespace
        temperature, max_tokens, parameters = given.temperature, given.max_tokens, given.parameters
        if type(model) is not str or not model:
            _require_text("model", model)
        if prompt is not None:
            _require_text("prompt", prompt, may_be_empty=True)
            if messages is not None:
                raise ValueError("give a prompt or messages, not both")
        if temperature is not None and type(temperature) is not float:
            _require_number("temperature", temperature)
        if max_tokens is not None and type(max_tokens) is not int:
            _require_integral("max_tokens", max_tokens)
        if type(parameters) is not dict and not isinstance(parameters, dict):
            raise TypeError(f"parameters must be a dict, not {type(parameters).__name__}")
        if type(namespace) is not str:
            _require_text("namespace", namespace, may_be_empty=True)
        self.__dict__["_canonical"] = encode_fields(
            namespace, model, prompt, messages, temperature, max_tokens, parameters
        )

    @property
    def canonical(self) -> bytes:
        """The canonical encoding (`llm_edge_cache.canonical`) of the request as it was when it was made."""
        encoding: bytes = self.__dict__["_canonical"]
        return encoding

    def with_temperature(self, temperature: float | None) -> CacheableRequest:
        """Return this request with another temperature."""
        return msgspec.structs.replace(self, temperature=temperature)

    def with_max_tokens(self, max_tokens: int | None) -> CacheableRequest:
        """Return this request with another limit of tokens."""
        return msgspec.structs.replace(self, max_tokens=max_tokens)

    def with_parameter(self, name: str, value: Any) -> CacheableRequest:
        """Return this request with one further parameter, or another value of it."""
        if not isinstance(name, str):
            raise TypeError(f"a parameter's name must be a str, not {type(name).__name__}")
        return msgspec.structs.replace(self, parameters={**self.parameters, name: value})

    def with_namespace(self, namespace: str) -> CacheableRequest:
        """Return this request for another namespace."""
        return msgspec.structs.replace(self, namespace=namespace)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CacheableRequest):
            return NotImplemented
        return self.canonical == other.canonical

    def __hash__(self) -> int:
        return hash(self.canonical)

    def __repr__(self) -> str:
        return f"<CacheableRequest model={self.model!r}, {len(self.canonical)} bytes encoded>"

    def __copy__(self) -> CacheableRequest:
        return self  # msgspec's own would leave the encoding behind


def _require_text(field: str, value: object, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a str, not {type(value).__name__}")
    if not value and not may_be_empty:
        raise ValueError(f"{field} must not be empty")


def _require_number(field: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field} must be a number or None, not {type(value).__name__}")


def _require_integral(field: str, value: object) -> None:
    _require_number(field, value)
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{field} must be an integral number, not {value}")


class TokenUsage(msgspec.Struct, frozen=True):
    """The tokens that an answer cost, as the provider counted them."""

    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)]
    total_tokens: Annotated[int, msgspec.Meta(ge=0)]


class _ResponseSubject(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fields of a response that may be given by position."""

    content: str
    """The answer's text."""
    model: str
    """The model that gave it, as the provider names it."""
    tokens: TokenUsage | None = None
    cached_at: float | None = None
    """When it was stored; seconds since the epoch."""


class CachedResponse(_ResponseSubject, frozen=True, kw_only=True, omit_defaults=True):
    """An answer, as the cache keeps it. Its repr shows no text, so that no log does.

    Args:
        content: The answer's text.
        model: The model that gave it.
        tokens: What it cost; None where the provider did not say.
        cached_at: When it was stored, seconds since the epoch; None before that.
        raw: The provider's answer: bytes are kept as they are, JSON values as values (integers within 64 bits, tuples
            come back as lists).
        finish_reason: Why it ended ("stop", "length", "tool_calls" ...), in the provider's words.
        metadata: Whatever the caller wants to find beside it: JSON values and bytes by name.
    """

    raw: Any = None
    finish_reason: str | None = None
    metadata: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<CachedResponse model={self.model!r}, {len(self.content)} characters>"
