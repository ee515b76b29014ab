"""No password, prompt, answer or whole key comes out by a log, a warning, an error or a repr, whatever happens."""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_proxy import FaultProxy
from manager_faces import KINDS, Face
from redis_servers import RedisServer, wait_for

from llm_edge_cache import CacheableRequest, CachedResponse, generate_cache_key
from llm_edge_cache.core import Look
from llm_edge_cache.deferred import Write
from llm_edge_cache.errors import RedisConfigError
from llm_edge_cache.redis_client import Batch, Call, LuaScript, RedisTrouble, Script
from llm_edge_cache.redis_tier import Found
from llm_edge_cache.settings import load_settings

PASSWORD = "pAssw0rd-that-nobody-may-see"
PROMPT = "pRompt-that-nobody-may-see"
ANSWER = "aNswer-that-nobody-may-see"
REQUEST = CacheableRequest("model", PROMPT, parameters={"user": PROMPT})
CHAT = CacheableRequest("model", messages=[{"role": "user", "content": PROMPT}])
RESPONSE = CachedResponse(ANSWER, "model", raw={"text": ANSWER}, metadata={"note": ANSWER})
QUOTING = LuaScript("return redis.error_reply('ERR ' .. ARGV[1])")
SECRETS = (PASSWORD, PROMPT, ANSWER, generate_cache_key(REQUEST), generate_cache_key(CHAT))


