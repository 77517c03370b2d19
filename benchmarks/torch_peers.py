"""The torch sides of `benchmarks.peers`: torchopt, higher and betty-ml, each imported where it is used.

Each is `(case) -> call() -> gradient [1 + NUM_SOURCES]`, all through the library's own differentiable Adam.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks import peer_models
from benchmarks.peer_models import B1, B2, EPS


def _torch_case(case: peer_models.Case):
  """Losses, batches of the unroll and of the outer loss, and a maker of fresh meta-parameters, as tensors."""
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
  inner, outer = peer_models.torch_tensors(case.inner), peer_models.torch_tensors(case.outer)
  steps = len(inner["source"])
  batches = [{name: x[t] for name, x in inner.items()} for t in range(steps)]

  def make_meta_params():
    log_learning_rate = torch.tensor(float(case.meta_params["log_learning_rate"]), requires_grad=True)
    return log_learning_rate, torch.tensor(case.meta_params["mixture_logits"], requires_grad=True)

  return peer_models.torch_inner_loss(case), peer_models.torch_outer_loss(case), batches, outer, make_meta_params


def _flat(grads: Iterable[Any]) -> np.ndarray:
  return np.concatenate([np.atleast_1d(grad.detach().numpy()) for grad in grads])


def _torchopt(case: peer_models.Case) -> Callable:
  """Its functional Adam, with moments that carry gradients."""
  import torch
  import torchopt

  inner_loss, outer_loss, batches, outer, make_meta_params = _torch_case(case)
  initial = {name: x.requires_grad_() for name, x in peer_models.torch_tensors(case.params).items()}

  def call():
    log_learning_rate, logits = make_meta_params()
    optimizer = torchopt.adam(log_learning_rate.exp(), betas=(B1, B2), eps=EPS, moment_requires_grad=True)
    params, state = initial, optimizer.init(initial)
    for batch in batches:
      grads = torch.autograd.grad(inner_loss(params, logits, batch), tuple(params.values()), create_graph=True)
      grads = dict(zip(params, grads, strict=True))
      updates, state = optimizer.update(grads, state, params=params, inplace=False)
      params = torchopt.apply_updates(params, updates, inplace=False)
    return _flat(torch.autograd.grad(outer_loss(params, outer), (log_learning_rate, logits)))

  return call


def _higher(case: peer_models.Case) -> Callable:
  import higher
  import torch

  inner_loss, outer_loss, batches, outer, make_meta_params = _torch_case(case)
  module = peer_models.torch_module(case)
  optimizer = torch.optim.Adam(module.parameters(), betas=(B1, B2), eps=EPS)

  def call():
    log_learning_rate, logits = make_meta_params()
    with higher.innerloop_ctx(module, optimizer, override={"lr": [log_learning_rate.exp()]}) as (model, adam):
      for t, batch in enumerate(batches):
        # Its Adam adds eps before the second moment's bias correction, the others after it.
        adam.step(inner_loss(model(), logits, batch), override={"eps": [EPS * math.sqrt(1 - B2 ** (t + 1))]})
      return _flat(torch.autograd.grad(outer_loss(model(), outer), (log_learning_rate, logits)))

  return call


def _betty(case: peer_models.Case) -> Callable:
  """Its `IterativeProblem` with second-order gradients: the exact unroll, not its default finite difference."""
  import torch
  from betty import configs, engine, problems
  from betty.logging import logger_base

  logger_base.get_logger().setLevel(logging.ERROR)
  inner_loss, outer_loss, batches, outer_batch, make_meta_params = _torch_case(case)
  turn = iter(())

  class Inner(problems.IterativeProblem):
    def get_batch(self):
      return next(turn)

    def training_step(self, batch):
      return inner_loss(self.fmodule(self.params, self.buffers), self.outer.module[1], batch)

  class Outer(problems.ImplicitProblem):
    def get_batch(self):
      return outer_batch

    def training_step(self, batch):
      return outer_loss(self.inner.fmodule(self.inner.params, self.inner.buffers), batch)

    def custom_optimizer_step(self):
      self.found = _flat(parameter.grad for parameter in self.module)

  module = peer_models.torch_module(case)
  meta_params = torch.nn.ParameterList(make_meta_params())
  adam = torch.optim.Adam(module.parameters(), betas=(B1, B2), eps=EPS)
  inner = Inner("inner", configs.Config(unroll_steps=len(batches), retain_graph=True), module, adam)
  outer = Outer("outer", configs.Config(first_order=False), meta_params, torch.optim.SGD(meta_params.parameters(), 0.0))
  dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
  runner = engine.Engine([inner, outer], configs.EngineConfig(), dependencies)
  runner.train()
  initial = inner.params

  def reset():
    inner.params = tuple(x.detach().clone().requires_grad_() for x in initial)
    for state, x in zip(inner.optimizer.state, initial, strict=True):
      # It leaves its Adam at step 1 after a step with gradients of 0, so the bias corrections would be one step ahead.
      state.update(step=0, exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x))
    inner.optimizer.param_groups[0]["lr"] = meta_params[0].exp()

  def call():
    nonlocal turn
    turn = iter(batches)
    reset()
    for _ in batches:
      runner.train_step()
    reset()  # lets go of the graph
    return outer.found

  return call


# side -> how to prepare it, and its package
SIDES: dict[str, tuple[Callable[[peer_models.Case], Callable], str]] = {
  "torchopt": (_torchopt, "torchopt"),
  "higher": (_higher, "higher"),
  "betty": (_betty, "betty-ml"),
}
