"""
Sampling G completions of each of P prompts, and the logprobs of completions for training. They
stand side by side because they must agree: training uses exactly the distribution that was sampled
from, without top-k or top-p.

(1) A completion depends on nothing but its place: each token is drawn with a number that is a
function of (seed, step, prompt, sample, token). On a CPU in float32, with one thread, not even the
last bit of a logprob depends on the rows next to it. (2) All rows share one cache; each row has its
own position in it. (3) A prompt is computed once, and its keys and values are copied to its
samples. (4) A row that ends leaves the batch at once, and the next completion takes its slot.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from model import causal_attention


@dataclass
class Completion:
    """One sample. It has no padding: a loss over its tokens needs no mask, and EOS counts."""

    tokens: list[int]  # as sampled, EOS included
    logprobs: torch.Tensor  # (T,) float32 on the CPU, of the distribution that was sampled from
    truncated: bool  # ended by the budget, not by EOS


def uniforms(seed, step, prompt, sample, count):
    """The `count` numbers in [0, 1) that decide the tokens of one sample, float64 (count,). Philox
    (Salmon et al. 2011) is a counter-based generator: each sample has its own stream, and number t
    of a stream is the same however many are drawn."""
    key = np.array([seed, step], np.uint64)
    counter = np.array([0, 0, prompt, sample], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).random(count)


def log_probabilities(model, hidden, temperature):
    """The distribution of the next token that is sampled from and trained. hidden: (n, C). Returns
    float32 (n, V). A temperature of 0 takes the likeliest token of that of temperature 1."""
    logits = model.head(hidden).float()
    if temperature not in (0, 1):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


# ----------------------------------------------------------------------------------------------
# What a token attends to
#
# Each layer of the model calls attend(layer, q, k, v) of one of three objects:
#   Prefix        computes a prompt and keeps its keys and values;
#   Cache         samples: one new token per row attends to all tokens before it;
#   SharedPrompt  trains: B completions attend to their one prompt and to themselves.


class Prefix:
    """Causal attention over a prompt without its last token, which sampling feeds. Keys and values
    are kept. A prompt is computed alone: padded next to others, it would round differently."""

    def __init__(self, model, prompt):
        self.kv = []  # of each layer: (2, K, T, D)
        if len(prompt) > 1:
            tokens = torch.tensor([prompt[:-1]], device=model.device)
            model.hidden(tokens, attention=self)

    def attend(self, layer, q, k, v):
        self.kv.append(torch.cat((k, v)))
        return causal_attention(q, k, v)


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens, written one token at a time,
    each row at its own position. Attention sees the first `filled` tokens only. Each layer has its
    own tensor: AdamW's state would break up a block of half the GPU."""

    def __init__(self, config, rows, length, dtype):
        shape = (2, rows, config.num_key_value_heads, length, config.head_dim)  # (2, R, K, T, D)
        self.kv = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def at(self, positions, filled):
        """Sets where the next token of rows 0..n-1 goes. positions: (n,), below `filled`."""
        device = positions.device
        self.positions = positions
        self.rows = torch.arange(len(positions), device=device)
        unseen = torch.arange(filled, device=device) > positions[:, None]  # (n, T)
        mask = torch.where(unseen, -torch.inf, 0.0).to(self.kv[0].dtype)
        self.mask = mask[:, None, None]  # (n, 1, 1, T)
        return self

    def attend(self, layer, q, k, v):
        """Adds k and v (n, K, 1, D) of a new token. Its q (n, H, 1, D) attends to its row."""
        n, K, _, D = k.shape
        filled = self.mask.shape[-1]
        keys, values = self.kv[layer]  # (R, K, T, D)
        keys[self.rows, :, self.positions] = k[:, :, 0]  # (n, K, D)
        values[self.rows, :, self.positions] = v[:, :, 0]
        k = keys[:n, :, :filled]  # (n, K, T, D)
        v = values[:n, :, :filled]
        q = q.reshape(n, K, -1, D)  # the group of H/K heads that share a key are its queries
        if q.is_cpu and q.dtype == torch.float32:
            # Sum over keys in blocks of 256. Longer products round differently, and what a row
            # computes must not depend on `filled`, the length of the longest row next to it.
            scores = (q * D**-0.5) @ k.mT + self.mask  # (n, K, H/K, T)
            weights = torch.softmax(scores, dim=-1)
            blocks = zip(weights.split(256, dim=3), v.split(256, dim=2))
            y = sum(w @ block for w, block in blocks)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return y.reshape(n, -1, 1, D)


