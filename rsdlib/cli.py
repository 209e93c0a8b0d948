"""The command ``rsd``: run notebooks with checked parameters, show tables, predict from images."""

import ast
import contextlib
import json
import os
import re
import sqlite3
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro

from rsdlib import config, errors, files, runtime
from rsdlib.config import did_you_mean
from rsdlib.errors import ConfigError, NotebookError, RsdError, refusing

# --- notebooks ------------------------------------------------------------------------------------


def notebooks():
    """Return the project's notebooks by name, in order."""
    paths = sorted((files.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {path.stem: path for path in paths}


def find_notebook(name):
    """Return a notebook's path from its name, number or path.

    Raises
    ------
    ConfigError
        There is no such notebook.
    """
    if Path(name).suffix and Path(name).is_file():  # a path means that very file
        return Path(name)
    known, stem = notebooks(), Path(name).stem
    numbered = {key.partition("_")[0]: path for key, path in known.items()}
    if stem not in known | numbered:
        raise ConfigError(f"there is no notebook {name!r}", did_you_mean(stem, known))
    return (known | numbered)[stem]


_TYPES = {"str": str, "int": int, "float": pydantic.FiniteFloat, "bool": bool, "list": list}


def check_parameters(path, parameters):
    """Parse and check a notebook's parameters; papermill itself lets mistakes pass.

    Parameters
    ----------
    path : path-like
    parameters : dict of str to str

    Returns
    -------
    dict
        Values of the types that the annotations in the parameters cell state.

    Raises
    ------
    ConfigError
        A name is unknown or a value of the wrong type.
    """
    import papermill
    from nbformat import ValidationError, reader

    with refusing((reader.NotJSONError, ValidationError), ConfigError, f"{path} is not a notebook"):
        declared = papermill.inspect_notebook(str(path))
    return {name: _parse(name, text, declared) for name, text in parameters.items()}


def _parse(name, text, declared):
    if name not in declared:
        raise ConfigError(f"the notebook has no parameter {name!r}", did_you_mean(name, declared))
    annotation = declared[name]["inferred_type_name"]
    kind = annotation.removeprefix("Optional[").removesuffix("]")
    if kind != annotation and text.lower() == "none":
        return None
    message = f"{name} = {text!r} is not of type {annotation}"
    with refusing((ValueError, SyntaxError, KeyError), ConfigError, message):
        value = ast.literal_eval(text) if kind == "list" else text
        return pydantic.TypeAdapter(_TYPES[kind]).validate_python(value)


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
    output = Path(output or _default_output(path, values))
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["RSD_HEADLESS"] = "1"
    runtime.log(f"{path.stem}: running -> {files.relative(output)}")
    try:
        notebook = _execute(path, output, values, timeout)
    except NotebookError:
        with contextlib.suppress(OSError, ValueError):  # what failed is shown as it is
            _finish(output)
        raise
    _finish(output)
    if not ran_whole(notebook):
        raise NotebookError(f"{path.stem} left before its end", f"See {files.relative(output)}.")
    return output


def ran_whole(notebook):
    """Tell whether every cell of an executed notebook ran, and none failed or left."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    failed = any(out.output_type == "error" for cell in code for out in cell.outputs)
    return not failed and all(cell.execution_count for cell in code)


_PROGRESS = re.compile(r"^.*: [\d,]+/[\d,]+, about \d+ s left\n", re.M)


def _finish(path):
    """Take progress out of an executed notebook, and trust it."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = _PROGRESS.sub("", output.text)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
    files.write_text(path, nbformat.writes(notebook))
    trust(notebook)


def trust(notebook):
    """Sign a notebook for this user, so that JupyterLab shows all that it holds."""
    from nbformat.sign import NotebookNotary

    with contextlib.suppress(OSError, sqlite3.Error):  # a home that cannot be written to
        NotebookNotary().sign(notebook)


def _default_output(path, values):
    import papermill

    declared = papermill.inspect_notebook(str(path)).get("profile", {"default": "'mini'"})
    name = values.get("profile", ast.literal_eval(declared["default"]))
    return files.root() / "runs" / config.profile(name).name / "notebooks" / f"{path.stem}.ipynb"


def _execute(path, output, values, timeout):
    """Run papermill; every way it can fail becomes a `NotebookError` with its exit code."""
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager, kernelspec
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    quiet = get_kernel_dict(extra_arguments=["--log-level=CRITICAL"])  # of its own plumbing

    class Ours(AsyncKernelManager):  # in this interpreter, whatever is installed as python3
        kernel_spec = kernelspec.KernelSpec(**quiet)
        transport_encryption = "auto"

    how = {"kernel_name": "python3", "progress_bar": False, "stdout_file": sys.stdout}
    how |= {"execution_timeout": timeout, "coalesce_streams": True, "kernel_manager_class": Ours}
    name = path.stem
    try:
        return papermill.execute_notebook(str(path), str(output), parameters=values, **how)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip(": ").splitlines()[0].rstrip(".")
        message = f"{name} failed in cell {error.exec_count}: {reason}"
        code = getattr(getattr(errors, error.ename, None), "exit_code", 1)  # one of ours keeps it
        raise NotebookError(message, f"See {files.relative(output)}.", exit_code=code) from error
    except DeadKernelError as error:
        fix = "Often memory: use a smaller batch_size. Run it again, it resumes."
        raise NotebookError(f"{name}: the kernel died", fix, exit_code=138) from error
    except CellTimeoutError as error:
        message = f"{name}: a cell took longer than {timeout} s"
        raise NotebookError(message, "Raise --timeout; a new run resumes.") from error
    except RuntimeError as error:  # what jupyter raises when a kernel does not come up
        raise NotebookError(f"{name}: {str(error).splitlines()[0]}", "Run it again.") from error


# --- commands -------------------------------------------------------------------------------------

_PARAMETER = tyro.conf.arg(aliases=["-p"], metavar="NAME VALUE")
Parameters = Annotated[tuple[tuple[str, str], ...], _PARAMETER]
Size = Literal["smoke", "mini", "paper"]
AnySize = Literal["smoke", "mini", "desk", "paper"]


def run(notebook: str, /, param: Parameters = (), output: str = "", timeout: int | None = None):
    """Run one notebook headless: rsd run 01_train_vit -p epochs 3.

    Args:
        notebook: its name or number.
        param: a parameter's name and value; may be repeated.
        output: where the executed notebook goes; default: runs/<profile>/notebooks.
        timeout: seconds that one cell may take.
    """
    started = time.monotonic()
    path = run_notebook(notebook, dict(param), output, timeout)
    runtime.log(f"done in {time.monotonic() - started:.0f} s: {files.relative(path)}")


def reproduce(profile: Size = "mini", from_: Annotated[str, tyro.conf.arg(name="from")] = "00"):
    """Run all notebooks one after the other; make reproduce runs them side by side.

    Args:
        profile: the size: smoke (a minute), mini (a laptop) or paper (GPUs, DiffusionDB).
        from_: begin with this notebook.
    """
    names = list(notebooks())
    names = names[names.index(find_notebook(from_).stem) :]
    for number, name in enumerate(names, 1):
        runtime.log(f"[{number}/{len(names)}] {name}")
        run(name, (("profile", profile),))


def tables(profile: AnySize = "mini", figures: Path | None = None, write: Path | None = None):
    """Show the paper's five tables, ours beside the paper's numbers, from the stored results.

    Args:
        profile: whose results.
        figures: the folder they lie in; default: the profile's own, else what ships with it.
        write: put them into this Markdown file, between its two marks.
    """
    from rsdlib import experiment
    from rsdlib.analysis import tables

    folder = figures or experiment.results_folder(config.profile(profile))
    shown = {"tables": tables.markdown(tables.collect(folder))}
    shown["real pictures"] = tables.real_pictures(folder)
    if write is None:
        print(*filter(None, shown.values()), sep="\n")
        return
    text = write.read_text(encoding="utf-8")
    for place, content in shown.items():
        text = tables.insert(text, place, content) if content else text
    files.write_text(write, text)
    runtime.log(f"tables of {files.relative(folder)}: {write}")


def predict(
    images: tuple[str, ...],
    /,
    run: str | None = None,
    profile: AnySize | None = None,
    bank: str | None = None,
    rank: str | None = None,
    without: str = "",
    captions: bool = False,
    format: Literal["text", "json", "csv", "kaggle"] = "text",
    sidecar: bool = False,
    device: str = "auto",
    on_bad: Literal["error", "skip"] = "error",
):
    """Read prompts out of images: rsd predict picture.png folder/.

    Args:
        images: image files, or folders of them.
        run: a run folder; default: the best on validation.
        profile: where to look for it; default: desk, which knows real pictures, before mini.
        bank: prompts to find the nearest among: a text file, a table, or DiffusionDB's folder.
        rank: prompts of your own, in place of bank: all are ranked for each image (CSV has the
            first).
        without: words that are not to be said, between commas or one a line of a file: prompts
            lose all that stands between the same commas. artists: what begins with "by ...",
            "art by ..." or "in the style of ...".
        captions: let the best captioner describe the images too.
        format: text to read, JSON with the embeddings, CSV without them, or the submission to
            Kaggle's Stable Diffusion - Image to Prompts.
        sidecar: write the caption, or else the nearest prompt, into picture.txt beside
            picture.png where there is none.
        device: auto, cpu or cuda.
        on_bad: files that are no readable image: stop, or leave them out and say so.
    """
    if not images:
        raise ConfigError("no image was given", "For example: rsd predict picture.png")
    from rsdlib.data import find_images, load_prompts

    with contextlib.redirect_stdout(sys.stderr):  # the answer alone goes to the standard output
        paths = [path for image in images for path in find_images(image)]
        from rsdlib.predict import Predictor, best_run  # slow: what can be refused was refused

        folder = run or best_run(profile)
        captioner = best_run(profile, captions=True) if captions else None
        predictor = Predictor.load(folder, device, captioner, bank=rank or bank)
        paths = [path for path in paths if on_bad == "error" or _readable(path)]
        unsaid = load_prompts(without) if os.path.isfile(without) else without.split(",")
        prediction = predictor.predict(paths, n_prompts=None if rank else 5, without=unsaid)
        records = prediction.records(paths)
        if strange := sum(not record.get("in_domain", True) for record in records):
            print(f"{strange} of {len(paths)} pictures {UNLIKE}")
        for path, record in zip(paths, records, strict=True) if sidecar else ():
            said = record.get("caption") or next(iter(dict(record["prompts"])), "")
            if said and not path.with_suffix(".txt").exists():
                files.write_text(path.with_suffix(".txt"), said)
    if format == "text":
        print(f"model: {files.relative(folder)}", *map(_as_text, records), sep="\n")
    elif format == "json":
        print(json.dumps(records))
    else:  # what goes into a file is UTF-8, whatever the console
        table = prediction.submission(paths) if format == "kaggle" else prediction.table(paths)
        table.to_csv(getattr(sys.stdout, "buffer", sys.stdout), index=False)


UNLIKE = "are unlike all that this model was trained on: do not trust what it reads in them. "
UNLIKE += "Train on your kind of pictures: rsd run 01_train_vit -p profile desk -p source FOLDER"


def _as_text(record):
    facts = {"WARNING": "", "stored": record["stored_prompt"], "caption": record.get("caption")}
    if not record.get("in_domain", True):
        facts["WARNING"] = f"unlike its training pictures: {record['distance']:.1f} times the limit"
    if record["stored_cosine"] is not None:
        facts["stored"] = f"{record['stored_cosine']:.3f}  {record['stored_prompt']}"
    facts["words"] = ", ".join(f"{word} {share:.2f}" for word, share in record["words"])
    lines = [f"  {name:<9}{fact}" for name, fact in facts.items() if fact]
    lines += [f"  {similarity:.3f}    {prompt}" for prompt, similarity in record["prompts"]]
    return "\n".join(["", record["image"], *lines])


def _readable(path):
    from rsdlib.data import open_image

    try:
        return open_image(path)
    except errors.BadImageError as error:
        print(f"left out: {error.id}: {error.reason}")


def extract(
    profile: AnySize = "paper",
    source: str | None = None,
    backbones: tuple[str, ...] = (),
    processes: int = 0,
    dask: str = "",
    rank: int = 0,
    of: int = 1,
    local: str = "",
    device: str = "auto",
):
    """Decode all parts once and make all that the backbones read: rsd extract --processes 8.

    Resumes by itself. Notebooks do the same for what they need and do not find.

    Args:
        profile: whose backbones and data.
        source: another folder of pairs.
        backbones: some of the profile's; default: its readers and its captioner.
        processes: so many side by side, each with a GPU of its own where there are several.
        dask: address of a Dask scheduler whose workers see the same files, or local:4.
        rank: which share of the parts, from 0; for array jobs of a cluster.
        of: how many shares there are.
        local: copy what was made into this folder, on a fast disk; notebooks read it there
            with RSD_LOCAL=FOLDER.
        device: auto, cpu or cuda.
    """
    from rsdlib import data, experiment

    if not 0 <= rank < of:
        raise ConfigError(f"rank = {rank} of {of} is no share", f"Count from 0 to {of - 1}.")
    chosen = config.profile(profile, source, on_bad="skip")
    backbones = backbones or (*chosen.readers, "blip")
    parts = data.find_parts(chosen.data.source, chosen.data.on_bad)[rank::of]
    with data.executor(processes, dask) as pool:
        fronts, images, bad = experiment.extract(chosen, backbones, parts, pool, device)
    runtime.log(f"{len(parts)} parts, {images:,} images, {bad:,} bad: ready for {len(fronts)} uses")
    if local:
        os.environ["RSD_LOCAL"] = local
        experiment.prepare(chosen.data).stores(fronts, device)


def train(folder: str, /):
    """Train a run that a notebook has planned, as one of the processes that torchrun starts.

    Args:
        folder: of the run.
    """
    from rsdlib import experiment, training

    training.end_with_parent()
    if training.is_finished(folder):
        runtime.log(f"{folder} holds a finished run")
    else:
        experiment.planned(folder).run()


# --- data and models ------------------------------------------------------------------------------


def data(
    what: Literal["fetch", "check", "prompts"],
    dataset: str = "diffusiondb",
    /,
    parts: str = "1",
    large: bool = False,
    prompts_only: bool = False,
    folder: str | None = None,
    write: bool = False,
):
    """Fetch DiffusionDB from the model hub, check it, or read prompts out of pictures.

    For example: rsd data fetch diffusiondb --parts 5; rsd data prompts my/pictures.

    Args:
        what: fetch what is not here yet, check every byte of what is, or count prompts.
        dataset: diffusiondb; or stores, what was made of images, to be checked; or the folder
            of pictures.
        parts: how many parts of 1,000 images, from the first on, or a range such as 10-14.
        large: DiffusionDB Large (14 million images, WebP) instead of 2M (PNG).
        prompts_only: the table alone.
        folder: where it lies; default: data/diffusiondb, or data/diffusiondb-large.
        write: put prompts that were found in pictures into .txt files beside them.
    """
    from rsdlib import data

    if what == "prompts":
        prompts = data.find_prompts(dataset)
        print(prompts.value_counts(["writer", "reason"]).to_string())
        if write:
            data.write_sidecars(prompts)
        return
    if dataset not in ("diffusiondb", "stores"):
        raise ConfigError(f"dataset = {dataset!r} is unknown", "Use diffusiondb or stores.")
    place = folder or f"data/diffusiondb{'-large' if large else ''}"
    if dataset == "stores":
        right, damaged = data.check_shards(folder)
        runtime.log(f"right: {right} files; damaged and deleted, to be made again: {damaged}")
    elif what == "fetch":
        chosen = () if prompts_only else data.part_range(parts, large=large)
        data.fetch_diffusiondb(place, chosen, large=large)
    else:
        checked, unknown = data.check_diffusiondb(place)
        runtime.log(f"right: {checked} files; no checksum known: {unknown}")


_MODEL = "{:<52} {:<56} {:<12} {:<24} {:>8} {}".format


def models(what: Literal["list", "fetch", "check"], names: tuple[str, ...] = (), /):
    """List the pretrained weights, fetch some, or check them: rsd models fetch ViT-H-14.

    Args:
        what: list all, fetch those that are named, or check those that are here.
        names: as the list has them; check takes all where none is named.
    """
    from rsdlib import weights

    if what == "fetch" and not names:
        raise ConfigError("no model was named", f"Known: {sorted(weights.MODELS)}.")
    here = {name: weights.whereabouts(name) for name in names or weights.MODELS}
    if what != "check":
        print(_MODEL("name", "hub or package", "revision", "licence", "size", "here"))
        for name, (where, _) in here.items():
            spec = weights.MODELS[name]
            revision, size = (spec.revision or "-")[:12], f"{spec.size / 1e9:.2f} GB"
            print(_MODEL(name, spec.hub or spec.package, revision, spec.licence, size, where))
    if what == "list":
        return
    for name in names or [name for name, (_, folder) in here.items() if folder]:
        if what == "fetch":
            weights.locate(name, check=False)
        right, unknown = weights.verify(name)
        runtime.log(f"{name}: right: {right} files; no checksum known: {unknown}")


def main(arguments=None):
    """Run ``rsd``; errors that `rsdlib` names end in one line and a documented exit code.

    Exit codes: 0 done, 1 a notebook failed, 2 wrong usage or parameter, 3 refused input, 130
    interrupted, 138 the kernel died, 141 nobody reads on.
    """
    commands = (run, reproduce, tables, predict, extract, train, data, models)
    how = {"prog": "rsd", "args": arguments, "config": (tyro.conf.UseAppendAction,)}
    with contextlib.suppress(AttributeError):  # a notebook's has no encoding of its own
        sys.stdout.reconfigure(errors="backslashreplace")  # as the standard error's always
    try:
        tyro.extras.subcommand_cli_from_dict({call.__name__: call for call in commands}, **how)
        sys.stdout.flush()
    except RsdError as error:
        print(f"rsd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("rsd: stopped; run it again, it resumes", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
