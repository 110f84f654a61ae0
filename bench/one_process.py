"""The default pipeline as a bare script: the code cells of all stages in one Python process, no DVC, no papermill, no kernel.

Usage: python bench/one_process.py PROJECT. What the others are compared with: the same cells, the same values, the same
outputs (figures are drawn and kept), each stage in a shell of its own.
"""
import json, os, shutil, sys
from pathlib import Path

from execnb.shell import CaptureShell

from mlkit.config import code_cells
from mlkit.runner import KERNEL_ENV, load_project, move_in_place
from mlkit.stage import OUTPUTS


def run(root: Path):
    "Run every stage of the project at `root`."
    os.chdir(root)
    os.environ.update(KERNEL_ENV)
    nodes, params = load_project(root)
    for name, node in nodes.items():
        aside = root / ".mlkit/aside" / name
        os.environ[OUTPUTS] = str(aside)
        shell = CaptureShell()
        for cell in code_cells(root / node.notebook):
            source = cell["source"]
            if "parameters" in cell["metadata"].get("tags", []): source += "\n" + "\n".join(f"{k} = {v!r}" for k, v in params[name].items())
            shell.run(source)
            if shell.exc: raise shell.exc
        move_in_place(aside, root, list(node.stage.outputs.values()))
        shutil.rmtree(aside)


if __name__ == "__main__": run(Path(sys.argv[1]).resolve())
