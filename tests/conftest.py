"""Strict tests: eight CPU devices, no rank promotion, no network, shapes checked at run time."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

# LLVM's passes are most of the time that tests take, and what they compile runs a few times. HLO,
# FLOPs and buffers are the same; XLA_FLAGS from outside takes their place. Products are small.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_multi_thread_eigen=false"
# Small programs compile faster without fusion emitters (large ones slower). A later jaxlib has
# nothing else, and ends the process at a flag that it does not know.
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" not in os.environ:  # programs and columns, shared by all workers
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jtl-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["XDG_CACHE_HOME"] + "/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
install_import_hook("jtl", "beartype.beartype")


def pytest_collection_finish():
    """Traces make many objects and few cycles: what is there by now is looked through no more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def one_device(monkeypatch):
    """Let runs lie on one device, as where there is one: eight hold and step eight copies."""
    from jtl.train import parallel

    made = parallel.make_spread

    def make_spread(kind="jit", devices=None, **options):
        alone = parallel.Spread(kind, None, None, 2**16)
        return alone if kind == "jit" and devices is None else made(kind, devices, **options)

    monkeypatch.setattr(parallel, "make_spread", make_spread)
