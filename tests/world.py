"""A world small enough to enumerate: V = 3 tokens, L = 3 positions, a random distribution over the 27 sequences.

The tests compare the closed forms of diffusion.py and sampling.py with this module. It is slow, follows the definitions
(Bayes' rule, matrix products, sums over all states) and uses nothing of those two files.
"""

import itertools

import torch

V, L, MASK = 3, 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))        # (27, L)
STATES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))       # (64, L), masks included
MASKS = torch.tensor(list(itertools.product([False, True], repeat=L)))       # (8, L)
P_DATA = (2 * torch.randn(V**L, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).softmax(0)
ENTROPY = -(P_DATA * P_DATA.log()).sum().item()


def picked(values, where):
    """The values (B, L, ...) where `where` (B, L) is True, or at the places `where` (N,), or all of them (None)."""
    return values if where is None else values[where] if where.dim() == 2 else values.flatten(0, 1)[where]


def mask_of(places, xt):
    """The bool (B, L) that is True at the places (N,) of all tokens of xt (B, L)."""
    return torch.zeros(xt.numel(), dtype=torch.bool).index_fill(0, places, True).view(xt.shape)


def oracle(xt, t=None, where=None):
    """The Bayes-optimal denoiser: log p(x0_i | visible tokens of xt), (B, L, V), or (N, V) where `where` is True."""
    agrees = ((xt[:, None] == SEQUENCES) | (xt[:, None] == MASK)).all(-1)     # (B, 27)
    posterior = agrees * P_DATA
    posterior = posterior / posterior.sum(1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(SEQUENCES, V).double()              # (27, L, V)
    log_p = torch.einsum("bn,nlv->blv", posterior, one_hot).log()
    return picked(log_p, where)


def random_denoiser(seed, sees_time):
    """Return an arbitrary denoiser: smooth in t, different in every state, far from optimal."""
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(len(STATES), L, V, 2, dtype=torch.float64, generator=generator)
    code = torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])

    def model(xt, t, where=None):
        entry = table[(xt * code).sum(1)]
        shift = t.double().view(-1, 1, 1) if sees_time else 0.5
        logits = entry[..., 0] + torch.sin(3 * shift) * entry[..., 1] if sees_time else entry[..., 0]
        return picked(logits, where)

    return model


def one_step_matrix(keep):
    """Return Q (V+1, V+1): a token stays with probability keep, else becomes the mask; a mask stays."""
    Q = torch.eye(V + 1, dtype=torch.float64) * keep
    Q[:, MASK] += 1 - keep
    return Q


def matrices(alphas):
    """Return one-step matrices Q_1 ... Q_T and products Qbar_0 ... Qbar_T for alphas = [alpha_0 = 1, ..., alpha_T]."""
    steps = [one_step_matrix(alphas[s] / alphas[s - 1]) for s in range(1, len(alphas))]
    products = [torch.eye(V + 1, dtype=torch.float64)]
    for Q in steps:
        products.append(products[-1] @ Q)
    return steps, products


def posterior(steps, products, s):
    """q(x_{s-1} = j | x_s = i, x0 = k) by Bayes' rule, indexed (i, k, j); rows of impossible pairs (i, k) are nan."""
    joint = torch.einsum("kj,ji->ikj", products[s - 1], steps[s - 1])  # q(x_{s-1}=j, x_s=i | x0=k)
    return joint / joint.sum(-1, keepdim=True)


def learned_step(model, steps, products, s, T):
    """p(x_{s-1} | x_s) of a denoiser for every state, per position: (64, L, V+1).

    A mask has q averaged over the predicted x0. A visible token is kept (carry-over).
    """
    q = posterior(steps, products, s)
    p_x0 = model(STATES, torch.full((len(STATES),), s / T, dtype=torch.float64)).softmax(-1)   # (64, L, V)
    p = torch.einsum("nlk,kj->nlj", p_x0, q[MASK, :V])
    visible = torch.nn.functional.one_hot(STATES, V + 1).double()
    return torch.where((STATES == MASK)[..., None], p, visible)


