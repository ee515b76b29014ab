"""Where Redis is: a URL, read into a record.

    redis://[user:password@]host[:port][/db]                   one server; rediss:// with TLS
    unix://[user:password@]/path/to/socket[?db=N]              one server on this host
    redis+sentinel://[...@]host[:port],host[:port]/service[/db]    the master that these Sentinels name; rediss+sentinel://
    redis+cluster://[...@]host[:port],host[:port]              a Cluster that these nodes belong to; rediss+cluster://

Names and passwords are percent-decoded, IPv6 addresses stand in brackets. Options after `?`: `db`; with Sentinels
`sentinel_username`, `sentinel_password`; with TLS `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` (files in PEM),
`ssl_cert_reqs` (none, optional, required), `ssl_check_hostname` (true, false).

No error made here quotes from a URL that may hold a password: with one unescaped character any part of it can be the
password's.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from llm_edge_cache.errors import RedisConfigError

__all__ = ["Kind", "RedisTarget", "TlsOptions", "parse_redis_url"]

Kind = Literal["single", "sentinel", "cluster"]
CertReqs = Literal["none", "optional", "required"]

_SCHEMES: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_DEFAULT_PORT: Final[dict[Kind, int]] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_TLS_NAMES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_NAMES: Final = ("sentinel_username", "sentinel_password")
_TRUTH: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class TlsOptions:
    """How a server's certificate is judged, and which one is shown to it."""

    ca_certs: str | None = None
    """File of certificate authorities in PEM; None: the system's."""
    certfile: str | None = None
    keyfile: str | None = None
    cert_reqs: CertReqs = "required"
    check_hostname: bool = True


