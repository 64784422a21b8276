"""Builds an engine from a model's name and the settings."""

import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from vox_serve.config import Config
from vox_serve.context_file import default_context, load_context
from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.engine import Choose, Engine
from vox_serve.fifo import choose_all
from vox_serve.hub import BUILT_IN_VOICES, resolve_adapter, resolve_model, resolve_tokenizer
from vox_serve.kv_cache import KvCache
from vox_serve.memory import memory_bytes
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.model_files import folder_of, gguf_of, model_config, prompt_builder
from vox_serve.prompt import PromptBuilder
from vox_serve.weights import load_checkpoint, load_codec
from voxkern.backend import backend_for, forced, why_missing

logger = logging.getLogger("vox_serve")

SMALL_MODEL_PARAMETERS = 100_000_000
"""Below this size a CPU runs float32 about as fast as any dtype, so "auto" means float32."""

PREFIX_CACHE_BYTES = 2**29

GPU_ROWS, CPU_ROWS, FIFO_ROWS = 64, 32, 8
"""Requests that are spoken at the same time, by default. A step reads every weight once for all, so
a GPU gains from many: 64 sequences of 2048 positions take 4 GiB of CSM-1B's keys and values. The
deadline policy begins no more streams than a CPU can speak; without it, more than a few are slower
than real time."""


def load_engine(
    model: str | Path,
    num_spare_rows: int = 0,
    choose: Choose = choose_all,
    keeps_one: bool = False,
    **settings: Any,
) -> Engine:
    """Load a model, its codec, tokenizer and context.

    Args:
        model: built-in voice, local folder, GGUF file or hub id.
        num_spare_rows, choose: see `Engine`.
        keeps_one: unless `prefix_cache_bytes` is set, the prefix cache keeps one sequence at most:
            enough where one request follows another and begins as the last one did.
        settings: `Config`'s other fields by name; those not given come from the environment or
            their defaults. `dtype` may be a `torch.dtype` too.

    Raises:
        ValueError, OSError: a setting is invalid, or a part is unavailable or does not fit; one
            line names it and says why.
    """
    if isinstance(settings.get("dtype"), torch.dtype):
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    setting = Config(model=str(model), **settings)
    place = resolve_model(setting.model)
    place, folder = gguf_of(place) or place, folder_of(place)
    adapter = (
        None if setting.adapter is None else resolve_adapter(setting.adapter, setting.allow_pickle)
    )
    tokenizer = None if setting.tokenizer is None else resolve_tokenizer(setting.tokenizer)
    if tokenizer is None and adapter and (adapter / "tokenizer.json").is_file():
        tokenizer = adapter
    device = torch.device(choose_device() if setting.device == "auto" else setting.device)
    if device.type == "cuda" and (reason := _why_no_gpu()):
        raise ValueError(f"device cuda: {reason}")
    config = model_config(place, setting.allow_pickle)
    small = _num_parameters(config) < SMALL_MODEL_PARAMETERS
    if setting.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" and small else torch.bfloat16
    else:
        dtype = getattr(torch, setting.dtype)

    quantize = setting.quantize
    caches = cache_folders(setting.weight_cache, place, small, adapter)
    checkpoint = load_checkpoint(
        place, dtype, device, setting.allow_pickle, quantize, caches, adapter
    )
    mimi = load_codec(checkpoint, setting.codec, codec_precision(device.type, dtype, quantize))
    config = checkpoint.config  # config.json may have changed since
    _check_context_fits(config, dtype, device)
    if setting.context == "none":
        segments = []
    elif setting.context is not None:
        segments = load_context(setting.context, mimi, config, setting.max_text_chars)
    else:
        segments = default_context(folder, mimi, config)
    if tokenizer is None:
        prompts = prompt_builder(place, config)
    else:
        prompts = PromptBuilder.from_folder(tokenizer, config)
    max_batch_size = setting.max_batch_size
    if max_batch_size is None:
        is_cuda = device.type == "cuda"
        memory = torch.cuda.mem_get_info(device)[0] if is_cuda else memory_bytes()
        most = GPU_ROWS if is_cuda else FIFO_ROWS if choose is choose_all else CPU_ROWS
        max_batch_size = choose_batch_size(
            most, KvCache.sequence_bytes(config.backbone, dtype), memory
        )
    most_cached = PREFIX_CACHE_BYTES
    if keeps_one:
        most_cached = min(most_cached, KvCache.sequence_bytes(config.backbone, dtype))
    try:
        return Engine(
            CsmModel(config, checkpoint.weights),
            mimi,
            prompts,
            segments,
            max_batch_size,
            default_max_frames=setting.max_frames,
            max_silence_s=setting.max_silence_s,
            num_spare_rows=num_spare_rows,
            prefix_cache_bytes=choose_cache_bytes(setting.prefix_cache_bytes, device, most_cached),
            normalises=folder.parent == BUILT_IN_VOICES,
            kv_cache_bytes=setting.kv_cache_bytes,
            choose=choose,
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"max_batch_size {max_batch_size}: {reason}") from None


