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

from data.files import UserError
from model import causal_attention


@dataclass
class Completion:
    """One sample. It has no padding: a loss over its tokens needs no mask, and EOS counts."""

    tokens: list[int]  # as sampled, EOS included
    logprobs: torch.Tensor  # (T,) float32 on the CPU, of the distribution that was sampled from
    truncated: bool  # ended by the budget, not by EOS


def uniforms(seed, step, prompt, sample, count):
    """The `count` numbers in [0, 1) that decide the tokens of one sample, float64 (count,).

    Philox (Salmon et al. 2011) is a counter-based generator: each sample has its own stream, and
    number t of a stream is the same however many are drawn."""
    key = np.array([seed, step], np.uint64)
    counter = np.array([0, 0, prompt, sample], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).random(count)


# ----------------------------------------------------------------------------------------------
# What a token attends to
#
# Each layer of the model calls attend(layer, q, k, v) of one of three objects:
#   Prefix        computes a prompt and keeps its keys and values;
#   Cache         samples: one new token per row attends to all tokens before it;
#   SharedPrompt  trains: B completions attend to their one prompt and to themselves.


class Prefix:
    """Causal attention over one prompt, whose keys and values are kept."""

    def __init__(self):
        self.k = []  # of each layer: (1, K, T, D)
        self.v = []

    def attend(self, layer, q, k, v):
        self.k.append(k)
        self.v.append(v)
        return causal_attention(q, k, v)


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens, written one token at a time,
    each row at its own position. Attention sees the first `filled` tokens only.

    Each layer has its own tensors. AdamW's state would break up two blocks of half the GPU."""

    def __init__(self, config, rows, length, dtype, device):
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # (R, K, T, D)
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def at(self, positions, filled):
        """Sets where the next token of rows 0..n-1 goes. positions: (n,), below `filled`."""
        device = positions.device
        self.positions = positions
        self.rows = torch.arange(len(positions), device=device)
        unseen = torch.arange(filled, device=device) > positions[:, None]  # (n, T)
        mask = torch.zeros(unseen.shape, dtype=self.k[0].dtype, device=device)
        self.mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]  # (n, 1, 1, T)
        return self

    def attend(self, layer, q, k, v):
        """Adds k and v (n, K, 1, D) of a new token. Its q (n, H, 1, D) attends to its row."""
        n, K, _, D = k.shape
        filled = self.mask.shape[-1]
        keys = self.k[layer]  # (R, K, T, D)
        values = self.v[layer]
        keys[self.rows, :, self.positions] = k[:, :, 0]  # (n, K, D)
        values[self.rows, :, self.positions] = v[:, :, 0]
        k = keys[:n, :, :filled]  # (n, K, T, D)
        v = values[:n, :, :filled]
        q = q.reshape(n, K, -1, D)  # the group of H/K heads that share a key are its queries
        if not q.is_cpu or q.dtype != torch.float32:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            return y.reshape(n, -1, 1, D)
        # On a CPU, sum over keys in blocks of 256. Longer products round differently, and what a
        # row computes must not depend on `filled`, the length of the longest row next to it.
        scores = (q * D**-0.5) @ k.mT + self.mask  # (n, K, H/K, T)
        weights = torch.softmax(scores, dim=-1)
        blocks = zip(weights.split(256, dim=3), v.split(256, dim=2))
        y = sum(w @ block for w, block in blocks)
        return y.reshape(n, -1, 1, D)


class SharedPrompt:
    """Attention of B sequences that begin with the same S tokens. The model's input is
    (1, S + B T): the S tokens once, then the T other tokens of each sequence. Attention sees B
    complete sequences; everything else is computed once for the S tokens."""

    def __init__(self, prompt_length, sequences):
        self.prompt_length = prompt_length  # S
        self.sequences = sequences  # B

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
    """The multiple to which the number of rows in a step is rounded up.

    On a GPU it keeps the shapes few. On a CPU it gives a row the same bits whatever the number of
    rows: smaller products use other kernels, which round differently (measured: below 16 rows with
    AVX-512, below 64 with AVX2). With several threads rounding depends on their number anyway."""
    if device.type == "cuda":
        return 32
    if torch.get_num_threads() > 1:
        return 1
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64


