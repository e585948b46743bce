"""What the table's rows share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("differential.comparisons")  # so that a row says what differs
