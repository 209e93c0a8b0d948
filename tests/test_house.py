"""The house rules, checked: rooms, thinness, requirements, no pickle, light imports, notebooks."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from conftest import REPOSITORY

PACKAGE = sorted((REPOSITORY / "rsdlib").rglob("*.py"))
FOLDERS = ("rsdlib", "tests", "benchmarks", "data/mini/build", "data/mini/world")
SOURCES = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True
).stdout.split()
CODE_RUNNERS = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
ROOM = re.compile(r"^\| (\d+) \| `(\w+)` \|", re.M)
LONGEST = 60  # lines of code of a function
MOST = 5675  # the aim is 5,000


def code_of(path):
    """Return the syntax trees of a Python file or of a notebook's code cells."""
    if path.suffix == ".py":
        return [ast.parse(path.read_text())]
    cells = nbformat.read(path, as_version=4).cells
    return [
        ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))
        for cell in cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize(
    "path", [*SOURCES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_nothing_that_is_loaded_can_run_code(path):
    for tree in code_of(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not CODE_RUNNERS & {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in CODE_RUNNERS
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {
                    "eval",
                    "exec",
                    "torch.save",
                    "pd.read_pickle",
                    "yaml.load",
                }
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("allow_pickle", "False") == "False"
                assert keywords.get("weights_only", str(name != "torch.load")) == "True"
            elif isinstance(node, ast.ExceptHandler):
                assert node.type is not None, "a bare except"


def test_one_backward_pass_and_one_atomic_writer():
    package = {path.name: path.read_text() for path in PACKAGE}
    assert sum(text.count(".backward(") for text in package.values()) == 1
    assert [name for name, text in package.items() if "os.replace" in text] == ["files.py"]
    writes = re.compile(
        r"open\([^)]*[\"']wb?[\"']|(?<!files)\.write_(text|bytes)\(|np\.save\(|save_file\("
    )
    for name, text in package.items():
        if name != "files.py":
            assert not writes.search(text), name


def room_of(module):
    """Return the room, or the module between rooms, that a dotted name below rsdlib is in."""
    return module.split(".")[1]


def imports(path):
    """Yield (module, names) of everything that a file of the package imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rsdlib":
            assert not node.level, f"{path}: relative import"
            yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("rsdlib") for alias in node.names), path


def test_rooms_import_downward_and_through_doors():
    rows = ROOM.findall((REPOSITORY / "CONTRIBUTING.md").read_text())
    floor = {room: int(number) for number, room in rows}
    names = {path.relative_to(REPOSITORY / "rsdlib").parts[0] for path in PACKAGE}
    assert set(floor) == {name.removesuffix(".py") for name in names} - {"__init__"}
    for path in PACKAGE:
        room = path.relative_to(REPOSITORY / "rsdlib").parts[0].removesuffix(".py")
        for module, imported in imports(path) if room != "__init__" else ():
            rooms = imported if module == "rsdlib" else {room_of(module)}
            assert all(floor[name] < floor[room] or name == room for name in rooms), path
            through = module.count(".") < 2 or room_of(module) == room
            assert through, f"{path} enters {module} by a window"


def code_lines(tree):
    """Return the numbers of the lines that hold code, docstrings left out."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, nodes):
            lines |= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, nodes[1:]):
            lines |= set(range(node.lineno, node.body[0].lineno))
    for node in ast.walk(tree):
        if isinstance(node, nodes) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_package_is_thin():
    total = 0
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        lines = code_lines(tree)
        total += len(lines)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = lines & set(range(node.lineno, node.end_lineno + 1))
                assert len(inside) <= LONGEST, f"{path.name}: {node.name}"
    assert total <= MOST


def test_import_is_light():
    code = "import sys, time; t = time.perf_counter(); import rsdlib; "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules, 'pandas' in sys.modules)"
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.5
    assert heavy == ["False", "False"]


def test_every_public_name_exists():
    import rsdlib

    for name in rsdlib.__all__:
        assert getattr(rsdlib, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = rsdlib.nothing


def test_conda_and_pip_lists_name_the_same_packages():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["real"]]
    wanted = {re.split(r"[<>=]", line)[0].replace("_", "-") for line in lines}
    text = (REPOSITORY / "environment.yml").read_text()
    listed = yaml.safe_load(text)["dependencies"]
    pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = {entry.replace("_", "-") for entry in listed if isinstance(entry, str)} - {"pip"}
    conda = {
        "torch" if name == "pytorch" else name for name in conda if not name.startswith("python>")
    }
    assert conda | {name for name in pip if not name.startswith("-e")} == wanted
    assert f"python{project['requires-python']}" in listed
    assert "-e .[test,dist,real,book]" in pip
    reasons = [
        line
        for line in text.splitlines()
        if re.match(r"\s+- [a-z]", line) and "conda-forge" not in line and "pip:" not in line
    ]
    assert all("#" in line for line in reasons)


def test_the_tree_is_under_git():
    assert len(TRACKED) > 50, "the next two tests would pass on nothing"


def test_no_machine_paths_registry_hosts_or_secrets_in_text_files():
    hosts = "|".join(("pypi" + r"\.org", "pythonhosted", "npmjs", "conda" + r"\.anaconda"))
    forbidden = re.compile(
        rf"(?<![\w.])/(?:work|home|root|tmp)/\w|https?://[\w.]*(?:{hosts})|hf_[A-Za-z0-9]{{20,}}"
    )
    for name in TRACKED:
        path = REPOSITORY / name
        if (
            path.suffix in {".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".csv", ""}
            and path.is_file()
            and name != "LICENSE"
        ):
            found = forbidden.search(path.read_text())
            assert not found, f"{name}: {found}"


def test_nothing_made_by_running_is_tracked():
    assert not [
        name
        for name in TRACKED
        if name.startswith(("runs/", "data/cache/")) or name.endswith((".ckpt", ".tmp", ".lock"))
    ]
    assert (
        sum((REPOSITORY / name).stat().st_size for name in TRACKED if (REPOSITORY / name).exists())
        < 60 * 2**20
    )


# --- notebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 30
    assert notebook.cells[0].cell_type == "markdown"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 25
            assert max(map(len, cell.source.splitlines())) <= 88
            assert "../" not in cell.source
    trees = [node for tree in code_of(path) for node in ast.walk(tree)]
    assert not any(isinstance(node, ast.ClassDef) for node in trees)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_typed_literal_and_explained(path):
    from rsdlib import cli

    cell = next(
        c
        for c in nbformat.read(path, as_version=4).cells
        if "parameters" in c.metadata.get("tags", [])
    )
    nodes = ast.parse(cell.source).body
    assert all(isinstance(node, ast.AnnAssign) for node in nodes)
    for node in nodes:
        ast.literal_eval(node.value)
    assert all(" # " in line for line in cell.source.splitlines())
    import papermill

    declared = papermill.inspect_notebook(str(path))
    assert list(declared) == [node.target.id for node in nodes], "papermill must see each of them"
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}
    assert (
        cli.check_parameters(path, {name: str(value) for name, value in defaults.items()})
        == defaults
    )
