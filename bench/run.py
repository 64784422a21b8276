"""VoxKern's benchmarks.

    python bench/run.py roofline   read bandwidth and multiply-add rates of this machine
    python bench/run.py kernels    every op at CSM-1B's shapes, against plain torch
    python bench/run.py frame      whole frames of full-size CSM-1B, against transformers, or of
                                   MisoTTS 8B (--model-shape miso-8b)
    python bench/run.py codec      a streamed frame of full-size Mimi, against transformers
    python bench/run.py speech     steps of the engine: frames, sampling and the codec together
    python bench/run.py all        these five
    python bench/run.py steps      an engine's step by rows and prompt tokens, memory of a stream
    python bench/run.py turns      first audio of a conversation's tenth turn and of a voice prompt
    python bench/run.py depth      questions about the depth decoder on a GPU: launches or one
                                   kernel, overlap of launches, equal runs, cold draws
    python bench/run.py quantization   effect of packed weights on the logits; needs 10 GB of memory
    python bench/run.py peers      whole frames of several programs in turn: ours, llama.cpp,
                                   transformers, torch.compile (details in bench/peers.py). The
                                   first call creates their environment, build/peers, and compiles
                                   llama.cpp in it: up to half an hour on two cores. A run takes
                                   seven minutes and, with all programs, 22 GB of memory
    python bench/run.py serve      listeners of a server under load: first audio, gaps, goodput,
                                   refusals; with options of its own (serve --help)

Options:
    --device cpu|cuda          where to run (default cpu); a GPU supports roofline, kernels, frame,
                               speech, steps and depth, and "all" means the first four
    --rehearse                 runs the GPU's timing code on the CPU with a tiny model: a check that
                               it works; the figures mean nothing
    --model-shape NAME         frame, speech, steps: the sizes, csm-1b (default) or miso-8b: in int4
                               5 GB, in bfloat16 17 GB
    --backend NAME[,NAME ...]  native, triton or reference for every op (default: the first that has
                               it, or VOXKERN_BACKEND's). With several, kernels and frame measure
                               all of them and compare each with the first; kernels also accepts
                               torch: --backend triton,native,torch (default: compared with torch).
                               "persistent" is native with the depth decoder as one kernel (default
                               on a GPU: compared with native). With --rehearse, Triton needs
                               TRITON_INTERPRET=1
    --save FOLDER              write the results there as BENCH.json, and the plot of peers next to
                               them (default: nowhere; peers: build/peers)
    --dtype float32,bfloat16   kernels, frame, codec, speech: dtypes to run (default both; on a GPU
                               bfloat16)
    --quantize none,int8,int4  frame, codec, speech: packings; "none" runs in every dtype (default
                               all; the codec has no int4)
    --batch 1,8,64             batch sizes (defaults: kernels 1,8,64; frame 1,2,4; codec 1,4;
                               speech 1; steps 1,2,4,8; on a GPU kernels 1,8,64,256; frame 1,8,32,
                               64,128,256,384,512; speech 1,64,256,384; steps 1,2,4 ... 2048; depth
                               1,2,4,8)
    --packed-batch 1,64        kernels: batch sizes with packed weights (default: all of --batch)
    --ops linear,silu_mul      kernels: only these ops
    --threads N                threads (default: the processors that this process may use)
    --no-peer                  frame, codec: without transformers
    --rounds N, --frames N     peers: rounds, and frames of each program per round (default 6, 3)
    --only "voxkern bfloat16,llama.cpp int4"   peers: only these

Committed results are bench/results/MACHINE/BENCH.json, with MACHINE such as cpu-2-cores: one run
each of roofline, kernels, frame, codec, speech, quantization and peers (with its plot) on a machine
that does nothing else, made with `--save bench/results/MACHINE`. Every file describes the machine:
processor, caches, instruction set, threads, versions, and the read bandwidth before and after the
run (minimum, median, maximum): repeat a run whose bandwidth halved midway. The figures in the
documentation are copied from these files.

Weights are random, of the real sizes. Each figure is a median after a warm-up. Programs that are
compared take turns within one run, since machines drift. Inputs rotate through more memory than the
last-level cache holds. `% roofline` is the time floor over the time taken; the floor is bytes over
read bandwidth or operations over multiply-add rate, whichever is longer, both measured in the same
run. On a GPU the bandwidth is that of a copy (bytes read and written), and calls are replays of
CUDA graphs, timed by events (bench/timing.py). An interrupted run keeps the rows it has. The last
line printed is JSON.
"""

