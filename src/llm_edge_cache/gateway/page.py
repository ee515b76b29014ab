"""The dashboard's page: one answer that needs nothing else from anywhere, and says so to the browser."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources

from llm_edge_cache.gateway.answers import HeaderList

__all__ = ["dashboard"]


@functools.cache
def dashboard() -> tuple[HeaderList, bytes]:
    """Return the page's headers and body. Its parts lie beside this module, to be edited as what they are."""
    style = _part("dashboard.css")
    script = _part("charts.js") + _part("dashboard.js")
    body = _part("dashboard.html").replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]
    return headers, body.encode()


def _part(name: str) -> str:
    return (importlib.resources.files(__package__) / "dashboard" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """Return the one inline script or style that may run, as a source of the policy (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
