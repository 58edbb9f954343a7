"""Three virtual nodes under a real Slurm, from Debian's packages, without systemd, cgroups or a network.

Debian builds slurmd with --enable-multiple-slurmd, so one machine runs a slurmd for each node. Where the
kernel allows it a node has its own host name, its own network (a namespace with an address of
198.18.78.0/24, on a bridge that leads nowhere) and its own scratch disk, so what works here by accident on
one machine, such as MASTER_ADDR=localhost, fails as it would on a cluster. Needs root and, at first, apt.

The traps: a daemon inherits the lock of the process that starts it, so files are opened close-on-exec (as
Python does) and daemons get no standard streams; slurmctld forks before it has read its configuration, so
only its answer says that it is up; and step daemons outlive slurmd.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HOME = Path(tempfile.gettempdir()) / "latemask-slurm"
CONF = HOME / "etc" / "slurm.conf"
SCRATCH = HOME / "scratch"
"""Each node's own disk, at the same path on all of them."""
NODES = ("lm1", "lm2", "lm3")
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "libpmix2", "iproute2", "openmpi-bin"]
ENVIRON = {
    "SLURM_CONF": str(CONF),
    "PATH": os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
_PORT = 17817
_SUBNET, _BRIDGE, _NAMESPACE = "198.18.78", "latemask0", "latemask-{}"
_MARK = "# latemask-slurm"


class Unavailable(Exception):
    """This machine cannot have a cluster; says why."""


def run(*command: str, seconds: float = 300, check: bool = True) -> str:
    """Output of a command that has the cluster's environment."""
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRON},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


# ---- up and down ---------------------------------------------------------------------------------


@contextlib.contextmanager
def used() -> Iterator[None]:
    """A cluster for the length of a block: started by its first user on this machine, ended by the last."""
    with _lock():
        if not _alive("slurmctld"):  # whatever its nodes are doing to other users
            up()
        (_users() / str(os.getpid())).touch()
    try:
        yield
    finally:
        with _lock():
            (_users() / str(os.getpid())).unlink(missing_ok=True)
            if not any(Path(f"/proc/{user.name}").exists() for user in _users().iterdir()):
                down()


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """The nodes for one test alone, among all processes that test; no job of it outlives the block."""
    with _lock("turn"):
        _mend()
        try:
            yield
        finally:
            _cancel_all()


def keep() -> None:
    """A cluster that stays until somebody calls `down`."""
    with _lock():
        if not _alive("slurmctld"):  # whatever its nodes are doing to other users
            up()
        (_users() / "1").touch()  # a process that never ends


def up() -> None:
    """Starts everything, in the place of whatever is left of an earlier cluster."""
    if os.geteuid():
        raise Unavailable("a Slurm cluster needs root to start")
    if len(str(HOME)) > 60:
        raise Unavailable(f"{HOME}: too long for the sockets that Slurm keeps there; set TMPDIR")
    _install()
    down()
    for name in ("etc", "state", "run", "log", "dev", "tmp", "spool", "scratch", "users"):
        (HOME / name).mkdir(parents=True, exist_ok=True)
    _configure(_network())
    _start_munge()
    run("slurmctld")
    _until(lambda: "UP" in run("scontrol", "ping", check=False), "slurmctld")
    for number, node in enumerate(NODES, 1):
        (HOME / "spool" / node).mkdir(exist_ok=True)
        (HOME / "tmp" / node).mkdir(exist_ok=True)
        (HOME / f"scratch.{node}").mkdir(exist_ok=True)
        _start_node(number)
    _until(mended, "the nodes")


def down() -> None:
    """Stops the jobs, then every process of the cluster, and removes what it made."""
    if _alive("slurmctld"):
        _cancel_all()
    for file in (HOME / "run").glob("*.pid"):
        _stop(_pid(file), file)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait(lambda: not _left_over(), 3)
    _remove_network()
    _write_hosts([])
    shutil.rmtree(HOME, ignore_errors=True)


def healthy() -> bool:
    """True if every node takes jobs."""
    states = _states()
    return len(states) == len(NODES) and set(states.values()) <= {"idle", "mix", "alloc"}