@dataclass
class SharedPrompt:
    """Attention of B sequences that begin with the same S tokens. The model's input is
    (1, S + B T): the S tokens once, then the T other tokens of each sequence. Attention sees B
    complete sequences; everything else is computed once for the S tokens."""

    prompt_length: int  # S
    sequences: int  # B

    def attend(self, layer, q, k, v):
        y = causal_attention(self.unpack(q), self.unpack(k), self.unpack(v))  # (B, H, S + T, D)
        prompt, others = y.tensor_split((self.prompt_length,), dim=2)
        others = others.transpose(0, 1).flatten(1, 2)  # (H, B T, D)
        return torch.cat((prompt[:1], others[None]), dim=2)

    def unpack(self, x):
        """(1, heads, S + B T, D) -> (B, heads, S + T, D)"""
        prompt, others = x.tensor_split((self.prompt_length,), dim=2)
        others = others[0].unflatten(1, (self.sequences, -1)).transpose(0, 1)  # (B, heads, T, D)
        return torch.cat((prompt.expand(self.sequences, -1, -1, -1), others), dim=2)


# ----------------------------------------------------------------------------------------------
# Sizes. A GPU should neither wait for the host nor see many shapes.

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two looks of the host for rows that ended
LENGTH_MULTIPLE = {"cpu": 16, "cuda": 256}  # to which the number of cached tokens is rounded up


