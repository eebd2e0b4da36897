"""Decoders: parameter pins, the equations written out, and refusals."""

import pytest
import torch
import torch.nn.functional as F

from spikefleet_models.decoders import AttentionSpikeDecoder, RateDecoder


def spikes(T: int = 4, C: int = 32) -> torch.Tensor:
    return (torch.rand(T, 2, C, 6, 5) < 0.3).float()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_rate_is_the_mean_over_time() -> None:
    x = spikes()
    assert torch.equal(RateDecoder()(x), x.mean(0))


@pytest.mark.parametrize(("reduction", "expected"), [(1, 32_898), (2, 32_882), (4, 32_874)])
def test_parameter_pins(reduction: int, expected: int) -> None:
    assert parameters(AttentionSpikeDecoder(512, 4, temporal_reduction=reduction)) == expected


def test_equations_of_the_paper() -> None:
    torch.manual_seed(0)
    decoder, x = AttentionSpikeDecoder(32, 4), spikes()
    t1, t2 = (decoder.temporal[i].weight for i in (0, 2))
    c1, c2 = (decoder.channel[i].weight for i in (0, 2))
    for b in range(2):
        one = x[:, b]
        attention = torch.sigmoid(t2 @ F.relu(t1 @ one.mean((1, 2, 3))))
        x_t = (one * attention.view(4, 1, 1, 1)).mean(0)
        channel = c2 @ F.relu(c1 @ x_t.mean((1, 2))) + c2 @ F.relu(c1 @ x_t.amax((1, 2)))
        x_tc = x_t * torch.sigmoid(channel).view(32, 1, 1)
        maps = torch.stack((x_tc.mean(0), x_tc.amax(0)))[None]
        x_tcs = x_tc * torch.sigmoid(F.conv2d(maps, decoder.spatial.weight, padding=3))[0]
        torch.testing.assert_close(decoder(x)[b], x_tcs + one.mean(0))


def test_order_of_steps_matters_to_asd_and_not_to_rate() -> None:
    torch.manual_seed(0)
    decoder, x = AttentionSpikeDecoder(32, 4), spikes()
    assert not torch.allclose(decoder(x), decoder(x.flip(0)))
    assert torch.allclose(RateDecoder()(x), RateDecoder()(x.flip(0)))


def test_gradient_reaches_every_parameter_and_the_spikes() -> None:
    decoder, x = AttentionSpikeDecoder(32, 4), spikes().requires_grad_()
    decoder(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    assert x.grad.abs().sum() > 0


def test_refusals_name_the_field() -> None:
    with pytest.raises(ValueError, match="asd_channel_reduction=16 must divide the 24 channels"):
        AttentionSpikeDecoder(24, 4)
    with pytest.raises(ValueError, match="asd_temporal_reduction=3 must divide timesteps=4"):
        AttentionSpikeDecoder(32, 4, temporal_reduction=3)
    with pytest.raises(ValueError, match="built for T=4, found T=2"):
        AttentionSpikeDecoder(32, 4)(spikes(T=2))
