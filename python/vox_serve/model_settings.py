"""The settings of a model: what is loaded, where it runs, and in which precision."""

from typing import Annotated, Literal

from vox_serve.setting import Settings, Shown, setting

DEFAULT_CODEC = "kyutai/mimi"


class ModelSettings(Settings):
    title = "model"

    model: str = setting(
        "demo",
        "built-in voice, local folder or .gguf file, or hub id such as sesame/csm-1b; "
        "hub/id:q8_0 takes one GGUF file of several",
    )
    codec: Annotated[str | None, Shown(f"the model's own, else {DEFAULT_CODEC}")] = setting(
        None, "folder, file or hub id of the Mimi codec"
    )
    adapter: Annotated[str | None, Shown("none")] = setting(
        None, "LoRA adapter that is merged into the model: local folder, or hub id"
    )
    tokenizer: Annotated[str | None, Shown("the adapter's or the model's own")] = setting(
        None, "folder or hub id with a tokenizer.json, for a checkpoint without one"
    )
    max_speaker: Annotated[int | None, Shown("what the model says, else 1")] = setting(
        None, "highest `speaker` of a request, for a model of more than two", ge=0, le=2**31 - 1
    )
    context: Annotated[str | None, Shown("the model's own prompts, if it has any")] = setting(
        None, "context.json whose segments come before every text; 'none' for no context"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU if there is one")
    backend: Literal["auto", "native", "triton", "reference"] = setting(
        "auto",
        "implementation of the ops; auto takes the first that has an op, or VOXKERN_BACKEND's",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "dtype of weights and KV cache; auto is bfloat16, but float32 for a tiny model on a CPU",
    )
    quantize: Literal["none", "int8", "int4"] = setting(
        "none", "packed weights; int4 keeps the heads in int8; both round the codec's decoder"
    )
    weight_cache: Annotated[
        str | None,
        Shown(".voxkern in the model's folder, else in ~/.cache/voxkern; none if small"),
    ] = setting(
        None,
        "folder for packed weights, memory-mapped by later starts; 'none' packs at every start",
    )
    prefix_cache_bytes: Annotated[
        int | None, Shown("512 MiB, at most an eighth of the memory; `say` keeps one sequence")
    ] = setting(
        None,
        "keys and values kept of contexts and speech, for requests that begin alike",
        ge=0,
        le=2**40,
    )
    kv_cache_bytes: Annotated[
        int | None, Shown("room for `--max_batch_size` requests of full length")
    ] = setting(
        None,
        "keys and values of the requests that are spoken; with less than they need, some wait, and "
        "theirs are computed again",
        ge=1,
        le=2**50,
    )
    num_threads: Annotated[int | None, Shown("all that this process may use")] = setting(
        None, "CPU threads of the kernels", ge=1, le=1024
    )
    allow_pickle: bool = setting(False, "read .pt checkpoints too (tensors only, never code)")
    max_text_chars: int = setting(
        100_000, "longest text, in characters; a request with a longer one gets 422", ge=1, le=2**30
    )
    split_chars: int = setting(
        400,
        "longer texts are spoken in parts, which end where sentences do; 0 for no parts",
        ge=0,
        le=2**30,
    )
    max_silence_s: float = setting(
        3.0,
        "silence after which speech is cut; 0 for no such cut, and none by the text's length",
        ge=0,
        le=3600,
    )
