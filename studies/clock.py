"""The clock of uneven machines: when each of them computes, sends and waits. There is no model here, only times.

A file of machines is a table with two kinds of lines (# begins a comment):

    machine NAME REGION SPEED [jitter=0.1] [fails_every=24] [recovers=300]
    link REGION REGION GBIT_PER_SECOND [MILLISECONDS]

A machine of speed 1 takes step_seconds for a training step, one of speed 1/2 twice as long. jitter: the standard
deviation of the logarithm of that time. fails_every: mean hours of work between two failures. After a failure the
machine is away for `recovers` seconds, and repeats its steps since its last exchange. A link goes both ways. It carries
one transfer at a time in each direction, and others wait, unless contention=False. In an all-reduce the machines of a
region send at the same time, each by a port of its own.
"""

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from cli import UserError
from randomness import rng


class Machine(NamedTuple):
    name: str
    region: str
    speed: float
    jitter: float = 0.0
    fails_every: float = 0.0  # hours; 0: never
    recovers: float = 0.0     # seconds


class Link(NamedTuple):
    bits_per_second: float
    latency: float  # seconds


class Machines(NamedTuple):
    machines: tuple  # of Machine
    links: dict      # (region, region) -> Link, in both directions

    @property
    def regions(self):
        return list(dict.fromkeys(machine.region for machine in self.machines))

    def relative_speeds(self):
        """The speeds, where the fastest machine has 1."""
        fastest = max(machine.speed for machine in self.machines)
        return [machine.speed / fastest for machine in self.machines]


def read_machines(path):
    """Read a file of machines. Raises UserError that names the line that is wrong, or the link that is missing."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    machines, links = [], {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        try:
            if not words:
                continue
            kind, *words = words
            if kind == "machine":
                name, region, speed, *options = words
                options = {key: float(value) for key, value in (option.split("=") for option in options)}
                machines.append(Machine(name, region, float(speed), **options))
                assert machines[-1].speed > 0 and all(0 <= value < float("inf") for value in machines[-1][2:])
            else:
                assert kind == "link"
                one, two, rate, *latency = words
                link = Link(float(rate) * 1e9, float(*latency) / 1000)
                assert 0 < link.bits_per_second < float("inf") and 0 <= link.latency < float("inf")
                links[one, two] = links[two, one] = link
        except (ValueError, TypeError, AssertionError):
            raise UserError(f"line {number} of {path} is neither `machine NAME REGION SPEED` nor `link REGION REGION "
                            f"GBIT_PER_SECOND MILLISECONDS`: {line.strip()[:80]}")
    found = Machines(tuple(machines), links)
    if not machines or len({machine.name for machine in machines}) < len(machines):
        raise UserError(f"{path} must have machines, each with a name of its own")
    if len(found.regions) > 8:
        raise UserError(f"{path} has {len(found.regions)} regions: use at most 8")
    for pair in itertools.combinations_with_replacement(found.regions, 2):
        if pair not in links:
            raise UserError(f"{path} has no link between {pair[0]} and {pair[1]}: add a line `link {pair[0]} {pair[1]} "
                            "GBIT_PER_SECOND MILLISECONDS`")
    return found


class Clock:
    """The record of what the machines and links have done. Times are in seconds.

    step_seconds: of a machine of speed 1. relative: the fastest machine has speed 1, whatever the file says.
    """

    def __init__(self, found, step_seconds, seed=0, contention=True, relative=False):
        self.found, self.seed, self.contention = found, seed, contention
        speeds = found.relative_speeds() if relative else [machine.speed for machine in found.machines]
        self.step_seconds = [step_seconds / speed for speed in speeds]
        self.busy = [0.0] * len(speeds)      # seconds of useful work of each machine, without what failures undid
        self.work = [0.0] * len(speeds)      # the same of the round that a machine is in
        self.ring = self.best_ring()
        self.free = {}                       # (region, region) -> time at which the link becomes free
        self.bytes_sent = {pair: 0 for pair in found.links}  # bytes
        self.draws = [0] * len(speeds)

    def compute(self, k, n, again=0):
        """Seconds until machine k has done n steps. again: earlier steps that it repeats after each failure."""
        machine, each = self.found.machines[k], self.step_seconds[k]
        generator = rng(self.seed, "clock", self.draws[k], k)
        self.draws[k] += 1
        steps = each * np.exp(machine.jitter * generator.standard_normal(n) - machine.jitter**2 / 2)
        work = length = float(steps.sum())
        self.work[k] += work
        seconds = 0.0
        if machine.fails_every:
            while (failure := generator.exponential(machine.fails_every * 3600)) < length:
                seconds += failure + machine.recovers
                length = work + again * each
        return seconds + length

    def done(self, k):
        """Count the work of machine k as useful."""
        self.busy[k], self.work[k] = self.busy[k] + self.work[k], 0.0

    def transfer(self, now, n_bytes, here, there):
        """The time at which n_bytes, sent now from one region to another, are there."""
        link = self.found.links[here, there]
        self.bytes_sent[here, there] += n_bytes
        start = max(now, self.free.get((here, there), 0.0)) if self.contention else now
        done = start + 8 * n_bytes / link.bits_per_second
        self.free[here, there] = done
        return done + link.latency

    def best_ring(self):
        """The regions in the order in which the slowest link of the ring is as fast as possible."""
        first, *others = self.found.regions
        slowest = lambda ring: min(self.found.links[pair].bits_per_second for pair in zip(ring, ring[1:] + ring[:1]))
        return max(([first, *rest] for rest in itertools.permutations(others)), key=slowest)

    def all_reduce(self, now, n_bytes):
        """The time at which all machines have the sum of n_bytes of each, in a ring: 2 (n - 1) hops of n_bytes / n.

        The ring goes through all machines of a region, and on to the next region."""
        regions = [machine.region for machine in self.found.machines]
        n, hops = len(regions), {}
        if n == 1:
            return now
        for here, there in zip(self.ring, self.ring[1:] + self.ring[:1]):
            hops[here, here] = regions.count(here) - (len(self.ring) > 1)
            if here != there:
                hops[here, there] = 1
        links = [self.found.links[pair] for pair, number in hops.items() if number]
        each = 2 * (n - 1) / n * n_bytes
        for pair, number in hops.items():
            self.bytes_sent[pair] += number * each
        start = max(now, self.free.get("ring", 0.0)) if self.contention else now
        done = start + 8 * each / min(link.bits_per_second for link in links)
        self.free["ring"] = done
        return done + 2 * (n - 1) * max(link.latency for link in links)


# ---- together --------------------------------------------------------------------------------------------------------


class Rounds:
    """The clock of workers that exchange together (local_sgd.Exchange): it takes the place of `average` there.

    sizes: bytes that a worker sends of each fragment. A worker waits where a mean is used that has not arrived yet.
    """

    def __init__(self, clock, sizes):
        self.clock, self.sizes, self.now = clock, sizes, [0.0] * len(clock.found.machines)

    def step(self, working, again):
        """All machines in `working` take a step."""
        for k in working:
            self.now[k] += self.clock.compute(k, 1, again)
            self.clock.done(k)

    def average(self, messages):
        """The all-reduce begins when the last worker has sent. messages: [number of the fragment]."""
        return Arrival(self, self.clock.all_reduce(max(self.now), self.sizes[messages[0]]))


class Arrival(NamedTuple):
    rounds: Rounds
    time: float

    def wait(self):
        self.rounds.now = [max(now, self.time) for now in self.rounds.now]


# ---- each at its own time --------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that happens to weights.

    start: worker `who` takes the weights of its server, and trains `steps` steps, its own steps first, first + 1, ... .
    apply: its difference arrives at the server and is applied.

    Three more kinds come only with several servers, and `who` is then a server. send: it sends its difference to the
    global server. apply_global: the difference arrives there, and a copy of the global weights leaves. merge: the copy
    arrives at server `who`.
    """

    time: float
    kind: str
    who: int
    first: int = 0
    steps: int = 0
    n_begun: int = 0  # steps that all workers together had begun before


