"""From a Python object to the bytes that a framework's cache keeps, and back.

    0     1
    tag | what the serializer made of the object

The tag, one byte, names the serializer. Bytes under another tag are a miss for the reader and never reach its decoder:
nobody unpickles what others wrote, and a change of the option needs no flush. An `int` of signed 64 bits has no tag: it
is kept as ASCII decimal, so that the slab itself can count, under every serializer alike.

`"msgspec"`, the default, is MessagePack in which every type of the list below comes back as exactly that type;
subclasses and everything else are refused instead of being turned into something similar. What MessagePack does not
know is an extension:

    code  type        data
    1     int         two's complement, big-endian; beyond MessagePack's 64 bits
    2-4   tuple, set, frozenset   an array
    5     dict        an array of [key, value]; where a key is not a str
    6     date        ISO 8601
    7-8   datetime, time   [ISO 8601 without zone, fold, zone]
          zone: nil, or [offset in microseconds, its name if it has one], or the key of a ZoneInfo
    9     timedelta   [days, seconds, microseconds]
    10    Decimal     its text
    11    UUID        its 16 bytes
    64-   types of the adapter that asked for them

`"json"` keeps what JSON has; `"pickle"` keeps nearly everything and runs code that the bytes name: whoever may write to
the slab may then run code in every process that reads it. It is used where an operator writes that word, and nowhere
else.

Source: MessagePack specification, extension types.
"""

from __future__ import annotations

import datetime
import decimal
import json
import pickle
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.msgpack import Ext

__all__ = ["Extension", "JsonSerializer", "MsgspecSerializer", "PickleSerializer", "Serializer", "serializer_of"]

_PICKLE_HINT: Final = 'store one of these, or set the option serializer="pickle" after reading what it risks'
_JSON_TYPES: Final = "None, bool, int, finite float, str, list, and dict with str keys"

_ATOMS: Final = frozenset({type(None), bool, int, float, str, bytes})
_JSON_ATOMS: Final = _ATOMS - {bytes}
_CONTAINERS: Final = frozenset({list, dict})
_STR_ONLY: Final = frozenset({str})


class Serializer(Protocol):
    """What turns objects into bytes."""

    @property
    def tag(self) -> bytes:
        """One byte, neither a digit nor a minus."""

    def dumps(self, value: Any, /) -> bytes:
        """Return the bytes of an object.

        Raises:
            TypeError: something in it is of a type that cannot be carried; the message names the type.
            ValueError: something in it has a value that cannot be carried.
        """

    def loads(self, data: bytes, /) -> Any:
        """Return the object of what dumps() returned; anything else raises an exception of any kind."""


class Extension(NamedTuple):
    """How MsgspecSerializer carries one more type."""

    code: int
    """64 to 127, and the same for as long as there are stored values."""
    kind: type
    """Exactly this type, not its subclasses."""
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], Any]


# ---- which types are in it ----


def _is_plain(value: object, atoms: frozenset[type], keys: frozenset[type]) -> bool:
    """Tell whether it consists of these types and of lists and dicts; one set operation for a container's members."""
    kind = type(value)
    if kind is dict:
        assert isinstance(value, dict)
        return {*map(type, value)} <= keys and _are_plain(value.values(), atoms, keys)
    if kind is list:
        assert isinstance(value, list)
        return _are_plain(value, atoms, keys)
    return kind in atoms


def _are_plain(values: Iterable[object], atoms: frozenset[type], keys: frozenset[type]) -> bool:
    others = {*map(type, values)} - atoms
    if not others:
        return True
    return others <= _CONTAINERS and all(_is_plain(one, atoms, keys) for one in values if type(one) in _CONTAINERS)


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _stranger(value: object, atoms: frozenset[type], keys: frozenset[type]) -> str:
    """Name the first type that is in the way."""
    kind = type(value)
    if kind in _CONTAINERS:
        assert isinstance(value, (list, dict))
        for key in value if isinstance(value, dict) else ():
            if type(key) not in keys:
                return f"{_name_of(type(key))} as a key of a dict"
        for one in value.values() if isinstance(value, dict) else value:
            if not _is_plain(one, atoms, keys):
                return _stranger(one, atoms, keys)
    return _name_of(kind)


# ---- msgspec ----

_INT, _TUPLE, _SET, _FROZENSET, _DICT, _DATE, _DATETIME, _TIME, _TIMEDELTA, _DECIMAL, _UUID = range(1, 12)
_FIRST_OF_ADAPTERS: Final = 64
_MICROSECOND: Final = datetime.timedelta(microseconds=1)

