"""The codec of the built-in voice: Mimi's architecture in small, and what training it needs.

transformers' Mimi has no training path for its quantizer: `train_quantize` is one (straight-through
gradients, exponential moving averages written into the codebook buffers Mimi saves anyway).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CsmForConditionalGeneration, MimiConfig, MimiModel

import pulse_codes
from pulse_codes import PULSE_DIM

CODEBOOK_SIZE = 512
CONTENT_DIM = 64  # codebook dimensions of every codebook but the pulse codes
PULSE_BOOK = 1  # index of the codebook of pulse codes
MEL_BINS = 80
MEL_HOP_SAMPLES = 240
MEL_FLOOR = 1e-3  # -60 dB: a lower floor makes the loss chase inaudible noise
EMA_DECAY = 0.94
DEAD_SHARE = 0.01  # of the mean usage: below it a code is moved onto a random vector


def make_config(num_codebooks: int) -> MimiConfig:
    return MimiConfig(
        attn_implementation="eager",  # its backward pass is the faster one at these lengths
        hidden_size=256,
        num_filters=32,
        num_hidden_layers=3,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=CONTENT_DIM + PULSE_DIM,
        vector_quantization_hidden_dimension=CONTENT_DIM + PULSE_DIM,
        num_quantizers=num_codebooks,
        upsample_groups=256,
        sliding_window=125,
        layer_scale_initial_scale=0.1,
        max_position_embeddings=8000,
    )


@dataclass
class Parts:
    """Mimi's modules between the waveform and the quantizer, in both directions."""

    encoder_seanet: nn.Module
    encoder_transformer: nn.Module
    downsample: nn.Module
    upsample: nn.Module
    decoder_transformer: nn.Module
    decoder_seanet: nn.Module


# Where transformers keeps each of the Parts: since it has MimiEncoderModel, and before.
PART_PATHS = {
    "encoder_seanet": ("encoder.encoder_seanet", "encoder"),
    "encoder_transformer": ("encoder.encoder_transformer", "encoder_transformer"),
    "downsample": ("encoder.downsample", "downsample"),
    "upsample": ("decoder.upsample", "upsample"),
    "decoder_transformer": ("decoder.decoder_transformer", "decoder_transformer"),
    "decoder_seanet": ("decoder.decoder_seanet", "decoder"),
}


def parts(codec: MimiModel) -> Parts:
    modules = dict(codec.named_modules())
    found = {}
    for name, paths in PART_PATHS.items():
        path = next((path for path in paths if path in modules), None)
        if path is None:
            raise RuntimeError(
                f"this transformers' MimiModel has no module {' or '.join(paths)}; "
                f"add its name to PART_PATHS in {__file__}"
            )
        found[name] = modules[path]
    return Parts(**found)


def mel_filters(n_fft: int, bins: int, device="cpu") -> torch.Tensor:
    """Triangular filters of unit sum, HTK's mel scale, 20 Hz to 12 kHz: [bins, n_fft // 2 + 1]."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (20, 12000))
    edges = 700 * (10 ** (torch.linspace(low, high, bins + 2) / 2595) - 1)
    freqs = torch.linspace(0, 12000, n_fft // 2 + 1)
    rising = (freqs - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - freqs) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rising, falling).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True).clamp(min=1e-8)).to(device)


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B, MEL_BINS, S / 240]; bin n is centred on sample 240 n + 120."""
    window = torch.hann_window(1024, device=audio.device)
    padded = F.pad(audio, (392, 392))
    spectrum = torch.stft(
        padded, 1024, MEL_HOP_SAMPLES, window=window, center=False, return_complex=True
    )
    return torch.log(mel_filters(1024, MEL_BINS, audio.device) @ spectrum.abs() + MEL_FLOOR)


def rvqs(codec: MimiModel):
    quantizer = codec.quantizer
    return (
        quantizer.semantic_residual_vector_quantizer,
        quantizer.acoustic_residual_vector_quantizer,
    )


def codebook_vectors(book) -> torch.Tensor:
    return book.embed_sum / book.cluster_usage.clamp(min=book.epsilon)[:, None]


