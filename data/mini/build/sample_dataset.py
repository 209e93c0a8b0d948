"""Sample the data set from the mini Stable Diffusion: ``python data/mini/build/sample_dataset.py``.

Fresh prompts, one picture each, in DiffusionDB's layout (``metadata.parquet``,
``images/part-00000N.zip``); beside it ``scenes.parquet`` says what every prompt asks for and what
the judge sees in the picture. Batches that are sampled already are not sampled again. A few
renders, drawn fresh, go into ``renders``.
"""

import hashlib
import io
import json
import re
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from scenes import MEDIA, SETTINGS, Scene, sample_scene

from mini_world import Judge
from rsdlib import files, models, runtime

OUT = common.MINI / "diffusiondb"
MODEL = common.MINI / "stable-diffusion"
BATCH = 64
PART = 1000  # images in a part, as in DiffusionDB
REPEATS = 0.06  # share of rows that take up an earlier prompt with another seed
IMAGES_PER_PROMPT = 4
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the token sets from which a fresh prompt is refused
MADE = datetime(
    2026, 11, 22, tzinfo=UTC
)  # a constant, so that files do not depend on the hour they were made
USER = hashlib.sha256(
    b"rsdlib mini stable diffusion"
).hexdigest()  # DiffusionDB stores hashed names
SAMPLED = {
    "step": 20,
    "cfg": 5.0,
    "sampler": 9,
}  # 9 is DiffusionDB's "others": DPM-Solver++ is not among the eight it names

HOW = {"steps": SAMPLED["step"], "guidance": SAMPLED["cfg"]}
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
        "judged_nouns": pa.list_(pa.string()),
        "judged_count": pa.uint8(),
        "judged_setting": pa.string(),
        "judged_medium": pa.string(),
    }
)


class Record(NamedTuple):
    """What a prompt asks for, and the seed its picture is sampled with."""

    scene: Scene
    seed: int

    @property
    def image_name(self) -> str:
        """File name of the picture."""
        return f"{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.seed} {self.scene.prompt}')}.webp"


def sample_records(count: int, seed: int) -> list[Record]:
    """Draw `count` scenes and picture seeds.

    No two prompts are near-duplicates unless they are the same.

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
            scene = sample_scene(rng, misaligned=0)
            words = frozenset(re.findall(r"\w+", scene.prompt.lower()))
            if _is_near(words, tokens):
                continue
            tokens.append(words)
        used[scene.prompt] += 1
        scenes.append(scene)
    return [Record(*pair) for pair in zip(scenes, seeds, strict=True)]


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
            **SAMPLED,
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


def scenes_table(records: list[Record], seen: list[dict]) -> pa.Table:
    """Tell what each prompt asks for, and what the judge sees in its picture."""
    rows = []
    for record, verdict in zip(records, seen, strict=True):
        row = asdict(record.scene) | {
            "nouns": record.scene.objects,
            "has_referent": record.scene.has_referent,
        }
        if not record.scene.has_referent:
            row |= {"nouns": [], "count": 0, "setting": None, "medium": None}
        rows.append({**row, "image_name": record.image_name, **verdict})
    return pa.Table.from_pylist(rows, SCENES)


def encode(image: np.ndarray) -> bytes:
    """Return a picture as lossy WebP."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=75, method=6)
    return buffer.getvalue()


def write_part(path: Path, images: dict[str, bytes], keys: dict[str, dict]) -> None:
    """Write one zip: images, stored, and the JSON that says what is known of each, deflated.

    All have a fixed date.
    """
    members = {
        **images,
        f"{path.stem}.json": json.dumps(keys, ensure_ascii=False, indent=0).encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, date_time=MADE.timetuple()[:6])
            info.external_attr = 0o644 << 16
            archive.writestr(
                info, data, zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            )
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, whole or not at all."""
    with files.atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write(out: Path, records: list[Record], images: np.ndarray, seen: list[dict]) -> None:
    """Write the whole data set below `out`."""
    how = {"c": SAMPLED["cfg"], "st": SAMPLED["step"], "sa": SAMPLED["sampler"]}
    for first in range(0, len(records), PART):
        part = records[first : first + PART]
        encoded = {
            record.image_name: encode(image)
            for record, image in zip(part, images[first:], strict=False)
        }
        keys = {
            record.image_name: {"p": record.scene.prompt, "se": record.seed, **how}
            for record in part
        }
        write_part(out / "images" / f"part-{first // PART + 1:06d}.zip", encoded, keys)
    write_table(out / "scenes.parquet", scenes_table(records, seen))
    files.write_json(out / "names.json", names())
    write_table(out / "metadata.parquet", metadata_table(records, images.shape[1]))
    megabytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    prompts = len({record.scene.prompt for record in records})
    size = f"{len(records)} rows, {prompts} different prompts, {megabytes:.1f} MB"
    runtime.log(f"{size} in {files.relative(out)}")


def write_renders(path: Path, count: int, seed: int) -> None:
    """Draw renders that no model has learnt from, and write them as one part.

    They show what the generator was to imitate.
    """
    from renderer import draw

    rng = runtime.rng("renders to compare with", seed)
    scenes = [sample_scene(rng, misaligned=0) for _ in range(count)]
    images = {f"render-{i:04d}.webp": encode(draw(scene, rng)) for i, scene in enumerate(scenes)}
    write_part(
        path,
        images,
        {name: {"p": scene.prompt} for name, scene in zip(images, scenes, strict=True)},
    )


def names():
    """Return by which words prompts call each setting and medium, itself first."""
    said = {
        "setting": SETTINGS,
        "medium": {
            name: [words for some in both for words in some] for name, both in MEDIA.items()
        },
    }
    return {
        kind: {name: list(dict.fromkeys([name, *words])) for name, words in table.items()}
        for kind, table in said.items()
    }


def main() -> None:
    """Draw prompts, sample, judge, write."""
    chosen = common.options(__doc__, count=7600, drawn=384, epochs=None, renders=None)
    records = sample_records(chosen.count, chosen.seed)
    prompts, seeds = (
        [record.scene.prompt for record in records],
        [record.seed for record in records],
    )
    pipe = models.open_pipeline(MODEL, chosen.device, torch.float32)
    images = models.sample_stored(pipe, models.weights_of(MODEL), prompts, seeds, **HOW)
    numbers = [len(record.scene.objects) if record.scene.has_referent else 1 for record in records]
    write(OUT, records, images, Judge.open(common.MINI / "judge").verdicts(images, numbers))
    write_renders(common.MINI / "renders" / "part-000001.zip", chosen.drawn, chosen.seed)


if __name__ == "__main__":
    main()