def asynchronous(clock, n_bytes, local_steps, total_steps, servers=False, merge_every=8, carry=False):
    """Yield the Events, in order, of workers that never wait for each other, until total_steps have been taken in all.

    local_steps: of each worker's rounds. Each round: weights travel from the server to the worker, it trains, and its
    difference travels back. The server is in the first region; servers: there is one in each region, for the workers
    there, which sends to the global one in the first region when merge_every differences have been applied to it since
    its last merge (HALoS, arXiv 2506.04531). What is applied between sending and merging is never sent. With `carry` it
    is sent the next time, and counts from the last sending. At the end each server sends what it has.
    """
    machines, regions = clock.found.machines, clock.found.regions
    server_of = [regions.index(machine.region) if servers else 0 for machine in machines]
    counter, heap = itertools.count(), []
    n_begun, own_steps = 0, [0] * len(machines)
    applied, sent, away = ([0] * len(regions) for _ in range(3))  # of each server
    at_work = [server_of.count(r) for r in range(len(regions))]

    def push(time, kind, who):
        heapq.heappush(heap, (time, next(counter), kind, who))

    def start(k, now):
        nonlocal n_begun
        steps = min(local_steps[k], total_steps - n_begun)
        if steps <= 0:
            at_work[server_of[k]] -= 1
            return
        yield Event(now, "start", k, own_steps[k], steps, n_begun)
        n_begun, own_steps[k], sizes[k] = n_begun + steps, own_steps[k] + steps, steps
        push(clock.transfer(now, n_bytes, regions[server_of[k]], machines[k].region), "has weights", k)

    def send(r, now):
        away[r], sent[r] = 1, applied[r]
        yield Event(now, "send", r)
        push(clock.transfer(now, n_bytes, regions[r], regions[0]), "apply_global", r)

    sizes = [0] * len(machines)
    for k in range(len(machines)):
        yield from start(k, 0.0)
    while heap:
        now, _, kind, who = heapq.heappop(heap)
        if kind == "has weights":
            push(now + clock.compute(who, sizes[who]), "done", who)
        elif kind == "done":
            clock.done(who)
            push(clock.transfer(now, n_bytes, machines[who].region, regions[server_of[who]]), "apply", who)
        elif kind == "apply":
            yield Event(now, "apply", who)
            r = server_of[who]
            applied[r] += 1
            if servers and not away[r] and applied[r] >= sent[r] + merge_every:
                yield from send(r, now)
            yield from start(who, now)
        elif kind == "apply_global":
            yield Event(now, "apply_global", who)
            push(clock.transfer(now, n_bytes, regions[0], regions[who]), "merge", who)
        else:
            yield Event(now, "merge", who)
            away[who], sent[who] = 0, sent[who] if carry else applied[who]
        if servers:  # the last differences of a region whose workers are done
            for r in range(len(regions)):
                if not at_work[r] and not away[r] and applied[r] > sent[r]:
                    yield from send(r, now)
