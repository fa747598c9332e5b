"""A store survives the death of its writer: what a notebook cannot prove about itself."""
import subprocess, sys
import numpy as np
from segnb.store import MaskStore, MaskWriter

WRITER = """
import sys
import numpy as np
from segnb.store import MaskWriter
rng, writer = np.random.default_rng(0), MaskWriter(sys.argv[1], {"made": "from"})
for k in range(400):
    mask = (rng.random((64, 64)) < 0.5).astype(np.uint8)
    if f"set {k}/{k}" not in writer: writer.put(f"set {k}/{k}", mask)
    print(k, flush=True)
writer.close()
"""


def write(folder, kill_after=None):
    "Run the writer; SIGKILL it once it has put `kill_after` more masks"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if kill_after is not None and int(line) >= kill_after:
            process.kill()
            break
    process.stdout.close()
    return process.wait()


def test_killed_writer_continues(tmp_path):
    assert write(tmp_path / "whole") == 0
    for at in (3, 120, 300):
        assert write(tmp_path / "killed", at) != 0
        left = MaskStore(tmp_path / "killed")
        assert at <= len(left) <= 400
        assert list(left) == [f"set {k}/{k}" for k in range(len(left))]
    assert write(tmp_path / "killed") == 0
    for name in ("data.bin", "index.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    writer = MaskWriter(tmp_path / "masks", {})
    writer.put("a", np.ones((8, 8), np.uint8))

    class Full:
        "A file on a disk with three bytes left"
        def __init__(self, file): self.file, self.left = file, 3
        def write(self, data):
            if not self.left: raise OSError(28, "No space left on device")
            n, self.left = self.file.write(data[:self.left]), 0
            return n

    monkeypatch.setattr(writer.records, "_data", Full(writer.records._data))
    try: writer.put("b", np.ones((8, 8), np.uint8))
    except OSError: pass
    else: raise AssertionError("a full disk went unnoticed")
    again = MaskWriter(tmp_path / "masks", {})
    assert list(again) == ["a"]
    again.put("b", np.zeros((8, 8), np.uint8))
    again.close()
    assert not MaskStore(tmp_path / "masks")["b"].any() and MaskStore(tmp_path / "masks")["a"].all()