def row_bytes(config, length, budget, dtype):
    """Bytes on a GPU for each row: keys and values, what `Slots` holds, and one token's tensors
    over the vocabulary, held twice (by the eager step and in the pool of the graphs)."""
    size = dtype.itemsize
    token = 2 * size * config.num_key_value_heads * config.head_dim  # a key and a value
    cache = config.num_hidden_layers * token * length
    state = (8 + 8 + 4) * (budget + 1)  # noise, tokens, logprobs
    # Logits, in float32, their logprobs and probabilities, and the CDF in float64.
    vocabulary = (size + 4 + 4 + 4 + 8) * config.vocab_size
    return cache + state + 2 * vocabulary


def rows_that_fit(config, length, budget, dtype, free, max_rows):
    """At most `max_rows`: as many rows of `length` tokens as fit `free` bytes. A tenth is left over
    for CUDA graphs, a prompt, and gaps between blocks."""
    rows = int(0.9 * free) // row_bytes(config, length, budget, dtype)
    return max(1, min(max_rows, rows))


def free_memory(device):
    """Bytes that PyTorch can still allocate on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# ----------------------------------------------------------------------------------------------
# Sampling


def prefill(model, prompt):
    """The Prefix of all but the last token of a prompt: sampling feeds that one.

    Prompts are computed one at a time: padded next to others, they would round differently."""
    prefix = Prefix()
    if len(prompt) > 1:
        tokens = torch.tensor([prompt[:-1]], device=model.device)
        model.hidden(tokens, attention=prefix)
    return prefix


class Slots:
    """The state of the rows: slots 0..n-1 are sampling, the others are free."""

    def __init__(self, model, rows, budget, length):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.n = 0
        self.cache = Cache(model.config, rows, length, model.dtype, model.device)
        positions = torch.arange(length, device=model.device)
        self.rotations = model.rotations(positions)  # (2, length, D)
        self.noise = zeros(rows, budget + 1, dtype=torch.float64)
        self.tokens = zeros(rows, budget + 1)  # the last column is for rows that are done
        self.logprobs = zeros(rows, budget + 1, dtype=torch.float32)
        self.last = zeros(rows)  # the token to feed next
        self.position = zeros(rows)  # where it goes
        self.count = zeros(rows)  # tokens sampled so far
        self.alive = zeros(rows, dtype=torch.bool)  # neither EOS nor the budget came
        self.job = np.zeros(rows, dtype=np.int64)  # the index of the completion
        self.reach = np.zeros(rows, dtype=np.int64)  # the host's upper bound of `position`

    def add(self, jobs, prompt, prefix, noise):
        """Starts the completions `jobs` of one prompt. noise: (jobs, budget)."""
        free = slice(self.n, self.n + len(jobs))
        filled = len(prompt) - 1
        for layer, (k, v) in enumerate(zip(prefix.k, prefix.v)):  # (1, K, T, D)
            self.cache.k[layer][free, :, :filled] = k
            self.cache.v[layer][free, :, :filled] = v
        self.noise[free, :-1] = torch.from_numpy(noise).to(self.noise.device)
        self.last[free] = prompt[-1]
        self.position[free] = filled
        self.count[free] = 0
        self.alive[free] = True
        self.job[free] = jobs
        self.reach[free] = filled
        self.n += len(jobs)

    def filled(self):
        """The number of tokens in the longest row after the next one."""
        return int(self.reach[:self.n].max()) + 1

    def remove(self, done):
        """Frees the slots where done (n,) is true; rows from the end move into the holes."""
        kept = int(self.n - done.sum())
        holes = done[:kept].nonzero()[0]
        movers = kept + (~done[kept:]).nonzero()[0]
        filled = self.filled()
        if len(holes):
            for kv in (*self.cache.k, *self.cache.v):  # (R, K, T, D) of one layer
                kv[holes, :, :filled] = kv[movers, :, :filled]
            for state in (self.noise, self.tokens, self.logprobs, self.last, self.position,
                          self.count, self.alive, self.job, self.reach):
                state[holes] = state[movers]
        self.alive[kept:self.n] = False
        self.n = kept

    def completion(self, row, eos_ids):
        count = int(self.count[row])
        tokens = self.tokens[row, :count].tolist()
        logprobs = self.logprobs[row, :count].to("cpu", copy=True)
        return Completion(tokens, logprobs, truncated=tokens[-1] not in eos_ids)


def sample_token(model, slots, eos, budget, temperature, n, filled):
    """Samples one token for each of the first n rows, by inverting the CDF in float64 at the number
    drawn for it. Rows that are not alive do not move. Nothing here waits for the device."""
    position = slots.position[:n]  # views, (n,): what is added to them moves the rows
    count = slots.count[:n]
    alive = slots.alive[:n]
    rotation = slots.rotations[:, position[:, None]]  # (2, n, 1, D)
    cache = slots.cache.at(position, filled)
    hidden = model.hidden(slots.last[:n, None], rotation, cache)  # (n, 1, C)
    logits = model.head(hidden[:, 0]).float()  # (n, V)
    if temperature not in (0, 1):
        logits = logits / temperature
    logp = torch.log_softmax(logits, dim=-1)  # (n, V)
    if temperature:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = slots.noise[:n].gather(1, count[:, None])  # (n, 1)
        u = u * cdf[:, -1:]  # the probabilities sum to 1 only up to rounding
        token = torch.searchsorted(cdf, u, right=True)  # (n, 1): the first whose CDF exceeds u
        token = token.clamp(max=logp.shape[1] - 1)  # none does if the logits are not finite
    else:
        token = logp.argmax(-1, keepdim=True)
    logp = logp.gather(1, token)  # (n, 1)
    slots.tokens[:n].scatter_(1, count[:, None], token)
    slots.logprobs[:n].scatter_(1, count[:, None], logp)
    slots.last[:n] = token[:, 0]
    position += alive
    count += alive
    alive &= count < budget
    alive &= (token != eos).all(dim=1)


def cuda_graphs(step):
    """step(n, filled) as CUDA graphs, one for each pair of sizes. The first call of a pair runs
    eagerly, the second is recorded, and later calls launch its hundreds of kernels at once."""
    graphs = {}

    def run(*sizes):
        if sizes not in graphs:
            graphs[sizes] = None
            return step(*sizes)
        if graphs[sizes] is None:
            # One graph replays at a time, so all share one memory pool.
            pool = next((graph.pool() for graph in graphs.values() if graph), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(*sizes)
            graphs[sizes] = graph
        graphs[sizes].replay()

    return run


WRAPPERS = {"cpu": lambda step: step, "cuda": cuda_graphs}


def check_length(model, tokens, budget):
    """Raises UserError if a prompt of that many tokens and the budget do not fit the model."""
    limit = model.config.max_position_embeddings
    if tokens + budget > limit:
        raise UserError(f"a prompt of {tokens} tokens and a budget of {budget} exceed the {limit} "
                        "positions of this model: lower the budget or N")


@torch.inference_mode()
def generate(model, prompts, samples, budget, *, eos_ids, temperature=1.0, seed=0, step=0,
             prompt_keys=None, max_rows=256, on_finished=lambda: None):
    """Samples `samples` completions of each prompt, of at most `budget` tokens each.

    prompts: P lists of token ids. prompt_keys: P integers that identify the prompts in the random
    stream (default 0..P-1). temperature: 0 takes the most likely token, with its logprob at
    temperature 1. max_rows: how many completions are sampled at a time (on a CPU rounded up).
    on_finished(): called when a completion ends.

    Returns P * samples Completions in the order (prompt, sample). Raises UserError for a prompt and
    a budget beyond the model's positions."""
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    check_length(model, longest, budget)
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    total = len(prompts) * samples
    max_rows = min(max_rows, total)
    length = longest + budget
    if device.type == "cpu":  # memory for complete multiples, so that no step has a remainder
        max_rows = round_up(max_rows, row_multiple(device))
        length = round_up(length, LENGTH_MULTIPLE["cpu"])
    slots = Slots(model, max_rows, budget, length)
    eos = torch.tensor(eos_ids, device=device)

    def one_token(n, filled):
        sample_token(model, slots, eos, budget, temperature, n, filled)

    one_token_fast = WRAPPERS[device.type](one_token)
    finished = [None] * total
    started = 0  # completions started so far, in the order (prompt, sample)
    turn = 0
    while slots.n or started < total:
        # Fill the free slots.
        while started < total and slots.n < max_rows:
            p, sample = divmod(started, samples)
            if sample == 0:
                prefix = prefill(model, prompts[p])
            count = min(samples - sample, max_rows - slots.n)
            noise = [uniforms(seed, step, keys[p], sample + i, budget) for i in range(count)]
            jobs = range(started, started + count)
            slots.add(jobs, prompts[p], prefix, np.stack(noise))
            started += count

        # Sample one token of each row.
        n = min(round_up(slots.n, row_multiple(device)), max_rows)
        filled = min(round_up(slots.filled(), LENGTH_MULTIPLE[device.type]), length)
        one_token_fast(n, filled)
        slots.reach[:slots.n] += 1
        turn += 1
        if turn % LOOK_EVERY[device.type]:
            continue

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
    the sum of their lengths. The prompt is computed once for all of them.

    Logits are computed in chunks of at most `max_logits` and again in the backward pass: for a
    large vocabulary the logits of all tokens would not fit in memory."""
    device = model.device
    *prompt, last = rows[0].prompt  # each token is predicted at the one before it
    inputs = [torch.tensor([last, *row.tokens[:-1]]) for row in rows]
    inputs = pad_sequence(inputs, batch_first=True)  # (B, T)
    S = len(prompt)
    B, T = inputs.shape
    prompt = torch.tensor(prompt, dtype=torch.int64)  # (S,)
    tokens = torch.cat((prompt, inputs.flatten()))  # (S + B T,): the prompt once, then B times T
    positions = torch.arange(S, S + T).repeat(B)
    positions = torch.cat((torch.arange(S), positions))  # (S + B T,)
    rotation = model.rotations(positions[None].to(device))
    shared = SharedPrompt(S, B) if B > 1 else None
    hidden = model.hidden(tokens[None].to(device), rotation, shared)  # (1, S + B T, C)

    # Leave out the padding. The host knows where it is: the device does not have to search for it.
    lengths = torch.tensor([len(row.tokens) for row in rows])
    sampled = torch.arange(T) < lengths[:, None]  # (B, T)
    where = S + sampled.flatten().nonzero()[:, 0]  # (M,)
    hidden = hidden[0, where.to(device)]  # (M, C)
    targets = torch.cat([torch.tensor(row.tokens) for row in rows]).to(device)  # (M,)

    def logprobs_of(hidden, targets):
        logits = model.head(hidden).float()  # (chunk, V)
        if temperature != 1:
            logits = logits / temperature
        logp = torch.log_softmax(logits, dim=-1)
        return logp.gather(1, targets[:, None])[:, 0]

    chunk = max(1, max_logits // model.config.vocab_size)
    if len(targets) <= chunk:
        return logprobs_of(hidden, targets)
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(logprobs_of, h, t, use_reentrant=False) for h, t in chunks])