def chain_distribution(model, alphas):
    """Distribution p_T(x0) of the reverse chain with this denoiser, by summing over every path: (27,)."""
    T = len(alphas) - 1
    steps, products = matrices(alphas)
    state_probs = (STATES == MASK).all(1).double()
    for s in range(T, 0, -1):
        p = learned_step(model, steps, products, s, T)                         # (64, L, V+1)
        transition = torch.stack([p[:, i, STATES[:, i]] for i in range(L)]).prod(0)  # (64 from, 64 to)
        state_probs = state_probs @ transition
    finished = (STATES != MASK).all(1)
    return state_probs[finished]


def t_step_bound(model, alphas):
    """D3PM bound of every sequence by its definition, sum_s E_q KL(q(x_{s-1}|x_s,x0) || p(x_{s-1}|x_s)): (27,) nats."""
    T = len(alphas) - 1
    steps, products = matrices(alphas)
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for s in range(1, T + 1):
        q, p = posterior(steps, products, s), learned_step(model, steps, products, s, T)
        for n, x0 in enumerate(SEQUENCES):
            weight = torch.stack([products[s][x0[i], STATES[:, i]] for i in range(L)]).prod(0)   # q(x_s | x0), (64,)
            kl = torch.zeros(len(STATES), dtype=torch.float64)
            for i in range(L):
                qi = q[STATES[:, i], x0[i]]                                    # (64, V+1)
                term = torch.where(qi > 0, qi * (qi / p[:, i]).log(), 0.0)
                kl += term.sum(-1)
            total[n] += (weight * kl)[weight > 0].sum()
    return total


def remasking_distribution(model, grid, g_of):
    """Distribution p(x0) of ReMDM's reverse chain (arXiv 2503.00307) by summing over every path: (27,).

    grid: the mask rates. g_of(r, rho, states (64, L)) -> (64, L): at a token, the probability g that it is masked
    again; at a mask, the g in its probability of being revealed, h = ((1-rho) - (1-g)(1-r))/r. The network is told r.
    """
    state_probs = (STATES == MASK).all(1).double()
    visible = torch.nn.functional.one_hot(STATES, V + 1).double()
    for r, rho in zip(grid, grid[1:]):
        g = g_of(r, rho, STATES)[..., None]
        h = ((1 - rho) - (1 - g) * (1 - r)) / r
        p_x0 = model(STATES, torch.full((len(STATES),), r, dtype=torch.float64)).softmax(-1)
        from_mask = torch.cat([h * p_x0, 1 - h], -1)
        from_token = (1 - g) * visible
        from_token[..., MASK] += g[..., 0]
        p = torch.where((STATES == MASK)[..., None], from_mask, from_token)    # (64, L, V+1)
        state_probs = state_probs @ torch.stack([p[:, i, STATES[:, i]] for i in range(L)]).prod(0)
    finished = (STATES != MASK).all(1)
    return state_probs[finished]


def pieces_distribution(model, grid, n):
    """Distribution p(x0) of the reverse chain if each n tokens, from left to right, walk through the grid: (27,).

    The network, which sees all, is told the share of masks that is expected among all L tokens.
    """
    state_probs = (STATES == MASK).all(1).double()
    for a in range(0, L, n):
        piece, n_later = torch.arange(L) // n == a // n, max(0, L - a - n)
        for r, rho in zip(grid, grid[1:]):
            rate = (r * piece.sum() + n_later) / L
            p_x0 = model(STATES, rate.double().expand(len(STATES))).softmax(-1)
            stay = torch.full((len(STATES), L, 1), rho / r, dtype=torch.float64)
            p = torch.where(((STATES == MASK) & piece)[..., None], torch.cat([(1 - rho / r) * p_x0, stay], -1),
                            torch.nn.functional.one_hot(STATES, V + 1).double())
            state_probs = state_probs @ torch.stack([p[:, i, STATES[:, i]] for i in range(L)]).prod(0)
    return state_probs[(STATES != MASK).all(1)]


