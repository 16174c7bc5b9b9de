"""Proxies of the environment (`http_proxy` and its like), which are for other machines and not for this one."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass


def on_this_machine(url: str) -> bool:
    """Whether the URL's host is the loopback: no proxy can reach that, so none is asked."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"


def proxy_hint(url: str) -> str:
    """Names the variable by which a request to `url` goes through a proxy, and what goes around it; else empty.

    A proxy's address may hold a password, so it is not shown.
    """
    parts = urlsplit(url)
    if on_this_machine(url) or proxy_bypass(parts.hostname or ""):
        return ""
    used = next((scheme for scheme in (parts.scheme, "all") if scheme in getproxies_environment()), None)
    if used is None:
        return ""
    names = (f"{used}_proxy", f"{used}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name)), names[0])
    return f"; the request went through the proxy of ${variable}: add {parts.hostname} to no_proxy to go around it"
