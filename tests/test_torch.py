"""What torch does to models, with adapters and without: compile, export, autocast, copies, moving, meta."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import pyquant
from pyquant.nn import Linear4bit


def network(bias=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias), torch.nn.GELU(), torch.nn.Linear(96, 64, bias=bias))


def build(kind="adapted", dropout=0.0, **options):
    """A small network with 4-bit layers, with random adapters on them or without."""
    model = pyquant.replace_linear(network(), verbose=False, **options)
    if kind == "adapted":
        model = adapt(model, lora_dropout=dropout)
    return model


def adapt(model, **options):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"], **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted.base_model.model


def gradients(model, x):
    """The output, and the gradients of the input and of every trainable parameter."""
    torch.manual_seed(7)  # the dropout
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad(y.float().square().sum(), [leaf, *trainable])


def assert_same(ours, theirs):
    (y, grads), (expected, expected_grads) = ours, theirs
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert len(grads) == len(expected_grads)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def record_products(monkeypatch):
    """A list that grows by the dtype of each product with a 4-bit weight, with an adapter or without."""
    seen = []
    for name in ("linear_4bit", "lora_linear_4bit"):
        op = getattr(torch.ops.pyquant, name)
        monkeypatch.setattr(
            torch.ops.pyquant, name, lambda x, *args, op=op: (seen.append(x.dtype), op(x, *args))[1], raising=False
        )
    return seen


@pytest.fixture
def product_dtypes(monkeypatch):
    return record_products(monkeypatch)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


each_kind = pytest.mark.parametrize("kind", ["base", "adapted"])


@pytest.mark.parametrize(("kind", "dropout"), [("base", 0.0), ("adapted", 0.0), ("adapted", 0.3)])
def test_one_graph_without_breaks_serves_every_number_of_rows(kind, dropout):
    model = build(kind, dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 9, 33, 128):
        x = torch.randn(rows, 3, 64)
        assert_same(gradients(compiled, x), gradients(model, x))
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 4, "a new number of rows compiles nothing"


def test_automatic_dynamic_shapes_compile_twice():
    model = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (5, 9, 33, 128):
        torch.testing.assert_close(compiled(torch.ones(rows, 64)), model(torch.ones(rows, 64)), rtol=0, atol=0)
    assert counter.frame_count == 2


def test_inductor_takes_the_ops():
    model, x = build(), torch.randn(6, 64)
    ours, theirs = gradients(torch.compile(model, fullgraph=True), x), gradients(model, x)
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@each_kind
def test_a_compiled_layer_replays_a_cuda_graph(kind):
    layer = build(kind)[0].cuda().bfloat16().eval()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    with torch.no_grad():
        for _ in range(5):  # a warm-up, the capture, and replays
            x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), layer(x), rtol=0.01, atol=0.01)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_a_cuda_graph_of_an_adapted_layer_draws_a_new_mask_in_each_replay(monkeypatch):
    layer = build(dropout=0.5)[0].cuda().bfloat16().train()
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    op, calls = torch.ops.pyquant.lora_linear_4bit, []
    monkeypatch.setattr(
        torch.ops.pyquant, "lora_linear_4bit", lambda *args: (calls.append(args), op(*args))[1], raising=False
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    *weight_and_adapter, dropout, seed = calls[-1]  # tensors of the graph, which each replay writes
    seeds = []
    for _ in range(3):
        x.copy_(torch.randn(16, 64))
        graph.replay()
        assert torch.equal(y, op(*weight_and_adapter, dropout, seed)[0])
        assert not torch.equal(y, op(*weight_and_adapter, 0.0, None)[0])
        seeds.append(seed.item())
    assert len(set(seeds)) == 3


def test_a_whole_adapted_model_compiles_without_breaks(tiny_mistral, token_ids):
    tiny_mistral.model.layers = tiny_mistral.model.layers[:1]
    pyquant.replace_linear(tiny_mistral, verbose=False)
    model = get_peft_model(tiny_mistral, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (token_ids, torch.cat([token_ids, token_ids], 1)):
        results = []
        for run in (compiled, model):
            model.zero_grad()
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
        torch.testing.assert_close(results[0][0], results[1][0])
        for ours, theirs in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@each_kind
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_rows_saves_and_loads(kind, strict):
    model = build(kind).eval()
    shapes = ({0: torch.export.Dim("rows", min=2)},)
    program = torch.export.export(model, (torch.randn(5, 64),), dynamic_shapes=shapes, strict=strict)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert any("pyquant" in str(target) for target in targets), targets
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (5, 17):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_respects_the_compute_dtype(kind, autocast, compute_dtype, dtype, product_dtypes):
    """Products run in compute_dtype; without one, in autocast's dtype: never in float32 unless that was chosen."""
    model = build(kind, compute_dtype=compute_dtype)
    with torch.autocast("cpu", autocast):
        y = model(torch.randn(3, 64, dtype=dtype))
    expected = compute_dtype or autocast
    assert product_dtypes == [expected, expected]
    assert y.dtype in (dtype, autocast)  # GELU may cast between the layers


