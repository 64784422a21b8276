"""Time of an engine's step by rows and by prompt tokens, and the memory of a stream.

Full-size CSM-1B with random weights, the codec included; the model's context is cut to 512
positions, so that 2,048 rows fit a card. Rows are live requests that each make one frame per step.
A step with prompt tokens also runs the backbone over that many tokens of one more request. The
device is idle before and after each measured step, so a step is the longest that the scheduler
sees; frames in flight overlap the host's work and are somewhat shorter.

`MiB a row` is the difference of allocated memory between an engine of so many rows and none, over
the rows: cache pages, the codec's state and the captured graphs.
"""

import statistics
import time
from dataclasses import replace

import torch
from bench_codec import our_codecs, random_model
from bench_frame import PRECISIONS, our_model
from csm_1b_shapes import FRAME_MS
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.engine import PREFILL_CHUNK_TOKENS, Engine, Prompt, Request
from vox_serve.loading import codec_precision
from vox_serve.mimi import Mimi
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig

MAX_POSITIONS = 512
FIRST_PROMPT_TOKENS = 16
PROMPT_TOKENS = (0, 16, 64, 128, 256, 512)


class Steps:
    """An engine whose rows speak without an end.

    Args:
        model, codec: on the device that is measured.
        rows: requests to start with.
    """

    def __init__(self, model: CsmModel, codec: Mimi, rows: int):
        self._device = model.device.type
        before = self._allocated()
        # One row more than is measured, for the request whose prompt is timed.
        self.engine = Engine(model, codec, prompts=None, max_batch_size=rows + 1)
        self.ids = [self._add(FIRST_PROMPT_TOKENS) for _ in range(rows)]
        while sum(output.codes is not None for output in self.engine.step()) < rows:
            pass
        self.row_bytes = (self._allocated() - before) / (rows + 1)

    def shrink(self, rows: int) -> None:
        """End requests until `rows` are left."""
        while len(self.ids) > rows:
            self.engine.abort(self.ids.pop())

    def step_ms(self, prompt_tokens: int) -> float:
        """Milliseconds of one step, with a prompt of that many tokens beside the rows."""
        added = self._add(prompt_tokens) if prompt_tokens else None
        self._synchronize()
        start = time.perf_counter()
        self.engine.step()
        self._synchronize()
        took_ms = (time.perf_counter() - start) * 1e3
        if added:
            self.engine.abort(added)
        return took_ms

    def _add(self, num_tokens: int) -> str:
        request = Request("")
        config = self.engine.model.config  # every prompt is another, or they would share pages
        tokens = torch.zeros(num_tokens, config.num_codebooks + 1, dtype=torch.int64)
        tokens[:, -1] = torch.randint(1, config.text_vocab_size, (num_tokens,))
        self.engine.add(request, Prompt.build(tokens, tokens > 0))
        return request.id

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._device == "cuda" else 0

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    precisions: list[str],
    batches: list[int],
) -> None:
    """Add table `steps` to the report.

    Args:
        report, timer: of the run.
        config: sizes of the model.
        precisions: of `bench_frame.PRECISIONS`.
        batches: numbers of rows. One engine with the most rows serves all: rows leave it.
    """
    table = report.table(
        "steps", ["precision", "rows", "prompt tokens", "ms", "ms most", "streams", "MiB a row"]
    )
    device = timer.device
    config = replace(config, backbone=replace(config.backbone, max_positions=MAX_POSITIONS))
    codec_of = {p: codec_precision(device, *PRECISIONS[p]) for p in precisions}
    codecs = our_codecs(random_model(), sorted({*codec_of.values()}), device)
    for precision in precisions:
        model = our_model(config, precision, device)
        steps = Steps(model, codecs[codec_of[precision]], max(batches))
        for rows in sorted(batches, reverse=True):
            steps.shrink(rows)
            for prompt_tokens in PROMPT_TOKENS:
                if prompt_tokens > PREFILL_CHUNK_TOKENS[device]:
                    continue
                steps.step_ms(prompt_tokens)  # the first of a kind warms up
                times = [steps.step_ms(prompt_tokens) for _ in range(timer.rounds)]
                ms = statistics.median(times)
                streams = rows * FRAME_MS / ms if prompt_tokens == 0 else None
                row_mib = steps.row_bytes / 2**20 or None
                table.add(precision, rows, prompt_tokens, ms, max(times), streams, row_mib)
        del steps