def cross_entropy_at(model, rate):
    """Expected cross-entropy of a masked token, in nats, when each other token is masked at this rate.

    It is a sum over sequences and masks. The network sees no time.
    """
    total, weight = 0.0, 0.0
    for mask in MASKS:
        k = int(mask.sum())
        if not k:
            continue
        log_p = model(torch.where(mask, MASK, SEQUENCES), torch.ones(len(SEQUENCES))).log_softmax(-1)
        ce = -(log_p.gather(-1, SEQUENCES[..., None]).squeeze(-1) * mask).sum(1)
        probability = rate ** (k - 1) * (1 - rate) ** (L - k)  # of the other masks, given one
        total, weight = total + probability * (P_DATA * ce).sum().item(), weight + probability * k
    return total / weight


# ---- uniform noise ---------------------------------------------------------------------------------------------------

ONE_HOT = torch.nn.functional.one_hot(SEQUENCES, V).double()


def uniform_matrix(keep):
    """Return Q (V, V): a token stays with probability keep, else becomes any of the V tokens, itself included."""
    return torch.eye(V, dtype=torch.float64) * keep + (1 - keep) / V


def by_position(Q, states):
    """q(xt_i | x0_i) at each position i, for noise with the matrix Q: (L, 27 x0, n) for states xt (n, L)."""
    return torch.stack([Q[SEQUENCES[:, i]][:, states[:, i]] for i in range(L)])


def uniform_distribution(alpha):
    """Distribution q(xt | x0): (27 x0, 27 xt)."""
    return by_position(uniform_matrix(alpha), SEQUENCES).prod(0)


def uniform_oracle(alpha, leave_one_out=True):
    """p(x0_i | xt) for every xt: (27, L, V) probabilities. With leave_one_out, position i of xt is ignored."""
    return predictions(by_position(uniform_matrix(alpha), SEQUENCES), leave_one_out)


def predictions(factors, leave_one_out):
    """p(x0_i | xt) by Bayes' rule, from the result of by_position for n states: (n, L, V)."""
    found = []
    for i in range(L):
        others = torch.stack([factors[j] for j in range(L) if j != i or not leave_one_out]).prod(0)
        found.append((P_DATA[:, None] * others).T @ ONE_HOT[:, i])
    found = torch.stack(found, 1)
    return found / found.sum(-1, keepdim=True)


def true_scores(alpha):
    """Scores p_t(xt with y at position i)/p_t(xt) for every xt, i and y: (27, L, V)."""
    marginal = P_DATA @ uniform_distribution(alpha)
    found = torch.empty(len(SEQUENCES), L, V, dtype=torch.float64)
    for i in range(L):
        for y in range(V):
            changed = SEQUENCES.clone()
            changed[:, i] = y
            found[:, i, y] = marginal[(changed * torch.tensor([9, 3, 1])).sum(1)] / marginal
    return found


def uniform_posterior(alpha_t, alpha_s):
    """q(x_s = j | x_t = i, x0 = k) by Bayes' rule, indexed (k, i, j)."""
    joint = torch.einsum("kj,ji->kij", uniform_matrix(alpha_s), uniform_matrix(alpha_t / alpha_s))
    return joint / joint.sum(-1, keepdim=True)


def uniform_step(x_theta, alpha_t, alpha_s):
    """p(x_s | x_t) per position for every x_t, (27, L, V), of a network that predicts x_theta (27, L, V).

    It is proportional to sum_{x0} q(x_s, x_t | x0) x_theta(x0) (D3PM, eq. 4).
    """
    joint = torch.einsum("kj,ji->kij", uniform_matrix(alpha_s), uniform_matrix(alpha_t / alpha_s))
    p = torch.einsum("nlk,knlj->nlj", x_theta, joint[:, SEQUENCES])
    return p / p.sum(-1, keepdim=True)