@each_kind
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float16])
def test_autocast_after_an_evaluation_in_float32_runs_in_its_dtype(kind, compute_dtype, product_dtypes):
    model, x = build(kind, compute_dtype=compute_dtype), torch.randn(3, 64)
    with torch.no_grad():
        model.eval()(x)
    assert product_dtypes == [compute_dtype or torch.float32] * 2
    product_dtypes.clear()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            model(x.to(dtype))
    assert product_dtypes == [compute_dtype or torch.bfloat16] * 4


@each_kind
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_inputs_dtype(kind, compute_dtype, dtype):
    model = build(kind, compute_dtype=compute_dtype).to(dtype)
    assert model(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@each_kind
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_copy_computes_the_same_and_is_independent(kind, how, storage):
    model = build(kind, quant_storage=storage)
    x = torch.randn(5, 64)
    expected = gradients(model, x)
    copied = COPIES[how](model)
    assert_same(gradients(copied, x), expected)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert_same(gradients(model, x), expected)


@each_kind
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_moves_and_casts_leave_the_packed_bytes(kind, storage):
    model = build(kind, quant_storage=storage)
    packed = [m.weight.data.clone().view(torch.uint8) for m in model.modules() if isinstance(m, Linear4bit)]
    x = torch.randn(5, 64)
    expected = model(x)
    for move in (
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float64).to(torch.float32),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("cpu", torch.float16).to(dtype=torch.float32),
    ):
        model = move(model)
        weights = [m.weight.data.view(torch.uint8) for m in model.modules() if isinstance(m, Linear4bit)]
        assert all(torch.equal(a, b) for a, b in zip(weights, packed, strict=True))
        assert model(x).dtype == torch.float32
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)  # biases and adapters were rounded


@each_kind
def test_a_model_made_on_meta_takes_a_checkpoint(kind):
    source = build(kind)
    with torch.device("meta"):
        target = network()
    pyquant.replace_linear(target, verbose=False)
    assert all(p.is_meta for p in target.parameters())
    if kind == "adapted":
        target = get_peft_model(target, LoraConfig(r=4, target_modules=["0", "2"]), low_cpu_mem_usage=True)
        target = target.base_model.model
    result = target.load_state_dict(source.state_dict(), strict=True, assign=True)
    assert not result.missing_keys
    assert not any(p.is_meta for p in target.parameters())
    x = torch.randn(5, 64)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(kind, reentrant):
    model = build(kind, dropout=0.3)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    x = torch.randn(5, 64)
    y, expected = gradients(model, x)
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    result = checkpointed(leaf)
    result.square().sum().backward()
    torch.testing.assert_close(result, y, rtol=0, atol=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == {"base": 2, "adapted": 4}[kind], "the biases, or A and B of both layers"
    for ours, theirs in zip([leaf, *trainable], expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=0)
