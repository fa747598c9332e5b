"""Run every notebook as nbdev_test does, each with a time limit: those of the library side by side on one thread each, then the stages in order."""
import os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1200   # seconds for one notebook
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(notebook, threads=None):
    "Does nbdev_test pass on `notebook`? Says so, with all that a failed one printed"
    command = [Path(sys.executable).parent / "nbdev_test", "--path", str(notebook.relative_to(ROOT)), "--n_workers", "0"]
    began, limited = time.time(), {"OMP_NUM_THREADS": str(threads)} if threads else {}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT, env=os.environ | limited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        passed, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        passed, said = False, f"{(late.stdout or b'').decode('utf8', 'replace')}\nnot done after {LIMIT} seconds"
    print(("" if passed else said + "\n") + f"{notebook.name}: {'ok' if passed else 'FAILED'} in {time.time() - began:.0f} s", flush=True)
    return passed


def main():
    notebooks = sorted((ROOT / "nbs").glob("*.ipynb"))
    stages = [n for n in notebooks if re.match(r"[1-5]0_", n.name)]   # they share a run folder
    library = [n for n in notebooks if n not in stages]
    with ThreadPoolExecutor(CORES) as pool: passed = dict(zip(library, pool.map(lambda n: run(n, threads=1), library)))
    passed |= {n: run(n) for n in stages}
    failed = [n.name for n in notebooks if not passed[n]]
    if failed: sys.exit("Notebooks that do not run through: " + ", ".join(failed))


if __name__ == "__main__": main()
