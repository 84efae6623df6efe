"""Examples from arrays, tables, folders and TFDS to batches of fixed shapes in a seeded order.

source = from_table("reviews.csv", text="text", label="label")
parts = split(source, {"train": 2000, "validation": 1000, "test": 2000}, seed=0)
dataset = encode(parts["train"], backbone.inputs)
for batch in batches(dataset, 32, seed=0, stop=steps_per_epoch(dataset, 32)): ...
"""

from jtl.data.audio import AudioInputs, audio_inputs, load_audio_inputs
from jtl.data.bands import BandInputs, band_inputs, load_band_inputs
from jtl.data.batches import (
    batch_shapes,
    batches,
    check_finite,
    plan,
    row_shapes,
    steps_per_epoch,
)
from jtl.data.buckets import choose_buckets
from jtl.data.dataset import Dataset, encode
from jtl.data.derive import column_bytes, derive, stored
from jtl.data.fingerprint import fingerprint
from jtl.data.folders import from_folder
from jtl.data.images import ImageInputs, image_inputs, load_image_inputs
from jtl.data.mix import mixed_batches, mixed_shapes, split_rows
from jtl.data.pairs import PairInputs, pair_inputs
from jtl.data.sources import Source, from_arrays
from jtl.data.split import split
from jtl.data.store import Store, fitting, room
from jtl.data.tables import from_table
from jtl.data.text import TextInputs, load_text_inputs
from jtl.data.tfds import from_tfds

__all__ = [
    "AudioInputs",
    "BandInputs",
    "Dataset",
    "ImageInputs",
    "PairInputs",
    "Source",
    "Store",
    "TextInputs",
    "audio_inputs",
    "band_inputs",
    "batch_shapes",
    "batches",
    "check_finite",
    "choose_buckets",
    "column_bytes",
    "derive",
    "encode",
    "fingerprint",
    "fitting",
    "from_arrays",
    "from_folder",
    "from_table",
    "from_tfds",
    "image_inputs",
    "load_audio_inputs",
    "load_band_inputs",
    "load_image_inputs",
    "load_text_inputs",
    "mixed_batches",
    "mixed_shapes",
    "pair_inputs",
    "plan",
    "room",
    "row_shapes",
    "split",
    "split_rows",
    "steps_per_epoch",
    "stored",
]
