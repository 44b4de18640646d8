"""The optimizer and its schedule, and what becomes of both when parameters are replaced."""

from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.optim import muon as timm_muon
from timm.optim.muon import muon, zeropower_via_newtonschulz
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linvision.train.settings import Optim

FALLBACK = ('patch_embed*', 'head*', 'pos_embed', 'cls_token', 'reg_token', 'projection*', 'position*')
CLOCK_UPDATES = 10_000  # resolution of a schedule that follows the clock


def create_optimizer(optim: Optim, model: nn.Module, precision: str = 'fp32') -> torch.optim.Optimizer:
    """The recipe's optimizer over groups with and without weight decay, and with a rate that falls by layer if wished.

    Hybrid optimizers (Muon) take the matrices of the blocks; embedding, head, positions and projections go to their
    fallback (AdamW).

    Args:
        optim: Optimizer, learning rate and decay.
        model: The model.
        precision: In which it trains.
    """
    hybrid = optim.opt in list_optimizers('*muon*')
    rule = partial(param_groups_layer_decay, layer_decay=optim.layer_decay)
    groups = partial(
        rule if optim.layer_decay < 1 else param_groups_weight_decay,
        weight_decay=optim.weight_decay,
        no_weight_decay_list=getattr(model, 'no_weight_decay', tuple)(),  # none where the model names none
        fallback_list=FALLBACK if hybrid else (),
    )
    rates: dict[str, Any] = {'lr': optim.lr, 'weight_decay': optim.weight_decay}
    further: dict[str, Any] = optim.opt_args
    optimizer = create_optimizer_v2(model, opt=optim.opt, **rates, param_group_fn=groups, **further)
    if hybrid:
        step_in_stacks(optimizer, precision == 'fp32' and next(model.parameters()).device.type == 'cpu')
    return optimizer


def step_in_stacks(optimizer: torch.optim.Optimizer, in_fp32: bool) -> None:
    """Let Muon step all matrices of one shape together, and iterate in fp32 if wished, in this optimizer's steps.

    Each matrix costs some 25 kernels, most of microseconds: on a GPU they are launches. The iteration runs in bf16,
    which CPUs that lack it emulate at a tenth of the speed of fp32: a quarter of a whole step at 256 tokens. timm's
    optimizer looks its functions up in its module: they are exchanged there, and only while this optimizer steps, since
    others of the process may be elsewhere.
    """
    ours: dict[str, Any] = {'muon': muon_in_stacks}
    theirs: dict[str, Any] = {'muon': muon}
    if in_fp32:
        ours['zeropower_via_newtonschulz'] = partial(zeropower_via_newtonschulz, dtype=torch.float32)
        theirs['zeropower_via_newtonschulz'] = zeropower_via_newtonschulz

    def exchange(functions: dict[str, Any], *_: Any) -> None:
        for name, function in functions.items():
            setattr(timm_muon, name, function)

    optimizer.register_step_pre_hook(partial(exchange, ours))
    optimizer.register_step_post_hook(partial(exchange, theirs))


def muon_in_stacks(params: list[Tensor], grads: list[Tensor], momentum_bufs: list[Tensor], **told: Any) -> None:
    """timm's `muon`, whose equations these are, for all matrices of one shape at once; others are timm's."""
    stacks: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        stacks.setdefault(i if isinstance(param, DTensor) or param.ndim != 2 else param.shape, []).append(i)
    lr = told['lr']
    for shape, index in stacks.items():
        some, gradients, momenta = ([tensors[i] for i in index] for tensors in (params, grads, momentum_bufs))
        if len(index) == 1:
            muon(some, gradients, momenta, **told)
            continue
        torch._foreach_mul_(some, 1 - lr * told['weight_decay'])
        torch._foreach_lerp_(momenta, gradients, 1.0 - told['momentum'])
        updates = torch._foreach_lerp(gradients, momenta, told['momentum']) if told['nesterov'] else momenta
        orthogonal = timm_muon.zeropower_via_newtonschulz(
            torch.stack(list(updates)),  # (n, out, in)
            told['ns_steps'],
            timm_muon.resolve_ns_coefficients(told['ns_coefficients'], timm_muon._COEFFICIENTS),
            eps=told['eps'],
            safety_factor=told['safety_factor'],
            scale_eps=told['scale_eps'],
        )
        scale = timm_muon.get_lr_scale(shape, told['adjust_lr_fn']) if told['adjust_lr_fn'] else 1.0
        torch._foreach_add_(some, list(orthogonal.to(some[0].dtype).unbind()), alpha=-lr * scale)


def create_schedule(optim: Optim, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler:
    """The learning rate over `updates` updates, after a linear warm-up."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=updates,
        warmup_epochs=round(updates * optim.warmup),
        warmup_lr=0.0,
    )
    return schedule


def carry_state(
    old: torch.optim.Optimizer,
    before: dict[str, nn.Parameter],
    new: torch.optim.Optimizer,
    after: dict[str, nn.Parameter],
) -> None:
    """Hand moments to a new optimizer: a parameter of the same name and shape keeps them, others start afresh.

    Args:
        old: Optimizer before the change.
        before: The parameters that it was made for, by name.
        new: Optimizer over the present parameters.
        after: These, by name.
    """
    if len(old.param_groups) == len(new.param_groups):
        for one, other in zip(old.param_groups, new.param_groups, strict=True):
            other.update({k: v for k, v in one.items() if k != 'params'})  # LAMB, for one, counts its steps there
    for name, parameter in after.items():
        if name in before and before[name].shape == parameter.shape and before[name] in old.state:
            new.state[parameter] = old.state[before[name]]