def heal() -> None:
    """Returns nodes to service and held jobs to the queue, as the people who run a cluster do.

    A test takes nodes out of it, and so does Slurm where this machine stands still for a moment: a step that
    took long to kill drains its node, a job whose launch a node refused is held, and only a person's word
    ends that.
    """
    for number, node in enumerate(NODES, 1):
        if not _alive(f"slurmd.{node}"):
            _start_node(number)
    for node, state in _states().items():
        if state.rstrip("*") in ("down", "drain", "drng", "fail", "failg"):
            run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    for job in run("squeue", "-h", "-t", "PENDING", "-o", "%A %r", check=False).splitlines():
        if job.endswith("launch failed requeued held"):
            run("scontrol", "release", job.split()[0], check=False)


def mended() -> bool:
    """True once every node takes jobs, after what can be done for those that do not."""
    heal()
    return healthy()


def report() -> str:
    """What Slurm says of its nodes and jobs, and the last lines of its logs."""
    logs = "\n".join(run("tail", "-n", "12", str(log)) for log in sorted((HOME / "log").iterdir()))
    nodes = run("sinfo", "-N", "-p", "gpu", "-o", "%N %T %C %E", check=False)
    return f"{nodes}{run('squeue', '-o', '%A %T %r %N', check=False)}{logs}"


def _states() -> dict[str, str]:
    """Slurm's short word for the state of each node."""
    lines = run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %t", check=False).splitlines()
    return dict(line.split() for line in lines)


def _mend() -> None:
    """Waits until every node takes jobs; a cluster that does not come to that is started anew."""
    if _alive("slurmctld") and _wait(mended, 60):
        return
    print(f"The cluster starts anew:\n{report()}")
    with _lock():
        users = [user.name for user in _users().iterdir()]
        up()
        for user in users:
            (_users() / user).touch()


def _cancel_all() -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if jobs := run("squeue", "-h", "-o", "%A", check=False).split():
            run("scancel", *jobs, check=False)
            _wait(lambda: not run("squeue", "-h", check=False), 30)


def _users() -> Path:
    return HOME / "users"


