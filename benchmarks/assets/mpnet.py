"""all-mpnet-base-v2: a zip in five parts, in the layout of Hugging Face already.

Reference: Song et al. 2020, arXiv:2004.09297.
"""

import shutil
import zipfile
from pathlib import Path

ARCHIVE = "all-mpnet-base-v2.zip"
FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("special_tokens_map.json", "sentence_bert_config.json", "modules.json", "README.md"),
    "1_Pooling/config.json",
)


def convert(fetched: Path, made: Path) -> None:
    """Unpack the joined zip."""
    with zipfile.ZipFile(fetched / ARCHIVE) as archive:
        for file in FILES:
            (made / file).parent.mkdir(exist_ok=True)
            path = f"all-mpnet-base-v2/{file}"
            with archive.open(path) as source, (made / file).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
