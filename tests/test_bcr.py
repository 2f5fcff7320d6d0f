"""Groups, prompts, rewards, advantages, loss, evaluation: the parts of bcr.py one by one."""

import json

import numpy as np
import pytest
import torch

import bcr
from bcr import (Settings, accumulate_gradient, advantages_of, check, draw_groups, encode_chat, interval95,
                 load_chat, load_problems, policy_loss, token_logprobs)
from conftest import TINY, random_model
from model import UserError
from rollout import prefill

# ----------------------------------------------------------------------------------------------
# Groups


def made_up(count):
    return [{"problem": str(i), "answer": "1", "difficulty": i % 5} for i in range(count)]


def test_an_epoch_uses_each_problem_once():
    """Problems repeated or left out: the data would not be what was asked for."""
    groups = draw_groups(made_up(103), 4, seed=0, first=0, count=25)
    assert len(set(groups.flatten().tolist())) == 100
    assert set(draw_groups(made_up(103), 1, 0, 0, 103).flatten().tolist()) == set(range(103))


def test_groups_are_equally_hard():
    """Groups of N easy and N hard problems: one budget would suit neither. Each group takes one
    problem from each fourth of the difficulties."""
    problems = [{"problem": str(i), "answer": "1", "difficulty": i} for i in range(400)]
    groups = draw_groups(problems, 4, seed=0, first=0, count=100)
    assert (np.sort(groups // 100, axis=1) == [0, 1, 2, 3]).all()


def test_place_in_the_prompt_says_nothing_about_difficulty():
    """Easy problems always first: accuracy by position would measure difficulty."""
    problems = [{"problem": str(i), "answer": "1", "difficulty": i} for i in range(4000)]
    means = draw_groups(problems, 4, seed=0, first=0, count=1000).mean(axis=0)
    assert np.abs(means - 2000).max() < 150  # 4 standard errors


def test_groups_depend_on_their_number_alone():
    """A resumed run that repeats or skips groups; epochs and seeds in the same order."""
    problems = made_up(40)
    whole = draw_groups(problems, 4, seed=7, first=0, count=30)
    parts = [draw_groups(problems, 4, seed=7, first=first, count=3) for first in range(0, 30, 3)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert not np.array_equal(whole, draw_groups(problems, 4, seed=8, first=0, count=30))


# ----------------------------------------------------------------------------------------------
# Prompts


def test_prompts_are_rendered_as_transformers_renders_them(shipped):
    """Another rendering of the chat template, or another tokenisation, than every other engine
    that serves the model."""
    transformers = pytest.importorskip("transformers")
    _, chat = shipped
    message = bcr.batch_prompt(["What is 1 + 2?", "What is 3/4 - 1/4?"])
    theirs = transformers.AutoTokenizer.from_pretrained(TINY / "model").apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False)
    assert encode_chat(chat, message) == theirs


def chat_directory(path, template=None, in_tokenizer_config=None, eos=0, generation_eos=None, eos_token="<|end|>"):
    """A copy of the shipped tokenizer with other files around it."""
    (path / "tokenizer.json").write_bytes((TINY / "model" / "tokenizer.json").read_bytes())
    (path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    settings = {"eos_token": eos_token} | ({"chat_template": in_tokenizer_config} if in_tokenizer_config else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


def test_both_places_of_the_template_and_none(tmp_path):
    """A template that is not found: the model would be prompted in a form that it does not know."""
    template = "{% for m in messages %}A {{ m.content }} {{ eos_token }}{% endfor %}"
    ids = []
    for name, kwargs in {"file": dict(template=template), "config": dict(in_tokenizer_config=template),
                         "named": dict(in_tokenizer_config=[{"name": "default", "template": template}]),
                         "none": {}}.items():
        (tmp_path / name).mkdir()
        chat = load_chat(chat_directory(tmp_path / name, **kwargs))
        ids.append(chat.tokenizer.decode(encode_chat(chat, "17"), skip_special_tokens=False))
    assert ids == ["A 17 <|end|>"] * 3 + ["17\n\n"]


def test_eos_ids_are_the_union_of_three_files(tmp_path):
    """An id that only one file names: completions would run on past their end."""
    chat = load_chat(chat_directory(tmp_path, eos=[0, 7], generation_eos=[9, 7], eos_token={"content": "<|user|>"}))
    assert chat.eos_ids == sorted({0, 7, 9, chat.tokenizer.token_to_id("<|user|>")})


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}",
                                      "{{ undefined_function() }}", "{% for m in messages %}"])
def test_a_bad_template_is_one_sentence(tmp_path, template):
    """Code in a downloaded template that runs outside the sandbox, or a traceback for its errors."""
    with pytest.raises(UserError, match="chat template"):
        encode_chat(load_chat(chat_directory(tmp_path, template=template)), "17")


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


def test_a_truncated_completion_keeps_credit_for_what_it_answered():
    """Truncation that takes all credit, or credit for what was not reached: either falsifies the
    method. Cut at each character, the reward rises by one answer as each box closes."""
    text = "### Problem 1\n1 + 2 = 3.\nAnswer 1: \\boxed{3}\n\n### Problem 2\nAnswer 2: \\boxed{\\frac{1}{2}}"
    golds = ["3", "\\frac{1}{2}"]
    first, second = text.index("}") + 1, len(text)
    for cut in range(len(text) + 1):
        expected = [cut >= first, cut >= second]
        assert check([text[:cut]], [golds]).tolist() == [expected], text[:cut]


def test_advantages_subtract_the_groups_own_mean():
    """A baseline over the batch, or a division that was not asked for."""
    rewards = np.array([[0.0, 1.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert np.allclose(advantages_of(rewards), [[-0.5, 0.5, 0, 0], [0, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]])
    scaled = advantages_of(rewards, normalize_std=True)
    assert np.allclose(scaled[[0, 2]].std(axis=1), 1, atol=1e-4) and not scaled[1].any()


def test_a_group_of_equal_rewards_is_exactly_zero():
    """Rounding in the mean of thirds would make such groups train on noise, which --normalize-std
    would blow up to full size."""
    assert not advantages_of(np.full((1, 7), 1 / 3 + 0.1)).any()
    assert not advantages_of(np.full((1, 7), 1 / 3 + 0.1), normalize_std=True).any()


# ----------------------------------------------------------------------------------------------
# Loss


def test_the_loss_is_the_clipped_objective():
    """A wrong sign, a clip on the wrong side, or a mean where the constant belongs. Ratios 2 and
    0.5, with both signs of the advantage, against values worked out by hand."""
    old, new = torch.zeros(4), torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(new, old, advantages, constant=10, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-(1.28 - 2.0 + 0.5 - 0.8) / 10)


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    """d loss / d logprob must be -A / constant for every token, whatever the sequence's length: a
    mean over the sequence would be a length incentive."""
    logprobs = torch.randn(5, requires_grad=True)
    advantages = torch.tensor([0.5, 0.5, 0.5, 0.5, -0.25])  # four tokens of one row, one of another
    policy_loss(logprobs, logprobs.detach(), advantages, 20, 0.2, 0.28).backward()
    assert torch.allclose(logprobs.grad, -advantages / 20)


@pytest.fixture
def batch():
    """Five rows of four prompts for a small model: prompts, each row's prompt, completions (EOS is 0),
    sampler logprobs, advantages. One prompt has no rows, one has two."""
    torch.manual_seed(1)
    prompts = [torch.randint(2, 64, (length,)).tolist() for length in (3, 9, 5, 1, 7)]
    owners = [0, 1, 1, 3, 4]
    completions = [torch.randint(2, 64, (length,)).tolist() + [0] for length in (20, 3, 40, 11, 1)]
    sampled = [torch.full((len(c),), -2.0) for c in completions]
    return prompts, owners, completions, sampled, np.array([0.5, -0.25, 0.25, -0.75, 0.25])


def gradients(batch, **changes):
    model = random_model("qwen2", tie_word_embeddings=False)
    s = Settings(**changes)
    loss, *_ = accumulate_gradient(model, list(model.parameters()), *batch, constant=1000, s=s)
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("updates", [1, 2])
def test_nothing_depends_on_the_micro_batch_size(batch, updates):
    """A micro-batch of its own denominator: results would change with the memory of the machine."""
    whole_loss, whole = gradients(batch, micro_tokens=10**6, updates=updates)
    for micro_tokens in (1, 60, 150):
        loss, parts = gradients(batch, micro_tokens=micro_tokens, updates=updates)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def test_more_than_one_update_clips_against_the_sampler():
    """A ratio that is not taken against the sampler's own logprobs: --updates above 1 would never be
    clipped. These tokens are already far likelier than when they were sampled: nothing is left to push."""
    for updates in (1, 2):
        model = random_model()
        accumulate_gradient(model, list(model.parameters()), [[5, 6]], [0], [[7, 8, 0]], [torch.full((3,), -50.0)],
                            np.array([1.0]), constant=1, s=Settings(updates=updates))
        pushed = any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert pushed == (updates == 1)


def test_micro_batches_hold_every_row_once_and_keep_their_size():
    """Rows lost or trained twice; memory beyond what was asked for."""
    lengths = np.array([5, 80, 3, 40, 41, 9, 200])
    parts = list(bcr.micro_batches(lengths, 100))
    assert sorted(row for part in parts for row in part) == list(range(7))
    assert all(len(part) * lengths[part].max() <= 100 for part in parts if len(part) > 1)


@pytest.mark.parametrize("kind, sizes", [
    ("qwen2", dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, head_dim=128)),
    ("qwen3", dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128))])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_pass_keeps_is_foreseen(kind, sizes, checkpointing):
    """Memory that is foreseen wrongly: a pass that runs out of it, or passes ten times smaller than need be."""
    tokens, sizes = 32, {name: size // 8 if name != "head_dim" else size for name, size in sizes.items()} | dict(num_attention_heads=8, num_key_value_heads=2)
    model = random_model(kind, num_hidden_layers=6, **sizes)
    model.checkpointing = checkpointing
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros(1, tokens, dtype=torch.int64), cache=bcr.Past(
            prefill(model, [[1, 2]]), torch.tensor([0]), torch.tensor([1]), tokens))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens
    model.checkpointing = False
    layer = bcr.activation_bytes(model) / 6  # under checkpointing one layer's come back in the backward pass
    model.checkpointing = checkpointing
    assert bcr.activation_bytes(model) == pytest.approx(measured + checkpointing * layer, rel=0.35)


def test_rows_and_passes_are_as_large_as_the_memory():
    """A cache that does not fit, a machine left idle, or a run that stops where smaller passes would have gone on."""
    model = random_model()  # 2 layers x 2 heads x 16, in keys and in values: 512 bytes a token; 24 x 64 for the logits
    assert bcr.rows_that_fit(model, 256, 100, free=1e12) == 256
    assert bcr.rows_that_fit(model, 256, 100, free=10 * (512 * 100 + 24 * 64) / 0.8 + 1) == 10
    assert bcr.rows_that_fit(model, 256, 100, free=0) == 1
    s = Settings(budget="1000")
    bcr.passes_that_fit(model, list(model.parameters()), s, free=1e12)
    assert (model.checkpointing, s.micro_tokens) == (False, 16384)
    whole, others = 16384 * bcr.activation_bytes(model), 12 * sum(p.numel() for p in model.parameters()) + 12 * 2**26
    bcr.passes_that_fit(model, list(model.parameters()), s, free=(0.99 * whole + others) / 0.8)
    assert (model.checkpointing, s.micro_tokens) == (True, 16384)
    bcr.passes_that_fit(model, list(model.parameters()), s, free=(0.2 * whole + others) / 0.8)
    assert model.checkpointing and 256 < s.micro_tokens < 16384
    s, model.checkpointing = Settings(budget="20"), False  # a step of 2,560 tokens at most
    bcr.passes_that_fit(model, list(model.parameters()), s, free=(0.2 * whole + others) / 0.8)
    assert (model.checkpointing, s.micro_tokens) == (False, 16384)
    assert 0 < bcr.free_memory(torch.device("cpu")) < 1e15


def whole_logprobs(model, prompt, completion, temperature):
    """The textbook way: one forward pass over the whole row, one softmax over all its logits."""
    logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(completion)), completion]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_logprobs_are_those_of_the_whole_softmax(batch, family):
    """A shift by one, prompt tokens in the loss, a missing temperature, a chunk's boundary, a row
    that sees another row's prompt or its padding."""
    prompts, owners, completions, _, _ = batch
    model = random_model(family)
    expected = [whole_logprobs(model, prompts[p], c, 0.8) for p, c in zip(owners, completions)]
    for logits in (1, 500, 2**26):
        torch.testing.assert_close(token_logprobs(model, prefill(model, prompts), prompts, owners, completions, 0.8, logits),
                                   torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_whole_rows(batch, family, checkpointing):
    """Prompts that are computed once must still learn: their part of the gradient comes through
    their keys and values, from all their rows."""
    prompts, owners, completions, _, advantages = batch
    model = random_model(family)
    rows = [whole_logprobs(model, prompts[p], c, 1.0).sum() * a for p, c, a in zip(owners, completions, advantages)]
    (-sum(rows) / 1000).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpointing = checkpointing
    accumulate_gradient(model, list(model.parameters()), *batch, constant=1000, s=Settings(micro_tokens=60))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_eos_gets_a_gradient(batch):
    """EOS masked as padding: the model would never learn to stop. With an advantage on a completion
    that is EOS alone, the gradient must reach EOS's own row of the head."""
    model = random_model("llama", tie_word_embeddings=False)
    accumulate_gradient(model, list(model.parameters()), [[5, 6]], [0], [[0]], [torch.zeros(1)], np.array([1.0]),
                        constant=1, s=Settings())
    gradient = model.lm_head.weight.grad.norm(dim=1)
    assert gradient[0] > 0.1 * gradient.sum()  # pushing EOS up pushes all others down


def test_bfloat16_gradients_are_summed_in_float32(batch):
    """Master weights that do not get the gradient, or get it rounded after each micro-batch."""
    model = random_model("qwen2", tie_word_embeddings=False).to(torch.bfloat16)
    master = [p.detach().float().requires_grad_() for p in model.parameters()]
    accumulate_gradient(model, master, *batch, constant=1000, s=Settings(micro_tokens=60))
    _, exact = gradients(batch)
    assert all(p.grad is None for p in model.parameters())
    for ours, name in zip(master, exact):
        assert ours.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(ours.grad.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.98, name


# ----------------------------------------------------------------------------------------------
# Credit to go

SOLVED = ("### Problem 1\n1 + 1 = 2.\nAnswer 1: \\boxed{2}\n\n### Problem 2\n2 + 2 = 4.\nAnswer 2: \\boxed{4}\n\n"
          "### Problem 3\n3 + 3 = 7.\nAnswer 3: \\boxed{7}")


def sections(chat, text, golds=("2", "4", "6"), cut=None):
    ids = chat.tokenizer.encode(text, add_special_tokens=False).ids[:cut] + [0]
    text = bcr.decode(chat, [ids])[0]
    return ids, bcr.sections_of(chat, text, ids, check([text], [list(golds)])[0], list(golds), bcr.score)


def test_each_token_belongs_to_the_section_it_stands_in(shipped):
    """Credit shifted by a token or a section: a header would be paid for the problem before it. EOS
    belongs to the last section, and sections that the cut took away are no disorder."""
    _, chat = shipped
    ids, of_token = sections(chat, SOLVED)
    for i in range(3):
        part = bcr.decode(chat, [[token for token, section in zip(ids, of_token) if section == i]])[0].strip()
        assert part.startswith(f"### Problem {i + 1}") and part.endswith("}") and part.count("###") == 1
    assert of_token[-1] == 2 and (np.diff(of_token) >= 0).all()
    _, cut = sections(chat, SOLVED, cut=30)
    assert set(cut) == {0, 1}


@pytest.mark.parametrize("text", [
    "The answers are 2, 4 and 6.", SOLVED.replace("Problem 1", "Problem 2", 1), SOLVED.replace("Problem 3", "Problem 4"),
    SOLVED + "\n\n### Problem 4\nAnswer 4: \\boxed{8}", SOLVED + "\n### Problem 1\n",
    SOLVED + "\nAnswer 1: \\boxed{3}",  # mended for the worse: what section 1 had earned is lost in section 3
    SOLVED.replace("{4}", "{5}") + "\nAnswer 2: \\boxed{4}"])  # and for the better
def test_sections_in_disorder_are_not_guessed(shipped, text):
    """Credit for a problem that a later section still changes: the gradient would be another one's."""
    assert sections(shipped[1], text)[1] is None


def test_credit_to_go_has_the_same_expected_gradient_and_less_variance():
    """The derivation, on a model that can be summed exactly: four sections of one token of two values,
    the chance of 1 depending on the tokens before; problem i is right if its token is 1."""
    torch.manual_seed(0)
    parameters = torch.randn(2, 4)  # logit of token t: bias, and weight of the number of ones before
    paths = np.array(list(np.ndindex(2, 2, 2, 2)), dtype=float)  # all 16 completions, (16, 4)
    before = paths.cumsum(axis=1) - paths
    chance = 1 / (1 + np.exp(-(parameters[0].numpy() + parameters[1].numpy() * before)))
    probability = np.where(paths == 1, chance, 1 - chance).prod(axis=1)
    scores = np.stack([paths - chance, (paths - chance) * before])  # d log pi / d parameter, (2, 16, 4), each of one token
    rng, found = np.random.default_rng(0), {"sequence": [], "togo": []}
    for _ in range(4000):
        rows = rng.choice(16, size=8, p=probability)  # one group
        correct, none = paths[rows], np.zeros(8)
        whole = advantages_of(correct.mean(axis=1)[None])[0]
        togo = np.stack(bcr.advantages_to_go(correct, none, [np.arange(4)] * 8, 8))  # (8, 4)
        assert np.allclose(togo[:, 0], whole)
        found["sequence"].append((scores[:, rows] * whole[:, None]).sum(axis=1).ravel() / 7)
        found["togo"].append((scores[:, rows] * togo).sum(axis=1).ravel() / 7)
    value = paths.mean(axis=1)
    exact = (scores * (probability * value)[:, None]).sum(axis=1).ravel()
    variance = {}
    for name, gradients_ in found.items():
        gradients_ = np.array(gradients_)
        variance[name] = gradients_.var(axis=0).sum()
        assert np.abs(gradients_.mean(axis=0) - exact).max() < 4 * np.sqrt(gradients_.var(axis=0).max() / 4000), name
    assert variance["togo"] < 0.9 * variance["sequence"]


def test_rows_without_sections_and_penalties_keep_the_credit_of_the_whole():
    """A row that falls back would otherwise be credited for nothing, or a penalty forgotten."""
    correct, penalties = np.array([[1, 0], [1, 1], [0, 1], [0, 0.0]]), np.array([0.1, 0.2, 0.3, 0.0])
    whole = advantages_of((correct.mean(axis=1) - penalties)[None])[0]
    found = bcr.advantages_to_go(correct, penalties, [None, np.array([0, 0, 1]), None, None], 4)
    assert [len(row) for row in found] == [1, 3, 1, 1]
    assert np.allclose([row[0] for row in found], whole)
    last = correct[:, 1] / 2 - penalties
    assert found[1][2] == pytest.approx(last[1] - last.mean())


# ----------------------------------------------------------------------------------------------
# Evaluation


def test_intervals_respect_that_problems_share_a_prompt():
    """Intervals that are too narrow for N > 1, or empty where all answers are right."""
    rng = np.random.default_rng(0)
    single = (rng.random((400, 1, 1)) < 0.8).astype(float)  # (P, k, N)
    low, high = interval95(single)
    assert low < single.mean() < high and 0.06 < high - low < 0.10  # 2 * 1.96 * sqrt(.8 * .2 / 400)
    low4, high4 = interval95(np.repeat(single[:100], 4, axis=2))  # four equal answers: 100 trials, not 400
    assert (high4 - low4) > 1.8 * (high - low)
    low, high = interval95(np.ones((100, 1, 4)))
    assert high == 1 and 0.98 < low < 1


def test_waits_are_counted_as_words():
    """`waiter` counted, or `Wait,` missed."""
    assert bcr.wait_loops("Wait, check. wait! The waiter awaits. WAIT") == 3
