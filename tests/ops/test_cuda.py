"""What only a GPU has: streams, the current device, CUDA graphs, large shapes, and the CPU as its witness."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from ops.test_linear import each_dtype, each_type, quantized
from ops.test_lora import adapter, check_lora, seed_tensor
from torch.utils._pytree import tree_map_only

import pyquant
import pyquant.functional as F
from pyquant import autograd
from pyquant.bench.shapes import MISTRAL_7B

pytestmark = pytest.mark.gpu
ops = torch.ops.pyquant


def lora_step(x, dy, weight, lora_A, lora_B, seed):
    """Forward and backward of the fused layer, as ops without autograd."""
    y, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 2.0, 0.2, seed)
    return y, *ops.lora_linear_4bit_backward(dy, x, xa, *weight, lora_A, lora_B, 2.0, 0.2, seed, True)


@pytest.mark.parametrize("rows", [1, 8, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(123, 77), (256, 512)])
def test_a_cuda_graph_replays_on_new_inputs(rows, n, k):
    weight, _ = quantized(n, k, device="cuda")
    x, dy = torch.randn(rows, k).bfloat16().cuda(), torch.randn(rows, n).bfloat16().cuda()
    factors = adapter(n, k, 16, torch.bfloat16, "cuda")
    seed = seed_tensor(1, "cuda")
    dense = torch.randn(n, k, device="cuda")
    code = F.create_dynamic_map().cuda()

    def everything():
        quantized_again = ops.quantize_4bit(dense, "nf4", 64, code)
        return *lora_step(x, dy, weight, *factors, seed), ops.linear_4bit(x, *weight, None), *quantized_again

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for value in (2, 3):
        x.copy_(torch.randn(rows, k))
        dy.copy_(torch.randn(rows, n))
        dense.copy_(torch.randn(n, k))
        seed.fill_(value)
        graph.replay()
        for replayed, expected in zip(captured, everything(), strict=True):
            assert torch.equal(replayed, expected)


def test_ops_run_on_the_current_stream():
    weight, _ = quantized(1024, 1024, device="cuda")
    x = torch.randn(64, 1024, device="cuda").bfloat16()
    expected = ops.linear_4bit(x, *weight, None)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = ops.linear_4bit(late, *weight, None)
        packed, state = F.quantize_4bit(late, quant_type="nf4", compress_statistics=True)
        dense = F.dequantize_4bit(packed, state)
    stream.synchronize()
    assert torch.equal(y, expected)
    assert torch.equal(packed, F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)[0])
    assert torch.equal(dense, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("op", ["forward", "dx", "backward"])
def test_an_op_may_be_the_first_that_a_thread_asks_of_the_gpu(op):
    """Such as in autograd's thread, when a loss is the layer's output itself."""
    n, k, rank = 256, 512, 16
    weight, _ = quantized(n, k, device="cuda")
    x, dy = (torch.randn(100, size, device="cuda").bfloat16() for size in (k, n))
    lora_A, lora_B = adapter(n, k, rank, torch.bfloat16, "cuda")
    _, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
    torch.cuda.synchronize()
    calls = {
        "forward": lambda: ops.linear_4bit(x, *weight, None),
        "dx": lambda: ops.linear_4bit_dx(dy, *weight),
        "backward": lambda: ops.lora_linear_4bit_backward(dy, x, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)[0],
    }
    with ThreadPoolExecutor(1) as thread:
        elsewhere = thread.submit(calls[op]).result()
    assert torch.equal(elsewhere, calls[op]())


def test_the_current_device_stays_what_it_was():
    before = torch.cuda.current_device()
    F.quantize_4bit(torch.randn(64, 64, device="cuda"))
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 700])
def test_ops_follow_their_tensors_device(rows):
    """On a device that is not the current one: the bits of the current one, and the current one stays."""
    n, k = 512, 1024
    weight, exact = quantized(n, k, device="cuda:0")
    x, dy = torch.randn(rows, k, device="cuda:0").bfloat16(), torch.randn(rows, n, device="cuda:0").bfloat16()
    inputs = x, dy, weight, *adapter(n, k, 16, torch.bfloat16, "cuda:0"), seed_tensor(1, "cuda:0")
    expected = lora_step(*inputs)
    found = lora_step(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda:1"), inputs))
    y = ops.linear_4bit(x.to("cuda:1"), *(t.to("cuda:1") if torch.is_tensor(t) else t for t in weight), None)
    assert torch.cuda.current_device() == 0
    assert reference.relative_error(y.cpu(), x.cpu().double() @ exact.cpu().double().T) < 5e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        assert torch.equal(ours.cpu(), theirs.cpu())


def test_no_op_waits_for_the_gpu():
    weight, _ = quantized(256, 256, device="cuda")
    x, dy = (torch.randn(16, 256, device="cuda").bfloat16() for _ in range(2))
    factors = adapter(256, 256, 8, torch.bfloat16, "cuda")
    seed, code, dense = seed_tensor(1, "cuda"), F.create_dynamic_map().cuda(), torch.randn(256, 256, device="cuda")
    lora_step(x, dy, weight, *factors, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_step(x, dy, weight, *factors, seed)
        ops.linear_4bit(x, *weight, None)
        ops.linear_4bit_dx(dy, *weight)
        ops.quantize_4bit(dense, "nf4", 64, code)
        ops.dequantize_4bit(*weight[:-2], (256, 256), torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 16, 17, 128, 777])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["k_proj", "gate_proj", "down_proj"])
def test_mistral_shapes_meet_the_bound(name, dtype, rows):
    n, k = MISTRAL_7B[name]
    weight, exact = quantized(n, k, device="cuda")
    exact = exact.cuda()
    x, dy = torch.randn(rows, k, device="cuda").to(dtype), torch.randn(rows, n, device="cuda").to(dtype)
    check_on_gpu(x, exact.T, ops.linear_4bit(x, *weight, None), "y")
    check_on_gpu(dy, exact, ops.linear_4bit_dx(dy, *weight), "dx")


def check_on_gpu(left, right, value, what):
    truth, baseline = left.double() @ right.double(), left @ right.to(left.dtype)
    reference.assert_within_bound(value, baseline, truth, what)


def test_a_training_step_of_one_layer_meets_the_bound():
    n, k = 1024, 4096
    weight, exact = quantized(n, k, device="cuda")
    x, dy = torch.randn(512, k).bfloat16(), torch.randn(512, n).bfloat16()
    check_lora(x, dy, None, weight, exact, *adapter(n, k, 16, torch.bfloat16), p=0.05, seed=3, device="cuda")


def test_more_than_2_to_the_31_elements():
    n, k = 2**15 + 1, 2**16 + 64
    free, _ = torch.cuda.mem_get_info()
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    assert free > 3 * weight.nbytes, "this test needs 13 GB of GPU memory"
    weight[-1] = torch.randn(k, device="cuda")
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    last = F.quantize_4bit(weight[-1].clone(), quant_type="nf4")
    assert torch.equal(packed[-k // 2 :], last[0])
    dense = F.dequantize_4bit(packed, state)
    assert torch.equal(dense[-1], F.dequantize_4bit(*last))
    assert not dense[:-1].any()
    del dense
    x = torch.randn(1, k, device="cuda").bfloat16()
    y = ops.linear_4bit(x, packed, *F.statistics(state), "nf4", 64, n, k, None)
    truth = x.double() @ F.dequantize_4bit(*last).double()
    assert not y[0, :-1].any()
    assert abs(y[0, -1].double() - truth[0]) < 0.02 * truth.abs()[0] + 0.05


def values_at_thresholds(blocks, blocksize, quant_type, dtype):
    """Blocks of values on, beside and between thresholds. Scaled by powers of two they stay there; the rest of the
    blocks have any scale, and one in 16 is zero or so small that its absmax is guarded."""
    on = reference.thresholds(quant_type).to(dtype)
    up, down = torch.full_like(on, 2), torch.full_like(on, -2)
    beside = torch.cat(
        [on, torch.nextafter(on, up), torch.nextafter(on, down), torch.tensor([0.0, -0.0, 1e-7], dtype=dtype)]
    )
    values = beside[torch.randint(len(beside), (blocks, blocksize))].float()
    values = torch.where(torch.rand(blocks, blocksize) < 0.3, torch.rand(blocks, blocksize) * 2 - 1, values)
    values[:, 0] = 1.0
    scale = 2.0 ** torch.randint(-8, 8, (blocks, 1)).float()
    scale = torch.where(torch.rand(blocks, 1) < 0.4, torch.rand(blocks, 1) + 1e-3, scale)
    scale[::16] = torch.tensor([0.0, 1e-38, 3e-39, 2e-40])[torch.randint(4, scale[::16].shape)]
    return (values * scale).to(dtype)


@pytest.mark.parametrize("blocksize", [32, 64, 256, 512, 4096])
@each_type
@each_dtype
def test_quantize_decides_thresholds_in_whole_and_partial_tiles(dtype, quant_type, blocksize):
    weight = values_at_thresholds(40 * 4096 // blocksize, blocksize, quant_type, dtype).reshape(-1)
    for size in (weight.numel(), weight.numel() - 1, weight.numel() - 4095, 8192, 8191, 4096, 31):
        expected, expected_state = F.quantize_4bit(weight[:size], blocksize=blocksize, quant_type=quant_type)
        packed, state = F.quantize_4bit(weight[:size].cuda(), blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(packed.cpu(), expected), size
        assert torch.equal(state.absmax.cpu(), expected_state.absmax), size
    shifted = weight.cuda()[1:]  # not aligned to 16 bytes
    expected, expected_state = F.quantize_4bit(weight[1:], blocksize=blocksize, quant_type=quant_type)
    packed, state = F.quantize_4bit(shifted, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed.cpu(), expected)
    assert torch.equal(state.absmax.cpu(), expected_state.absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_dtype
def test_a_non_finite_value_shows_in_its_own_blocks_scale_alone(dtype, bad):
    weight = torch.randn(2 * 8192 + 100, device="cuda").to(dtype)
    packed, _ = F.quantize_4bit(weight, quant_type="nf4")
    for index in (0, 777, 8191, 8192, 2 * 8192 + 99):
        other = weight.clone()
        other[index] = bad
        other_packed, other_state = F.quantize_4bit(other, quant_type="nf4")
        block = index // 64
        assert (~torch.isfinite(other_state.absmax)).nonzero().tolist() == [[block]]
        same = torch.ones(len(packed), dtype=torch.bool, device="cuda")
        same[block * 32 : block * 32 + 32] = False
        assert torch.equal(other_packed[same], packed[same])


@pytest.mark.parametrize("size", [1, 63, 64 * 255, 64 * 256, 64 * 257, 2**20 + 17, 14336 * 4096])
def test_double_quantization_follows_from_the_mean(size):
    weight = torch.randn(size, device="cuda").bfloat16()
    _, plain = F.quantize_4bit(weight, quant_type="nf4")
    _, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(state.offset, plain.absmax.mean())
    shifted = plain.absmax - state.offset
    blocks = torch.nn.functional.pad(shifted, (0, -shifted.numel() % 256)).reshape(-1, 256)
    assert torch.equal(state.state2.absmax, blocks.abs().amax(1))
    code = state.state2.code
    values = (blocks * (1.0 / state.state2.absmax)[:, None]).clamp(-1, 1)
    steps = ((values + 1.0) * 0.5 * 65535.0 + 0.5).trunc()
    rounded = -1.0 + 2.0 * steps / torch.full_like(steps, 65535.0)  # by a number, torch multiplies with its reciprocal
    expected = torch.bucketize(rounded, (code[:-1] + code[1:]) * 0.5)
    expected = torch.where(state.state2.absmax[:, None] == 0, 0, expected).reshape(-1)[: shifted.numel()]
    assert torch.equal(state.absmax.long(), expected)


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 48, 256])
@pytest.mark.parametrize("k", [1, 64, 77, 192, 520, 1030, 4096, 14336])
@each_dtype
def test_lora_down_of_a_few_rows_meets_the_bound(dtype, k, rank):
    weight, _ = quantized(8, k, device="cuda")
    lora_A, lora_B = adapter(8, k, rank, dtype, "cuda")

    def down(x):
        return ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)[1]

    for rows in (1, 2, 7, 8, 9, 16):
        flat = torch.randn(rows * k + 1, device="cuda").to(dtype)
        x, unaligned = flat[:-1].view(rows, k), flat[1:].view(rows, k)
        for values in (x, unaligned):
            truth = 0.5 * (values.double() @ lora_A.double().T)
            xa = down(values)
            reference.assert_within_bound(xa, 0.5 * (values @ lora_A.T), truth, f"xa of {rows} rows", xa.numel())
            assert torch.equal(xa, down(values))
        poisoned = x.clone()
        poisoned[-1, k // 2] = float("nan")
        assert torch.equal(down(poisoned)[:-1], down(x)[:-1])
        assert down(poisoned)[-1].isnan().all()


def test_kernels_that_start_early_see_what_the_kernels_before_them_wrote():
    n, k = 64, 4096
    weight, _ = quantized(n, k, device="cuda")
    lora_A, lora_B = adapter(n, k, 16, torch.bfloat16, "cuda")
    inputs = [torch.randn(16, k, device="cuda").bfloat16() for _ in range(20)]
    code = F.create_dynamic_map().cuda()

    def step(x, value):
        x.copy_(value)
        lora_A.mul_(-0.5).add_(value[:, :1])
        first = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
        x.neg_()
        return (
            *first,
            *ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None),
            *ops.quantize_4bit(x, "nf4", 64, code),
        )

    def run(synchronised):
        lora_A.fill_(0.01)
        x, results = torch.empty_like(inputs[0]), []
        for value in inputs:
            results += step(x, value)
            if synchronised:
                torch.cuda.synchronize()
        return results

    for ours, expected in zip(run(False), run(True), strict=True):
        assert torch.equal(ours, expected)


# The variable forces a kernel wherever it is legal; the other shapes fall to another one.
@pytest.mark.parametrize("kernel", ["stream", "few_rows", "small_m", "wgmma", "dense", "mma", "simt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize", "nested", "quant_type"),
    [
        (16, 64, 64, True, "nf4"),
        (129, 576, 64, True, "nf4"),
        (33, 320, 128, True, "fp4"),
        (1024, 4096, 64, False, "nf4"),
        (100, 192, 4096, True, "nf4"),
        (64, 96, 32, True, "nf4"),
        (96, 2048, 64, True, "fp4"),
    ],
)
def test_every_kernel_meets_the_bound(monkeypatch, kernel, dtype, n, k, blocksize, nested, quant_type):
    monkeypatch.setenv("PYQUANT_KERNEL", kernel)
    weight, exact = quantized(n, k, quant_type=quant_type, blocksize=blocksize, nested=nested, device="cuda")
    for rows in (1, 2, 7, 8, 9, 16, 17, 70):
        x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, k), (rows, n), (n,)))
        check_lora(x, dy, bias, weight, exact, *adapter(n, k, 16, dtype), p=0.1, seed=rows, device="cuda")
        y = ops.linear_4bit(x.cuda(), *weight, bias.cuda())
        assert torch.equal(y, ops.linear_4bit(x.cuda(), *weight, bias.cuda()))
        dx = ops.linear_4bit_dx(dy.cuda(), *weight)  # also by kernels that leave an adapter's dropout to others
        check_on_gpu(dy.cuda(), exact.cuda(), dx, "dx")
        assert torch.equal(dx, ops.linear_4bit_dx(dy.cuda(), *weight))


# Blocks of a cluster, by which a warp's tiles are in one part along k or two.
@pytest.mark.parametrize(
    ("n", "k", "split"),
    [
        (2128, 8192, 1),
        (2128, 8192, 2),
        (48, 5120, 1),
        (48, 5120, 2),
        (4096, 14336, 2),
        (4096, 14336, 4),
        (16, 11008, 2),
    ],
)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("quant", [("nf4", 64, True), ("fp4", 4096, True), ("nf4", 64, False)], ids=str)
def test_stream_in_one_part_and_in_two_meets_the_bound(monkeypatch, n, k, split, rank, quant):
    monkeypatch.setenv("PYQUANT_KERNEL", f"stream:8:{split}")
    chosen = pyquant.explain_plan(1, n, k, rank=rank, blocksize=quant[1])
    assert f"stream tile 8x16x{8192 if split * 4096 < k else 4096} split {split}," in chosen
    weight, exact = quantized(n, k, quant_type=quant[0], blocksize=quant[1], nested=quant[2], device="cuda")
    exact = exact.cuda()
    bias = torch.randn(n, device="cuda").bfloat16()
    for rows in (1, 7, 8):
        x = torch.randn(rows, k, device="cuda").bfloat16()
        if rank == 0:
            check_on_gpu(x, exact.T, ops.linear_4bit(x, *weight, None), "y")
            assert torch.equal(ops.linear_4bit(x, *weight, bias), ops.linear_4bit(x, *weight, bias))
        else:
            lora_A, lora_B = adapter(n, k, rank, torch.bfloat16, "cuda")
            y, _ = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
            check_adapted(x, y, exact, lora_A, lora_B, forward=True)


# wgmma with a tile of rows and a split: all splits of small problems, and a last wave of tiles that clusters share
# behind whole ones.
FORCED_PLANS = [
    (f"wgmma:{tile}:{split}", 100, 256, 1024)
    for tile in (32, 64, 128, 256)
    for split in range(1, min(tile // 8, 8) + 1)
]
FORCED_PLANS += [("wgmma:128:2", 700, 14336, 256), ("wgmma:256:2", 1024, 14336, 256), ("wgmma:32:1", 700, 4096, 64)]
# The dequantized weight: one block and pairs, of which the last one's second block has no columns; several turns.
FORCED_PLANS += [
    ("dense:256:1", *case) for case in ((100, 120, 1024), (300, 320, 520), (700, 14336, 256), (2100, 4096, 512))
]


@pytest.mark.parametrize(("plan", "rows", "n", "k"), FORCED_PLANS)
def test_forced_tiles_and_splits_meet_the_bound(monkeypatch, plan, rows, n, k):
    monkeypatch.setenv("PYQUANT_KERNEL", plan)
    weight, exact = quantized(n, k, device="cuda")
    exact = exact.cuda()
    x, dy = (torch.randn(rows, size, device="cuda").bfloat16() for size in (k, n))
    bias = torch.randn(n, device="cuda").bfloat16()
    y = ops.linear_4bit(x, *weight, bias)
    check_on_gpu(x, exact.T, ops.linear_4bit(x, *weight, None), "y")
    assert torch.equal(y, ops.linear_4bit(x, *weight, bias))
    reference.assert_within_bound(
        y,
        torch.addmm(bias, x, exact.bfloat16().T),
        x.double() @ exact.double().T + bias.double(),
        "y with bias",
    )
    check_on_gpu(dy, exact, ops.linear_4bit_dx(dy, *weight), "dx")


# tile, split and rows of the blocks beside; rows, n, k. One turn with room beside it, one without, several, and a last
# one that is shared; pairs of blocks that share activations, the second of n = 320 without columns of its own.
BESIDE = [
    ("wgmma:256:1:256", 1000, 4096, 512),
    ("wgmma:256:1:128", 1024, 4096, 512),
    ("wgmma:256:1:64", 500, 320, 1024),
    ("wgmma:256:1:256", 2048, 9216, 256),
    ("wgmma:128:1:128", 700, 6144, 256),
    ("wgmma:128:2:128", 700, 14336, 256),
    ("wgmma:256:2:256", 1024, 14336, 256),
    ("wgmma:128:2:64", 200, 256, 2048),
    ("wgmma:64:3:64", 100, 640, 1024),
    ("wgmma:32:1:64", 40, 256, 512),
    ("dense:256:1:256", 1000, 4096, 512),
    ("dense:256:1:64", 500, 320, 1024),
    ("dense:256:1:64", 300, 128, 512),
    ("dense:256:1:256", 2048, 9216, 256),
]
# The low-rank steps first, behind a kernel that has ended.
BEHIND = [(f"{plan}:0", rows, n, k) for plan, rows, n, k in FORCED_PLANS]


def force(monkeypatch, plan, rows, n, k, rank, direction):
    """Forces a plan, and fails where it is not legal and another one would be taken."""
    monkeypatch.setenv("PYQUANT_KERNEL", plan)
    kernel, tile, split, beside = plan.split(":")
    chosen = pyquant.explain_plan(rows, n, k, rank=rank, direction=direction)
    assert f"{kernel} tile {tile}x128x64 split {split}{' beside ' if beside != '0' else ','}" in chosen


# 16 to 136: one to three low-rank steps.
ADAPTED = [(*case, rank) for case in BESIDE + BEHIND for rank in (16, 96, 136)]
# Rings of activations wrap around with the low-rank steps of a rank: at 512, 6 slots at 384, and beyond. 33 steps of
# weights; parts of two and three.
ADAPTED += [
    (*case, rank)
    for case, ranks in (
        (("wgmma:32:1:0", 40, 192, 2112), (512, 520, 1024)),
        (("wgmma:64:1:0", 100, 192, 2112), (512, 520, 1024)),
        (("wgmma:64:3:0", 60, 192, 448), (64, 512, 576)),
        (("wgmma:128:1:64", 200, 192, 2112), (384, 392)),
        (("wgmma:128:2:64", 200, 192, 320), (16, 384, 392)),
        (("wgmma:128:3:128", 100, 192, 512), (16, 384, 392)),
        (("wgmma:256:2:256", 300, 192, 2112), (16, 512)),
        (("dense:256:1:256", 300, 192, 2112), (16, 512)),
        (("dense:256:1:0", 300, 200, 520), (16, 512)),
    )
    for rank in ranks
]


@pytest.mark.parametrize(("plan", "rows", "n", "k", "rank"), ADAPTED)
@pytest.mark.parametrize("direction", ["forward", "dx"])
def test_forced_plans_with_an_adapter_meet_the_bound(monkeypatch, plan, rows, n, k, rank, direction):
    """Of a weight whose output has n columns, behind a kernel that writes the input."""
    forward = direction == "forward"
    shape = (n, k) if forward else (k, n)
    force(monkeypatch, plan, rows, *shape, rank, direction)
    weight, exact = quantized(*shape, device="cuda")
    exact = exact.cuda()
    lora_A, lora_B = adapter(*exact.shape, rank, torch.bfloat16, "cuda")
    other = torch.randn(rows, n, device="cuda").bfloat16()  # whose values do not matter
    bias = torch.randn(n, device="cuda").bfloat16() if forward else None

    def run(source):
        x = source.bfloat16()
        if forward:
            return x, *ops.lora_linear_4bit(x, *weight, bias, lora_A, lora_B, 0.5, 0.0, None)
        xa = torch.zeros(rows, rank, device="cuda", dtype=torch.bfloat16)
        dx, dA, _ = ops.lora_linear_4bit_backward(x, other, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)
        return x, dx, dA

    source = torch.randn(rows, k, device="cuda")
    x, y, _ = first = run(source)
    check_adapted(x, y, exact, lora_A, lora_B, forward, bias)
    assert all(torch.equal(a, b) for a, b in zip(first, run(source), strict=True))


def check_adapted(x, y, exact, lora_A, lora_B, forward, bias=None):
    """y = x·Wᵀ + (x·Aᵀ / 2)·Bᵀ + bias, or the same the other way for dX, with the inner product rounded."""
    left, right, dense = (lora_A.T, lora_B.T, exact.T) if forward else (lora_B, lora_A, exact)
    low = (0.5 * (x.double() @ left.double())).to(x.dtype)
    truth = x.double() @ dense.double() + low.double() @ right.double()
    left, right = torch.cat([x, low], 1), torch.cat([dense.to(x.dtype), right.to(x.dtype)])
    baseline = left @ right if bias is None else torch.addmm(bias, left, right)
    if bias is not None:
        truth = truth + bias.double()
    reference.assert_within_bound(y, baseline, truth, "y" if forward else "dx")


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("direction", ["forward", "dx"])
def test_a_linear_waits_for_the_product_that_runs_beside_it(monkeypatch, rank, direction):
    """Few blocks make the product end behind the linear's other steps; what it must not read is NaN."""
    rows, n, k = (1024, 512, 4096) if direction == "forward" else (1024, 4096, 512)
    force(monkeypatch, "wgmma:64:1:256", rows, n, k, rank, direction)
    weight, exact = quantized(n, k, device="cuda")
    exact = exact.cuda()
    lora_A, lora_B = adapter(n, k, rank, torch.bfloat16, "cuda")
    x, other = (torch.randn(rows, size, device="cuda").bfloat16() for size in ((k, n) if k > n else (n, k)))
    no_xa = torch.randn(rows, rank, device="cuda").bfloat16()

    def run():
        torch.full((rows, rank), float("nan"), device="cuda", dtype=torch.bfloat16)  # the block that the product gets
        if direction == "forward":
            return ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)[0]
        return ops.lora_linear_4bit_backward(x, other, no_xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run() for _ in range(4)]
    for _ in range(3):
        x.copy_(torch.randn(x.shape, device="cuda"))
        graph.replay()
        for y in outputs:
            check_adapted(x, y, exact, lora_A, lora_B, direction == "forward")


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("plan", ["wgmma:256:1:256", "dense:256:1:256", "dense:256:1:0"])
@pytest.mark.parametrize("direction", ["forward", "dx"])
def test_a_linear_beside_its_product_waits_for_the_kernels_before(monkeypatch, direction, plan, adapter_dtype):
    """Each of some layers writes over NaN what the next one reads, and lets the kernels behind it start early."""
    rows, size, rank = 1024, 1024, 16
    force(monkeypatch, plan, rows, size, size, rank, direction)
    weight, exact = quantized(size, size, device="cuda")
    exact = exact.cuda()
    factors = adapter(size, size, rank, adapter_dtype, "cuda")
    lora_A, lora_B = (factor.bfloat16() for factor in factors)  # as they are rounded
    x, other = (torch.randn(rows, size, device="cuda").bfloat16() for _ in range(2))
    no_xa = torch.randn(rows, rank, device="cuda").bfloat16()

    def layers():
        chain = [x]
        for _ in range(6):
            # Where a workspace will be.
            torch.full((size, size), float("nan"), device="cuda", dtype=torch.bfloat16)
            if direction == "forward":
                y = ops.lora_linear_4bit(chain[-1], *weight, None, *factors, 0.5, 0.0, None)[0]
            else:
                backward = (chain[-1], other, no_xa, *weight, *factors, 0.5, 0.0, None, True)
                y = ops.lora_linear_4bit_backward(*backward)[0]
            chain.append(y)
        return chain

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain = layers()
    for _ in range(3):
        x.copy_(torch.randn(x.shape, device="cuda"))
        for y in chain[1:]:
            y.fill_(float("nan"))
        graph.replay()
        for before, after in itertools.pairwise(chain):
            check_adapted(before, after, exact, lora_A, lora_B, direction == "forward")


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_layers_with_products_beside_them_replay_in_a_graph(monkeypatch, adapter_dtype):
    rows, size, rank = 1024, 1024, 16
    force(monkeypatch, "wgmma:256:1:256", rows, size, size, rank, "forward")
    layers = [
        (quantized(size, size, device="cuda")[0], *adapter(size, size, rank, adapter_dtype, "cuda")) for _ in range(2)
    ]
    x, dy = (torch.randn(rows, size, device="cuda").half() for _ in range(2))

    def everything():
        h, kept, gradients = x, [], []
        for weight, lora_A, lora_B in layers:
            y, xa = ops.lora_linear_4bit(h, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
            kept.append((h, xa))
            h = y
        g = dy
        for (weight, lora_A, lora_B), (inner, xa) in zip(reversed(layers), reversed(kept), strict=True):
            backward = (g, inner, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)
            g, dA, dB = ops.lora_linear_4bit_backward(*backward)
            gradients += [dA, dB]
        return h, g, *gradients

    everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for _ in range(3):
        x.copy_(torch.randn(rows, size, device="cuda"))
        dy.copy_(torch.randn(rows, size, device="cuda"))
        graph.replay()
        for replayed, expected in zip(captured, everything(), strict=True):
            assert torch.equal(replayed, expected)


@pytest.mark.parametrize(("plan", "rows", "n", "k"), [*BESIDE, ("stream", 16, 256, 512), ("mma", 100, 256, 512)])
@pytest.mark.parametrize("rank", [16, 136])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float32_factors_give_the_bits_of_rounded_ones(monkeypatch, plan, rows, n, k, rank, p):
    """Whether a kernel rounds them itself or is given them rounded."""
    monkeypatch.setenv("PYQUANT_KERNEL", plan)
    weight, exact = quantized(n, k, device="cuda")
    factors = adapter(*exact.shape, rank, torch.float32, "cuda")
    x, dy = (torch.randn(rows, size, device="cuda").bfloat16() for size in (k, n))
    seed = seed_tensor(5, "cuda")

    def run(lora_A, lora_B):
        y, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, p, seed)
        return y, xa, *ops.lora_linear_4bit_backward(dy, x, xa, *weight, lora_A, lora_B, 0.5, p, seed, True)

    for of_floats, of_rounded in zip(run(*factors), run(*(f.bfloat16() for f in factors)), strict=True):
        assert torch.equal(of_floats, of_rounded)


