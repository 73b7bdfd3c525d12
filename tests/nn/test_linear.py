"""Linear4bit and Params4bit: life cycle, casts, compute dtypes, copies, and a small stack against dense layers."""

import copy
import io
import pickle

import bitsandbytes
import pytest
import reference
import torch

import pyquant.functional as F
from pyquant.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit

nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double"])
each_storage = pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])


def layer(n=96, k=64, device="cpu", **kwargs):
    kwargs.setdefault("quant_type", "nf4")
    return Linear4bit(k, n, **kwargs).to(device)


def raw(weight):
    return weight.data.contiguous().view(-1).view(torch.uint8).clone()


def dense_of(module):
    """A float32 torch.nn.Linear with the layer's exact values."""
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    state = module.weight.quant_state
    absmax = reference.decoded_absmax(*(s if s is None else s.cpu() for s in F.statistics(state)))
    exact = reference.dequantize(
        module.weight.data.cpu(), absmax, state.quant_type, state.blocksize, state.shape, torch.float32
    )
    linear.weight = torch.nn.Parameter(exact, requires_grad=False)
    if module.bias is not None:
        linear.bias = torch.nn.Parameter(module.bias.detach().float().cpu())
    return linear


def test_the_first_move_to_a_device_quantizes(device):
    built = Linear4bit(64, 96, quant_type="nf4")
    weight = built.weight
    dense = weight.data.clone()
    assert weight.shape == (96, 64)
    assert not weight.bnb_quantized
    assert built.quant_state is None
    assert torch.equal(weight.dequantize(), dense)
    with pytest.raises(RuntimeError, match=r"not quantized yet; move the layer or the model .* \.to\(\"cpu\"\)"):
        built(torch.randn(2, 64))
    assert built.to(device) is built
    assert built.weight is weight, "optimizers and other modules may hold the parameter"
    assert weight.bnb_quantized
    assert weight.device.type == device
    assert weight.shape == (96 * 64 // 2, 1)
    packed, state = F.quantize_4bit(dense.to(device), quant_type="nf4", compress_statistics=True)
    assert torch.equal(weight.data, packed)
    assert weight.quant_state == state
    assert built.quant_state is weight.quant_state
    built.to(device)
    assert torch.equal(weight.data, packed)


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.to(torch.device("cpu"))])
def test_every_way_to_the_cpu_quantizes(move):
    assert move(Linear4bit(64, 96)).weight.bnb_quantized
    model = torch.nn.Sequential(Linear4bit(64, 96), torch.nn.ReLU())
    assert move(model)[0].weight.bnb_quantized


def test_casting_a_dense_weight_casts_it():
    built = Linear4bit(64, 96).bfloat16()
    assert built.weight.dtype == torch.bfloat16
    assert not built.weight.bnb_quantized
    assert built.half().weight.dtype == torch.float16
    built.to("cpu", torch.bfloat16)
    assert built.weight.bnb_quantized


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused(device, bad):
    built = Linear4bit(64, 96)
    built.weight.data[1, 2] = bad
    with pytest.raises((RuntimeError, ValueError), match="holds NaN"):
        built.to(device)


def test_scales_whose_mean_overflows_are_refused():
    built = Linear4bit(64, 96)
    built.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="values near float32's largest"):
        built.to("cpu")
    plain = Linear4bit(64, 96, compress_statistics=False)
    plain.weight.data.fill_(3e38)
    assert torch.equal(plain.to("cpu").weight.dequantize(), torch.full((96, 64), 3e38))


@nested_or_not
@each_storage
def test_casts_never_touch_packed_bytes(nested, storage):
    built = layer(compress_statistics=nested, quant_storage=storage)
    weight, bytes_before, state = built.weight, raw(built.weight), copy.deepcopy(built.weight.quant_state)
    casts = (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float32),
        lambda m: torch.nn.Sequential(m).half()[0],
    )
    for cast in casts:
        assert cast(built) is built
        assert built.weight is weight
        assert weight.dtype == storage
        assert torch.equal(raw(weight), bytes_before)
        assert weight.quant_state == state
    assert built.bias.dtype == torch.float16
    for cast in (weight.half(), weight.float(), weight.bfloat16(), weight.to(torch.float16), weight.double()):
        assert torch.equal(raw(cast), bytes_before)


@nested_or_not
@each_storage
def test_storage_dtypes_compute_the_same(nested, storage):
    torch.manual_seed(3)
    built = layer(compress_statistics=nested, quant_storage=storage)
    torch.manual_seed(3)
    plain = layer(compress_statistics=nested)
    x = torch.randn(5, 64)
    assert torch.equal(built(x), plain(x))


