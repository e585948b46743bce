"""`teal_cli.sparsify` on transformers models: equal to our decoder, and gone without a trace."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import FAMILIES, hf_model, our_config, our_decoder
from threads import one_thread

import teal_cli
from teal_cli.errors import MissingError, TealError, UnsupportedError, UsageError
from teal_cli.model.sites import FUSED, PROJECTIONS, SITE_OF, SITES
from teal_cli.progress import Silent
from teal_cli.sparsified import put_thresholds
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.profile import Profile

LENGTH, SPARSE_FROM = 40, 4


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of hf_model("llama")."""
    windows = torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    return calibrate(
        our_decoder(hf_model("llama")),
        windows,
        model="tiny",
        methods=("sensitivity", "uniform"),
        reporter=Silent(),
    )


def tokens(batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def projection(model: Any, layer: int, name: str) -> Any:
    """The module of a projection, alone or together with others."""
    block = model.model.layers[layer]
    block = block.self_attn if name in "qkvo" else block.mlp
    fused = next(matrix for matrix, names in FUSED.items() if name in names)
    return getattr(block, f"{name}_proj", None) or getattr(block, f"{fused}_proj")


def thresholds_between_values(model: Any, sparsity: float) -> torch.Tensor:
    """Thresholds [L, 7] near a sparsity, each in the widest gap of the sparse model's own inputs.

    So that rounding flips no channel.
    """
    levels = torch.full((model.config.num_hidden_layers, 7), -1.0)
    for layer in range(len(levels)):
        for site in SITES:
            names = [name for name in PROJECTIONS if SITE_OF[name] == site]
            seen: list[torch.Tensor] = []
            put_thresholds(model, levels, sparse_from=SPARSE_FROM)
            handle = projection(model, layer, names[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0][0, SPARSE_FROM:]), prepend=True
            )
            model(tokens())
            handle.remove()
            values = seen[0].abs().flatten().sort().values
            for place, name in enumerate(names):
                middle = round((sparsity + 0.05 * place) * (len(values) - 1))
                low, high = max(middle - 40, 0), min(middle + 40, len(values) - 1)
                at = low + int(values[low : high + 1].diff().argmax())
                levels[layer, PROJECTIONS.index(name)] = (values[at] + values[at + 1]) / 2
    return levels


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_our_decoder(family: str, sparsity: float) -> None:
    model = hf_model(family)
    dense = model(tokens()).logits[0]
    levels = thresholds_between_values(model, sparsity)
    put_thresholds(model, levels, sparse_from=SPARSE_FROM)
    theirs = model(tokens()).logits[0]
    decoder = our_decoder(model)
    ours = decoder.forward(tokens()[0], thresholds=levels, sparse_from=SPARSE_FROM)
    torch.testing.assert_close(theirs, decoder.logits(ours), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs[:SPARSE_FROM], dense[:SPARSE_FROM])
    assert (theirs - dense)[SPARSE_FROM:].abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_zeroes_the_profiles_share_in_any_dtype(profile: Profile, dtype: torch.dtype) -> None:
    model = hf_model("llama").to(dtype)
    teal_cli.sparsify(model, profile, 0.5, "uniform")
    levels = profile.thresholds(0.5, "uniform")
    seen: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    module = projection(model, 1, "up")
    module.register_forward_pre_hook(lambda _, a: seen["before"].append(a[0]), prepend=True)
    module.register_forward_pre_hook(lambda _, a: seen["after"].append(a[0]))
    model(tokens(batch=3))
    (before,), (after,) = seen.values()
    keep = before.abs().float() > levels[1, PROJECTIONS.index("up")]
    keep[:, :SPARSE_FROM] = True
    assert after.dtype == dtype
    assert torch.equal(after, torch.where(keep, before, 0))
    assert 0.4 < (after[:, SPARSE_FROM:] == 0).float().mean() < 0.6


def test_what_is_not_a_number_is_kept(profile: Profile) -> None:
    model = hf_model("llama")
    teal_cli.sparsify(model, profile, 0.5, "uniform", sparse_from=0)
    x = torch.full((1, 3, model.config.hidden_size), 1e-6)
    x[0, 1, 2] = torch.nan
    assert projection(model, 1, "up")(x).isnan().any(-1).tolist() == [[False, True, False]]


