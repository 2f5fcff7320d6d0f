"""model.py against transformers: the same random checkpoints, read by both, give the same logits,
and a model that would be computed incorrectly is refused."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data.files import UserError, read_json, write_json
from model import Config, Transformer

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
MHA = SIZES | dict(num_key_value_heads=4)
# With these the 8 frequencies of a 16-channel head fall into all three bands of llama3: kept (1 of
# them), blended (1) and divided (6).
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
CASES = {  # name: (model_type, the rest of config.json)
    "llama": ("llama", MHA | dict(rope_theta=2e3, attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", SIZES | dict(rope_parameters=LLAMA3, rms_norm_eps=0.01)),
    "qwen2": ("qwen2", SIZES | dict(rope_theta=1e6)),
    "qwen3": ("qwen3", SIZES | dict(rope_theta=1e6, head_dim=24)),
    "qwen3-tied": ("qwen3", MHA | dict(rope_theta=300.0, head_dim=24, attention_bias=True,
                                       tie_word_embeddings=True))}
TOKENS = torch.randint(96, (2, 300), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(path, dtype=torch.float32, **kwargs):
    """Logits of TOKENS by transformers. No tensor of the files is missing or unexpected."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model(TOKENS, **kwargs).logits


@torch.no_grad()
def ours(path):
    return Transformer.from_pretrained(path)(TOKENS)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def change_config(path, removed=(), **changes):
    fields = read_json(path / "config.json") | changes
    write_json(path / "config.json", {name: fields[name] for name in fields.keys() - removed})


def make(path, name):
    """Writes the random checkpoint `name`, as transformers saves it. Norms and biases are random,
    too: a loader that loses them would pass with those of a fresh model. Matrices are large enough
    that attention is not uniform and RoPE matters."""
    kind, fields = CASES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.5 * noise if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(directory, transformers' logits of TOKENS) of each case. Tests do not write into it."""
    path = make(tmp_path_factory.mktemp("checkpoint"), request.param)
    return path, theirs(path)


@pytest.fixture
def tied(tmp_path):
    return make(tmp_path / "tied", "qwen3-tied")


@torch.no_grad()
def test_logits_equal_transformers(checkpoint):
    """The forward pass differs from the one the checkpoint was trained with, or `rotations` means
    something else than transformers' position_ids."""
    path, logits = checkpoint
    assert logits.std() > 0.5  # far from uniform, so that 1e-4 is a tight bound
    assert_close(ours(path), logits)
    positions = torch.stack([torch.arange(300) + 40, torch.arange(300) * 2])
    model = Transformer.from_pretrained(path)
    mine = model.head(model.hidden(TOKENS, model.rotations(positions)))
    assert_close(mine, theirs(path, position_ids=positions))
    assert (mine[1] - logits[1]).abs().max() > 0.1  # RoPE matters in these models


@pytest.mark.parametrize("kind, head_dim", [("llama", 16), ("qwen2", 16), ("qwen3", 128)])
def test_absent_fields_have_transformers_defaults(kind, head_dim):
    """A config.json that lacks an optional field, or has it as null, builds another model."""
    same = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "num_key_value_heads")
    optional = (*same, "head_dim", "rope_theta")
    given = {name: value for name, value in MHA.items() if name not in optional}
    defaults = AutoConfig.for_model(kind, **given, num_key_value_heads=4)
    for absent in ({}, dict.fromkeys(optional)):
        config = Config.from_hf({"model_type": kind} | given | absent)
        assert config.head_dim == head_dim and config.rope == defaults.rope_parameters
        for name in same:
            assert getattr(config, name) == getattr(defaults, name), name


V5 = {"rope_parameters", "dtype"}  # what only transformers 5 reads
V4 = {"rope_theta", "rope_scaling", "torch_dtype"}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_type", "type"])
def test_save_and_load(checkpoint, tmp_path, form):
    """A config.json of transformers 4 (whose oldest files name RoPE's type `type`) or 5 is misread;
    or a saved model differs from the one that was loaded, for us or for transformers, or lacks
    fields that an engine which reads only one of the two forms relies on."""
    path = shutil.copytree(checkpoint[0], tmp_path / "copy")
    if form != "rope_parameters":  # in the form of transformers 4
        rope = dict(read_json(path / "config.json")["rope_parameters"])
        theta = rope.pop("rope_theta")
        rope[form] = rope.pop("rope_type")
        scaling = None if rope[form] == "default" else rope
        change_config(path, V5, torch_dtype="float32", rope_theta=theta, rope_scaling=scaling)
    change_config(path, eos_token_id=[3, 5], no_such_field={"a": [1, None]})
    saved = tmp_path / "a" / "saved"
    Transformer.from_pretrained(path).save_pretrained(saved)
    config = read_json(saved / "config.json")
    assert config["eos_token_id"] == [3, 5] and config["no_such_field"] == {"a": [1, None]}
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers 4 requires it
    for removed in (V4, V5):
        write_json(saved / "config.json", config)
        change_config(saved, removed)
        assert_close(theirs(saved), checkpoint[1])