_encode: Final = msgspec.msgpack.Encoder().encode


def _pack_zone(zone: datetime.tzinfo | None) -> list[int | str] | str | None:
    if zone is None:
        return None
    if type(zone) is datetime.timezone:
        offset = zone.utcoffset(None) // _MICROSECOND
        is_named = zone != datetime.timezone.utc and len(zone.__getinitargs__()) > 1  # type: ignore[attr-defined]
        return [offset, zone.tzname(None)] if is_named else [offset]
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return zone.key
    raise TypeError(_name_of(type(zone)))


def _unpack_zone(zone: list[Any] | str | None) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    return datetime.timezone(zone[0] * _MICROSECOND, *zone[1:])


def _pack_moment(moment: datetime.datetime | datetime.time) -> bytes:
    return _encode([moment.replace(tzinfo=None).isoformat(), moment.fold, _pack_zone(moment.tzinfo)])


def _pack_int(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)


# The types that are no containers: code, to bytes, from bytes.
_SCALARS: Final[tuple[Extension, ...]] = (
    Extension(_INT, int, _pack_int, lambda data: int.from_bytes(data, "big", signed=True)),
    Extension(
        _DATE,
        datetime.date,
        lambda day: day.isoformat().encode(),
        lambda data: datetime.date.fromisoformat(data.decode()),
    ),
    Extension(
        _TIMEDELTA,
        datetime.timedelta,
        lambda span: _encode([span.days, span.seconds, span.microseconds]),
        lambda data: datetime.timedelta(*msgspec.msgpack.decode(data)),
    ),
    Extension(
        _DECIMAL, decimal.Decimal, lambda number: str(number).encode(), lambda data: decimal.Decimal(data.decode())
    ),
    Extension(_UUID, uuid.UUID, lambda one: one.bytes, lambda data: uuid.UUID(bytes=data)),
    Extension(_DATETIME, datetime.datetime, _pack_moment, lambda data: _unpack_moment(datetime.datetime, data)),
    Extension(_TIME, datetime.time, _pack_moment, lambda data: _unpack_moment(datetime.time, data)),
)


def _unpack_moment(kind: type[datetime.datetime] | type[datetime.time], data: bytes) -> object:
    text, fold, zone = msgspec.msgpack.decode(data)
    return kind.fromisoformat(text).replace(tzinfo=_unpack_zone(zone), fold=fold)


_SEQUENCES: Final[dict[type, int]] = {tuple: _TUPLE, set: _SET, frozenset: _FROZENSET}


class MsgspecSerializer:
    """Typed and safe: what comes back is what was stored, type by type, or it is refused.

    Args:
        extensions: more types to carry.
    """

    tag: Final = b"M"
    _TYPES: Final = (
        "None, bool, int, float, str, bytes, list, dict, tuple, set, frozenset, date, datetime, time, timedelta, "
        "Decimal and UUID"
    )

    def __init__(self, extensions: Iterable[Extension] = ()) -> None:
        added = tuple(extensions)
        if any(not _FIRST_OF_ADAPTERS <= one.code <= 127 for one in added):
            raise ValueError("the codes of extensions are 64 to 127")
        self._packers: dict[type, Extension] = {one.kind: one for one in (*_SCALARS, *added)}
        self._unpackers: dict[int, Callable[[bytes], Any]] = {one.code: one.unpack for one in (*_SCALARS, *added)}
        self._unpackers |= {code: self._unpack_with(kind) for kind, code in _SEQUENCES.items()}
        self._unpackers[_DICT] = self._unpack_with(dict)
        self._decode = msgspec.msgpack.Decoder(ext_hook=self._extension).decode

    def dumps(self, value: Any, /) -> bytes:
        """Return the bytes of an object; see Serializer."""
        try:
            if _is_plain(value, _ATOMS, _ATOMS):
                try:
                    return _encode(value)
                except OverflowError:  # an int beyond 64 bits
                    pass
            return _encode(self._typed(value))
        except RecursionError:
            raise ValueError('serializer "msgspec" cannot carry an object that is nested so deep') from None
        except UnicodeEncodeError:
            raise ValueError('serializer "msgspec" cannot carry a str with a lone surrogate') from None

    def loads(self, data: bytes, /) -> Any:
        """Return the object; see Serializer."""
        return self._decode(data)

    def _typed(self, value: Any) -> Any:
        """Return it with an extension wherever MessagePack alone would lose a type."""
        kind = type(value)
        if kind is list:
            return [self._typed(one) for one in value]
        if kind is dict:
            if {*map(type, value)} <= _STR_ONLY:
                return {key: self._typed(one) for key, one in value.items()}
            return Ext(_DICT, _encode([[self._typed(key), self._typed(one)] for key, one in value.items()]))
        if kind in _SEQUENCES:
            return Ext(_SEQUENCES[kind], _encode([self._typed(one) for one in value]))
        if kind in _ATOMS and (kind is not int or -(1 << 63) <= value < 1 << 64):
            return value
        return self._packed(kind, value)

    def _packed(self, kind: type, value: Any) -> Ext:
        extension = self._packers.get(kind)
        try:
            if extension is None:
                raise TypeError(_name_of(kind))
            return Ext(extension.code, extension.pack(value))
        except TypeError as error:
            raise TypeError(
                f'serializer "msgspec" cannot carry {error}: it carries {self._TYPES}, no subclasses; {_PICKLE_HINT}'
            ) from None

    def _unpack_with(self, kind: Callable[[Any], Any]) -> Callable[[bytes], Any]:
        return lambda data: kind(self._decode(data))

    def _extension(self, code: int, data: memoryview) -> Any:
        return self._unpackers[code](bytes(data))