def pair(**options):
    """The same layer as pyquant's and as bitsandbytes', in training mode, where the latter computes on plain bytes."""
    ours = layer(**options)
    options.pop("n", None), options.pop("k", None)
    theirs = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4", **options)
    statistics = {key: value for key, value in ours.state_dict().items() if key.startswith("weight.")}
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(ours.weight.data, statistics, device="cpu")
    theirs.bias = torch.nn.Parameter(ours.bias.detach().clone())
    return ours, theirs.train()


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtypes_are_bitsandbytes(dtype, compute_dtype):
    ours, theirs = pair(compute_dtype=compute_dtype)
    assert ours.compute_dtype == theirs.compute_dtype
    assert ours.compute_type_is_set == theirs.compute_type_is_set
    x = torch.randn(7, 64).to(dtype)
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == dtype
    assert ours.compute_dtype == compute_dtype, "a forward pass chooses nothing"
    ran_in = compute_dtype or dtype
    tolerance = 2 * max(torch.finfo(ran_in).eps, torch.finfo(dtype).eps)
    assert reference.relative_error(y.detach(), expected.detach()) < tolerance
    # It ran in the compute dtype: the error against float64 is of that dtype's size.
    truth = x.double() @ dense_of(ours).weight.double().T + ours.bias.detach().double()
    coarse = max(torch.finfo(ran_in).eps, torch.finfo(dtype).eps)
    assert coarse / 20 < reference.relative_error(y.detach(), truth) < coarse


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
def test_no_input_decides_for_later_ones(first):
    """bitsandbytes keeps the dtype of the first: after one in bfloat16, products with float32 would run in that."""
    used, x = layer(), torch.randn(7, 64)
    unused = copy.deepcopy(used)
    used(x.to(first))
    assert used.compute_dtype is None
    assert not used.compute_type_is_set
    assert torch.equal(used(x), unused(x))
    assert reference.relative_error(used(x).detach(), dense_of(used)(x).detach()) < 1e-6


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [None, torch.float32, torch.bfloat16])
def test_autocast_runs_in_its_dtype_whatever_ran_before(autocast, before):
    built = layer()
    x = torch.randn(7, 64)
    plain = copy.deepcopy(built)(x)
    expected = layer(compute_dtype=autocast)
    expected.load_state_dict(built.state_dict())
    if before is not None:
        built(x.to(before))
    with torch.autocast("cpu", autocast):
        y, halved = built(x), built(x.to(autocast))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected(x))
    assert halved.dtype == autocast
    assert torch.equal(halved, expected(x.to(autocast)))
    assert not torch.equal(plain, y)
    assert torch.equal(built(x), plain), "autocast does not decide for later inputs"


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_keep_their_order_and_flags(bias):
    for built in (Linear4bit(64, 96, bias=bias), layer(bias=bias), layer(bias=bias).half()):
        assert [name for name, _ in built.named_parameters()] == (["weight", "bias"] if bias else ["weight"])
        assert not built.weight.requires_grad
        assert isinstance(built.weight, Params4bit)
        assert (built.bias is not None) == bias
        if bias:
            assert built.bias.requires_grad


def test_repr_says_what_the_layer_is():
    text = repr(Linear4bit(64, 96, quant_type="nf4", blocksize=128, compress_statistics=False))
    assert "in_features=64, out_features=96, bias=True" in text
    assert text.endswith("nf4, blocksize=128, double_quant=False, not quantized yet)")
    assert "not quantized" not in repr(layer())
    assert repr(LinearFP4(64, 96)).startswith("LinearFP4(")


def test_named_classes_fix_the_type():
    assert LinearNF4(64, 96).weight.quant_type == "nf4"
    assert LinearFP4(64, 96).weight.quant_type == "fp4"
    assert Linear4bit(64, 96).weight.quant_type == "fp4"
    assert LinearNF4(64, 96, True, torch.bfloat16, False, torch.bfloat16).to("cpu").weight.dtype == torch.bfloat16


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module),
}


