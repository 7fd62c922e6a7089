"""The shape of the project: who may import whom, what is shipped, how long a file may be."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from processes import ROOT

PACKAGES = ("model", "training", "inference", "configs", "scripts")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60  # of a function: its body, without signature and docs

# A package imports itself and those named here: `scripts` composes, `model` stands alone.
MAY_IMPORT = {
    "model": set(),
    "training": {"model"},
    "inference": {"model"},
    "configs": set(),
    "scripts": {"model", "training", "inference", "configs"},
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "Makefile", ".ci/*", "configs/**/*.yaml", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(absolute module, names taken from it) of every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ".".join(("headstart", *path.parent.relative_to(ROOT).parts))
                parents = package.split(".")
                module = ".".join([*parents[: len(parents) - node.level + 1], *module.split(".")])
            yield module.rstrip("."), [alias.name for alias in node.names]


def test_imports_run_one_way() -> None:
    wrong: list[str] = []
    for path in SOURCES:
        mine = path.relative_to(ROOT).parts[0]
        for module, taken in imports(path):
            parts = module.split(".")
            if parts[0] in PACKAGES:
                wrong.append(f"{where(path)}: write headstart.{module}")
            if parts[0] == "headstart":
                used = set(parts[1:2] or taken) - {mine}
                wrong += [f"{where(path)} uses {module}" for one in used - MAY_IMPORT[mine]]
    assert not wrong


# Bottom up: a folder of `model` imports only itself and those in front of it.
MODEL_ORDER = (
    "model/paths",
    "model/tree",
    "model/cache",
    "model/backends/kernels/cpu",
    "model/backends/kernels/triton",
    "model/backends",
    "model/target",
    "model/heads/common",
    "model/heads",
    "model/checkpoint/custom_generate",
    "model/checkpoint",
    "model/export",
    "model/hub",
)


def import_graph() -> dict[str, set[str]]:
    """Which file of the packages imports which, type-only imports included."""
    files = {where(path).removesuffix(".py").removesuffix("/__init__"): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        used: set[str] = set()
        for module, taken in imports(path):
            if module.split(".")[0] == "headstart":
                base = "/".join(module.split(".")[1:])
                modules = {f"{base}/{one}".lstrip("/") for one in taken} & set(files)
                used |= modules if len(modules) == len(taken) > 0 else {base, *modules}
        graph[name] = (used & set(files)) - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            place = stack.index(node)
            found.append(stack[place:])
            del stack[place:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return [sorted(one) for one in found if len(one) > 1]


def folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders; a file at the top of a package stands for itself."""
    packages = {where(path.parent) for path in SOURCES if path.name == "__init__.py"}

    def home(name: str) -> str:
        folder = name if name in packages else name.rpartition("/")[0]
        return folder if "/" in folder else name

    result: dict[str, set[str]] = {home(name): set() for name in graph}
    for name, used in graph.items():
        result[home(name)] |= {home(one) for one in used} - {home(name)}
    return result


def test_no_files_and_no_folders_import_in_a_circle() -> None:
    graph = import_graph()
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles(graph) == []
    assert cycles(folders(graph)) == []


def test_the_folders_of_model_import_downwards() -> None:
    found = folders(import_graph())
    known = {folder for folder in found if folder.startswith("model/")}
    assert known - set(MODEL_ORDER) == {"model/backends/kernels"}  # which holds no code
    wrong = [
        f"{folder} imports {used}"
        for place, folder in enumerate(MODEL_ORDER)
        for used in sorted(found[folder])
        if used not in MODEL_ORDER[:place]
    ]
    assert not wrong


def test_the_core_imports_no_extras() -> None:
    """Grafting, joint training and comparisons are imported by what offers them, nothing else."""
    graph = import_graph()
    extras = {
        "model/checkpoint/graft": {"scripts/commands/graft"},
        "training/objective/joint_lora": {"training/build"},
    }
    for name, allowed in extras.items():
        assert {one for one, used in graph.items() if name in used} <= allowed, name
    outside = {
        f"{one} imports {used}"
        for one, imported in graph.items()
        for used in imported
        if used.startswith("scripts/benchmarks/") and not one.startswith("scripts/")
    }
    assert not outside


def test_the_rule_sees_every_kind_of_import(tmp_path: Path) -> None:
    source = (
        "import headstart.a\nfrom headstart import b\ndef f():\n    from headstart.c.d import e\n"
    )
    path = tmp_path / "x.py"
    path.write_text(source)
    assert list(imports(path)) == [
        ("headstart.a", []),
        ("headstart", ["b"]),
        ("headstart.c.d", ["e"]),
    ]
    found = dict(imports(ROOT / "model" / "heads" / "common" / "base.py"))
    assert "headstart.model.tree.grow" in found


def test_one_file_opens_models_and_few_are_distributed() -> None:
    wrong: list[str] = []
    for path in SOURCES:
        for module, taken in imports(path):
            model_class = any(re.search(r"^Auto|For[A-Z]\w+$|HeadModel$", name) for name in taken)
            if module.startswith("transformers.models.") or (
                module.startswith("transformers") and model_class
            ):
                wrong += [f"{where(path)} uses {module} {taken}"]
        if "torch.distributed" in path.read_text(encoding="utf-8"):
            wrong += [f"{where(path)} uses torch.distributed"]
        if "import deepspeed" in path.read_text(encoding="utf-8"):
            wrong += [f"{where(path)} uses deepspeed"]
    allowed = {
        "model/target/pretrained.py uses transformers",
        "model/target/synthetic.py uses transformers",
        "model/target/sharding.py uses torch.distributed",
        "training/distributed/process_group.py uses torch.distributed",
        "training/distributed/strategies.py uses torch.distributed",
        "training/distributed/deepspeed_zero.py uses deepspeed",
    }
    assert {line for line in wrong if not line.startswith(tuple(allowed))} == set()
    assert wrong  # or the rule sees nothing


def test_every_package_is_shipped_and_typed() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    with_code = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert with_code == folders, "every folder with code needs an __init__.py"
    wanted = {"headstart." + folder.replace("/", ".") for folder in folders}
    assert set(tool["packages"]) == wanted
    for name, folder in tool["package-dir"].items():
        assert name == f"headstart.{folder}"
    assert all((ROOT / folder / "py.typed").exists() for folder in folders)


def test_files_and_functions_are_short() -> None:
    long: list[str] = []
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        lengths = {where(path): (len(text.splitlines()), MAX_FILE_LINES)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                lengths[f"{where(path)}: {node.name}"] = (lines, MAX_FUNCTION_LINES)
        long += [
            f"{name} has {lines} lines" for name, (lines, most) in lengths.items() if lines > most
        ]
    assert not long


def test_source_is_ascii() -> None:
    wrong = {
        where(path): re.findall(r"[^\x00-\x7f]", path.read_text(encoding="utf-8"))
        for path in PYTHON
    }
    assert not {name: found for name, found in wrong.items() if found}


def test_no_path_of_a_machine() -> None:
    # A folder at the top of a disk, not one inside an address or behind another folder.
    rule = re.compile(r"(?<![\w./:~-])/(?:home|root|tmp|opt|work|mnt|Users)/[^\s\"']*")
    assert rule.findall("see /" + "home/me/x and https://a.b/home/c") == ["/" + "home/me/x"]
    found = {where(path): rule.findall(path.read_text(encoding="utf-8")) for path in PYTHON + TEXTS}
    assert not {name: paths for name, paths in found.items() if paths}
