"""From flags to a trained detector: both stages' plan, loop and run folder."""
