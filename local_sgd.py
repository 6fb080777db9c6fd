"""Local SGD: workers that train for many steps alone, and then agree on their weights, over slow links.

    torchrun --nproc_per_node=4 train.py CONFIG --local_steps=50                    DiLoCo (arXiv 2311.08105)
    ... --local_steps=50 --delay=50 --pull=0.6 --outer_lr=1 --outer_momentum=0      Overlap Local-SGD (arXiv 2002.09539)
    ... --local_steps=50 --delay=50 --eager                                         eager updates (arXiv 2502.12996)
    ... --local_steps=50 --fragments=3 --delay=5 --pull=0.5 --send_dtype=bfloat16   Streaming DiLoCo (arXiv 2501.18512)

A worker is one copy of the weights: one process, or `local_group` processes that share its batch (DDP). Its optimiser
is its own and is never averaged. The anchor is the copy that all workers agree on (with --eager, nearly). It is what is
validated, averaged (EMA), sampled and saved. After h = local_steps steps, with the weights w_k of worker k = 1 ... K
and the anchor a,

    mean = sum_k w_k / K,    D = a - mean,    M <- mu M + D,    a <- a - lr (D + mu M),    w_k <- w_k + pull (a - w_k).

This is one step of SGD with Nesterov's momentum, and D takes the place of the gradient. It is called the outer step; lr
is outer_lr, mu is outer_momentum. With lr = 1, mu = 0 and pull = 1 the workers are averaged (local SGD, arXiv
1805.09767).

delay: the mean arrives that many steps later, and training goes on meanwhile. With pull = 1 these steps are lost when
    the worker takes the anchor's weights. So a delay needs a smaller pull.
fragments: the blocks are dealt out to P fragments (blocks i, i + P, ... to fragment i, all other weights to the last).
    Each fragment has its own turn, h / P steps after another, so that less is sent at a time.
eager: the part of the mean that a worker knows, its own difference, is used at once; see EagerFragment.

A round is the h steps between two exchanges. In a round only weights are exchanged: losses, signals and files wait for
its end. At the last step of a run everything is exchanged, and no mean stays under way. Two methods differ from their
papers. Overlap Local-SGD has no momentum of the anchor here, and its first pull is in the second round. Streaming
DiLoCo's authors send numbers of 4 bits and add them up in float32. Here they are added up in the format that is sent.
"""

import re
from types import SimpleNamespace

import torch

import parallel
from cli import UserError


def misfit(cfg):
    """A message that says which settings of a Config contradict local_steps, or None."""
    own = ("local_group", "outer_lr", "outer_momentum", "pull", "delay", "fragments", "eager", "send_dtype")
    changed = cfg.changed(own)
    if changed and not cfg.local_steps:
        return f"{changed[0]} needs local_steps, the number of steps between two exchanges"
    if cfg.local_steps and cfg.fsdp:
        return "local_steps needs whole copies of the weights, and --fsdp splits them: leave out one of the two"
    if cfg.outer_momentum >= 1 or cfg.pull > 1:
        return "outer_momentum must be below 1, and pull at most 1"
    if cfg.local_steps and max(cfg.delay, cfg.fragments) > cfg.local_steps:
        return "delay and fragments must be at most local_steps"
    if cfg.eager and not (cfg.delay == cfg.local_steps and cfg.pull == 1):
        return f"eager needs delay={cfg.local_steps}, as many as local_steps, and pull=1"
    if cfg.local_steps and cfg.delay == cfg.local_steps and cfg.pull == 1 and not cfg.eager:
        return "delay as large as local_steps with pull=1 throws all local steps away: use --pull=0.6, or --eager"


# ---- one worker ------------------------------------------------------------------------------------------------------


def outer_step(anchor, mean, momentum, lr, mu):
    """Take one step of SGD with Nesterov's momentum, in place, on lists of tensors: D = anchor - mean is the gradient.

    anchor - lr (D + mu M) is computed as mean + (1 - lr) D - lr mu M. So it is the mean to the last bit if lr = 1 and
    mu = 0.
    """
    difference = torch._foreach_sub(anchor, mean)
    torch._foreach_mul_(momentum, mu)
    torch._foreach_add_(momentum, difference)
    torch._foreach_copy_(anchor, mean)
    torch._foreach_add_(anchor, difference, alpha=1 - lr)
    torch._foreach_add_(anchor, momentum, alpha=-lr * mu)


