"""The training of BERT and RoBERTa, as an objective beside those of diffusion.py (`--objective=bert`).

docs/adaptation.md derives what it is: masked diffusion at one mask rate. masked_lm.py has the networks themselves.
"""

from typing import NamedTuple

import torch

from diffusion import MDLM, Noise, n_free


class Selection(NamedTuple):
    """Choice of the tokens that BERT predicts, and of how each is shown. It has the place of Noise."""

    mask: torch.Tensor    # (B, L) bool, True where a token is predicted
    t: torch.Tensor       # (B,) float32, the mask rate; no network is told it
    weight: torch.Tensor  # (B,) float32, as in Noise
    kind: torch.Tensor    # (B, L) float32 in (0, 1], which decides what is shown of a predicted token
    at: torch.Tensor = None  # as in Noise

    located, to, split = Noise.located, Noise.to, Noise.split


class BERT(MDLM):
    """The training of BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692), to compare diffusion with it.

    Every token is predicted with probability 0.15. Of the predicted tokens 80 % are shown as masks, 10 % as random
    tokens and 10 % as they are. The loss is the sum of their CE, divided by the expected number of them. So this is
    MDLM at one mask rate, 0.15, apart from the 20 % that are no masks (docs/adaptation.md). All else is MDLM's:
    validation reports its bound over all mask rates, and samplers start from masks only, which this training never
    shows. The log's bits of training are those of the loss.
    """

    rate, shown_as_masks, shown_as_random = 0.15, 0.8, 0.1

    @classmethod
    def misfit(cls, config):
        if config.conditioning != "none":
            return "objective=bert has one mask rate, and no time: use conditioning=none"
        if config.time_sampling != "uniform":
            return "objective=bert has one mask rate: use time_sampling=uniform"
        return super().misfit(config)

    def noise(self, u, v):
        """u (B,), which is not used, v (B, L) -> Selection."""
        weight = v.shape[1] / (self.rate * n_free(v))
        return Selection(v <= self.rate, torch.full((len(v),), self.rate), weight.float(), (v / self.rate).float())

    def shown(self, x0, noise):
        """Return what the network sees of x0 (B, L). The random tokens, too, follow from `kind`."""
        share = (noise.kind - self.shown_as_masks) / self.shown_as_random
        random = (share * self.mask_id).long().clamp(0, self.mask_id - 1)
        shown = torch.where(share <= 0, self.mask_id, torch.where(share <= 1, random, x0))
        return torch.where(noise.mask, shown, x0)

    def loss(self, model, x0, noise):
        shown = self.shown(x0, noise)
        nats = self.nelbo(lambda xt, t, where: model(shown, t, where=where), x0, noise)
        return nats.mean(), nats.detach()
