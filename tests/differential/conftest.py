"""What the table's rows share."""

from __future__ import annotations

import pytest

# So that a row says what differs.
pytest.register_assert_rewrite("differential.comparisons", "differential.answers")
