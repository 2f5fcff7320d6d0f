"""
The transformer, written by hand: Llama, Qwen2 and Qwen3 decoders.

The three families share one architecture with three switches: Qwen2 adds a bias to q, k and v; Qwen3 drops
it and normalizes q and k per head; Llama has neither (and may scale its RoPE). Parameters have their Hugging
Face names, except that q_proj, k_proj and v_proj are one parameter here, and so are gate_proj and up_proj:
one large product is faster than several small ones. Loading joins them, and saving splits them.

The file reads from the blocks to the whole: layers, Transformer, loading and saving, config.json.

Shapes: B sequences, T tokens, V vocabulary, C hidden size, H query heads, K key/value heads, D head size.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.files import UserError, read_json, write_json

# cuDNN attention returns NaN gradients at some lengths (pytorch issue 196678) and plans for each shape again.
# Without it a GPU uses the flash or the memory-efficient kernel.
torch.backends.cuda.enable_cudnn_sdp(False)

# ----------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 for any type of x (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_normalize(x, self.eps) * self.weight


def rms_normalize(x, eps):
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotate(x, rotation):
    """RoPE in Hugging Face's layout: channel i is paired with channel i + D/2. x: (B, heads, T, D);
    rotation: cosines and sines (2, B, 1, T, D), where the sign of the first half of the sines is flipped."""
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, c.head_dim, c.rms_norm_eps
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.qkv_proj = nn.Linear(c.hidden_size, sum(c.part_sizes()["qkv_proj"]), bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x, rotation, cache):
        B, T, _ = x.shape
        H, K, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv_proj(x).view(B, T, -1, D).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = qkv.split((H + K, K), dim=1)
        if self.q_norm is not None:
            weight = torch.cat((self.q_norm.weight.expand(H, 1, D), self.k_norm.weight.expand(K, 1, D)))
            qk = rms_normalize(qk, self.eps) * weight
        q, k = rotate(qk, rotation).split((H, K), dim=1)  # (B, H, T, D), (B, K, T, D)
        # A cache decides what the queries attend to: see rollout.py.
        y = causal_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v over the past of each token. q: (B, H, T, D); k, v: (B, K, T, D)."""
    shared = q.shape[1] // k.shape[1]  # query heads for each key/value head
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotation, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`Transformer(config)` has PyTorch's default random weights; `Transformer.from_pretrained(path)` loads a
    checkpoint."""

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
        self.frequencies = rope_frequencies(c)  # not a buffer: stays float32 when the model is cast
        self.checkpointing = False  # keep only each layer's input for the backward pass

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def rotations(self, positions):
        """RoPE's cosines and sines. positions: (..., T) -> (2, ..., T, D)."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None] * self.frequencies  # (..., T, D/2)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))

    def hidden(self, tokens, rotation=None, cache=None):
        """Normalized last hidden states. tokens: (B, T) int64 -> (B, T, C).

        Without `cache` each row is a whole sequence, padded on the right if necessary: attention is causal,
        so the padding changes nothing before it. With `cache` each row continues what the cache holds.
        rotation: `rotations` of the tokens' positions, (2, B, T, D); the default is positions 0 .. T-1."""
        if rotation is None:
            rotation = self.rotations(torch.arange(tokens.shape[1], device=tokens.device)[None])
        rotation = rotation[:, :, None]  # (2, B or 1, 1, T, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, cache, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        return self.model.norm(x)

    def head(self, hidden):
        """Logits of hidden states: (..., C) -> (..., V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def forward(self, tokens, positions=None):
        """tokens: (B, T) int64 -> logits (B, T, V). positions: (B, T), by default 0 .. T-1 in each row."""
        return self.head(self.hidden(tokens, None if positions is None else self.rotations(positions)))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Loads a Hugging Face directory: config.json and model.safetensors, or the shards listed in
        model.safetensors.index.json. Memory holds the weights once. Raises UserError, naming the file, field
        or tensor (see `read_weights` and `Config.from_hf`)."""
        model = cls.empty(path)
        weights = join_parts(read_weights(path, model, device))
        state = {name: tensor.to(dtype) for name, tensor in weights}
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(True)

    @classmethod
    def empty(cls, path):
        """A model of the shapes in `path`/config.json, without storage (on the meta device)."""
        with torch.device("meta"):
            return cls(Config.from_hf(read_json(Path(path) / "config.json")))

    def save_pretrained(self, path):
        """Writes config.json and the weights (in shards above 5 GB) into directory `path`. transformers 4 and
        5 and the engines built on them load it as it is."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(split_parts(self), path, metadata={"format": "pt"})
        write_json(path / "config.json", self.config.to_hf(self.dtype))


def rope_frequencies(config):
    """Radians per position for each pair of channels, float32 (D/2,).

    Source: RoFormer (arXiv 2104.09864, section 3.2). The llama3 branch divides the frequency of long
    wavelengths by `factor` and blends in between, as in the Llama 3.1 model card."""
    rope, d = config.rope, config.head_dim
    frequency = 1 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, kept; 0: long, scaled
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


# ----------------------------------------------------------------------------------------------
# Weights of a Hugging Face directory

# Parameters of the model that are several tensors in files.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def whole_and_parts(name):
    """The name of a parameter of the model, and its names in files, from any of them."""
    for whole, parts in PARTS.items():
        for word in (whole, *parts):
            if f".{word}." in name:
                return name.replace(word, whole), [name.replace(word, part) for part in parts]
    return name, [name]


def join_parts(tensors):
    """(name, tensor) pairs with names in files -> pairs with names of the model's parameters."""
    found = {}
    for name, tensor in tensors:
        whole, parts = whole_and_parts(name)
        found[name] = tensor
        if all(part in found for part in parts):
            joined = [found.pop(part) for part in parts]
            yield whole, torch.cat(joined) if len(joined) > 1 else tensor


