"""examples/notebook.ipynb, run in a kernel as it stands; and what a kernel makes of stop buttons and errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import TINY

from densenet_dist.config import load_config

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
manager = pytest.importorskip("jupyter_client.manager")

ROOT = Path(__file__).parent.parent
NOTEBOOK = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)


def test_full_selects_the_settings_of_the_original_network():
    scope: dict[str, object] = {}
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code" and "load_dataset" not in cell.source:
            exec(cell.source.replace("FULL = False", "FULL = True"), scope)
        if "train" in scope and "config = load_config(" in cell.source:
            break
    # The variant's own compression is what the file gives.
    recipe = load_config(ROOT / "configs" / "cifar10_notebook.yaml", "name=notebook", "model.compression=null")
    assert scope["config"] == recipe


@pytest.mark.nightly
def test_it_runs_from_the_first_cell_to_the_last(tmp_path):
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    outputs = {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    found = [output for cell in outputs.values() for output in cell]
    assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
    (table,) = outputs["summary(config)"]
    assert "trainable parameters: 16,390" in table.data["text/plain"]
    progress, table = outputs["result"]
    assert re.findall(r"<tr><td>(\d)/4</td>", progress.data["text/html"]) == ["1", "2", "3", "4"]
    assert 'href="runs/notebook-small/report.html"' in table.data["text/html"]
    (figures,) = outputs["evaluate(result.run)"]
    assert ast.literal_eval(figures.data["text/plain"])["top1"] > 0.5  # chance: 0.1
    for line in ("result.plot()", "result.plot_confusion()"):
        assert "image/png" in outputs[line][0].data


class Kernel:
    """A kernel as a notebook has it."""

    def __init__(self, folder: Path) -> None:
        self.manager = manager.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=500)

    def run(self, code: str, stop: Callable[[str], bool] = lambda shown: False) -> tuple[str, list[str]]:
        """Run a cell, and press the stop button once its display is so; its last text, and its error's lines."""
        request, shown, error, stopped = self.client.execute(code), "", [], False
        while True:
            message = self.client.get_iopub_msg(timeout=500)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind in ("display_data", "update_display_data", "execute_result"):
                shown = content["data"]["text/plain"]
                if not stopped and stop(content["data"].get("text/html", "")):
                    stopped = True
                    self.manager.interrupt_kernel()
            elif kind == "error":
                error = content["traceback"]
            elif kind == "status" and content["execution_state"] == "idle":
                return shown, error


@pytest.fixture
def kernel(tmp_path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel()


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.nightly)])
def test_stopped_and_run_again(kernel, engine):
    _, error = kernel.run(
        "from densenet_dist import fit, load_config\n"
        f"config = load_config({TINY!r}, 'data.limit=1000', 'train.epochs=4', 'cluster.engine={engine}')"
    )
    assert error == []
    cell = "result = fit(config, resume=True); result"
    shown, error = kernel.run(cell, stop=lambda html: "<td>1/4</td>" in html)  # the first epoch is over
    assert error == ["KeyboardInterrupt: interrupted; see above how to resume"]
    assert re.search(r"the checkpoint of step \d+ is saved\ninterrupted; fit\(config, resume=True\) resumes", shown)
    handlers = "signal.default_int_handler, signal.SIG_DFL"
    shown, _ = kernel.run(f"import signal; [signal.getsignal(n) for n in (2, 15)] == [{handlers}]")
    assert shown == "True"
    shown, error = kernel.run(cell)
    assert error == []
    assert re.search(r"trained +4 epochs", shown)
    shown, error = kernel.run(cell)  # finished: left as it is
    assert error == []
    assert re.search(r"status +finished", shown)
    _, error = kernel.run("fit(config)")
    assert error[0].startswith("StorageError: the run ")
    assert "fit(config, resume=True)" in error[0]
    assert len(error) == 1
