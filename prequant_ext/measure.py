"""What a run costs: resident memory of this process, and the versions that produced a number."""

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

MB = 1e6


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def resident_bytes() -> int:
    """Memory that the process holds now; where the system does not say, its peak so far."""
    now = _status_bytes("VmRSS")
    return peak_bytes() if now is None else now


def peak_bytes() -> int:
    """The most memory the process has held.

    Linux: VmHWM, not ru_maxrss, which a process started from a larger one inherits from it.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment() -> dict[str, str | int | None]:
    """Device, versions and threads behind a measurement; ``commit`` where the package runs from a git checkout."""
    import torch
    import transformers

    folder = Path(__file__).parent.parent
    git = ["git", "-C", str(folder.parent), "rev-parse", "--short=12", "HEAD"]
    try:
        is_checkout = (folder.parent / ".git").exists()
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip() if is_checkout else None
    except (OSError, subprocess.CalledProcessError):
        commit = None
    try:
        version = metadata.version("prequant_ext")
    except metadata.PackageNotFoundError:
        version = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "version": version,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
