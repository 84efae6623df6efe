"""Loading holds the weights once: peak memory of a process that loads one file."""

import struct
import subprocess
import sys
import zipfile

import numpy as np
from safetensors.numpy import save_file

LEAVES, SIDE = 48, 1024  # 48 kernels of 4 MiB: 192 MiB
SCRIPT = """
import pathlib, sys
import jax, jax.numpy as jnp
from jtl.weights import fill, read

def peak():  # not ru_maxrss, which a process has from the one that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

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


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _numbers(*numbers):
    return b"".join(b"J" + struct.pack("<i", number) for number in numbers)


def _pickle(path):
    """Write what torch.save writes, opcode by opcode; each storage is a member of the archive."""
    size, head = SIDE * SIDE, b"\x80\x02}("  # protocol 2, a dict, its items
    for i in range(LEAVES):
        head += _text(f"{i}.weight") + b"ctorch._utils\n_rebuild_tensor\n("
        head += b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)) + _text("cpu")
        head += _numbers(size) + b"tQ"  # the tuple before it names a storage
        head += _numbers(0, SIDE, SIDE) + b"\x86" + _numbers(SIDE, 1) + b"\x86" + b"tR"
    raw = np.ones(size, np.float32).tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", head + b"u.")
        for i in range(LEAVES):
            archive.writestr(f"archive/data/{i}", raw)


def test_a_file_is_held_once(tmp_path):
    writers = {"x.safetensors": _safetensors, "x.bin": _pickle, "x.msgpack": _msgpack}
    running = {}
    for file, write in writers.items():  # all three at once, since each process imports jax
        write(tmp_path / file)
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / file), str(LEAVES), str(SIDE)]
        running[file] = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    for file, process in running.items():
        out, error = process.communicate()
        size = (tmp_path / file).stat().st_size / 2**20
        assert process.returncode == 0, error
        # Less than the file would say that the peak is not measured.
        assert 180 < size < float(out) + 8 and float(out) < 1.2 * size + 24, f"{file} {size} {out}"
        (tmp_path / file).unlink()