def round_up(value, multiple):
    return -(-value // multiple) * multiple


def row_multiple(device):
    """The multiple to which the number of rows in a step is rounded up. On a GPU it keeps the
    shapes few. On a CPU with one thread it gives a row the same bits whatever the number of rows:
    smaller products use other kernels, which round differently (measured: below 16 rows with
    AVX-512, below 64 with AVX2)."""
    if device.type == "cuda":
        return 32
    if torch.get_num_threads() > 1:
        return 1
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64


def row_bytes(config, length, dtype):
    """Bytes on a GPU for each row: keys and values, what `Slots` holds, and one token's tensors
    over the vocabulary, held twice (by the eager step and in the pool of the graphs)."""
    size = dtype.itemsize
    token = 2 * size * config.num_key_value_heads * config.head_dim  # a key and a value
    cache = config.num_hidden_layers * token * length
    state = 20 * (length + 1)  # 8 for the tokens, 8 for the noise, 4 for the logprobs
    # Logits, 4 each for float32 logits, logprobs and probabilities, 8 for the CDF.
    vocabulary = (size + 20) * config.vocab_size
    return cache + state + 2 * vocabulary


def rows_that_fit(config, length, dtype, free, max_rows):
    """At most `max_rows`: as many rows of `length` tokens as fit `free` bytes. A tenth is left over
    for CUDA graphs, a prompt, and gaps between blocks."""
    rows = int(0.9 * free) // row_bytes(config, length, dtype)
    return max(1, min(max_rows, rows))


def rows_at_a_time(model, length, max_rows):
    """`max_rows`; on a GPU at most as many as fit its free memory, on a CPU a complete multiple."""
    device = model.device
    if device.type == "cpu":
        return round_up(max_rows, row_multiple(device))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return rows_that_fit(model.config, length, model.dtype, free, max_rows)


# ----------------------------------------------------------------------------------------------
# Sampling


class Slots:
    """The state of the rows: slots 0..n-1 are sampling, the others are free. A token has one place
    in all of it: its position."""

    def __init__(self, model, rows, length):
        self.n = 0
        self.filled = 0  # cached tokens of the longest row, at most
        self.job = np.zeros(rows, dtype=np.int64)  # the index of the completion
        with model.device:
            self.cache = Cache(model.config, rows, length, model.dtype)
            self.rotations = model.rotations(torch.arange(length))  # (2, length, D)
            self.tokens = torch.zeros(rows, length + 1, dtype=torch.int64)
            self.noise = torch.zeros(rows, length + 1, dtype=torch.float64)  # of the token after
            self.logprobs = torch.zeros(rows, length + 1)  # of the token after
            self.start = torch.zeros(rows, dtype=torch.int64)  # the prompt's last token
            self.position = torch.zeros(rows, dtype=torch.int64)  # the token to feed next
            self.alive = torch.zeros(rows, dtype=torch.bool)  # neither EOS nor the budget came

    def add(self, job, prompt, prefix, noise):
        """Starts completion number `job`. noise: (budget,)."""
        row = self.n
        start = len(prompt) - 1
        for cached, kv in zip(self.cache.kv, prefix.kv):
            cached[:, row, :, :start] = kv  # (2, K, T, D)
        self.tokens[row, start] = prompt[-1]
        self.noise[row, start : start + len(noise)] = torch.from_numpy(noise)
        self.start[row] = start
        self.position[row] = start
        self.alive[row] = True
        self.job[row] = job
        self.n += 1
        self.filled = max(self.filled, start)

    def remove(self, done):
        """Frees the slots where done (n,) is true; rows from the end move into the holes."""
        kept = int(self.n - done.sum())
        holes = done[:kept].nonzero()[0]
        movers = kept + (~done[kept:]).nonzero()[0]
        cached = [kv[..., :self.filled, :].transpose(0, 1) for kv in self.cache.kv]
        for state in (*cached, self.tokens, self.noise, self.logprobs, self.start, self.position,
                      self.alive, self.job):
            state[holes] = state[movers]
        self.alive[kept:self.n] = False
        self.n = kept
        self.filled = max(self.position[:kept].tolist(), default=0)

    def completion(self, row, eos_ids):
        start = self.start[row]
        end = self.position[row]
        tokens = self.tokens[row, start + 1 : end + 1].tolist()
        logprobs = self.logprobs[row, start:end].to("cpu", copy=True)
        return Completion(tokens, logprobs, truncated=tokens[-1] not in eos_ids)


def sample_token(model, slots, eos, budget, temperature, n, filled):
    """Samples one token for each of the first n rows, by inverting the CDF in float64 at the number
    drawn for it. Rows that are not alive do not move. Nothing here waits for the device."""
    position = slots.position[:n]  # (n,), a view: what is added to it moves the rows
    alive = slots.alive[:n]
    place = position[:, None]  # (n, 1)
    rotation = slots.rotations[:, place]  # (2, n, 1, D)
    cache = slots.cache.at(position, filled)
    hidden = model.hidden(slots.tokens.gather(1, place), rotation, cache)  # (n, 1, C)
    logp = log_probabilities(model, hidden[:, 0], temperature)  # (n, V)
    if temperature:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = slots.noise.gather(1, place)  # (n, 1)
        u = u * cdf[:, -1:]  # the probabilities sum to 1 only up to rounding
        token = torch.searchsorted(cdf, u, right=True)  # (n, 1): the first whose CDF exceeds u
        token = token.clamp(max=logp.shape[1] - 1)  # none does if the logits are not finite
    else:
        token = logp.argmax(-1, keepdim=True)
    slots.tokens.scatter_(1, place + 1, token)
    slots.logprobs.scatter_(1, place, logp.gather(1, token))
    position += alive
    alive &= (position - slots.start[:n] < budget) & (token != eos).all(dim=1)


def cuda_graphs(step):
    """step(n, filled) as CUDA graphs, one for each pair of sizes. The first call of a pair runs
    eagerly, the second is recorded, and later calls launch its hundreds of kernels at once."""
    graphs = {}
    pool = torch.cuda.graph_pool_handle()  # one graph replays at a time, so all share their memory

    def run(*sizes):
        if sizes not in graphs:
            graphs[sizes] = None
            return step(*sizes)
        if graphs[sizes] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(*sizes)
            graphs[sizes] = graph
        graphs[sizes].replay()

    return run


WRAPPERS = {"cpu": lambda step: step, "cuda": cuda_graphs}


@torch.inference_mode()
def generate(model, prompts, samples, budget, *, eos_ids, temperature=1.0, seed=0, step=0,
             prompt_keys=None, max_rows=256, on_finished=lambda: None):
    """Samples `samples` completions of each prompt, of at most `budget` tokens each. Returns
    Completions in the order (prompt, sample).

    prompts: P lists of token ids. prompt_keys: P integers that identify the prompts in the random
    stream (default 0..P-1). max_rows: how many completions are sampled at a time (on a CPU rounded
    up; on a GPU as many as fit). on_finished(): called when a completion ends."""
    device = model.device
    keys = prompt_keys or range(len(prompts))
    total = len(prompts) * samples
    length = max(map(len, prompts)) + budget
    if device.type == "cpu":  # memory for a complete multiple, so that no step has a remainder
        length = round_up(length, LENGTH_MULTIPLE["cpu"])
    max_rows = rows_at_a_time(model, length, min(max_rows, total))
    slots = Slots(model, max_rows, length)
    eos = torch.tensor(eos_ids, device=device)
    one_token = WRAPPERS[device.type](
        lambda n, filled: sample_token(model, slots, eos, budget, temperature, n, filled))
    finished = [None] * total
    started = 0  # completions started so far, in the order (prompt, sample)
    while slots.n or started < total:
        # Fill the free slots.
        while started < total and slots.n < max_rows:
            p, sample = divmod(started, samples)
            if sample == 0:
                prefix = Prefix(model, prompts[p])
            noise = uniforms(seed, step, keys[p], sample, budget)
            slots.add(started, prompts[p], prefix, noise)
            started += 1

        # Sample a few tokens of each row, without looking.
        n = min(round_up(slots.n, row_multiple(device)), max_rows)
        for _ in range(LOOK_EVERY[device.type]):
            slots.filled += 1
            filled = round_up(slots.filled, LENGTH_MULTIPLE[device.type])
            one_token(n, min(filled, length))

        # Take out the rows that ended.
        done = ~slots.alive[:slots.n].cpu().numpy()
        for row in done.nonzero()[0]:
            finished[slots.job[row]] = slots.completion(row, eos_ids)
            on_finished()
        if done.any():
            slots.remove(done)
    return finished


# ----------------------------------------------------------------------------------------------
# Training


def token_logprobs(model, rows, temperature, max_logits=2**26):
    """Log-probabilities of the completions of one prompt, row after row: float32 (M,), where M is
    the sum of their lengths. The prompt is computed once for all of them. Logits are computed in
    chunks of at most `max_logits` and again in the backward pass: for a large vocabulary those of
    all tokens would not fit in memory."""
    device = model.device
    *prompt, last = rows[0].prompt  # each token is predicted at the one before it
    inputs = [torch.tensor([last, *row.tokens[:-1]]) for row in rows]
    inputs = pad_sequence(inputs, batch_first=True)  # (B, T)
    S = len(prompt)
    B, T = inputs.shape
    prompt = torch.tensor(prompt, dtype=torch.int64)  # (S,)
    tokens = torch.cat((prompt, inputs.flatten()))  # (S + B T,): the prompt once, then B times T
    positions = torch.cat((torch.arange(S), torch.arange(S, S + T).repeat(B)))  # (S + B T,)
    rotation = model.rotations(positions[None].to(device))
    shared = SharedPrompt(S, B) if B > 1 else None
    hidden = model.hidden(tokens[None].to(device), rotation, shared)  # (1, S + B T, C)

    # Leave out the padding. The host knows where it is: the device does not have to search for it.
    where = [S + b * T + torch.arange(len(row.tokens)) for b, row in enumerate(rows)]
    hidden = hidden[0, torch.cat(where).to(device)]  # (M, C)
    targets = torch.cat([torch.tensor(row.tokens) for row in rows]).to(device)  # (M,)

    def logprobs_of(hidden, targets):
        logp = log_probabilities(model, hidden, temperature)  # (chunk, V)
        return logp.gather(1, targets[:, None])[:, 0]

    chunk = max(1, max_logits // model.config.vocab_size)
    if len(targets) <= chunk:
        return logprobs_of(hidden, targets)
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False) for h, t in chunks])
