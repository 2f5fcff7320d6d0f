"""
Tests of model.py against transformers: the same random checkpoints, read by both, must give the
same logits; and whatever we cannot compute or read must end in one UserError that names it.

Every parameter of every model here is randomised, norm weights and biases included. A fresh
transformers model has unit norms and zero biases, with which a loader that loses them passes.
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

from model import Config, Transformer, UserError

# ----------------------------------------------------------------------------------------------
# Random checkpoints, saved by transformers

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
SMALL = dict(model_type="llama", **SIZES)
MHA = dict(num_key_value_heads=4)
# With these the 8 frequencies of a 16-channel head fall in all three of llama3's bands: kept
# (1 of them), blended (1) and slowed down (6).
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def rope(theta):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=theta))


CASES = {  # name: (transformers class, its configuration)
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, **rope(500.0))),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, **rope(5000.0), tie_word_embeddings=True)),
    "llama-biases": (LlamaForCausalLM, LlamaConfig(**SIZES | MHA, **rope(2000.0), attention_bias=True, mlp_bias=True)),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, rms_norm_eps=1e-2, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, **rope(1e6))),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES | MHA, **rope(100.0), tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, **rope(1e6), head_dim=24)),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**SIZES | MHA, **rope(300.0), head_dim=24, attention_bias=True,
                                                 tie_word_embeddings=True)),
}
TOKENS = torch.randint(96, (2, 300), generator=torch.Generator().manual_seed(1))


def randomise(model):
    """Random values in all parameters, far from the 0 and 1 of fresh biases and norms; matrices
    large enough (a fresh model's are not) that attention is not uniform and RoPE matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.5 * noise if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def theirs(path, tokens=TOKENS, dtype=torch.float32, **kwargs):
    """Logits that transformers computes from directory `path`; no tensor may lack or be left over."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model(tokens, **kwargs).logits


@torch.no_grad()
def ours(path, tokens=TOKENS, dtype=torch.float32, **kwargs):
    """Logits that model.py computes from directory `path`."""
    return Transformer.from_pretrained(path, dtype=dtype)(tokens, **kwargs)


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-4


def read_config(path):
    return json.loads((path / "config.json").read_text())


def write_config(path, config):
    (path / "config.json").write_text(json.dumps(config))


def make(root, name):
    """Directory with the random checkpoint `name`, as transformers saves it."""
    model_class, config = CASES[name]
    torch.manual_seed(0)
    randomise(model_class(config)).save_pretrained(root / name)
    return root / name


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(directory, transformers' logits of TOKENS) of each case. Tests do not write into it."""
    path = make(tmp_path_factory.mktemp("checkpoint"), request.param)
    return path, theirs(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def broken(llama, tmp_path):
    """A good Llama directory of this test's own, to be broken."""
    return shutil.copytree(llama, tmp_path / "broken")


# ----------------------------------------------------------------------------------------------
# Logits


def test_logits_equal_transformers(checkpoint):
    """If it fails, some part of the forward pass or of the loading is not what the family's
    checkpoints were trained with, and every rollout is drawn from a damaged model."""
    path, logits = checkpoint
    assert logits.std() > 0.5  # a model that says something, so that 1e-4 is a tight bound
    assert_close(ours(path), logits)


def test_rope_matters_in_these_models(checkpoint):
    """If it fails, the checkpoints of this file cannot tell a wrong RoPE from a right one, and the
    comparisons with transformers prove little."""
    path, logits = checkpoint
    assert (ours(path, positions=torch.arange(0, 600, 2)[None]) - logits).abs().max() > 0.1


def test_positions_equal_transformers(checkpoint):
    """If it fails, `positions` is ignored or taken for something else than transformers'
    position_ids, and tokens that go on from a cache are rotated by wrong angles."""
    path, _ = checkpoint
    positions = torch.stack([torch.arange(300) + 40, torch.arange(300) * 2])
    assert_close(ours(path, positions=positions), theirs(path, position_ids=positions))


def test_right_padding_changes_nothing_before_it(checkpoint):
    """If it fails, a token sees what comes after it: in a batch of unequal lengths every shorter
    row's log-probabilities would depend on the padding."""
    path, _ = checkpoint
    short = TOKENS[:1, :50]
    padded = torch.cat((short, torch.full((1, 70), 5)), dim=1)
    batch = torch.cat((padded, TOKENS[1:, :120]))
    assert_close(ours(path, batch)[:1, :50], ours(path, short))


def test_gradients_reach_every_parameter(checkpoint):
    """If it fails, part of the model is cut off from the loss (or frozen by the loading) and
    never learns."""
    model = Transformer.from_pretrained(checkpoint[0])
    torch.nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-7, name


# ----------------------------------------------------------------------------------------------
# The two forms of config.json


def as_v4(config, key):
    """A config.json of transformers 5 rewritten as version 4 wrote it; `key` names RoPE's type."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    return config


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_config_of_transformers_4(checkpoint, tmp_path, key):
    """If it fails, RoPE's settings in the form in which most published checkpoints hold them
    (rope_theta and rope_scaling, with `type` in the oldest) are lost and theta 10000 is taken."""
    path, logits = checkpoint
    config = read_config(path)
    assert "rope_parameters" in config and "dtype" in config  # transformers 5 wrote the new form,
    assert "rope_theta" not in config and "rope_scaling" not in config  # and that form alone
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, as_v4(config, key))
    assert_close(ours(tmp_path), logits)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_absent_fields_have_transformers_defaults(name):
    """If it fails, a config.json that leaves out a field with its default value (a short one
    written by hand, say) builds another model than transformers does."""
    defaults = type(CASES[name][1])(num_attention_heads=64)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Config.from_hf({"model_type": name, **{field: getattr(defaults, field) for field in required}})
    for field in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(defaults, field), field
    assert config.head_dim == {"llama": 64, "qwen2": 64, "qwen3": 128}[name]
    assert config.rope == defaults.rope_parameters


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
                                   "attention_bias", "partial_rotary_factor", "head_dim"])
def test_null_is_as_good_as_absent(field):
    """If it fails, a config.json that spells out an unused field as null, as transformers often
    does, is refused or ends in a traceback."""
    expected = Config.from_hf(SMALL)
    config = Config.from_hf({**SMALL, field: None})
    config.hf = expected.hf
    assert config == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_null_key_value_heads_is_as_many_as_heads(tmp_path, name):
    """If it fails, num_key_value_heads null, which stands for plain multi-head attention in
    transformers, is taken for some other number."""
    model_class, config = CASES[name]
    config = type(config)(**{**config.to_dict(), **MHA})
    randomise(model_class(config)).save_pretrained(tmp_path)
    write_config(tmp_path, {**read_config(tmp_path), "num_key_value_heads": None})
    assert_close(ours(tmp_path), theirs(tmp_path))


def test_rope_type_wins_over_type(tmp_path):
    """If it fails, a config.json with RoPE's type under both the old and the new key is read by
    the old one, where transformers goes by the new one."""
    path = make(tmp_path, "llama3")
    config = as_v4(read_config(path), "rope_type")
    config["rope_scaling"]["type"] = "default"
    write_config(path, config)
    assert_close(ours(path), theirs(path))


# ----------------------------------------------------------------------------------------------
# Saving


@pytest.fixture(params=["from v5", "from v4"])
def saved(checkpoint, tmp_path, request):
    """(directory that save_pretrained wrote, the model that it wrote, transformers' logits). The
    model comes from a config.json in either form, so that neither is just carried over."""
    path, logits = checkpoint
    source = shutil.copytree(path, tmp_path / "source")
    config = read_config(source) if request.param == "from v5" else as_v4(read_config(source), "type")
    write_config(source, {**config, "eos_token_id": [3, 5], "architectures": ["SomeModel"],
                          "no_such_field": {"a": [1, None]}})
    model = Transformer.from_pretrained(source)
    model.save_pretrained(tmp_path / "a" / "saved")
    return tmp_path / "a" / "saved", model, logits


def test_save_writes_both_forms_of_config(saved):
    """If it fails, an engine that reads the other form than the one we write silently takes theta
    10000, or float32."""
    config = read_config(saved[0])
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["rope_theta"] != 10000
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert config["rope_scaling"] == (scaling if rope["rope_type"] == "llama3" else None)
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_save_keeps_unknown_fields(saved):
    """If it fails, a trained model loses token ids or other settings that its users rely on."""
    config = read_config(saved[0])
    assert config["eos_token_id"] == [3, 5]
    assert config["architectures"] == ["SomeModel"]
    assert config["no_such_field"] == {"a": [1, None]}


@pytest.mark.parametrize("dropped", [(), ("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")],
                         ids=["both forms", "only v5", "only v4"])
def test_saved_model_loads_in_transformers(saved, dropped):
    """If it fails, what we train is another model once transformers (or an engine that reads only
    one of config.json's forms) has loaded it."""
    path, _, logits = saved
    write_config(path, {k: v for k, v in read_config(path).items() if k not in dropped})
    assert_close(theirs(path), logits)


def test_saved_model_loads_bit_for_bit(saved):
    """If it fails, saving and resuming changes the weights or the configuration."""
    path, model, _ = saved
    again = Transformer.from_pretrained(path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again.config.hf = model.config.hf
    assert again.config == model.config


def test_saved_file_is_marked_as_pytorch(saved):
    """If it fails, transformers 4 refuses the file: it wants the format in its metadata."""
    with safe_open(saved[0] / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_save_over_the_directory_that_was_loaded(broken):
    """If it fails, saving over the model's own (sharded) directory leaves old shards that are
    loaded instead of the new weights, or overwrites a file that the weights are still read from."""
    shard(broken)
    model = Transformer.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # the other tensors are left as they lie in the file
        logits = model(TOKENS)
    for _ in range(2):
        Transformer.save_pretrained(model, broken)
        model = Transformer.from_pretrained(broken)
    assert_close(ours(broken), logits)
    assert_close(theirs(broken), logits)


# ----------------------------------------------------------------------------------------------
# Files: shards, tied copies, types, memory


def shard(path):
    """Rewrites directory `path` as several shards with an index; returns the shards."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="50KB")
    assert (path / "model.safetensors.index.json").exists() and not (path / "model.safetensors").exists()
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def test_shards(checkpoint, tmp_path):
    """If it fails, models above a few billion parameters, which come in shards, do not load."""
    path, logits = checkpoint
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    shard(tmp_path)
    assert_close(ours(tmp_path), logits)


def edit_tensors(path, **changes):
    """Rewrites model.safetensors: each named tensor is replaced or added, or dropped if None.
    `__` in a name stands for a dot."""
    tensors = {name: t.clone() for name, t in load_file(path / "model.safetensors").items()}
    tensors.update({name.replace("__", "."): t for name, t in changes.items()})
    save_file({k: t for k, t in tensors.items() if t is not None}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "qwen3-tied"])
def test_tied_checkpoint_that_carries_lm_head(tmp_path, name):
    """If it fails, tied checkpoints that hold the embedding a second time as lm_head are refused."""
    path = make(tmp_path, name)
    expected, embedding = ours(path), load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    edit_tensors(path, lm_head__weight=embedding.clone())
    model = Transformer.from_pretrained(path)
    assert "lm_head.weight" not in model.state_dict()
    assert torch.equal(model(TOKENS), expected)


def test_rope_buffers_of_old_checkpoints_are_skipped(broken):
    """If it fails, Llama 2's own safetensors files, which hold RoPE's frequencies as a tensor of
    each layer, are refused though nothing in them is missing or odd."""
    expected = ours(broken)
    edit_tensors(broken, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert torch.equal(ours(broken), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoint_of_another_type_becomes_float32(broken, dtype):
    """If it fails, the published bfloat16 checkpoints do not load as the float32 model asked for."""
    tensors = {name: t.to(dtype) for name, t in load_file(broken / "model.safetensors").items()}
    save_file(tensors, broken / "model.safetensors")
    for name, p in Transformer.from_pretrained(broken).state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, tensors[name].float()), name


def test_bfloat16_logits_are_near_transformers(checkpoint):
    """If it fails, a bfloat16 model rounds where transformers does not (or rotates by rounded
    angles) and its samples are of another quality."""
    path, exact = checkpoint
    mine, other = ours(path, dtype=torch.bfloat16), theirs(path, dtype=torch.bfloat16)
    assert mine.dtype == torch.bfloat16
    noise = (other.float() - exact).norm()  # what bfloat16 costs transformers
    assert (mine.float() - other.float()).norm() < 0.5 * noise
    assert (mine.float() - exact).norm() < 1.1 * noise


@pytest.mark.parametrize("cast", [False, True], ids=["dtype=", "model.to"])
def test_frequencies_stay_float32(checkpoint, cast):
    """If it fails, RoPE's frequencies are rounded to 8 bits with the weights, and far positions
    are rotated by angles that are wrong by radians."""
    path, _ = checkpoint
    exact = Transformer.from_pretrained(path)
    model = exact.to(torch.bfloat16) if cast else Transformer.from_pretrained(path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model(TOKENS)
    assert model.frequencies.dtype == torch.float32
    assert torch.equal(model.frequencies, Transformer.from_pretrained(path).frequencies)
    assert torch.equal(model(TOKENS), ours(path, dtype=torch.bfloat16))


def test_bfloat16_model_is_saved_as_bfloat16(checkpoint, tmp_path):
    """If it fails, config.json and the file disagree on the type, or the file is twice as large."""
    Transformer.from_pretrained(checkpoint[0], dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model.safetensors").values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


class Memory(TorchDispatchMode):
    """Keeps every tensor that appears, so that the memory they stand on can be added up."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.seen.append(result)
        return result

    def bytes(self):
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.seen}.values())


def test_loading_holds_the_weights_once(checkpoint):
    """If it fails, loading fills a model with random weights first, or copies what it read: a
    model that fits in memory once does not load."""
    with Memory() as memory:
        model = Transformer.from_pretrained(checkpoint[0])
    parameters = list(model.parameters())
    weights = sum(p.nbytes for p in parameters)
    assert not any(p.is_meta for p in parameters) and model.frequencies.device.type == "cpu"
    assert weights <= memory.bytes() < 1.05 * weights
    assert {p.data_ptr() for p in parameters} <= {t.data_ptr() for t in memory.seen}


# ----------------------------------------------------------------------------------------------
# Errors: config.json

NAN, INF = float("nan"), float("inf")


def refused(path, *words):
    """Asserts that loading directory `path` ends in one UserError whose text has all `words`."""
    with pytest.raises(UserError) as caught:
        Transformer.from_pretrained(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message, message


def refused_config(path, changes, *words):
    write_config(path, {**read_config(path), **changes})
    refused(path, *words)


def cases(table):
    """pytest's parameters for a list of tuples, with ids that show the values."""
    return [pytest.param(*row, id="-".join(str(value) for value in row)[:60]) for row in table]


@pytest.mark.parametrize("content, word", [
    (None, "No such file"), ("", "not valid JSON"), ("{'a': 1}", "not valid JSON"), ("[1]", "list"), ("null", "object"),
    (b"\xff\xfe\x00", "not valid JSON"), ("[" * 100000, "not valid JSON"),
], ids=["missing", "empty", "python", "list", "null", "binary", "deep"])
def test_config_json_that_cannot_be_read(broken, content, word):
    """If it fails, a wrong --model path or a broken download ends in a traceback."""
    file = broken / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(broken, str(file), word)


@pytest.mark.parametrize("changes, word", cases([
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"use_sliding_window": True}, "sliding"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, "rope_parameters"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim"),
]))
def test_model_that_we_would_compute_wrongly(broken, changes, word):
    """If it fails, a model of another kind is loaded and computed as if it were a plain one: no
    error, only wrong logits."""
    refused_config(broken, changes, word)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -4, 4.0, "64", True, [64], 2**31, 10**310], ids=lambda v: str(v)[:12])
def test_senseless_size(broken, name, value):
    """If it fails, a damaged size ends in a traceback from deep inside torch."""
    refused_config(broken, {name: value}, name)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads"])
def test_missing_size(broken, name):
    """If it fails, a size without a sensible default is guessed, or its absence is a traceback."""
    config = read_config(broken)
    del config[name]
    write_config(broken, config)
    refused(broken, name)


@pytest.mark.parametrize("name, value", [("num_hidden_layers", 2**31 - 1), ("head_dim", 2**31 - 2)])
def test_size_that_would_fill_the_memory(name, value):
    """If it fails, an absurd number of layers or channels is not refused but built, one module or
    one RoPE frequency after the other, until the machine has no memory left. (Only the
    configuration is read here, so that a failure does no harm.)"""
    with pytest.raises(UserError, match=name):
        Config.from_hf({**SMALL, name: value})


@pytest.mark.parametrize("changes", cases([
    ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1, "head_dim": 16},),
    ({"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 1, "head_dim": 16},),
    ({"num_attention_heads": 2**31 - 2, "hidden_size": 2**31 - 1, "head_dim": 16},),
]))
def test_sizes_whose_product_overflows(broken, changes):
    """If it fails, sizes that are no tensor's even on the meta device end in torch's traceback."""
    refused_config(broken, changes)


@pytest.mark.parametrize("value", ["abc", "nan", "10000", NAN, INF, -INF, 0, -1.0, [1e4], {}, True, 10**310],
                         ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("place", ["rope_theta", "rope_parameters"])
def test_senseless_rope_theta(broken, place, value):
    """If it fails, a damaged theta ends in a traceback, in logits that are not numbers, or in the
    default 10000 without a word."""
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
    flat = {"rope_parameters": None, "rope_theta": value}
    refused_config(broken, nested if place == "rope_parameters" else flat, "rope_theta")


@pytest.mark.parametrize("value", ["1e-6", "abc", NAN, INF, -1e-6, [1e-6], 10**310], ids=lambda v: str(v)[:12])
def test_senseless_rms_norm_eps(broken, value):
    """If it fails, a damaged epsilon ends in a traceback or in logits that are not numbers."""
    refused_config(broken, {"rms_norm_eps": value}, "rms_norm_eps")


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", ["absent", "8", None, [8], 0, -8, NAN, 10**310], ids=lambda v: str(v)[:12])
def test_senseless_llama3_rope(broken, name, value):
    """If it fails, a damaged llama3 field ends in a traceback or in senseless angles."""
    rope = {**LLAMA3, name: value}
    if value == "absent":
        del rope[name]
    refused_config(broken, {"rope_parameters": rope}, name)


def test_llama3_rope_with_bands_in_the_wrong_order(broken):
    """If it fails, llama3's blend runs backwards and slows the short waves instead of the long."""
    refused_config(broken, {"rope_parameters": {**LLAMA3, "low_freq_factor": 8.0}}, "low_freq_factor")


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", [[1], ["ab"], "llama3", 5, True], ids=str)
def test_rope_settings_that_are_no_object(broken, name, value):
    """If it fails, RoPE's settings of a wrong type end in a traceback, or are taken for others."""
    refused_config(broken, {"rope_parameters": None, name: value}, name)


@pytest.mark.parametrize("value", [5, True, "full_attention", [5]], ids=str)
def test_layer_types_that_are_no_list_of_names(broken, value):
    """If it fails, layer_types of a wrong type ends in a traceback or is passed over."""
    refused_config(broken, {"layer_types": value}, "layer_types")


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_switch_that_is_a_string(broken, name):
    """If it fails, "false" counts as true: a tied head is taken where the checkpoint has its own."""
    refused_config(broken, {name: "false"}, name)


# ----------------------------------------------------------------------------------------------
# Errors: the weights


def test_missing_safetensors(broken):
    """If it fails, a directory with only config.json, or with pickled weights, is a traceback."""
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    refused(broken, str(broken / "model.safetensors"))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1], ids=str)
def test_truncated_safetensors(broken, keep):
    """If it fails, a download that broke off is a traceback or, worse, loads."""
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep if keep != 0.5 else len(content) // 2])
    refused(broken, str(file))


def test_file_that_is_no_safetensors(broken):
    """If it fails, a text saved under the name of the weights (an error page, a Git LFS pointer)
    is a traceback."""
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(broken, str(broken / "model.safetensors"))


@pytest.mark.parametrize("tensor, word", [
    ("model.norm.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.1.self_attn.q_proj.weight", "q_proj"),
])
def test_missing_tensor(broken, tensor, word):
    """If it fails, part of the model is left without weights and the loading does not say so."""
    edit_tensors(broken, **{tensor: None})
    refused(broken, word)


@pytest.mark.parametrize("tensor", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight",
                                    "model.layers.0.self_attn.q_norm.weight"])
