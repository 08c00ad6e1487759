"""What cuobjdump says about the kernels of a module: registers, stack, and the machine code itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """Return the path of cuobjdump in the CUDA toolkit, or else in triton's package."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(packaged) if packaged.exists() else None
    return found


@dataclass
class Kernel:
    """A kernel of one architecture.

    Attributes:
        name: mangled.
        stack: bytes a thread, where spilled registers and arrays in local memory lie.
        code: mnemonics with their suffixes, in order: ``LDG.E.128``.
    """

    name: str
    registers: int
    stack: int
    local: int
    code: list[str] = field(default_factory=list)

    def count(self, *prefixes: str) -> int:
        return sum(opcode.startswith(prefixes) for opcode in self.code)

    def loads_in_flight(self) -> int:
        """Count the most 16-byte loads between two exponentials, which are on their way at the same time."""
        most = here = 0
        for opcode in self.code:
            here = 0 if opcode.startswith("MUFU.EX2") else here + opcode.startswith("LDG.E.128")
            most = max(most, here)
        return most


def dump(option: str, module: Path, arch: str) -> str:
    command = [cuobjdump() or "cuobjdump", option, "-arch", arch, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def architectures(module: Path) -> list[str]:
    """Return the architectures of a module's machine code, among them nvcc's for linking, which may have no kernel."""
    command = [cuobjdump() or "cuobjdump", "-lelf", str(module)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({line.split(".")[-2] for line in listed.splitlines() if ".cubin" in line})


USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


def kernels(module: Path, arch: str) -> dict[str, Kernel]:
    """Return every kernel of a module or an object for an architecture, by its mangled name."""
    usage = USAGE.findall(dump("-res-usage", module, arch))
    found = {name: Kernel(name, int(registers), int(stack), int(local)) for name, registers, stack, local in usage}
    for part in dump("-sass", module, arch).split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        found[name.strip()].code = INSTRUCTION.findall(text)
    return found


# The element type of the logits and, of a gradient, of what is stored, in a mangled name.
UNIT = re.compile(r"unit_forward_kernelI(f|NS_4bf16E|NS_3f16E)(f|NS_4bf16E|NS_3f16E|S\d_)")
LOSS = re.compile(r"cpo_loss_kernelI(f|NS_4bf16E|NS_3f16E)")
FORWARD = re.compile(r"row_forward_kernelI(f|NS_4bf16E|NS_3f16E)")
BACKWARD = re.compile(r"row_backward_kernelI(f|NS_4bf16E|NS_3f16E)(f|NS_4bf16E|NS_3f16E|S\d_)")


# The flags of a head (bias, factor, softcap) behind everything else in a mangled name.
HEAD = re.compile(r"(.*)NS_4HeadILb([01])ELb([01])ELb([01])E")


def is_capped(kernel: Kernel) -> bool:
    head = HEAD.search(kernel.name)
    return head is not None and head[4] == "1"


def complaints(kernel: Kernel) -> list[str]:
    """List the faults of a kernel that no kernel may have."""
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack and {kernel.local} of local memory a thread")
    if kernel.count("LDL", "STL"):
        found.append(f"{kernel.count('LDL', 'STL')} accesses to local memory")
    # The barrier of a cooperative grid counts the blocks that have come, at an address that the driver gives; what a
    # block reads of another's shared memory has a generic address.
    generic = kernel.count("ST.") + (0 if UNIT.search(kernel.name) else kernel.count("LD."))
    if generic > (2 if LOSS.search(kernel.name) else 0):
        found.append(f"{generic} generic accesses")
    if kernel.count("ATOM", "RED.") and not LOSS.search(kernel.name):
        found.append("atomics")
    return found


def is_row_kernel(kernel: Kernel) -> bool:
    return any(pattern.search(kernel.name) for pattern in (FORWARD, BACKWARD, UNIT, LOSS))


def vector_complaints(kernel: Kernel) -> list[str]:
    """List what a row kernel lacks to keep the memory busy; under a softcap, arithmetic takes most time."""
    found, in_flight = [], 3 if is_capped(kernel) else 4
    if kernel.loads_in_flight() < in_flight:
        found.append(f"{kernel.loads_in_flight()} loads of 16 bytes in flight, not {in_flight}")
    backward = BACKWARD.search(kernel.name) or UNIT.search(kernel.name)
    if backward or LOSS.search(kernel.name):
        narrow = backward is not None and backward[1] == "f" and backward[2] != "f"
        store = "STG.E.64" if narrow else "STG.E.128"
        if not kernel.count(store):
            found.append(f"no {store}")
    return found
