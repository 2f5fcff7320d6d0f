"""
Sampling: P prompts in, G completions of each out, as fast as plain PyTorch allows.

Four ideas, in the order in which they appear below. (1) Every random number is fixed before
sampling starts, by (seed, step, prompt, sample, token) alone, so that what is sampled depends
neither on the batch size nor on the order of the work. (2) Keys and values live in one cache that
is allocated once; each row has its own position in it. (3) A prompt is computed once, and its
cache copied to its G samples. (4) A row that ends leaves the batch at once, and the next prompts
take the free rows.

Nothing is cut off the distribution (no top-k, no top-p): what is trained on must be what was
sampled from.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from model import UserError


@dataclass
class Rollout:
    """R = P * G completions in the order (prompt, sample), on the CPU. What lies behind a row's
    length is padding: mask by `lengths`, never by the token, for EOS may serve as padding too."""

    tokens: torch.Tensor  # (R, longest) int64, as sampled, EOS included
    logprobs: torch.Tensor  # (R, longest) float32, under the distribution each token was drawn from
    lengths: torch.Tensor  # (R,) int64
    truncated: torch.Tensor  # (R,) bool: the budget ended the row, not EOS


def uniforms(seed, step, prompt, sample, count):
    """The `count` numbers in [0, 1) that decide the tokens of one sample, float64 (count,). Philox
    is a counter-based generator (Salmon et al. 2011): each sample gets a stream of its own, and
    number t of a stream is the same however many are drawn."""
    key, counter = np.array([seed, step], np.uint64), np.array([0, 0, prompt, sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens, written one token at a time,
    each row at its own position. Attention sees the filled part alone."""

    def __init__(self, config, rows, length, dtype, device):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, R, K, T, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def at(self, positions, filled):
        """Says where the next token of rows 0..n-1 goes. positions: (n,); filled: 1 + the largest."""
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        unseen = torch.arange(filled, device=positions.device) > positions[:, None]  # (n, T)
        self.mask = torch.zeros(unseen.shape, dtype=self.k.dtype, device=positions.device)
        self.mask = self.mask.masked_fill_(unseen, -torch.inf)[:, None, None]  # (n, 1, 1, T), added to the scores
        return self

    def update(self, layer, k, v):
        n, filled = len(self.rows), self.mask.shape[-1]
        self.k[layer][self.rows, :, self.positions] = k[:, :, 0]  # (n, K, D)
        self.v[layer][self.rows, :, self.positions] = v[:, :, 0]
        return self.k[layer, :n, :, :filled], self.v[layer, :n, :, :filled], self.mask


class Prefix:
    """Stands in for a cache while prompts are computed: keeps the keys and values that pass by."""

    def __init__(self):
        self.k, self.v, self.hidden = [], [], None  # for each layer: (P, K, T, D); the last hidden states, (P, T, C)

    def update(self, layer, k, v):
        self.k.append(k)
        self.v.append(v)
        return k, v, None  # no mask: plain causal attention


