"""The house: who may import what, what has to be copied with a piece, how long anything may be.

The README's copy table and its code are checked here, and its links and options; test_tags.py
checks its equation map.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "kernels", "baselines", "support", "bench", "notebooks", "tests")
MODULE_LINES, FUNCTION_LINES, README_LINES = 400, 40, 150

# What a module, or each module of a folder, may import of ours. The others may import anything but
# `bench`, `notebooks` and `tests`.
MAY_IMPORT = {
    "losses": (),
    "encoder": (),
    "ssim": (),
    "measures": (),
    "weak": (),
    "medmix": ("weak",),
    "autoencoder": ("encoder",),
    "kernels": ("losses", "kernels"),
    "detectors": ("encoder", "kernels"),
    "igd": ("encoder", "autoencoder", "ssim"),
    "baselines.strong": ("medmix", "weak"),
    "baselines.pretraining": ("losses", "kernels"),
    "baselines.steps": (),
    "baselines.msssim": ("ssim", "baselines"),
    "baselines.dae": ("baselines",),
    "baselines.ocgan": ("baselines",),
    "baselines.fanogan": ("baselines",),
    "baselines.adgan": ("baselines",),
    "baselines.panda": ("baselines",),
    "baselines.cutpaste": ("baselines",),
}
COMPARED = ("adgan", "cutpaste", "dae", "fanogan", "msssim", "ocgan", "panda")  # 3 files, 500 lines
MAY_IMPORT_SUPPORT = ("pmsacl", "eval", "experiments", "support", "bench", "notebooks", "tests")
THIRD_PARTY = {"torch", "numpy", "PIL", "triton"}
THIRD_PARTY_OF = {"tests": {"pytest", "hypothesis"}, "notebooks": {"IPython", "onnxruntime"}}

# The most that may have to be copied with a piece: files, lines.
COPY_LIMITS = {
    "losses.py": (1, 200),
    "medmix.py": (2, 400),
    "weak.py": (1, 200),
    "encoder.py": (1, 220),
    "detectors.py": (4, 750),
    "igd.py": (5, 950),
    "ssim.py": (1, 150),
    "measures.py": (1, 240),
    "kernels/contrastive.py": (3, 600),
    "kernels/mahalanobis.py": (2, 220),
}
OPTION = re.compile(r"(?<![\w-])(--[a-z][\w-]*)")
TORCHRUNS = {
    f"--{name}" for name in "nproc-per-node nnodes node-rank rdzv-backend rdzv-endpoint".split()
}
COPY_ROW = re.compile(r"^\| ([^|`]+) \| ((?:`[\w/.]+`(?:, )?)+) \| ([\d,]+) \|$", re.MULTILINE)


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(f): f for folder in FOLDERS for f in sorted((ROOT / folder).glob("*.py"))}
MODULES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
README = (ROOT / "README.md").read_text()
DOCS = {file: file.read_text() for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
COPY_TABLE = {files.split("`")[1]: (files, lines) for _, files, lines in COPY_ROW.findall(README)}


def first(name: str) -> str:
    return name.split(".")[0]


def imports(name: str) -> set[str]:
    """The dotted names that a module imports, wherever in it; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [first(name) if node.level else "", node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def of_ours(name: str) -> set[str]:
    """Our modules that the module `name` imports, with the packages that these lie in."""
    wanted = imports(name)
    parents = {".".join(w.split(".")[:k]) for w in wanted for k in range(1, w.count(".") + 2)}
    return {p for p in parents if p in MODULES or p in FOLDERS} - {name}


def bound(tree: ast.Module) -> set[str]:
    """The names that a module's import statements bind."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    nodes = [n for n in nodes if n.__dict__.get("module") != "__future__"]
    return {alias.asname or first(alias.name) for node in nodes for alias in node.names}


def copied_with(file: str) -> set[str]:
    """The files of ours that a file imports, and so on; an empty __init__.py needs no copy."""
    names, todo = set(), [dotted(ROOT / file)]
    while todo:
        name = todo.pop()
        if name not in names:
            names.add(name)
            todo += [other for other in of_ours(name) if other in MODULES]
    files = [FILES[name] for name in names]
    return {str(f.relative_to(ROOT)) for f in files if f.read_text().strip()}


# --- the rules ---------------------------------------------------------------------------------


def test_imports_run_one_way():
    found = []
    for name in MODULES:
        allowed = MAY_IMPORT.get(name, MAY_IMPORT.get(first(name)))
        for other in sorted(of_ours(name) - {first(name)}):
            if first(other) == "support" and first(name) not in MAY_IMPORT_SUPPORT:
                found.append(f"{name} imports {other}: support is no part of a piece")
            elif allowed is not None and first(other) not in allowed:
                found.append(f"{name} imports {other}")
            elif first(other) in ("bench", "notebooks", "tests") and first(other) != first(name):
                found.append(f"{name} imports {other}: nothing depends on it")
    assert not found, found


def test_nothing_depends_on_other_packages():
    known = {first(name) for name in MODULES} | {"conftest"} | THIRD_PARTY
    known |= {name.removeprefix("tests.") for name in MODULES} | set(sys.stdlib_module_names)
    for name in MODULES:
        packages = {first(imported) for imported in imports(name)}
        assert packages <= known | THIRD_PARTY_OF.get(first(name), set()), name


def test_eval_py_hides_pythons_eval_nowhere():
    assert not [name for name, tree in MODULES.items() if "eval" in bound(tree)]


def test_no_module_hands_on_what_it_imports():
    """Each imported name is used in the module; one with a fallback is its own."""
    for name, tree in MODULES.items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert bound(tree) <= used, name


def test_modules_functions_and_the_readme_are_short_enough_to_read():
    """Functions without their docstring."""
    found = []
    for name, tree in MODULES.items():
        if first(name) == "tests":
            continue
        lines = len(FILES[name].read_text().splitlines())
        found += [f"{name}: {lines} lines"] * (lines > MODULE_LINES)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    size -= node.body[0].end_lineno - node.body[0].lineno + 1
                found += [f"{name}.{node.name}: {size} lines"] * (size > FUNCTION_LINES)
    assert not found, found
    assert len(README.splitlines()) <= README_LINES


def test_the_copy_table_lists_every_piece():
    assert COPY_TABLE.keys() == COPY_LIMITS.keys()


@pytest.mark.parametrize("file", COPY_TABLE)
def test_a_piece_is_copied_with_the_files_and_lines_that_the_readme_says(file):
    files, lines = COPY_TABLE[file]
    listed = set(re.findall(r"`([^`]+)`", files))
    assert copied_with(file) == listed
    total = sum(len((ROOT / name).read_text().splitlines()) for name in listed)
    most_files, most_lines = COPY_LIMITS[file]
    assert len(listed) <= most_files
    assert total <= int(lines.replace(",", "")) <= most_lines


@pytest.mark.parametrize("name", COMPARED)
def test_a_compared_detector_is_copied_with_little(name):
    files = copied_with(f"baselines/{name}.py")
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in files}
    assert len(files) <= 3 and sum(lines.values()) <= 500 and lines[f"baselines/{name}.py"] <= 250


# --- the README and the docs -------------------------------------------------------------------


def test_the_readmes_code_runs(monkeypatch, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"]) and names["loss"].requires_grad
    assert names["maps"].shape[1:] == names["x"].shape[2:]
    assert len(names["scores"]) == len(names["x"])


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCS[file]):
        if not target.startswith(("http://", "https://")):
            path, _, heading = target.partition("#")
            linked = (file.parent / path).resolve() if path else file
            assert linked.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in anchors, target


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option that --help of the three programs shows."""
    shown = io.StringIO()
    for program in ("support.job", "eval", "experiments"):
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            importlib.import_module(program).main(["--help"])
        assert ended.value.code == 0
    return set(OPTION.findall(shown.getvalue()))


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_options_that_the_docs_name_exist(file, options):
    named = set(OPTION.findall(DOCS[file])) - TORCHRUNS
    assert named <= options, named - options
