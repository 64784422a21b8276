"""The Mimi codec: codes to 24 kHz samples and back, as whole utterances or as streams.

Whole utterances are decoded as streams too, so the two cannot diverge.

Source: Defossez et al. 2024, https://arxiv.org/abs/2410.00037
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.decoder import Decoder
from vox_serve.mimi.encoder import Encoder
from vox_serve.mimi.quantizer import Quantizer
from vox_serve.mimi.state import StreamState
from vox_serve.mimi.tensors import PRECISIONS, TensorReader
from vox_serve.mimi.transformer import CHUNK_FRAMES


class Mimi:
    """The codec's weights. It holds no state: callers pass the state of their streams.

    Activations, keys, values and the encoder are float32. The decoder's matrices may have less
    precision, so that a frame reads fewer bytes: "bfloat16", or "int8" for the transformer's
    matrices with bfloat16 convolutions.

    Args:
        config: the codec's sizes.
        tensors: by transformers' names (`decoder.layers.0.conv.weight`, ...), of any float dtype;
            the codec computes on their device.
        precision: "float32", "bfloat16" or "int8".

    Raises:
        ValueError: the precision is unknown, or a tensor is missing or has a wrong shape; the
            message names it.
    """

    def __init__(
        self, config: MimiConfig, tensors: Mapping[str, Tensor], precision: str = "float32"
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, got {precision}")
        reader = TensorReader(tensors)
        self.config = config
        with torch.inference_mode():
            self.quantizer = Quantizer(config, reader)
            self.decoder = Decoder(config, reader.at(precision))
            self.encoder = Encoder(config, reader) if config.has_encoder else None
        reader.refuse_leftover_layers()
        self.device = self.quantizer.device

    def decode(self, codes: Tensor) -> Tensor:
        """Decode whole utterances.

        Args:
            codes: `[B, N, K]` integers, K from 1 to the number of codebooks. Codes are clamped to
                0..`codebook_size - 1` (CSM's vocabulary is larger).

        Returns:
            `[B, N * frame_samples]` float32 at `sample_rate_hz`.

        Raises:
            ValueError: a wrong shape.
        """
        return self.decode_step(codes, self.init_state(codes.shape[0]))

    def init_state(self, batch_size: int = 1) -> StreamState:
        """The state of new decoding streams."""
        return self._init_state(self.decoder, batch_size)

    @torch.inference_mode()
    def decode_step(self, codes: Tensor, state: StreamState) -> Tensor:
        """Decode the next frames of B streams, without waiting for the device.

        Args:
            codes: `[B, n, K]` integers, as in `decode`; n may be 0 and may vary from call to call.
            state: from `init_state`, or a view of its first rows; updated in place.

        Returns:
            `[B, n * frame_samples]` float32: the samples of `decode`, however the stream is cut
            into steps.

        Raises:
            ValueError: a wrong shape.
        """
        limit = self.config.num_codebooks
        if codes.dim() != 3 or not 1 <= codes.shape[2] <= limit:
            raise ValueError(f"codes must be [B, n, 1 to {limit}], got {list(codes.shape)}")
        self._check_rows("codes", codes, state)
        batch, frames, _ = codes.shape
        if codes.numel() == 0:
            return self._zeros(batch, frames * self.config.frame_samples)
        chunks = codes.to(self.device, torch.int64).split(CHUNK_FRAMES, dim=1)
        parts = [self.decoder(self.quantizer.decode(chunk), state) for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def encode(self, audio: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Encode whole recordings, padded with silence to whole frames (as moshi and CSM do).

        Args:
            audio: `[B, S]` at `sample_rate_hz`, in -1..1.
            num_codebooks: K, 1 to the number of codebooks; None for all.

        Returns:
            `[B, ceil(S / frame_samples), K]` int64.

        Raises:
            ValueError: a wrong shape or K, or the checkpoint has no encoder.
        """
        if audio.dim() != 2:
            raise ValueError(f"audio must be [B, S], got {list(audio.shape)}")
        audio = torch.nn.functional.pad(audio, (0, -audio.shape[1] % self.config.frame_samples))
        return self.encode_step(audio, self.init_encoder_state(audio.shape[0]), num_codebooks)

    def init_encoder_state(self, batch_size: int = 1) -> StreamState:
        """The state of new encoding streams.

        Raises:
            ValueError: the checkpoint has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this Mimi checkpoint has no encoder")
        return self._init_state(self.encoder, batch_size)

    @torch.inference_mode()
    def encode_step(
        self, audio: Tensor, state: StreamState, num_codebooks: int | None = None
    ) -> Tensor:
        """Encode the next frames of B streams.

        Args:
            audio: `[B, n * frame_samples]`, n may be 0.
            state: from `init_encoder_state`; updated in place.
            num_codebooks: as in `encode`.

        Returns:
            `[B, n, K]` int64.

        Raises:
            ValueError: a wrong shape or K, or the checkpoint has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this Mimi checkpoint has no encoder")
        limit, frame_samples = self.config.num_codebooks, self.config.frame_samples
        width = limit if num_codebooks is None else num_codebooks
        if not 1 <= width <= limit:
            raise ValueError(f"num_codebooks must be 1 to {limit}, got {width}")
        if audio.dim() != 2 or audio.shape[1] % frame_samples:
            raise ValueError(
                f"audio must be [B, n * {frame_samples}] samples, got {list(audio.shape)}"
            )
        self._check_rows("audio", audio, state)
        if audio.numel() == 0:
            shape = audio.shape[0], audio.shape[1] // frame_samples, width
            return self._zeros(*shape).to(torch.int64)
        chunks = audio.to(self.device, torch.float32).split(CHUNK_FRAMES * frame_samples, dim=1)
        return torch.cat(
            [self.quantizer.encode(self.encoder(chunk, state), width) for chunk in chunks], dim=1
        )

    def _init_state(self, half: Decoder | Encoder, batch_size: int) -> StreamState:
        return StreamState(
            torch.zeros(batch_size, dtype=torch.int64, device=self.device),
            half.transformer.ring(batch_size),
            half.transformer.ring(batch_size),
            tuple(self._zeros(batch_size, *context) for context in half.contexts),
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def _check_rows(self, name: str, rows: Tensor, state: StreamState) -> None:
        if rows.shape[0] != state.batch_size:
            raise ValueError(f"{name} has {rows.shape[0]} rows, its state {state.batch_size}")
