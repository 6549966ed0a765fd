"""Speed and memory beside the official algorithm, as ratios within one run."""
