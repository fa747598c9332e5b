"""What only a process can show: exit codes, one paragraph on stderr, and how fast help is."""
import json, subprocess, sys, time

import pytest
from conftest import segnb, settings


def one_paragraph(done):
    "The error text, checked to be one paragraph without a traceback"
    text = done.stderr.strip()
    assert text and "\n\n" not in text and "Traceback" not in text, text
    return text.splitlines()[-1]


@pytest.mark.quick
def test_help_is_quick_and_imports_nothing_heavy():
    def seconds():
        began = time.perf_counter()
        assert "recipes" in segnb("--help").stdout
        return time.perf_counter() - began
    assert min(seconds() for _ in range(3)) < 0.7   # the best of three: other processes may hold the machine
    heavy = "import sys, segnb.cli; print(sorted({'torch', 'pandas', 'numpy', 'papermill', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.quick
def test_usage_errors_end_with_2(tmp_path):
    assert "--out" in segnb("run", "demo", code=2).stderr
    assert "No such command" in segnb("train", code=2).stderr
    assert "'dmo'" in one_paragraph(segnb("check", "dmo", code=2))
    assert "Did you mean 'epochs'" in one_paragraph(segnb("run", "demo", "--out", tmp_path / "x", "--set", "train.epoch=3", code=2))
    assert "Did you mean 'train'" in one_paragraph(segnb("run", "demo", "--out", tmp_path / "x", "--to", "trian", code=2))
    assert "--set key=value" in one_paragraph(segnb("run", "demo", "--out", tmp_path / "x", "--set", "seed", code=2))


@pytest.mark.quick
def test_debug_shows_the_traceback(tmp_path):
    for arguments in (["--debug", "run", "dmo", "--out", tmp_path / "x"], ["run", "dmo", "--out", tmp_path / "x", "--debug"]):
        assert "Traceback" in segnb(*arguments, code=2).stderr


def test_json_stands_alone_on_stdout(tmp_path):
    done = segnb("check", "demo", "--json", "--set", f"data.root={tmp_path / 'demo'}")
    assert json.loads(done.stdout)["ok"] and "drawing the demo data" in done.stderr
