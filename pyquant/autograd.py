"""The ops' derivatives. The 4-bit weight is frozen: gradients go to the input, the bias and the adapter alone, and
nothing of the weight's dense size is saved.

They are registered with the ops, for torch.compile and whoever calls the ops; `linear_4bit` and `lora_linear_4bit` are
the same for eager code. A registered derivative costs 30 to 60 µs of the host's time a call more than a
``torch.autograd.Function``, which for few tokens is most of a layer's time.
"""

import torch

__all__ = ["linear_4bit", "lora_linear_4bit"]

_ops = torch.ops.pyquant
# Where the weight stands in the arguments of an op that starts (x, packed, absmax, …, n, k, …).
_WEIGHT = slice(1, 10)


def _bias_gradient(dy):
    return dy.reshape(-1, dy.shape[-1]).sum(0)


def _save_weight(ctx, inputs, extra):
    """Saves the tensors among the weight's arguments, and `extra`, through autograd, the rest as attributes."""
    packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, n, k = inputs[_WEIGHT]
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_code, offset, *extra)
    ctx.weight_options = (quant_type, blocksize, n, k)


def _linear_setup(ctx, inputs, output):
    _save_weight(ctx, inputs, ())


def _linear_backward(ctx, dy):
    dx = _ops.linear_4bit_dx(dy, *ctx.saved_tensors, *ctx.weight_options) if ctx.needs_input_grad[0] else None
    bias = _bias_gradient(dy) if ctx.needs_input_grad[10] else None
    return dx, *([None] * 9), bias


def _linear_dx_backward(ctx, grad):
    dy = _ops.linear_4bit(grad, *ctx.saved_tensors, *ctx.weight_options, None) if ctx.needs_input_grad[0] else None
    return dy, *([None] * 9)


def _lora_setup(ctx, inputs, output):
    x, lora_A, lora_B, scaling, dropout, seed = inputs[0], *inputs[11:16]
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.set_materialize_grads(False)  # none for xa, and no zeros in its place
    _save_weight(ctx, inputs, (x, xa, lora_A, lora_B, seed))
    ctx.adapter_options = (scaling, dropout)


def _lora_backward(ctx, dy, _):
    *weight, x, xa, lora_A, lora_B, seed = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    dx, dA, dB = _ops.lora_linear_4bit_backward(
        dy, x, xa, *weight, *ctx.weight_options, lora_A, lora_B, *ctx.adapter_options, seed, needs_dx
    )
    bias = _bias_gradient(dy) if ctx.needs_input_grad[10] else None
    return (
        dx if needs_dx else None,
        *([None] * 9),
        bias,
        dA.to(lora_A.dtype),
        dB.to(lora_B.dtype),
        None,
        None,
        None,
    )


torch.library.register_autograd("pyquant::linear_4bit", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("pyquant::linear_4bit_dx", _linear_dx_backward, setup_context=_linear_setup)
torch.library.register_autograd("pyquant::lora_linear_4bit", _lora_backward, setup_context=_lora_setup)


# With a separate setup_context, torch would bind the arguments by name in every call, which takes as long again.
class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.linear_4bit(*inputs)
        _linear_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_linear_backward)


class _LoraLinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.lora_linear_4bit(*inputs)
        _lora_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_lora_backward)


def _records(*tensors) -> bool:
    """Whether autograd records a call with these tensors, in eager mode. A graph that is traced wants the op itself."""
    return (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
    )


def linear_4bit(*args) -> torch.Tensor:
    """``torch.ops.pyquant.linear_4bit`` with the same arguments."""
    if _records(args[0], args[10]):
        return _Linear4bit.apply(*args)
    return _ops.linear_4bit(*args)


def lora_linear_4bit(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.ops.pyquant.lora_linear_4bit`` with the same arguments."""
    if _records(args[0], *args[10:13]):
        return _LoraLinear4bit.apply(*args)
    return _ops.lora_linear_4bit(*args)
