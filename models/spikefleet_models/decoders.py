"""Decoders: spike features [T, B, C, H, W] -> analogue features [B, C, H, W].

Attention spike decoder (ASD): Zhang et al. 2023, section 3.4 and figure 4, on the attention blocks of CBAM (Woo et
al. 2018):

    TA  X_TA = X * sigmoid(MLP_T(mean_{C,H,W} X))
    X_T = mean_T X_TA
    CA  X_TC = X_T * sigmoid(MLP_C(mean_{H,W} X_T) + MLP_C(max_{H,W} X_T))
    SA  X_TCS = X_TC * sigmoid(conv7x7([mean_C X_TC, max_C X_TC]))
    Y = X_TCS + mean_T X

The paper leaves open, and this file chooses: reduction 1 in TA, 16 in CA; no biases; ReLU inside both MLPs. These meet
its parameter count (32,898 for C = 512, T = 4). "TA and SA use max-pooling" in its text means CA and SA.

`decode_over_time` gives what each of them decodes from the first t of T steps, for the answer of a network before all
steps have come.
"""

import torch
from torch import Tensor, nn


class RateDecoder(nn.Module):
    """Firing rate: the mean over T."""

    def forward(self, spikes: Tensor) -> Tensor:
        """Average over T: [T, B, C, H, W] -> [B, C, H, W]."""
        return spikes.mean(0)


class AttentionSpikeDecoder(nn.Module):
    """Attention spike decoder (ASD) for a fixed T, since the temporal attention has T inputs.

    Args:
        channels: C.
        timesteps: T.
        channel_reduction: r of the channel attention; must divide C.
        temporal_reduction: r_t of the temporal attention; must divide T.

    Raises:
        ValueError: a reduction does not divide what it reduces.
    """

    def __init__(self, channels: int, timesteps: int, channel_reduction: int = 16, temporal_reduction: int = 1) -> None:
        super().__init__()
        if channels % channel_reduction:
            raise ValueError(
                f"asd_channel_reduction={channel_reduction} must divide the {channels} channels to decode; "
                "set a divisor"
            )
        if timesteps % temporal_reduction:
            raise ValueError(
                f"asd_temporal_reduction={temporal_reduction} must divide timesteps={timesteps}; set a divisor"
            )
        self.timesteps = timesteps
        hidden_steps, hidden_channels = timesteps // temporal_reduction, channels // channel_reduction
        self.temporal = nn.Sequential(
            nn.Linear(timesteps, hidden_steps, bias=False), nn.ReLU(), nn.Linear(hidden_steps, timesteps, bias=False)
        )
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden_channels, bias=False),
            nn.ReLU(),
            nn.Linear(hidden_channels, channels, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, spikes: Tensor) -> Tensor:
        """Decode: [T, B, C, H, W] -> [B, C, H, W].

        Raises:
            ValueError: T differs from the T of the temporal attention.
        """
        if spikes.shape[0] != self.timesteps:
            raise ValueError(
                f"the attention spike decoder was built for T={self.timesteps}, found T={spikes.shape[0]}; "
                f"give {self.timesteps} time steps or set timesteps={spikes.shape[0]}"
            )
        step_weights = self.temporal(spikes.mean((2, 3, 4)).t()).sigmoid()
        # Weighting and averaging over T in one contraction; the weighted [T, B, C, H, W] is never stored.
        refined = torch.einsum("tbchw,bt->bchw", spikes, step_weights.to(spikes.dtype)) / self.timesteps
        pooled = self.channel(refined.mean((2, 3))) + self.channel(refined.amax((2, 3)))
        refined = refined * pooled.sigmoid()[:, :, None, None]
        maps = torch.stack((refined.mean(1), refined.amax(1)), dim=1)
        refined = refined * self.spatial(maps).sigmoid()
        return refined + spikes.mean(0)


class StepWeights(nn.Module):
    """One learned weight for each of a fixed number of steps: sum_t w_t X_t, with w_t = 1 / T at first.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((timesteps,), 1.0 / timesteps))

    def forward(self, spikes: Tensor) -> Tensor:
        """Decode: [T, B, C, H, W] -> [B, C, H, W].

        Raises:
            ValueError: T differs from the number of weights.
        """
        if spikes.shape[0] != len(self.weight):
            raise ValueError(
                f"the decoder has weights for T={len(self.weight)}, found T={spikes.shape[0]}; give "
                f"{len(self.weight)} time steps or set timesteps={spikes.shape[0]}"
            )
        return torch.einsum("tbchw,t->bchw", spikes, self.weight.to(spikes.dtype))


def decode_over_time(decoder: nn.Module, spikes: Tensor) -> Tensor:
    """Decode the first step, the first two, and so on: [T, B, C, H, W] -> [T, B, C, H, W].

    Steps that have not come are silent, and those that have are scaled by T / t, so that a mean over T is their own
    mean. The last row is what the decoder makes of all steps, to the bit.
    """
    steps = spikes.shape[0]
    decoded = []
    for t in range(1, steps):
        seen = spikes * (steps / t)
        seen[t:] = 0
        decoded.append(decoder(seen))
    return torch.stack([*decoded, decoder(spikes)])
