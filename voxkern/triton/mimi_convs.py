import torch
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_operand
from voxkern.triton.mimi_conv import launch_mimi_conv, update_past


def mimi_convs(
    x: Tensor,
    fresh: Tensor,
    past: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> Tensor:
    """One launch per convolution, and one at the end that updates all pasts."""
    x = x.contiguous()
    check_dim(x, "x", 3)
    check_operand(x, "x", x, torch.float32)
    check_operand(fresh, "fresh", x, torch.bool, "[B]", x.shape[:1])
    for name, list_, each in (("past", past, 1), ("biases", biases, 1), ("plan", plan, 7)):
        count = len(weights) * each
        check(
            len(list_) == count,
            f"{name}: expected {count} entries, as there are {len(weights)} weights, got "
            f"{len(list_)}",
        )
    values, convs = [x], []
    for i, left in enumerate(past):
        source, add, dilation, elu, block_in, block_out, replicate = plan[7 * i : 7 * i + 7]
        check(
            0 <= source <= i and -1 <= add <= i,
            f"plan: convolution {i} reads an output that does not exist yet",
        )
        check(block_in >= 1 and block_out >= 1, "plan: expected blocks of 1 or more")
        samples = values[source]
        batch, length, width = samples.shape
        check(length % block_in == 0, f"x: expected whole blocks of {block_in}")
        check_dim(left, "past", 3)
        sizes = batch, None, width * block_in
        check_operand(left, "past", x, torch.float32, "[B, context, C]", sizes)
        if replicate and length:  # only at the start of a stream, in few codecs: not worth a kernel
            first = samples[:, :1].repeat(1, 1, block_in)
            left.copy_(torch.where(fresh[:, None, None], first, left))
        blocks = samples.view(batch, length // block_in, width * block_in)
        added = None if add < 0 else values[add]
        out = launch_mimi_conv(blocks, left, weights[i], biases[i], added, dilation, bool(elu))
        outputs = out.shape[2]
        check(outputs % block_out == 0, f"biases: expected whole blocks of {block_out}")
        values.append(out.view(batch, out.shape[1] * block_out, outputs // block_out))
        convs.append((left, blocks))
    update_past(convs)
    return values[-1]