import argparse
import statistics
import sys
from pathlib import Path

import bench_backends
import machine
import torch
from csm_1b_shapes import SHAPES, config_for
from report import Report
from timing import CpuTimer, GpuTimer, timer_for

import voxkern
from voxkern.backend import backend_for, force
from voxkern.console import quiet_on_closed_pipe

BENCHES = ("roofline", "kernels", "frame", "codec", "speech")
GPU_BENCHES = ("roofline", "kernels", "frame", "speech")
ONLY_BY_NAME = ("steps", "turns", "depth")
"""Benchmarks that "all" leaves out."""
CHOICES = (*BENCHES, *ONLY_BY_NAME, "all", "quantization", "peers", "serve")
BATCHES = {
    ("kernels", "cpu"): [1, 8, 64],
    ("kernels", "cuda"): [1, 8, 64, 256],
    ("frame", "cpu"): [1, 2, 4],
    ("frame", "cuda"): [1, 8, 32, 64, 128, 256, 384, 512],
    ("codec", "cpu"): [1, 4],
    ("speech", "cpu"): [1],
    ("speech", "cuda"): [1, 64, 256, 384],
    ("steps", "cpu"): [1, 2, 4, 8],
    ("steps", "cuda"): [1 << n for n in range(12)],
    ("depth", "cuda"): [1, 2, 4, 8],
}


@quiet_on_closed_pipe()
def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        import bench_serve

        bench_serve.main(sys.argv[2:], read_bandwidths)
        return
    parser = argparse.ArgumentParser(
        usage="python bench/run.py BENCH [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=CHOICES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--model-shape", choices=SHAPES, default="csm-1b")
    parser.add_argument("--backend")
    parser.add_argument("--dtype")
    parser.add_argument("--quantize", default="none,int8,int4")
    parser.add_argument("--batch")
    parser.add_argument("--packed-batch")
    parser.add_argument("--ops")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    on_gpu = args.rehearse or args.device == "cuda"
    if on_gpu and args.bench not in (*GPU_BENCHES, *ONLY_BY_NAME, "all"):
        parser.error(f"{args.bench} does not run on a GPU yet")
    if args.bench == "depth" and not on_gpu:
        parser.error("depth measures a GPU: add --device cuda or --rehearse")
    if args.device == "cuda" and not args.rehearse and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.backend:
        try:
            args.backend = bench_backends.parse_backends(
                args.backend, "cpu" if args.rehearse else args.device
            )
        except ValueError as error:
            parser.error(f"--backend {error}")
        force(args.backend[0])

    if args.threads:
        voxkern.set_num_threads(args.threads)
    torch.set_num_threads(voxkern.num_threads())
    report = Report()
    report.path = results_path(args)
    report.machine["backend"] = args.backend or backend_for("cpu" if args.rehearse else args.device)
    bandwidth = [] if on_gpu else read_bandwidths()
    timer = timer_for(args.device, args.rehearse)
    try:
        run(report, args, timer, on_gpu)
    finally:
        for why in dict.fromkeys(getattr(timer, "without_graph", ())):
            report.leave_out("a graph of some calls", why)
        if bandwidth:
            bandwidth = sorted(bandwidth + read_bandwidths())
            spread = (bandwidth[0], statistics.median(bandwidth), bandwidth[-1])
            report.machine["read GB/s"] = dict(
                zip(("least", "median", "most"), spread, strict=True)
            )
        if args.device == "cuda":
            report.machine["gpu at the end"] = machine.nvidia_smi()
        report.save()
        if report.path:
            print(f"\n{report.path}")
            plot(report)
        print(report.json(), flush=True)


