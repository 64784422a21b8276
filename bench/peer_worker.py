"""One peer in its own process; bench/peers.py starts it and requests frames.

    python bench/peer_worker.py PROGRAM PRECISION FOLDER THREADS

Prints lines of JSON: first `{"bytes": [once, step, steps], "description": ...}` once it is loaded
and warm, then `{"ms": [...]}` for every number of frames that it reads from stdin.
"""

import json
import os
import sys
from pathlib import Path

import torch
from csm_1b_shapes import CSM_1B, TEXT_ROWS

from vox_serve.csm_weights import CsmWeights
from vox_serve.frame_bytes import frame_bytes
from vox_serve.model_config import CsmConfig


def load(program: str, precision: str, folder: Path, threads: int) -> tuple:
    """The peer's frames, its `FrameBytes`, and a description: versions or instruction sets."""
    config = CsmConfig.from_json({**CSM_1B, "text_vocab_size": TEXT_ROWS})
    if program == "llama.cpp":
        from llama_frames import FORMATS, LlamaFrames, llama_frame_bytes

        frames = LlamaFrames(config, precision, folder, threads)
        return frames, llama_frame_bytes(config, FORMATS[precision]), frames.description()
    torch.set_num_threads(threads)
    if program == "voxkern":
        from bench_frame import OurFrames, our_model

        import voxkern

        voxkern.set_num_threads(threads)
        model = our_model(config, precision)
        description = f"torch {torch.__version__}, {torch.ops.voxkern.cpu_isa()}"
        return OurFrames(model, 1), frame_bytes(model.weights), description
    import transformers
    from transformers_frames import TransformersFrames

    weights = CsmWeights.random(config, getattr(torch, precision))
    frames = TransformersFrames(config, weights, 1, compiled=program == "torch.compile")
    description = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return frames, frame_bytes(weights), description


def main() -> None:
    # Libraries print to descriptor 1, so the answers get their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program, precision, folder, threads = sys.argv[1:]
    frames, read, description = load(program, precision, Path(folder), int(threads))
    frames.frames_ms(2)
    ready = {"bytes": [read.once, read.step, read.steps], "description": description}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": frames.frames_ms(int(line))}), file=answers, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
