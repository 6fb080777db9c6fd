import functools
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # `make test` has two workers
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


# Tests with real runs, processes and compilers. `make check`, to be run after each edit, leaves them out.
SLOW = {"test_runs.py", "test_processes.py", "test_damage.py", "test_families.py", "test_bfloat16.py", "test_bench.py",
        "test_elastic.py"}
SLOW_TESTS = {"test_hub_offline", "test_a_missing_tokenizer", "test_pydoc", "test_known_entropy", "test_openwebtext",
              "test_compiles_in_one_graph", "test_blocks_compile_in_one_graph", "test_trains_and_resumes",
              "test_from_mdlm_to_blocks", "test_two_workers_resume_exactly", "test_teams",
              "test_a_dead_worker_ends_the_run", "test_equal_machines_do_what_two_processes_do",
              "test_averaged_gradients_are_those_of_micro_batches", "test_halos_of_one_region_is_async",
              "test_a_simulated_run", "test_compiled_steps"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not part of `make check`")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW or item.originalname in SLOW_TESTS:
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def auto_is_float32():
    """Make --dtype=auto mean float32 in every test, whatever the CPU; test_bfloat16.py asks for bfloat16 by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False, raising=False)
        yield


@pytest.fixture(scope="session")
def golden():
    """Folder of foreign checkpoints with the outputs of their original code. Skips if GOLDEN_DIR is not set."""
    if not os.environ.get("GOLDEN_DIR"):
        pytest.skip("GOLDEN_DIR is not set: no foreign checkpoints to compare with")
    return Path(os.environ["GOLDEN_DIR"])


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer. Skips if its vocabulary is neither cached nor downloadable."""
    from cli import UserError
    from data.tokenizer import GPT2Tokenizer
    try:
        return GPT2Tokenizer()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def call(monkeypatch, capfd):
    """Function that runs `python SCRIPT ARGUMENTS` in this process and returns a Result."""
    from commands import Result
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def call(script, *arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(code, *capfd.readouterr())
    return call


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data set `tiny` of 27 symbols, made by the real script in a real process."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 200)
    subprocess.run([sys.executable, ROOT / "data/prepare_textfile.py", folder / "text.txt", "--name", "tiny",
                    "--alphabet", "text8", "--data_dir", folder], check=True)
    return folder


TRAINED = ["--max_steps=60", "--eval_interval=30", "--log_interval=10", "--lr=0.01", "--time_sampling=exact_k",
           "--weighting=simple", "--shift_tokens", "--ema_decay=0.9", "--sample_interval=60"]


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The folder of a short run on `tiny`, trained by a real process."""
    from commands import arguments
    out = tmp_path_factory.mktemp("run") / "out"
    subprocess.run([sys.executable, *arguments("mdlm_text8", data_dir, out, *TRAINED)], check=True)
    return out


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Function: kind -> (folder, model, tokenizer) of a tiny model of transformers, saved once."""
    pytest.importorskip("transformers")
    from hub_models import make

    @functools.cache
    def get(kind):
        folder = tmp_path_factory.mktemp(kind) / kind
        model, tokenizer = make(kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model, tokenizer
    return get