def split_parts(model):
    """The parameters of a model by their names in files."""
    state, sizes = {}, model.config.part_sizes()
    for name, tensor in model.state_dict().items():
        parts = whole_and_parts(name)[1]
        if len(parts) > 1:  # copies: safetensors does not save views of one tensor
            tensor = [part.clone() for part in tensor.split(sizes[name.split(".")[-2]])]
        state |= zip(parts, tensor if len(parts) > 1 else [tensor])
    return state


def read_weights(path, model, device="cpu"):
    """Yields (name, tensor) for each tensor of the safetensors files of directory `path`: together they are
    the parameters of `model`.

    Raises UserError if a file is missing or damaged, or if a tensor is missing, unexpected, of the wrong
    shape, not of a floating-point type or not finite. The message names it."""
    expected, found = {name: tuple(p.shape) for name, p in split_parts(model).items()}, set()
    for file in weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt", device=str(device)) as weights:
                for name in weights.keys():
                    # Some tied checkpoints repeat the embedding as lm_head; Llama 2 has RoPE frequencies.
                    repeated = name == "lm_head.weight" and model.config.tie_word_embeddings
                    if repeated or name.endswith(".rotary_emb.inv_freq"):
                        continue
                    if name not in expected:
                        raise UserError(f"{file} has a tensor {name}, which this model does not have")
                    shape = tuple(weights.get_slice(name).get_shape())
                    if shape != expected[name]:
                        raise UserError(
                            f"{file}: {name} has shape {shape}, but config.json asks for {expected[name]}")
                    tensor = weights.get_tensor(name)
                    check_tensor(file, name, tensor)
                    found.add(name)
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    if missing := sorted(expected.keys() - found):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path} lacks the tensor {missing[0]}{more}")


def check_tensor(file, name, tensor):
    """Raises UserError for a tensor that is quantized or has values that are not finite."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"{file}: {name} has type {tensor.dtype}: quantized checkpoints are not supported")
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise UserError(f"{file}: {name} has values that are not finite: the checkpoint is damaged")


def weight_files(path):
    """The safetensors files of a Hugging Face directory. Raises UserError for an unusable index."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return [path / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
        raise UserError(f"{index} has no usable weight_map: download it again")
    return [path / name for name in sorted(set(weight_map.values()))]


def is_file_name(value):
    """Whether a value is the name of a file in the same directory."""
    return isinstance(value, str) and value.isprintable() and value == Path(value).name


# ----------------------------------------------------------------------------------------------
# config.json, in the forms of transformers 4 and 5


