"""
Tests of model.py against transformers: the same random checkpoints, read by both, give the same logits, and
a checkpoint that would be computed incorrectly ends in one UserError that names the cause.

Every parameter of every model here is random, norm weights and biases included. A fresh transformers model
has unit norms and zero biases, so a loader that loses them would pass.
"""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

from conftest import TINY
from data.files import UserError
from model import Config, Transformer, split_parts

# ----------------------------------------------------------------------------------------------
# Random checkpoints, saved by transformers

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MHA = SIZES | dict(num_key_value_heads=4)
# With these the 8 frequencies of a 16-channel head fall into all three bands of llama3: kept (1 of them),
# blended (1) and divided (6).
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def theta(value):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


CASES = {  # name: (transformers class, its configuration)
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, **theta(500.0))),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, **theta(5000.0), tie_word_embeddings=True)),
    "llama-biases": (LlamaForCausalLM, LlamaConfig(**MHA, **theta(2e3), attention_bias=True, mlp_bias=True)),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, rms_norm_eps=0.01)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, **theta(1e6))),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**MHA, **theta(100.0), tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, **theta(1e6), head_dim=24)),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**MHA, **theta(300.0), head_dim=24, attention_bias=True,
                                                 tie_word_embeddings=True)),
}
TOKENS = torch.randint(96, (2, 300), generator=torch.Generator().manual_seed(1))


def randomize(model):
    """Random values in all parameters, far from the 0 and 1 of fresh biases and norms. Matrices are large
    enough that attention is not uniform and RoPE matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.5 * noise if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def theirs(path, tokens=TOKENS, dtype=torch.float32, **kwargs):
    """Logits by transformers of the checkpoint in `path`. No tensor of it is missing or unexpected."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model(tokens, **kwargs).logits


@torch.no_grad()
def ours(path, tokens=TOKENS, dtype=torch.float32, **kwargs):
    return Transformer.from_pretrained(path, dtype=dtype)(tokens, **kwargs)


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-4


def read_config(path):
    return json.loads((path / "config.json").read_text())