def saved_and_loaded(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@nested_or_not
def test_copies_are_equal_and_independent(make_copy, nested):
    source = layer(compress_statistics=nested, compute_dtype=torch.bfloat16)
    x = torch.randn(5, 64)
    expected = source(x)
    other = make_copy(source)
    assert torch.equal(other(x), expected)
    assert other.weight is not source.weight
    assert other.weight.quant_state == source.weight.quant_state
    assert isinstance(other.weight, Params4bit)
    for key, value in other.weight._attributes().items():
        if key not in ("quant_state", "module"):
            assert value == getattr(source.weight, key), key
    other.weight.data.zero_()
    other.weight.quant_state.absmax.zero_()
    assert torch.equal(source(x), expected)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_of_a_dense_layer_quantize_later(make_copy):
    source = Linear4bit(64, 96, quant_type="nf4")
    other = make_copy(source).to("cpu")
    assert not source.weight.bnb_quantized
    assert other.weight.bnb_quantized
    assert other.packed_state() is other.weight.quant_state
    x = torch.randn(5, 64)
    assert torch.equal(other(x), source.to("cpu")(x))


def test_a_state_dict_survives_torch_save():
    source = layer()
    state = saved_and_loaded(source.state_dict())
    other = Linear4bit(64, 96)
    other.load_state_dict(state)
    x = torch.randn(5, 64)
    assert torch.equal(other(x), source(x))


def test_a_model_on_meta_takes_a_checkpoint_by_assignment():
    source = torch.nn.Sequential(layer(k=72, n=64), layer(k=64, n=40))
    with torch.device("meta"):
        model = torch.nn.Sequential(Linear4bit(72, 64), Linear4bit(64, 40))
    assert model[0].weight.device.type == "meta"
    model.load_state_dict(source.state_dict(), assign=True)
    assert model[0].weight.device.type == "cpu"
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(3, 72)
    assert torch.equal(model(x), source(x))


def test_a_layer_moves_to_meta_and_comes_back_with_a_checkpoint(device):
    source = layer(device=device)
    moved = copy.deepcopy(source).to("meta")
    assert moved.weight.device.type == "meta"
    assert isinstance(moved.weight, Params4bit)
    moved.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 64, device=device)
    assert torch.equal(moved(x), source(x))
    assert source.weight.device.type == device
    assert source.weight.quant_state.absmax.device.type == device


@pytest.mark.gpu
def test_moving_between_devices_keeps_the_bytes():
    source = layer()
    x, before, expected = torch.randn(5, 64), raw(source.weight), None
    expected = source(x)
    source.cuda()
    assert source.weight.quant_state.absmax.is_cuda
    torch.testing.assert_close(source(x.cuda()).cpu(), expected)
    source.cpu()
    assert torch.equal(raw(source.weight), before)
    assert torch.equal(source(x), expected)


@pytest.mark.gpu
def test_a_moved_parameter_leaves_the_original_where_it_was():
    weight = layer().weight
    weight.module = None
    moved = weight.to("cuda")
    assert moved.quant_state.absmax.is_cuda
    assert moved.quant_state.state2.absmax.is_cuda
    for tensor in (weight, weight.absmax, weight.offset, weight.nested_absmax, weight.nested_quant_map):
        assert tensor.device.type == "cpu"


def test_statistics_are_attributes_of_the_parameter():
    weight = layer().weight
    state = weight.quant_state
    assert weight.absmax is state.absmax
    assert weight.code is weight.quant_map is state.code
    assert weight.offset is weight.nested_offset is state.offset
    assert weight.state2 is state.state2
    assert weight.nested_absmax is state.state2.absmax
    assert weight.nested_quant_map is state.state2.code
    assert (weight.nested_blocksize, weight.nested_dtype) == (256, torch.float32)
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    assert torch.equal(state.bitsandbytes__nf4, packed)
    for missing in (Linear4bit(64, 96).weight, layer(compress_statistics=False).weight):
        with pytest.raises(AttributeError, match="object has no attribute 'nested_absmax'"):
            _ = missing.nested_absmax


def test_a_plain_parameter_in_place_of_the_weight_still_works():
    built = layer()
    x = torch.randn(5, 64)
    expected = built(x)
    built._parameters["weight"] = torch.nn.Parameter(built.weight.data, requires_grad=False)  # as FSDP does
    assert torch.equal(built(x), expected)
    assert "weight.absmax" in built.state_dict()
    assert "blocksize=64, double_quant=True" in repr(built)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_of_a_stack_are_the_dense_models(device, quant_type, dtype):
    def stack(*linears):
        return torch.nn.Sequential(linears[0], torch.nn.GELU(), torch.nn.LayerNorm(96), linears[1])

    torch.manual_seed(1)
    model = stack(layer(n=96, k=77, quant_type=quant_type), layer(n=33, k=96, quant_type=quant_type)).to(device, dtype)
    dense = stack(dense_of(model[0]), dense_of(model[3])).double()
    dense[2].load_state_dict(model[2].state_dict())
    rough = copy.deepcopy(dense).to(dtype)
    x, target = torch.randn(2, 5, 77).to(dtype), torch.randn(2, 5, 33).to(dtype)

    def gradients(model, x, target):
        x = x.detach().requires_grad_()
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        trainable = [p.grad for p in model.parameters() if p.requires_grad]
        return [loss.detach(), x.grad, *trainable]

    truth = gradients(dense, x.double(), target.double())
    baseline = gradients(rough, x, target)
    ours = gradients(model, x.to(device), target.to(device))
    assert len(ours) == len(truth) == 6
    for mine, theirs, exact in zip(ours, baseline, truth, strict=True):
        bound = max(2 * reference.relative_error(theirs, exact), 3 * torch.finfo(dtype).eps)
        assert reference.relative_error(mine, exact) < bound


def test_compiled_layer_has_no_graph_break(device):
    built = layer(n=96, k=77).to(device)
    x = torch.randn(5, 77, device=device, requires_grad=True)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    expected = built(x)
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )
