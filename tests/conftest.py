import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden():
    """Folder of foreign checkpoints with the outputs of their original code, where there is one."""
    if not os.environ.get("GOLDEN_DIR"):
        pytest.skip("GOLDEN_DIR is not set: no foreign checkpoints to compare with")
    return Path(os.environ["GOLDEN_DIR"])


@pytest.fixture(scope="session")
def gpt2():
    """Skips where GPT-2's vocabulary is neither cached nor downloadable."""
    from cli import UserError
    from data.tokenizer import GPT2Tokenizer
    try:
        return GPT2Tokenizer()
    except UserError as error:
        pytest.skip(str(error))
