"""What torch.save writes is what is read, in both forms."""

import argparse

import ml_dtypes
import numpy as np
import pytest

from jtl.weights import to_ours
from jtl.weights.pickles import contents, read_pickle

pytestmark = pytest.mark.parity
FORMS = [True, False]
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
NEW_DTYPES = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def _same(value, tensor):
    import torch

    widened = tensor.detach().contiguous()
    assert value.shape == tuple(tensor.shape)
    assert value.dtype.name == str(tensor.dtype).removeprefix("torch.")
    raw = widened.reshape(-1).view(torch.uint8).numpy().tobytes() if widened.numel() else b""
    assert np.ascontiguousarray(value).tobytes() == raw


def _read(path, value, zipped, key=None):
    import torch

    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return read_pickle(path, key)


@pytest.mark.parametrize("zipped", FORMS)
def test_every_dtype(tmp_path, zipped):
    import torch

    torch.manual_seed(0)
    made = {name: (torch.randn(3, 5) * 40).to(getattr(torch, name)) for name in DTYPES[:4]}
    made |= {name: torch.arange(-2, 4).to(getattr(torch, name)) for name in DTYPES[4:]}
    made["bool"] = torch.tensor([True, False, True])
    made["complex64"] = torch.randn(2, 2, dtype=torch.complex64)
    made |= {name: torch.arange(1, 5).to(getattr(torch, name)) for name in NEW_DTYPES}
    names, get, _ = _read(tmp_path / "x.bin", made, zipped)
    assert set(names) == set(made)
    for name, tensor in made.items():
        _same(get(name), tensor)
    assert names["bfloat16"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("zipped", FORMS)
def test_views_shared_storages_and_scalars(tmp_path, zipped):
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    made = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "columns": base[:, 1:4],
        "every_other": base[::2, ::3],
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "expanded": base[0].expand(3, 6),
        "scalar": torch.tensor(2.5),
        "one_of": base[2, 3],
        "empty": torch.zeros(0, 3),
    }
    _, get, _ = _read(tmp_path / "x.bin", made, zipped)
    for name, tensor in made.items():
        _same(get(name), tensor)


@pytest.mark.parametrize("zipped", FORMS)
def test_modules_parameters_and_a_whole_training_checkpoint(tmp_path, zipped):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    tx = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    tx.step()
    args = argparse.Namespace(lr=0.1, device=torch.device("cpu"), sizes=torch.Size([2, 3]))
    args.dtype, args.version = torch.float32, torch.__version__
    saved = {"model": net.state_dict(), "optimizer": tx.state_dict(), "epoch": 3, "args": args}
    saved["best"] = np.float64(0.5)
    saved["rng"] = {"torch": torch.get_rng_state(), "numpy": np.arange(3)}
    names, get, ignored = _read(tmp_path / "x.pth", saved, zipped, "model")
    for name, tensor in net.state_dict().items():
        _same(get(name), tensor)
    assert set(names) == set(net.state_dict())
    assert set(ignored) == {"optimizer", "epoch", "args", "best", "rng"}
    inert = contents(tmp_path / "x.pth")["args"]
    assert inert["device"] == "cpu" and inert["sizes"] == (2, 3) and inert["dtype"] == "float32"
    parameters = {
        "w": torch.nn.Parameter(torch.randn(2, 3)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    _, get, _ = _read(tmp_path / "y.pth", parameters, zipped)
    _same(get("w"), parameters["w"])


@pytest.mark.parametrize("zipped", FORMS)
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_what_is_no_plain_tensor_is_refused(tmp_path, zipped):
    import torch

    with pytest.raises(ValueError, match="asks for torch.nn.modules.linear.Linear"):
        _read(tmp_path / "x.pt", {"net": torch.nn.Linear(2, 2)}, zipped)
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match="asks for torch._utils._rebuild_sparse_tensor"):
        _read(tmp_path / "x.pt", {"w": sparse}, zipped)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match="asks for torch._utils._rebuild_qtensor|QInt8Storage"):
        _read(tmp_path / "x.pt", {"w": quantized}, zipped)
    with pytest.raises(ValueError, match="pending operations"):
        _read(tmp_path / "x.pt", {"w": torch.ones(2, dtype=torch.complex64).conj()}, zipped)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_program_is_refused(tmp_path):
    import torch

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="TorchScript program.*torch.jit.load"):
        read_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output"), [(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0)]
)
def test_a_transposed_convolution_is_torchs(kernel, stride, padding, output):
    import torch
    from flax import linen as nn

    torch.manual_seed(0)
    theirs = torch.nn.ConvTranspose2d(3, 5, (kernel, kernel), stride, padding, output)
    x = torch.randn(2, 3, 6, 4)
    edge = kernel - 1 - padding
    edges = [(edge, edge + output)] * 2
    ours = nn.ConvTranspose(5, (kernel, kernel), (stride, stride), padding=edges)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = {"kernel": to_ours(state["weight"], "transposed_conv"), "bias": state["bias"]}
    out = ours.apply({"params": params}, x.permute(0, 2, 3, 1).numpy())
    want = theirs(x).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(out, want, atol=1e-5)