def nearest(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code, [N]; the vectors' own norms do not matter."""
    return ((codes * codes).sum(1) - 2 * vectors @ codes.T).argmin(1)


@torch.no_grad()
def install_pulses(codec: MimiModel):
    """Give the pulse codes their codebook, and the last PULSE_DIM channels to carry them.

    The codebooks share no dimension with it, so quantizing in turn finds each on its own.
    """
    vectors = torch.from_numpy(pulse_codes.embeddings()[0])
    book = rvqs(codec)[1].layers[PULSE_BOOK - 1].codebook
    book.embed_sum.zero_()
    book.embed_sum[:, CONTENT_DIM:] = vectors
    book.cluster_usage.fill_(1.0)
    book._embed = None
    keep_pulses(codec)


@torch.no_grad()
def keep_pulses(codec: MimiModel):
    """Make the pulse channels what the codebook says, and nothing else: no content in them, no
    pulses in the other channels, no writing by the decoder transformer. Call it after every
    optimizer step, since every step trains these weights a little."""
    kernel = torch.from_numpy(pulse_codes.embeddings()[1])
    for rvq in rvqs(codec):
        rvq.output_proj.weight[-PULSE_DIM:] = 0
        rvq.output_proj.weight[:, CONTENT_DIM:] = 0
    rvqs(codec)[1].output_proj.weight[-PULSE_DIM:, CONTENT_DIM:, 0] = torch.eye(PULSE_DIM)
    parts(codec).upsample.conv.weight[-PULSE_DIM:, 0] = kernel
    for layer in parts(codec).decoder_transformer.layers:
        for scale in (layer.self_attn_layer_scale, layer.mlp_layer_scale):
            scale.scale[-PULSE_DIM:] = 0


def has_pulses(book) -> bool:
    return bool(book.embed_sum[:, CONTENT_DIM:].any())


def pulse_vectors(codec: MimiModel, pulses):
    """Pulse codes [B, N] -> [B, D, N]."""
    book = rvqs(codec)[1].layers[PULSE_BOOK - 1].codebook
    return codebook_vectors(book)[pulses].transpose(1, 2)


def content(projected):
    """[B, D, N] with the dimensions of the pulse codes set to zero."""
    return F.pad(projected[:, :CONTENT_DIM], (0, 0, 0, projected.shape[1] - CONTENT_DIM))


def train_quantize(codec: MimiModel, latents, update: bool, kept=None, pulses=None):
    """Split residual quantization with gradients.

    latents [B, C, N] float32; kept [B]: how many codebooks each item's sum takes (None: all);
    pulses [B, N]: the pulse codes, which are not learnt (None: every codebook is).
    -> (quantized [B, C, N], its semantic part [B, C, N], commitment loss, codes [B, K, N])
    """
    batch, _, length = latents.shape
    sums, codes, commitment = [], [], 0.0
    for rvq in rvqs(codec):
        projected = rvq.input_proj(latents)
        if pulses is not None:
            projected = content(projected)
        flat = projected.transpose(1, 2).reshape(-1, projected.shape[1])
        residual, total = flat, torch.zeros_like(flat)
        scale = flat.detach().var() + 1e-4
        for layer in rvq.layers:
            book = layer.codebook
            vectors = codebook_vectors(book)
            if pulses is not None and len(codes) == PULSE_BOOK:
                total = total + vectors[pulses.reshape(-1)]
                codes.append(pulses)
                continue
            with torch.no_grad():
                index = nearest(residual, vectors)
            chosen = vectors[index]
            commitment = commitment + F.mse_loss(residual, chosen) / scale
            if update:
                update_codebook(book, residual.detach(), index)
            take = 1.0
            if kept is not None:
                take = (kept > len(codes)).repeat_interleave(length)[:, None].to(flat.dtype)
            total = total + chosen * take
            residual = residual - chosen
            codes.append(index.view(batch, length))
        through = flat + (total - flat).detach()
        sums.append(rvq.output_proj(through.view(batch, length, -1).transpose(1, 2)))
    return sums[0] + sums[1], sums[0], commitment / len(codes), torch.stack(codes, 1)


@torch.no_grad()
def update_codebook(book, vectors, index):
    """One EMA step (van den Oord 2017, appendix A.1); codes nobody uses are moved."""
    counts = torch.bincount(index, minlength=book.codebook_size).to(vectors.dtype)
    sums = torch.zeros_like(book.embed_sum).index_add_(0, index, vectors)
    book.cluster_usage.mul_(EMA_DECAY).add_(counts, alpha=1 - EMA_DECAY)
    book.embed_sum.mul_(EMA_DECAY).add_(sums, alpha=1 - EMA_DECAY)
    mean_usage = len(vectors) / book.codebook_size
    dead = book.cluster_usage < DEAD_SHARE * mean_usage
    picks = torch.randint(0, len(vectors), (int(dead.sum()),), device=vectors.device)
    book.embed_sum[dead] = vectors[picks] * mean_usage * 0.3
    book.cluster_usage[dead] = mean_usage * 0.3
    book._embed = None


def lloyd(points, vectors, steps: int):
    """k-means of points [N, D] from vectors [size, D], which is returned improved."""
    for _ in range(steps):
        index = nearest(points, vectors)
        counts = torch.bincount(index, minlength=len(vectors))[:, None].float()
        sums = torch.zeros_like(vectors).index_add_(0, index, points)
        vectors = torch.where(counts > 0, sums / counts.clamp(min=1), vectors)
    return vectors


@torch.no_grad()
def init_codebooks(codec: MimiModel, latents):
    """k-means on [B, C, N] latents, one codebook after the other."""
    for rvq in rvqs(codec):
        projected = content(rvq.input_proj(latents))
        residual = projected.transpose(1, 2).reshape(-1, projected.shape[1])
        for layer in rvq.layers:
            if has_pulses(layer.codebook):
                continue
            size = layer.codebook.codebook_size
            vectors = residual[torch.randperm(len(residual), device=residual.device)[:size]].clone()
            vectors = lloyd(residual, vectors, 8)
            layer.codebook.cluster_usage.fill_(4.0)
            layer.codebook.embed_sum.copy_(vectors * 4.0)
            layer.codebook._embed = None
            residual = residual - vectors[nearest(residual, vectors)]


def load_codec(checkpoint) -> MimiModel:
    """The codec of a voice's folder."""
    return CsmForConditionalGeneration.from_pretrained(checkpoint).codec_model.float().eval()


def waveform_latents(codec: MimiModel, audio):
    """[B, S] -> [B, C, S / 1920], as in MimiModel.encode."""
    encoder = parts(codec)
    hidden = encoder.encoder_seanet(audio[:, None])
    hidden = encoder.encoder_transformer(hidden.transpose(1, 2)).last_hidden_state
    return encoder.downsample(hidden.transpose(1, 2)).float()


@torch.no_grad()
def reserve_stop_code(codec: MimiModel):
    """Move code 0 of codebook 0 out of reach: an all-zero frame can then only mean stop."""
    book = rvqs(codec)[0].layers[0].codebook
    book.embed_sum[0] = 1e4
    book.cluster_usage[0] = 1.0
    book._embed = None


def decoder_states(codec: MimiModel, quantized):
    """[B, C, N] -> what the SEANet decoder reads, [B, 2N, C]."""
    decoder = parts(codec)
    upsampled = decoder.upsample(quantized).transpose(1, 2)
    return decoder.decoder_transformer(upsampled).last_hidden_state


class MelFront(nn.Module):
    """Stands in for the SEANet encoder in stage 1: mel at 100 Hz -> [B, C, T / 4], causal."""

    def __init__(self, dim: int):
        super().__init__()
        self.input = nn.Linear(4 * MEL_BINS, dim)
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3) for _ in range(3))

    def forward(self, mel):
        batch, bins, length = mel.shape
        stacked = (mel / 3 + 1).view(batch, bins, length // 4, 4).permute(0, 2, 1, 3)
        x = self.input(stacked.reshape(batch, length // 4, 4 * bins)).transpose(1, 2)
        for conv in self.convs:
            x = x + conv(F.pad(F.gelu(x), (2, 0)))
        return x


class MelHead(nn.Module):
    """Stands in for the SEANet decoder in stage 1: [B, T, C] at 25 Hz -> mel [B, bins, 4T]."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 512), nn.GELU(), nn.Linear(512, 4 * MEL_BINS))

    def forward(self, states):
        batch, length, _ = states.shape
        mel = self.net(states).view(batch, length, MEL_BINS, 4).permute(0, 2, 1, 3)
        return (mel.reshape(batch, MEL_BINS, 4 * length) - 1) * 3


class Stage1(nn.Module):
    """Mimi's 25 Hz parts between a mel front-end and a mel head, with a phone classifier."""

    def __init__(self, config: MimiConfig, num_phones: int):
        super().__init__()
        self.codec = MimiModel(config)
        install_pulses(self.codec)
        self.front = MelFront(config.hidden_size)
        self.head = MelHead(config.hidden_size)
        self.phones = nn.Linear(config.hidden_size, 4 * num_phones)
        self.fixed = nn.Buffer(torch.tensor(False))  # whether encoder and codes are final

    def seanet_names(self) -> set[str]:
        """Names of the parameters that stage 1 does not train: the two convolution stacks."""
        found = parts(self.codec)
        stacks = (found.encoder_seanet, found.decoder_seanet)
        stack_parameters = {id(p) for stack in stacks for p in stack.parameters()}
        return {name for name, p in self.named_parameters() if id(p) in stack_parameters}

    def latents(self, mel):
        encoder = parts(self.codec)
        hidden = self.front(mel).transpose(1, 2)
        hidden = encoder.encoder_transformer(hidden).last_hidden_state
        return encoder.downsample(hidden.transpose(1, 2))