@torch.no_grad()
def test_shards_are_read_by_their_index_and_replaced_by_what_is_saved(tied):
    """Models above a few billion parameters, which come in shards, do not load; of two copies of a
    tensor the one that the index does not name wins (vllm#54230); or saving over the directory
    leaves the old shards, or overwrites a file that is still read."""
    expected = ours(tied)
    theirs = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    (tied / "model.safetensors").unlink()
    theirs.save_pretrained(tied, max_shard_size="50KB")
    index = read_json(tied / "model.safetensors.index.json")["weight_map"]
    shards = sorted(tied.glob("*.safetensors"))
    assert len(shards) > 2
    for file in shards:  # a copy of every tensor in every other shard
        others = {name: torch.full((1,), 7.0) for name in index if index[name] != file.name}
        save_file(load_file(file) | others, file, {"format": "pt"})
    model = Transformer.from_pretrained(tied)
    assert torch.equal(model(TOKENS), expected)
    model.model.norm.weight.mul_(2)
    for _ in range(2):
        model.save_pretrained(tied)
        assert torch.equal(ours(tied), model(TOKENS))


def edit_tensors(path, changes):
    """Rewrites model.safetensors: each named tensor is replaced or added, or removed if None."""
    tensors = (load_file(path / "model.safetensors") | changes).items()
    kept = {name: tensor.clone() for name, tensor in tensors if tensor is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def test_a_head_that_differs_from_the_embedding_is_kept(tied):
    """config.json says that the head is the embedding, but the files have another: it is dropped,
    and the saved model has lost it (vllm#51063). Equal copies stay tied."""
    expected = ours(tied)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tied, {"lm_head.weight": embedding.clone()})
    model = Transformer.from_pretrained(tied)
    assert torch.equal(model(TOKENS), expected) and model.config.tie_word_embeddings
    edit_tensors(tied, {"lm_head.weight": embedding.flip(0)})
    Transformer.from_pretrained(tied).save_pretrained(tied / "saved")
    for logits in (ours(tied), ours(tied / "saved"), theirs(tied / "saved")):
        assert_close(logits, expected.flip(2))


def test_bfloat16(checkpoint, tmp_path):
    """A bfloat16 model rounds where transformers does not, rotates by rounded angles, is saved in
    another type than config.json names, or does not load in float32."""
    path, exact = checkpoint
    model = Transformer.from_pretrained(path, torch.bfloat16)
    other = theirs(path, dtype=torch.bfloat16).float()
    noise = (other - exact).norm()  # the error that bfloat16 causes in transformers
    assert (model(TOKENS).float() - other).norm() < 0.5 * noise
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "model.safetensors")
    for name, p in Transformer.from_pretrained(tmp_path).named_parameters():
        assert p.dtype == torch.float32 and tensors[name].dtype == torch.bfloat16
        assert torch.equal(p, tensors[name].float()), name


def test_loading_holds_the_weights_once(tied):
    """Loading allocates random weights first, or copies the weights more than once (the file is
    mapped, which allocates nothing)."""
    with torch.profiler.profile(profile_memory=True) as profile:
        weights = sum(p.nbytes for p in Transformer.from_pretrained(tied).parameters())
    allocated = sum(event.cpu_memory_usage for event in profile.events()
                    if event.name.startswith("aten::empty"))
    assert weights <= allocated < 1.05 * weights


@pytest.mark.parametrize("word, changes", [
    ("model_type", {"model_type": "gpt2"}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("sliding", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("up_proj", {"intermediate_size": 81})])
def test_config_that_is_refused(tied, word, changes):
    """A model of another kind, or whose sizes do not fit, is computed incorrectly without an error
    or ends in a traceback."""
    change_config(tied, **changes)
    with pytest.raises(UserError, match=f"^[^\n]*{word}[^\n]*$"):
        Transformer.from_pretrained(tied)


@pytest.mark.parametrize("name, tensor, word", [
    ("model.norm.weight", None, "Missing"),
    ("model.norm.bias", torch.ones(64), "Unexpected"),
    ("model.norm.weight", torch.ones(64, dtype=torch.int8), "quantized")])
def test_weights_that_are_refused(tied, name, tensor, word):
    """A tensor that is missing, unexpected or quantized passes. Llama 2's RoPE frequencies are no
    reason to refuse a file."""
    edit_tensors(tied, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    Transformer.from_pretrained(tied)
    edit_tensors(tied, {name: tensor})
    with pytest.raises(UserError, match=f"^[^\n]*{word}[^\n]*$"):
        Transformer.from_pretrained(tied)


def test_files_that_are_missing_are_named(tied):
    """A wrong --model path, or a pickled checkpoint, ends in a traceback."""
    for name in ("model.safetensors", "config.json"):
        (tied / name).unlink()
        with pytest.raises(UserError, match=f"^cannot read [^\n]*{name}[^\n]*$"):
            Transformer.from_pretrained(tied)
