"""Runs that are killed, stopped, out of space or out of numbers, and input that is damaged: a run
goes on as if nothing had happened, and a user's mistake is one sentence."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import bcr as bcr_module
from conftest import REPO, TINY
from test_cli import bcr, metrics_of

QUICK = ["--steps", "4", "--groups", "2", "--samples", "3", "--eval-n", "2", "--eval-problems", "8", "--rows", "8",
         "--save-every", "1", "--budget", "120"]


def start(*arguments, **kwargs):
    return subprocess.Popen([sys.executable, str(REPO / "bcr.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def outcome(out):
    """All that a run leaves, without its timings."""
    results = json.loads((out / "results.json").read_text())
    results.pop("seconds")
    results["settings"].pop("out"), results["settings"].pop("resume")
    files = [out / "model/model.safetensors", out / "completions-before.txt", out / "completions-after.txt", *sorted(out.glob("evaluation/*"))]
    return results, metrics_of(out), {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = bcr(*QUICK, "--out", out)
    assert done.returncode == 0, done.stderr
    return outcome(out)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(whole, tmp_path):
    """A kill -9 while sampling, training, evaluating or writing that loses a step, takes one twice or
    leaves half a file. BCR_KILLS=20 kills it 20 times."""
    out, rng = tmp_path / "out", random.Random(int(os.environ.get("BCR_KILLS", "0")))
    kills, most = 0, int(os.environ.get("BCR_KILLS", "4"))
    while True:
        resume = ["--resume"] if (out / "settings.json").exists() else []
        process = start(*QUICK, "--out", out, *resume)
        if kills < most:
            # Let it begin with something, then anything may be going on.
            process.stdout.readline()
            time.sleep(rng.random() * 2.5)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                process.communicate()
                continue
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        break
    assert kills > 0
    assert outcome(out) == whole
    assert len(list(out.glob("checkpoint-*"))) == 2 and not (out / "checkpoint.tmp").exists()


@pytest.mark.parametrize("number, line", [(signal.SIGTERM, "before training"), (signal.SIGINT, "step 1/"), (signal.SIGTERM, "step 2/")])
def test_a_stopped_run_saves_and_says_how_to_go_on(whole, tmp_path, number, line):
    """Preemption that loses up to --save-every steps, takes long, or ends in a traceback."""
    arguments = [*QUICK, "--out", tmp_path / "out"]
    arguments[arguments.index("--save-every") + 1] = "100"
    process = start(*arguments)
    while line not in process.stdout.readline():
        assert process.poll() is None
    clock = time.time()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and time.time() - clock < 10
    assert "--resume" in stderr and "Traceback" not in stderr
    if line.startswith("step"):
        assert (tmp_path / f"out/checkpoint-{metrics_of(tmp_path / 'out')[-1]['step']:06d}").is_dir()
    done = bcr(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    results, *rest = outcome(tmp_path / "out")
    results["settings"]["save_every"] = 1
    assert (results, *rest) == whole


def test_a_full_disk_is_one_sentence_and_damages_nothing(tmp_path):
    """A checkpoint that is half written and taken for a whole one; a traceback."""
    arguments = " ".join([sys.executable, str(REPO / "bcr.py"), *QUICK, "--out", str(tmp_path / "out")])
    done = subprocess.run(["bash", "-c", f"ulimit -f 3000; {arguments}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--resume" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    again = bcr(*QUICK, "--out", tmp_path / "out", "--resume")
    assert again.returncode == 0, again.stderr


def test_an_out_that_vanishes_is_one_sentence(tmp_path):
    process = start(*QUICK, "--out", tmp_path / "out")
    while "step 1/" not in process.stdout.readline():
        assert process.poll() is None
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in stderr and "No such file" in stderr


@pytest.mark.parametrize("cause", ["the loss", "what the model says"])
def test_numbers_that_are_not_finite_end_the_run_with_their_cause(tmp_path, cause):
    """NaN weights that are trained on and saved over the last good ones."""
    if "loss" in cause:  # advantages at the end of float32
        change = ["--n", "1", "--budget", "300", "--length-penalty", "1e38"]
    else:  # finite weights whose logits are not
        shutil.copytree(TINY / "model", tmp_path / "model")
        state = load_file(TINY / "model/model.safetensors")
        state["model.norm.weight"] *= 1e38
        save_file(state, tmp_path / "model/model.safetensors")
        change = ["--model", str(tmp_path / "model")]
    done = bcr(*QUICK, *change, "--out", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "three steps in a row were not finite" in done.stderr and f"{cause}" in done.stderr and "in step 1 (" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line)["skipped"] for line in lines)
    assert not any("NaN" in line or "Infinity" in line for line in lines)  # which is no JSON


def step(**changes):
    return {"truncated": 0.1, "accuracy": 0.5, "zero_variance": 0.2, "entropy": 0.5} | changes


def test_each_way_of_learning_nothing_is_named():
    """A run that learns nothing in silence; a warning for a run that is well."""
    warnings = bcr_module.warnings
    assert warnings([step()] * 12) == set()
    assert warnings([step(truncated=0.99)] * 10) == {bcr_module.CUT}
    assert warnings([step(zero_variance=0.95)] * 3) == {bcr_module.EQUAL}
    assert warnings([step(accuracy=0.0)] * 3) == {bcr_module.NOTHING}
    assert warnings([step(), step(entropy=0.04)]) == {bcr_module.COLLAPSE}


# ----------------------------------------------------------------------------------------------
# Damaged input


def damaged():
    """(name, function that damages a copy of the model directory or writes data.jsonl, more arguments)."""
    weights = (TINY / "model/model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little")
    config = json.loads((TINY / "model/config.json").read_text())
    tokenizer = (TINY / "model/tokenizer.json").read_text()

    def put(name, content):
        return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    cases = []
    for cut in (0, 1, 7, 8, 9, 100, header, header + 8, header + 9, len(weights) // 2, len(weights) - 1):
        cases.append((f"weights cut at {cut}", put("model.safetensors", weights[:cut])))
    for length in (0, 1, header - 1, header + 1, 2**31, 2**63 - 1, 2**64 - 1):
        cases.append((f"header of {length}", put("model.safetensors", length.to_bytes(8, "little") + weights[8:])))
    for old, new in ((b'"F32"', b'"I32"'), (b'"F32"', b'"F64"'), (b'"F32"', b'"XXX"'), (b'"data_offsets":[0,', b'"data_offsets":[9,'),
                     (b'"shape":[', b'"shape":[9'), (b"model.norm.weight", b"model.norm.weighs"), (b"embed_tokens", b"embed_t\x00kens")):
        cases.append((f"{old} as {new}", put("model.safetensors", weights.replace(old, new, 1))))
    for number in (float("nan"), float("inf")):
        def spoil(model, number=number):
            state = load_file(TINY / "model/model.safetensors")
            state["model.norm.weight"][3] = number
            save_file(state, model / "model.safetensors")
        cases.append((f"a weight that is {number}", spoil))
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
        for value in (0, -1, 10**15, "many", None, [], {}, 0.5, True):
            changed = config | {key: value}
            if key == "rope_theta":
                changed["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
            cases.append((f"{key} = {value}", put("config.json", json.dumps(changed))))
    for key, value in (("model_type", "mamba"), ("model_type", None), ("rope_parameters", {"rope_type": "yarn", "factor": 4}), ("hidden_act", "gelu"),
                       ("tie_word_embeddings", "no"), ("eos_token_id", "x"), ("eos_token_id", [10**9]), ("eos_token_id", [1.5]), ("eos_token_id", True), ("eos_token_id", {}), ("eos_token_id", [-3]),
                       ("bos_token_id", "x"), ("attention_bias", "yes"), ("dtype", 5), ("torch_dtype", "int4"), ("rope_scaling", "linear"),
                       ("rope_parameters", []), ("rope_parameters", {"rope_type": 5}), ("layer_types", ["mamba"] * 3), ("quantization_config", {"bits": 4}), ("architectures", 5), ("use_sliding_window", True)):
        cases.append((f"{key} = {value}", put("config.json", json.dumps(config | {key: value}))))
    for content in ("", "{", "[]", "null", "5", '"text"', "\x00", "\ud800", "[" * 100000, '{"a":' * 50000):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            cases.append((f"{name} = {content[:10]!r}", put(name, content)))
    for cut in (1, 100, len(tokenizer) // 2, len(tokenizer) - 3):
        cases.append((f"tokenizer cut at {cut}", put("tokenizer.json", tokenizer[:cut])))
    for template in ("{% for i in range(10**9) %}a{% endfor %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 10 ** 10 ** 10 }}",
                     "{{ 'a' * 10**11 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ messages.append(1) }}",
                     "{{ cycler.__init__.__globals__.os.system('false') }}", "{{ raise_exception('no') }}", "{% if %}", "{{ 1/0 }}", "{{ nothing.at.all }}",
                     "{% include '/etc/passwd' %}", "{{ messages[7].content }}", "\ud800", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"):
        cases.append((f"template {template[:30]!r}", put("chat_template.jinja", template)))
    for line in ('{"problem": "' + "a" * 2 * 10**6 + '", "answer": "1"}', "\x00", '{"problem": "\x00", "answer": "1"}', '{"problem": "\\ud800", "answer": "1"}',
                 '{"problem": "a", "answer": "\\udfff"}', '{"problem": ["a"], "answer": "1"}', '{"problem": "a", "answer": {}}', '{"problem": "a", "answer": NaN}x',
                 '{"problem": "a", "answer": "1", "difficulty": 1e999}', '{"problem": "a", "answer": "1", "difficulty": [1]}', '[' * 10**5, '"problem"', "-", "nan"):
        cases.append((f"data {line[:40]!r}", put("data.jsonl", line)))
    return cases


CASES = damaged()


def test_there_are_two_hundred():
    assert len(CASES) >= 200


@pytest.mark.parametrize("name, damage", CASES, ids=[name for name, _ in CASES])
def test_damaged_input_is_one_sentence_or_harmless(tmp_path, capsys, monkeypatch, name, damage):
    """A traceback, a hang or a file that is touched, at input that anybody may download."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(TINY / "model", model)
    (model / "data.jsonl").write_text("".join(json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(4)))
    damage(model)
    before = {path: path.read_bytes() for path in model.iterdir()}
    clock = time.time()
    try:
        bcr_module.main(["--model", str(model), "--data", str(model / "data.jsonl"), "--eval-data", str(model / "data.jsonl"), "--n", "1", "--steps", "0",
                         "--eval-n", "1", "--eval-problems", "1", "--eval-budget", "3", "--budget", "40", "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        assert stop.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
    else:
        assert not name.startswith(("a weight that is", "weights cut", "tokenizer cut")), "damage that must be refused"
    assert time.time() - clock < 20
    assert before == {path: path.read_bytes() for path in model.iterdir()}
