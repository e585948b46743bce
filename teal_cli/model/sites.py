"""Where sparsity applies: seven projections, fed from four input sites.

TEAL (arXiv 2408.14690, section 4.2) thresholds the input of every projection. Projections that
read the same input share a site, and so a histogram; each keeps a threshold of its own.
"""

from __future__ import annotations

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_act")

SITE_OF = {
    "q": "attn_in",
    "k": "attn_in",
    "v": "attn_in",
    "o": "attn_out",
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "mlp_act",
}

# Projections of one site are stored side by side in one matrix, so that one pass over the
# surviving rows serves all of them.
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