def test_cached_steps_and_padding_know_their_positions(profile: Profile) -> None:
    model = hf_model("llama").double()
    teal_cli.sparsify(model, profile, 0.5)
    ids = tokens()
    expected = model(ids).logits
    first = model(ids[:, :2], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(2, LENGTH):
        out = model(ids[:, position : position + 1], past_key_values=cache)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)

    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = ids[:, :6]
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    batch = torch.cat([torch.nn.functional.pad(prompt, (5, 0)), tokens(2)[1:, :11]])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 5:], alone[0])


def test_again_replaces_and_unsparsify_leaves_nothing(profile: Profile) -> None:
    model = hf_model("llama")
    before, attributes, ids = hooks(model), set(vars(model)), tokens()
    dense = model(ids).logits
    teal_cli.sparsify(model, profile, 0.5)
    count, half = hooks(model), model(ids).logits
    teal_cli.sparsify(model, profile, 0.8, "uniform")
    assert hooks(model) == count
    assert not torch.equal(model(ids).logits, half)
    teal_cli.sparsify(model, profile, 0.5)
    assert torch.equal(model(ids).logits, half)
    duplicate = copy.deepcopy(model)
    for one in (model, duplicate):
        teal_cli.unsparsify(one)
        assert hooks(one) == before
        assert set(vars(one)) == attributes
        assert torch.equal(one(ids).logits, dense)
    teal_cli.unsparsify(model)  # a dense model stays as it is


def test_model_without_a_head_and_a_profiles_file(profile: Profile, tmp_path: Path) -> None:
    model = hf_model("llama")
    profile.save(tmp_path / "tiny.safetensors")
    teal_cli.sparsify(model.model, tmp_path / "tiny.safetensors", 0.5)
    without = model(tokens()).logits
    teal_cli.unsparsify(model.model)
    teal_cli.sparsify(model, profile, 0.5)
    assert torch.equal(model(tokens()).logits, without)


def test_profile_by_the_models_name(tiny_model: Path, teal_home: Path) -> None:
    from benchmark.commands import prepare
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(MissingError, match="no profile yet") as raised:
        teal_cli.sparsify(model, str(tiny_model), 0.5)
    assert "teal calibrate" in (raised.value.hint or "")
    with torch.enable_grad():
        prepare(tiny_model)
    dense = model(tokens()).logits
    teal_cli.sparsify(model, str(tiny_model), 0.5)
    assert not torch.equal(model(tokens()).logits, dense)


def test_what_does_not_fit_is_one_sentence(profile: Profile) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = hf_model("llama", intermediate_size=96)
    with pytest.raises(TealError, match="another shape"):
        teal_cli.sparsify(model, profile, 0.5)
    with pytest.raises(TealError, match="another shape"):
        teal_cli.sparsify(hf_model("llama", num_hidden_layers=2), profile, 0.5)
    size = our_config(model).hidden_size
    experts = AutoConfig.for_model(
        "mixtral", hidden_size=size, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=97, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"no module mlp\.gate_proj"):
        teal_cli.sparsify(AutoModelForCausalLM.from_config(experts), profile, 0.5)
    with pytest.raises(UnsupportedError, match="no decoder layers"):
        teal_cli.sparsify(torch.nn.Linear(3, 3), profile, 0.5)
    model = hf_model("llama")
    with pytest.raises(UsageError, match="below 1"):
        teal_cli.sparsify(model, profile, 1.0)
    with pytest.raises(UsageError, match="there is no method"):
        teal_cli.sparsify(model, profile, 0.5, "best")
    assert hooks(model) == 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_under_accelerates_offload(profile: Profile, order: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = hf_model("llama")
    teal_cli.sparsify(model, profile, 0.5)
    expected = model(tokens()).logits
    if order == "after":
        teal_cli.unsparsify(model)
    places = {f"model.layers.{layer}": place for layer, place in enumerate(("cpu", "disk", "disk"))}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread = accelerate.dispatch_model(
        model,
        device_map={**places, "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    if order == "after":
        teal_cli.sparsify(spread, profile, 0.5)
    assert torch.equal(spread(tokens()).logits, expected)
    teal_cli.unsparsify(spread)
    dense = spread(tokens()).logits
    assert torch.equal(dense, hf_model("llama")(tokens()).logits)


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, teal_cli\n"
        "assert 'torch' not in sys.modules\n"
        "from teal_cli import sparsify, unsparsify\n"
        "assert callable(sparsify) and callable(unsparsify) and not hasattr(teal_cli, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
