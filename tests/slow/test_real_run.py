"""bcr.py and evaluate.py --solve with a real chat model and real word problems, on a CPU."""

import json

import pytest
from safetensors.torch import load_file

import bcr
import evaluate
from conftest import REPO, lines_of, metrics_of, status_of
from data.files import write_lines
from data.problems import load_problems

GSM8K = REPO.parent / "shared/benchmarks/gsm8k_train.jsonl"
# Our own word problems, where the benchmark is not available.
OURS = [{"problem": f"Mia has {a} apples and buys {b} more. How many apples has she?",
         "answer": str(a + b)} for a in range(3, 8) for b in range(2, 5)]
# The model rarely solves such problems within a few tokens. This reward differs between samples.
REWARD = """
def score(completion, golds):
    return [min(1.0, sum(map(str.isdigit, completion)) / 20)] * len(golds)
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_lines(path, load_problems(GSM8K)[:15] if GSM8K.exists() else OURS)
    return path


def test_two_training_steps_of_a_real_chat_model(smollm2, problems, tmp_path):
    """--model with another checkpoint than the shipped one: prompts, end tokens, gradients or the
    saved model fail."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "mine.py").write_text(REWARD)
    out = tmp_path / "out"
    assert status_of(
        bcr.main, "--model", smollm2, "--data", problems, "--eval-data", problems,
        "--reward", tmp_path / "mine.py", "--n", 2, "--budget", 48, "--steps", 2, "--groups", 2,
        "--samples", 2, "--lr", "1e-5", "--eval-n", 2, "--eval-problems", 2, "--eval-budget", 48,
        "--save-every", 5, "--out", out) == 0
    metrics = metrics_of(out)
    results = json.loads((out / "results.json").read_text())
    assert len(metrics) == 2
    for step in metrics:
        assert 0 < step["reward"] < 1 and step["grad_norm"] > 0 and step["logprob_gap_max"] < 1e-3
    assert all(results[stage]["problems"]["2"]["problems"] == 2 for stage in ("before", "after"))
    before, after = (load_file(path / "model.safetensors") for path in (smollm2, out / "model"))
    assert before.keys() == after.keys()
    assert any((before[name].float() - after[name].float()).abs().max() > 1e-6 for name in before)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.tie_word_embeddings
    assert transformers.AutoTokenizer.from_pretrained(out / "model").chat_template


def test_solving_with_a_real_chat_model(smollm2, problems, tmp_path):
    """--solve loses problems of a model that does not follow the format: they are asked again,
    alone, and marked."""
    write_lines(tmp_path / "three.jsonl", lines_of(problems)[:3])
    assert status_of(evaluate.main, "--model", smollm2, "--solve", tmp_path / "three.jsonl",
                     "--n", 2, "--budget", 40, "--temperature", 0, "--out", tmp_path / "out") == 0
    entries = lines_of(tmp_path / "out/answers.jsonl")
    assert len(entries) == 3 and all(e["completion"] and e["tokens"] > 0 for e in entries)
    assert all((e["answer"] is None) <= (e["rounds"] == 2 and e["n"] == 1) for e in entries)
