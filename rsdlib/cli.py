"""The command ``rsd``: run notebooks with checked parameters, reproduce everything, predict from images."""

import ast
import contextlib
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rsdlib import config, errors, runtime
from rsdlib.config import matches
from rsdlib.errors import ConfigError, NotebookError, RsdError

EXIT_USAGE, EXIT_REFUSED = 2, 3

# --- notebooks --------------------------------------------------------------------------------------------------------------


def notebooks():
    """Return the project's notebooks by name, in order."""
    return {path.stem: path for path in sorted((runtime.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def find_notebook(name):
    """Return a notebook's path from its name, number or path.

    Raises
    ------
    ConfigError
        There is no such notebook.
    """
    known = notebooks()
    if Path(name).suffix and Path(name).is_file():  # a path means that very file, also where it is called like one of ours
        return Path(name)
    stem = Path(name).stem
    found = [path for key, path in known.items() if key == stem or key.split("_")[0] == stem]
    if found:
        return found[0]
    near = difflib.get_close_matches(stem, known, n=1)
    raise ConfigError(f"there is no notebook {name!r}", f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}.")


_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "None": type(None)}


def check_parameters(path, parameters):
    """Parse and check a notebook's parameters against its parameters cell; papermill itself lets mistakes pass.

    Parameters
    ----------
    path : path-like
    parameters : dict of str to str

    Returns
    -------
    dict
        Values of the types that the cell's annotations state.

    Raises
    ------
    ConfigError
        A name is unknown or a value of the wrong type.
    """
    import papermill
    from nbformat import ValidationError
    from nbformat.reader import NotJSONError

    try:
        declared = papermill.inspect_notebook(str(path))
    except (NotJSONError, ValidationError) as error:
        raise ConfigError(f"{path} is not a notebook: {type(error).__name__}") from error
    checked = {}
    for name, text in parameters.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(declared)}."
            raise ConfigError(f"{Path(path).stem} has no parameter {name!r}", hint)
        checked[name] = _parse(name, text, declared[name]["inferred_type_name"])
    return checked


def _parse(name, text, annotation):
    wanted = [_TYPES[part] for part in re.findall(r"\w+", annotation.replace("Optional", "None")) if part in _TYPES]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    for option in wanted:
        if option is not str and matches(value, option):
            return float(value) if option is float else value
    if str in wanted:
        return text
    raise ConfigError(f"{name} = {text!r} is not of type {annotation}", f"Give a value such as -p {name} <{annotation}>.")


def run_notebook(name, parameters, output=None, timeout=None):
    """Execute a notebook headless, to its very end.

    Parameters
    ----------
    name : str
    parameters : dict of str to str
        Checked by `check_parameters`.
    output : path-like, optional
        Where the executed notebook goes; default ``runs/<profile>/notebooks/<name>.ipynb``.
    timeout : int, optional
        Seconds that one cell may take.

    Returns
    -------
    Path
        The executed notebook.

    Raises
    ------
    ConfigError
        See `check_parameters`.
    NotebookError
        A cell failed, the kernel died, or the notebook left early.
    """
    path = find_notebook(name)
    values = check_parameters(path, parameters)

    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if output is None:
        declared = papermill.inspect_notebook(str(path)).get("profile", {"default": "'mini'"})
        size = config.profile(values.get("profile", ast.literal_eval(declared["default"]))).name
        output = runtime.root() / "runs" / size / "notebooks" / f"{path.stem}.ipynb"
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["RSD_HEADLESS"] = "1"
    runtime.log(f"{path.stem}: running -> {runtime.relative(output)}")
    try:
        done = papermill.execute_notebook(
            str(path),
            str(output),
            parameters=values,
            kernel_name="python3",
            progress_bar=False,
            stdout_file=sys.stdout,
            execution_timeout=timeout,
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip(": ").splitlines()
        raised = getattr(errors, error.ename, None)  # one of ours keeps its exit code
        code = 1 if raised is None else EXIT_USAGE if raised is ConfigError else EXIT_REFUSED
        message = f"{path.stem} failed in cell {error.exec_count}: {reason[0].rstrip('.')}"
        raise NotebookError(message, f"See {runtime.relative(output)}.", exit_code=code) from error
    except DeadKernelError as error:
        fix = "Often memory: use a smaller batch_size. Run it again, it resumes."
        raise NotebookError(f"{path.stem}: the kernel died", fix, exit_code=138) from error
    except CellTimeoutError as error:
        raise NotebookError(f"{path.stem}: a cell took longer than {timeout} s", "Raise --timeout; a new run resumes.") from error
    except RuntimeError as error:  # what jupyter raises when a kernel does not come up
        raise NotebookError(f"{path.stem}: {str(error).splitlines()[0]}", "Run it again when the machine is less busy.") from error
    skipped = [cell for cell in done.cells if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None]
    left = [out for cell in done.cells for out in cell.get("outputs", []) if out.get("ename") == "SystemExit"]
    if skipped or left:
        raise NotebookError(
            f"{path.stem} left before its end (sys.exit?): {len(skipped)} cells did not run", f"See {runtime.relative(output)}."
        )
    return output


# --- commands ---------------------------------------------------------------------------------------------------------------

Parameters = Annotated[tuple[tuple[str, str], ...], tyro.conf.arg(aliases=["-p"], metavar="NAME VALUE")]


def run(notebook: str, /, param: Parameters = (), output: str | None = None, timeout: int | None = None):
    """Run one notebook headless: rsd run 01_train_vit -p epochs 3.

    Args:
        notebook: its name or number.
        param: a parameter's name and value; may be repeated.
        output: where the executed notebook goes.
        timeout: seconds that one cell may take.
    """
    started = time.monotonic()
    path = run_notebook(notebook, dict(param), output, timeout)
    runtime.log(f"done in {time.monotonic() - started:.0f} s: {runtime.relative(path)}")


def reproduce(
    profile: Literal["smoke", "mini", "paper"] = "mini",
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    only: str | None = None,
    jobs: int = 0,
):
    """Run all notebooks in order, and say what came out.

    Args:
        profile: the size: smoke (a minute), mini (a laptop) or paper (GPUs, DiffusionDB).
        from_: begin with this notebook.
        only: run this one alone.
        jobs: notebooks that run at a time, each in its share of the cores; 0 takes two, or one on a GPU.
    """
    names = list(notebooks())
    if only is not None:
        names = [find_notebook(only).stem]
    elif from_ is not None:
        names = names[names.index(find_notebook(from_).stem) :]
    if jobs < 0:
        raise ConfigError(f"jobs = {jobs} is no number of notebooks", "Use 1 or more.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = jobs or (1 if runtime.device("auto").type == "cuda" else min(2, cores))
    figures = config.profile(profile).figures
    parameters = {"profile": profile, **({"figures": str(runtime.root() / figures)} if figures else {})}
    rows = sorted(_run_all(names, parameters, jobs, cores))
    runtime.log("\nnotebook                 seconds  new files")
    for name, seconds, files in rows:
        runtime.log(f"{name:<24} {seconds:>7.0f}  {', '.join(files) or '-'}")
    for path in sorted((runtime.root() / "runs" / profile).glob("*/results.json")):
        result = runtime.read_json(path)
        cosine = result["cosine"]
        found = f"median rank {result['median_rank']:.0f} of {result['candidates']}"
        runtime.log(f"{path.parent.name:<32} test cosine {cosine['mean']:.4f} [{cosine['low']:.4f}, {cosine['high']:.4f}]  {found}")


# Whose runs a notebook reads: alone it trains them itself, side by side both would. All wait for 00, and 09 waits for all.
_READS = {"05": {"01"}, "06": {"01", "02", "03", "04"}, "07": {"04"}, "08": {"03"}}


def _waits_for(name, names):
    """Return which of `names`, in order, have to be done before a notebook may begin."""
    before = names[: names.index(name)]
    here, own = {other[:2] for other in names}, _READS.get(name[:2], set())
    absent = own - here  # whoever comes first trains these

    def needed(number):
        return number in {"00", name[:2], *own} or name[:2] == "09" or absent & _READS.get(number, set())

    return {other for other in before if needed(other[:2])}


def _run_all(names, parameters, jobs, cores):
    """Run notebooks, `jobs` at a time, in order as far as they do not wait for each other: list of name, seconds, new files."""
    waiting, running, children, rows, failed = list(names), {}, [], [], None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end as well
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or (waiting and not failed):
                done = {name for name, _, _ in rows}
                ready = [name for name in waiting if not (_waits_for(name, names) - done)]
                ready.sort(key=lambda name: name[:2] != "08")  # the longest first: what begins last ends last
                for name in () if failed else ready[: jobs - len(running)]:
                    waiting.remove(name)
                    runtime.log(f"[{len(names) - len(waiting)}/{len(names)}] {name}")
                    alone = len(names) == 1 or name[:2] in ("00", "09")
                    threads = cores if alone else max(cores // jobs, 1)
                    running[pool.submit(_run_apart, name, parameters, threads, children)] = name
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(finished)
                    try:
                        rows.append((name, *finished.result()))
                    except NotebookError as error:  # what runs beside it goes on to its end
                        failed = failed or error
        finally:
            for child in children:
                child.terminate()
            signal.signal(signal.SIGTERM, before)
    if failed:
        raise failed
    return rows


def _run_apart(name, parameters, threads, children):
    """Run a notebook in a process of its own, its lines marked with its number; return seconds and new files."""
    started, clock = time.time(), time.monotonic()
    options = [word for pair in parameters.items() for word in ("-p", *pair)]
    command = [sys.executable, "-m", "rsdlib.cli", "run", name, *options]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    child = subprocess.Popen(command, env=environment, **pipe)
    children.append(child)

    def relay():
        for line in child.stdout:
            runtime.log(f"{name[:2]} | {line.rstrip()}")

    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    code = child.wait()
    reader.join(5)  # no longer: what a killed kernel leaves behind may hold the pipe open
    if code:
        raise NotebookError(f"{name} failed", "See its lines above.", exit_code=138 if code < 0 else code)
    return time.monotonic() - clock, _new_files(name, started)


def _new_files(name, since):
    """Return the figures and tables that a notebook has written since a time."""
    places = (f"figures/{name[:2]}_*", f"runs/*/figures-*/{name[:2]}_*")
    files = (path for place in places for path in runtime.root().glob(place))
    return [runtime.relative(path) for path in sorted(files) if path.stat().st_mtime >= since]


def tables(profile: Literal["smoke", "mini", "paper"] = "mini", write: Path | None = None):
    """Show the paper's five tables, ours beside the paper's numbers, from the stored results.

    Args:
        profile: whose results.
        write: put them into this Markdown file, between its two marks.
    """
    from rsdlib import recipes, tables

    chosen = config.profile(profile)
    found = tables.collect(chosen.figures or recipes.prepare(chosen.data).figures(chosen))
    if write is None:
        print(tables.markdown(found))
        return
    runtime.write_text(write, tables.insert(write.read_text(encoding="utf-8"), found))
    runtime.log(f"tables: {write}")


def predict(
    images: tuple[str, ...],
    /,
    run: str | None = None,
    profile: str = "mini",
    captions: bool = False,
    format: Literal["text", "json", "csv"] = "text",
    device: str = "auto",
    on_bad: Literal["error", "skip"] = "error",
):
    """Read prompts out of images: rsd predict picture.png folder/.

    Args:
        images: image files, or folders of them.
        run: a run folder; default: the best on validation.
        profile: where to look for it.
        captions: let the best captioner describe the images too.
        format: text to read, JSON with the embeddings, or CSV without them.
        device: auto, cpu or cuda.
        on_bad: what to do about files that are no readable image: stop, or leave them out and say so.
    """
    from rsdlib.predict import Predictor, best_run

    if not images:
        raise ConfigError("no image was given", "For example: rsd predict picture.png")
    with contextlib.redirect_stdout(sys.stderr):  # the answer alone goes to the standard output
        files = [file for image in images for file in _image_files(Path(image))]
        folder = run or best_run(config.profile(profile).name)
        captioner = best_run(config.profile(profile).name, captions=True) if captions else None
        predictor = Predictor.load(folder, device, captioner)
        if on_bad == "skip":
            files = [file for file in files if _readable(file)]
        found = predictor.predict(files)
    said = found.captions or [None] * len(files)
    if format == "csv":
        print(found.table(files).to_csv(index=False), end="")
        return
    if format == "json":
        rows = zip(files, found.embeddings.tolist(), found.words, found.prompts, said, strict=True)
        keys = ("embedding", "words", "prompts", *(["caption"] if captions else []))
        print(json.dumps([{"image": str(file), **dict(zip(keys, row, strict=False))} for file, *row in rows]))
        return
    print(f"model: {runtime.relative(folder)}")
    for file, words, prompts, caption in zip(files, found.words, found.prompts, said, strict=True):
        print(f"\n{file}")
        if captions:
            print(f"  caption  {caption}")
        if words:
            print("  words    " + ", ".join(f"{word} {probability:.2f}" for word, probability in words))
        for prompt, similarity in prompts:
            print(f"  {similarity:.3f}    {prompt}")


def _readable(file):
    from rsdlib.data import open_image

    try:
        open_image(file)
    except errors.BadImageError as error:
        print(f"left out: {error.id}: {error.reason}")
        return False
    return True


def _image_files(path):
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
        )
        if not found:
            raise ConfigError(f"there are no images in {path}")
        return found
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    return [path]


def main(arguments=None):
    """Run ``rsd``; errors that `rsdlib` names end in one line and a documented exit code.

    Exit codes: 0 done, 1 a notebook failed, 2 wrong usage or parameter, 3 refused input, 130 interrupted,
    138 the kernel died.
    """
    commands = {"run": run, "reproduce": reproduce, "tables": tables, "predict": predict}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="rsd", args=arguments, config=(tyro.conf.UseAppendAction,))
    except ConfigError as error:
        print(f"rsd: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except RsdError as error:
        print(f"rsd: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", EXIT_REFUSED))
    except KeyboardInterrupt:
        print("rsd: stopped; run it again, it resumes", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
