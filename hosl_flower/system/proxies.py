"""Proxies of the environment: connections within this machine use none, and one that cannot be used
is named.

httpx, with which Flower and huggingface_hub connect, refuses to open any client, also one that
would use no proxy, when a proxy variable has a scheme or an address that it does not support.
"""

import ipaddress
import os
import urllib.request
from collections.abc import Mapping

import httpx

from hosl_flower.errors import first_line

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEFT_OUT = "HOSL_UNUSABLE_PROXIES"  # in the environment of processes that were started without them
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def is_loopback(host: str) -> bool:
    """Whether connections to a host stay on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def without_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that connect to each other on this machine.

    no_proxy lists this machine's addresses and no entry that httpx cannot read. Proxies that httpx
    cannot use are removed; LEFT_OUT names them, so that the hub counts as unreachable rather than
    being asked without its proxy.
    """
    faults = {name: fault for name in environment if (fault := _fault(name, environment[name]))}
    result = {name: value for name, value in environment.items() if name not in faults}
    kept = list(filter(_is_understood, _exceptions(environment)))
    joined = ",".join([*kept, *(host for host in LOOPBACK if host not in kept)])
    result |= {"no_proxy": joined, "NO_PROXY": joined}
    if faults:
        result[LEFT_OUT] = "; ".join(faults.values())
    return result


def unusable() -> str:
    """The proxies of this process's environment that cannot be used, and why; "" for none."""
    exceptions = _exceptions(os.environ)
    if "*" in exceptions:
        return ""
    found = [os.environ.get(LEFT_OUT, "")]
    found += [_fault(name, value) for name, value in os.environ.items()]
    unread = [entry for entry in exceptions if not _is_understood(entry)]
    found += [f"no_proxy has {entry!r}, which httpx cannot read" for entry in unread]
    return "; ".join(filter(None, found))


def between(url: str) -> str:
    """The proxy through which this process connects to a URL, or those it cannot use; "" for
    none."""
    fault = unusable()
    if fault:
        return fault
    target, proxies = httpx.URL(url), urllib.request.getproxies()
    scheme = target.scheme if target.scheme in proxies else "all"
    if scheme not in proxies or urllib.request.proxy_bypass(target.host):
        return ""
    return f"{scheme}_proxy = {_shown(proxies[scheme])}"


def _exceptions(environment: Mapping[str, str]) -> list[str]:
    """The entries of no_proxy."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


def _fault(name: str, value: str) -> str:
    """The reason for which a variable is a proxy that httpx cannot use; "" for any other."""
    if name.lower() not in _PROXIES or not value:
        return ""
    url = value if "://" in value else f"http://{value}"  # as httpx reads it
    try:
        httpx.Client(proxy=url, trust_env=False, verify=False).close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        missing = isinstance(error, ImportError)
        hint = "it needs the package socksio: pip install 'httpx[socks]'" if missing else ""
        return f"{name} = {_shown(value)} cannot be used ({hint or first_line(error)})"
    return ""


def _is_understood(entry: str) -> bool:
    """Whether httpx can read an entry of no_proxy: it fails at networks of IPv6."""
    try:
        ipaddress.ip_address(entry)
    except ValueError:
        try:
            httpx.URL(f"all://*{entry}")
        except httpx.InvalidURL:
            return False
    return True


def _shown(proxy: str) -> str:
    """A proxy without the user and password that it may have."""
    scheme, separator, rest = proxy.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