class Fragment:
    """Some of the weights of a worker, with their anchor and the momentum of the outer step: lists of tensors."""

    kept = ("anchor", "momentum")  # the lists that a checkpoint has, beside the weights

    def __init__(self, names, params, cfg, n_workers):
        self.names, self.cfg, self.n_workers = names, cfg, n_workers
        self.params = [p.detach() for p in params]
        self.anchor = [p.clone() for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]

    def send(self):
        """Return what the worker sends: its weights, or in bfloat16 the difference anchor - weights, which is small."""
        if self.cfg.send_dtype == "float32":
            return self.params
        return torch._foreach_sub(self.anchor, self.params)

    def receive(self, mean):
        """Take the outer step with the mean of what all workers sent, and pull the weights to the anchor."""
        if self.cfg.send_dtype != "float32":
            mean = torch._foreach_sub(self.anchor, mean)
        outer_step(self.anchor, mean, self.momentum, self.cfg.outer_lr, self.cfg.outer_momentum)
        torch._foreach_lerp_(self.params, self.anchor, self.cfg.pull)

    def finish(self):
        """End the run with the anchor as the weights."""
        torch._foreach_copy_(self.params, self.anchor)


class EagerFragment(Fragment):
    """A fragment whose worker does not wait for the mean (arXiv 2502.12996, algorithm 2).

    Let d_k = anchor - weights of worker k in this round, and d the mean over the workers. d'_k and d' are those of the
    round before. When the round ends, d' has arrived, but d is still under way. So the outer step takes as gradient

        d_k / K + (d' - d'_k / K),

    the worker's own share of this round and the others' share of the round before. In the end every share is applied
    once. Each worker has an anchor of its own: two anchors differ by the latest shares, and by the momentum, which gets
    the shares in another order. The anchor of the first worker is validated and saved.
    """

    kept = ("anchor", "momentum", "own", "late")

    def __init__(self, *args):
        super().__init__(*args)
        self.own = [torch.zeros_like(p) for p in self.params]   # d_k, as it was sent
        self.late = [torch.zeros_like(p) for p in self.params]  # d' - d'_k / K, or zero if it is still under way

    def send(self):
        self.own = torch._foreach_sub(self.anchor, self.params)
        if self.cfg.send_dtype != "float32":  # the worker uses its own share as the others get it, rounded
            self.own = [x.to(getattr(torch, self.cfg.send_dtype)).to(x.dtype) for x in self.own]
        gradient = torch._foreach_add(self.late, self.own, alpha=1 / self.n_workers)
        outer_step(self.anchor, torch._foreach_sub(self.anchor, gradient), self.momentum, self.cfg.outer_lr,
                   self.cfg.outer_momentum)
        torch._foreach_copy_(self.params, self.anchor)
        torch._foreach_zero_(self.late)
        return self.own

    def receive(self, mean):
        self.late = torch._foreach_sub(mean, torch._foreach_mul(self.own, 1 / self.n_workers))

    def finish(self):
        """Apply the share of the others that came last. It is not added to the momentum. With one worker it is zero."""
        torch._foreach_add_(self.anchor, self.late, alpha=-self.cfg.outer_lr * (1 + self.cfg.outer_momentum))
        torch._foreach_zero_(self.late)
        super().finish()


def deal(names, n):
    """Deal parameters out to n fragments by their names: block i to fragment i modulo n, all others to the last.

    Returns n lists of names. Raises UserError if one would be empty.
    """
    blocks = [re.search(r"\bblocks\.(\d+)\.", name) for name in names]
    places = [int(found[1]) % n if found else n - 1 for found in blocks]
    dealt = [[name for name, place in zip(names, places) if place == i] for i in range(n)]
    if not all(dealt):
        raise UserError(f"the network has no {n} blocks to deal out: use fewer fragments")
    return dealt


class Worker:
    """The fragments of a model's weights."""

    def __init__(self, model, cfg, n_workers):
        self.params = dict(model.named_parameters())
        kind = EagerFragment if cfg.eager else Fragment
        self.fragments = [kind(names, [self.params[name] for name in names], cfg, n_workers)
                          for names in deal(list(self.params), cfg.fragments)]

    def tensors(self, key):
        """{name of a parameter: its tensor in the list `key` of its fragment}, in the order of the model."""
        found = {name: x for part in self.fragments for name, x in zip(part.names, getattr(part, key))}
        return {name: found[name] for name in self.params}


# ---- the exchange ----------------------------------------------------------------------------------------------------


