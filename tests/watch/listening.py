"""On which addresses a process waits for connections, as Linux knows it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

LISTENS = "0A"


def addresses(pid: int) -> set[str]:
    """Those of its sockets, each without the port."""
    own = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            own.add(os.readlink(path))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == LISTENS and f"socket:[{fields[9]}]" in own:
                found.add(_read(local.partition(":")[0]))
    return found


def _read(words: str) -> str:
    """Each four bytes stand backwards."""
    parts = [bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8)]
    family = socket.AF_INET if len(parts) == 1 else socket.AF_INET6
    address = ip_address(socket.inet_ntop(family, b"".join(parts)))
    return str(getattr(address, "ipv4_mapped", None) or address)
