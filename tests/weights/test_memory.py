"""Loading holds the weights once: peak memory of a process that loads one file."""

import json
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

LEAVES, SIDE = 24, 1448  # 24 kernels of 8 MiB: 192 MiB
SCRIPT = """
import resource, sys
import jax, jax.numpy as jnp
from jtl.weights import fill, read

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def template(side, leaves):
    kernel = jax.ShapeDtypeStruct((side, side), jnp.float32)
    return {"params": {str(i): {"kernel": kernel} for i in range(leaves)}}

path, leaves, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before = jax.block_until_ready(jnp.ones((side, side)) + 1)
start = peak()
trees, report = fill(template(side, leaves), read(path))
assert len(report.loaded) == leaves, report
print(peak() - start)
"""


def _safetensors(path):
    kernel = np.ones((SIDE, SIDE), np.float32)
    save_file({f"{i}.weight": kernel for i in range(LEAVES)}, path)


def _msgpack(path):
    from flax.serialization import msgpack_serialize

    kernel = np.ones((SIDE, SIDE), np.float32)
    path.write_bytes(msgpack_serialize({str(i): {"kernel": kernel} for i in range(LEAVES)}))


def _pickle(path):
    """Write what torch.save writes, each storage a member of the archive."""
    size = SIDE * SIDE
    head = b"\x80\x02}("  # protocol 2, a dict, its items
    for i in range(LEAVES):
        name, key = (
            f"X{struct.pack('<I', len(t)).decode('latin1')}{t}" for t in (f"{i}.weight", str(i))
        )
        head += (
            name.encode("latin1") + b"ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storage"
        )
        head += b"ctorch\nFloatStorage\n" + key.encode("latin1") + b"X\x03\x00\x00\x00cpu"
        head += b"J" + struct.pack("<i", size) + b"tQK\x00"
        for numbers in ((SIDE, SIDE), (SIDE, 1)):
            head += b"".join(b"J" + struct.pack("<i", number) for number in numbers) + b"\x86"
        head += b"tR"
    raw = np.ones(size, np.float32).tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", head + b"u.")
        for i in range(LEAVES):
            archive.writestr(f"archive/data/{i}", raw)


@pytest.mark.parametrize(
    ("file", "write"),
    [("x.safetensors", _safetensors), ("x.bin", _pickle), ("x.msgpack", _msgpack)],
)
def test_a_file_is_held_once(tmp_path, file, write):
    path = tmp_path / file
    write(path)
    size = path.stat().st_size / 2**20
    command = [sys.executable, "-c", SCRIPT, str(path), str(LEAVES), str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path.unlink()
    assert done.returncode == 0, done.stderr
    assert size > 180 and float(done.stdout) < 1.2 * size + 24, json.dumps([size, done.stdout])
