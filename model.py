"""
The transformer: Llama, Qwen2 and Qwen3 decoders, their weights and their config.json.

Qwen2 adds a bias to q, k and v; Qwen3 normalizes q and k per head; Llama does neither (and may
scale its RoPE). Parameters have their names in Hugging Face files. Shapes: B sequences, T tokens,
V vocabulary, C hidden size, H query heads, K key/value heads, D head size.
"""

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.files import UserError, read_json, write_json


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 for any type of x (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def rotate(x, rotation):
    """RoPE in Hugging Face's layout, where channel i is paired with channel i + D/2:
    x cos + rotate_half(x) sin. x: (B, heads, T, D); rotation: see `Transformer.rotations`."""
    cos, sin = rotation  # the sign of rotate_half's first half is in the sines
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


# cuDNN's attention returns NaN gradients at some lengths (pytorch issue 196678) and plans for each
# shape again. Without it a GPU uses the flash or the memory-efficient kernel.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v over each token's past. q: (B, H, T, D); k, v: (B, K, T, D)."""
    group = q.shape[1] // k.shape[1]  # query heads that share a key/value head
    k = k.repeat_interleave(group, dim=1)  # (B, H, T, D)
    v = v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer  # its index
        self.head_dim = c.head_dim
        queries = c.num_attention_heads * c.head_dim
        keys = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rotation, attention):
        q = self.q_norm(self.q_proj(x).unflatten(2, (-1, self.head_dim)))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(2, (-1, self.head_dim)))  # (B, T, K, D)
        v = self.v_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        q = rotate(q.transpose(1, 2), rotation)  # (B, H, T, D)
        k = rotate(k.transpose(1, 2), rotation)  # (B, K, T, D)
        if attention is None:
            y = causal_attention(q, k, v)
        else:
            y = attention.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # y: (B, H, T, D)


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

    def forward(self, x, rotation, attention):
        x = x + self.self_attn(self.input_layernorm(x), rotation, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`Transformer(config)` has random weights; `Transformer.from_pretrained(path)` loads them."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.Module()  # a level in the names of the parameters
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
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
        """RoPE's cosines and sines of positions: (..., T) -> (2, ..., T, D). The sign of the first
        half of the sines is flipped, as `rotate` needs it."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None] * self.frequencies  # (..., T, D/2)
        cos = angles.cos().to(self.dtype)
        sin = angles.sin().to(self.dtype)
        return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))

    def hidden(self, tokens, rotation=None, attention=None):
        """Normalized last hidden states. tokens: (B, T) int64 -> (B, T, C). rotation: `rotations`
        of the tokens' positions, (2, B, T, D); by default 0 .. T-1. attention decides what the
        queries attend to (see rollout.py); by default each row is a sequence of its own, and
        padding on the right changes nothing before it."""
        if rotation is None:
            rotation = self.rotations(torch.arange(tokens.shape[1], device=tokens.device)[None])
        rotation = rotation[:, :, None]  # (2, B or 1, 1, T, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, attention, use_reentrant=False)
            else:
                x = block(x, rotation, attention)
        return self.model.norm(x)

    def head(self, hidden):
        """Logits of hidden states: (..., C) -> (..., V)."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)

    def forward(self, tokens):
        """tokens: (B, T) int64 -> logits (B, T, V)."""
        return self.head(self.hidden(tokens))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Loads a Hugging Face directory. Raises UserError as `Config.from_hf`, `load_weights`."""
        def convert(tensor):
            return tensor.to(device, dtype, copy=True)  # not a view of the mapped file

        return load_weights(cls.empty(path), path, convert)

    @classmethod
    def empty(cls, path):
        """The model of directory `path` without storage (on the meta device)."""
        config = Config.from_hf(read_json(Path(path) / "config.json"))
        ends = dict(read_weights(path, ("model.embed_tokens.weight", "lm_head.weight")))
        if len(ends) == 2 and not torch.equal(*ends.values()):
            config.tie_word_embeddings = False  # whatever config.json says
        with torch.device("meta"):
            return cls(config)

    def save_pretrained(self, path):
        """Writes config.json and the weights (in shards above 5 GB), as transformers does."""
        Path(path).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(self.state_dict(), path, metadata={"format": "pt"})
        write_json(Path(path) / "config.json", self.config.to_hf(self.dtype))


def rope_frequencies(config):
    """Radians per position for each pair of channels, float32 (D/2,). Source: RoFormer (arXiv
    2104.09864, section 3.2). llama3, from the Llama 3.1 model card, divides the frequency of long
    wavelengths by `factor` and blends in between."""
    rope = config.rope
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequency = 1 / rope["rope_theta"] ** (channels / config.head_dim)
    if rope["rope_type"] == "llama3":
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength; 0: long, scaled
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


def load_weights(model, path, convert):
    """Loads directory `path` into a model on the meta device, and returns it. convert(tensor) gives
    a tensor of a file its type and device: memory holds the weights once, plus that tensor. Raises
    UserError as `read_weights`, and for other tensors than the parameters of `model`."""
    state = {}
    for name, tensor in read_weights(path):
        # Tied checkpoints may repeat the embedding as head; Llama 2's have RoPE frequencies.
        repeated = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not repeated and not name.endswith(".rotary_emb.inv_freq"):
            state[name] = convert(tensor)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        details = " ".join(str(error).split()[6:])[:300]  # without "Error(s) in loading ..."
        raise UserError(f"{path}: config.json and the weights do not fit: {details}") from None
    return model.requires_grad_(True)


def read_weights(path, only=None):
    """Yields the (name, tensor) pairs of directory `path`, on the CPU; with `only`, these names.
    Raises UserError for a file that is missing or damaged, and for a quantized tensor."""
    for file, names in weight_files(path).items():
        try:
            with safe_open(file, framework="pt") as weights:
                for name in names or weights.keys():
                    if only and name not in only:
                        continue
                    tensor = weights.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise UserError(f"{file}: quantized tensors ({name}) are not supported")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}") from None


def weight_files(path):
    """{file: names of the tensors to read from it}: model.safetensors (None: all that it holds), or
    the shards of model.safetensors.index.json. Of two copies the one in the index counts."""
    single = Path(path) / "model.safetensors"
    index = Path(path) / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return {single: None}
    files = {}
    for name, file in read_json(index)["weight_map"].items():
        files.setdefault(Path(path) / file, []).append(name)
    return files


@dataclasses.dataclass
class Config:
    """What the forward pass needs of config.json, in the form of transformers 4 or 5. `hf` keeps
    the whole file, whose other fields (token ids, architectures) are written back unchanged."""

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
    hf: dict

    @classmethod
    def from_hf(cls, hf):
        """Reads a config.json dictionary. Fields that are absent or null have transformers'
        defaults. Raises UserError for what this file would compute incorrectly: another
        model_type, activation or RoPE type, a sliding window in use, sizes that do not fit."""
        kind = hf.get("model_type")
        rope = read_rope(hf)
        layer_types = set(hf.get("layer_types") or ["full_attention"])
        windows = hf.get("use_sliding_window") or layer_types != {"full_attention"}
        for name, value, supported in (
                ("model_type", kind, ("llama", "qwen2", "qwen3")),
                ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
                ("attention", "sliding-window" if windows else "full", ("full",)),
                ("RoPE type", rope["rope_type"], ("default", "llama3"))):
            if value not in supported:
                raise UserError(f"config.json: {name} {value!r} is not supported: use a model with "
                                f"{name} {' or '.join(supported)}")
        heads = hf["num_attention_heads"]
        c = {
            "num_key_value_heads": heads,
            "head_dim": 128 if kind == "qwen3" else hf["hidden_size"] // heads,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 2048 if kind == "llama" else 32768,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
        c |= {name: value for name, value in hf.items() if value is not None}
        if heads % c["num_key_value_heads"] or c["head_dim"] % 2:
            raise UserError("config.json: num_attention_heads should be a multiple of "
                            "num_key_value_heads, and head_dim should be even")
        c["qkv_bias"] = kind == "qwen2" or c["attention_bias"]
        c["o_bias"] = kind != "qwen2" and c["attention_bias"]
        c["mlp_bias"] = kind == "llama" and c["mlp_bias"]
        c |= {"rope": rope, "qk_norm": kind == "qwen3", "hf": hf}
        return cls(**{field.name: c[field.name] for field in dataclasses.fields(cls)})

    def to_hf(self, dtype):
        """config.json for weights of torch type `dtype`. RoPE and the type are written in both
        forms: transformers 4, and engines built on it, take theta 10000 if theirs are absent."""
        name = str(dtype).removeprefix("torch.")
        scaling = dict(self.rope)
        theta = scaling.pop("rope_theta")
        if scaling["rope_type"] == "default":
            scaling = None
        sizes = {"head_dim": self.head_dim, "tie_word_embeddings": self.tie_word_embeddings}
        v5 = {"rope_parameters": self.rope, "dtype": name}
        v4 = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": name}
        return self.hf | sizes | v5 | v4


def read_rope(hf):
    """RoPE's settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`
    (transformers 4, where the oldest files say `type` for `rope_type`)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    rope["rope_theta"] = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    return rope
