"""The machine code of the fused linear forward: tensor cores, copy engine, registers, and no spills."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import sass

pytestmark = pytest.mark.cpu  # reads a file

KERNEL = "linear_forward_kernel"
REGISTERS = 65536  # of a multiprocessor
WARPGROUP = 128


def extension() -> Path | None:
    spec = importlib.util.find_spec("cpo_kernels._cuda")
    return Path(spec.origin) if spec and spec.origin else None


@cache
def dump(option: str, architecture: str) -> dict[str, str]:
    """Text of each of the kernels, by its mangled name."""
    module = extension()
    if module is None:
        pytest.skip("cpo_kernels._cuda is not built here")
    if sass.cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    if architecture not in sass.architectures(module):
        pytest.skip(f"the extension was built without {architecture}")
    parts = re.split(r"Function\s*:?\s*(\w+)", sass.dump(option, module, architecture))[1:]
    return {name: body for name, body in zip(parts[::2], parts[1::2], strict=True) if KERNEL in name}


def instructions(text: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", text)


def check_resources(usage: str) -> None:
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert numbers.keys() == {"REG", "STACK", "LOCAL"}, usage
    assert numbers["STACK"] == 0 and numbers["LOCAL"] == 0, f"local memory: {usage}"
    assert numbers["REG"] * 3 * WARPGROUP <= REGISTERS, (
        f"{numbers['REG']} registers a thread leave no room for 3 warpgroups"
    )


def check_instructions(code: list[str], dtype: str) -> None:
    """wgmma of 64 x 256 x 16 and only waits between; copies by the copy engine; registers for the consumers."""
    products = [i for i, line in enumerate(code) if re.search(r"\bHGMMA\.64x256x16\.F32", line)]
    assert len(products) >= 4 and all((".BF16" in code[i]) == (dtype == "bf16") for i in products), "wgmma"
    assert not [line for line in code if re.search(r"\bHMMA|\bLDL|\bSTL", line)], (
        "mma of the generation before, or spills"
    )
    assert [line for line in code if re.search(r"\bUTMALDG\.2D ", line)], "copies"
    assert [line for line in code if re.search(r"\bUTMALDG\.2D\.MULTICAST ", line)], (
        "copies to both blocks of a cluster"
    )
    # The loop over H: no fence of the device's memory, no arithmetic on accumulators.
    loop = code[products[0] : products[-1]]
    assert not [line for line in loop if re.search(r"\bMEMBAR|\bCCTL|\bF(ADD|MUL|FMA|MNMX)\b", line)], (
        "work between products"
    )
    budgets = [int(n, 16) for line in code for n in re.findall(r"USETMAXREG\S* .*?(0x[0-9a-f]+)", line)]
    assert len(budgets) == 2 and (min(budgets) + 2 * max(budgets)) * WARPGROUP <= REGISTERS, f"registers {budgets}"


def dtype_of(name: str) -> str:
    return "bf16" if "4bf16" in name else "f16"


def keeps(name: str) -> bool:
    """Whether the kernel keeps what a gradient needs: its template argument after the dtype."""
    return "f16ELb1E" in name


def test_every_kernel_is_there_and_keeps_to_its_registers():
    usage = dump("-res-usage", "sm_90a")
    assert len(usage) == 20  # two dtypes, five heads, with and without what a gradient needs
    for text in usage.values():
        check_resources(text)


def test_every_kernel_multiplies_on_the_tensor_cores():
    found = dump("-sass", "sm_90a")
    assert len(found) == 20
    for name, text in found.items():
        code = instructions(text)
        check_instructions(code, dtype_of(name))
        assert any("STG.E.128" in line for line in code) == keeps(name)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_other_architectures_have_none_of_it(architecture):
    for text in dump("-sass", architecture).values():
        code = instructions(text)
        assert code and len(code) < 64 and not [line for line in code if "MMA" in line]


def test_the_checks_can_fail():
    name, text = next(iter(dump("-sass", "sm_90a").items()))
    code = instructions(text)
    check_instructions(code, dtype_of(name))
    middle = next(i for i, line in enumerate(code) if "HGMMA" in line) + 1
    for broken in (
        [line.replace("HGMMA", "HMMA") for line in code],
        [line.replace("UTMALDG", "LDGSTS") for line in code],
        [*code, "LDL R1, [R2]"],
        [*code[:middle], "MEMBAR.ALL.GPU", *code[middle:]],
        [*code[:middle], "FADD R24, R24, R25", *code[middle:]],
        [line.replace("0xf0", "0xf8") for line in code],
    ):
        with pytest.raises(AssertionError):
            check_instructions(broken, dtype_of(name))
    for usage in ("REG:168 STACK:8 LOCAL:0", "REG:168 STACK:0 LOCAL:4", "REG:176 STACK:0 LOCAL:0", ""):
        with pytest.raises(AssertionError):
            check_resources(usage)