# ---- the others ----


class JsonSerializer:
    """What JSON has, for values that others read as text; nothing is turned into something similar."""

    tag: Final = b"J"

    def dumps(self, value: Any, /) -> bytes:
        """Return the bytes of an object; see Serializer."""
        try:
            if not _is_plain(value, _JSON_ATOMS, _STR_ONLY):
                stranger = _stranger(value, _JSON_ATOMS, _STR_ONLY)
                raise TypeError(f'serializer "json" cannot carry {stranger}: it carries {_JSON_TYPES}; {_PICKLE_HINT}')
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except RecursionError:
            raise ValueError('serializer "json" cannot carry an object that is nested so deep') from None
        except ValueError as error:  # NaN and infinities, a lone surrogate, a circle, an int of thousands of digits
            raise ValueError(f'serializer "json" cannot carry a value: {error}') from None

    def loads(self, data: bytes, /) -> Any:
        """Return the object; see Serializer."""
        return json.loads(data)


class PickleSerializer:
    """Whatever can be pickled. Reading it runs what the bytes say: for operators who trust every writer of the slab."""

    tag: Final = b"P"

    def dumps(self, value: Any, /) -> bytes:
        """Return the bytes of an object.

        Raises:
            pickle.PicklingError: it cannot be pickled; the message names its type and the part that is in the way.
        """
        try:
            return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except (pickle.PickleError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise pickle.PicklingError(f'serializer "pickle" cannot carry {_name_of(type(value))}: {error}') from error

    def loads(self, data: bytes, /) -> Any:
        """Return the object; see Serializer."""
        return pickle.loads(data)  # noqa: S301 - the operator chose it by name, and only bytes under its tag come here


class _Custom:
    """Somebody's object with dumps() and loads()."""

    tag: Final = b"C"

    def __init__(self, given: Any) -> None:
        self._given = given

    def dumps(self, value: Any, /) -> bytes:
        data = self._given.dumps(value)
        if not isinstance(data, bytes):
            raise TypeError(
                f"serializer {_name_of(type(self._given))} cannot carry {_name_of(type(value))}: "
                f"its dumps() returned {_name_of(type(data))}, not bytes"
            )
        return data

    def loads(self, data: bytes, /) -> Any:
        return self._given.loads(data)


_NAMED: Final[Mapping[str, Callable[[], Serializer]]] = {"json": JsonSerializer, "pickle": PickleSerializer}


def serializer_of(choice: object = None, *, extensions: Iterable[Extension] = ()) -> Serializer:
    """Return the serializer that an option asks for.

    Args:
        choice: "msgspec" (also None), "json", "pickle", or an object with dumps() and loads().
        extensions: more types for "msgspec".

    Raises:
        ValueError: no serializer has that name.
        TypeError: it is neither a name nor an object with these methods.
    """
    if choice is None or choice == "msgspec":
        return MsgspecSerializer(extensions)
    if isinstance(choice, str):
        if choice not in _NAMED:
            raise ValueError(f'serializer must be "msgspec", "json", "pickle" or an object, not {choice!r}')
        return _NAMED[choice]()
    if callable(getattr(choice, "dumps", None)) and callable(getattr(choice, "loads", None)):
        return _Custom(choice)
    raise TypeError(f"serializer must be a name or an object with dumps() and loads(), not {_name_of(type(choice))}")
