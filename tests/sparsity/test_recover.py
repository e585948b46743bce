"""Vectors of recovery: their gradients, what they win back, resumed runs and what a file holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsity.interrupts import QUIET, Stop, StopsAfter
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.decoder import Decoder
from teal_cli.sparsity import recover as learning
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.observe import SKIPPED_POSITIONS
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.recover import Lesson, recover
from teal_cli.sparsity.recovery import FIELDS, Recovery, own_vectors
from teal_cli.sparsity.streaming import streamed
from teal_cli.sparsity.workspace import Workspace

METHOD = "uniform"


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 97, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def profile(decoder: Decoder, windows: Tensor) -> Profile:
    return calibrate(decoder, windows, model="tiny", fingerprint="f", reporter=QUIET)


def lesson(
    decoder: Decoder, windows: Tensor, folder: Path | None = None, *, steps: int = 3
) -> Lesson:
    return Lesson(decoder, decoder, windows, METHOD, steps, Workspace(folder, "f"))


def learnt(
    profile: Profile, lesson: Lesson, *targets: float, reporter: Any = QUIET, **options: Any
) -> Profile:
    keep = options.get("keep", lambda found: None)
    return recover(profile, lesson, targets, {"dataset": "t"}, keep=keep, reporter=reporter)


def random_vectors(decoder: Decoder, size: float = 0.1) -> RecoveryVectors:
    generator = torch.Generator().manual_seed(2)
    own = own_vectors(decoder)
    return RecoveryVectors(
        *(
            getattr(own, n) + size * torch.randn(getattr(own, n).shape, generator=generator)
            for n in FIELDS
        )
    )


def divergence(decoder: Decoder, windows: Tensor, setting: Any) -> Tensor:
    """The mean KL to the dense model at sparse positions, by one pass through the whole decoder."""
    total = torch.zeros(())
    for row in windows:
        with torch.no_grad():
            dense = decoder.logits(decoder.forward(row)).log_softmax(-1)
        hidden = decoder.forward(
            row,
            thresholds=setting.thresholds,
            vectors=setting.vectors,
            sparse_from=SKIPPED_POSITIONS,
        )
        sparse = decoder.logits(hidden).log_softmax(-1)
        total = total + (dense.exp() * (dense - sparse)).sum(-1)[SKIPPED_POSITIONS:].mean()
    return total / len(windows)


@pytest.mark.parametrize("chunk", [1 << 24, 97 * 7], ids=["at once", "in parts"])
@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_gradients_are_those_of_a_plain_backward_pass(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    streaming: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learning, "_LOGITS_CHUNK", chunk)
    vectors = random_vectors(decoder)
    leaves = [getattr(vectors, name).requires_grad_() for name in FIELDS]
    setting = dataclasses.replace(profile.setting(0.4, METHOD), vectors=vectors)
    expected = divergence(decoder, windows[:1], setting)
    wanted = torch.autograd.grad(expected, leaves)

    model = streamed(decoder, torch.device("cpu")) if streaming else decoder
    learner = learning._Learner(profile, lesson(model, windows), QUIET)
    with torch.no_grad():
        loss, realised = learner._gradients(windows[0], profile.asked(0.4, METHOD), vectors)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert realised == pytest.approx(0.4, abs=0.05)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-7, rtol=1e-4)


def test_they_win_back_and_keep_the_target(
    decoder: Decoder, windows: Tensor, profile: Profile
) -> None:
    found = learnt(profile, lesson(decoder, windows, steps=96), 0.5)
    with torch.no_grad():
        without, with_vectors = (
            divergence(decoder, windows, found.setting(0.5, METHOD, recover=r))
            for r in (False, True)
        )
    assert with_vectors < 0.9 * without
    setting = found.setting(0.5, METHOD)
    assert setting.label == f"{METHOD}, recovered 0.5"
    assert realised(decoder, windows, setting) == pytest.approx(0.5, abs=0.003)


def test_learning_starts_from_the_vectors_of_the_model_before_rounding(
    decoder: Decoder, windows: Tensor, profile: Profile
) -> None:
    start = Recovery.nothing(decoder, {}).learnt(0.5, 0.0, random_vectors(decoder))
    one_step = dataclasses.replace(lesson(decoder, windows, steps=1), start=start)
    assert learning._rate(0.25, 1.0) == 0  # the last step, which is the first, changes nothing
    found = learnt(profile, one_step, 0.25, 0.6).recovery[METHOD]
    for name in FIELDS:
        expected = (getattr(start.at(0.25), name), getattr(own_vectors(decoder), name))
        for target, wanted in zip((0.25, 0.6), expected, strict=True):
            torch.testing.assert_close(getattr(found.at(target), name), wanted)


def realised(decoder: Decoder, windows: Tensor, setting: Any) -> float:
    from teal_cli.sparsity.skips import SkipCount

    count = SkipCount(decoder, setting.thresholds)
    for row in windows:
        decoder.forward(
            row,
            thresholds=setting.thresholds,
            vectors=setting.vectors,
            sparse_from=SKIPPED_POSITIONS,
            observe=count.observer(SKIPPED_POSITIONS),
        )
    return count.skips().realised_sparsity


def test_thresholds_are_set_for_the_vectors(
    decoder: Decoder, windows: Tensor, profile: Profile
) -> None:
    vectors = random_vectors(decoder, 0.3)
    learner = learning._Learner(profile, lesson(decoder, windows), QUIET)
    with torch.no_grad():
        asked = learner._settled(0.5, 0.45, vectors)
    setting = dataclasses.replace(
        profile.setting(0.5, METHOD),
        thresholds=profile.thresholds_at(asked, METHOD),
        vectors=vectors,
    )
    assert realised(decoder, windows[:8], setting) == pytest.approx(0.5, abs=0.003)


def equal(a: Recovery, b: Recovery) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    same = (torch.equal(x, y) for x, y in pairs)
    return a.targets == b.targets and a.offsets == b.offsets and all(same)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(
    decoder: Decoder, windows: Tensor, profile: Profile, tmp_path: Path, done: int
) -> None:
    undisturbed = learnt(profile, lesson(decoder, windows), 0.3, 0.5)
    kept = [profile]
    with pytest.raises(Stop):
        learnt(
            profile,
            lesson(decoder, windows, tmp_path),
            0.3,
            0.5,
            reporter=StopsAfter(done),
            keep=kept.append,
        )
    missing = [t for t in (0.3, 0.5) if METHOD not in kept[-1].recovery or t > 0.3]
    follower = StopsAfter(None)
    resumed = learnt(kept[-1], lesson(decoder, windows, tmp_path), *missing, reporter=follower)
    assert equal(resumed.recovery[METHOD], undisturbed.recovery[METHOD])
    assert any(note.startswith("resuming at step") for note in follower.notes) == (done != 3)


def test_another_text_resumes_nothing(
    decoder: Decoder, windows: Tensor, profile: Profile, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        learnt(profile, lesson(decoder, windows, tmp_path), 0.3, reporter=StopsAfter(2))
    follower = StopsAfter(None)
    other = windows.flip(1)
    found = learnt(profile, lesson(decoder, other, tmp_path), 0.3, reporter=follower)
    assert not follower.notes
    assert equal(
        found.recovery[METHOD], learnt(profile, lesson(decoder, other), 0.3).recovery[METHOD]
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = learnt(profile, lesson(decoder, windows), 0.3, 0.5)
    plain = learning._Learner._gradients
    calls = 0

    def overflowing(*arguments: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        loss, share = plain(*arguments)
        return (float("nan") if calls == 5 else loss), share  # the second step at 0.5

    kept: list[Profile] = []
    monkeypatch.setattr(learning._Learner, "_gradients", overflowing)
    with pytest.raises(
        TealError, match=r"at a target of 0\.5 is not finite in step 2 of 3"
    ) as said:
        learnt(profile, lesson(decoder, windows, tmp_path), 0.3, 0.5, keep=kept.append)
    assert "kept" in str(said.value.hint)
    assert kept[-1].recovery[METHOD].targets == (0.0, 0.3)
    resumed = learnt(kept[-1], lesson(decoder, windows, tmp_path), 0.5)
    assert equal(resumed.recovery[METHOD], undisturbed.recovery[METHOD])


def test_what_cannot_be_learnt_is_refused(
    decoder: Decoder, windows: Tensor, profile: Profile
) -> None:
    with pytest.raises(UsageError, match="15 windows of text are too few"):
        learnt(profile, lesson(decoder, windows[:15]), 0.5)
    with pytest.raises(UsageError, match="nothing to win back"):
        learnt(profile, lesson(decoder, windows), 0.5, 0.0)
    with pytest.raises(UsageError, match="no method 'best'"):
        learnt(profile, dataclasses.replace(lesson(decoder, windows), method="best"), 0.5)


def test_between_targets_vectors_are_interpolated_and_beyond_there_are_none(
    decoder: Decoder, profile: Profile
) -> None:
    low, high = random_vectors(decoder, 0.1), random_vectors(decoder, 0.3)
    recovery = Recovery.nothing(decoder, {}).learnt(0.6, 0.02, high).learnt(0.4, 0.01, low)
    found = profile.recovered(METHOD, recovery)
    assert recovery.targets == (0.0, 0.4, 0.6)
    own = own_vectors(decoder)
    for name in FIELDS:
        a, b, none = getattr(low, name), getattr(high, name), getattr(own, name)
        at = {target: getattr(recovery.at(target), name) for target in (0.1, 0.4, 0.45, 0.6)}
        torch.testing.assert_close(at[0.1], none + (a - none) / 4)
        torch.testing.assert_close(at[0.4], a)
        torch.testing.assert_close(at[0.45], a + (b - a) / 4)
        torch.testing.assert_close(at[0.6], b)
    assert recovery.asked(0.45) == pytest.approx(0.4625)
    assert torch.equal(
        found.setting(0.45, METHOD).thresholds,  # type: ignore[arg-type]
        profile.thresholds_at(0.4625, METHOD),
    )
    for target in (0.0, 0.65):
        setting = found.setting(target, METHOD)
        assert setting.vectors is None
        assert torch.equal(setting.thresholds, profile.thresholds(target, METHOD))  # type: ignore[arg-type]
    assert found.setting(0.5, METHOD, recover=False).vectors is None


def stored(decoder: Decoder, profile: Profile, path: Path) -> Profile:
    recovery = Recovery.nothing(decoder, {"dataset": "t"}).learnt(
        0.5, 0.01, random_vectors(decoder)
    )
    found = profile.recovered(METHOD, recovery)
    found.save(path)
    return found


def test_a_profile_keeps_them(decoder: Decoder, profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    before = stored(decoder, profile, path).recovery[METHOD]
    after = Profile.load(path).recovery[METHOD]
    assert equal(before, after)
    assert after.provenance == {"dataset": "t"}
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(after.at(0.5), name), getattr(before.at(0.5), name), atol=1e-6, rtol=1e-3
        )


def edited(path: Path, edit: Any) -> None:
    """Rewrite a profile's file with another header or other tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["teal"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(header, tensors)
    save_file(tensors, path, metadata={"teal": json.dumps(header)})