@pytest.mark.parametrize("elements", [0, 1])
def test_a_dequantized_weight_is_there_before_the_linear(monkeypatch, elements):
    """With a first factor that is not where it is read, and is copied: the plan is another one before than after."""
    monkeypatch.setenv("PYQUANT_KERNEL", "dense")
    rows, n, k, rank = 300, 512, 1024, 16
    x, dy = (torch.randn(rows, size, device="cuda").bfloat16() for size in (k, n))
    for _ in range(3):  # whose workspaces lie where the last one's did
        weight, exact = quantized(n, k, device="cuda")
        exact = exact.cuda()
        factors = adapter(n, k, rank, torch.float32, "cuda")
        lora_A, lora_B = (misaligned(factor.half(), elements) for factor in factors)
        y, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
        dx = ops.lora_linear_4bit_backward(dy, x, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)[0]
        rounded = lora_A.bfloat16(), lora_B.bfloat16()
        check_adapted(x, y, exact, *rounded, forward=True)
        check_adapted(dy, dx, exact, *rounded, forward=False)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize(
    ("rows", "plan", "dense_weights"), [(256, None, 0), (1024, None, 0), (4096, "wgmma", 0), (4096, "dense", 1)]
)
def test_no_dequantized_weight_is_kept_and_fused_plans_make_none(monkeypatch, rows, plan, dense_weights, rank):
    """From the allocator's peak in a training step: between the passes there is nothing of the weight's size, and
    within them only the one of a dense plan."""
    if plan:
        monkeypatch.setenv("PYQUANT_KERNEL", plan)
    n, k = 4096, 2048
    size = 2 * n * k
    weight, _ = quantized(n, k, device="cuda")
    factors = [f.requires_grad_() for f in adapter(n, k, rank, torch.float32, "cuda")] if rank else []
    x = torch.randn(rows, k, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(rows, n, device="cuda").bfloat16()

    def forward():
        if not rank:
            return autograd.linear_4bit(x, *weight, None)
        return autograd.lora_linear_4bit(x, *weight, None, *factors, 2.0, 0.0, None)[0]

    forward().backward(dy)  # what the first use allocates for good
    x.grad = None
    for factor in factors:
        factor.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before - y.nbytes - x.nbytes
    adapters = rows * rank * 2 + 10 * sum(f.nbytes for f in factors)  # products, gradients and their partial sums
    assert kept <= 0.01 * size + adapters < 0.5 * size
    assert (dense_weights - 0.1) * size <= peak <= (dense_weights + 0.01) * size + adapters


@pytest.mark.parametrize("which", ["neither", "first", "second"])
@pytest.mark.parametrize("direction", ["forward", "dx"])
def test_the_launch_that_speaks_for_all_before_is_the_last_one(monkeypatch, direction, which):
    """The kernel that rounds the product's factor tells the linear that all else is in place: the other factor, which
    is rounded too where it is not aligned, comes before it."""
    rows, size, rank = 1024, 1024, 16
    monkeypatch.setenv("PYQUANT_KERNEL", "wgmma:256:1:256")
    weight, exact = quantized(size, size, device="cuda")
    lora_A, lora_B = adapter(size, size, rank, torch.float32, "cuda")
    lora_A, lora_B = misaligned(lora_A, int(which == "first")), misaligned(lora_B, int(which == "second"))
    x, other = (torch.randn(rows, size, device="cuda").bfloat16() for _ in range(2))
    xa = torch.randn(rows, rank, device="cuda").bfloat16()

    def run():
        if direction == "forward":
            return ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)[0]
        return ops.lora_linear_4bit_backward(x, other, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)[0]

    y = run()
    check_adapted(x, y, exact.cuda(), lora_A.bfloat16(), lora_B.bfloat16(), direction == "forward")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert torch.equal(run(), y)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    kernels = names[: next(i for i, name in enumerate(names) if "linear_wgmma" in name) + 1]
    of_linear = "second" if direction == "forward" else "first"
    expected = ["round_factor"] * (2 if which == of_linear else 1) + ["lora_wgmma", "linear_wgmma"]
    assert len(kernels) == len(expected), kernels
    assert all(part in name for part, name in zip(expected, kernels, strict=True)), kernels