def test_extra_tensor(broken, tensor):
    """If it fails, weights that config.json does not account for (a bias, another layer) are
    dropped in silence and the logits are wrong."""
    edit_tensors(broken, **{tensor: torch.ones(64)})
    refused(broken, tensor)


@pytest.mark.parametrize("tensor, shape", [
    ("model.norm.weight", (63,)), ("model.norm.weight", (1, 64)), ("model.norm.weight", ()),
    ("model.layers.1.mlp.up_proj.weight", (64, 80)), ("lm_head.weight", (97, 64)),
], ids=str)
def test_misshapen_tensor(broken, tensor, shape):
    """If it fails, a tensor that does not fit is broadcast or ends in a traceback."""
    edit_tensors(broken, **{tensor: torch.ones(shape)})
    refused(broken, tensor, str(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
                                   torch.float4_e2m1fn_x2], ids=str)
def test_tensor_of_a_type_that_is_no_weight(broken, dtype):
    """If it fails, the codes of a quantised checkpoint are taken for weights, or converting them
    is a traceback."""
    packed = dtype == torch.float4_e2m1fn_x2  # two numbers a byte
    edit_tensors(broken, model__norm__weight=torch.ones(32, dtype=torch.uint8).view(dtype) if packed
                 else torch.ones(64).to(dtype))
    refused(broken, "model.norm.weight")


