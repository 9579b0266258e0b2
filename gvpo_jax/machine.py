"""What a machine has: memory, room on disks, accelerators; asked of the system, not of JAX."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Linux tells of hardware under these.
DEV = Path("/dev")
PCI = Path("/sys/bus/pci/devices")
CGROUP = Path("/sys/fs/cgroup")
LOCKS = Path("/proc/locks")
# libtpu holds this file while a process uses the TPU.
TPU_LOCK = Path("/tmp/libtpu_lockfile")

_GOOGLE = "0x1ae0"
_TPUS = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}


def host_memory() -> int | None:
    """Bytes of the machine's memory, or of what a container may use of it. None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            found.append(int((CGROUP / file).read_text()))
    return min(found) if found else None


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made. Raises OSError."""
    return shutil.disk_usage(_nearest(folder)).free


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written where a folder is, or would be made; None: it can."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def tpu_chips() -> list[str]:
    """The TPU chips that are there, by their generation where that is known."""
    found = []
    for vendor in sorted(PCI.glob("*/vendor")):
        with contextlib.suppress(OSError):
            device = vendor.with_name("device").read_text().strip()
            if vendor.read_text().strip() == _GOOGLE and device in _TPUS:
                found.append(_TPUS[device])
    if found:
        return found
    return ["TPU" for file in DEV.glob("accel[0-9]*") if not file.is_dir()]


def nvidia_gpus() -> list[str]:
    """The NVIDIA GPUs that are there, as nvidia-smi tells of them."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and lines:
            return [f"{line} (name, memory, driver)" for line in lines]
    return ["NVIDIA GPU" for _ in DEV.glob("nvidia[0-9]*")]


def holders(file: Path) -> list[int] | None:
    """The processes that hold a lock on a file; None: it is not there, or nobody can tell."""
    try:
        number = file.stat().st_ino
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return None
    return [pid for line in lines if (pid := _holds(line.split(), number)) is not None]


def _holds(words: Sequence[str], inode: int) -> int | None:
    """The process of a line of /proc/locks, where it holds the file of that inode."""
    if len(words) < 6 or words[1] == "->" or words[5].rpartition(":")[2] != str(inode):
        return None  # ->: it waits
    return int(words[4])


def _nearest(folder: Path) -> Path:
    """The folder, or that above it which is there."""
    path = folder.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
