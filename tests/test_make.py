"""The Makefile: a set-up that was broken off is begun again. Python and Jupyter are scripts here that write down what they are asked."""
import os, shutil, subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


def script(path, body):
    "An executable shell script"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make(venv, *arguments, **environment):
    "make with `venv` in place of .venv: what it said"
    done = subprocess.run(["make", "-s", "-C", ROOT, f"VENV={venv}", *arguments], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.quick
def test_an_environment_without_pip_is_made_again(tmp_path):
    venv, asked = tmp_path / "venv", tmp_path / "asked"
    python = script(tmp_path / "python", f'case "$*" in "-m venv"*) echo "$*" >> {asked}; for d; do :; done; mkdir -p "$d/bin"; printf "#!/bin/sh\\n" > "$d/bin/python"; chmod +x "$d/bin/python";; esac')
    script(venv / "bin/python", "exit 1")   # as after Ctrl-C, or where ensurepip is missing
    for _ in range(2):
        make(venv, f"PYTHON={python}", f"{venv}/.installed")
        (venv / ".installed").unlink()
    assert asked.read_text() == f"-m venv --clear {venv}\n"   # the second time it is whole


@pytest.mark.quick
@pytest.mark.parametrize("user, options", [("0", "--allow-root "), ("1000", "")])
def test_jupyter_starts_for_root_too(user, options, tmp_path):
    script(tmp_path / "bin/jupyter", 'echo "jupyter $*"')
    script(tmp_path / "path/id", f"echo {user}")
    (tmp_path / ".installed").touch()
    assert make(tmp_path, "lab", PATH=f"{tmp_path}/path:{os.environ['PATH']}") == f"jupyter lab {options}nbs\n"