def misaligned(factor, elements):
    """The same values, that many elements behind an aligned address."""
    storage = torch.empty(elements + factor.numel(), dtype=factor.dtype, device=factor.device)
    return storage[elements:].view(factor.shape).copy_(factor)


# Tiles in one part and in two, a cluster, a tail along k, several steps of ranks, and ranks and shapes for which the
# kernel that is asked for is not legal.
@pytest.mark.parametrize(
    ("n", "k", "rank"),
    [(256, 512, 16), (256, 8192, 16), (256, 12288, 2), (256, 4224, 136), (256, 512, 264), (256, 512, 7), (123, 77, 5)],
)
@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("plan", ["stream", "few_rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_few_rows_read_float32_factors_as_if_rounded(monkeypatch, dtype, plan, rows, n, k, rank):
    monkeypatch.setenv("PYQUANT_KERNEL", plan)
    weight, _ = quantized(n, k, device="cuda")
    factors = adapter(n, k, rank, torch.float32, "cuda")
    x = torch.randn(rows, k, device="cuda").to(dtype)

    def run(lora_A, lora_B):
        return ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)

    y, xa = run(*(factor.to(dtype) for factor in factors))
    for elements in (0, 1, 2):
        of_floats = run(*(misaligned(factor, elements) for factor in factors))
        assert torch.equal(of_floats[0], y), f"y, {elements} elements off"
        assert torch.equal(of_floats[1], xa), f"xa, {elements} elements off"


# What linear_few_rows does not read in float32 is cast in a launch of its own.
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("plan", "launches"), [("stream", 2), ("few_rows", 3)])
def test_no_cast_lies_between_the_product_and_the_linear(monkeypatch, plan, launches, rows):
    monkeypatch.setenv("PYQUANT_KERNEL", plan)
    n, k = 256, 512
    weight, _ = quantized(n, k, device="cuda")
    x = torch.randn(rows, k, device="cuda").bfloat16()
    factors = adapter(n, k, 16, torch.float32, "cuda")
    ops.lora_linear_4bit(x, *weight, None, *factors, 0.5, 0.0, None)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.lora_linear_4bit(x, *weight, None, *factors, 0.5, 0.0, None)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    assert len(kernels) == launches, kernels
    assert "lora_down" in kernels[-2], kernels
    assert f"linear_{plan}" in kernels[-1], kernels


