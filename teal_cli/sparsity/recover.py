"""Learning the vectors of recovery: what brings a sparse model back to the dense one.

What is learnt is a bias on every projection's output and a factor on every norm's weight, by Adam
from the KL divergence to the dense model's distribution, under the sparse model's own activations:
gradients pass through the channels that are kept. The weights stay as they are.

A step takes one window through the model and back, with one layer's graph at a time, so that memory
holds little beside the weights; weights that do not fit a GPU cross to it twice a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from teal_kernels.tensors import MATRICES, RecoveryVectors
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.decoder import Decoder, threshold
from teal_cli.model.weights import Matrix, floats
from teal_cli.progress import Reporter
from teal_cli.sparsity.learning import Learning
from teal_cli.sparsity.observe import SKIPPED_POSITIONS
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.recovery import BIASES, FIELDS, Recovery, own_vectors
from teal_cli.sparsity.skips import SkipCount
from teal_cli.sparsity.workspace import Workspace

LEAST_WINDOWS = 16

_WARM_UP = 0.1  # of the steps
_BETAS = (0.9, 0.95)
# How much of a step's error in sparsity the next one is asked to make up for.
_CORRECTION = 0.2
_MEASURED_WINDOWS = 8

# Logits held at a time: 64 MB of float32, a few times.
_LOGITS_CHUNK = 1 << 24

_NOTED = 20  # steps


@dataclass(frozen=True, slots=True)
class Lesson:
    """What vectors are learnt from.

    Args:
        decoder: the model.
        teacher: the dense model whose distribution counts: the same, or what a quantized one was
            rounded from.
        windows: int64 [N, T].
        method: the allocation's.
        steps: of learning, a target; each reads one window.
        workspace: keeps what a killed run has learnt.
        start: what a quantized model starts from, the vectors of the model before rounding.
    """

    decoder: Decoder
    teacher: Decoder
    windows: Tensor
    method: str
    steps: int
    workspace: Workspace
    start: Recovery | None = None


def recover(
    profile: Profile,
    lesson: Lesson,
    targets: Sequence[float],
    provenance: Mapping[str, Any],
    *,
    keep: Callable[[Profile], None],
    reporter: Reporter,
) -> Profile:
    """A profile with vectors for `targets`, beside those that it has for others.

    Args:
        profile: of the model, which has the lesson's method.
        lesson: what to learn from.
        targets: sparsities above 0.
        provenance: what the windows are.
        keep: is given the profile after each target, for what follows may fail.
        reporter: follows the steps.

    Raises:
        UsageError: there is too little text, or a target that the method does not reach.
        TealError: the loss is not finite; what was learnt before stays.
    """
    check_targets(profile, lesson.method, targets)
    check_text(len(lesson.windows))
    recovery = profile.recovery.get(lesson.method)
    recovery = recovery or Recovery.nothing(lesson.decoder, provenance)
    learner = _Learner(profile, lesson, reporter)
    for target in sorted(targets):
        vectors, asked = learner.learn(target)
        recovery = recovery.learnt(target, asked - target, vectors)
        profile = profile.recovered(lesson.method, recovery)
        keep(profile)
    return profile


def check_targets(profile: Profile, method: str, targets: Sequence[float]) -> None:
    """Make sure that vectors can be learnt for these; errors as `recover`."""
    for target in targets:
        if target <= 0:
            raise UsageError("at a sparsity of 0 there is nothing to win back")
        profile.thresholds(target, method)


def check_text(windows: int) -> None:
    """Make sure that so many windows are enough to learn from; errors as `recover`."""
    if windows < LEAST_WINDOWS:
        raise UsageError(
            f"{windows} window{'' if windows == 1 else 's'} of text are too few to learn from",
            hint=f"Vectors need at least {LEAST_WINDOWS}, and get better up to some hundreds: "
            "give more text, or more --samples.",
        )


class _Learner:
    def __init__(self, profile: Profile, lesson: Lesson, reporter: Reporter) -> None:
        self._profile, self._lesson, self._reporter = profile, lesson, reporter
        # Hidden states and gradients in float32; on a GPU the products are of bfloat16.
        self._model = Decoder(
            lesson.decoder.config, lesson.decoder.weights, compute_dtype=torch.float32
        )
        self._device = self._model.device
        self._product_dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        base = own_vectors(lesson.decoder)
        self._base = {name: getattr(base, name).to(self._device) for name in FIELDS}
        self._unit = self._units()

    @torch.no_grad()
    def learn(self, target: float) -> tuple[RecoveryVectors, float]:
        """The vectors of one target, on the CPU, and the target to ask the allocation for."""
        steps = self._lesson.steps
        asked = self._profile.asked(target, self._lesson.method)
        weights = self._start(target)
        optimiser = torch.optim.Adam(weights.values(), lr=1.0, betas=_BETAS)
        saved = Learning(self._key(target, asked), self._lesson.workspace)
        first, asked = saved.load(weights, optimiser, asked)
        if 0 < first < steps:
            self._reporter.note(f"resuming at step {first + 1} of {steps}")
        label = f"learning at {target:g}"
        with self._reporter.task(label, total=steps, unit="steps") as task:
            task.advance(first)
            for step in range(first, steps):
                loss, realised = self._step(step, weights, optimiser, target, asked)
                asked += _CORRECTION * (target - realised)
                saved.save(step + 1, weights, optimiser, asked)
                if (step + 1) % _NOTED == 0:
                    self._reporter.note(f"{label}: step {step + 1}, KL {loss:.4f}")
                task.advance()
        vectors = self._vectors(weights)
        asked = self._settled(target, asked, vectors)
        return RecoveryVectors(*(getattr(vectors, name).cpu() for name in FIELDS)), asked

    def _start(self, target: float) -> dict[str, Tensor]:
        """What learning starts from, in units in which one rate serves all vectors."""
        start = self._lesson.start
        if start is None or not start.reaches(target):
            return {name: torch.zeros_like(base) for name, base in self._base.items()}
        vectors = start.at(target)
        return {
            name: (getattr(vectors, name).to(base.device) - base) / self._unit[name]
            for name, base in self._base.items()
        }

    def _step(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimiser: torch.optim.Adam,
        target: float,
        asked: float,
    ) -> tuple[float, float]:
        """One step of Adam: the KL before it, in nats a token, and the realised sparsity."""
        vectors = self._vectors(weights)
        for name in FIELDS:
            getattr(vectors, name).requires_grad_()
        windows = self._lesson.windows  # read again where there are too few
        loss, realised = self._gradients(windows[step % len(windows)], asked, vectors)
        gradients = {name: getattr(vectors, name).grad for name in FIELDS}
        if not math.isfinite(loss + float(sum(g.abs().sum() for g in gradients.values()))):
            raise TealError(
                f"the loss at a target of {target:g} is not finite in step {step + 1} of "
                f"{self._lesson.steps}",
                hint="What was learnt for lower targets is kept. Try --dtype float32, or less "
                "sparsity with -s.",
            )
        for name, weight in weights.items():
            weight.grad = gradients[name] * self._unit[name]
        optimiser.param_groups[0]["lr"] = _rate(target, (step + 1) / self._lesson.steps)
        optimiser.step()
        return loss, realised

    def _vectors(self, weights: Mapping[str, Tensor]) -> RecoveryVectors:
        return RecoveryVectors(*(self._base[n] + self._unit[n] * weights[n] for n in FIELDS))

    def _units(self) -> dict[str, Tensor]:
        """A bias counts in its output's root mean square, a norm's weight in what it was."""
        sums = {name: torch.zeros_like(self._base[name]) for name in BIASES}

        def project(layer: int, fused: str, x: Tensor, weight: Matrix) -> Tensor:
            y = self._product(x, floats(weight, self._product_dtype))
            sums[fused][layer] += y[SKIPPED_POSITIONS:].square().mean(0)
            return y

        rows = self._lesson.windows[:_MEASURED_WINDOWS]
        with torch.no_grad():
            for row in rows:
                self._model.forward(row, project=project)
        units = {name: (total / len(rows)).sqrt() for name, total in sums.items()}
        units |= {name: base.abs() for name, base in self._base.items() if name not in BIASES}
        # A norm's weight of 0, or an output that is always 0, stays so.
        return {name: unit.clamp_min(1e-12) for name, unit in units.items()}

    def _gradients(
        self, tokens: Tensor, asked: float, vectors: RecoveryVectors
    ) -> tuple[float, float]:
        """Add the gradients of a window's mean KL to the vectors'; it, and the realised sparsity.

        Each layer is computed again from its input, so that one layer's graph is held at a time.
        """
        model, teacher = self._model, self._lesson.teacher
        layers = range(model.config.num_hidden_layers)
        dense = teacher.embed(tokens)
        for layer in layers:
            dense = teacher.layer(layer, dense)
        count, how = self._sparse(asked, vectors)
        observe = count.observer(SKIPPED_POSITIONS)
        states = [model.embed(tokens)]
        for layer in layers:
            states.append(model.layer(layer, states[-1], observe=observe, **how))
        loss, gradient = self._loss(dense, states.pop(), vectors)
        for layer in reversed(layers):
            with torch.enable_grad():
                hidden = states.pop().detach().requires_grad_()
                out = model.layer(layer, hidden, **how)
            torch.autograd.backward(out, gradient)
            gradient = _gradient(hidden)
        return loss, count.skips().realised_sparsity

    def _loss(
        self, dense: Tensor, sparse: Tensor, vectors: RecoveryVectors
    ) -> tuple[float, Tensor]:
        """The mean KL over sparse positions, and its gradient at the last layer's output."""
        model, teacher, total = self._model, self._lesson.teacher, 0.0
        sparse = sparse.detach().requires_grad_()
        rows = max(1, _LOGITS_CHUNK // model.config.vocab_size)
        for begin in range(SKIPPED_POSITIONS, len(sparse), rows):
            part = slice(begin, begin + rows)
            wanted = teacher.logits(teacher.final_norm(dense[part])).log_softmax(-1)
            with torch.enable_grad():
                found = model.logits(model.final_norm(sparse[part], vectors)).log_softmax(-1)
                loss = (wanted.exp() * (wanted - found)).sum() / (len(sparse) - SKIPPED_POSITIONS)
            torch.autograd.backward(loss)
            total += float(loss)
        return total, _gradient(sparse)

    def _settled(self, target: float, asked: float, vectors: RecoveryVectors) -> float:
        """What to ask the allocation for, so that the text itself has the target's sparsity."""
        for _ in range(2):
            count, how = self._sparse(asked, vectors)
            for row in self._lesson.windows[:_MEASURED_WINDOWS]:
                self._model.forward(row, observe=count.observer(SKIPPED_POSITIONS), **how)
            asked += target - count.skips().realised_sparsity
        return asked

    def _sparse(self, asked: float, vectors: RecoveryVectors) -> tuple[SkipCount, dict[str, Any]]:
        """A count of what is skipped, and what makes a pass of the decoder sparse.

        Products as in the decoder's sparse positions, in a way that has gradients.
        """
        thresholds = self._profile.thresholds_at(asked, self._lesson.method)
        levels = thresholds.tolist()

        def project(layer: int, fused: str, x: Tensor, weight: Matrix) -> Tensor:
            whole = floats(weight, self._product_dtype)
            own = levels[layer][MATRICES[fused] :]
            bounds = itertools.pairwise(self._model.offsets[fused])
            parts = [
                self._product(threshold(x, level, SKIPPED_POSITIONS), whole[:, a:b])
                for level, (a, b) in zip(own, bounds, strict=False)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

        how = {"vectors": vectors, "sparse_from": SKIPPED_POSITIONS, "project": project}
        return SkipCount(self._model, thresholds), how

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.to(weight.dtype) @ weight).to(x.dtype)

    def _key(self, target: float, asked: float) -> str:
        """Names what the learning of a target depends on."""
        lesson = self._lesson
        depends_on = [self._profile.thresholds_at(asked, lesson.method)]
        if lesson.start is not None:
            depends_on += lesson.start.tensors().values()
        return lesson.workspace.key(
            f"recover {lesson.method} {target} {asked} {lesson.steps}",
            self._model,
            lesson.windows,
            *depends_on,
        )


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _rate(target: float, part: float) -> float:
    """Adam's rate after a part of the steps: up, then down as a cosine.

    What serves best grows steeply with the target: on the demo model 7e-4 at 0.4, 1.5e-3 at 0.5
    and 3e-3 to 4e-3 at 0.65.
    """
    highest = 0.012 * target**3
    if part <= _WARM_UP:
        return highest * part / _WARM_UP
    return highest * 0.5 * (1 + math.cos(math.pi * (part - _WARM_UP) / (1 - _WARM_UP)))