class Past:
    """Stands in for a cache while completions are learned from: row r sees the first lengths[r] keys
    and values of prompt owners[r] in `prefix`, then its own, up to `longest` tokens."""

    def __init__(self, prefix, owners, lengths, longest):
        self.prefix, self.owners = prefix, owners
        own = torch.ones(longest, longest, dtype=torch.bool, device=owners.device).tril()
        prompt = torch.arange(prefix.k[0].shape[2], device=owners.device) < lengths[:, None]  # (B, T)
        seen = torch.cat((prompt[:, None].expand(-1, longest, -1), own.expand(len(owners), -1, -1)), dim=-1)
        width = -(-seen.shape[2] // 8) * 8  # a GPU would copy, in each layer, a mask whose rows do not begin at multiples of 8
        self.mask = torch.zeros(*seen.shape[:2], width, dtype=prefix.k[0].dtype, device=owners.device)[..., :seen.shape[2]]
        self.mask = self.mask.masked_fill_(~seen, -torch.inf)[:, None]  # (B, 1, longest, T + longest), added to the scores

    def update(self, layer, k, v):
        return (torch.cat((self.prefix.k[layer][self.owners], k), dim=2),
                torch.cat((self.prefix.v[layer][self.owners], v), dim=2), self.mask)


# How often the host looks for rows that ended, in tokens, and to which multiples the numbers of rows
# and of cached tokens are rounded up: a GPU should neither wait for the host nor meet many shapes.
PACE = {"cpu": (1, 1, 1), "cuda": (8, 32, 256)}


def round_up(value, size, most):
    return min(-(-value // size) * size, most)


def captured(step):
    """step(n, filled) as CUDA graphs, one for each pair of sizes: a pair's first call runs as it is,
    the second is recorded, and from then on one launch replays the hundreds of kernels of a token."""
    graphs = {}

    def run(*sizes):
        if sizes not in graphs:
            graphs[sizes] = None
            return step(*sizes)
        if graphs[sizes] is None:
            graph, others = torch.cuda.CUDAGraph(), [graph for graph in graphs.values() if graph]
            with torch.cuda.graph(graph, pool=others[0].pool() if others else None):  # one replays at a time: they share memory
                step(*sizes)
            graphs[sizes] = graph
        graphs[sizes].replay()

    return run


@torch.no_grad()
def generate(model, prompts, samples, budget, *, eos_ids, temperature=1.0, seed=0, step=0,
             prompt_keys=None, rows=256, on_finished=lambda row, tokens, truncated: None):
    """Samples `samples` completions of each prompt, of at most `budget` tokens each.

    prompts: P lists of token ids. prompt_keys: P integers that stand for the prompts in the random
    stream (default 0..P-1; a process that has a part of the prompts passes their numbers in the
    whole). temperature 0 takes the likeliest token, and reports its logprob at temperature 1.
    rows: how many completions are in the cache at a time. on_finished(row, tokens, truncated): called
    as soon as a completion ends; row counts in the order of the Rollout.
    Returns a Rollout. Raises UserError if a prompt and the budget exceed the model's positions.
    """
    device, limit = model.device, model.config.max_position_embeddings
    longest_prompt = max(len(prompt) for prompt in prompts)
    if longest_prompt + budget > limit:
        raise UserError(f"a prompt of {longest_prompt} tokens and a budget of {budget} exceed the "
                        f"{limit} positions of this model: lower the budget or N")
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    jobs = deque((p, g) for p in range(len(prompts)) for g in range(samples))
    rows = min(rows, len(jobs))
    finished = [None] * len(jobs)  # (tokens, logprobs, truncated) of each job

    # What is known of each row; rows 0..n-1 are at work, the others free.
    cache = Cache(model.config, rows, longest_prompt + budget, model.dtype, device)
    noise = torch.zeros(rows, budget + 1, dtype=torch.float64, device=device)
    tokens = torch.zeros(rows, budget + 1, dtype=torch.int64, device=device)  # the last column is waste paper
    logprobs = torch.zeros(rows, budget + 1, dtype=torch.float32, device=device)
    last = torch.zeros(rows, dtype=torch.int64, device=device)  # the token to be fed next
    position = torch.zeros(rows, dtype=torch.int64, device=device)  # where it goes
    count = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens sampled so far
    alive = torch.zeros(rows, dtype=torch.bool, device=device)  # neither EOS nor the budget was met
    job = np.zeros(rows, dtype=np.int64)
    reach = np.zeros(rows, dtype=np.int64)  # `position` or more, on the host: no sync to know its maximum
    eos = torch.tensor(eos_ids, device=device)
    prefixes, n, since = {}, 0, 0

    def one_token(n, filled):
        """One token for each of the first n rows: inverse-CDF sampling in float64 with the number
        drawn for it. Rows that are not alive stand still. Nothing here waits for the host."""
        at = cache.at(position[:n], filled)
        hidden = model.hidden(last[:n, None], position[:n, None], at)[:, 0]  # (n, C)
        logp = torch.log_softmax(model.head(hidden).float() / (temperature or 1.0), dim=-1)  # (n, V)
        if temperature:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            u = noise[:n].gather(1, count[:n, None]) * cdf[:, -1:]  # the sum is 1 but for rounding
            token = torch.searchsorted(cdf, u, right=True)  # (n, 1): the first whose CDF exceeds u
            token = token.clamp(max=logp.shape[-1] - 1)  # none does if the model's numbers are not finite
        else:
            token = logp.argmax(-1, keepdim=True)
        tokens[:n].scatter_(1, count[:n, None], token)
        logprobs[:n].scatter_(1, count[:n, None], logp.gather(1, token))
        last[:n] = token[:, 0]
        position[:n] += alive[:n]
        count[:n] += alive[:n]
        alive[:n] &= (token != eos).all(dim=1) & (count[:n] < budget)

    step_of = captured(one_token) if device.type == "cuda" else one_token
    every, row_size, length_size = PACE[device.type]
    while n or jobs:
        # Fill the free rows once a whole group fits (or, if rows are few, once all are free).
        if jobs and rows - n >= min(samples, rows):
            taken = [jobs.popleft() for _ in range(min(rows - n, len(jobs)))]
            if rows - n >= samples:  # whole groups only: the rest of a group waits
                while jobs and jobs[0][1]:
                    jobs.appendleft(taken.pop())
            fresh = sorted({p for p, _ in taken} - prefixes.keys())
            prefix = prefill(model, [prompts[p] for p in fresh])
            for i, p in enumerate(fresh):
                prefixes[p] = [torch.stack([of_layer[i, :, :len(prompts[p]) - 1] for of_layer in kv])  # (L, K, T, D)
                               for kv in (prefix.k, prefix.v)]
            del prefix
            free = slice(n, n + len(taken))
            for row, (p, _) in enumerate(taken, start=n):
                for ours, prompt in zip((cache.k, cache.v), prefixes[p]):
                    ours[:, row, :, :prompt.shape[2]] = prompt
            noise[free, :budget] = torch.from_numpy(np.stack([uniforms(seed, step, keys[p], g, budget) for p, g in taken])).to(device)
            last[free] = torch.tensor([prompts[p][-1] for p, _ in taken], device=device)
            job[free] = [p * samples + g for p, g in taken]
            reach[free] = [len(prompts[p]) - 1 for p, _ in taken]
            position[free] = torch.from_numpy(reach[free]).to(device)
            count[free], alive[free] = 0, True
            waiting = {p for p, _ in jobs}
            prefixes = {p: prefix for p, prefix in prefixes.items() if p in waiting}
            n += len(taken)

        step_of(round_up(n, row_size, rows), round_up(int(reach[:n].max()) + 1, length_size, cache.k.shape[3]))
        reach[:n] += 1
        since += 1
        if since < every:
            continue

        # Rows that ended leave; rows from the end move into the holes, so that 0..n-1 stay at work.
        since, done = 0, ~alive[:n].cpu().numpy()
        if done.any():
            for row in done.nonzero()[0]:
                length = int(count[row])
                ids = tokens[row, :length].tolist()
                finished[job[row]] = ids, logprobs[row, :length].to("cpu", copy=True), ids[-1] not in eos_ids
                on_finished(int(job[row]), ids, ids[-1] not in eos_ids)
            kept = n - done.sum()
            holes = done[:kept].nonzero()[0]
            movers = kept + (~done[kept:]).nonzero()[0]
            filled = int(reach[:n].max()) + 1
            if len(holes):
                for kv in (*cache.k, *cache.v):  # (R, K, T, D) of one layer: what moves is copied twice
                    kv[holes, :, :filled] = kv[movers, :, :filled]
                for state in (noise, tokens, logprobs, last, position, count, alive, job, reach):
                    state[holes] = state[movers]
            alive[kept:n] = False
            n = int(kept)

    lengths = torch.tensor([len(row[0]) for row in finished])
    out = Rollout(torch.zeros(len(finished), int(lengths.max()), dtype=torch.int64),
                  torch.zeros(len(finished), int(lengths.max())), lengths,
                  torch.tensor([row[2] for row in finished]))
    for i, (ids, logp, _) in enumerate(finished):
        out.tokens[i, :len(ids)], out.logprobs[i, :len(ids)] = torch.tensor(ids), logp
    return out


def prefill(model, prompts):
    """Keys and values of all but the last token of each prompt (whoever goes on from there feeds
    that one), as a Prefix. Padding stands on the right, where causal attention does not see it."""
    longest = max((len(prompt) - 1 for prompt in prompts), default=0)
    prefix = Prefix()
    if not longest:
        empty = torch.zeros(len(prompts), model.config.num_key_value_heads, 0, model.config.head_dim,
                            dtype=model.dtype, device=model.device)
        prefix.k = prefix.v = [empty] * model.config.num_hidden_layers
        return prefix
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt) - 1] = torch.tensor(prompt[:-1])
    prefix.hidden = model.hidden(tokens.to(model.device), cache=prefix)
    return prefix
