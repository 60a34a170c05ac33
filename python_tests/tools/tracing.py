"""What a kernel does to memory, counted on the traced library: sectors of global memory, bank conflicts, races, each
with its source line.

    with trace(x=x, weight=weight) as traced:
        traced.ops.linear_w4a16(x, weight, ...)
    assert not traced.findings
    assert traced.kernels["linear_kernel"].sectors_read <= 1.1 * traced.kernels["linear_kernel"].ideal_sectors_read

Inputs are registered by name: a kernel that touches anything else than these and what its operator allocated is found
out. Tensors have to be aligned to 256 bytes, as on a GPU: ``aligned``.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from support import emulated

ALIGNMENT = 256  # of what CUDA's allocator gives out


@dataclass(frozen=True)
class Site:
    """One instruction of a kernel: its requests (each of one warp), added up.

    sectors     32-byte pieces of global memory; ideal: as many as the bytes asked for would fill
    wavefronts  passes over the banks of shared memory; ideal: without conflicts
    """

    kernel: str
    line: str
    kind: str  # load, store, atomic, cp_async, ldmatrix
    is_shared: bool
    requests: int
    lanes: int
    bytes: int
    sectors: int
    ideal_sectors: int
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Finding:
    """A fault, where it shows and, of a race, where the earlier access was."""

    kind: str
    kernel: str
    line: str
    other_line: str
    details: str
    count: int


@dataclass
class Kernel:
    """Totals of all launches of one kernel."""

    name: str
    launches: int = 0
    blocks: int = 0
    shared_bytes: int = 0  # of a block, at most
    bytes_read: int = 0  # from global memory, by all requests
    bytes_written: int = 0
    sectors_read: int = 0
    sectors_written: int = 0
    ideal_sectors_read: int = 0
    ideal_sectors_written: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sites: list[Site] = field(default_factory=list)

    @property
    def bank_conflicts(self) -> int:
        """Passes over shared memory beyond the necessary ones."""
        return self.wavefronts - self.ideal_wavefronts


@dataclass(frozen=True)
class Buffer:
    """A tensor, and how many of its sectors were read and written at all."""

    name: str
    bytes: int
    read_sectors: int
    written_sectors: int


class Trace:
    """Filled when its ``with`` block ends."""

    ops = torch.ops.prequant_traced

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.findings: list[Finding] = []
        self.buffers: dict[str, Buffer] = {}

    def table(self) -> str:
        """A line for each instruction: the requests' lanes, sectors and wavefronts, with the ideal."""
        lines = [
            f"{'line':28} {'access':16} {'requests':>9} {'lanes':>6} {'sectors':>8} {'ideal':>7} {'waves':>7} "
            f"{'ideal':>7}"
        ]
        for kernel in self.kernels.values():
            lines.append(
                f"{kernel.name}: {kernel.launches} launches, {kernel.blocks} blocks, {kernel.shared_bytes} bytes of "
                "shared memory"
            )
            for site in kernel.sites:
                access = f"{'shared' if site.is_shared else 'global'} {site.kind}"
                counts = (site.lanes, site.sectors, site.ideal_sectors, site.wavefronts, site.ideal_wavefronts)
                lanes, sectors, ideal_sectors, waves, ideal_waves = (f"{count / site.requests:.2f}" for count in counts)
                lines.append(
                    f"{site.line:28} {access:16} {site.requests:9} {lanes:>6} {sectors:>8} {ideal_sectors:>7} "
                    f"{waves:>7} {ideal_waves:>7}"
                )
        return "\n".join([*lines, *(f"FOUND {finding}" for finding in self.findings)])


def aligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins on a multiple of 256 bytes."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    offset = -buffer.data_ptr() % ALIGNMENT
    copy = buffer[offset : offset + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _lines(offsets: set[int]) -> dict[int, str]:
    """The place in a kernel's file of each instruction, "embedding.cu:47"; of inlined functions the innermost one in a
    .cu file.
    """
    offsets = offsets - {0}
    if not offsets:
        return {0: ""}
    ordered = sorted(offsets)
    library = f"/proc/{os.getpid()}/fd/{emulated.load('traced').debug_information.fileno()}"
    command = ["addr2line", "-a", "-i", "-e", library, *(hex(offset) for offset in ordered)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    places: dict[int, str] = {0: ""}
    for part in answer.split("\n0x"):
        address, *frames = part.removeprefix("0x").split("\n")
        names = [frame.split("/")[-1].split(" ")[0] for frame in frames if frame]
        kernels = [
            name
            for name in names
            if ".cu:" in name or (".cuh:" in name and not name.startswith(("portable.cuh", "ptx.cuh")))
        ]
        places[int(address, 16)] = (kernels or names or ["?"])[0]
    return places


@contextmanager
def trace(**tensors: Tensor) -> Iterator[Trace]:
    """Trace what runs in the block on ``.ops``; the tensors are its inputs. A name that ends in _ may be written."""
    library = emulated.load("traced")
    library.trace_start()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0, f"{name} is not aligned(...)"
        library.trace_buffer(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name.endswith("_"), name)
    traced = Trace()
    try:
        yield traced
    finally:
        library.trace_stop()
        _fill(traced, library)


def _fill(traced: Trace, library) -> None:
    sites, findings = library.trace_traffic(), library.trace_findings()
    places = _lines(
        {site["offset"] for site in sites}
        | {offset for finding in findings for offset in (finding["offset"], finding["other_offset"])}
    )
    for launch in library.trace_launches():
        kernel = traced.kernels.setdefault(launch["kernel"], Kernel(launch["kernel"]))
        kernel.launches += 1
        kernel.blocks += launch["grid"][0] * launch["grid"][1] * launch["grid"][2]
        kernel.shared_bytes = max(kernel.shared_bytes, launch["shared_bytes"])
    for entry in sites:
        site = Site(line=places[entry.pop("offset")], **entry)
        kernel = traced.kernels[site.kernel]
        kernel.sites.append(site)
        kernel.wavefronts += site.wavefronts
        kernel.ideal_wavefronts += site.ideal_wavefronts
        if site.is_shared:
            continue
        if site.kind != "store":
            kernel.bytes_read += site.bytes
            kernel.sectors_read += site.sectors
            kernel.ideal_sectors_read += site.ideal_sectors
        if site.kind != "load":
            kernel.bytes_written += site.bytes
            kernel.sectors_written += site.sectors
            kernel.ideal_sectors_written += site.ideal_sectors
    for kernel in traced.kernels.values():
        kernel.sites.sort(
            key=lambda site: (
                site.line.split(":")[0],
                int("0" + "".join(filter(str.isdigit, site.line.split(":")[-1]))),
            )
        )
    for finding in findings:
        line, other_line = places[finding.pop("offset")], places[finding.pop("other_offset")]
        traced.findings.append(Finding(line=line, other_line=other_line, **finding))
    for buffer in library.trace_buffers():
        name, number = buffer.pop("name"), 1
        while name in traced.buffers:
            number += 1
            name = f"{name.split(' #')[0]} #{number}"
        traced.buffers[name] = Buffer(name=name, **buffer)