def uniform_chain_distribution(steps):
    """Distribution p(x0) of a chain that starts from uniform tokens: (27,). steps: the results of uniform_step."""
    state_probs = torch.full((len(SEQUENCES),), 1 / len(SEQUENCES), dtype=torch.float64)
    for p in steps:
        state_probs = state_probs @ torch.stack([p[:, i, SEQUENCES[:, i]] for i in range(L)]).prod(0)
    return state_probs


def uniform_t_step_bound(x_theta, alphas):
    """Bound sum_s E_q KL(q(x_{s-1}|x_s,x0) || p(x_{s-1}|x_s)) per sequence: (27,) nats. x_theta: s -> (27, L, V)."""
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for s in range(1, len(alphas)):
        p, q = uniform_step(x_theta(s), alphas[s], alphas[s - 1]), uniform_posterior(alphas[s], alphas[s - 1])
        for n, x0 in enumerate(SEQUENCES):
            for i in range(L):
                qi = q[x0[i], SEQUENCES[:, i]]
                kl = torch.where(qi > 0, qi * (qi / p[:, i]).log(), 0.0).sum(-1)
                total[n] += uniform_distribution(alphas[s])[n] @ kl
    return total


# ---- masks and random tokens -----------------------------------------------------------------------------------------


def hybrid_shares(alpha, p):
    """(alpha, m, n) by bisection: m + n = 1 - alpha, n = B sqrt(alpha m), where B makes n = p if alpha = m."""
    B = p / ((1 - p) / 2)  # n/alpha, as alpha = m = (1 - p)/2 there
    low, high = 0.0, 1 - alpha
    for _ in range(100):
        m = (low + high) / 2
        low, high = (m, high) if m + B * (alpha * m) ** 0.5 < 1 - alpha else (low, m)
    return alpha, m, 1 - alpha - m


def hybrid_matrix(alpha, m, n):
    """Return Q (V, V+1): a token stays with probability alpha, becomes the mask with m, and any of V tokens with n."""
    return torch.cat([torch.eye(V, dtype=torch.float64) * alpha + n / V, torch.full((V, 1), m, dtype=torch.float64)], 1)


def hybrid_stage(before, now):
    """Return the matrix (V+1, V+1) of the stage between two times with these shares: all states are hit alike."""
    keep = now[0] / before[0]
    hit = torch.tensor([(now[2] - keep * before[2]) / V] * V + [now[1] - keep * before[1]], dtype=torch.float64)
    return torch.eye(V + 1, dtype=torch.float64) * keep + hit


def hybrid_distribution(shares):
    """Distribution q(xt | x0): (27 x0, 64 xt)."""
    return by_position(hybrid_matrix(*shares), STATES).prod(0)


def hybrid_oracle(shares, leave_one_out=True):
    """p(x0_i | xt) for every xt: (64, L, V) probabilities. With leave_one_out, position i of xt is ignored."""
    return predictions(by_position(hybrid_matrix(*shares), STATES), leave_one_out)


def hybrid_step(x, z, now, before):
    """p(x_s | x_t = z) proportional to sum over x0 of q(x_s, x_t | x0) x(x0): x (..., V), z (...) -> (..., V+1).

    0 for a z that is not possible.
    """
    joint = torch.einsum("kj,ji->kij", hybrid_matrix(*before), hybrid_stage(before, now))  # (x0, x_t, x_s)
    p = torch.einsum("...k,k...j->...j", x, joint[:, z])
    return p / p.sum(-1, keepdim=True).clamp(min=1e-300)


def hybrid_chain_distribution(steps):
    """Distribution p(x0) of a chain that starts from masks: (27,). steps: the results of hybrid_step for STATES."""
    state_probs = (STATES == MASK).all(1).double()
    for p in steps:
        state_probs = state_probs @ torch.stack([p[:, i, STATES[:, i]] for i in range(L)]).prod(0)
    return state_probs[(STATES != MASK).all(1)]
