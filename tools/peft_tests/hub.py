"""The Hugging Face hub out of reach: who asks it is told at once, and it is known which test asked."""

from __future__ import annotations

import ipaddress
import socket
import types
import urllib.error
import urllib.request
from typing import Any

HUB = "https://huggingface.co"


def reachable(seconds: float = 5) -> bool:
    try:
        with urllib.request.urlopen(HUB, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        # It answered.
        return True
    except (OSError, ValueError):
        return False


class Closed:
    """While it stands, no name outside this machine resolves, and huggingface_hub does not wait between its attempts."""

    def __init__(self) -> None:
        self.asked = False
        self.resolve = socket.getaddrinfo
        socket.getaddrinfo = self.refuse
        self.do_not_wait()

    def refuse(self, host: Any, *arguments: Any, **named: Any) -> Any:
        if is_here(host):
            return self.resolve(host, *arguments, **named)
        self.asked = True
        raise socket.gaierror(socket.EAI_NONAME, f"{host} is out of reach")

    @staticmethod
    def do_not_wait() -> None:
        """Five attempts with up to 8 seconds between them would be half a minute for every file that is asked for."""
        import time

        from huggingface_hub.utils import _http

        impatient = types.ModuleType("time")
        vars(impatient).update(vars(time), sleep=lambda seconds: None)
        _http.time = impatient


def is_here(host: Any) -> bool:
    """Whether a host, as getaddrinfo takes it, is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
