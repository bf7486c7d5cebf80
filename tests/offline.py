"""No network in the tests: a hook of Python refuses every connection to another machine."""

import ipaddress
import socket
import sys

# Attempts to reach another machine, of the test that is running.
attempts = []

_LOCAL_NAMES = {"", "localhost", "ip6-localhost", socket.gethostname(), socket.getfqdn()}


def is_local(host):
    """Whether a host, by name or number, is this machine."""
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in _LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _host_of(event, arguments):
    """The host that an event is about; `None` where it is about no other machine."""
    match event:
        case "socket.connect" | "socket.sendto":
            address = arguments[1]
            return address[0] if isinstance(address, tuple) else None  # else a path of this machine
        case "socket.getaddrinfo" | "socket.gethostbyname":
            return arguments[0]
    return None


def refuse_the_network(event, arguments):
    """
    An audit hook.

    Raises:
        OSError: another machine would be reached, as where there is no network. Libraries may take
            that for an answer, so the test fails by `attempts` as well.
    """
    host = _host_of(event, arguments) if event.startswith("socket.") else None
    if not is_local(host):
        attempts.append(f"{event} {host!r}")
        raise OSError(f"Tests do not reach other machines, but this one asks for {host!r}.")


def install():
    """For good: a hook cannot be removed."""
    sys.addaudithook(refuse_the_network)