@pytest.mark.parametrize("content, word", [
    ({}, "weight_map"), ({"weight_map": None}, "weight_map"), ({"weight_map": ["a.safetensors"]}, "weight_map"),
    ({"weight_map": {"model.norm.weight": 1}}, "weight_map"), ({"weight_map": {}}, "lacks"), ([], "list"),
], ids=["no map", "null", "list", "number", "empty", "no object"])
def test_index_that_says_nothing(broken, content, word):
    """If it fails, a damaged index is a traceback."""
    shard(broken)
    (broken / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(broken, str(broken), word)


def test_index_that_names_a_missing_shard(broken):
    """If it fails, a download that lacks a shard is a traceback, or loads without its layers."""
    lost = shard(broken)[1]
    lost.unlink()
    refused(broken, lost.name)


def test_shard_that_lacks_its_tensors(broken):
    """If it fails, a shard that does not hold what the index says leaves layers without weights."""
    first, second = shard(broken)[:2]
    lost = sorted(load_file(second))[0]
    shutil.copy(first, second)
    refused(broken, lost)


@pytest.mark.parametrize("name", ["../model.safetensors", "{outside}", "a/../../model.safetensors", "..", "",
                                  "\ud800", "a\0b"], ids=ascii)
def test_index_that_points_outside_the_directory(broken, name):
    """If it fails, a downloaded index makes us open files elsewhere on the disk, or a name that no
    file can have is a traceback."""
    outside = broken.parent / "model.safetensors"
    shutil.copy(broken / "model.safetensors", outside)
    (broken / "model.safetensors").unlink()
    weight_map = {tensor: name.format(outside=outside) for tensor in load_file(outside)}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(broken, str(broken))
