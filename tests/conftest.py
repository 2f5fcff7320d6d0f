"""What several test files share: the repo on the path, the shipped model, small random models."""

import os
import sys
from pathlib import Path

# Tests run side by side: more threads than one for each would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from bcr import load_chat  # noqa: E402
from model import Config, Transformer  # noqa: E402
from smollm2 import Unreachable, smollm2_directory  # noqa: E402

TINY = REPO / "data" / "tiny"


# The files that take longest begin first, so that no process is left alone with one of them at the end.
LONGEST = ["test_ranks.py", "test_robust.py", "test_study.py", "test_cli.py", "test_evaluation.py", "test_smollm2_cli.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes seconds, runs all the same; leave it out with -m "not slow"')
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def random_model(kind="qwen3", seed=0, **changes):
    """A small model with wide random weights, so that its distribution is far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(model_type=kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
    model = Transformer(Config.from_hf(sizes | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def shipped():
    """The shipped model and its tokenizer side."""
    return Transformer.from_pretrained(TINY / "model"), load_chat(TINY / "model")


@pytest.fixture(scope="session")
def smollm2():
    """Directory of a real chat model, SmolLM2-135M-Instruct. Tests do not write into it."""
    try:
        return smollm2_directory()
    except Unreachable as reason:
        pytest.skip(f"no real chat model: {reason}")
