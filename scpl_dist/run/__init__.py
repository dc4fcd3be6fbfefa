"""What every process of a run agrees on: configuration, layout, seeds, network, failures. No torch."""