def cut(header: Any, tensors: dict[str, Tensor]) -> None:
    tensors[f"recovery.{METHOD}.o"] = tensors[f"recovery.{METHOD}.o"][:, :, :5].contiguous()


def poison(header: Any, tensors: dict[str, Tensor]) -> None:
    tensors[f"recovery.{METHOD}.norm"][1, 3] = float("inf")


def lose(header: Any, tensors: dict[str, Tensor]) -> None:
    del tensors[f"recovery.{METHOD}.down"]


def shuffle(header: Any, tensors: dict[str, Tensor]) -> None:
    header["recovery"][METHOD]["targets"] = [0.5, 0.0]


@pytest.mark.parametrize("edit", [cut, poison, lose, shuffle])
def test_damaged_vectors_are_refused(
    decoder: Decoder, profile: Profile, tmp_path: Path, edit: Any
) -> None:
    path = tmp_path / "p.safetensors"
    stored(decoder, profile, path)
    edited(path, edit)
    with pytest.raises(TealError, match="damaged"):
        Profile.load(path)


def test_a_profile_of_the_version_before_is_read(profile: Profile, tmp_path: Path) -> None:
    def before(header: Any, tensors: dict[str, Tensor]) -> None:
        header["schema"] = 3
        del header["recovery"]

    path = tmp_path / "p.safetensors"
    profile.save(path)
    edited(path, before)
    assert Profile.load(path).recovery == {}
