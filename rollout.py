"""
Sampling: G completions of each of P prompts, as fast as plain PyTorch allows.

Four ideas, in the order in which they appear below. (1) Every random number is fixed before sampling starts,
by (seed, step, prompt, sample, token) alone, so samples depend neither on the batch size nor on the order of
the work; on a CPU in float32 not even the last bit of a logprob does. (2) Keys and values are stored in one
cache that is allocated once; each row has its own position in it. (3) A prompt is computed once, and its keys
and values are copied to its G samples. (4) A row that ends leaves the batch at once, and the next prompts
take the free rows.

No part of the distribution is cut off (no top-k, no top-p): training uses exactly what was sampled from.
"""

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data.files import UserError
from model import causal_attention


@dataclass
class Completion:
    """One sample. It has no padding: a loss over its tokens needs no mask, and EOS counts like any token."""

    tokens: list[int]  # as sampled, EOS included
    logprobs: torch.Tensor  # (T,) float32 on the CPU, under the distribution each token was drawn from
    truncated: bool  # ended by the budget, not by EOS


def uniforms(seed, step, prompt, sample, count):
    """The `count` numbers in [0, 1) that decide the tokens of one sample, float64 (count,).

    Philox (Salmon et al. 2011) is a counter-based generator: each sample has its own stream, and number t of
    a stream is the same however many are drawn."""
    key, counter = np.array([seed, step], np.uint64), np.array([0, 0, prompt, sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens, written one token at a time, each row at
    its own position. Attention sees the first `filled` tokens only."""

    def __init__(self, config, rows, length, dtype, device):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, R, K, T, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def at(self, positions, filled):
        """Sets where the next token of rows 0..n-1 goes. positions: (n,); filled: more than the largest."""
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        unseen = torch.arange(filled, device=positions.device) > positions[:, None]  # (n, T)
        mask = torch.zeros(unseen.shape, dtype=self.k.dtype, device=positions.device)
        self.mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]  # (n, 1, 1, T), added to the scores
        return self

    def attend(self, layer, q, k, v):
        """Adds k and v (n, K, 1, D) of a new token; its q (n, H, 1, D) attends to all tokens of its row."""
        n, K, _, D = k.shape
        filled = self.mask.shape[-1]
        self.k[layer][self.rows, :, self.positions] = k[:, :, 0]  # (n, K, D)
        self.v[layer][self.rows, :, self.positions] = v[:, :, 0]
        k, v = self.k[layer, :n, :, :filled], self.v[layer, :n, :, :filled]  # (n, K, T, D)
        q = q.reshape(n, K, -1, D)  # the H/K heads that share a key/value head are its queries
        if q.is_cuda or q.dtype != torch.float32:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).reshape(n, -1, 1, D)
        # On a CPU the values are added up in blocks of 256 keys. Longer products round differently, and what
        # a row computes must not depend on `filled`, which is the length of the longest row next to it.
        weights = torch.softmax((q * D**-0.5) @ k.mT + self.mask, dim=-1)  # (n, K, H/K, T)
        y = sum(w @ block for w, block in zip(weights.split(256, dim=3), v.split(256, dim=2)))
        return y.reshape(n, -1, 1, D)


class Prefix:
    """Takes the place of a cache while a prompt is computed: it keeps each layer's keys and values."""

    def __init__(self):
        self.k, self.v = [], []  # for each layer: (1, K, T, D)

    def attend(self, layer, q, k, v):
        self.k.append(k)
        self.v.append(v)
        return causal_attention(q, k, v)


def prefill(model, prompt):
    """Keys and values, two (L, K, T, D), of all but the last token of a prompt: sampling feeds that one.

    Prompts are computed one at a time: next to others, a prompt would be padded and round differently."""
    c, prefix = model.config, Prefix()
    if len(prompt) == 1:
        empty = torch.zeros(c.num_hidden_layers, c.num_key_value_heads, 0, c.head_dim, dtype=model.dtype)
        return empty.to(model.device), empty.to(model.device)
    model.hidden(torch.tensor([prompt[:-1]], device=model.device), attention=prefix)
    return torch.cat(prefix.k), torch.cat(prefix.v)


# How often the host looks for rows that ended, in tokens, and the multiple to which the number of cached
# tokens is rounded up: a GPU should neither wait for the host nor see many shapes.
PACE = {"cpu": (1, 16), "cuda": (8, 256)}


def round_up(value, multiple, most=2**62):
    return min(-(-value // multiple) * multiple, most)


def row_multiple(model):
    """The multiple to which the number of rows in a step is rounded up.

    On a GPU it keeps the shapes few. On a CPU it is the smallest multiple at which a product of this model
    gives a row the same bits whatever the number of rows: small products use other kernels, which round
    differently. Measured on a processor with AVX-512 it is 16, and 64 with AVX2."""
    if model.device.type == "cuda":
        return 32
    if torch.get_num_threads() > 1:
        return 1  # rounding depends on the number of threads, too
    shapes = {tuple(p.shape) for p in model.model.layers[0].parameters() if p.dim() == 2}
    for multiple in (16, 32):
        if all(rows_round_alike(*shape, model.dtype, multiple) for shape in shapes):
            return multiple
    return 64


@functools.lru_cache
def rows_round_alike(outputs, inputs, dtype, multiple, most=256):
    """Whether the first rows of a product are the same for all multiples of rows up to `most`."""
    x, weight = (torch.linspace(-1, 1, rows * inputs).cos().view(rows, inputs).to(dtype)
                 for rows in (most, outputs))
    product = F.linear(x, weight)  # (most, outputs)
    return all(torch.equal(F.linear(x[:rows], weight), product[:rows])
               for rows in range(multiple, most, multiple))


def captured(step):
    """step(n, filled) as CUDA graphs, one for each pair of sizes. The first call of a pair runs eagerly, the
    second is recorded, and later calls replay the hundreds of kernels of a token with one launch."""
    graphs = {}

    def run(*sizes):
        if sizes not in graphs:
            graphs[sizes] = None
            return step(*sizes)
        if graphs[sizes] is None:
            graph, others = torch.cuda.CUDAGraph(), [graph for graph in graphs.values() if graph]
            # One graph replays at a time, so all share one memory pool.
            with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
                step(*sizes)
            graphs[sizes] = graph
        graphs[sizes].replay()

    return run


class Rows:
    """The state of the rows at work: rows 0..n-1 are sampling, the others are free."""

    def __init__(self, model, rows, budget, length):
        device = model.device
        self.n = 0
        self.cache = Cache(model.config, rows, length, model.dtype, device)
        self.rotations = model.rotations(torch.arange(length, device=device))  # (2, length, D)
        self.noise = torch.zeros(rows, budget + 1, dtype=torch.float64, device=device)
        # The last column takes the writes of rows that are done.
        self.tokens = torch.zeros(rows, budget + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, budget + 1, dtype=torch.float32, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)  # the token to feed next
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)  # where it goes
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens sampled so far
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)  # neither EOS nor the budget came
        self.job = np.zeros(rows, dtype=np.int64)  # the index of the completion
        self.reach = np.zeros(rows, dtype=np.int64)  # at least `position`; on the host, needs no sync

    def add(self, jobs, prompts, prefixes, noise):
        """Starts the completions `jobs` in the free rows. All arguments are lists with one entry for each."""
        free = slice(self.n, self.n + len(jobs))
        for row, (k, v) in enumerate(prefixes, start=self.n):
            self.cache.k[:, row, :, :k.shape[2]] = k
            self.cache.v[:, row, :, :v.shape[2]] = v
        self.noise[free, :-1] = torch.from_numpy(np.stack(noise)).to(self.noise.device)
        self.last[free] = torch.tensor([prompt[-1] for prompt in prompts], device=self.last.device)
        self.job[free] = jobs
        self.reach[free] = [len(prompt) - 1 for prompt in prompts]
        self.position[free] = torch.from_numpy(self.reach[free]).to(self.position.device)
        self.count[free], self.alive[free] = 0, True
        self.n += len(jobs)

    def remove(self, done):
        """Frees the rows where done (n,) is true; rows from the end move into the holes."""
        kept = self.n - done.sum()
        holes = done[:kept].nonzero()[0]
        movers = kept + (~done[kept:]).nonzero()[0]
        filled = int(self.reach[:self.n].max()) + 1
        if len(holes):
            for kv in (*self.cache.k, *self.cache.v):  # (R, K, T, D) of one layer
                kv[holes, :, :filled] = kv[movers, :, :filled]
            for state in (self.noise, self.tokens, self.logprobs, self.last, self.position, self.count,
                          self.alive, self.job, self.reach):
                state[holes] = state[movers]
        self.alive[kept:self.n] = False
        self.n = int(kept)


def sample_token(model, rows, eos, budget, temperature, n, filled):
    """Samples one token for each of the first n rows, by inverting the CDF in float64 at the number drawn for
    it. Rows that are not alive do not move. Nothing here waits for the host."""
    cache = rows.cache.at(rows.position[:n], filled)
    rotation = rows.rotations[:, rows.position[:n, None]]  # (2, n, 1, D)
    hidden = model.hidden(rows.last[:n, None], rotation, cache)[:, 0]  # (n, C)
    logp = torch.log_softmax(model.head(hidden).float() / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = rows.noise[:n].gather(1, rows.count[:n, None]) * cdf[:, -1:]  # the sum is 1 up to rounding
        token = torch.searchsorted(cdf, u, right=True)  # (n, 1): the first whose CDF exceeds u
        token = token.clamp(max=logp.shape[-1] - 1)  # none does if the logits are not finite
    else:
        token = logp.argmax(-1, keepdim=True)
    rows.tokens[:n].scatter_(1, rows.count[:n, None], token)
    rows.logprobs[:n].scatter_(1, rows.count[:n, None], logp.gather(1, token))
    rows.last[:n] = token[:, 0]
    rows.position[:n] += rows.alive[:n]
    rows.count[:n] += rows.alive[:n]
    rows.alive[:n] &= (token != eos).all(dim=1) & (rows.count[:n] < budget)


def check_length(model, tokens, budget):
    """Raises UserError if a prompt of that many tokens and the budget exceed the model's positions."""
    limit = model.config.max_position_embeddings
    if tokens + budget > limit:
        raise UserError(f"a prompt of {tokens} tokens and a budget of {budget} exceed the {limit} positions "
                        "of this model: lower the budget or N")


@torch.inference_mode()
def generate(model, prompts, samples, budget, *, eos_ids, temperature=1.0, seed=0, step=0, prompt_keys=None,
             max_rows=256, on_finished=lambda: None):
    """Samples `samples` completions of each prompt, of at most `budget` tokens each.

    prompts: P lists of token ids. prompt_keys: P integers that identify the prompts in the random stream
    (default 0..P-1). temperature: 0 takes the most likely token and reports its logprob at temperature 1.
    max_rows: how many completions are sampled at a time (on a CPU rounded up, see `row_multiple`).
    on_finished(): called when a completion ends.

    Returns P * samples Completions in the order (prompt, sample). Raises UserError as `check_length` does."""
    longest = max(len(prompt) for prompt in prompts)
    check_length(model, longest, budget)
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    finished = [None] * (len(prompts) * samples)
    waiting = deque(range(len(finished)))  # job j is sample j % samples of prompt j // samples
    (look_every, length_multiple), at_once = PACE[model.device.type], row_multiple(model)
    max_rows, length = min(max_rows, len(finished)), longest + budget
    if model.device.type == "cpu":  # memory for complete multiples, so that no step has a remainder
        max_rows, length = round_up(max_rows, at_once), round_up(length, length_multiple)
    rows = Rows(model, max_rows, budget, length)
    eos = torch.tensor(eos_ids, device=model.device)

    def one_token(n, filled):
        sample_token(model, rows, eos, budget, temperature, n, filled)

    step_of = captured(one_token) if model.device.type == "cuda" else one_token
    prefixes, since = {}, 0
    while rows.n or waiting:
        # Fill the free rows once a whole group fits (or, if there are fewer rows, once all are free).
        room = max_rows - rows.n
        if waiting and room >= min(samples, max_rows):
            if room >= samples:
                room -= (room - len(waiting)) % samples  # whole groups only
            jobs = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            owners = [job // samples for job in jobs]
            fresh = sorted(set(owners) - prefixes.keys())
            prefixes |= {p: prefill(model, prompts[p]) for p in fresh}
            noise = [uniforms(seed, step, keys[job // samples], job % samples, budget) for job in jobs]
            rows.add(jobs, [prompts[p] for p in owners], [prefixes[p] for p in owners], noise)
            prefixes = {p: prefixes[p] for p in {job // samples for job in waiting} & prefixes.keys()}

        filled = round_up(int(rows.reach[:rows.n].max()) + 1, length_multiple, length)
        step_of(round_up(rows.n, at_once, max_rows), filled)
        rows.reach[:rows.n] += 1
        since += 1
        if since < look_every:
            continue

        since, done = 0, ~rows.alive[:rows.n].cpu().numpy()
        if done.any():
            for row in done.nonzero()[0]:
                count = int(rows.count[row])
                tokens = rows.tokens[row, :count].tolist()
                logprobs = rows.logprobs[row, :count].to("cpu", copy=True)
                finished[rows.job[row]] = Completion(tokens, logprobs, tokens[-1] not in eos_ids)
                on_finished()
            rows.remove(done)
    return finished


# ----------------------------------------------------------------------------------------------
# The same distribution, for training


class SharedPrompt:
    """Takes the place of a cache for B sequences that begin with the same S tokens. The model's input is
    (1, S + B T): the S tokens once, then the T other tokens of each sequence. Attention sees B complete
    sequences; everything else is computed once for the S tokens."""

    def __init__(self, prompt, sequences):
        self.prompt, self.sequences = prompt, sequences  # S, B

    def attend(self, layer, q, k, v):
        y = causal_attention(self.unpack(q), self.unpack(k), self.unpack(v))  # (B, H, S + T, D)
        prompt, others = y.split((self.prompt, y.shape[2] - self.prompt), dim=2)
        return torch.cat((prompt[:1], others.transpose(0, 1).flatten(1, 2)[None]), dim=2)

    def unpack(self, x):
        """(1, heads, S + B T, D) -> (B, heads, S + T, D)"""
        prompt, others = x.split((self.prompt, x.shape[2] - self.prompt), dim=2)
        others = others[0].unflatten(1, (self.sequences, -1)).transpose(0, 1)  # (B, heads, T, D)
        return torch.cat((prompt.expand(self.sequences, -1, -1, -1), others), dim=2)


def token_logprobs(model, rows, temperature, max_logits=2**26):
    """Log-probabilities of the completions of one prompt, row after row: float32 (M,), where M is the sum of
    their lengths. The prompt is computed once for all of them.

    The head and the softmax run over as many tokens at a time as make `max_logits` logits, and again in the
    backward pass: the logits of all tokens, (B, T, V), are what large vocabularies run out of memory on."""
    S = len(rows[0].prompt) - 1
    inputs = pad_sequence([torch.tensor(row.prompt[-1:] + row.tokens[:-1]) for row in rows], batch_first=True)
    B, T = inputs.shape  # each token is predicted at the one before it
    sampled = torch.arange(T) < torch.tensor([len(row.tokens) for row in rows])[:, None]  # (B, T), no padding
    prompt = torch.tensor(rows[0].prompt[:-1], dtype=torch.int64)  # (S,)
    tokens = torch.cat((prompt, inputs.flatten()))[None]  # (1, S + B T): the prompt once, then B times T
    positions = torch.cat((torch.arange(S), torch.arange(S, S + T).repeat(B)))[None]  # (1, S + B T)
    rotation = model.rotations(positions.to(model.device))
    shared = SharedPrompt(S, B) if B > 1 else None
    hidden = model.hidden(tokens.to(model.device), rotation, shared)[0, S:]  # (B T, C)
    hidden = hidden[sampled.flatten().to(model.device)]  # (M, C)
    targets = torch.tensor([token for row in rows for token in row.tokens], device=model.device)  # (M,)

    def logprobs_of(hidden, targets):
        logits = model.head(hidden).float() / temperature  # (chunk, V)
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]

    chunk = max(1, max_logits // model.config.vocab_size)
    if len(targets) <= chunk:
        return logprobs_of(hidden, targets)
    return torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), targets.split(chunk))])
