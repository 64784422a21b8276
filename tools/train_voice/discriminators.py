"""The adversarial run's discriminators: small versions of EnCodec's and HiFi-GAN's."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class ScaleDiscriminator(nn.Module):
    def __init__(self, n_fft: int, channels: int = 16):
        super().__init__()
        self.n_fft = n_fft
        self.window = nn.Buffer(torch.hann_window(n_fft))
        sizes = [2, channels, channels, channels, channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(i, o, (3, 9), stride=(1, 2), padding=(1, 4)))
            for i, o in itertools.pairwise(sizes)
        )
        self.convs.append(weight_norm(nn.Conv2d(channels, channels, 3, padding=1)))
        self.output = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, audio):
        """[B, 1, S] -> (logits, [features])"""
        hop = self.n_fft // 4
        spectrum = torch.stft(
            audio.squeeze(1), self.n_fft, hop, window=self.window, return_complex=True
        )
        x = torch.view_as_real(spectrum * 4 / self.n_fft**0.5).permute(0, 3, 2, 1)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.output(x).float(), features


class PeriodDiscriminator(nn.Module):
    """Sees the samples folded into rows of one period, and convolves down the columns."""

    def __init__(self, period: int):
        super().__init__()
        self.period = period
        sizes = [1, 16, 32, 64, 64]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(i, o, (5, 1), stride=(3, 1), padding=(2, 0)))
            for i, o in itertools.pairwise(sizes)
        )
        self.output = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, audio):
        """[B, 1, S] -> (logits, [features])"""
        x = F.pad(audio, (0, -audio.shape[-1] % self.period))
        x = x.unflatten(-1, (-1, self.period)) * 4
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.output(x).float(), features
