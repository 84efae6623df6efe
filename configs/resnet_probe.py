"""Feature extraction with a ResNet: the features are computed once, the head trains on them.

    python -m jtl --config=configs/resnet_probe.py

BatchNorm of the held backbone stays on its stored statistics. Hardware: a laptop; the time is that
of one forward pass over the data. Expected on eurosat: not measured. `--config.smoke=True` runs it
in about a minute on 8x8 digits with a small ResNet from scratch.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    tiny = dict(
        embedding_size=8,
        hidden_sizes=(8, 16),
        depths=(1, 1),
        layer_type="basic",
        image_size=32,
    )
    return ConfigDict(
        dict(
            recipe="fine_tune",
            folder="runs/resnet_probe",
            backbone=dict(kind="pretrained", name="microsoft/resnet-50"),
            data=dict(
                kind="tfds",
                name="eurosat/rgb",
                train="train[:60%]",
                validation="train[60%:80%]",
                test="train[80%:]",
            ),
            task=dict(kind="classification", dropout=0.0),
            plan=dict(kind="feature_extraction", head_rate=1e-3, epochs=20),
            optimizer=dict(kind="adamw", weight_decay=0.0),
            batch_size=64,
            clip=None,
            seed=0,
            smoke=False,
            smoke_with=dict(
                backbone=dict(kind="scratch", family="resnet", config=tiny),
                data=dict(kind="digits", train=128, validation=64, test=64),
                plan=dict(kind="feature_extraction", head_rate=1e-2, epochs=2),
                batch_size=16,
            ),
        )
    )