@dataclass
class Config:
    """The fields of config.json that the forward pass needs. `hf` keeps the whole file, so that fields not
    used here (token ids, architectures) are written back unchanged."""

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
        """Reads a config.json dictionary. Raises UserError, naming the field, for anything that this file
        would compute incorrectly: another model_type, RoPE type or activation, a sliding window in use, a
        missing or invalid size. Defaults for absent fields are those of transformers."""
        kind = hf.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(f"model_type {kind!r} is not supported: use a llama, qwen2 or qwen3 model")
        refuse_unsupported(hf)
        heads, hidden = read_size(hf, "num_attention_heads"), read_size(hf, "hidden_size")
        kv_heads = heads if kind == "llama" or "num_key_value_heads" in hf else 32
        config = cls(
            model_type=kind,
            vocab_size=read_size(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=read_size(hf, "intermediate_size"),
            num_hidden_layers=read_size(hf, "num_hidden_layers", most=1000),
            num_attention_heads=heads,
            num_key_value_heads=read_size(hf, "num_key_value_heads", kv_heads),
            head_dim=read_size(hf, "head_dim", 128 if kind == "qwen3" else max(1, hidden // heads)),
            rms_norm_eps=read_number(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=read_size(
                hf, "max_position_embeddings", 2048 if kind == "llama" else 32768, most=2**31 - 1),
            tie_word_embeddings=read_flag(hf, "tie_word_embeddings"),
            rope=read_rope(hf),
            qkv_bias=kind == "qwen2" or read_flag(hf, "attention_bias"),
            o_bias=kind != "qwen2" and read_flag(hf, "attention_bias"),
            mlp_bias=kind == "llama" and read_flag(hf, "mlp_bias"),
            qk_norm=kind == "qwen3",
            hf=hf,
        )
        if heads % config.num_key_value_heads:
            raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of "
                            f"num_key_value_heads {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise UserError(f"config.json: head_dim {config.head_dim} is odd; RoPE needs an even one")
        return config

    def part_sizes(self):
        """The outputs of the projections that are one parameter (see PARTS)."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {"qkv_proj": (queries, keys, keys), "gate_up_proj": (self.intermediate_size,) * 2}

    def to_hf(self, dtype):
        """config.json for a model whose weights have torch type `dtype`. RoPE and the type are written in
        both forms: transformers 5 reads `rope_parameters` and `dtype`; transformers 4 and engines built on it
        read `rope_theta`, `rope_scaling` and `torch_dtype`, and use theta 10000 if they are absent."""
        name = str(dtype).removeprefix("torch.")
        scaling = {k: v for k, v in self.rope.items() if k != "rope_theta"}
        return {
            **self.hf,
            "head_dim": self.head_dim,
            "rope_parameters": self.rope,
            "rope_theta": self.rope["rope_theta"],
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            "dtype": name,
            "torch_dtype": name,
        }


def refuse_unsupported(hf):
    """Raises UserError for a model that needs more than this file computes."""
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported: only silu is")
    if hf.get("use_sliding_window"):
        raise UserError("config.json: this model uses sliding-window attention, which is not supported")
    types = hf.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise UserError(f"config.json: layer_types {types!r} is not supported: only full_attention is")


def read_size(hf, name, default=None, most=2**20):
    value = default if hf.get(name) is None else hf[name]
    if type(value) is not int or not 0 < value <= most:
        raise UserError(f"config.json: {name} should be an integer from 1 to {most}, not {value!r}")
    return value


def read_flag(hf, name):
    value = hf.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"config.json: {name} should be true or false, not {value!r}")
    return bool(value)


def read_number(fields, name, default=None):
    value = default if fields.get(name) is None else fields[name]
    if type(value) not in (int, float) or not 0 < value < 1e12:  # the comparison is false for NaN
        raise UserError(f"config.json: {name} should be a positive number, not {value!r}")
    return float(value)


def read_rope(hf):
    """RoPE's settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers
    4). Raises UserError for a type that is not supported."""
    for name in ("rope_parameters", "rope_scaling"):
        value = hf.get(name)
        if not isinstance(value, dict | None) or any(isinstance(v, dict) for v in (value or {}).values()):
            raise UserError(f"config.json: {name} should be one object of numbers, not {value!r}")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_theta"] = read_number(rope, "rope_theta", read_number(hf, "rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.pop("type", None)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"config.json: RoPE type {rope['rope_type']!r} is not supported: "
                        "only default and llama3 are")
    if read_number(rope, "partial_rotary_factor", read_number(hf, "partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    if rope["rope_type"] == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            read_number(rope, name)
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise UserError("config.json: RoPE's low_freq_factor should be below its high_freq_factor")
    return rope