class Exchange:
    """The exchange of the workers of this process with all others. train.py has one worker in each process.

    average: a function of messages, one list of tensors from each worker of this process. It starts to average them
        over all workers, and returns an object whose wait() gives the mean (parallel.Average).
    """

    def __init__(self, workers, cfg, average):
        self.workers, self.cfg, self.average = workers, cfg, average
        self.under_way = [None] * cfg.fragments  # for each fragment: what average() returned and nobody has used yet

    def last_sent(self, i, step):
        """The last step, at most this one, after which fragment i is sent: h n - i h / P for some integer n."""
        h = self.cfg.local_steps
        shift = i * h // self.cfg.fragments
        return (step + shift) // h * h - shift

    def arrive(self, i):
        """Wait for the mean of fragment i, and use it in all workers of this process."""
        mean, self.under_way[i] = self.under_way[i].wait(), None
        for worker in self.workers:
            worker.fragments[i].receive(mean)

    def after(self, step):
        """Do what is due after a training step. Returns the number of steps of the round if one ends here, else 0."""
        last = step == self.cfg.max_steps
        for i in range(self.cfg.fragments):
            sent = self.last_sent(i, step)
            is_turn = sent == step or last
            if self.under_way[i] and (step >= sent + self.cfg.delay or is_turn):  # a mean that was sent before
                self.arrive(i)
            if is_turn:
                self.under_way[i] = self.average([worker.fragments[i].send() for worker in self.workers])
                if not self.cfg.delay or last:
                    self.arrive(i)
            if last:
                for worker in self.workers:
                    worker.fragments[i].finish()
        steps = (step - 1) % self.cfg.local_steps + 1
        return steps if last or steps == self.cfg.local_steps else 0

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state(self, k=0):
        """{kind: {name: tensor}} of worker k of this process. "mean" has the means under way: it waits for them."""
        worker, state = self.workers[k], {}
        state["weights"] = dict(worker.params)
        for key in worker.fragments[0].kept:
            state[key] = worker.tensors(key)
        state["mean"] = {}
        for part, average in zip(worker.fragments, self.under_way):
            if average:
                state["mean"] |= zip(part.names, average.wait())
        return state

    def restore(self, state, k=0):
        """Copy what state(k) returned back into worker k."""
        worker = self.workers[k]
        with torch.no_grad():
            for name, p in worker.params.items():
                p.copy_(state["weights"][name])
        for i, part in enumerate(worker.fragments):
            for key in part.kept:
                torch._foreach_copy_(getattr(part, key), [state[key][name] for name in part.names])
            if part.names[0] in state["mean"]:
                mean = [state["mean"][name].to(part.params[0].device) for name in part.names]
                self.under_way[i] = SimpleNamespace(wait=lambda mean=mean: mean)  # an Average that has arrived


# ---- in train.py -----------------------------------------------------------------------------------------------------


class EveryStep:
    """The exchange of a run without local_steps. It does nothing, because gradients are averaged in every step."""

    anchor = {}  # the weights are the model's own

    def after(self, step):
        return 1

    def checkpoint(self, moments, tally):
        return {}

    def resume(self, payload, moments, tally):
        return tally


class AmongProcesses(Exchange):
    """The exchange of the one worker of this process with those of all teams of processes (parallel.py)."""

    def __init__(self, model, cfg):
        dtype = getattr(torch, cfg.send_dtype)
        super().__init__([Worker(model, cfg, parallel.n_teams)], cfg,
                         lambda messages: parallel.Average(messages, dtype))
        self.anchor = self.workers[0].tensors("anchor")  # {name: tensor}

    def checkpoint(self, moments, tally):
        """Return {"workers": [state of each worker, with its optimiser's and its tally]} in the main process, else {}.

        moments: {parameter: its state in the optimiser}. tally: the log.Tally of this worker.
        """
        own = self.state()
        own["optimizer"] = {name: moments[p] for name, p in self.workers[0].params.items()}
        own["tally"] = {"tally": torch.stack(tally)}
        workers = parallel.gather_from_teams(to_cpu(own))
        return {"workers": [shared(worker, workers[0]) for worker in workers]} if workers else {}

    def resume(self, payload, moments, tally):
        """Restore this process's worker from a checkpoint, which only the main process has. Returns the worker's tally.

        Raises UserError if there are more or fewer workers now.
        """
        workers = payload and payload["workers"]

        def check():
            if len(workers) != parallel.n_teams:
                raise UserError(f"the run has {len(workers)} workers, and {parallel.n_teams} were started: start as "
                                "many (torchrun --nproc_per_node), or begin a new run with --init_from")

        parallel.on_main(check)
        own = parallel.hand_out(workers)
        self.restore(own)
        for name, p in self.workers[0].params.items():
            for key, value in own["optimizer"][name].items():
                moments[p][key].copy_(value)
        return own["tally"]["tally"]


def to_cpu(x):
    """Copy a tree of dicts with tensors to the CPU."""
    return {key: to_cpu(value) for key, value in x.items()} if isinstance(x, dict) else x.detach().cpu()


def shared(x, first):
    """Return the tree x with tensors of `first` for equal ones, such as anchors: torch.save writes these once."""
    if isinstance(x, dict):
        return {key: shared(value, first[key]) if key in first else value for key, value in x.items()}
    return first if x.shape == first.shape and x.dtype == first.dtype and torch.equal(x, first) else x
