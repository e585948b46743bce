"""Our own decoding as the benchmark runs it: the session and loop that chat uses."""

from __future__ import annotations

from collections.abc import Sequence

from teal_cli.benchmark.timing import Run
from teal_cli.inference.generate import Finish, Stats, generate
from teal_cli.inference.guesses import Guesser
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.sparsity.setting import Setting

_WARM_UP_TOKENS = 8


class SessionDecoding:
    """Greedy decoding of `tokens` tokens after a prompt; sessions may be shared."""

    def __init__(
        self,
        session: Session,
        setting: Setting,
        prompt: Sequence[int],
        tokens: int,
        drafting: Guesser | None = None,
    ) -> None:
        self._session = session
        self._drafting = drafting
        self._setting = setting
        self._prompt = prompt
        self._tokens = tokens

    def warm_up(self) -> None:
        """Compile the kernels for dense or sparse steps, whichever it is."""
        self._answer(min(self._tokens, _WARM_UP_TOKENS))

    def run(self) -> Run:
        """Answer the prompt from the beginning, and time it."""
        stats = self._answer(self._tokens)
        return Run(
            time_to_first_token_s=stats.time_to_first_token_s,
            time_per_token_s=stats.decode_s / (stats.new_tokens - 1),
            realised_sparsity=stats.realised_sparsity,
            draft=stats.draft,
        )

    def _answer(self, tokens: int) -> Stats:
        session = self._session
        session.reset()
        session.use(self._setting)
        session.drafting = self._drafting
        steps = generate(session, self._prompt, Sampler(Sampling()), max_new_tokens=tokens)
        *_, finish = steps
        assert isinstance(finish, Finish)
        return finish.stats
