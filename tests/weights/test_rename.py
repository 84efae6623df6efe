"""Names and layouts, by hand."""

import numpy as np
import pytest
from flax import linen as nn

from jtl.weights import to_ours, to_torch, torch_name
from jtl.weights.rename import normalise, shape_to_ours


@pytest.mark.parametrize(
    ("path", "name", "layout"),
    [
        ("encoder/layer/0/query/kernel", "encoder.layer.0.query.weight", "dense"),
        ("LayerNorm/scale", "LayerNorm.weight", "same"),
        ("words/embedding", "words.weight", "same"),
        ("LayerNorm/bias", "LayerNorm.bias", "same"),
        ("cls_token", "cls_token", "same"),
        ("norm/mean", "norm.running_mean", "same"),
        ("norm/var", "norm.running_var", "same"),
    ],
)
def test_default_names(path, name, layout):
    assert torch_name(path) == (name, layout)


def test_the_first_rule_that_fits_the_whole_path_wins():
    rules = [("kernel", "never", "same"), (r"a/(\d)/kernel", r"b/\1/w", "conv")]
    assert torch_name("a/3/kernel", rules) == ("b.3.w", "conv")
    assert torch_name("a/x/kernel", rules) == ("a.x.weight", "dense")


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match="layout 'Dense' is not known; there are"):
        torch_name("a", [("a", "b", "Dense")])


def test_a_dense_kernel_is_transposed():
    np.testing.assert_array_equal(to_ours(np.array([[1, 2, 3]]), "dense"), [[1], [2], [3]])


def test_a_convolution_kernel_goes_from_oihw_to_hwio():
    torch = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    ours = to_ours(torch, "conv")
    assert ours.shape == (4, 5, 3, 2) == shape_to_ours(torch.shape, "conv")
    assert ours[1, 4, 2, 0] == torch[0, 2, 1, 4]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 3), "dense"),
        ((2, 3, 4, 5), "conv"),
        ((2, 3, 7), "conv"),
        ((2, 3, 4, 5, 6), "conv"),
        ((2, 3, 4, 5), "transposed_conv"),
        ((2, 3, 4), "transposed_conv"),
        ((), "same"),
    ],
)
def test_there_and_back_is_the_same(shape, layout):
    array = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(to_torch(to_ours(array, layout), layout), array)
    np.testing.assert_array_equal(to_ours(to_torch(array, layout), layout), array)


def test_a_transposed_convolution_is_turned_and_flipped():
    torch = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    ours = to_ours(torch, "transposed_conv")
    assert ours.shape == (4, 5, 2, 3) == shape_to_ours(torch.shape, "transposed_conv")
    assert ours[0, 1, 1, 2] == torch[1, 2, 3, 3]


def test_a_transposed_convolution_by_hand():
    """PyTorch puts x * kernel at each step of the output: [1, 10] and [2, 3] give 2, 3, 20, 30."""
    kernel = to_ours(np.array([[[2.0, 3.0]]]), "transposed_conv")
    x = np.array([[[1.0], [10.0]]])
    out = nn.ConvTranspose(1, (2,), (2,), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": kernel.astype(np.float32)}}, x.astype(np.float32)
    )
    np.testing.assert_allclose(out.ravel(), [2, 3, 20, 30])


@pytest.mark.parametrize(
    ("rank", "layout"),
    [(1, "dense"), (4, "dense"), (2, "conv"), (0, "conv"), (2, "transposed_conv")],
)
def test_a_rank_that_does_not_fit_the_layout_is_an_error(rank, layout):
    assert shape_to_ours((2,) * rank, layout) is None
    with pytest.raises(ValueError, match=f"{layout}.*this array has rank {rank}"):
        to_torch(np.zeros((2,) * rank), layout)


def test_aliases_are_applied_in_turn():
    aliases = [("^model[.]", ""), ("^bert[.]", ""), ("gamma$", "weight")]
    assert normalise("model.bert.LayerNorm.gamma", aliases) == "LayerNorm.weight"