class Witness(logging.Handler):
    """Keeps all that is said: records in full, errors with their chains."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.heard: list[str] = []
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(args)r"))

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record) + repr(vars(record)))

    def saw(self, thing: object) -> None:
        self.heard.append(repr(thing) + str(thing))

    def caught(self, error: BaseException) -> None:
        self.heard.append("".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)))
        inner = error.__cause__ if error.__suppress_context__ else error.__context__
        if inner is not None:
            self.caught(inner)

    @contextlib.contextmanager
    def refused(self, *kinds: type[BaseException]) -> Iterator[None]:
        with pytest.raises(kinds) as caught:
            yield
        self.caught(caught.value)

    def has_heard_no_secret(self) -> None:
        for text in self.heard:
            for secret in SECRETS:
                assert secret not in text, text.replace(secret, "<the secret>")


@pytest.fixture
def witness() -> Iterator[Witness]:
    made = Witness()
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(1)
    root.addHandler(made)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield made
        made.heard += [str(warning) for warning in warned]
    root.removeHandler(made)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    made.has_heard_no_secret()


def use(face: Face, witness: Witness) -> None:
    """Every operation, and a look at what it returns."""

    def fail() -> CachedResponse:
        raise LookupError("the provider is away")

    for request in (REQUEST, CHAT):
        witness.saw(request)
        witness.saw(face.lookup(request))
        witness.saw(face.store(request, RESPONSE, tags=(PROMPT,)))
        witness.saw(face.lookup(request))
        face.flush()
        face.forget(request)
        witness.saw(face.lookup(request))
        face.forget(request)
        witness.saw(face.get_or_compute(request, lambda: RESPONSE, tags=(PROMPT,)))
        face.flush()
        face.invalidate_tag(PROMPT)
        witness.saw(face.lookup(request))
        face.invalidate(request)
        with witness.refused(LookupError):
            face.get_or_compute(request, fail)
    face.clear_all()
    for thing in (face.health_check(), face.metrics_snapshot(), face.l2_approximate_size(), face.slab.stats()):
        witness.saw(thing)


def look_at_parts(face: Face, witness: Witness) -> None:
    engine = face.engine
    request = CacheableRequest("model", PROMPT + "?")
    look = engine.core.look(generate_cache_key(request).encode())
    assert isinstance(look, Look)
    assert engine.tier is not None
    parts: list[Any] = [face.cache, getattr(face.cache, "manager", None), look, engine._target, *vars(engine).values()]
    parts += [RESPONSE, Found(look.entry, ANSWER.encode(), b"", False)]  # type: ignore[arg-type]
    write = Write(generate_cache_key(REQUEST).encode(), ANSWER.encode(), 1, 1, 1.0)
    call = Call(("SET", "key", ANSWER))
    script = engine.tier.write_command(write.key, write.data, 1, 1.0)
    parts += [write, call, script, Batch((call, script))]
    parts += [found for found in gc.get_objects() if type(found).__name__.endswith("Link")]
    for part in parts:
        witness.saw(part)


def misuse(face: Face, witness: Witness) -> None:
    with witness.refused(TypeError):
        face.store(REQUEST, ANSWER)
    with witness.refused(TypeError, ValueError):
        face.store(REQUEST, CachedResponse(ANSWER, "model", metadata={"x": object()}))
    with witness.refused(TypeError, ValueError):
        face.store(REQUEST, CachedResponse(ANSWER, "model", raw=1 << 80))
    with witness.refused(TypeError, AttributeError):
        face.lookup(PROMPT)
    with witness.refused(TypeError):
        face.get_or_compute(CHAT, lambda: ANSWER)
    with witness.refused(TypeError, ValueError):
        CacheableRequest("model", PROMPT, messages=[{"content": PROMPT}])
    with witness.refused(TypeError, ValueError):
        CacheableRequest("model", messages=[{"content": {PROMPT}}])  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", KINDS)
def test_health_and_misuse_give_nothing_away(kind: str, name: str, witness: Witness) -> None:
    with RedisServer(password=PASSWORD) as server, Face(kind, name, server.url, debug=True) as face:
        face.wait_usable()
        use(face, witness)
        look_at_parts(face, witness)
        misuse(face, witness)
        use(face, witness)
        assert face.engine.l2 is not None
        witness.saw(face.engine.l2)


def change_password(server: RedisServer, _: FaultProxy) -> None:
    server.ask("CONFIG", "SET", "requirepass", "another")
    server.password = "another"
    server.ask("CLIENT", "KILL", "TYPE", "normal")


FAULTS: dict[str, Callable[[RedisServer, FaultProxy], object]] = {
    "killed": lambda server, _: server.kill(),
    "cut": lambda _, proxy: proxy.refuse(),
    "silent": lambda _, proxy: proxy.blackhole(),
    "reset": lambda _, proxy: proxy.reset_mid_reply(7),
    "locked": change_password,
    "full": lambda server, _: server.ask("CONFIG", "SET", "maxmemory", 1),
    "replica": lambda server, _: server.ask("REPLICAOF", "127.0.0.1", 1),
    "an error that quotes": lambda _, proxy: proxy.garbage(f"-ERR {PASSWORD} {ANSWER}\r\n".encode()),
    "a refusal that quotes": lambda _, proxy: proxy.garbage(f"-WRONGPASS {PASSWORD} {ANSWER}\r\n".encode()),
    "no protocol": lambda _, proxy: proxy.garbage(f"{PASSWORD} {ANSWER}\r\n".encode()),
    "a wrong length": lambda _, proxy: proxy.garbage(f"${ANSWER}\r\n".encode()),
    "an answer to all": lambda _, proxy: proxy.garbage(f"+{ANSWER}\r\n".encode()),
    "a list for all": lambda _, proxy: proxy.garbage(f"*2\r\n+{ANSWER}\r\n+{ANSWER}\r\n".encode()),
    "a number for all": lambda _, proxy: proxy.garbage(b":7\r\n"),
    "a nothing for all": lambda _, proxy: proxy.garbage(b"$-1\r\n"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_give_nothing_away(fault: str, kind: str, name: str, witness: Witness) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(password=PASSWORD))
        proxy = stack.enter_context(FaultProxy(server.address))
        url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}/0"
        face = stack.enter_context(Face(kind, name, url, debug=True, operation_timeout_ms=200))
        face.wait_usable()
        FAULTS[fault](server, proxy)
        use(face, witness)
        assert face.engine.redis is not None
        with contextlib.suppress(RedisTrouble):
            try:
                face.engine.redis.run(Script(QUOTING, b"key", (ANSWER,)))
            except RedisTrouble as trouble:
                witness.caught(trouble)
                raise


def test_what_strangers_wrote_is_not_quoted(name: str, witness: Witness) -> None:
    with RedisServer(password=PASSWORD) as server, Face("threads", name, server.url) as face:
        face.wait_usable()
        assert face.engine.tier is not None
        names = face.engine.tier.names
        for key in (face.redis_name(REQUEST), names.tag(PROMPT), names.cleared, names.events):
            server.ask("SET", key, ANSWER)
            use(face, witness)
        server.ask("DEL", names.events)
        server.ask("XADD", names.events, "*", "kind", "key", "name", ANSWER)
        face.slab.set(b"\0llm-edge-cache:journal", ANSWER.encode(), ttl=None, tti=None)
        use(face, witness)


def test_urls_are_not_quoted(witness: Witness) -> None:
    for url in (
        f"redis://:{PASSWORD}@host:port",
        f"redis://:{PASSWORD}@/host/1/2",
        f"redis//:{PASSWORD}@host",
        f"redis+sentinel://:{PASSWORD}@host",
        f"redis://host?password={PASSWORD}",
    ):
        with witness.refused(RedisConfigError):
            Face("threads", "never", url)
    witness.saw(load_settings({"LLM_EDGE_CACHE_REDIS_URL": f"redis://:{PASSWORD}@host"}))


def test_the_witness_hears_what_is_said(name: str) -> None:
    """The other tests prove nothing if it does not."""
    witness = Witness()
    logger = logging.getLogger("llm_edge_cache")
    logger.addHandler(witness)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with RedisServer(password="another") as server:
            url = server.url.replace("another", PASSWORD)
            with Face("threads", name, url) as face:
                wait_for(face.is_open, "the breaker opens")
    finally:
        logger.removeHandler(witness)
        logger.setLevel(level)
    assert any("rights were refused" in text for text in witness.heard)
    witness.heard.append(f"...{PASSWORD}...")
    with pytest.raises(AssertionError):
        witness.has_heard_no_secret()
