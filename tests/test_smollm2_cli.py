"""The whole of bcr.py on a real chat model and real word problems: two training steps, an evaluation
and --solve, on a CPU. Slow, and run all the same."""

import json

import pytest
from safetensors.torch import load_file

from conftest import REPO
from test_cli import bcr, metrics_of

GSM8K = REPO.parent / "shared/benchmarks/gsm8k_train.jsonl"
# Word problems of our own, where the benchmark is not at hand.
OURS = [{"problem": f"Mia has {a} apples and buys {b} more. How many apples does she have?", "answer": str(a + b)}
        for a in range(3, 8) for b in range(2, 5)]
# The model rarely gets such problems right in a few tokens, so its rewards would all be 0 and nothing would be learned:
# this reward differs between samples.
REWARD = '''
def score(completion, golds):
    return [min(1.0, sum(map(str.isdigit, completion)) / 20)] * len(golds)
'''


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = GSM8K.read_text().splitlines()[:15] if GSM8K.exists() else [json.dumps(p) for p in OURS]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_two_training_steps_of_a_real_chat_model(smollm2, problems, tmp_path):
    """--model with a checkpoint that is not ours: prompts, end tokens, gradients or the saved model fail."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "mine.py").write_text(REWARD)
    done = bcr("--model", smollm2, "--data", problems, "--eval-data", problems, "--reward", tmp_path / "mine.py", "--n", 2,
               "--budget", 48, "--steps", 2, "--groups", 2, "--samples", 2, "--lr", "1e-5", "--eval-n", 2, "--eval-problems", 4,
               "--eval-budget", 32, "--save-every", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path / "out")
    assert len(metrics) == 2 and all(0 < m["reward"] < 1 and m["grad_norm"] > 0 and m["logprob_gap_max"] < 1e-3 for m in metrics)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["before"]["problems"]["2"]["problems"] == results["after"]["problems"]["2"]["problems"] == 4
    before, after = (load_file(directory / "model.safetensors") for directory in (smollm2, tmp_path / "out/model"))
    assert before.keys() == after.keys() and any((before[name].float() - after[name].float()).abs().max() > 1e-6 for name in before)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.tie_word_embeddings and transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model").chat_template


@pytest.mark.slow
def test_solving_with_a_real_chat_model(smollm2, problems, tmp_path):
    """--solve that loses problems of a model that does not follow the format: they go round again, alone, and are marked."""
    (tmp_path / "three.jsonl").write_text("\n".join(problems.read_text().splitlines()[:3]))
    done = bcr("--model", smollm2, "--solve", tmp_path / "three.jsonl", "--n", 2, "--budget", 40, "--temperature", 0, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(entries) == 3 and all(e["completion"] and e["tokens"] > 0 for e in entries)
    assert all((e["answer"] is None) <= (e["rounds"] == 2 and e["n"] == 1) for e in entries)
