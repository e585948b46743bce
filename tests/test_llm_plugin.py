"""`llm -m teal/…`, with the real package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

llm = pytest.importorskip("llm")


@pytest.fixture
def model(teal_home: Path, tiny_model: Path) -> Any:
    from teal_cli.llm_plugin import Teal

    return Teal(str(tiny_model))


def test_llm_finds_the_models_by_the_entry_point(teal_home: Path, tmp_path: Path) -> None:
    assert "teal/demo" in [model.model_id for model in llm.get_models()]


def test_answers_are_those_of_a_chat(model: Any) -> None:
    options = {"temperature": 0.0, "max_tokens": 8}
    whole = model.prompt("Hello", stream=False, **options)
    pieces = [*model.prompt("Hello", stream=True, **options)]
    assert "".join(pieces) == whole.text() != ""
    assert (whole.usage().output, whole.usage().input) == (8, 24)
    dense = model.prompt("Hello", stream=False, sparsity=0.0, **options).text()
    own = model._parts
    own["session"].reset()
    from teal_cli.inference.conversation import Conversation
    from teal_cli.inference.sampling import Sampler, Sampling

    talk = Conversation(own["session"], own["tokenizer"], Sampler(Sampling()), **own["ends"])
    steps = talk.answer("Hello", max_new_tokens=8)
    assert dense == "".join(getattr(step, "text", "") for step in steps)


def test_a_conversation_goes_on(model: Any) -> None:
    talk = model.conversation()
    first = talk.prompt("Hello", system="Be brief.", max_tokens=5, temperature=0.0).text()
    talk.prompt("And?", max_tokens=5, temperature=0.0).text()
    seen = model._parts["tokenizer"].decode(model._parts["session"].tokens)
    assert "Hello" in seen
    assert first in seen
    assert seen.index("Hello") < seen.index("And?")


def test_bad_input_is_llms_error(model: Any) -> None:
    with pytest.raises(llm.ModelError, match="at least 0 and below 1"):
        model.prompt("Hello", sparsity=1.5).text()
    with pytest.raises(llm.ModelError, match="temperature"):
        model.prompt("Hello", temperature=-1.0).text()
