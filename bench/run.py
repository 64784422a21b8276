"""VoxKern's benchmarks.

    python bench/run.py roofline   read bandwidth and multiply-add rates of this machine
    python bench/run.py kernels    every op at CSM-1B's shapes, against plain torch
    python bench/run.py frame      whole frames of full-size CSM-1B, against transformers
    python bench/run.py codec      a streamed frame of full-size Mimi, against transformers
    python bench/run.py speech     steps of the engine: frames, sampling and the codec together
    python bench/run.py all        the five of them
    python bench/run.py quantization   what packing does to the logits; needs 10 GB of memory
    python bench/run.py peers      whole frames of several programs in turn: ours, llama.cpp,
                                   transformers, torch.compile (bench/peers.py says how). The
                                   first call makes their environment, build/peers, and compiles
                                   llama.cpp in it: up to half an hour on two cores; a run is seven
                                   minutes. Needs 22 GB of memory for all

Options:
    --device cpu|cuda          where (default cpu); on a GPU roofline, kernels, frame and speech,
                               which are all of it
    --rehearse                 the GPU's way of timing, on the CPU with a tiny model: shows that it
                               runs, and its figures mean nothing
    --backend NAME[,NAME ...]  native, triton or reference serves every op (default: the first that
                               has it, or VOXKERN_BACKEND's). Of several, kernels and frame measure
                               all, the first against the others; kernels against torch too:
                               --backend triton,native,torch (default: against torch); and
                               "persistent" is native with the depth decoder as one kernel
                               (default on a GPU: beside native). With --rehearse Triton runs
                               under TRITON_INTERPRET=1
    --save FOLDER              write the results there as BENCH.json, and peers' plot beside them
                               (default: nowhere; peers: build/peers)
    --dtype float32,bfloat16   kernels, frame, codec, speech: which of them (default both; on a GPU
                               bfloat16)
    --quantize none,int8,int4  frame, codec, speech: packings, plain ones in every dtype (default
                               all; the codec has no int4)
    --batch 1,8,64             batch sizes (defaults: kernels 1,8,64; frame 1,2,4; codec 1,4;
                               speech 1; on a GPU kernels 1,8,64,256; frame 1,8,32,64,128,256,384,
                               512; speech 1,64,256,384)
    --packed-batch 1,64        kernels: batch sizes with packed weights (default: all of --batch)
    --ops linear,silu_mul      kernels: only these ops
    --threads N                threads (default: the processors this process may use)
    --no-peer                  frame, codec: without transformers
    --rounds N, --frames N     peers: rounds, and frames of each program in a round (default 6, 3)
    --only "voxkern bfloat16,llama.cpp int4"   peers: only these

What is committed: bench/results/MACHINE/BENCH.json, of one run each on a machine that does nothing
else, made by `--save bench/results/MACHINE`: roofline, kernels, frame, codec, speech, quantization,
and peers with its picture, for MACHINE = cpu-2-cores, or alike. Every file has the machine in it:
processor, caches, instruction set, threads, versions, and the read bandwidth before and after the
run, least, median and most: a run whose bandwidth halved midway is to be made again. Figures in the
README are copied from these files.

Weights are random, of the real sizes. Each figure is a median after a warm-up; what is compared
is measured in turn within one run, for machines drift. Inputs rotate through more memory than the
last-level cache holds. `% roofline` is the time floor (bytes over the read bandwidth or operations
over the multiply-add rate, whichever is longer, both measured in the same run) over the time taken.
On a GPU the bandwidth is that of a copy, bytes read and written, and calls are replays of CUDA
graphs, timed by events (bench/timing.py). A run that is cut short keeps the rows it has.
The last line printed is JSON.
"""

import argparse
import statistics
from pathlib import Path

import bench_backends
import machine
import torch
from csm_1b_shapes import config_for
from report import Report
from timing import CpuTimer, GpuTimer, timer_for

import voxkern
from voxkern.backend import backend_for, force
from voxkern.console import quiet_on_closed_pipe

BENCHES = ("roofline", "kernels", "frame", "codec", "speech")
GPU_BENCHES = ("roofline", "kernels", "frame", "speech")
BATCHES = {
    ("kernels", "cpu"): [1, 8, 64],
    ("kernels", "cuda"): [1, 8, 64, 256],
    ("frame", "cpu"): [1, 2, 4],
    ("frame", "cuda"): [1, 8, 32, 64, 128, 256, 384, 512],
    ("codec", "cpu"): [1, 4],
    ("speech", "cpu"): [1],
    ("speech", "cuda"): [1, 64, 256, 384],
}


@quiet_on_closed_pipe()
def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python bench/run.py BENCH [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=[*BENCHES, "all", "quantization", "peers"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true")
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
    if on_gpu and args.bench not in (*GPU_BENCHES, "all"):
        parser.error(f"{args.bench} has no GPU yet")
    if args.device == "cuda" and not args.rehearse and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.backend:
        try:
            args.backend = bench_backends.chosen(
                args.backend, "cpu" if args.rehearse else args.device
            )
        except ValueError as error:
            parser.error(f"--backend {error}")
        force(args.backend[0])

    if args.threads:
        voxkern.set_num_threads(args.threads)
    torch.set_num_threads(voxkern.num_threads())
    report = Report()
    report.path = path_of(args)
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
    """The chosen benches, into the report."""
    config = config_for(args.rehearse)
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

        beside = [name for name in args.backend or ours if name != bench_backends.TORCH]
        peer = not args.no_peer
        bench_frame.run(report, timer, config, precisions, batches("frame"), peer, beside)
    if "kernels" in chosen:
        import bench_kernels

        ops = args.ops.split(",") if args.ops else None
        dtypes = [getattr(torch, name) for name in names]
        beside = args.backend or [*ours, bench_backends.TORCH]
        packed = [int(b) for b in args.packed_batch.split(",")] if args.packed_batch else None
        bench_kernels.run(report, timer, config, dtypes, batches("kernels"), ops, beside, packed)
    if "codec" in chosen:
        import bench_codec

        known = [name for name in precisions if name in bench_codec.PRECISIONS]
        bench_codec.run(report, known, batches("codec"), peer=not args.no_peer)
    if "speech" in chosen:
        import bench_speech

        bench_speech.run(report, timer, config, precisions, batches("speech"))
    if args.bench == "quantization":
        import bench_quantization

        bench_quantization.run(report)
    if args.bench == "peers":
        import peers

        only = args.only.split(",") if args.only else None
        peers.run(report, args.rounds, args.frames, only)


def read_bandwidths() -> list[float]:
    """GB/s a few times; nothing where there is no compiler to make the probe."""
    import roofline

    try:
        return [roofline.read_bandwidth() / 1e9 for _ in range(6)][1:]
    except RuntimeError:
        return []


def path_of(args: argparse.Namespace) -> Path | None:
    """Where the results go, None for nowhere."""
    folder = args.save
    if args.bench == "peers" and not folder:
        import peers

        folder = peers.FOLDER
    return folder and folder / f"{args.bench}.json"


def plot(report: Report) -> None:
    """The picture of peers, beside their results."""
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