def choose_batch_size(most: int, sequence_bytes: int, memory: int) -> int:
    """The default number of requests that are spoken at the same time.

    Args:
        most: at most so many.
        sequence_bytes: bytes of keys and values of the longest sequence.
        memory: a GPU's free bytes, or all bytes of a CPU; half are left for other uses.
    """
    return max(1, min(most, memory // 2 // sequence_bytes))


def choose_cache_bytes(setting: int | None, device: torch.device, most: int) -> int:
    """Bytes of the prefix cache: the setting, or else `most`, but an eighth of a small memory."""
    if setting is not None:
        return setting
    is_cuda = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if is_cuda else memory_bytes()
    return min(most, memory // 8)


def codec_precision(device_type: str, dtype: torch.dtype, quantize: str) -> str:
    """`Mimi`'s precision for a model's dtype and packing.

    On a CPU the codec is bound by memory reads, and it is rounded only if the model is packed. On a
    GPU it is bound by arithmetic, which is fastest in bfloat16.
    """
    if device_type == "cpu":
        return "float32" if quantize == "none" else "int8"
    return str(dtype).removeprefix("torch.")


def cache_folders(
    setting: str | None, model: Path, small: bool, adapter: Path | None = None
) -> list[Path]:
    """Candidate folders for a model's packed weights, in order of preference.

    Args:
        setting: a folder, in which each model gets a subfolder; "none" for no cache; None for
            `.voxkern` in the model's folder or, if that cannot be written to, the user's cache
            folder, but no cache if the model is small.
        model: the model's folder, or its GGUF file: several in a folder have a cache each.
        small: the model is small enough to be packed at every start.
        adapter: the folder of an adapter; the model's weights with it have a subfolder of their
            own.
    """
    if setting == "none" or (setting is None and small):
        return []
    is_file = model.is_file()
    subfolder = _named_by_path(model.parent.resolve() / model.name if is_file else model.resolve())
    below = "" if adapter is None else f"adapter-{_named_by_path(adapter.resolve())}"
    if setting is not None:
        return [Path(setting).expanduser() / subfolder / below]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = model.parent / ".voxkern" / model.stem if is_file else model / ".voxkern"
    candidates = [beside / below]
    if user_cache.is_absolute():
        candidates.append(user_cache / "voxkern" / subfolder / below)
    return candidates


def _named_by_path(path: Path) -> str:
    """A name for a file or folder that tells it from others of the same name."""
    return f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def choose_device() -> str:
    """The device that "auto" stands for on this machine: "cuda" or "cpu"."""
    reason = _why_no_gpu()
    if reason and torch.cuda.is_available():
        logger.warning("The GPU is not used: %s", reason)
    return "cpu" if reason else "cuda"


def _why_no_gpu() -> str | None:
    """The reason why no GPU can be used; None if the kernels, or a forced backend, run on one."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if (backend := forced()) and (reason := why_missing(backend, "cuda")):
        return f"backend {backend}: {reason}"
    if backend or backend_for("cuda") != "reference":
        return None
    return (
        f"{why_missing('native', 'cuda')}; {why_missing('triton', 'cuda')}; either will do: for "
        "the first, install nvcc and run VOXKERN_CUDA=on pip install --no-build-isolation -e . "
        "(--backend reference does without both, slowly)"
    )


def _num_parameters(config: CsmConfig) -> int:
    shapes = [
        *TransformerWeights.shapes(config.backbone).values(),
        *TransformerWeights.shapes(config.depth).values(),
        *(s for name, s in CsmWeights.shapes(config).items() if name != "depth_audio_rows"),
    ]
    return sum(math.prod(shape) for shape in shapes)


def _check_context_fits(config: CsmConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a context whose keys, values or rotary angles cannot fit the device's memory."""
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = memory_bytes()
    for where, part, needed in (
        ("", config.backbone, KvCache.sequence_bytes(config.backbone, dtype)),
        ("depth_decoder_config.", config.depth, 0),
    ):
        needed += 4 * part.max_positions * part.head_dim
        if needed > memory:
            raise ValueError(
                f"config.json: {where}max_position_embeddings {part.max_positions} needs "
                f"{needed / 2**30:.1f} GiB for one request, and {device} has "
                f"{memory / 2**30:.1f} GiB"
            )
