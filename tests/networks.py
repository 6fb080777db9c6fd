"""Small networks for the tests, in which no parameter has its initial zero."""

import torch

from configs import Config


def small(**settings):
    """The Config of a small network, of MDLM and without time unless settings say otherwise."""
    return Config(**dict(seq_len=16, n_layer=2, n_head=2, n_embd=16, n_cond=8, objective="mdlm", conditioning="none",
                         T=10) | settings)


def network(vocab_size, seed=0, std=0.3, **settings):
    """A network of small(**settings) whose weights are all moved by random numbers."""
    torch.manual_seed(seed)
    model = small(**settings).make_model(vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model.eval()


def log_scores(objective, logits, t):
    """log S_y = log(odds f_y) of a network of diffusion.SEDD: logits (N, V) at times t (N,) -> (N, V) float32."""
    return objective.log_prediction(logits, t) + objective.log_odds(t)[:, None]
