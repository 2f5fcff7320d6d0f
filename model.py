"""
The transformer, written out by hand: Llama, Qwen2 and Qwen3 decoders in one page.

The three families are one architecture with three switches: Qwen2 adds a bias to q, k and v;
Qwen3 drops it and normalises q and k per head; Llama has neither (and may scale its RoPE).
Every parameter carries its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), so a
checkpoint is loaded and saved without a table of renamings.

Shapes: B sequences, T tokens, V vocabulary, C hidden size, H query heads, K key/value heads,
D head size.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

# cuDNN's attention gives NaN gradients under a mask at some lengths (pytorch issue 196678) and plans anew for
# every shape; without it a GPU takes the flash or the memory-efficient kernel.
torch.backends.cuda.enable_cudnn_sdp(False)


class UserError(Exception):
    """A mistake that the user can mend. Its text is one sentence that names the thing and the
    mend; the command line prints it without a traceback and exits with status 2."""


def read_json(path):
    """The JSON object in file `path`. Raises UserError if it is missing or is no JSON object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


# ----------------------------------------------------------------------------------------------
# Configuration: Hugging Face's config.json, in the forms of transformers 4 and 5


@dataclass
class Config:
    """What config.json says, as far as the forward pass needs it. `hf` keeps the whole file, so
    that what we do not read (token ids, architecture) is written back as it was."""

    model_type: str  # "llama", "qwen2" or "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: dict  # {"rope_type": "default" | "llama3", "rope_theta": float, ...}
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hf: dict = field(repr=False)

    @classmethod
    def from_hf(cls, hf):
        """Reads a config.json dictionary. Raises UserError, naming the field, for anything that
        this file would compute wrongly: another model_type, RoPE type or activation, a sliding
        window in use, a missing or senseless size.

        Defaults for absent fields are those of transformers' LlamaConfig, Qwen2Config and
        Qwen3Config."""
        kind = hf.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(f"model_type {kind!r} is not supported: use a llama, qwen2 or qwen3 model")

        def size(name, default=None, most=2**20):
            value = hf.get(name)
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= most:
                raise UserError(f"config.json: {name} should be an integer from 1 to {most}, not {value!r}")
            return value

        def flag(name):
            value = hf.get(name)
            if not isinstance(value, bool | None):
                raise UserError(f"config.json: {name} should be true or false, not {value!r}")
            return bool(value)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        config = cls(
            model_type=kind,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers", most=1000),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads if kind == "llama" or "num_key_value_heads" in hf else 32),
            head_dim=size("head_dim", 128 if kind == "qwen3" else max(1, hidden // heads)),
            rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=size("max_position_embeddings", 2048 if kind == "llama" else 32768, most=2**31 - 1),
            tie_word_embeddings=flag("tie_word_embeddings"),
            rope=read_rope(hf),
            qkv_bias=kind == "qwen2" or flag("attention_bias"),
            o_bias=kind != "qwen2" and flag("attention_bias"),
            mlp_bias=kind == "llama" and flag("mlp_bias"),
            qk_norm=kind == "qwen3",
            hf=hf,
        )
        if heads % config.num_key_value_heads:
            raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of "
                            f"num_key_value_heads {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise UserError(f"config.json: head_dim {config.head_dim} is odd; RoPE needs an even one")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported: only silu is")
        if hf.get("use_sliding_window"):
            raise UserError("config.json: this model uses sliding-window attention, which is not supported")
        types = hf.get("layer_types")
        if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
            raise UserError(f"config.json: layer_types {types!r} is not supported: only full_attention is")
        return config

    def to_hf(self, dtype):
        """config.json for a model whose weights have torch type `dtype`. RoPE and the type are
        written in both forms: transformers 5 reads `rope_parameters` and `dtype`, transformers 4
        (and engines built on it) `rope_theta`, `rope_scaling` and `torch_dtype`, and would
        silently take theta 10000 without them."""
        name = str(dtype).removeprefix("torch.")
        theta = self.rope["rope_theta"]
        scaling = {k: v for k, v in self.rope.items() if k != "rope_theta"}
        return {
            **self.hf,
            "head_dim": self.head_dim,
            "rope_parameters": self.rope,
            "rope_theta": theta,
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            "dtype": name,
            "torch_dtype": name,
        }


def number(fields, name, default=None):
    """The positive number fields[name], or `default` if it is absent or null. Raises UserError."""
    value = default if fields.get(name) is None else fields[name]
    if type(value) not in (int, float) or not 0 < value < 1e12:  # not NaN either
        raise UserError(f"config.json: {name} should be a positive number, not {value!r}")
    return float(value)


def read_rope(hf):
    """RoPE's settings from config.json: `rope_parameters` (transformers 5), or `rope_theta` and
    `rope_scaling` (transformers 4). Raises UserError for a type that we do not compute."""
    for name in ("rope_parameters", "rope_scaling"):
        value = hf.get(name)
        if not isinstance(value, dict | None) or any(isinstance(v, dict) for v in (value or {}).values()):
            raise UserError(f"config.json: {name} should be one object of numbers, not {value!r}")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_theta"] = number(rope, "rope_theta", number(hf, "rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.pop("type", None)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"config.json: RoPE type {rope['rope_type']!r} is not supported: "
                        "only default and llama3 are")
    if number(rope, "partial_rotary_factor", number(hf, "partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    if rope["rope_type"] == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            number(rope, name)
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise UserError("config.json: RoPE's low_freq_factor should be below its high_freq_factor")
    return rope


def rope_frequencies(config):
    """Radians a position for each pair of channels, float32 (D/2,).

    Source: RoFormer (arXiv 2104.09864, section 3.2); the llama3 branch, which slows the long
    wavelengths by `factor` and blends in between, is the one of the Llama 3.1 model card."""
    rope, d = config.rope, config.head_dim
    frequency = 1 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, kept; 0: a long one
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


# ----------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever x is (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def rotate(x, cos, sin):
    """RoPE in Hugging Face's layout: channel i is paired with channel i + D/2. x: (B, heads, T, D);
    the first half of sin has its sign changed."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)  # all that this row has seen so far
        if T == 1 and mask is not None:  # heads that share a key/value head go in as its H/K queries: nothing is repeated
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v, attn_mask=mask)
            y = y.reshape(B, -1, T, self.head_dim)
        else:
            shared = q.shape[1] // k.shape[1]
            k, v = (k, v) if shared == 1 else (k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`Transformer(config)` has PyTorch's default random weights; `Transformer.from_pretrained(path)`
    a checkpoint's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers)),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
        ))
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.frequencies = rope_frequencies(c)  # no buffer: a cast to bfloat16 must not reach it
        self.divided = None  # the type it is computed in, where processes divide the float32 weights among them
        self.checkpointing = False  # keep only the layers' inputs for the backward pass: a third more work, far less memory

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.divided or self.model.embed_tokens.weight.dtype

    def hidden(self, tokens, positions=None, cache=None):
        """The last hidden states, normalised. tokens: (B, T) int64 -> (B, T, C).

        Without `cache` each row is a whole sequence, padded on the right if need be: attention
        is causal, so padding changes nothing before it. With `cache` the rows go on from what it
        holds, at `positions` (B, T)."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        self.frequencies = self.frequencies.to(tokens.device)
        angles = (positions[..., None] * self.frequencies)[:, None]  # (B, 1, T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (B, 1, T, D)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        return self.model.norm(x)

    def head(self, hidden):
        """Logits of hidden states: (..., C) -> (..., V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def forward(self, tokens, positions=None, cache=None):
        """tokens: (B, T) int64 -> logits (B, T, V). See `hidden` for `positions` and `cache`."""
        return self.head(self.hidden(tokens, positions, cache))

    # ------------------------------------------------------------------------------------------
    # Hugging Face directories

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", divide=lambda model: None):
        """Reads a Hugging Face directory: config.json, and model.safetensors or the shards that
        model.safetensors.index.json lists. The model is built on the meta device and the file's
        tensors put in place one by one, so that memory holds the weights once. Where `divide`(model)
        divides the parameters among processes (DTensor), each keeps its part of a tensor at once.

        Raises UserError if a file is missing or damaged, or if a tensor is missing, extra,
        misshapen or not of a floating-point type: the message names it."""
        path = Path(path)
        with torch.device("meta"):
            model = cls(Config.from_hf(read_json(path / "config.json")))
        divide(model)
        expected = model.state_dict()
        tensors = {}
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt", device=str(device)) as weights:
                    for name in weights.keys():
                        # Some tied checkpoints carry the embedding a second time as lm_head.
                        if name == "lm_head.weight" and model.config.tie_word_embeddings:
                            continue
                        if name.endswith(".rotary_emb.inv_freq"):  # Llama 2's hold what we compute
                            continue
                        shape = tuple(weights.get_slice(name).get_shape())
                        if name not in expected:
                            raise UserError(f"{file} has a tensor {name} that this model has no place for")
                        if shape != tuple(expected[name].shape):
                            raise UserError(f"{file}: {name} has shape {shape}, but config.json "
                                            f"asks for {tuple(expected[name].shape)}")
                        tensor = weights.get_tensor(name)
                        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                            raise UserError(f"{file}: {name} has type {tensor.dtype}; quantised "
                                            "checkpoints are not supported")
                        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
                            raise UserError(f"{file}: {name} has values that are not finite numbers: the checkpoint is damaged")
                        tensors[name] = part_of(tensor.to(dtype), expected[name])
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {file}: {error}") from None
        if missing := sorted(expected.keys() - tensors.keys()):
            raise UserError(f"{path} lacks the tensor {missing[0]}" +
                            (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.requires_grad_(True)

    def save_pretrained(self, path):
        """Writes config.json and the weights (shards above 5 GB) into directory `path`, which
        transformers 4 and 5 and the engines built on them load as it is."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(self.state_dict(), path, metadata={"format": "pt"})
        config = json.dumps(self.config.to_hf(self.dtype), indent=2)
        (path / "config.json").write_text(config + "\n", encoding="utf-8")


def part_of(tensor, like):
    """`tensor`, or this process's part of it if `like` is divided among processes."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # each has read all of it


def weight_files(path):
    """The safetensors files of a Hugging Face directory. Raises UserError if there are none."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return [path / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and f.isprintable() and f == Path(f).name for f in weight_map.values()):
        raise UserError(f"{index} has no usable weight_map: download it again")
    return [path / name for name in sorted(set(weight_map.values()))]
