"""The benchmark's own arithmetic: what runs on a GPU is tried here on a small shape on the CPU."""

import pytest

import bench

SMALL = dict(bench.SHAPES["1.5B"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)


@pytest.mark.parametrize("what", ["sampling", "training"])
def test_the_rows_for_a_gpu_run(what):
    """A row that breaks on the first machine that could measure it, or that counts other tokens than it made."""
    spec = {"what": what, "device": "cpu", "sizes": SMALL, "copied": 2**16, "square": 64, "rows": 8, "context": 20, "tokens": 200,
            "micro": 64, "checkpointing": False}
    found = bench.on_gpu(spec)(1)
    assert found["tokens"] == (8 * 200 if what == "sampling" else 8 * 32)
    assert all(value > 0 for name, value in found.items() if name != "peak GB")


def test_without_a_gpu_the_rows_say_so():
    """A benchmark that fails with a traceback, or takes a CPU's figures for a GPU's."""
    import torch
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(bench.Missing):
        bench.on_gpu({"what": "sampling", "device": "cuda"})


def test_the_shapes_are_those_of_the_models():
    """Limits computed for another model than README names (its parameters are known)."""
    import torch
    from model import Config, Transformer
    with torch.device("meta"):
        for name, count in (("1.5B", 1_777_088_000), ("4B", 4_022_468_096)):
            assert sum(p.numel() for p in Transformer(Config.from_hf(bench.SHAPES[name])).parameters()) == count
