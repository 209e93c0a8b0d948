"""Make the renders of the mini world: ``python data/mini/build/make_renders.py --count 2200 --seed 0``.

Writes DiffusionDB's layout (``metadata.parquet``, ``images/part-00000N.zip``) and beside it ``scenes.parquet``, the
truth about every picture. The same count and seed give the same files, byte for byte, with the same library versions.
"""

import argparse
import hashlib
import io
import json
import os
import re
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from renderer import Scene, draw, render_row, sample_scene
from sprites import load_sprites

OUT = Path(__file__).resolve().parents[1] / "diffusiondb"
PART = 1000  # images in a part, as in DiffusionDB
REPEATS = 0.06  # share of rows that take up an earlier prompt with another seed
IMAGES_PER_PROMPT = 4
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the token sets from which a fresh prompt is refused
MADE = datetime(2026, 11, 22, tzinfo=UTC)  # a constant, so that files do not depend on the hour they were made
USER = hashlib.sha256(b"rsdlib mini renderer").hexdigest()  # DiffusionDB stores hashed names
RENDER = {"step": 0, "cfg": 0.0, "sampler": 0}  # no diffusion model had a part in these pictures

METADATA = pa.schema(
    {
        "image_name": pa.string(),
        "prompt": pa.string(),
        "part_id": pa.uint16(),
        "seed": pa.uint32(),
        "step": pa.uint16(),
        "cfg": pa.float32(),
        "sampler": pa.uint8(),
        "width": pa.uint16(),
        "height": pa.uint16(),
        "user_name": pa.string(),
        "timestamp": pa.timestamp("ms", tz="UTC"),
        "image_nsfw": pa.float32(),
        "prompt_nsfw": pa.float32(),
    }
)
SCENES = pa.schema(
    {
        "image_name": pa.string(),
        "nouns": pa.list_(pa.string()),
        "count": pa.uint8(),
        "relation": pa.string(),
        "setting": pa.string(),
        "medium": pa.string(),
        "modifiers": pa.list_(pa.string()),
        "has_referent": pa.bool_(),
        "misaligned": pa.bool_(),
    }
)


class Record(NamedTuple):
    """A scene and the seed its picture is drawn with."""

    scene: Scene
    seed: int

    @property
    def image_name(self) -> str:
        """File name of the picture."""
        return f"{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.seed} {self.scene.prompt}')}.webp"


def sample_records(count: int, seed: int) -> list[Record]:
    """Draw `count` scenes and picture seeds; no two prompts are near-duplicates unless they are the same.

    Parameters
    ----------
    count, seed : int
        Number of rows and seed of the whole data set.

    Returns
    -------
    list of Record
    """
    rng = np.random.default_rng(seed)
    seeds = list(dict.fromkeys(rng.integers(0, 2**32, 2 * count).tolist()))[:count]  # distinct
    scenes, tokens, used = [], [], Counter()
    while len(scenes) < count:
        if scenes and rng.random() < REPEATS:
            scene = scenes[rng.integers(len(scenes))]
            if used[scene.prompt] == IMAGES_PER_PROMPT:
                continue
        else:
            scene = sample_scene(rng)
            words = _tokens(scene.prompt)
            if _is_near(words, tokens):
                continue
            tokens.append(words)
        used[scene.prompt] += 1
        scenes.append(scene)
    return [Record(*pair) for pair in zip(scenes, seeds, strict=True)]


def _tokens(prompt: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", prompt.lower()))


def _is_near(words: frozenset[str], others: Iterable[frozenset[str]]) -> bool:
    return any(len(words & other) >= NEAR_DUPLICATE * len(words | other) for other in others)


def metadata_table(records: list[Record], size: int) -> pa.Table:
    """Fill in DiffusionDB's thirteen columns."""
    rows = [
        {
            "image_name": record.image_name,
            "prompt": record.scene.prompt,
            "part_id": i // PART + 1,
            "seed": record.seed,
            **RENDER,
            "width": size,
            "height": size,
            "user_name": USER,
            "timestamp": MADE,
            "image_nsfw": 0.0,
            "prompt_nsfw": 0.0,
        }
        for i, record in enumerate(records)
    ]
    return pa.Table.from_pylist(rows, METADATA)


def scenes_table(records: list[Record]) -> pa.Table:
    """Tell what each picture shows, and what its prompt has to do with it."""
    rows = [
        asdict(record.scene)
        | {
            "image_name": record.image_name,
            "nouns": record.scene.objects,
            "has_referent": record.scene.has_referent,
        }
        for record in records
    ]
    return pa.Table.from_pylist(rows, SCENES)


def encode(row: dict) -> bytes:
    """Draw a row and return it as lossy WebP."""
    buffer = io.BytesIO()
    Image.fromarray(render_row(row)).save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def write_part(path: Path, images: dict[str, bytes], records: list[Record]) -> None:
    """Write one zip of images and the JSON that lists them; stored, not deflated, with a fixed date."""
    how = {"c": RENDER["cfg"], "st": RENDER["step"], "sa": RENDER["sampler"]}
    keys = {record.image_name: {"p": record.scene.prompt, "se": record.seed, **how} for record in records}
    members = {**images, f"{path.stem}.json": json.dumps(keys, ensure_ascii=False, indent=0).encode()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, date_time=MADE.timetuple()[:6])
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    write_file(path, buffer.getvalue())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_file(path, buffer.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def with_progress(items: Iterable, total: int, what: str) -> Iterator:
    """Yield the items; every 5 seconds and at the end say how many there were."""
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > 5 or done == total:
            said = now
            print(f"{what} {done}/{total}, {done / (now - start):.0f} per second", flush=True)


def make(out: Path, count: int, seed: int, workers: int, size: int = 64) -> None:
    """Write the whole data set below `out`."""
    load_sprites()  # fetch and cache them before there are several processes
    records = sample_records(count, seed)
    scenes = scenes_table(records)
    rows = [{**row, "seed": record.seed} for row, record in zip(scenes.to_pylist(), records, strict=True)]
    with ProcessPoolExecutor(workers) as pool:
        images = list(with_progress(pool.map(encode, rows, chunksize=25), count, "rendered and encoded"))
    for first in range(0, count, PART):
        part = records[first : first + PART]
        files = {record.image_name: data for record, data in zip(part, images[first:], strict=False)}
        write_part(out / "images" / f"part-{first // PART + 1:06d}.zip", files, part)
    write_table(out / "scenes.parquet", scenes)
    write_table(out / "metadata.parquet", metadata_table(records, size))
    megabytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{count} rows, {len({r.scene.prompt for r in records})} different prompts, {megabytes:.1f} MB in {out}")


def _draw_some(seed: int, number: int = 100) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(number):
        draw(sample_scene(rng), rng)


def bench(count: int, workers: int) -> None:
    """Draw `count` pictures without encoding or writing them."""
    load_sprites()
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_draw_some, range(workers), [1] * workers))  # warm up
        start = time.perf_counter()
        list(pool.map(_draw_some, range(count // 100)))
    print(f"{count // 100 * 100 / (time.perf_counter() - start):.0f} renders per second with {workers} processes")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2200, help="rows to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole data set")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--bench", action="store_true", help="only measure drawing, write nothing")
    args = parser.parse_args()
    if args.bench:
        bench(args.count, args.workers)
    else:
        make(args.out, args.count, args.seed, args.workers)


if __name__ == "__main__":
    main()