def run(report: Report, args: argparse.Namespace, timer: CpuTimer | GpuTimer, on_gpu: bool) -> None:
    """Runs the selected benchmarks and adds their tables to the report."""
    config = config_for(args.rehearse, args.model_shape)
    benches = GPU_BENCHES if on_gpu else BENCHES
    chosen = benches if args.bench == "all" else (args.bench,)
    names = (args.dtype or ("bfloat16" if on_gpu else "float32,bfloat16")).split(",")
    precisions = [
        precision
        for packing in args.quantize.split(",")
        for precision in (names if packing == "none" else [packing])
    ]

    def batches(bench: str) -> list[int]:
        if args.batch:
            return [int(b) for b in args.batch.split(",")]
        return BATCHES[bench, "cuda" if on_gpu else "cpu"]

    ours: list[str | None] = [None]
    if on_gpu and backend_for(timer.device, "decode_depth") == "native":
        ours.append(bench_backends.PERSISTENT)
    if "roofline" in chosen:
        import roofline

        roofline.run_gpu(report, timer) if on_gpu else roofline.run(report)
    if "frame" in chosen:
        import bench_frame

        backends = [name for name in args.backend or ours if name != bench_backends.TORCH]
        peer = not args.no_peer and args.model_shape == "csm-1b"  # 8 B twice fill the memory
        bench_frame.run(report, timer, config, precisions, batches("frame"), peer, backends)
    if "kernels" in chosen:
        import bench_kernels

        ops = args.ops.split(",") if args.ops else None
        dtypes = [getattr(torch, name) for name in names]
        backends = args.backend or [*ours, bench_backends.TORCH]
        packed = [int(b) for b in args.packed_batch.split(",")] if args.packed_batch else None
        bench_kernels.run(report, timer, config, dtypes, batches("kernels"), ops, backends, packed)
    if "codec" in chosen:
        import bench_codec

        known = [name for name in precisions if name in bench_codec.PRECISIONS]
        bench_codec.run(report, known, batches("codec"), peer=not args.no_peer)
    if "speech" in chosen:
        import bench_speech

        bench_speech.run(report, timer, config, precisions, batches("speech"))
    if "steps" in chosen:
        import bench_steps

        bench_steps.run(report, timer, config, precisions, batches("steps"))
    if "turns" in chosen:
        import bench_turns

        bench_turns.run(report, config, precisions, timer.device)
    if "depth" in chosen:
        import bench_depth

        bench_depth.run(report, timer, config, precisions, batches("depth"))
    if args.bench == "quantization":
        import bench_quantization

        bench_quantization.run(report)
    if args.bench == "peers":
        import peers

        only = args.only.split(",") if args.only else None
        peers.run(report, args.rounds, args.frames, only)


def read_bandwidths() -> list[float]:
    """A few measurements in GB/s; empty if the probe cannot be compiled."""
    import roofline

    try:
        return [roofline.read_bandwidth() / 1e9 for _ in range(6)][1:]
    except RuntimeError:
        return []
    finally:
        roofline.release_buffers()


def results_path(args: argparse.Namespace) -> Path | None:
    """The file for the results, or None."""
    folder = args.save
    if args.bench == "peers" and not folder:
        import peers

        folder = peers.FOLDER
    shape = "" if args.model_shape == "csm-1b" else f"-{args.model_shape}"
    return folder and folder / f"{args.bench}{shape}.json"


def plot(report: Report) -> None:
    """Plots the results of peers, next to their JSON file."""
    if report.path.stem != "peers" or not any(table.rows for table in report.tables):
        return
    import peers

    try:
        print(peers.plot(report.path))
    except RuntimeError as error:
        print(f"plot: left out, {error}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
