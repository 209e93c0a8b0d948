"""Pairs of images and prompts: read, cleaned, decoded once, and what a model learns to say."""

from rsdlib.data.clean import clean, is_english, near_duplicates, normalise, prompt_key, split, tidy
from rsdlib.data.extract import check_shards, executor, extract, find_parts, network, pixels, run
from rsdlib.data.faults import NONE_BAD
from rsdlib.data.fetch import check_diffusiondb, fetch_diffusiondb, part_range
from rsdlib.data.forward import apply, evaluating, weights_key
from rsdlib.data.images import decode_image, open_image, read_file, resize
from rsdlib.data.pairs import load_pairs, load_prompts
from rsdlib.data.pictures import find_images, find_prompts, write_sidecars
from rsdlib.data.prompts_in_images import EmbeddedPrompt, plain, read_prompt
from rsdlib.data.stores import PairStore, Pictures, Store, Unstored, features, pack
from rsdlib.data.targets import Vocabulary, cosine, embed, embed_cached, unit_rows
