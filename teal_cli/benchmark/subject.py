"""What a benchmark runs on: a decoder, a prompt for it, and a setting for each sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teal_cli.benchmark.bench import Attach, SettingFor, Settings, require_memory_for
from teal_cli.benchmark.self_calibration import met_setting, self_calibrated
from teal_cli.errors import UsageError
from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.prompts import Prompts
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization
from teal_cli.model.random_weights import SHAPES, random_decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import Setting
from teal_cli.store import models
from teal_cli.suggestions import did_you_mean, quoted

# A text that any model continues; repeated where a longer prompt is asked for.
_TEXT = (
    "The harbour lay quiet under a low grey sky, and the first boats were already on their way "
    "back. On the quay the traders had set up their stalls, weighed out ice and salt, and argued "
    "about the price of mackerel as their fathers had done. By nine the market would be full. "
)

# A page to be copied with one change, so that nearly all of the answer stands in the prompt.
_COPY = """\
Repeat the following list word for word, only replace "butter" with "oil".

1. Bring four potatoes and two onions.
2. Wash the potatoes and cut them into cubes.
3. Chop the onions and fry them in a little butter.
4. Add a litre of water and some salt.
5. Boil the soup for twenty minutes, then mash it.
6. Stir in a spoon of vinegar and let it rest.
7. Put a warm plate in front of every guest.
8. Serve it hot with bread and fresh herbs."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A decoder and what it needs to be measured; `description` names it in results."""

    decoder: Decoder
    description: dict[str, Any]
    prompt: list[int]
    setting_for: SettingFor
    guessers: Mapping[str, Attach] | None = None  # by label
    gguf: Path | None = None  # the file that the model was converted from


def text_prompt(tokenizer: Any, settings: Settings) -> list[int]:
    """Tokens of a text, as many as asked for; or of a chat's request to copy a page."""
    if not settings.copy:
        tokens: list[int] = tokenizer(_TEXT)["input_ids"]
        tokens *= -(-settings.prompt_tokens // len(tokens))
        return tokens[: settings.prompt_tokens]
    template = ChatTemplate.of(tokenizer)
    if template is None:
        page: list[int] = tokenizer(_COPY + "\n\n")["input_ids"]
        return page
    think = False if template.switches else None
    return Prompts(tokenizer, template).encode([{"role": "user", "content": _COPY}], think)[1]


def model_subject(
    checkpoint: Checkpoint,
    profile: Profile | None,
    made: Mapping[float, Setting],
    prompt: list[int],
    device: torch.device,
    gguf: Path | None = None,
) -> Subject:
    """A model with its own weights, a prompt, and what its profile has for each sparsity."""
    decoder = checkpoint.load(device)
    description: dict[str, Any] = {
        "name": checkpoint.name,
        "weights": "its own",
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint,
        **weights_type(decoder),
    }
    if profile is not None:
        description["method"] = next(iter(made.values())).method
        description["recovered"] = any(setting.vectors is not None for setting in made.values())
        description["calibrated_on"] = profile.provenance.get("dataset")
    return Subject(
        decoder,
        description,
        prompt,
        lambda session, sparsity: made[sparsity],
        gguf=gguf,
    )


def random_subject(
    model: str | None,
    dtype: torch.dtype,
    settings: Settings,
    device: torch.device,
    reporter: Reporter,
    kind: Quantization | None = None,
) -> Subject:
    """Random weights at a model's shape, a random prompt, and thresholds that decoding meets.

    Args:
        model: a key of SHAPES or another short name of it, or a folder that holds a config.json.
        dtype: of the weights.
        settings: the seed is theirs.
        device: where to make the weights.
        reporter: follows what takes long.
        kind: how the matrices are quantized.

    Raises:
        UsageError: there is no such shape, or its context is too short.
        UnsupportedError: the shape cannot be quantized like that.
        TealError: there is not enough memory.
    """
    decoder, description = random_model(model, dtype, settings, device, reporter, kind)
    config = decoder.config
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.prompt_tokens,)
    prompt: list[int] = torch.randint(config.vocab_size, size, generator=generator).tolist()
    profile = self_calibrated(decoder, seed=settings.seed, reporter=reporter)
    return Subject(
        decoder,
        description | {"method": "uniform"},
        prompt,
        lambda session, sparsity: met_setting(session, profile, sparsity, prompt),
    )


def random_model(
    model: str | None,
    dtype: torch.dtype,
    settings: Settings,
    device: torch.device,
    reporter: Reporter,
    kind: Quantization | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Random weights at a model's shape, and what names them; arguments as `random_subject`.

    Raises:
        UsageError: there is no such shape, or its context is too short.
        TealError: there is not enough memory.
    """
    name, config = shape_of(model)
    settings.check(config)
    require_memory_for(config, dtype, device, settings, name, kind)
    with reporter.task(f"making random weights at the shape of {name}"):
        decoder = random_decoder(config, device=device, dtype=dtype, seed=settings.seed, kind=kind)
    return decoder, {"name": name, "weights": "random", **weights_type(decoder)}


def weights_type(decoder: Decoder) -> dict[str, str | None]:
    """What the weights are stored as, for results."""
    kind = decoder.weights.quantization
    return {"dtype": _name(decoder.dtype), "quantization": kind.name if kind else None}


def shape_of(model: str | None) -> tuple[str, ModelConfig]:
    """A built-in shape, or the one in a folder's config.json."""
    if model is not None and (folder := Path(model).expanduser()).is_dir():
        return folder.resolve().name, ModelConfig.from_file(folder / "config.json")
    name = models.short_name(model or "")
    if name not in SHAPES:
        raise UsageError(
            "--random-weights needs a shape" + (f", and {quoted(model)} is none" if model else ""),
            hint=f"{did_you_mean(model or '', SHAPES)}"
            f"Name a folder with a config.json, or one of: {', '.join(SHAPES)}.",
        )
    return name, SHAPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
