"""The house rules, checked: one list of requirements, no pickle, one backward pass, light imports, clean notebooks."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from conftest import REPOSITORY

SOURCES = [path for folder in ("rsdlib", "tests", "benchmarks", "data/mini/build") for path in (REPOSITORY / folder).rglob("*.py")]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
TRACKED = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
CODE_RUNNERS = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
FLOOR = re.compile(r"^\| (\d) \| ([^|]+) \|", re.M)


def code_of(path):
    """Return the syntax trees of a Python file or of a notebook's code cells."""
    if path.suffix == ".py":
        return [ast.parse(path.read_text())]
    cells = nbformat.read(path, as_version=4).cells
    return [ast.parse(re.sub(r"(?m)^%.*$", "", cell.source)) for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_that_is_loaded_can_run_code(path):
    for tree in code_of(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not CODE_RUNNERS & {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in CODE_RUNNERS
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "torch.load", "torch.save", "pd.read_pickle", "yaml.load"}
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("allow_pickle", "False") == "False"
                assert keywords.get("weights_only", "True") == "True"
            elif isinstance(node, ast.ExceptHandler):
                assert node.type is not None, "a bare except"


def test_one_backward_pass_and_one_atomic_writer():
    package = {path.name: path.read_text() for path in (REPOSITORY / "rsdlib").glob("*.py")}
    assert sum(text.count(".backward(") for text in package.values()) == 1
    assert [name for name, text in package.items() if "os.replace" in text] == ["runtime.py"]
    for name, text in package.items():
        if name != "runtime.py":
            assert not re.search(
                r"open\([^)]*[\"']wb?[\"']|\.write_(text|bytes)\(|np\.save\(|save_file\(", text.replace("runtime.write_text(", "")
            ), name


def test_modules_import_only_from_floors_below():
    rows = FLOOR.findall((REPOSITORY / "CONTRIBUTING.md").read_text())
    floor = {module: int(number) for number, modules in rows for module in re.findall(r"`(\w+)`", modules)}
    assert set(floor) == {path.stem for path in (REPOSITORY / "rsdlib").glob("[a-z]*.py")}
    for module in floor:
        for node in ast.walk(ast.parse((REPOSITORY / "rsdlib" / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rsdlib":
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rsdlib."):
                used = {node.module.split(".")[1]}
            else:
                continue
            assert all(floor[name] < floor[module] for name in used), f"{module} imports {used}"


def test_import_is_light():
    heavy = "'torch' in sys.modules, 'pandas' in sys.modules"
    code = f"import sys, time; t = time.perf_counter(); import rsdlib; print(time.perf_counter() - t, {heavy})"
    seconds, *heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
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
    wanted = {re.split(r"[<>=]", line)[0].replace("_", "-") for line in project["dependencies"]}
    text = (REPOSITORY / "environment.yml").read_text()
    listed = yaml.safe_load(text)["dependencies"]
    pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = {entry.replace("_", "-") for entry in listed if isinstance(entry, str)} - {"pip"}
    conda = {"torch" if name == "pytorch" else name for name in conda if not name.startswith("python>")}
    assert conda | {name for name in pip if not name.startswith("-e")} == wanted
    assert f"python{project['requires-python']}" in listed
    assert "-e .[test,dist]" in pip
    reasons = [
        line for line in text.splitlines() if re.match(r"\s+- [a-z]", line) and "conda-forge" not in line and "pip:" not in line
    ]
    assert all("#" in line for line in reasons)


def test_the_tree_is_under_git():
    assert len(TRACKED) > 50, "the next two tests would pass on nothing"


def test_no_machine_paths_registry_hosts_or_secrets_in_text_files():
    hosts = "|".join(("pypi" + r"\.org", "pythonhosted", "npmjs", "conda" + r"\.anaconda"))
    forbidden = re.compile(rf"(?<![\w.])/(?:work|home|root|tmp)/\w|https?://[\w.]*(?:{hosts})|hf_[A-Za-z0-9]{{20,}}")
    for name in TRACKED:
        path = REPOSITORY / name
        if path.suffix in {".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".csv", ""} and path.is_file() and name != "LICENSE":
            found = forbidden.search(path.read_text())
            assert not found, f"{name}: {found}"


def test_nothing_made_by_running_is_tracked():
    assert not [name for name in TRACKED if name.startswith(("runs/", "data/cache/")) or name.endswith((".ckpt", ".tmp", ".lock"))]
    assert sum((REPOSITORY / name).stat().st_size for name in TRACKED if (REPOSITORY / name).exists()) < 60 * 2**20


# --- notebooks --------------------------------------------------------------------------------------------------------------


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
            assert len(cell.source.splitlines()) <= 20
            assert "../" not in cell.source
            assert not any(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for tree in code_of(path) for node in ast.walk(tree))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_typed_literal_and_explained(path):
    from rsdlib import cli

    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    nodes = ast.parse(cell.source).body
    assert all(isinstance(node, ast.AnnAssign) for node in nodes)
    for node in nodes:
        ast.literal_eval(node.value)
    assert all(" # " in line for line in cell.source.splitlines())
    import papermill

    declared = papermill.inspect_notebook(str(path))
    assert list(declared) == [node.target.id for node in nodes], "papermill must see each of them"
    defaults = {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}
    assert cli.check_parameters(path, {name: str(value) for name, value in defaults.items()}) == defaults
