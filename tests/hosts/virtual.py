"""Hosts on one machine: a network of its own for each, an ssh server, keys that are thrown away.

A host is a process with its own network, host name, processes and mounts, joined to the others by a
bridge. They share the machine's disks, as hosts with a network disk do, unless a folder is hidden.
Needs Linux, root, `ip`, `unshare`, `nsenter`, `sshd` and `pdsh` (Debian: iproute2, util-linux,
openssh-server, pdsh).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh", "sshd")
SPACES = ("--net", "--uts", "--mount", "--pid")
HOST = """
set -e
hostname {name}
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mkdir -p /run/sshd
mount -t tmpfs -o mode=755 none /run/sshd
ip link set lo up
touch {folder}/{name}.begun
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
SetEnv OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
"""
SSH = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 10
"""


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if absent := [tool for tool in TOOLS if shutil.which(tool, path=path) is None]:
        return f"hosts need {', '.join(absent)}, not found here"
    if os.geteuid() != 0:
        return "hosts need root, for networks of their own"
    trial = ["unshare", *SPACES, "--fork", "ip", "link", "add", "type", "veth"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"networks of their own are not permitted: {done.stderr}" if done.returncode else ""


class Hosts:
    """Use it as a context; at its end every process of every host is gone."""

    def __init__(self, folder: Path, count: int) -> None:
        self.names = [f"host{number}" for number in range(1, count + 1)]
        self._folder = folder
        self._switch: subprocess.Popen[bytes] | None = None
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        folder = self._folder
        folder.mkdir(parents=True)
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        lines = [f"{self.address(name)} {name}" for name in self.names]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        self._switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        try:
            time.sleep(0.3)
            self._in_switch("link", "add", "br0", "type", "bridge")
            self._in_switch("link", "set", "br0", "up")
            for name in self.names:
                self._begin(name)
            self._wait_for_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._inits):
            self.lose(name)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def command(self, name: str, *words: str) -> list[str]:
        """`words` as they run on a host."""
        return [
            "nsenter",
            "--target",
            str(self._pid(name)),
            *SPACES,
            "--wdns=" + os.getcwd(),
            *words,
        ]

    def hide(self, name: str, folder: Path) -> None:
        """A folder is empty on one host, as a disk that is not mounted there."""
        _run(*self.command(name, "mount", "-t", "tmpfs", "none", str(folder)))

    def unplug(self, name: str) -> None:
        """The network of a host is down; its processes go on."""
        self._in_switch("link", "set", f"to-{name}", "down")

    def plug_in(self, name: str) -> None:
        self._in_switch("link", "set", f"to-{name}", "up")

    def limit(self, name: str, rate: str) -> None:
        """What a host sends and is sent, each, as `100mbit`; no limit where empty."""
        words = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        for where in (self.command(name), self._of_switch()):
            device = "eth0" if where[2] == str(self._pid(name)) else f"to-{name}"
            subprocess.run(
                [*where, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True
            )
            if rate:
                _run(*where, "tc", "qdisc", "add", "dev", device, *words)

    def bytes_sent(self, name: str) -> int:
        """By a host, since its beginning."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        script = f"mount -t sysfs none /sys 2>/dev/null; cat {path}"
        done = subprocess.run(
            self.command(name, "sh", "-c", script), capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    def rank(self, name: str) -> str:
        """The number, on the host, of the process that trains there."""
        found = subprocess.run(
            self.command(name, "pgrep", "-o", "-f", "--", " -m trainer "),
            capture_output=True,
            text=True,
        )
        assert found.stdout, f"nobody trains on {name}"
        return found.stdout.split()[0]

    def signal(self, name: str, number: str, pid: str) -> None:
        _run(*self.command(name, "kill", f"-{number}", pid))

    def lose(self, name: str) -> None:
        """A host ends, with all its processes, as by a cut of its power."""
        init = self._inits.pop(name)
        try:
            os.kill(self._child(init.pid), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            init.kill()
        init.wait()

    def _begin(self, name: str) -> None:
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
        values = {"name": name, "folder": self._folder, "address": self.address(name)}
        script = HOST.format(**values, sshd=sshd)
        with (self._folder / f"{name}.log").open("wb") as log:
            self._inits[name] = subprocess.Popen(
                ["unshare", *SPACES, "--fork", "--mount-proc", "bash", "-c", script],
                stdout=log,
                stderr=log,
            )
        _until(lambda: (self._folder / f"{name}.begun").exists(), f"{name} does not begin")
        peer = ("peer", "name", "eth0", "netns", str(self._pid(name)))
        self._in_switch("link", "add", f"to-{name}", "type", "veth", *peer)
        self._in_switch("link", "set", f"to-{name}", "master", "br0", "up")

    def _wait_for_ssh(self) -> None:
        for name in self.names:
            command = self.command(self.names[0], "ssh", name, "true")
            _until(
                lambda c=command: subprocess.run(c, capture_output=True).returncode == 0,
                f"no ssh to {name}",
            )

    def _pid(self, name: str) -> int:
        return self._child(self._inits[name].pid)

    @staticmethod
    def _child(pid: int) -> int:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _in_switch(self, *words: str) -> None:
        _run(*self._of_switch(), "ip", *words)

    def _of_switch(self) -> list[str]:
        assert self._switch is not None
        return ["nsenter", "--target", str(self._switch.pid), "--net"]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _until(condition: Callable[[], bool], what: str, *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)