@dataclass(frozen=True)
class RedisTarget:
    """One Redis: its nodes and how to log in. `repr` and `str` hold no password."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()
    """(host, port): the server, the Sentinels, or some nodes of the Cluster. Empty with a Unix socket."""
    unix_path: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    service: str | None = None
    """The name that the Sentinels know the master by."""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_options: TlsOptions = TlsOptions()

    @property
    def where(self) -> str:
        """The address without credentials, for logs and messages."""
        if self.unix_path is not None:
            return f"unix://{self.unix_path}"
        scheme = "rediss" if self.tls else "redis"
        nodes = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        if self.kind == "single":
            return f"{scheme}://{nodes}/{self.db}"
        return f"{scheme}+{self.kind}://{nodes}" + (f"/{self.service}/{self.db}" if self.service else "")


def parse_redis_url(url: str) -> RedisTarget:
    """Read a Redis URL.

    Args:
        url: One of the forms that this module's documentation lists.

    Raises:
        RedisConfigError: It is none of them; the message says which part is wrong and what is allowed, and quotes
            nothing of a URL that may hold a password.
    """
    if not isinstance(url, str):
        raise TypeError(f"a Redis URL is a str, not {type(url).__name__}")
    return _Reading(url).target()


class _Reading:
    """One URL while it is taken apart."""

    def __init__(self, url: str) -> None:
        self._may_quote = "@" not in url and "password" not in url
        scheme, separator, rest = url.partition("://")
        if not separator or scheme.lower() not in _SCHEMES:
            allowed = ", ".join(f"{name}://" for name in _SCHEMES)
            raise self._error("the scheme is unknown", scheme if separator else url, f"one of {allowed}")
        self._scheme = scheme.lower()
        self._kind, self._tls = _SCHEMES[self._scheme]
        if "#" in rest:
            raise self._error("'#' has no meaning in it", url, "percent-encode it as %23")
        location, _, query = rest.partition("?")
        authority, slash, path = location.partition("/")
        if "@" in path + query:
            encoded = "percent-encode '/', '?' and '@' in the user name, the password, the path and the options"
            raise self._error("'@' stands where it has no meaning", "", encoded)
        self._userinfo, _, self._hosts = authority.rpartition("@")
        self._path = slash + path
        self._options = self._read_options(query)

    def target(self) -> RedisTarget:
        username, _, password = self._userinfo.partition(":")
        service, db, unix_path = self._read_path()
        return RedisTarget(
            kind=self._kind,
            nodes=() if unix_path else self._read_nodes(),
            unix_path=unix_path,
            username=self._decode(username, "user name") or None,
            password=self._decode(password, "password") or None,
            db=db,
            service=service,
            sentinel_username=self._options.get("sentinel_username"),
            sentinel_password=self._options.get("sentinel_password"),
            tls=self._tls,
            tls_options=self._read_tls(),
        )

    def _error(self, wrong: str, value: str, allowed: str) -> RedisConfigError:
        quoted = f" ({value!r})" if value and self._may_quote else ""
        return RedisConfigError(f"Redis URL: {wrong}{quoted}: {allowed}")

    def _decode(self, text: str, part: str) -> str:
        decoded = urllib.parse.unquote(text, errors="replace")  # strict would put the bytes into the exception
        if "\ufffd" in decoded:
            raise self._error(f"the {part} is not UTF-8", "", "percent-encode its UTF-8 bytes")
        return decoded

    def _read_options(self, query: str) -> dict[str, str]:
        allowed = [] if self._kind == "cluster" else ["db"]
        allowed += _SENTINEL_NAMES if self._kind == "sentinel" else ()
        allowed += _TLS_NAMES if self._tls else ()
        options: dict[str, str] = {}
        for pair in filter(None, query.split("&")):
            name, equals, value = pair.partition("=")
            if name not in allowed or name in options or not equals:
                names = ", ".join(allowed) or "none"
                raise self._error("an option is unknown, given twice or without a value", pair, f"allowed: {names}")
            options[name] = self._decode(value, f"option {name}")
        return options

    def _read_nodes(self) -> tuple[tuple[str, int], ...]:
        hosts = self._hosts.split(",")
        if self._kind == "single" and len(hosts) > 1:
            raise self._error("it names several hosts", self._hosts, "use redis+sentinel:// or redis+cluster://")
        return tuple(self._read_node(host) for host in hosts)

    def _read_node(self, text: str) -> tuple[str, int]:
        if text.startswith("["):
            host, bracket, port = text[1:].partition("]")
            is_sound = bool(bracket) and (not port or port.startswith(":")) and ":" in host
        else:
            host, _, port = text.partition(":")
            port = f":{port}" if port else ""
            is_sound = not host.startswith("]")
        if not host and self._kind == "single" and not port:
            host = "localhost"
        if not host or not is_sound:
            raise self._error("a host is missing or malformed", text, "host, host:port or [IPv6]:port")
        return self._decode(host, "host"), self._read_port(port[1:]) if port else _DEFAULT_PORT[self._kind]

    def _read_port(self, text: str) -> int:
        port = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
        if not 1 <= port <= 65535:
            raise self._error("a port is not a number", text, "1 to 65535")
        return port

    def _read_path(self) -> tuple[str | None, int, str | None]:
        """The Sentinels' service, the database, the Unix socket's path."""
        if self._scheme == "unix":
            if len(self._path) < 2 or self._hosts:
                raise self._error("the socket's path is missing", self._path, "unix:///absolute/path[?db=N]")
            return None, self._read_db([]), self._decode(self._path, "path")
        parts = [part for part in self._path.split("/") if part]
        if self._kind == "cluster":
            if parts:
                raise self._error("a Cluster has one database and no path", self._path, "leave the path out")
            return None, 0, None
        service = None
        if self._kind == "sentinel":
            if not parts:
                raise self._error("the master's name is missing", self._path, "/service or /service/db")
            service = self._decode(parts.pop(0), "master's name")
        return service, self._read_db(parts), None

    def _read_db(self, parts: list[str]) -> int:
        given = parts + ([self._options["db"]] if "db" in self._options else [])
        if not given:
            return 0
        text = given[0]
        if len(given) > 1 or not (text.isascii() and text.isdecimal() and len(text) <= 9):
            raise self._error("the database is not one number", "/".join(given), "0 or more, once")
        return int(text)

    def _read_tls(self) -> TlsOptions:
        cert_reqs = self._options.get("ssl_cert_reqs", "required")
        if cert_reqs not in get_args(CertReqs):
            raise self._error("ssl_cert_reqs is not known", cert_reqs, "none, optional or required")
        check = self._options.get("ssl_check_hostname", "true").lower()
        if check not in _TRUTH:
            raise self._error("ssl_check_hostname is not known", check, "true or false")
        certfile, keyfile = self._options.get("ssl_certfile"), self._options.get("ssl_keyfile")
        if keyfile and not certfile:
            raise self._error("ssl_keyfile has no certificate", "", "give ssl_certfile too")
        return TlsOptions(
            ca_certs=self._options.get("ssl_ca_certs"),
            certfile=certfile,
            keyfile=keyfile,
            cert_reqs=cert_reqs,  # type: ignore[arg-type]
            check_hostname=_TRUTH[check] and cert_reqs != "none",
        )
