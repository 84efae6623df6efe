"""torchvision's names of a ResNet, which models that contain one are published in."""

from collections.abc import Iterator

from jtl.weights.rename import Rule

_STATISTICS = (
    *(("scale", "weight"), ("bias", "bias")),
    *(("mean", "running_mean"), ("var", "running_var")),
)


def resnet_rules(ours: str, theirs: str, *, stages: int = 4, depth: int = 3) -> tuple[Rule, ...]:
    """Return the rules from the paths of `families/resnet.py` to torchvision's names.

    Args:
        ours: path of the network in our tree.
        theirs: its name in the checkpoint.
        stages: how many there are.
        depth: convolutions of a residual layer, 3 in a bottleneck.

    >>> resnet_rules("net", "encoder")[0][1:]
    ('encoder.conv1.weight', 'conv')
    """
    rules = [*_pair(f"{ours}/embedder/embedder", f"{theirs}.conv1", f"{theirs}.bn1")]
    for stage in range(stages):
        layer = f"{ours}/encoder/stages/{stage}/layers/(\\d+)"
        place = f"{theirs}.layer{stage + 1}.\\1"
        rules += _pair(f"{layer}/shortcut", f"{place}.downsample.0", f"{place}.downsample.1")
        for i in range(depth):
            rules += _pair(f"{layer}/layer/{i}", f"{place}.conv{i + 1}", f"{place}.bn{i + 1}")
    return tuple(rules)


def _pair(ours: str, convolution: str, norm: str) -> Iterator[Rule]:
    yield f"{ours}/convolution/kernel", f"{convolution}.weight", "conv"
    for leaf, name in _STATISTICS:
        yield f"{ours}/normalization/{leaf}", f"{norm}.{name}", "same"