@pytest.mark.parametrize("rank", [8, 16, 40, 64, 136, 12])
@pytest.mark.parametrize("rows", [64, 200, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_lora_products_of_many_rows_meet_the_bound(rows, rank, dtype):
    """Ranks of 8 go through Hopper's kernel, the last one does not; few tiles are shared by clusters."""
    n, k = 640, 2048
    weight, _ = quantized(n, k, device="cuda")
    lora_A, lora_B = adapter(n, k, rank, dtype, "cuda")
    x, dy = (torch.randn(rows, size, device="cuda").to(dtype) for size in (k, n))

    def run():
        _, xa = ops.lora_linear_4bit(x, *weight, None, lora_A, lora_B, 0.5, 0.0, None)
        return xa, *ops.lora_linear_4bit_backward(dy, x, xa, *weight, lora_A, lora_B, 0.5, 0.0, None, True)[1:]

    xa, dA, dB = run()
    truth = 0.5 * x.double() @ lora_A.double().T
    reference.assert_within_bound(xa, 0.5 * (x @ lora_A.T), truth, "xa", xa.numel())
    dya = (0.5 * dy.double() @ lora_B.double()).to(dtype)
    for value, left, right, what in ((dA, dya, x, "dA"), (dB, dy, xa, "dB")):
        truth = left.double().T @ right.double()
        error = reference.relative_error(value, truth)
        # dya is rounded to 16 bits between the two products, on either side.
        assert error < (2e-3 if what == "dA" else 2e-6), f"{what}: {error}"
    for first, second in zip((xa, dA, dB), run(), strict=True):
        assert torch.equal(first, second)