@contextlib.contextmanager
def _lock(name: str = "lock") -> Iterator[None]:
    with open(f"{HOME}.{name}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _until(ready: Callable[[], bool], what: str) -> None:
    if not _wait(ready, 120):
        raise RuntimeError(f"{what} did not come up:\n{report()}")


def _wait(ready: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# ---- its parts -----------------------------------------------------------------------------------


def _install() -> None:
    known = run("dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package}\n", check=False).splitlines()
    installed = {line.split()[1] for line in known if line.startswith("ii")}
    missing = [name for name in PACKAGES if name not in installed]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"no apt-get here to install {' '.join(missing)}")
    try:
        run("apt-get", "-o", "DPkg::Lock::Timeout=300", "update", seconds=600)
        run("apt-get", "install", "-y", "--no-install-recommends", *missing, seconds=600)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        reason = str(error).strip().splitlines()[-1]
        raise Unavailable(f"apt-get cannot install {' '.join(missing)}: {reason}") from None


def _network() -> bool:
    """A namespace for each node on one bridge; False where the kernel does not let us."""
    gate = [["link", "add", _BRIDGE, "type", "bridge"], ["addr", "add", f"{_SUBNET}.254/24", "dev", _BRIDGE]]
    commands = [*gate, ["link", "set", _BRIDGE, "up"]]
    for number in range(1, len(NODES) + 1):
        space, cable = _NAMESPACE.format(number), f"latemaskv{number}"
        commands += [
            ["netns", "add", space],
            ["link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space],
            ["link", "set", cable, "master", _BRIDGE, "up"],
            ["-n", space, "addr", "add", f"{_SUBNET}.{number}/24", "dev", "eth0"],
            ["-n", space, "link", "set", "eth0", "up"],
            ["-n", space, "link", "set", "lo", "up"],
        ]
    try:
        for words in commands:
            run("ip", *words)
    except RuntimeError:
        _remove_network()
        return False
    return True


def _remove_network() -> None:
    for number in range(1, len(NODES) + 1):
        run("ip", "link", "del", f"latemaskv{number}", check=False)
        run("ip", "netns", "del", _NAMESPACE.format(number), check=False)
    run("ip", "link", "del", _BRIDGE, check=False)


def _start_node(number: int) -> None:
    node = NODES[number - 1]
    run(*_on_node(number), "slurmd", "-N", node)
    _wait(lambda: _alive(f"slurmd.{node}"), 10)


def _on_node(number: int) -> list[str]:
    """What a command line begins with to run on a node: its network, its name, its disk."""
    node, space = NODES[number - 1], Path("/run/netns", _NAMESPACE.format(number))
    enter = ["nsenter", f"--net={space}"] if space.exists() else []
    try:
        run("unshare", "--uts", "--mount", "true")
    except RuntimeError:
        return enter
    script = f'hostname {node}; mount --bind {HOME}/scratch.{node} {SCRATCH}; exec "$@"'
    return [*enter, "unshare", "--uts", "--mount", "sh", "-c", script, "sh"]


def _configure(own_network: bool) -> None:
    prefix = _SUBNET if own_network else "127.0.1"
    count = len(NODES)
    values = {
        "home": str(HOME),
        "controller": f"{_SUBNET}.254" if own_network else "127.0.0.1",
        "port": str(_PORT),
        "nodes": ",".join(NODES),
        "addresses": ",".join(f"{prefix}.{number}" for number in range(1, count + 1)),
        "ports": ",".join(str(_PORT + number) for number in range(1, count + 1)),
    }
    text = Path(__file__).with_name("slurm.conf").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    CONF.write_text(text, encoding="utf-8")
    for number in range(8):  # Slurm wants a device for each GPU: /dev/null by another name
        device = HOME / "dev" / f"gpu{number}"
        try:
            os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            device.touch()
    line = f"NodeName={','.join(NODES)} Name=gpu Type=h100 File={HOME}/dev/gpu[0-7]\n"
    (HOME / "etc" / "gres.conf").write_text("AutoDetect=off\n" + line, encoding="utf-8")
    _write_hosts([f"{prefix}.{number} {node}" for number, node in enumerate(NODES, 1)])
    for library in Path("/usr/lib").glob("*-linux-gnu/pmix2/lib/libpmix.so.2"):
        with contextlib.suppress(FileExistsError):  # Slurm looks for the name that only the -dev package has
            library.with_suffix("").symlink_to(library.name)


def _write_hosts(lines: list[str]) -> None:
    """Our lines in /etc/hosts, and no others of ours."""
    hosts = Path("/etc/hosts")
    old = hosts.read_text(encoding="utf-8").splitlines()
    kept = [line for line in old if not line.endswith(_MARK)]
    new = [*kept, *(f"{line} {_MARK}" for line in lines)]
    if new != old:
        hosts.write_text("\n".join(new) + "\n", encoding="utf-8")  # a container's file cannot be renamed


def _start_munge() -> None:
    def answers() -> bool:
        return "STATUS:" in run("sh", "-c", "munge -n | unmunge", check=False)

    if answers():
        return
    run("install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge")
    key = Path("/etc/munge/munge.key")
    if not key.exists() or not key.stat().st_size:
        run("runuser", "-u", "munge", "--", "mungekey", "-c")
    run("runuser", "-u", "munge", "--", "munged", "--force")
    _until(answers, "munged")
    shutil.copy("/run/munge/munged.pid", HOME / "run" / "munged.pid")


def _alive(daemon: str) -> bool:
    """True if the process lives that wrote this pid file: "slurmctld", "slurmd.NODE"."""
    return _name(_pid(HOME / "run" / f"{daemon}.pid")) == daemon.partition(".")[0]


def _pid(file: Path) -> int:
    """What a pid file says; 0 where there is none, or a daemon has made it and is about to write."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _name(pid: int) -> str:
    """What a living process calls itself; "" for a dead one or a zombie."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return ""
    return "" if tail.split()[0] == "Z" else head.partition("(")[2]


def _stop(pid: int, file: Path) -> None:
    daemon = file.name.partition(".")[0]
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _name(pid) == daemon:
            os.kill(pid, number)
            _wait(lambda: _name(pid) != daemon, 10)
    file.unlink(missing_ok=True)


def _left_over() -> list[int]:
    """Step daemons and tasks of this cluster that are still there."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and _name(int(folder.name)):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes()
                ours = b"SLURM_CONF=" + bytes(CONF) in environ
                if ours and (b"SLURM_TASK_PID=" in environ or _name(int(folder.name)) == "slurmstepd"):
                    found.append(int(folder.name))
    return found
