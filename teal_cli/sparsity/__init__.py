"""From activations to thresholds: histograms, profiles, allocations, presets."""
