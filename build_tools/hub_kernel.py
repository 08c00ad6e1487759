"""Writes the losses and Triton's kernels as a repository that the library ``kernels`` loads: `make hub-kernel`.

    python -m build_tools.hub_kernel [--out build/hub-kernel]

That library loads a kernel under a name of its own, beside other versions of it, so that nothing in it may name the
package: imports become relative here, and whatever else would lead back to an installed package is an error. Compiled
extensions stay out; what needs them says that they are not there.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cpo_kernels"
# All that imports nothing beyond torch, triton and NumPy.
PARTS = (
    *("backends.py", "engine", "functional.py", "kernels", "layout.py", "loss_table.py", "modules.py"),
    *("objective.py", "options.py"),
)
OWN = ROOT / "build_tools" / "hub_kernel_files"
# A variant for each kind of device on which the package has kernels that need no compiler.
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 0  # of the interface; the library's documentation keeps 0 for what may still change
IMPORT = re.compile(rb"from(\s+)" + PACKAGE.encode() + rb"(?:\.([\w.]+))?(?=\s+import\b)")


def main() -> None:
    """Write the repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub-kernel", help="folder, which is replaced")
    for variant in build(parser.parse_args().out):
        print(variant)


def build(out: Path, source: Path = ROOT / PACKAGE) -> list[Path]:
    """Write the repository to ``out``, which is replaced; returns the folder of each variant."""
    shutil.rmtree(out, ignore_errors=True)
    files = dict(contents(source))
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
    content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    variants = []
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        metadata = {
            "name": field(project, "name"),
            # The module's name, and so the namespace of its operators: two versions in one process have two.
            "id": f"_{PACKAGE}_{backend}_{content[:10]}",
            "version": VERSION,
            "license": field(project, "license"),
            "upstream": field(project, "Source"),
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        for name, data in {**files, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        variants.append(variant)
    shutil.copy(OWN / "README.md", out)
    shutil.copy(ROOT / "LICENSE", out)
    return variants


def field(project: str, name: str) -> str:
    """Read a text of pyproject.toml."""
    found = re.search(rf'^{name} = "(.+)"$', project, re.MULTILINE)
    assert found, f"pyproject.toml has no {name}"
    return found[1]


def contents(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each file of the kernel by its path, sorted, with what is in it."""
    paths = [path for part in PARTS for path in (source / part, *(source / part).rglob("*"))]
    found = {path.relative_to(source): path for path in paths if path.suffix in (".py", ".json")}
    found |= {path.relative_to(OWN): path for path in OWN.glob("*.py")}
    for name, path in sorted(found.items()):
        data = path.read_bytes()
        yield name.as_posix(), relocatable(data, name) if path.suffix == ".py" else data


def relocatable(code: bytes, name: Path) -> bytes:
    """Make the imports of the package in the code of one of its files relative.

    Raises:
        ValueError: the code names the package in another way, which no relative import replaces.
    """
    lines = code.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    dots = b"." * len(name.parts)  # a module beside __init__ has one
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and is_own(node)]
    # From the last to the first, so that what is left to do stays where it is.
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        start = starts[node.lineno - 1] + node.col_offset
        matched = IMPORT.match(code, start)
        if matched is None:
            raise ValueError(f"{name}:{node.lineno}: an import of {PACKAGE} that is not of one line")
        code = code[:start] + b"from" + matched[1] + dots + (matched[2] or b"") + code[matched.end() :]
    refuse_names(ast.parse(code), name)
    return code


def is_own(node: ast.ImportFrom) -> bool:
    """Tell whether an import is of the package, by its name."""
    return node.level == 0 and node.module is not None and node.module.split(".")[0] == PACKAGE


def refuse_names(tree: ast.Module, name: Path) -> None:
    """Raise ``ValueError`` where an import, a name or a text other than documentation is the package's."""
    of_documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        words = {
            ast.Import: lambda node: [alias.name for alias in node.names],
            ast.ImportFrom: lambda node: [] if node.level else [node.module],
            ast.Attribute: lambda node: [node.attr],
            ast.Name: lambda node: [node.id],
            ast.Constant: lambda node: [node.value] if isinstance(node.value, str) else [],
        }.get(type(node), lambda _: [])(node)
        for word in words:
            if id(node) not in of_documentation and re.match(rf"(?:torch\.ops\.)?{PACKAGE}\b", word):
                raise ValueError(f"{name}:{node.lineno}: {word!r} would lead to an installed {PACKAGE}")


if __name__ == "__main__":
    main()