def change_config(path, **changes):
    """Sets fields of config.json; a field set to ... is removed."""
    config = read_config(path) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def make(path, name):
    """Writes the random checkpoint `name` into a directory, as transformers saves it."""
    model_class, config = CASES[name]
    torch.manual_seed(0)
    randomize(model_class(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(directory, transformers' logits of TOKENS) of each case. Tests do not write into it."""
    path = make(tmp_path_factory.mktemp("checkpoint"), request.param)
    return path, theirs(path)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of `checkpoint` to change, and the logits."""
    return shutil.copytree(checkpoint[0], tmp_path / "copy"), checkpoint[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of a good Llama directory, to be damaged."""
    return shutil.copytree(llama, tmp_path / "broken")


# ----------------------------------------------------------------------------------------------
# Logits


def test_logits_equal_transformers(checkpoint):
    """The forward pass differs from the one the checkpoint was trained with, or `positions` means something
    else than transformers' position_ids."""
    path, logits = checkpoint
    assert logits.std() > 0.5  # far from uniform, so that 1e-4 is a tight bound
    assert_close(ours(path), logits)
    positions = torch.stack([torch.arange(300) + 40, torch.arange(300) * 2])
    assert_close(ours(path, positions=positions), theirs(path, position_ids=positions))
    # RoPE matters in these models: doubled distances change the logits.
    assert (ours(path, positions=positions[1:]) - logits).abs().max() > 0.1


def test_right_padding_changes_nothing_before_it(checkpoint):
    """A token sees what comes after it: log-probabilities of shorter rows would depend on the padding."""
    short = TOKENS[:1, :50]
    padded = torch.cat((short, torch.full((1, 70), 5)), dim=1)
    batch = torch.cat((padded, TOKENS[1:, :120]))
    assert_close(ours(checkpoint[0], batch)[:1, :50], ours(checkpoint[0], short))


def test_gradients_reach_every_parameter(checkpoint):
    """A part of the model is detached from the loss, or frozen by the loading, and never learns."""
    model = Transformer.from_pretrained(checkpoint[0])
    logits = model(TOKENS[:, :-1]).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-7, name


# ----------------------------------------------------------------------------------------------
# The two forms of config.json


def to_v4(path, key):
    """Rewrites the config.json of transformers 5 in the form of version 4. `key` names RoPE's type."""
    config = read_config(path)
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & config.keys()
    rope = config["rope_parameters"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    if key == "both":
        scaling |= {"rope_type": rope["rope_type"], "type": "default"}
    else:
        scaling[key] = rope["rope_type"]
    change_config(path, rope_parameters=..., dtype=..., torch_dtype=config["dtype"],
                  rope_theta=rope["rope_theta"],
                  rope_scaling=None if rope["rope_type"] == "default" else scaling)


@pytest.mark.parametrize("key", ["rope_type", "type", "both"])
def test_config_of_transformers_4(copy, key):
    """RoPE's settings as most published checkpoints have them (rope_theta and rope_scaling, with `type` in
    the oldest) are lost. If both keys are present, rope_type counts, as in transformers."""
    path, logits = copy
    to_v4(path, key)
    assert_close(ours(path), logits)
    assert_close(theirs(path), logits)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_absent_fields_have_transformers_defaults(name):
    """A config.json without optional fields builds another model than in transformers."""
    defaults = type(CASES[name][1])(num_attention_heads=64)
    config = Config.from_hf({"model_type": name, **{field: getattr(defaults, field) for field in REQUIRED}})
    for field in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(defaults, field), field
    assert config.head_dim == {"llama": 64, "qwen2": 64, "qwen3": 128}[name]
    assert config.rope == defaults.rope_parameters


@pytest.mark.parametrize("field, value", [
    *((name, None) for name in (
        "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "attention_bias",
        "partial_rotary_factor", "head_dim", "bos_token_id")),
    ("bos_token_id", "x"), ("dtype", 5), ("torch_dtype", "int4"), ("quantization_config", {"bits": 4}),
    ("architectures", 5)], ids=str)
def test_fields_without_effect(field, value):
    """A config.json with an unused field, or a used one as null, is refused or read differently."""
    hf = {"model_type": "llama", **SIZES}
    expected, config = Config.from_hf(hf), Config.from_hf({**hf, field: value})
    config.hf = expected.hf
    assert config == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_null_key_value_heads_is_as_many_as_heads(tmp_path, name):
    """num_key_value_heads null, plain multi-head attention in transformers, is read as another number."""
    model_class, config = CASES[name]
    randomize(model_class(type(config)(**config.to_dict() | MHA))).save_pretrained(tmp_path)
    change_config(tmp_path, num_key_value_heads=None)
    assert_close(ours(tmp_path), theirs(tmp_path))


# ----------------------------------------------------------------------------------------------
# Saving, shards, tied copies, types, memory


@pytest.mark.parametrize("form", ["v5", "v4"])
def test_save_and_load(copy, tmp_path, form):
    """A saved model differs from the one in memory, for us or for transformers, or it lacks the fields that
    its users or an engine that reads only one form of config.json rely on."""
    path, logits = copy
    if form == "v4":
        to_v4(path, "type")
    extra = {"eos_token_id": [3, 5], "architectures": ["SomeModel"], "no_such_field": {"a": [1, None]}}
    change_config(path, **extra)
    model, saved = Transformer.from_pretrained(path), tmp_path / "a" / "saved"
    model.save_pretrained(saved)
    config = read_config(saved)
    assert config | extra == config
    rope = config["rope_parameters"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert config["rope_theta"] == rope["rope_theta"] != 10000
    assert config["rope_scaling"] == (scaling if rope["rope_type"] == "llama3" else None)
    assert config["dtype"] == config["torch_dtype"] == "float32"
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers 4 requires it
    again = Transformer.from_pretrained(saved)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again.config.hf = model.config.hf
    assert again.config == model.config
    assert_close(theirs(saved), logits)
    for dropped in (("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")):
        (saved / "config.json").write_text(json.dumps(config))
        change_config(saved, **{name: ... for name in dropped})
        assert_close(theirs(saved), logits)


def shard(path):
    """Rewrites directory `path` as several shards with an index; returns the shards."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="50KB")
    shards = sorted(path.glob("*.safetensors"))
    assert (path / "model.safetensors.index.json").exists() and len(shards) > 2
    return shards


def test_shards(copy):
    """Models above a few billion parameters, which come in shards, do not load."""
    shard(copy[0])
    assert_close(ours(copy[0]), copy[1])


def test_save_over_the_directory_that_was_loaded(broken):
    """Old shards are loaded instead of the new weights, or saving overwrites a file that is still read."""
    shard(broken)
    model = Transformer.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # the other tensors still refer to the file
        logits = model(TOKENS)
    for _ in range(2):
        model.save_pretrained(broken)
        model = Transformer.from_pretrained(broken)
    assert_close(ours(broken), logits)
    assert_close(theirs(broken), logits)


def edit_tensors(path, changes):
    """Rewrites model.safetensors: each named tensor is replaced or added, or removed if it is None."""
    tensors = {name: t.clone() for name, t in load_file(path / "model.safetensors").items()} | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_redundant_tensors_are_skipped(copy):
    """Tied checkpoints that repeat the embedding as lm_head, or Llama 2's files, which hold RoPE's
    frequencies of each layer, are refused."""
    path, expected = copy[0], ours(copy[0])
    edit_tensors(path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    weights = load_file(path / "model.safetensors")
    if read_config(path).get("tie_word_embeddings"):
        assert "lm_head.weight" not in weights
        edit_tensors(path, {"lm_head.weight": weights["model.embed_tokens.weight"]})
        assert "lm_head.weight" not in Transformer.from_pretrained(path).state_dict()
    assert torch.equal(ours(path), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoint_of_another_type_becomes_float32(broken, dtype):
    """A bfloat16 checkpoint, as most are, does not load as a float32 model."""
    tensors = {name: t.to(dtype) for name, t in load_file(broken / "model.safetensors").items()}
    save_file(tensors, broken / "model.safetensors")
    for name, p in split_parts(Transformer.from_pretrained(broken)).items():
        assert p.dtype == torch.float32 and torch.equal(p, tensors[name].float()), name


def test_bfloat16(checkpoint, tmp_path):
    """A bfloat16 model rounds where transformers does not, rotates by rounded angles, or is saved in another
    type than config.json names."""
    path, exact = checkpoint
    mine, other = ours(path, dtype=torch.bfloat16), theirs(path, dtype=torch.bfloat16)
    assert mine.dtype == torch.bfloat16
    noise = (other.float() - exact).norm()  # the error that bfloat16 causes in transformers
    assert (mine.float() - other.float()).norm() < 0.5 * noise
    assert (mine.float() - exact).norm() < 1.1 * noise
    cast = Transformer.from_pretrained(path).to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in cast.parameters()) and torch.equal(cast(TOKENS), mine)
    loaded = Transformer.from_pretrained(path, dtype=torch.bfloat16)
    for model in (cast, loaded):
        assert model.frequencies.dtype == torch.float32
        assert torch.equal(model.frequencies, Transformer.from_pretrained(path).frequencies)
    loaded.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model.safetensors").values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


class Memory(TorchDispatchMode):
    """Collects every tensor that is created, so that their storage can be added up."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.seen.append(result)
        return result

    def bytes(self):
        storages = [t.untyped_storage() for t in self.seen]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_loading_holds_the_weights_once(checkpoint):
    """Loading allocates random weights first, or copies more than the parts that it joins (the file itself
    is mapped, which takes no memory)."""
    with Memory() as memory:
        model = Transformer.from_pretrained(checkpoint[0])
    parameters = list(model.parameters())
    weights = sum(p.nbytes for p in parameters)
    assert not any(p.is_meta for p in parameters) and model.frequencies.device.type == "cpu"
    joined = sum(p.nbytes for name, p in model.named_parameters() if "qkv_proj" in name or "gate_up" in name)
    assert weights <= memory.bytes() < 1.05 * weights + joined
    assert {p.data_ptr() for p in parameters} <= {t.data_ptr() for t in memory.seen}


# ----------------------------------------------------------------------------------------------
# Damaged config.json


def refused(path, *words):
    """Asserts that loading directory `path` raises one UserError whose one line has all `words`, and leaves
    the files as they were."""
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    with pytest.raises(UserError) as caught:
        Transformer.from_pretrained(path)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def short(value):
    return str(value)[:60]


@pytest.mark.parametrize("content, word", [
    (None, "No such file"), ("", "not valid JSON"), ("{'a': 1}", "not valid JSON"), ("{", "not valid JSON"),
    ("[1]", "list"), ("null", "object"), ("5", "object"), ('"text"', "object"), ("\0", "not valid JSON"),
    (b"\xff\xfe\0", "not valid JSON"), (b"\xed\xa0\x80", "not valid JSON"),
    ("[" * 100000, "not valid JSON"), ('{"a":' * 50000, "not valid JSON")], ids=short)
def test_config_json_that_cannot_be_read(broken, content, word):
    """A wrong --model path or a broken download ends in a traceback."""
    file = broken / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(broken, str(file), word)


NAN, INF = float("nan"), float("inf")
UNSUPPORTED = [
    ("gpt2", {"model_type": "gpt2"}), ("model_type", {"model_type": None}),
    ("model_type", {"model_type": ["llama"]}), ("gelu", {"hidden_act": "gelu"}),
    ("sliding", {"use_sliding_window": True}),
    ("sliding", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("layer_types", {"layer_types": ["full_attention", "chunked_attention"]}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("yarn", {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("linear", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    ("5", {"rope_parameters": {"rope_type": 5}}),
    ("num_key_value_heads", {"num_key_value_heads": 3}), ("head_dim", {"head_dim": 15}),
    ("low_freq_factor", {"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}})]
SIZE_FIELDS = [*SIZES, "head_dim"]
INVALID = [
    *((name, value) for name in SIZE_FIELDS
      for value in (0, -4, 4.0, 0.5, "64", True, [64], {}, 2**31, 10**310)),
    *((name, value) for name in REQUIRED for value in (None, ...)),  # sizes without a default
    # Refused before anything is built: one module per layer, one frequency per channel.
    ("num_hidden_layers", 1001), ("head_dim", 2**20 + 2),
    *(("rms_norm_eps", value) for value in ("1e-6", "abc", NAN, INF, 0, -1e-6, [1e-6], {}, True, 10**310)),
    *((name, value) for name in ("rope_parameters", "rope_scaling")
      for value in ([1], ["ab"], "llama3", 5, True)),
    *(("layer_types", value) for value in (5, True, "full_attention", [5], ["mamba"] * 3)),
    *((name, value) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")
      for value in ("false", "yes"))]
ROPE = [
    *(("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": value}})
      for value in ("abc", "nan", "10000", NAN, INF, -INF, 0, -1.0, [1e4], {}, True, 10**310)),
    *(("rope_theta", {"rope_parameters": None, "rope_theta": value})
      for value in ("abc", "nan", "10000", NAN, INF, -INF, 0, -1.0, [1e4], {}, True, 10**310)),
    *((name, {"rope_parameters": LLAMA3 | {name: value}})
      for name in LLAMA3 if name not in ("rope_type", "rope_theta")
      for value in ("8", None, [8], 0, -8, NAN, 10**310)),
    *((name, {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != name}})
      for name in LLAMA3 if name not in ("rope_type", "rope_theta"))]


@pytest.mark.parametrize("word, changes", UNSUPPORTED + ROPE + [(name, {name: v}) for name, v in INVALID],
                         ids=short)
def test_config_that_is_refused(broken, word, changes):
    """A model of another kind, or with a damaged field, is computed incorrectly without an error, ends in a
    traceback, or fills the memory."""
    change_config(broken, **changes)
    refused(broken, word)


def test_sizes_whose_product_is_huge(broken):
    """Sizes that are valid one by one, but not together, end in torch's traceback or fill the memory."""
    most = 2**20
    for name in ("vocab_size", "intermediate_size", "num_attention_heads"):
        change_config(broken, **SIZES | {"hidden_size": most, "head_dim": most, name: most})
        refused(broken)


# ----------------------------------------------------------------------------------------------
# Damaged weights

SHIPPED = TINY / "model"
LENGTH = (SHIPPED / "model.safetensors").stat().st_size
with open(SHIPPED / "model.safetensors", "rb") as shipped_file:
    HEADER = int.from_bytes(shipped_file.read(8), "little")  # the file begins with the length of its header


def cut_at(length):
    return lambda weights: weights[:length]


def header_length(length):
    return lambda weights: length.to_bytes(8, "little") + weights[8:]


def replace(old, new):
    return lambda weights: weights.replace(old, new, 1)


CUTS = (0, 1, 4, 7, 8, 9, 100, HEADER, HEADER + 8, HEADER + 9, LENGTH // 2, LENGTH - 1)
HEADERS = (0, 1, HEADER - 1, HEADER + 1, 2**31, 2**63 - 1, 2**64 - 1)
REPLACED = ((b'"F32"', b'"I32"'), (b'"F32"', b'"F64"'), (b'"F32"', b'"XXX"'), (b'"shape":[', b'"shape":[9'),
            (b'"data_offsets":[0,', b'"data_offsets":[9,'), (b"norm.weight", b"norm.weighs"),
            (b"embed_tokens", b"embed_t\0kens"))


@pytest.mark.parametrize("damage", [
    *(pytest.param(cut_at(length), id=f"cut at {length}") for length in CUTS),
    *(pytest.param(header_length(length), id=f"header of {length}") for length in HEADERS),
    *(pytest.param(replace(*pair), id=f"{pair[0]} to {pair[1]}") for pair in REPLACED),
    pytest.param(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", id="LFS")])
def test_damaged_safetensors(tmp_path, damage):
    """A download that was interrupted, or a file of another kind, ends in a traceback or loads."""
    shutil.copy(SHIPPED / "config.json", tmp_path)
    weights = (SHIPPED / "model.safetensors").read_bytes()
    assert damage(weights) != weights
    (tmp_path / "model.safetensors").write_bytes(damage(weights))
    refused(tmp_path, str(tmp_path / "model.safetensors"))


def test_missing_safetensors(broken):
    """A directory without weights, or with pickled ones, ends in a traceback."""
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    refused(broken, str(broken / "model.safetensors"))


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


NORM, Q = "model.norm.weight", "model.layers.{}.self_attn.q_proj.{}"
FP4 = torch.ones(32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)  # two numbers in a byte


@pytest.mark.parametrize("name, tensor, word", [
    *((name, None, "lacks") for name in (NORM, "lm_head.weight", Q.format(1, "weight"))),
    *((name, ones(64), "does not have") for name in (
        Q.format(0, "bias"), "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight")),
    *((NORM, ones(*shape), str(shape)) for shape in ((63,), (1, 64), ())),
    ("model.layers.1.mlp.up_proj.weight", ones(64, 80), "(64, 80)"),
    ("lm_head.weight", ones(97, 64), "(97, 64)"),
    *((NORM, ones(64, dtype=dtype), "quantized") for dtype in (
        torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)),
    (NORM, FP4, ""),
    *((NORM, torch.cat((ones(63), torch.tensor([value]))), "finite") for value in (NAN, INF, -INF))],
    ids=lambda value: short(tuple(value.shape) if isinstance(value, torch.Tensor) else value))
def test_damaged_tensor(broken, name, tensor, word):
    """A tensor that is missing, unexpected, of another shape, quantized or not finite is ignored, broadcast
    or converted, and the logits are wrong without an error."""
    edit_tensors(broken, {name: tensor})
    refused(broken, name, word)


@pytest.mark.parametrize("content, word", [
    ({}, "weight_map"), ({"weight_map": None}, "weight_map"), ({"weight_map": ["a"]}, "weight_map"),
    ({"weight_map": {NORM: 1}}, "weight_map"), ({"weight_map": {}}, "lacks"), ([], "list")], ids=short)
def test_damaged_index(broken, content, word):
    """A damaged index ends in a traceback."""
    shard(broken)
    (broken / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(broken, str(broken), word)


def test_missing_and_wrong_shards(broken):
    """A download that lacks a shard, or whose shard does not hold what the index lists, ends in a traceback
    or loads without some of the layers."""
    first, second = shard(broken)[:2]
    lost = sorted(load_file(second))[0]
    shutil.copy(first, second)
    refused(broken, lost)
    second.unlink()
    refused(broken, second.name)


@pytest.mark.parametrize("name", ["../model.safetensors", "{outside}", "a/../../model.safetensors", "..", "",
                                  "\ud800", "a\0b"], ids=ascii)
def test_index_that_points_outside_the_directory(broken, name):
    """A downloaded index makes us open files elsewhere on the disk, or an impossible file name ends in a
    traceback."""
    outside = broken.parent / "model.safetensors"
    shutil.move(broken / "model.safetensors", outside)
    weight_map = {tensor: name.format(outside=outside) for tensor in load_file(outside)}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(broken, str(broken))
